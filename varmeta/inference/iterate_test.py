"""When noisy steps have arrived: their iterates are stationary, and their average is known.

(Dhaka, Catalina, Andersen, Magnusson, Huggins & Vehtari, 2020, Robust, Accurate Stochastic
Optimization for Variational Inference; Welandawe, Andersen, Vehtari & Huggins, 2022, Robust,
Automated, and Accurate Black-box Variational Inference.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.inference.base import State, decayed

_BLOCKS = 10  # block means in each half of the window that is tested
_FIRST_BLOCK = 2  # steps in the first block
_GROWTH = 1.5  # of a half of the window, from one test to the next
_WATCHED = 1000  # learned numbers, at most, that are tested
_WORST_RHAT, _MEAN_RHAT = 1.3, 1.1


@dataclass(frozen=True)
class IterateTest:
    """Whether the iterates of noisy steps are stationary, and their average known well enough.

    The last iterates are cut in two segments of ten blocks. Where R-hat of the block means says
    that both have the same law, and the second one's average has a Monte Carlo error within the
    tolerance, the steps of this size have done what they can: their size is halved, and when the
    average then stays where it was the run has arrived. In the last quarter of the limit the size
    falls to 0 on a cosine, so that a run which the limit ends is as good as it can be.

    Attributes:
        tolerance: standard errors, see `units`.
        steps: the limit.
    """

    tolerance: float
    steps: int

    def begin(self, like: Tensor) -> dict[str, Tensor]:
        """Tensors for a state that has taken no step; `like` `[n]` is what is tested."""
        watched = min(len(like), _WATCHED)
        zeros = like.new_zeros(2, _BLOCKS, watched)
        return {
            "trail": zeros,
            "trail_sum": like.new_zeros(2, len(like)),
            "trail_average": torch.full_like(like, torch.nan),
        }

    def rate(self, state: State, base: float) -> float:
        """The step size now, from its first value."""
        tail = max(self.steps // 4, 1)
        end = decayed(1.0, max(state.step - (self.steps - tail), 0), tail)
        return float(base * 0.5 ** _read(state)[4] * end)

    def judges_next(self, state: State) -> bool:
        """Whether the next iterate is the last of a segment, after which alone a run can arrive."""
        inside, block, size, *_ = _read(state)
        return inside + 1 == size and block + 1 == _BLOCKS

    def shorten(self, state: State) -> None:
        """Halve the step size and begin a new stretch: the last one led where nothing is finite."""
        count = _written(state)
        count[:] = 0, 0, count[2], 0, count[4] + 1
        for name in ("trail", "trail_sum"):
            state.tensors[name].zero_()

    def add(self, state: State, values: Tensor, unit: Tensor | float) -> tuple[Tensor | None, bool]:
        """Count an iterate `[n]` in.

        Returns:
            The average of the last segment where steps of this size have done what they can, else
            None; and whether the run has arrived there.
        """
        tensors, count = state.tensors, _written(state)
        inside, block, size, before, halvings = count
        tensors["trail"][1, block] += _watched(values, tensors["trail"].shape[-1]) / size
        tensors["trail_sum"][1] += values
        inside += 1
        if inside < size or block + 1 < _BLOCKS:
            block, inside = (block + 1, 0) if inside == size else (block, inside)
            count[:2] = inside, block
            return None, False
        average, arrived = None, False
        if before and self._settled(tensors, unit):
            average = tensors["trail_sum"][1] / (_BLOCKS * size)
            gone = (average - tensors["trail_average"]).abs() / unit
            arrived = bool(gone.max() <= 2 * self.tolerance)  # each has an error of its own
            tensors["trail_average"].copy_(average)
            count[:] = 0, 0, size, 0, halvings + 1
        else:
            for name in ("trail", "trail_sum"):
                tensors[name][0] = tensors[name][1]
            longer = max(size + 1, round(size * _GROWTH)) if before else size
            count[:] = 0, 0, longer, size, halvings
        for name in ("trail", "trail_sum"):
            tensors[name][1] = 0.0
        return average, arrived

    def _settled(self, tensors: dict[str, Tensor], unit: Tensor | float) -> bool:
        """Whether both segments have the same law, and the second's average a small error."""
        trail = tensors["trail"]  # [2, blocks, watched]
        within = trail.var(1)
        between = (trail[0].mean(0) - trail[1].mean(0)).square() / 2
        ratio = torch.where(between > 0, between / within.mean(0), 0.0)
        rhat = ((_BLOCKS - 1) / _BLOCKS + ratio).sqrt()
        scale = _watched(unit, trail.shape[-1]) if isinstance(unit, Tensor) else unit
        error = (within[1] / _BLOCKS).sqrt() / scale
        same = (rhat.max() <= _WORST_RHAT) & (rhat.square().mean() <= _MEAN_RHAT**2)
        return bool(same & (error.max() <= self.tolerance))


def _read(state: State) -> list[int]:
    """Steps in this block, blocks in this segment, steps a block (now, before), halvings."""
    return state.counts.get("trail", [0, 0, _FIRST_BLOCK, 0, 0])


def _written(state: State) -> list[int]:
    """The same, to be changed in place."""
    return state.counts.setdefault("trail", _read(state))


def _watched(values: Tensor, count: int) -> Tensor:
    """The numbers that are tested: all, or so many evenly spread ones."""
    if count == len(values):
        return values
    return values[torch.linspace(0, len(values) - 1, count, device=values.device).long()]
