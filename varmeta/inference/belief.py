"""ψ = (θ0, log scales, φ) as one vector of real numbers, and what is believed of it beforehand.

In the units of `Meta.raw`, as everything that is learned. The density is that of the real numbers
themselves: log p(θ0) + log p(σ) + log σ + log p(φ) + log |dφ/du|, unlike `Meta.log_prior`, which
has the density of scales and constrained φ and whose mode does not depend on a transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varmeta.inference.base import Meta
from varmeta.inference.learned import names
from varmeta.inference.marginal import Points
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.process import validation_off


@dataclass(frozen=True, eq=False)
class Belief:
    """What all tasks share as a vector, and its prior density.

    Attributes:
        meta: gives the units and the origin.
    """

    meta: Meta

    @cached_property
    def parts(self) -> list[int]:
        """D, M and P: of how many numbers θ0, log scales and φ are."""
        raw = self.meta.raw
        return [len(raw[name]) for name in ("loc", "log_scale", "shared")]

    @cached_property
    def free(self) -> Tensor:
        """`[K]`, the positions of what has a prior; params have none, and stay points."""
        dim, modules, _ = self.parts
        keep = [torch.ones(dim + modules, dtype=torch.bool)]
        for site in self.meta.density.shared_sites:
            keep.append(torch.full((site.size,), site.prior is not None))
        return torch.cat(keep).nonzero()[:, 0].to(self.meta.raw["loc"].device)

    @property
    def scales(self) -> Tensor:
        """`[M]`, the positions of the log scales among what has a prior."""
        dim, modules, _ = self.parts
        return torch.arange(dim, dim + modules, device=self.free.device)

    @cached_property
    def labels(self) -> list[str]:
        """Of the whole vector."""
        return names(self.meta)

    @property
    def params(self) -> list[str]:
        """Names of the sites without a prior."""
        return [s.name for s in self.meta.density.shared_sites if s.prior is None]

    @property
    def raw(self) -> Tensor:
        """`[n]`, where it stands."""
        raw = self.meta.raw
        return torch.cat([raw[n].detach() for n in ("loc", "log_scale", "shared")])

    def points(self, raw: Tensor) -> Points:
        """`[S, n]` to ψ, differentiable."""
        origin, density = self.meta.origin, self.meta.density
        loc, log_scale, shared = raw.split(self.parts, -1)
        return Points(
            origin.loc + origin.scale.detach() * loc,
            origin.log_scale + log_scale,
            density.shared_init + density.shared_scale * shared,
            origin.groups,
        )

    def pulled_back(self, gradient: Points) -> Tensor:
        """A gradient in ψ as one in the vector, `[S, n]`."""
        origin, density = self.meta.origin, self.meta.density
        loc = gradient.loc * origin.scale.detach()
        return torch.cat(
            [loc, gradient.log_scale, gradient.shared * density.shared_scale], -1
        ).detach()

    def log_prob(self, points: Points) -> Tensor:
        """`[S]` nats, up to a constant where a part is flat; see the module."""
        return _of_prior(self.meta.origin, points) + _of_shared(self.meta.density, points.shared)

    def log_prob_and_gradient(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """`[S]` nats and `[S, n]`, detached."""
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            value = self.log_prob(self.points(leaf))
            (slope,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
        return value.detach(), slope


def _of_prior(prior: GaussianPrior, points: Points) -> Tensor:
    total = points.log_scale.sum(-1)  # from σ to log σ
    belief = prior.hyperprior
    if belief is None:
        return total
    offset = (points.loc - belief.loc) / belief.width
    normal = -0.5 * offset.square() - belief.width.log() - 0.5 * math.log(2 * math.pi)
    total = total + normal.sum(-1)
    if belief.scale_law == "flat":
        return total
    with validation_off():
        law: Tensor = belief.scales().log_prob(points.log_scale.exp())
    return total + law.sum(-1)


def _of_shared(density: Density, shared: Tensor) -> Tensor:
    total = shared.new_zeros(len(shared))
    flat = shared.split([site.size for site in density.shared_sites], -1)
    for site, part in zip(density.shared_sites, flat, strict=True):
        if site.prior is None:
            continue
        real = part.reshape(len(part), *site.unconstrained_shape)
        with validation_off():
            value = site.transform(real)
            nats = site.prior.log_prob(value).reshape(len(part), -1).sum(-1)
            jacobian = site.transform.log_abs_det_jacobian(real, value)
        total = total + nats + jacobian.reshape(len(part), -1).sum(-1)
    return total
