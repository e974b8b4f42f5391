"""Proposals for a posterior of few dimensions: t distributions with two sides, and mixtures.

A proposal is fitted to the mode and the curvature there, its sides to how far the density really
reaches (Rue, Martino & Chopin, 2009, section 6.5), and where that does not cover the posterior to
weighted draws of it: adaptive multiple importance sampling (Cornuet, Marin, Mira & Robert, 2012),
in which every draw so far is weighed by the mixture of all proposals so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

FREEDOM = 6.0
_WALKS = 30  # of the fit of a mixture
_LEAST = 0.02  # share of a component that is kept
_TILT = 1e-9  # of a variance, added so that a covariance is one


@dataclass(frozen=True, eq=False)
class Proposal:
    """A mixture of J multivariate t distributions whose axes have two sides.

    x = centre + axes (r ∘ side), r from Student's t with 6 degrees of freedom, side_k `right_k`
    where r_k is positive and `left_k` where it is negative, which happens in the same proportion:
    the density has no step.

    Attributes:
        centre: `[J, K]`.
        axes: `[J, K, K]`, a column each.
        left: `[J, K]`, positive.
        right: `[J, K]`, positive.
        count: `[J]`, how many draws each component has given: their shares.
    """

    centre: Tensor
    axes: Tensor
    left: Tensor
    right: Tensor
    count: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """`[Σ count, K]`, quasi-random, the components' draws one after the other."""
        out, dim = [], self.centre.shape[1]
        for j, count in enumerate(self.count.tolist()):
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            engine = SobolEngine(dim + 3, scramble=True, seed=seed)
            uniform = engine.draw(int(count), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            uniform = uniform.to(self.centre)
            chi2 = -2 * uniform[:, dim:].log().sum(-1, keepdim=True)  # six degrees of freedom
            chance = self.left[j] / (self.left[j] + self.right[j])
            down = uniform[:, :dim] < chance
            up = (1 - uniform[:, :dim]) / (1 - chance)
            inside = torch.where(down, uniform[:, :dim] / chance, up)
            size = -torch.special.ndtri(0.5 * inside.clamp(1e-9, 1)) / (chi2 / FREEDOM).sqrt()
            way = torch.where(down, -self.left[j], self.right[j])
            out.append(self.centre[j] + (size * way) @ self.axes[j].T)
        return torch.cat(out)

    def log_prob(self, x: Tensor) -> Tensor:
        """`[S, K]` to `[S]` nats."""
        each = []
        for j in range(len(self.centre)):
            offset = (x - self.centre[j]).T
            w = torch.linalg.solve(self.axes[j], offset).T
            r = w / torch.where(w > 0, self.right[j], self.left[j])
            volume = torch.linalg.slogdet(self.axes[j]).logabsdet
            sides = (2 / (self.left[j] + self.right[j])).log().sum()
            each.append(log_t(r, FREEDOM) + sides - volume)
        share = (self.count / self.count.sum()).log()
        total: Tensor = (torch.stack(each, -1) + share.to(x)).logsumexp(-1)
        return total

    def counting(self, count: int) -> Proposal:
        """The same, for so many draws in all."""
        each = (self.count / self.count.sum() * count).round()
        return replace(self, count=each)

    def joined(self, other: Proposal) -> Proposal:
        """Both, as one mixture."""
        return Proposal(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in FIELDS))


FIELDS = ("centre", "axes", "left", "right", "count")


def log_t(x: Tensor, freedom: float) -> Tensor:
    """log density of the standard multivariate t, nats: `[..., K]` to `[...]`."""
    dim = x.shape[-1]
    constant = math.lgamma(0.5 * (freedom + dim)) - math.lgamma(0.5 * freedom)
    constant -= 0.5 * dim * math.log(math.pi * freedom)
    return constant - 0.5 * (freedom + dim) * torch.log1p(x.square().sum(-1) / freedom)


def fitted(x: Tensor, weights: Tensor, kinds: int, count: int, noise: torch.Generator) -> Proposal:
    """A mixture of up to `kinds` t distributions for weighted points, by EM of normals.

    Args:
        x: `[S, K]`.
        weights: `[S]`, their sum 1.
        kinds: components at most.
        count: draws that it is to give.
        noise: chooses where components begin.
    """
    whole = moments(x, weights)
    if kinds > 1:
        first = torch.multinomial(weights, kinds, replacement=True, generator=noise)
        means, covs = x[first], whole[1].expand(kinds, -1, -1)
        shares = torch.full((kinds,), 1 / kinds, dtype=x.dtype, device=x.device)
        for _ in range(_WALKS):
            law = torch.distributions.MultivariateNormal(means, covs, validate_args=False)
            member = (law.log_prob(x[:, None]) + shares.log()).softmax(-1) * weights[:, None]
            shares = member.sum(0)
            pairs = [moments(x, m / m.sum().clamp(min=1e-12)) for m in member.T]
            means = torch.stack([mean for mean, _ in pairs])
            # A tenth of the whole: a few heavy points must not make a needle.
            covs = torch.stack([0.9 * cov + 0.1 * whole[1] for _, cov in pairs])
        kept = shares > _LEAST
        means, covs, shares = means[kept], covs[kept], shares[kept]
    else:
        means, covs = whole[0][None], whole[1][None]
        shares = torch.ones(1, dtype=x.dtype, device=x.device)
    each = (count * shares / shares.sum()).round().clamp(min=1)
    one = torch.ones_like(means)
    return Proposal(means, torch.linalg.cholesky(covs), one, one, each)


def moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[K]` and covariance `[K, K]` of weighted points."""
    mean = weights @ x
    offset = x - mean
    cov = (weights[:, None] * offset).T @ offset
    return mean, cov + torch.diag(_TILT + 1e-6 * cov.diagonal())


def resampled(weights: Tensor, count: int, noise: torch.Generator) -> Tensor:
    """`[count]` positions, each as often as its weight says up to one: systematic resampling."""
    start = torch.rand((), generator=noise, dtype=torch.float64, device=weights.device)
    steps = torch.arange(count, dtype=torch.float64, device=weights.device) + start
    edges = weights.double().cumsum(0)
    return torch.searchsorted(edges / edges[-1] * count, steps).clamp(max=len(weights) - 1)
