"""Laplace's evidence of a task checked and corrected by importance sampling around its mode.

With z = z* + L⁻ᵀu, u of a density q with heavy tails, and E the energy in units of the prior,

    p(D | ψ) = Laplace · [1 + mean_u (exp(E(z*) − E(z)) − exp(−½‖u‖²)) / ((2π)^(D/2) q(u))],

the Gaussian being a control variate whose integral is known: nothing is left to chance where f is a
parabola. The points u are quasi-random, come in pairs ±u and are the same for all ψ and tasks, so
that their error is much the same for all ψ: `enough` measures what of it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from varmeta import parts
from varmeta.importance import smooth
from varmeta.inference.marginal import Inner, Marginal, Points, Reference

_WIDTH, _CUBE = 1.2, 0.05  # u = 1.2 (n + 0.05 n³), n normal: tails heavier than exponential
_MOST = 1024  # points
_ROUGH = 0.1  # nats: error in what the correction changes between the mode and 1.5 sd from it
_REPEATS = 4
_EXACT = 0.01  # nats over all tasks together that need not be corrected
_ASKED = 2000  # tasks that are asked at most
_CHECKS = 200  # points for a task's k̂


@dataclass(frozen=True, eq=False)
class Around:
    """Points u around each mode.

    Attributes:
        u: `[J, ..., D]`, in standard deviations of the Gaussian.
        log_q: `[J, ...]`, log of their density times (2π)^(D/2).
    """

    u: Tensor
    log_q: Tensor

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def of_normal(cls, n: Tensor) -> Around:
        """From standard normal numbers `[J, ..., D]`."""
        u = _WIDTH * (n + _CUBE * n**3)
        slope = _WIDTH * (1 + 3 * _CUBE * n.square())
        return cls(u, (-0.5 * n.square() - slope.log()).sum(-1))

    @classmethod
    def even(cls, count: int, like: Tensor, seed: int = 0) -> Around:
        """`[2 ⌈count / 2⌉, D]`, quasi-random, in pairs ±u."""
        half = (count + 1) // 2
        engine = SobolEngine(like.shape[-1], scramble=True, seed=seed)
        uniform = engine.draw(half, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        n = torch.special.ndtri(uniform).to(like)
        return cls.of_normal(torch.cat([n, -n]))

    def for_all(self, inner: Inner) -> Around:
        """The same for all tasks and ψ."""
        return Around(self.u[:, None, None].expand(-1, *inner.z.shape), self.log_q[:, None, None])


@dataclass(frozen=True, eq=False)
class Correction:
    """log p(D | ψ) less Laplace's, of the tasks that are no parabola.

    Attributes:
        marginal: of all tasks.
        bent: `[T]` bool, which are corrected.
        count: points for each.
        seed: of the points.
    """

    marginal: Marginal
    bent: Tensor
    count: int
    seed: int = 0

    @cached_property
    def _part(self) -> Marginal:
        tasks = self.marginal.tasks
        return Marginal(self.marginal.density, tasks.select(self.bent))

    def __call__(self, points: Points, known: Reference) -> Tensor:
        """`[S]` nats, over all tasks together."""
        some = known.select(self.bent)
        total = points.loc.new_zeros(len(points))
        around = Around.even(self.count, points.loc, self.seed)
        for block in self._part.blocks(points, some, copies=len(around)):
            at = around.for_all(block.inner)
            found, _ = corrected(self._part, block.part, block.points, block.inner, at)
            total[block.draws] += found.sum(-1)
        self.marginal.evaluations += self._part.evaluations
        self._part.evaluations = 0
        return total


def corrected(
    marginal: Marginal, part: parts.Part, points: Points, inner: Inner, around: Around
) -> tuple[Tensor, Tensor]:
    """What is to be added to Laplace's evidence, `[s, t]` nats, and log weights `[J, s, t]`.

    Args:
        marginal: counts the evaluations.
        part: t tasks.
        points: s values of ψ.
        inner: their modes.
        around: J points for each.
    """
    energy = marginal.loss(part, points, inner.at(around.u))
    log_w = (inner.value - energy).nan_to_num(nan=-torch.inf) - around.log_q
    gauss = (-0.5 * around.u.square().sum(-1) - around.log_q).exp()
    ratio = 1 + (log_w.exp() - gauss).mean(0)
    plain = log_w.logsumexp(0) - math.log(len(around))
    # Where the control variate does more harm than good: without it.
    return torch.where(ratio > 0.1, ratio.clamp(min=1e-3).log(), plain), log_w


def enough(marginal: Marginal, bent: Tensor, points: Points, known: Reference, count: int) -> int:
    """How many points a task takes, from `count` on, up to 1,024.

    So many that sets of other points agree to a tenth of a nat (standard deviation) on how much
    more the correction of all tasks is at each ψ than at the first.
    """
    while count < _MOST:
        repeats = [
            Correction(marginal, bent, count, seed)(points, known) for seed in range(_REPEATS)
        ]
        changes = torch.stack([value[1:] - value[0] for value in repeats])
        if float(changes.std(0).amax()) <= _ROUGH:
            return count
        count *= 2
    return count


def needed(
    marginal: Marginal, points: Points, known: Reference, count: int
) -> tuple[Tensor, Tensor]:
    """Which tasks are to be corrected, `[T]` bool, and k̂ of each at the first ψ, `[T]`.

    All but those that together make up less than a hundredth of a nat. k̂ is −inf for a parabola,
    and NaN for tasks that were not asked (beyond 2,000, where all are corrected or none).
    """
    tasks, like = len(marginal.tasks), points.loc
    bent = torch.zeros(tasks, dtype=torch.bool, device=like.device)
    k = torch.full((tasks,), torch.nan, dtype=torch.float64, device=like.device)
    if not count:
        return bent, k
    index = torch.linspace(0, tasks - 1, min(tasks, _ASKED), device=like.device).round().long()
    asked = Marginal(marginal.density, marginal.tasks.select(index))
    some = known.select(index)
    size = torch.zeros(len(index), dtype=like.dtype, device=like.device)
    around = Around.even(_CHECKS, like)
    for block in asked.blocks(points.select(slice(0, 1)), some, copies=len(around)):
        at = around.for_all(block.inner)
        found, log_w = corrected(asked, block.part, block.points, block.inner, at)
        size[block.part.index] = found[0].abs().nan_to_num(nan=torch.inf)
        shapes = torch.full_like(found[0], -torch.inf, dtype=torch.float64)
        moving = (found[0].abs() > 1e-9).nonzero()[:, 0]  # PSIS takes ArviZ: seconds to import
        if len(moving):
            _, shape = smooth(log_w[:, 0, moving].T.double().cpu().numpy())
            shapes[moving] = torch.from_numpy(shape).to(shapes)
        k[index[block.part.index]] = shapes
    marginal.evaluations += asked.evaluations
    order = size.argsort()
    small = torch.zeros_like(size, dtype=torch.bool)
    small[order] = size[order].cumsum(0) <= _EXACT
    if len(index) < tasks:
        share = tasks / len(index)
        bent[:] = bool(share * size.sum() > _EXACT)
    else:
        bent = ~small
    return bent, k
