"""Lengths: tasks of like length are evaluated together, so that a long one does not pad the rest.

Tensors of all tasks have as many rows as the longest task. Where more than half of their numbers
would be padding, sums over rows are taken group by group, each padded to its own longest task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from varmeta.tasks import Tasks

# Numbers of padding that one more group must save. A group costs a model's operations once more: of
# a thousand evaluations a second or so, in which a processor fills about as many numbers.
WORTH = 20_000
SHARE = 2  # padded rows for each that exists: up to so many tasks stay together
MOST = 5  # groups: each is recorded by itself, which takes seconds for a large model


@dataclass(frozen=True, eq=False)
class Buckets:
    """Tasks in groups of like length, each padded to its own longest.

    Attributes:
        order: `[T]`, positions of the tasks, group after group.
        back: `[T]`, where in `order` each task stands.
        groups: the tasks of each group.
    """

    order: Tensor
    back: Tensor
    groups: tuple[Tasks, ...]

    def split(self, values: Tensor, dim: int = -2) -> tuple[Tensor, ...]:
        """`[..., T, ...]` with the tasks at `dim`, as each group's."""
        sizes = [len(group) for group in self.groups]
        return values.index_select(dim, self.order).split(sizes, dim)

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """`[..., t]` of each group, as `[..., T]` of all tasks in their order."""
        return torch.cat(list(values), -1).index_select(-1, self.back)


def alike(length: Tensor, numbers: int) -> list[Tensor] | None:
    """Tasks in groups of like length, longest first; None where one padded group is as good.

    Lengths within a factor of 2 belong together, and neighbours that are too small for a group of
    their own, until there are at most `MOST`.

    Args:
        length: `[T]` int, rows of each task.
        numbers: of each row.

    Returns:
        `[t]` positions of the tasks of each group, ascending.
    """
    count = len(length)
    order = length.cpu().clamp(min=1).sort(descending=True, stable=True)
    lengths = order.values
    widest, rows = int(lengths[0]), int(lengths.sum())
    padded = count * widest
    if padded <= SHARE * rows or (padded - rows) * numbers <= WORTH:
        return None
    octave = torch.frexp((widest // lengths).double()).exponent - 1  # exactly, unlike log2
    ends = [*octave.bincount().cumsum(0).unique().tolist()]
    starts = [0, *ends[:-1]]
    while len(starts) > 1:  # a group at the end of `starts` is the shortest
        saved = [
            (ends[k] - starts[k]) * int(lengths[starts[k - 1]] - lengths[starts[k]]) * numbers
            for k in range(1, len(starts))
        ]
        least = min(range(len(saved)), key=saved.__getitem__)
        if saved[least] > WORTH and len(starts) <= MOST:
            break
        del starts[least + 1], ends[least]
    if len(starts) < 2:
        return None
    device = length.device
    return [order.indices[a:b].sort().values.to(device) for a, b in zip(starts, ends, strict=True)]


def up_to_last(mask: Tensor) -> Tensor:
    """`[T]` int, at least 1: in how many columns of `[T, N]` the rows of each task lie."""
    behind = mask.flip(1).to(torch.uint8).argmax(1)  # columns behind the last row
    return (mask.shape[1] - behind).where(mask.any(1), 1)


def buckets(tasks: Tasks) -> Buckets | None:
    """The tasks by their length; None where that saves little, or their data are differentiated."""
    inputs, targets, mask = tasks.inputs, tasks.targets, tasks.mask
    numbers = sum(math.prod(t.shape[2:]) for t in (inputs, targets))
    # The first question is not put to the device.
    if mask.numel() * numbers <= WORTH or inputs.requires_grad or targets.requires_grad:
        return None
    length = up_to_last(mask)
    places = alike(length, numbers)
    if places is None:
        return None
    groups = tuple(
        tasks._map(
            lambda t, index=index: t[index, : int(length[index].max())],  # type: ignore[misc]
            names=tuple(tasks.names[i] for i in index.tolist()),
        )
        for index in places
    )
    order = torch.cat(places)
    return Buckets(order, order.argsort(), groups)
