"""Draws of tasks given draws of ψ: from each ψ's Gaussians, or the points that mend them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varmeta.inference.correction import Around, corrected, needed
from varmeta.inference.marginal import Block, Marginal, Points, Reference
from varmeta.inference.proposal import resampled
from varmeta.models.density import Density
from varmeta.posterior import Draws
from varmeta.tasks import Tasks


def task_draws(
    density: Density,
    tasks: Tasks,
    points: Points,
    copies: int,
    noise: torch.Generator,
    *,
    known: Reference | None = None,
    bent: Tensor | None = None,
    fresh: bool,
) -> Draws:
    """Draws of θ_i `[S, T, D]` with φ, for S draws of ψ that count the same.

    Their means and standard deviations are averages of those of the Gaussians (of the weighted
    points where a task is no parabola), which have less noise than the draws.

    Args:
        density: the model.
        tasks: T tasks.
        points: S draws of ψ.
        copies: points around each mode, from which one is drawn where a task is no parabola.
        noise: of the draws.
        known: of the tasks, near their modes for the middle of ψ; None to look for them.
        bent: `[T]` bool, which tasks are no parabola; None to ask.
        fresh: the tasks were not in the run: each draw of ψ counts by their evidence.
    """
    marginal = Marginal(density, tasks)
    middle = _middle(points)
    if known is None:
        known = marginal.total(middle, Reference(middle.loc.expand(len(tasks), -1))).known
    stats = dict[str, Tensor]()
    if bent is None:
        bent, k = needed(marginal, middle, known, copies)
        stats["pareto_k"] = k.to(points.loc)
    total, dim, count = len(points), density.dim, len(tasks)
    theta = points.loc.new_empty(total, count, dim)
    phi = points.shared[:, None].expand(-1, count, -1)
    nats = theta.new_zeros(total, count)
    first, second = theta.new_zeros(count, dim), theta.new_zeros(count, dim)
    each = [torch.empty_like(theta) for _ in range(2)] if fresh else []
    unsolved = theta.new_zeros(count)
    for group, size in ((~bent, 1), (bent, copies)):
        if not bool(group.any()):
            continue
        index = group.nonzero()[:, 0]
        some = marginal if len(index) == count else Marginal(density, tasks.select(index))
        for block in some.blocks(points, known.select(index), copies=size):
            at = index[block.part.index]
            found = _drawn(some, block, size if group is bent else 0, noise)
            theta[block.draws, at], nats[block.draws, at] = found.theta, found.nats
            unsolved[at] += (~block.inner.converged | block.inner.indefinite).sum(0)
            if fresh:
                each[0][block.draws, at], each[1][block.draws, at] = found.mean, found.square
            else:
                first[at] += found.mean.sum(0) / total
                second[at] += found.square.sum(0) / total
    if fresh:
        weights = nats.softmax(0)
        pick = torch.stack([resampled(w, total, noise) for w in weights.T], -1)
        theta = theta.gather(0, pick[..., None].expand(-1, -1, dim))
        phi = points.shared[pick]
        first, second = (torch.einsum("st,std->td", weights, m) for m in each)
        stats["importance_ess"] = 1 / weights.square().sum(0)
    stats["unsolved"] = unsolved / total
    sd = (second - first.square()).clamp(min=0).sqrt()
    return Draws(density, tasks.names, phi, theta, stats=stats, moments=(first, sd))


@dataclass(frozen=True, eq=False)
class _Found:
    """One draw of each task for each ψ, its mean and mean square there, and the evidence.

    `[s, t, D]`, and `[s, t]` nats.
    """

    theta: Tensor
    mean: Tensor
    square: Tensor
    nats: Tensor


def _drawn(marginal: Marginal, block: Block, copies: int, noise: torch.Generator) -> _Found:
    points, inner = block.points, block.inner
    loc, scale = points.loc[:, None], points.scale[:, None]
    like: dict[str, Any] = {"generator": noise, "dtype": loc.dtype, "device": loc.device}
    if not copies:
        z = inner.at(torch.randn(inner.z.shape, **like))
        mean = loc + scale * inner.z
        eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        left = torch.linalg.solve_triangular(inner.root, eye, upper=False)
        variance = scale.square() * left.square().sum(-2)
        return _Found(loc + scale * z, mean, mean.square() + variance, inner.log_evidence)
    around = Around.of_normal(torch.randn(copies, *inner.z.shape, **like))
    more, log_w = corrected(marginal, block.part, points, inner, around)
    theta, weights = loc + scale * inner.at(around.u), log_w.softmax(0)
    chance = torch.rand(weights.shape[1:], **like)
    pick = (weights.cumsum(0) < chance).sum(0).clamp(max=copies - 1)
    one = theta.gather(0, pick[None, ..., None].expand(1, *inner.z.shape))[0]
    mean = (weights[..., None] * theta).sum(0)
    square = (weights[..., None] * theta.square()).sum(0)
    return _Found(one, mean, square, inner.log_evidence + more)


def _middle(points: Points) -> Points:
    loc, log_scale, shared = (
        t.mean(0, keepdim=True) for t in (points.loc, points.log_scale, points.shared)
    )
    return Points(loc, log_scale, shared, points.groups)
