"""Point: prior and φ as one vector x, so that a gradient in all that is learned is one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior


@dataclass(frozen=True, eq=False)
class Point:
    """A prior and a φ, and what lies around them: x `[n]` is 0 here and in units of the prior.

    Attributes:
        prior: N(θ0, Σ), without history.
        shared: φ `[P]`, without history.
        units: of each block of x (`loc`, `log_scale`, `factor`, `shared`), in the block's shape.
    """

    prior: GaussianPrior
    shared: Tensor
    units: dict[str, Tensor]

    @classmethod
    def of(cls, density: Density, prior: GaussianPrior, shared: Tensor) -> Point:
        """θ0 and the factor in prior standard deviations, φ in those of its own prior."""
        scale = prior.scale.detach()
        units = {"loc": scale, "log_scale": torch.ones_like(prior.log_scale)}
        if prior.factor is not None:
            units["factor"] = scale[:, None].expand_as(prior.factor)
        if len(shared):
            units["shared"] = density.shared_scale.to(shared)
        factor = None if prior.factor is None else prior.factor.detach()
        prior = prior.moved(prior.loc.detach(), prior.log_scale.detach(), factor)
        return cls(prior, shared.detach(), units)

    @property
    def dtype(self) -> torch.dtype:
        """Of θ0."""
        return self.prior.loc.dtype

    def to(self, dtype: torch.dtype) -> Point:
        """In another data type."""
        prior = self.prior
        factor = None if prior.factor is None else prior.factor.to(dtype)
        moved = prior.moved(prior.loc.to(dtype), prior.log_scale.to(dtype), factor)
        units = {name: u.to(dtype) for name, u in self.units.items()}
        return Point(moved, self.shared.to(dtype), units)

    @property
    def size(self) -> int:
        """n."""
        return sum(u.numel() for u in self.units.values())

    def zeros(self) -> Tensor:
        """x at this point."""
        return self.prior.loc.new_zeros(self.size)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """x `[..., n]` by block, `[..., size]`."""
        sizes = [u.numel() for u in self.units.values()]
        return dict(zip(self.units, x.split(sizes, -1), strict=True))

    def moved(self, x: Tensor) -> tuple[GaussianPrior, Tensor]:
        """Prior and φ at x `[..., n]`, differentiable in it; theirs are x's leading dimensions."""
        moves = {name: u * self.units[name].flatten() for name, u in self.split(x).items()}
        prior, factor = self.prior, self.prior.factor
        if factor is not None:
            factor = factor + moves["factor"].unflatten(-1, factor.shape)
        shared = self.shared + moves["shared"] if "shared" in moves else self.shared
        moved = prior.moved(prior.loc + moves["loc"], prior.log_scale + moves["log_scale"], factor)
        return moved, shared

    def at(self, prior: GaussianPrior, shared: Tensor) -> Tensor:
        """x `[n]` of this prior and φ, differentiable in them."""
        moves = {
            "loc": prior.loc - self.prior.loc,
            "log_scale": prior.log_scale - self.prior.log_scale,
            "shared": shared - self.shared,
        }
        if prior.factor is not None and self.prior.factor is not None:
            moves["factor"] = prior.factor - self.prior.factor
        return torch.cat([(moves[name] / u).flatten() for name, u in self.units.items()])

    def natural(self, gradient: Tensor) -> dict[str, Tensor]:
        """A gradient in x `[..., n]` by block, nats per unit of each, `[..., *block's shape]`."""
        return {
            name: (part / self.units[name].flatten()).unflatten(-1, self.units[name].shape)
            for name, part in self.split(gradient).items()
        }
