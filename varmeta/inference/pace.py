"""How long a step is: its size, and a bound on it that has a derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Pace:
    """What makes a step of a gradient.

    Attributes:
        size: what a gradient is multiplied by; a number, or a tensor that spreads to `[T, D]`.
        longest: `[D]`, the longest step in each coordinate; None for no bound.
    """

    size: float | Tensor
    longest: Tensor | None

    def bounded(self, step: Tensor) -> Tensor:
        """The step `[T, D]`, shortened as a whole until no coordinate exceeds its longest."""
        if self.longest is None:
            return step
        if torch.is_grad_enabled() and (step.requires_grad or self.longest.requires_grad):
            out: Tensor = _Bounded.apply(step, self.longest)
            return out
        return _bounded(step, self.longest)[0]


def length_of(step: Tensor, longest: Tensor) -> Tensor:
    """`[T]`, of a step `[T, D]`, 1 for the longest; 0 where none is."""
    return (step / longest).abs().amax(-1)


def _bounded(step: Tensor, longest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shortened step `[T, D]`, its length before in units of the longest `[T, 1]`, and where.

    An overflow is a very long step in its direction; what is NaN stays so.
    """
    most = torch.finfo(step.dtype).max
    ratio = (step / longest).clamp(-most, most)
    length, where = ratio.abs().max(-1, keepdim=True)
    return torch.where(length > 1, longest * (ratio / length), step), length, where


class _Bounded(torch.autograd.Function):
    """`_bounded`, which keeps the step alone for its derivative."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, longest: Tensor) -> Tensor:
        ctx.save_for_backward(step, longest)
        return _bounded(step, longest)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor | None]:
        step, longest = ctx.saved_tensors
        out, length, where = _bounded(step, longest)
        # out = step / length, length = |step_j| / longest_j at the coordinate j that is longest.
        along, ends = (v * out).sum(-1, keepdim=True), longest[where]
        cut = length > 1
        back = torch.where(cut, v / length, v)
        turn = torch.where(cut, along / length * step.gather(-1, where).sign() / ends, 0.0)
        back = back.scatter_add(-1, where, -turn)
        if not ctx.needs_input_grad[1]:
            return back, None
        share = torch.where(cut, along / ends, 0.0)
        return back, torch.zeros_like(longest).index_add(0, where[:, 0], share[:, 0])
