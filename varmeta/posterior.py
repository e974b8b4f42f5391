"""TaskPosterior: what a strategy believes of each task's parameters, whatever its form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from varmeta.models.density import Density
from varmeta.seeds import global_rng
from varmeta.tasks import Tasks

_ROWS_AT_ONCE = 1_000_000


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

        0 where a row is padding. So many draws at once as give a million rows.
        """
        theta, shared = self.sample(count, generator)
        at_once = max(1, _ROWS_AT_ONCE // max(1, tasks.mask.numel()))
        total = theta.new_full(tasks.mask.shape, -torch.inf)
        with torch.no_grad():
            for first in range(0, len(theta), at_once):
                some = slice(first, first + at_once)
                phi = shared[some] if shared.dim() > 1 else shared
                rows = self.density.log_likelihood(theta[some], tasks, phi)
                total = torch.logaddexp(total, rows.logsumexp(0))
        return total - math.log(len(theta))

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

    def log_predictive(self, tasks: Tasks, count: int, generator: torch.Generator) -> Tensor:
        """log p(y_n | θ_i, φ) of every row, nats: `[T, N]`; all draws are alike."""
        return super().log_predictive(tasks, 1, generator)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raises: a delta has no density."""
        raise self._no_density()


@dataclass(frozen=True, eq=False)
class Gaussian(TaskPosterior):
    """N(loc, S) per task: S = L Lᵀ, or diag(sd²) + factor factorᵀ.

    `loc` is `[T, D]`; `scale` is L, lower triangular `[T, D, D]`, or sd, `[T, D]`; `factor`, beside
    an sd only, is `[T, D, R]`. `kind` says where the covariance comes from: `"gaussian"` was
    optimised, `"laplace"` is the inverse curvature at a mode.
    """

    loc: Tensor
    scale: Tensor
    factor: Tensor | None = None
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
        if self.scale.dim() == 3:
            return self.scale.norm(dim=-1)
        if self.factor is None:
            return self.scale
        return (self.scale**2 + (self.factor**2).sum(-1)).sqrt()

    @property
    def law(self) -> torch.distributions.Distribution:
        """As a distribution with batch shape `[T]` and event shape `[D]`."""
        if self.scale.dim() == 3:
            return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale)
        if self.factor is None:
            normal = torch.distributions.Normal(self.loc, self.scale)
            return torch.distributions.Independent(normal, 1)
        return torch.distributions.LowRankMultivariateNormal(self.loc, self.factor, self.scale**2)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Independent draws."""
        with global_rng(generator):
            return self.law.sample((count,)), self.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """log N(θ_i; loc_i, S_i), nats: `[..., T, D]` to `[..., T]`."""
        out: Tensor = self.law.log_prob(theta)
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
            like: Any = {"dtype": torch.float32, "device": self.draws.device}
            index = torch.linspace(0, total - 1, count, **like).round().long()
        else:
            index = torch.randint(total, (count,), generator=generator, device=self.draws.device)
        return self.draws[index], self.shared[index] if self.shared.dim() > 1 else self.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raises: draws have no density."""
        raise self._no_density()
