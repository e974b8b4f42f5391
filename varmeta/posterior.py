"""TaskPosterior: what a strategy believes of each task's parameters, whatever its form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from varmeta.models.density import Density
from varmeta.tasks import Tasks


@dataclass(frozen=True, eq=False)
class TaskPosterior(ABC):
    """q_i(θ_i) for T tasks over flat unconstrained parameters, with the shared φ.

    Attributes:
        density: the model whose parameters these are.
        names: `[T]`, the tasks' names.
        shared: `[P]` unconstrained, or `[S, T, P]`, one per draw.
        stats: per-task diagnostics `[T]` (gradient norm, residual, iterations, ...).
    """

    density: Density
    names: tuple[str, ...]
    shared: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    kind: ClassVar[str]

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """`[T, D]`, unconstrained."""

    @property
    @abstractmethod
    def sd(self) -> Tensor:
        """`[T, D]`, unconstrained; 0 for a delta."""

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` draws of θ `[count, T, D]` with φ, `[P]` or `[count, T, P]`."""

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """log q_i(θ_i), nats: `[..., T, D]` to `[..., T]`.

        Raises:
            ValueError: the posterior has no density (a delta, or draws).
        """

    def log_predictive(self, tasks: Tasks, count: int, generator: torch.Generator) -> Tensor:
        """log p(y_n | posterior) of every row, nats: `[T, N]`, averaged over `count` draws.

        0 where a row is padding.
        """
        theta, shared = self.sample(count, generator)
        with torch.no_grad():
            rows = self.density.log_likelihood(theta, tasks, shared)
        return rows.logsumexp(0) - math.log(len(rows))

    def predict(self, tasks: Tasks, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` draws of the targets: `{observed site: [count, T, N, *target_shape]}`."""
        theta, shared = self.sample(count, generator)
        return self.density.predict(theta, tasks, generator, shared)

    def _no_density(self) -> ValueError:
        return ValueError(f"a {self.kind} posterior has no density; use sample, mean or sd")


@dataclass(frozen=True, eq=False)
class Delta(TaskPosterior):
    """A point per task. `loc`: `[T, D]`."""

    loc: Tensor

    kind: ClassVar[str] = "delta"

    @property
    def mean(self) -> Tensor:
        """`[T, D]`, the point."""
        return self.loc

    @property
    def sd(self) -> Tensor:
        """`[T, D]`, zeros."""
        return torch.zeros_like(self.loc)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` copies of the point."""
        return self.loc.expand(count, *self.loc.shape), self.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raises: a delta has no density."""
        raise self._no_density()


@dataclass(frozen=True, eq=False)
class Gaussian(TaskPosterior):
    """N(loc, L Lᵀ) per task. `loc`: `[T, D]`; `scale_tril`: `[T, D, D]`, or `[T, D]` if diagonal.

    `kind` says where the covariance comes from: `"gaussian"` was optimised, `"laplace"` is the
    inverse curvature at a mode.
    """

    loc: Tensor
    scale_tril: Tensor
    laplace: bool = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        """`"gaussian"` or `"laplace"`."""
        return "laplace" if self.laplace else "gaussian"

    @property
    def mean(self) -> Tensor:
        """`[T, D]`."""
        return self.loc

    @property
    def sd(self) -> Tensor:
        """`[T, D]`."""
        if self.scale_tril.dim() == 2:
            return self.scale_tril
        return self.scale_tril.norm(dim=-1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Independent draws."""
        noise = torch.randn(
            count,
            *self.loc.shape,
            generator=generator,
            dtype=self.loc.dtype,
            device=self.loc.device,
        )
        if self.scale_tril.dim() == 2:
            return self.loc + self.scale_tril * noise, self.shared
        return self.loc + (self.scale_tril @ noise[..., None])[..., 0], self.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """log N(θ_i; loc_i, L_i L_iᵀ), nats: `[..., T, D]` to `[..., T]`."""
        tril = self.scale_tril if self.scale_tril.dim() == 3 else self.scale_tril.diag_embed()
        normal = torch.distributions.MultivariateNormal(self.loc, scale_tril=tril)
        out: Tensor = normal.log_prob(theta)
        return out


@dataclass(frozen=True, eq=False)
class Draws(TaskPosterior):
    """Draws of each task. `draws`: `[S, T, D]`, chain after chain; `num_chains` divides S."""

    draws: Tensor
    num_chains: int = 1

    kind: ClassVar[str] = "draws"

    @property
    def mean(self) -> Tensor:
        """`[T, D]`."""
        return self.draws.mean(0)

    @property
    def sd(self) -> Tensor:
        """`[T, D]`."""
        return self.draws.std(0)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All draws in their order if `count` is S; thinned evenly if smaller; else resampled."""
        total = len(self.draws)
        if count <= total:
            index = torch.linspace(0, total - 1, count, device=self.draws.device).round().long()
        else:
            index = torch.randint(total, (count,), generator=generator, device=self.draws.device)
        return self.draws[index], self.shared[index] if self.shared.dim() > 1 else self.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raises: draws have no density."""
        raise self._no_density()
