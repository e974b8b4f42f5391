"""What of a model is observed: its sites, each with one value per row, or with one for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor

SIZE = "Take the size of the plate over rows from x, as pyro.plate('rows', x.shape[-2])"


@dataclass(frozen=True)
class Likelihood:
    """What of a model is observed.

    Attributes:
        sites: names of the observed sites; their log densities add up.
        factors: those that are written as `pyro.factor`, of which nothing can be drawn.
        joint: one that has a single value for all rows of a task; None if there is none.
    """

    sites: tuple[str, ...]
    factors: tuple[str, ...]
    joint: str | None

    @property
    def drawn(self) -> tuple[str, ...]:
        """The sites that have values to observe and to predict."""
        return tuple(name for name in self.sites if name not in self.factors)

    def together(self) -> str:
        """That a site has one value for all rows of a task, in words."""
        if self.joint in self.factors:
            return f"pyro.factor {self.joint!r} has one value for all rows of a task"
        return f"observed site {self.joint!r} draws all rows of a task together"

    def taken_apart(self) -> str:
        """What to do where rows are independent."""
        if self.joint in self.factors:
            return (
                "Give it one value per row, shape [N], without a sum or mean over rows. What hangs "
                "on latents alone is left out: varmeta learns their prior"
            )
        return (
            "If rows are independent, put the site in a plate over rows, without .to_event over "
            "them"
        )


def read_likelihood(trace: Any, observed: Sequence[str], y: Tensor) -> Likelihood:
    """What a trace of one task says of these observed sites.

    Raises:
        ValueError: a log-likelihood that has neither one value per row nor one for all.
    """
    factors = tuple(name for name in observed if _is_factor(trace.nodes[name]))
    return Likelihood(tuple(observed), factors, _joint_site(trace, observed, y))


def _joint_site(trace: Any, observed: Sequence[str], y: Tensor) -> str | None:
    """The first observed site that is one draw of all rows, as of a Gaussian process."""
    joint, rows = None, len(y)
    for name in observed:
        node = trace.nodes[name]
        law, value = node["fn"], node["value"]  # whether the value can be is asked of all tasks
        lead = value.shape[: value.dim() - law.event_dim]
        try:
            shape = tuple(torch.broadcast_shapes(law.batch_shape, lead))
        except RuntimeError:
            raise ValueError(
                f"observed site {name!r} gets values of shape {tuple(value.shape)} for a law of "
                f"batch shape {tuple(law.batch_shape)} and event shape {tuple(law.event_shape)}; "
                f"wanted one value per row, a batch shape of ({rows},). {SIZE}, and leave no "
                "other plate around the observed site"
            ) from None
        joint = name if joint is None and not shape else joint
        if shape not in ((), (rows,)):
            raise ValueError(
                f"{_named(name, node)} has a log-likelihood of shape {shape} for {rows} rows; "
                f"wanted one value per row, shape ({rows},): "
                + _remedy(node, tuple(law.batch_shape), tuple(lead), y)
            )
    return joint


def _remedy(node: Any, law: tuple[int, ...], value: tuple[int, ...], y: Tensor) -> str:
    """What mends a log-likelihood of another shape than one value per row."""
    rows = len(y)
    column, flat = (rows, 1), (rows,)
    targets = f"y has shape {tuple(y.shape)}"
    crossed = "so that each row meets every other one; "
    if _is_factor(node):
        if y.shape == column:
            return f"{targets}; give targets of shape [N], or take y.squeeze(-1) in the model"
        return "sum over what belongs to a row, such as loss.sum(-1), and not over rows"
    if value == column and law == flat:
        return (
            f"its law has shape {law} and its value {value}, {crossed}{targets}: give targets of "
            "shape [N], or pass obs=y.squeeze(-1)"
        )
    if law in (column, (rows, rows)) and value == flat:
        return (
            f"its law has shape {law} and its value {value}, {crossed}squeeze what the law is "
            "given, such as mean.squeeze(-1)"
        )
    return (
        "put it in one plate over rows, not within another plate, with .to_event(k) for targets "
        "of k dimensions"
    )


def _is_factor(node: Any) -> bool:
    """Whether `pyro.factor` has made this node."""
    law = node["fn"]
    while "base_dist" in vars(law):  # masked
        law = law.base_dist
    return isinstance(law, Unit)


def _named(name: str, node: Any) -> str:
    return f"pyro.factor {name!r}" if _is_factor(node) else f"observed site {name!r}"
