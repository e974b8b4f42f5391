"""What was observed, as the model says it: the values at its observed sites and their kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta.models.over_tasks import over_tasks
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
        nominal: whether it is the name of a class, of which there are no means and distances.
    """

    value: Tensor
    nominal: bool


def _nominal(law: Any) -> Any:
    """The law of classes without an order that this one is, or None."""
    while "base_dist" in vars(law) and type(law).__name__ not in _NOMINAL:
        law = law.base_dist
    return law if type(law).__name__ in _NOMINAL else None


def classes_of(density: Density, tasks: Tasks) -> dict[str, int]:
    """By observed site: how many classes without an order its law draws from, 0 if it draws others.

    It is asked of the first task, without its targets.
    """
    with torch.no_grad(), global_rng(generator(0, device=tasks.mask.device)):
        trace = density._trace(
            density.prior_loc, density.shared_init, tasks.inputs[0, tasks.mask[0]], None
        )
    laws = {name: _nominal(trace.nodes[name]["fn"]) for name in density.observed}
    return {name: 0 if law is None else int(law.logits.shape[-1]) for name, law in laws.items()}


def observed_data(density: Density, tasks: Tasks) -> dict[str, Observed]:
    """What the model takes from the targets, by observed site, padding included.

    A value that depends on latents is that at the prior that the user wrote.

    Raises:
        ValueError: tasks of another shape.
    """
    density.check_data(tasks, density.shared_init)
    nominal: dict[str, bool] = {}

    def values(theta: Tensor, shared: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        nodes = density._trace(theta, shared, x, y).nodes
        nominal.update({name: _nominal(nodes[name]["fn"]) is not None for name in density.observed})
        return {name: nodes[name]["value"] for name in density.observed}

    each = over_tasks(values, 0, False, loop=density._how == "one by one")
    theta = density.prior_loc.expand(len(tasks), -1)
    with torch.no_grad():
        found = each(theta, density.shared_init, tasks.inputs, tasks.targets)
    return {name: Observed(value, nominal[name]) for name, value in found.items()}
