"""Parts: what many draws of many tasks ask of a model is asked a part at a time.

A thousand draws of 20,000 tasks of five rows are 10⁸ numbers in each operation of a model. Nothing
that is averaged over draws needs them together, so that memory is bounded here, for every user of
draws: by whole tasks, by rows where one task has many, and by draws where a row is a large image.
Tasks are taken by their length, so that a long one does not pad the short ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from varmeta.lengths import up_to_last
from varmeta.models.density import Density
from varmeta.models.observed import derived_values
from varmeta.tasks import Tasks

AT_ONCE = 500_000  # numbers in a tensor of an evaluation: 4 MB, which a processor's cache can hold
# Numbers in a tensor that is kept: draws, or rows in a step of a fit. Beyond these 32 MB the C
# library gives memory back to the system after each operation, which takes twice the time. For
# draws it is part of what a seed stands for: another value gives others of the same law.
LARGEST = 4_000_000


def slices(total: int, numbers: int, at_once: int) -> Iterator[slice]:
    """0 to `total` in pieces: as many of them at once as have `numbers` numbers each."""
    size = max(1, at_once // max(1, numbers))
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def tasks_at_once(tasks: Tasks, draws: int) -> int:
    """Of how many of these tasks so many draws of sums over rows hold `LARGEST` numbers."""
    return max(1, LARGEST * len(tasks) // (draws * tasks.padded_rows))


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the rows of some tasks.

    Attributes:
        tasks: t tasks of n rows.
        index: `[t]`, their positions among all tasks.
        columns: which of the N columns of all tasks these n are.
    """

    tasks: Tasks
    index: Tensor
    columns: slice

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Task and column, among all, of each row that exists."""
        task, column = self.tasks.mask.nonzero(as_tuple=True)
        return self.index[task], column + (self.columns.start or 0)

    def put(self, out: Tensor, values: Tensor) -> None:
        """Write `[..., t, n]` to its places in `[..., T, N]`."""
        out[..., self.index, self.columns] = values


def tasks_at(tasks: Tasks, place: slice) -> Tasks:
    """These tasks, their rows in the columns where they were."""
    index = torch.arange(len(tasks), device=tasks.mask.device)[place]
    return tasks if len(index) == len(tasks) else _part(tasks, index, slice(None)).tasks


def row_parts(tasks: Tasks, rows: int) -> Iterator[Part]:
    """All rows of all tasks in parts of at most so many (padding counted), long tasks first.

    Tasks are never told apart where they fit together, and rows of a task only where it alone is
    too long. Columns in which no task has a row are left out.
    """
    device, rows = tasks.mask.device, max(1, rows)
    length = up_to_last(tasks.mask)
    if int(length.max()) * len(tasks) <= rows:
        yield _part(tasks, torch.arange(len(tasks), device=device), slice(0, int(length.max())))
        return
    order = length.argsort(descending=True, stable=True)
    longest, first = length[order].tolist(), 0
    while first < len(order):
        width = longest[first]
        index = order[first : first + max(1, rows // width)].sort().values
        first += len(index)
        for columns in slices(width, 1, rows):
            yield _part(tasks, index, columns)


def by_length(tasks: Tasks, kinds: int = 4) -> list[Part]:
    """All tasks in at most so many parts of similar length, so that little of them is padding."""
    rows = tasks.num_rows.clamp(min=1)
    width = 2 ** rows.double().log2().ceil().long()
    shown = width.unique().flip(0)[:kinds]  # what is shorter than all of these goes with the last
    width = width.clamp(min=int(shown[-1]))
    place = torch.arange(1, tasks.mask.shape[1] + 1, device=tasks.mask.device)
    last = (tasks.mask * place).amax(-1).clamp(min=1)
    out = []
    for size in shown.tolist():
        index = (width == size).nonzero()[:, 0]
        out.append(_part(tasks, index, slice(0, int(last[index].max()))))
    return out


def log_likelihood(
    density: Density, theta: Tensor, tasks: Tasks, shared: Tensor, site: str | None = None
) -> Iterator[tuple[Part, Tensor]]:
    """`density.log_likelihood` of all draws, some rows at a time: `[S, t, n]` nats each, detached.

    Args:
        density: the model.
        theta: `[S, T, D]`.
        tasks: T tasks.
        shared: φ, `[P]` or `[S, T, P]`.
        site: one observed site alone; all of them if None.
    """
    numbers = numbers_per_row(density, theta, tasks, shared)
    for part in row_parts(tasks, _least(density, tasks, AT_ONCE // max(len(theta), numbers))):
        each = numbers * part.tasks.mask.numel()
        with torch.no_grad():
            nats = [
                density.log_likelihood(some, part.tasks, phi, site=site)
                for some, phi in _drawn(theta, shared, part, each, AT_ONCE)
            ]
        yield part, torch.cat(nats) if len(nats) > 1 else nats[0]


def total_log_likelihood(
    density: Density, theta: Tensor, tasks: Tasks, shared: Tensor, site: str | None = None
) -> Tensor:
    """log p(y_i | θ_i, φ), the sum over a task's rows: `[S, T, D]` to `[S, T]` nats.

    Arguments are those of `log_likelihood`.
    """
    total = theta.new_zeros(theta.shape[:-1])
    for part, nats in log_likelihood(density, theta, tasks, shared, site):
        total[:, part.index] += nats @ nats.new_ones(nats.shape[-1])  # faster than a short sum
    return total


def predict(
    density: Density, theta: Tensor, tasks: Tasks, generator: torch.Generator, shared: Tensor
) -> Iterator[tuple[Part, dict[str, Tensor]]]:
    """`density.predict` for all draws, some rows at a time: `[S, t, n, *target_shape]` each.

    Arguments are those of `log_likelihood`, and where the random numbers come from.
    """

    def drawn(theta: Tensor, tasks: Tasks, shared: Tensor) -> dict[str, Tensor]:
        return density.predict(theta, tasks, generator, shared)

    yield from _each(drawn, density, theta, tasks, shared)


def derived(
    density: Density,
    sites: Mapping[str, int | None],
    theta: Tensor,
    tasks: Tasks,
    shared: Tensor,
) -> Iterator[tuple[Part, dict[str, Tensor]]]:
    """`pyro.deterministic` sites of the model, some rows at a time.

    Those with a value for each row are `[S, t, n, ...]`, others `[S, t, ...]`. Arguments are those
    of `log_likelihood`, and what `varmeta.models.observed.derived_sites` found.
    """

    def values(theta: Tensor, tasks: Tasks, shared: Tensor) -> dict[str, Tensor]:
        return derived_values(density, sites, theta, tasks, shared)

    if sites:
        yield from _each(values, density, theta, tasks, shared)


def _each(
    function: Callable[[Tensor, Tasks, Tensor], dict[str, Tensor]],
    density: Density,
    theta: Tensor,
    tasks: Tasks,
    shared: Tensor,
) -> Iterator[tuple[Part, dict[str, Tensor]]]:
    """`function` of all draws, some rows at a time, in parts that may be kept."""
    numbers = numbers_per_row(density, theta, tasks, shared)
    for part in row_parts(tasks, _least(density, tasks, LARGEST // max(len(theta), numbers))):
        each = numbers * part.tasks.mask.numel()
        found = [
            function(some, part.tasks, phi)
            for some, phi in _drawn(theta, shared, part, each, LARGEST)
        ]
        yield part, {name: torch.cat([f[name] for f in found]) for name in found[0]}


def _least(density: Density, tasks: Tasks, rows: int) -> int:
    """So many rows, or a task's where these are one draw and so are never told apart."""
    return max(rows, tasks.mask.shape[1]) if density.joint else rows


def _part(tasks: Tasks, index: Tensor, columns: slice) -> Part:
    """As they stand, padding included: what is computed of a row is what it was."""
    fields: dict[str, Any] = {
        name: getattr(tasks, name)[index][:, columns]
        for name in ("inputs", "targets", "mask", "is_query", "row_ids")
    }
    names = tuple(tasks.names[i] for i in index.tolist())
    return Part(replace(tasks, names=names, **fields), index, columns)


def _drawn(
    theta: Tensor, shared: Tensor, part: Part, numbers: int, at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """θ and φ of a part's tasks, for as many draws at once as have `numbers` numbers each."""
    for some in slices(len(theta), numbers, at_once):
        phi = shared[some][:, part.index] if shared.dim() > 1 else shared
        yield theta[some][:, part.index], phi


def numbers_per_row(density: Density, theta: Tensor, tasks: Tasks, shared: Tensor) -> int:
    """Numbers of the model's largest tensor for each row of one draw: 1 for a regression.

    Measured, not modelled: on the longest task, which is run once.
    """
    longest = [int(tasks.num_rows.argmax())]
    one = next(row_parts(tasks.select(longest), tasks.mask.shape[1])).tasks
    phi = shared[0, longest[0]] if shared.dim() > 1 else shared
    with torch.no_grad(), _Largest() as seen:
        density.rows(theta[0, longest], phi, *density.data(one))
    return math.ceil(seen.numbers / one.mask.shape[1])


class _Largest(TorchFunctionMode):
    """Notes how many numbers the largest tensor has that an operation returns, of one task."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out
