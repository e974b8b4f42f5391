"""The Gaussian prior with learned mean and scales that all tasks share: θ_i ~ N(θ0, Σ)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from varmeta.models.density import Density

Grouping = Literal["coordinate", "site", "all"]


@dataclass(frozen=True, eq=False)
class Hyperprior:
    """What is believed of θ0 and the scales before any task is seen.

    θ0_j ~ N(loc_j, width_j²) and scale_m ~ HalfNormal(scale_width_m), densities over the scale
    itself. Both are taken from the prior that the user wrote for one task: a task's parameter can
    lie as far out as that prior says, be it because θ0 does or because the task does.

    Attributes:
        loc: `[D]`.
        width: `[D]`, positive.
        scale_width: `[M]`, positive, one per learned scale.
    """

    loc: Tensor
    width: Tensor
    scale_width: Tensor

    def log_prob(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Scalar, nats: log p(θ0 = loc) + log p(scales), normalised."""
        normal = -0.5 * ((loc - self.loc) / self.width) ** 2 - self.width.log()
        half = -0.5 * (scale / self.scale_width) ** 2 - self.scale_width.log()
        constant = 0.5 * math.log(2 * math.pi)
        return (normal - constant).sum() + (half - constant + math.log(2)).sum()


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """N(loc, Σ) with Σ = diag(scale²) [+ factor factorᵀ], over flat unconstrained parameters.

    Attributes:
        loc: `[D]`, θ0.
        log_scale: `[M]`, one learned log standard deviation per group of coordinates.
        groups: `[D]` int, which of the M scales each coordinate uses.
        factor: `[D, R]`, low-rank part of Σ; None for a diagonal Σ.
        hyperprior: belief about loc and scales, or None for a flat one.

    Raises:
        ValueError: shapes that do not fit together.
    """

    loc: Tensor
    log_scale: Tensor
    groups: Tensor
    factor: Tensor | None = None
    hyperprior: Hyperprior | None = None

    def __post_init__(self) -> None:
        dim = self.loc.shape[-1]
        if self.groups.shape != (dim,):
            raise ValueError(
                f"groups has shape {tuple(self.groups.shape)}, wanted ({dim},): one per coordinate"
            )
        if int(self.groups.max()) >= len(self.log_scale) or int(self.groups.min()) < 0:
            raise ValueError(
                f"groups holds numbers from {int(self.groups.min())} to {int(self.groups.max())}, "
                f"log_scale has {len(self.log_scale)} entries"
            )
        if self.factor is not None and (self.factor.dim() != 2 or len(self.factor) != dim):
            raise ValueError(f"factor has shape {tuple(self.factor.shape)}, wanted ({dim}, rank)")

    @classmethod
    def create(
        cls,
        loc: Tensor,
        scale: float | Sequence[float] | Tensor,
        *,
        groups: Tensor | None = None,
        factor: Tensor | None = None,
        hyperprior: Hyperprior | None = None,
    ) -> GaussianPrior:
        """A prior from standard deviations: one number, or one per coordinate (or per group).

        Raises:
            ValueError: a scale that is not positive and finite.

        Example:
            >>> GaussianPrior.create(torch.zeros(3), 0.5).scale
            tensor([0.5000, 0.5000, 0.5000])
        """
        sd = torch.atleast_1d(torch.as_tensor(scale, dtype=loc.dtype, device=loc.device))
        bad = sd[~((sd > 0) & sd.isfinite())]
        if len(bad):
            raise ValueError(
                f"scale must be positive and finite, got {bad[0].item():g}; "
                "it is a standard deviation"
            )
        if sd.dim() > 1 or (groups is None and len(sd) not in (1, len(loc))):
            raise ValueError(f"scale has shape {tuple(sd.shape)}, wanted (1,) or ({len(loc)},)")
        if groups is None:
            groups = torch.arange(len(loc)) if len(sd) == len(loc) else torch.zeros(len(loc)).long()
        return cls(loc, sd.log(), groups.to(loc.device), factor, hyperprior)

    @classmethod
    def from_density(
        cls,
        density: Density,
        *,
        scales: Grouping = "site",
        rank: int = 0,
        hyperprior: bool = True,
    ) -> GaussianPrior:
        """Start from the prior that the user's model states for one task.

        θ0 starts at each site's prior location and the scale at its prior standard deviation, both
        on the unconstrained scale (`density.site_table()` shows them).

        Args:
            density: the model.
            scales: one learned scale per `"coordinate"`, per `"site"` (default), or one for
                `"all"` coordinates. A group's scale starts at its coordinates' geometric mean.
            rank: number of columns of the low-rank part, up to D; it starts small and, since
                identical columns would stay identical, different in each column.
            hyperprior: keep the user's prior as a weak belief about θ0 and the scales
                (`Hyperprior`); False for a flat one.
        """
        if scales == "coordinate":
            groups = torch.arange(density.dim)
        elif scales == "site":
            groups = density.site_index
        elif scales == "all":
            groups = torch.zeros(density.dim, dtype=torch.long)
        else:
            raise ValueError(f"scales must be 'coordinate', 'site' or 'all', got {scales!r}")
        if not 0 <= rank <= density.dim:
            raise ValueError(f"rank must lie between 0 and {density.dim}, got {rank}")
        groups = groups.to(density.prior_loc.device)
        loc, width = density.prior_loc, density.prior_scale
        count = int(groups.max()) + 1
        total = torch.zeros(count, dtype=width.dtype, device=width.device)
        log_scale = total.index_add(0, groups, width.log()) / groups.bincount(minlength=count)
        factor = None
        if rank:
            phase = torch.arange(density.dim, dtype=width.dtype, device=width.device)[:, None]
            wave = torch.arange(rank, dtype=width.dtype, device=width.device)
            factor = 0.1 * width[:, None] * torch.cos(math.pi * (phase + 0.5) * wave / density.dim)
        belief = Hyperprior(loc, width, log_scale.exp()) if hyperprior else None
        return cls(loc, log_scale, groups, factor, belief)

    def moved(self, loc: Tensor, log_scale: Tensor, factor: Tensor | None) -> GaussianPrior:
        """The same groups and hyperprior around other values of the same shapes.

        Nothing is checked, so that nothing waits for a device.
        """
        other = copy.copy(self)
        for name, value in (("loc", loc), ("log_scale", log_scale), ("factor", factor)):
            object.__setattr__(other, name, value)
        return other

    @property
    def dim(self) -> int:
        """D, the number of coordinates."""
        return self.loc.shape[-1]

    @property
    def scale(self) -> Tensor:
        """`[D]`, standard deviation of each coordinate without the low-rank part."""
        return self.log_scale.exp()[..., self.groups]

    def precision_mv(self, v: Tensor) -> Tensor:
        """Λv for v of shape `[..., D]`; Woodbury where there is a low-rank part."""
        return precision_mv(v, self.scale, self.factor)

    def precision(self) -> Tensor:
        """Λ as a `[D, D]` matrix, for small D."""
        return self.precision_mv(torch.eye(self.dim, dtype=self.loc.dtype, device=self.loc.device))

    def penalty(self, theta: Tensor) -> Tensor:
        """½(θ−θ0)ᵀΛ(θ−θ0), nats: `[..., D]` to `[...]`."""
        return penalty(theta, self.loc, self.scale, self.factor)

    def log_det(self) -> Tensor:
        """Scalar, log det Σ."""
        return log_det(self.scale, self.factor)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log N(θ; θ0, Σ), nats: `[..., D]` to `[...]`."""
        constant = self.dim * math.log(2 * math.pi) + self.log_det()
        return -self.penalty(theta) - 0.5 * constant

    def kl(self, mean: Tensor, sd: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """KL[N(mean, diag(sd²) + factor factorᵀ) ‖ N(θ0, Σ)], nats.

        `mean` and `sd` are `[..., D]`, `factor` is `[..., D, K]`, the result `[...]`. Without `sd`
        the factor is lower triangular, `[..., D, D]`.
        """
        trace: Tensor | float = 0.0
        if sd is not None:
            trace = trace + (sd**2 * self._precision_diagonal()).sum(-1)
        if factor is not None:
            trace = trace + (factor.mT * self.precision_mv(factor.mT)).sum((-2, -1))
        spread = trace - self.dim + self.log_det() - log_det(sd, factor)
        return self.penalty(mean) + 0.5 * spread

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws of shape `[*shape, D]`, differentiable in loc and scales."""
        like: Any = {"generator": generator, "dtype": self.loc.dtype, "device": self.loc.device}
        out = self.loc + self.scale * torch.randn(*shape, self.dim, **like)
        if self.factor is not None:
            out = out + torch.randn(*shape, self.factor.shape[1], **like) @ self.factor.T
        return out

    def hyper_log_prob(self) -> Tensor:
        """Scalar, nats: the hyperprior's log density of (loc, scales); 0 without one."""
        if self.hyperprior is None:
            return self.loc.new_zeros(())
        return self.hyperprior.log_prob(self.loc, self.log_scale.exp())

    def covariance(self) -> Tensor:
        """Σ as a `[D, D]` matrix, for small D."""
        out = (self.scale**2).diag()
        return out if self.factor is None else out + self.factor @ self.factor.T

    def _precision_diagonal(self) -> Tensor:
        inverse = self.scale**-2
        if self.factor is None:
            return inverse
        right = (self.factor * inverse[:, None]).T
        inner = _capacitance(self.scale, self.factor)
        return inverse - (torch.linalg.solve_triangular(inner, right, upper=False) ** 2).sum(0)


def penalty(theta: Tensor, loc: Tensor, scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """½(θ−θ0)ᵀΛ(θ−θ0), nats, from bare tensors: `[..., D]` to `[...]`."""
    offset = theta - loc
    return 0.5 * (offset * precision_mv(offset, scale, factor)).sum(-1)


def precision_mv(v: Tensor, scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """Λv for v of shape `[..., D]`; Woodbury where there is a low-rank part."""
    inverse = scale**-2
    out = v * inverse
    if factor is not None:
        right = factor.mT @ out[..., None]
        inner = torch.cholesky_solve(right, _capacitance(scale, factor))
        out = out - (factor @ inner)[..., 0] * inverse
    return out


def log_det(scale: Tensor | None, factor: Tensor | None) -> Tensor:
    """log det(diag(scale²) + factor factorᵀ): `[..., D]` and `[..., D, R]` to `[...]`.

    Without `scale` the factor is square and triangular.
    """
    if scale is None:
        assert factor is not None
        return 2 * factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    out = 2 * scale.log().sum(-1)
    if factor is None:
        return out
    return out + 2 * _capacitance(scale, factor).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _capacitance(scale: Tensor, factor: Tensor) -> Tensor:
    """Cholesky factor of I + FᵀS⁻²F, `[..., R, R]`."""
    weighted = factor / scale[..., None]
    eye = torch.eye(weighted.shape[-1], dtype=weighted.dtype, device=weighted.device)
    # Positive definite by construction; `cholesky` would wait for the device to see whether it is.
    return torch.linalg.cholesky_ex(eye + weighted.mT @ weighted).L
