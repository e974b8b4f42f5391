"""θ0 and Σ in closed form given every q_i: the M-step of empirical Bayes.

Only sums over the tasks' means and variances are needed. They are kept up to date from the rows of
a batch alone (incremental EM: Neal & Hinton, 1998, A View of the EM Algorithm that Justifies
Incremental, Sparse, and other Variants), over the tasks visited so far, which stand for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.inference.base import Meta
from varmeta.inference.families import GaussianQ


def no_moments(meta: Meta) -> dict[str, Tensor]:
    """Sums over no task: `moment_count`, `moment_mean` and `moment_square` `[D]`.

    In units of the user's prior and float64, so that a million tasks added and taken away again
    leave no rounding behind.
    """
    zeros = torch.zeros_like(meta.raw["loc"], dtype=torch.float64).detach()
    count = zeros.new_zeros(())
    return {"moment_count": count, "moment_mean": zeros, "moment_square": zeros.clone()}


def add_moments(sums: dict[str, Tensor], meta: Meta, q: GaussianQ, weight: Tensor | float) -> None:
    """Count the q of B tasks in, `weight` times each (`[B]`; −1 takes one away)."""
    with torch.no_grad():
        offset = ((q.mean - meta.origin.loc) / meta.origin.scale).double()
        square = offset**2 + (q.variance / meta.origin.scale**2).double()
        each = torch.as_tensor(weight, dtype=torch.float64, device=offset.device)
        each = each.expand(len(offset))
        sums["moment_count"] += each.sum()
        sums["moment_mean"] += each @ offset
        sums["moment_square"] += each @ square


def maximise(sums: dict[str, Tensor], meta: Meta, total: float, loc: bool, scale: bool) -> None:
    """Set θ0, then the scales, to the best values given the q_i, under the hyperprior.

    The best θ0 is the mean of the means, drawn to its normal hyperprior by that one's precision.
    The best v = σ² of a group of n coordinates solves T n v − S + v²/w² = 0, S the sum of squares
    around θ0 over tasks and coordinates, w the half-normal hyperprior's width: S/(T n) if flat.

    Args:
        sums: see `no_moments`.
        meta: changed in place.
        total: T, of all training tasks.
        loc: set θ0.
        scale: set the scales.
    """
    origin, belief = meta.origin, meta.origin.hyperprior
    with torch.no_grad():  # in float64 until a difference of squares has been taken
        mean = sums["moment_mean"] / sums["moment_count"]
        square = sums["moment_square"] / sums["moment_count"]
        if loc:
            best = mean
            if belief is not None:
                ratio = (meta.prior.scale / belief.width) ** 2 / total
                there = (belief.loc - origin.loc) / origin.scale
                best = (mean + ratio * there) / (1 + ratio)
            meta.raw["loc"].copy_(best)
        if scale:
            now = meta.raw["loc"].double()
            around = square - 2 * now * mean + now**2
            around = around.clamp(min=torch.finfo(around.dtype).eps * square)  # what it can tell
            each = torch.zeros_like(origin.log_scale, dtype=around.dtype)
            count = each.index_add(0, origin.groups, torch.ones_like(around)) * total
            around = around * origin.scale.double() ** 2
            sum_of_squares = each.index_add(0, origin.groups, around) * total
            if belief is None or belief.scale_law == "flat":
                best = sum_of_squares / count
            else:
                bend = 4 * sum_of_squares / belief.scale_width.double() ** 2
                best = 2 * sum_of_squares / (count + (count**2 + bend).sqrt())
            meta.raw["log_scale"].copy_(0.5 * best.log() - origin.log_scale)
