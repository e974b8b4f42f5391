"""What was observed, as the model says it: the values at its observed sites and their kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta.models.over_tasks import over_tasks
from varmeta.models.support import not_masked
from varmeta.seeds import generator, global_rng
from varmeta.tasks import Tasks

if TYPE_CHECKING:
    from varmeta.models.density import Density

_NOMINAL = {"Categorical", "OneHotCategorical", "OneHotCategoricalStraightThrough"}


@dataclass(frozen=True, eq=False)
class Observed:
    """An observed site of the tasks that a density was given.

    Attributes:
        value: `[T, N, *event]`, what the model compares with its law: of `obs=y.log()`, log y.
        seen: of the same shape, whether it does: False where a mask of the model (`poutine.mask`,
            `law.mask`) leaves an entry out, as of a censored time, or where the value is NaN.
        nominal: whether it is the name of a class, of which there are no means and distances.
    """

    value: Tensor
    seen: Tensor
    nominal: bool


def _nominal(law: Any) -> Any:
    """The law of classes without an order that this one is, or None."""
    while "base_dist" in vars(law) and type(law).__name__ not in _NOMINAL:
        law = law.base_dist
    return law if type(law).__name__ in _NOMINAL else None


def predicted_sites(density: Density, tasks: Tasks) -> dict[str, int]:
    """The observed sites that are drawn where y is not given, with the number of their classes.

    It is 0 where the law draws no classes without an order. A site that is observed all the same,
    as one that says that a censored time is longer, predicts nothing and is left out. The longest
    task is asked.
    """
    longest = int(tasks.num_rows.argmax())  # another may have no row
    x = tasks.inputs[longest, tasks.mask[longest]]
    with torch.no_grad(), global_rng(generator(0, device=x.device)):
        trace = density._trace(density.prior_loc, density.shared_init, x, None)
    nodes = {n: trace.nodes[n] for n in density.drawn if not trace.nodes[n]["is_observed"]}
    laws = {name: _nominal(node["fn"]) for name, node in nodes.items()}
    return {name: 0 if law is None else int(law.logits.shape[-1]) for name, law in laws.items()}


def every_row(node: Any) -> Tensor:
    """The site's value, of all rows also where one is given for all of them."""
    law, value = node["fn"], node["value"]
    lead = value.shape[: value.dim() - law.event_dim]
    shape = torch.broadcast_shapes(law.batch_shape, lead)
    every: Tensor = value.expand(*shape, *value.shape[len(lead) :])
    return every


def observed_data(density: Density, tasks: Tasks) -> dict[str, Observed]:
    """What the model takes from the targets, by observed site that has values, padding included.

    A value that depends on latents is that at the prior that the user wrote.

    Raises:
        ValueError: tasks of another shape.
    """
    density.check_data(tasks, density.shared_init)
    nominal: dict[str, bool] = {}

    def values(
        theta: Tensor, shared: Tensor, x: Tensor, y: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        nodes = density._trace(theta, shared, x, y).nodes
        nominal.update({n: _nominal(nodes[n]["fn"]) is not None for n in density.drawn})
        for name in density.drawn:
            nodes[name]["value"] = every_row(nodes[name])
        return {n: (nodes[n]["value"], _seen(nodes[n])) for n in density.drawn}

    each = over_tasks(values, 0, False, loop=density._how == "one by one")
    theta = density.prior_loc.expand(len(tasks), -1)
    with torch.no_grad():
        found = each(theta, density.shared_init, tasks.inputs, tasks.targets)
    return {n: Observed(value, seen, nominal[n]) for n, (value, seen) in found.items()}


def _seen(node: Any) -> Tensor:
    """Which entries of an observed site's value count, of the value's shape."""
    value, counts = node["value"], not_masked(node)
    there = value.isfinite() if value.is_floating_point() else torch.ones_like(value).bool()
    return there if counts is None else there & counts


def derived_sites(density: Density, tasks: Tasks) -> dict[str, int | None]:
    """The model's `pyro.deterministic` sites: along which dimension each has rows, None for none.

    Found by running the first task with one row more. One that depends on the rows in another way
    (a mean over them) would see padding, and is left out, with a warning.
    """
    first = tasks.select([int(tasks.num_rows.argmax())])
    x, y = first.inputs[0], first.targets[0]
    shared, noise = density.shared_init, generator(0, device=x.device)
    somewhere = torch.randn(  # at 0 much is alike
        density.dim, generator=noise, dtype=shared.dtype, device=x.device
    )
    theta = density.prior_loc + density.prior_scale * somewhere
    with torch.no_grad():
        here = density._trace(theta, shared, x, y).nodes
        there = density._trace(theta, shared, torch.cat([x, x[:1]]), torch.cat([y, y[:1]])).nodes
    names = [n for n, node in here.items() if node.get("infer", {}).get("_deterministic")]
    found: dict[str, int | None] = {}
    for name in names:
        one, more = here[name]["value"], there[name]["value"]
        grown = [d for d, (a, b) in enumerate(zip(one.shape, more.shape, strict=True)) if a != b]
        if not grown and torch.allclose(one, more, equal_nan=True):
            found[name] = None
        elif len(grown) == 1 and one.shape[grown[0]] == len(x):
            found[name] = grown[0]
        else:
            warnings.warn(
                f"the deterministic site {name!r} has neither a value for each row nor one that "
                "does not depend on the rows; it is left out",
                RuntimeWarning,
                stacklevel=2,
            )
    return found


def derived_values(
    density: Density,
    sites: Mapping[str, int | None],
    theta: Tensor,
    tasks: Tasks,
    shared: Tensor,
) -> dict[str, Tensor]:
    """Deterministic sites given θ `[S, T, D]`, φ: `[S, T, N, ...]` by row, else `[S, T, ...]`."""

    def values(theta: Tensor, shared: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        nodes = density._trace(theta, shared, x, y).nodes
        return {n: nodes[n]["value"].movedim(d or 0, 0) for n, d in sites.items()}

    each = over_tasks(values, 1, shared.dim() > 1, loop=density._how == "one by one")
    with torch.no_grad():
        out: dict[str, Tensor] = each(theta, shared, tasks.inputs, tasks.targets)
    return out
