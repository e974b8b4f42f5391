"""The random numbers of a random algorithm, each task's own.

They are keyed by the task's name, so that a run is the same whatever the tasks beside it, their
padding, or the parts into which a batch is split; and any step's numbers can be had again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varmeta.inference.descent import RandomDescent
from varmeta.seeds import generator
from varmeta.tasks import Tasks

_NORMAL, _ROWS, _START, _OTHER = range(4)
_AT_ONCE, _MOST = 16, 2**20  # steps whose numbers a task draws together, at most so many numbers


@dataclass(eq=False)
class Noise:
    """What `particles` runs of T tasks draw.

    Attributes:
        tasks: T of them.
        particles: S.
        like: gives D, data type and device.
        algorithm: says what is drawn.
        seed: of all of it.
        antithetic: the second half of the particles has the first half's normal numbers with the
            other sign, and the same rows.
    """

    tasks: Tasks
    particles: int
    like: Tensor
    algorithm: RandomDescent
    seed: int
    antithetic: bool = False
    _block: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    _epochs: list[int] = field(default_factory=list)
    _rank: Tensor = field(init=False)

    def normal(self, step: int) -> Tensor:
        """ξ_t, `[S, T, D]`."""
        return self._mirrored(self._step(_NORMAL, step, self._normal_block))

    def start(self) -> Tensor:
        """Of the random start, `[S, T, D]`."""
        return self._mirrored(self._normals(_START, 0, self._own, self.like.shape[-1]))

    def other(self, *shape: int) -> Tensor:
        """More normal numbers for each task, `[*shape[:-1], T, shape[-1]]`."""
        return self._normals(_OTHER, 0, *shape)

    def row_weights(self, step: int) -> Tensor | None:
        """`[S, T, N]`: how often each row counts in this step, 0 on rows left out; None: once."""
        if self.algorithm.batch_rows is None:
            return None
        draw = self._drawn_rows if self.algorithm.replacement else self._shuffled_rows
        weights = draw(step)
        return torch.cat([weights, weights]) if self.antithetic else weights

    # -- private ----------------------------------------------------------------------------------

    @property
    def _own(self) -> int:
        return self.particles // 2 if self.antithetic else self.particles

    def _mirrored(self, drawn: Tensor) -> Tensor:
        return torch.cat([drawn, -drawn]) if self.antithetic else drawn

    def _generator(self, name: str, *stream: int) -> torch.Generator:
        key = zlib.crc32(name.encode())
        return generator(self.seed, key, *stream, device=self.like.device)

    def _normals(self, kind: int, block: int, *shape: int) -> Tensor:
        *lead, size = shape
        out = self.like.new_empty(len(self.tasks), *lead, size)
        for row, name in zip(out, self.tasks.names, strict=True):
            row.normal_(generator=self._generator(name, kind, block))
        return out.movedim(0, -2)

    def _normal_block(self, block: int, at_once: int) -> Tensor:
        return self._normals(_NORMAL, block, at_once, self._own, self.like.shape[-1])

    def _step(self, kind: int, step: int, draw: Callable[[int, int], Tensor]) -> Tensor:
        # The size of a block must not depend on T: numbers drawn together are others than alone.
        at_once = max(1, min(_AT_ONCE, _MOST // (self._own * self.like.shape[-1])))
        number = step // at_once
        if kind not in self._block or self._block[kind][0] != number:
            self._block[kind] = (number, draw(number, at_once))
        return self._block[kind][1][step % at_once]

    def _drawn_rows(self, step: int) -> Tensor:
        """With replacement, `[S, T, N]`."""
        count, rows = self._count, self.tasks.num_rows
        drawn = self._step(_ROWS, step, lambda b, n: self._uniforms(b, n, self._own, count))
        # The j-th of a task's existing rows, wherever its padding lies.
        place = torch.argsort((~self.tasks.mask).long(), dim=-1, stable=True)
        index = (drawn * rows[:, None]).long().clamp(max=place.shape[1] - 1)
        index = place.expand(self._own, -1, -1).gather(-1, index)
        each = (rows / count).to(drawn)[:, None].expand_as(drawn)
        return drawn.new_zeros(self._own, *place.shape).scatter_add_(-1, index, each)

    def _shuffled_rows(self, step: int) -> Tensor:
        """This step's share of each task's random order of its rows, `[S, T, N]`."""
        count, rows = self._count, self.tasks.num_rows
        length = ((rows + count - 1) // count).clamp(min=1)  # steps of an epoch
        self._shuffle((step // length).tolist())
        place = step % length
        size = (rows - place * count).clamp(min=1, max=count)
        chosen = self._rank // count == place[:, None]
        return chosen * self.tasks.mask * (rows / size).to(self.like)[:, None]

    def _shuffle(self, epochs: list[int]) -> None:
        """Give those tasks a new order that are not in this epoch."""
        mask = self.tasks.mask
        if not self._epochs:
            self._epochs = [-1] * len(mask)
            self._rank = mask.new_zeros((self._own, *mask.shape), dtype=torch.long)
        for i in [i for i, e in enumerate(epochs) if e != self._epochs[i]]:
            source = self._generator(self.tasks.names[i], _ROWS, epochs[i])
            like: Any = {"dtype": torch.float32, "device": mask.device}  # whatever the default is
            keys = torch.full((self._own, mask.shape[1]), 2.0, **like)
            shape = (self._own, int(mask[i].sum()))
            keys[:, mask[i]] = torch.rand(shape, generator=source, **like)
            self._rank[:, i] = keys.argsort(-1).argsort(-1)
            self._epochs[i] = epochs[i]

    def _uniforms(self, block: int, *shape: int) -> Tensor:
        out = self.like.new_empty(len(self.tasks), *shape)
        for row, name in zip(out, self.tasks.names, strict=True):
            row.uniform_(generator=self._generator(name, _ROWS, block))
        return out.movedim(0, -2)

    @property
    def _count(self) -> int:
        assert self.algorithm.batch_rows is not None
        return self.algorithm.batch_rows
