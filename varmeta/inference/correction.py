"""Laplace's evidence of a task checked and corrected by importance sampling around its mode.

With z = z* + L⁻ᵀu, u from Student's t, and E the energy in units of the prior,

    p(D | ψ) = Laplace · [1 + mean_u (exp(E(z*) − E(z)) − exp(−½‖u‖²)) / t(u)],

the Gaussian being a control variate whose integral is known: nothing is left to chance where f is a
parabola. The points u are quasi-random, come in pairs ±u and are the same for all ψ and tasks.
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
from varmeta.inference.proposal import log_t

FREEDOM = 4.0
_EXACT = 0.01  # nats over all tasks together that need not be corrected
_ASKED = 2000  # tasks that are asked at most
_CHECKS = 200  # points for a task's k̂


@dataclass(frozen=True, eq=False)
class Correction:
    """log p(D | ψ) less Laplace's, of the tasks that are no parabola.

    Attributes:
        marginal: of all tasks.
        bent: `[T]` bool, which are corrected.
        count: points for each.
    """

    marginal: Marginal
    bent: Tensor
    count: int

    @cached_property
    def _part(self) -> Marginal:
        tasks = self.marginal.tasks
        return Marginal(self.marginal.density, tasks.select(self.bent))

    def __call__(self, points: Points, known: Reference) -> Tensor:
        """`[S]` nats, over all tasks together."""
        some = known.select(self.bent)
        total = points.loc.new_zeros(len(points))
        u = student_points(self.count, points.loc)
        for block in self._part.blocks(points, some, copies=len(u)):
            found, _ = corrected(self._part, block.part, block.points, block.inner, u)
            total[block.draws] += found.sum(-1)
        self.marginal.evaluations += self._part.evaluations
        self._part.evaluations = 0
        return total


def corrected(
    marginal: Marginal, part: parts.Part, points: Points, inner: Inner, u: Tensor
) -> tuple[Tensor, Tensor]:
    """What is to be added to Laplace's evidence, `[s, t]` nats, and log weights `[J, s, t]`.

    Args:
        marginal: counts the evaluations.
        part: t tasks.
        points: s values of ψ.
        inner: their modes.
        u: `[J, D]`, the points; or `[J, s, t, D]`.
    """
    if u.dim() == 2:
        u = u[:, None, None].expand(-1, *inner.z.shape)
    energy = marginal.loss(part, points, inner.at(u))
    drop = (inner.value - energy).nan_to_num(nan=-torch.inf)
    constant = 0.5 * u.shape[-1] * math.log(2 * math.pi)
    log_q = log_t(u, FREEDOM) + constant
    log_w = drop - log_q
    gauss = (-0.5 * u.square().sum(-1) - log_q).exp()
    ratio = 1 + (log_w.exp() - gauss).mean(0)
    plain = log_w.logsumexp(0) - math.log(len(u))
    # Where the control variate does more harm than good: without it.
    return torch.where(ratio > 0.1, ratio.clamp(min=1e-3).log(), plain), log_w


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
    u = student_points(_CHECKS, like)
    for block in asked.blocks(points.select(slice(0, 1)), some, copies=len(u)):
        found, log_w = corrected(asked, block.part, block.points, block.inner, u)
        size[block.part.index] = found[0].abs().nan_to_num(nan=torch.inf)
        _, shape = smooth(log_w[:, 0].T.double().cpu().numpy())
        k[index[block.part.index]] = torch.from_numpy(shape).to(k)
    marginal.evaluations += asked.evaluations
    order = size.argsort()
    small = torch.zeros_like(size, dtype=torch.bool)
    small[order] = size[order].cumsum(0) <= _EXACT
    if len(index) < tasks:
        share = tasks / len(index)
        bent[:] = bool(share * size.sum() > _EXACT)
    else:
        bent = ~small
    k[index[size < 1e-9]] = -torch.inf
    return bent, k


def student_points(count: int, like: Tensor) -> Tensor:
    """u `[2 ⌈count / 2⌉, D]`: quasi-random points of the standard t, in pairs ±u."""
    dim = like.shape[-1]
    half = (count + 1) // 2
    engine = SobolEngine(dim + 2, scramble=True, seed=0)
    uniform = engine.draw(half, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    normal = torch.special.ndtri(uniform[:, :dim])
    chi2 = -2 * uniform[:, dim:].log().sum(-1, keepdim=True)  # with four degrees of freedom
    u = (normal / (chi2 / FREEDOM).sqrt()).to(like)
    return torch.cat([u, -u])
