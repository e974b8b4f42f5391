"""Families of q_i: the Gaussians that a row of numbers per task can stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Gaussian, TaskPosterior

Kind = Literal["delta", "diagonal", "low_rank", "full"]


@dataclass(frozen=True, eq=False)
class GaussianQ:
    """q_i = N(mean, diag(sd²) + factor factorᵀ) of B tasks; a point where both are None.

    Attributes:
        mean: `[B, D]`.
        sd: `[B, D]`, positive, or None.
        factor: `[B, D, K]`, or None; without sd it is square and lower triangular.
    """

    mean: Tensor
    sd: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def of(cls, posterior: Gaussian) -> GaussianQ:
        """The q of a posterior; `posterior` is the way back."""
        if posterior.scale.dim() == 3:
            return cls(posterior.loc, factor=posterior.scale)
        return cls(posterior.loc, posterior.scale, posterior.factor)

    @property
    def noise_dim(self) -> int:
        """How many standard normals make a draw."""
        dims = 0 if self.sd is None else self.sd.shape[-1]
        return dims + (0 if self.factor is None else self.factor.shape[-1])

    @property
    def variance(self) -> Tensor:
        """`[B, D]`, the covariance's diagonal; 0 for a point."""
        out = torch.zeros_like(self.mean) if self.sd is None else self.sd**2
        return out if self.factor is None else out + (self.factor**2).sum(-1)

    def draws(self, noise: Tensor) -> Tensor:
        """Points of q_i from standardised ones: `[S, B, noise_dim]` to `[S, B, D]`."""
        out, rest = self.mean, noise
        if self.sd is not None:
            out, rest = out + self.sd * noise[..., : out.shape[-1]], noise[..., out.shape[-1] :]
        if self.factor is not None:
            out = out + torch.einsum("bdk,sbk->sbd", self.factor, rest)
        return out

    def kl(self, prior: GaussianPrior) -> Tensor:
        """KL[q_i ‖ N(θ0, Σ)], nats, `[B]`; ½‖mean−θ0‖²_Λ for a point, whose own is infinite."""
        if self.sd is None and self.factor is None:
            return prior.penalty(self.mean)
        return prior.kl(self.mean, self.sd, self.factor)

    def posterior(self, density: Density, names: tuple[str, ...], shared: Tensor) -> TaskPosterior:
        """As the posterior of B tasks of these names."""
        parts = [None if t is None else t.detach() for t in (self.mean, self.sd, self.factor)]
        mean, sd, factor = parts
        assert mean is not None
        if sd is None and factor is None:
            return Delta(density, names, shared, mean)
        if sd is None:
            assert factor is not None
            return Gaussian(density, names, shared, mean, factor)
        return Gaussian(density, names, shared, mean, sd, factor)


@dataclass(frozen=True)
class Family:
    """What the columns of a row mean: D for the mean, then log sds, then factors.

    Everything is in units that the caller gives, so that one step size fits all columns.

    Attributes:
        kind: `"delta"`, `"diagonal"`, `"low_rank"` (diagonal plus `rank` columns) or `"full"`
            (a lower triangular factor, logarithms on its diagonal).
        dim: D.
        rank: columns of the low-rank part.
    """

    kind: Kind
    dim: int
    rank: int = 0

    @property
    def num_columns(self) -> int:
        """How many numbers a task needs: D, 2D, (2 + rank)D or D + D(D+1)/2."""
        extra = {
            "delta": 0,
            "diagonal": self.dim,
            "low_rank": self.dim * (1 + self.rank),
            "full": self.dim * (self.dim + 1) // 2,
        }
        return self.dim + extra[self.kind]

    def q(self, rows: Tensor, loc: Tensor, unit: Tensor) -> GaussianQ:
        """Rows `[B, K]` read as offsets from `loc` `[D]` in units `[D]`."""
        dim = self.dim
        mean, rest = loc + unit * rows[:, :dim], rows[:, dim:]
        if self.kind == "delta":
            return GaussianQ(mean)
        if self.kind == "full":
            return GaussianQ(mean, factor=unit[:, None] * self._tril(rest))
        sd, rest = unit * rest[:, :dim].exp(), rest[:, dim:]
        if self.kind == "diagonal":
            return GaussianQ(mean, sd)
        return GaussianQ(mean, sd, unit[:, None] * rest.reshape(-1, dim, self.rank))

    def rows_of(self, mean: Tensor, tril: Tensor, loc: Tensor, unit: Tensor) -> Tensor:
        """`[B, K]`, the rows of full Gaussians; `mean` is `[B, D]`, `tril` `[B, D, D]`."""
        assert self.kind == "full"
        row, column = self._places(tril)
        entries = (tril / unit[:, None])[:, row, column]
        entries = torch.where(row == column, entries.clamp(min=1e-300).log(), entries)
        return torch.cat([(mean - loc) / unit, entries], dim=-1)

    def row_of(self, prior: GaussianPrior, loc: Tensor, unit: Tensor) -> Tensor:
        """`[K]`, the row whose q is the prior, or as close to it as the family comes.

        A low-rank part starts small and not at 0, which is a stationary point of the bound.
        """
        with torch.no_grad():
            mean, width = (prior.loc - loc) / unit, prior.scale / unit
            if self.kind == "delta":
                return mean
            if self.kind == "full":
                tril = torch.linalg.cholesky(prior.covariance()) / unit[:, None]
                tril.diagonal().log_()
                return torch.cat([mean, tril[tuple(self._places(tril))]])
            columns = [mean, width.log()]
            if self.kind == "low_rank":
                like: Any = {"dtype": width.dtype, "device": width.device}
                phase = (torch.arange(self.dim, **like)[:, None] + 0.5) * math.pi / self.dim
                wave = torch.cos(phase * torch.arange(self.rank, **like))
                columns.append((0.1 * width[:, None] * wave).reshape(-1))
            return torch.cat(columns)

    def _places(self, like: Tensor) -> Tensor:
        return torch.tril_indices(self.dim, self.dim, device=like.device)

    def _tril(self, columns: Tensor) -> Tensor:
        row, column = self._places(columns)
        values = torch.where(row == column, columns.exp(), columns)
        out = columns.new_zeros(len(columns), self.dim, self.dim)
        return out.index_put(
            (torch.arange(len(out), device=row.device)[:, None], row, column), values
        )
