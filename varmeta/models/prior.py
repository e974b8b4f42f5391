"""The Gaussian prior with learned mean and scales that all tasks share: θ_i ~ N(θ0, Σ)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta.models.hyperprior import Hyperprior, ScaleLaw
from varmeta.models.modules import Modules, Partition

if TYPE_CHECKING:
    from varmeta.models.density import Density


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """N(loc, Σ) with Σ = diag(scale²) [+ factor factorᵀ], over flat unconstrained parameters.

    Attributes:
        loc: `[D]`, θ0.
        log_scale: `[M]`, one learned log standard deviation per module, a group of coordinates.
        groups: `[D]` int, which of the M scales each coordinate uses.
        factor: `[D, R]`, low-rank part of Σ; None for a diagonal Σ.
        hyperprior: belief about loc and scales, or None for a flat one.
        module_names: of the M modules; None for their numbers.
        bounds: `[2, M]`, least and largest standard deviation of each module while `fit` learns;
            None for none.

    Raises:
        ValueError: shapes that do not fit together, or a scale beyond its bounds.
    """

    loc: Tensor
    log_scale: Tensor
    groups: Tensor
    factor: Tensor | None = None
    hyperprior: Hyperprior | None = None
    module_names: tuple[str, ...] | None = None
    bounds: Tensor | None = None

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
        if self.module_names is not None and len(self.module_names) != len(self.log_scale):
            raise ValueError(
                f"module_names has {len(self.module_names)} names for {len(self.log_scale)} scales"
            )
        if self.bounds is not None:
            _check_bounds(self.bounds, self.log_scale.detach().exp(), self.modules.names)

    @classmethod
    def create(
        cls,
        loc: Tensor,
        scale: float | Sequence[float] | Tensor,
        *,
        groups: Tensor | Modules | None = None,
        factor: Tensor | None = None,
        hyperprior: Hyperprior | None = None,
    ) -> GaussianPrior:
        """A prior from standard deviations: one number, or one per coordinate (or per module).

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
        names = None
        if isinstance(groups, Modules):
            names, groups = groups.names, groups.groups
            sd = sd.expand(len(names)) if len(sd) == 1 else sd
        return cls(loc, sd.log(), groups.to(loc.device), factor, hyperprior, names)

    @classmethod
    def from_density(
        cls,
        density: Density,
        *,
        scales: Partition | Callable[[str], str] | Modules = "site",
        rank: int = 0,
        hyperprior: bool = True,
        scale_law: ScaleLaw = "half-normal",
        bounds: tuple[float | Tensor, float | Tensor] | None = None,
    ) -> GaussianPrior:
        """Start from the prior that the user's model states for one task.

        θ0 starts at each site's prior location and the scale at its prior standard deviation, both
        on the unconstrained scale (`density.site_table()` shows them).

        Args:
            density: the model.
            scales: the modules, which have one learned scale each: `"site"` (default), `"layer"`,
                `"coordinate"`, `"all"` in one, a function from a site's name to its module's
                (`Modules.of`), or any partition as `Modules`. A scale starts at the geometric mean
                of its coordinates'.
            rank: number of columns of the low-rank part, up to D; it starts small and, since
                identical columns would stay identical, different in each column.
            hyperprior: keep the user's prior as a weak belief about θ0 and the scales
                (`Hyperprior`); False for a flat one.
            scale_law: the law of the scales in that belief.
            bounds: least and largest standard deviation while `fit` learns, numbers or `[M]`; a
                scale that starts beyond them starts at the nearer one.

        Raises:
            ValueError: modules that are not of this model, a rank or bounds out of range, no such
                law, or a law that hyperprior=False would leave out.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from varmeta import Density, Tasks
            >>> def line(x, y=None):
            ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
            ...     b = pyro.sample("b", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            ...     with pyro.plate("rows", x.shape[0]):
            ...         return pyro.sample("y", dist.Normal(a + x @ b, 1.0), obs=y)
            >>> density = Density(line, Tasks.from_list([(torch.zeros(4, 2), torch.zeros(4))]))
            >>> prior = GaussianPrior.from_density(density, scale_law="half-cauchy")
            >>> print(prior.modules)
            module  size
                 a     1
                 b     2
            >>> prior.log_scale.exp()
            tensor([1., 3.])
        """
        modules = scales if isinstance(scales, Modules) else Modules.of(density, scales)
        if not hyperprior and scale_law not in ("half-normal", "flat"):
            raise ValueError(f"scale_law is {scale_law!r}, and hyperprior=False leaves it out")
        if not 0 <= rank <= density.dim:
            raise ValueError(f"rank must lie between 0 and {density.dim}, got {rank}")
        if len(modules.groups) != density.dim:
            raise ValueError(
                f"scales partitions {len(modules.groups)} coordinates, the density has "
                f"{density.dim}"
            )
        loc, width = density.prior_loc, density.prior_scale
        groups, count = modules.groups.to(loc.device), len(modules)
        total = torch.zeros(count, dtype=width.dtype, device=width.device)
        log_scale = total.index_add(0, groups, width.log()) / groups.bincount(minlength=count)
        factor = None
        if rank:
            phase = torch.arange(density.dim, dtype=width.dtype, device=width.device)[:, None]
            wave = torch.arange(rank, dtype=width.dtype, device=width.device)
            factor = 0.1 * width[:, None] * torch.cos(math.pi * (phase + 0.5) * wave / density.dim)
        belief = Hyperprior(loc, width, log_scale.exp(), scale_law) if hyperprior else None
        limits = None
        if bounds is not None:
            like: Any = {"dtype": log_scale.dtype, "device": log_scale.device}
            ends = [torch.as_tensor(b, **like).expand(count) for b in bounds]
            limits = torch.stack(ends)
            log_scale = log_scale.clamp(*limits.log())
        return cls(loc, log_scale, groups, factor, belief, modules.names, limits)

    def moved(self, loc: Tensor, log_scale: Tensor, factor: Tensor | None) -> GaussianPrior:
        """The same modules, hyperprior and bounds around other values of the same shapes.

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
    def modules(self) -> Modules:
        """Which of its M scales each coordinate has."""
        names = self.module_names or tuple(str(m) for m in range(self.log_scale.shape[-1]))
        return Modules(names, self.groups)

    @property
    def scale(self) -> Tensor:
        """`[D]`, standard deviation of each coordinate without the low-rank part."""
        return self.log_scale.exp()[..., self.groups]

    def precision_mv(self, v: Tensor) -> Tensor:
        """Λv for v of shape `[..., D]`; Woodbury where there is a low-rank part."""
        return precision_mv(v, self.scale, self.factor)

    def covariance_mv(self, v: Tensor) -> Tensor:
        """Σv for v of shape `[..., D]`."""
        out = self.scale**2 * v
        return out if self.factor is None else out + (v @ self.factor) @ self.factor.T

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
            trace = trace + (sd**2 * self.precision_diagonal()).sum(-1)
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

    def precision_diagonal(self) -> Tensor:
        """`[D]`, the diagonal of Λ."""
        inverse = self.scale**-2
        if self.factor is None:
            return inverse
        right = (self.factor * inverse[:, None]).T
        inner = _capacitance(self.scale, self.factor)
        return inverse - (torch.linalg.solve_triangular(inner, right, upper=False) ** 2).sum(0)


def penalty(theta: Tensor, loc: Tensor, scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """½(θ−θ0)ᵀΛ(θ−θ0), nats, from bare tensors: `[..., D]` to `[...]`."""
    offset = theta - loc
    if factor is None:
        out: Tensor = _HalfSquares.apply(offset * scale**-1)
        return out
    return 0.5 * (offset * precision_mv(offset, scale, factor)).sum(-1)


class _HalfSquares(torch.autograd.Function):
    """½Σz² over the last dimension, whose derivative is z; autograd would add up two halves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return 0.5 * (z * z).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *seed: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return seed[0][..., None] * z

    @staticmethod
    def jvp(ctx: Any, *along: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return (z * along[0]).sum(-1)


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


def _check_bounds(bounds: Tensor, scale: Tensor, names: tuple[str, ...]) -> None:
    if tuple(bounds.shape) != (2, len(scale)):
        raise ValueError(f"bounds has shape {tuple(bounds.shape)}, wanted (2, {len(scale)})")
    low, high = bounds
    bad = ~((low > 0) & (low <= high) & high.isfinite())
    if bool(bad.any()):
        m = int(bad.nonzero()[0])
        raise ValueError(
            f"bounds of module {names[m]!r} are {float(low[m]):g} and {float(high[m]):g}, wanted "
            "0 < least <= largest"
        )
    slack = 8 * torch.finfo(scale.dtype).eps  # of the logarithm and back
    out = (scale < low * (1 - slack)) | (scale > high * (1 + slack))
    if bool(out.any()):
        m = int(out.nonzero()[0])
        raise ValueError(
            f"the scale of module {names[m]!r} is {float(scale[m]):g}, beyond its bounds "
            f"{float(low[m]):g} and {float(high[m]):g}"
        )


def _capacitance(scale: Tensor, factor: Tensor) -> Tensor:
    """Cholesky factor of I + FᵀS⁻²F, `[..., R, R]`."""
    weighted = factor / scale[..., None]
    eye = torch.eye(weighted.shape[-1], dtype=weighted.dtype, device=weighted.device)
    # Positive definite by construction; `cholesky` would wait for the device to see whether it is.
    return torch.linalg.cholesky_ex(eye + weighted.mT @ weighted).L
