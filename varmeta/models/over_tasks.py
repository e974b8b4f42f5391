"""A function of one task, for all of them: by `torch.vmap`, or by a loop where that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from varmeta.models.apart import padded, take_apart
from varmeta.models.operations import BatchedOperations
from varmeta.process import validation_off

How = Literal["together", "apart", "one by one"]


def one_by_one(function: Callable[..., Any], in_dims: Sequence[int | None]) -> Callable[..., Any]:
    """As `torch.vmap(function, in_dims)` with every dimension 0 or None, by a loop."""

    def mapped(*given: Any) -> Any:
        pairs = list(zip(given, in_dims, strict=True))
        size = len(next(tree_leaves(part)[0] for part, d in pairs if d is not None))
        out = []
        for i in range(size):
            one = [p if d is None else tree_map(lambda t, i=i: t[i], p) for p, d in pairs]
            out.append(function(*one))
        return tree_map(lambda *parts: torch.stack(parts), *out)

    return mapped


def over_tasks(
    function: Callable[..., Any],
    draws: int,
    per_draw: bool,
    *,
    data: int = 2,
    loop: bool = False,
    random: bool = False,
) -> Callable[..., Any]:
    """`function(θ, φ, *data)` of one task over tasks, then over each leading dimension of draws.

    Args:
        function: tensors of one task to tensors.
        draws: how many dimensions θ has in front of that of tasks.
        per_draw: whether φ differs between tasks and draws.
        data: how many tensors of data there are.
        loop: one by one, for what `vmap` cannot batch.
        random: it draws random numbers, other ones for each task and draw.
    """
    for level in range(draws + 1):
        over_data = 0 if level == 0 else None
        dims = (0, 0 if per_draw else None, *[over_data] * data)
        if loop:
            function = one_by_one(function, dims)
        else:
            randomness = "different" if random else "error"
            function = torch.vmap(function, in_dims=dims, randomness=randomness)
    return function


def by_row(nats: Tensor, lead: int, rows: int) -> Tensor:
    """Log densities `[*lead, *batch]` to `[*lead, N]`: each row's, or equal parts of a task's."""
    shape = nats.shape[:lead]
    if nats.dim() == lead:  # one draw of all rows
        return (nats / rows)[..., None].expand(*shape, rows)
    nats = nats.reshape(*shape, -1, rows)
    # A sum over one is not free: it takes as long as the rest of a regression.
    return nats[..., 0, :] if nats.shape[-2] == 1 else nats.sum(-2)


def rows_apart(
    sites: Callable[..., list[Any]], draws: int, per_draw: bool, *, data: int = 2
) -> Callable[..., Tensor]:
    """log p(y_n | θ, φ) of every row, `[..., T, N]` nats, the laws asked for it outside of `vmap`.

    Args:
        sites: one task's θ, φ, x, y and whatever else there is to the nodes of the observed sites
            in the model's trace.
        draws: how many dimensions θ has in front of that of tasks.
        per_draw: whether φ differs between tasks and draws.
        data: how many tensors of data there are.

    Raises:
        NotApart: when it is called: a law that cannot be taken apart.
    """

    def rows(theta: Tensor, shared: Tensor, *given: Tensor) -> Tensor:
        builds: list[Callable[..., Tensor]] = []

        def parts(*one: Tensor) -> list[list[Tensor]]:
            taken = [_site_apart(node) for node in sites(*one)]
            builds.extend(build for _, build in taken)
            return [tensors for tensors, _ in taken]

        taken = over_tasks(parts, draws, per_draw, data=data)(theta, shared, *given)
        lead = theta.shape[:-1]
        total = theta.new_zeros(())
        with validation_off(), BatchedOperations():
            for build, tensors in zip(builds, taken, strict=True):
                total = total + by_row(build(tensors, lead), len(lead), given[1].shape[1])
        return total

    return rows


def _site_apart(node: Any) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """An observed site's tensors, and from such with leading dimensions its log density, nats."""
    law, value = node["fn"], node["value"]
    batch = value.shape[: value.dim() - len(law.event_shape)]
    shape = torch.broadcast_shapes(law.batch_shape, batch)
    law = law if law.batch_shape == shape else law.expand(shape)
    tensors, build = take_apart(law)
    size, dims = len(tensors), len(shape)
    tensors = [*tensors, padded(value, dims + len(law.event_shape))]
    weights = [node["scale"], node["mask"]]
    moving = [isinstance(w, Tensor) for w in weights]
    tensors += [padded(w, dims) for w, m in zip(weights, moving, strict=True) if m]

    def nats(given: Sequence[Tensor], lead: Sequence[int]) -> Tensor:
        value, *more = given[size:]
        scale, mask = (more.pop(0) if m else w for w, m in zip(weights, moving, strict=True))
        out: Tensor = build(given[:size], lead).log_prob(value)
        weighted: Tensor = scale_and_mask(out, scale, mask)
        return weighted

    return tensors, nats
