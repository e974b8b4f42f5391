"""TaskPosterior: what a strategy believes of each task's parameters, whatever its form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from varmeta import parts
from varmeta.checked import require_kind
from varmeta.models.density import Density
from varmeta.seeds import generator as seeded
from varmeta.seeds import global_rng
from varmeta.tasks import HOW_TASKS, Tasks

DRAWS = 1000  # of a prediction, where nobody says how many


@dataclass(frozen=True, eq=False)
class Block:
    """Draws of some of a posterior's tasks.

    Attributes:
        tasks: which of the T tasks these t are.
        posterior: of these.
        theta: `[S, t, D]`.
        shared: φ, `[P]` or `[S, t, P]`.
    """

    tasks: slice
    posterior: TaskPosterior
    theta: Tensor
    shared: Tensor


@dataclass(frozen=True, eq=False, repr=False)
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

    @property
    @abstractmethod
    def covariance(self) -> Tensor:
        """`[T, D, D]`, of the unconstrained θ_i: T·D² numbers, made anew at every call.

        Its diagonal is `sd` squared: of draws the sample covariance, of a delta zeros.
        """

    @abstractmethod
    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `sample` returns, all at once."""

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """log q_i(θ_i), nats: `[..., T, D]` to `[..., T]`.

        Raises:
            ValueError: the posterior has no density (a delta, or draws).
        """

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` draws of θ `[count, T, D]` with φ, `[P]` or `[count, T, P]`."""
        drawn = list(self.blocks(count, generator))
        theta = torch.cat([block.theta for block in drawn], 1)
        if self.shared.dim() == 1:
            return theta, self.shared
        return theta, torch.cat([block.shared for block in drawn], 1)

    def blocks(self, count: int, generator: torch.Generator) -> Iterator[Block]:
        """The draws of `sample`, some tasks after the others, so that they need not be held.

        So many tasks at once as have four million numbers (`varmeta.parts`), one at least.
        """
        ready, numbers = self._prepared(count, generator), count * self.mean.shape[-1]
        for some in parts.slices(len(self.names), numbers, parts.LARGEST):
            place = range(some.start, some.stop)
            drawn = ready.select(place)._draw(count, generator)
            yield Block(some, self.select(place), *drawn)

    def select(self, index: Tensor | Sequence[int]) -> Self:
        """The posterior of the tasks at these positions (or where a bool is True)."""
        places = torch.as_tensor(index, device=self.shared.device)
        if places.dtype == torch.bool:
            places = places.nonzero()[:, 0]
        return replace(self, **self._taken(places.long()))

    def of(self, tasks: Tasks) -> Self:
        """The posterior of these tasks, matched by name: some of its own, in any order.

        Raises:
            TypeError: tasks that are no `Tasks`.
            ValueError: a task that it is not of.
        """
        require_kind("tasks", tasks, Tasks, HOW_TASKS)
        if tasks.names == self.names:
            return self
        place = {name: k for k, name in enumerate(self.names)}
        unknown = [name for name in tasks.names if name not in place]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(
                f"tasks: this posterior is of {_some(self.names)} and not of {unknown[0]!r}{more}. "
                "Tasks are matched by name. Use fit.adapt(tasks), with rows whose targets are "
                "known, for the posterior of new tasks, and fit.unseen(names) for tasks without "
                "any; fit.predict(data) does both"
            )
        return self.select([place[name] for name in tasks.names])

    def log_predictive(
        self,
        tasks: Tasks,
        count: int = DRAWS,
        generator: torch.Generator | None = None,
        *,
        site: str | None = None,
    ) -> Tensor:
        """log p(y_n | posterior) of every row, nats: `[T, N]`, averaged over `count` draws.

        0 where a row is padding. Memory is bounded by `varmeta.parts`. Where all rows of a task are
        one draw (`density.joint`), log p(y | posterior) of a task, in equal parts.

        Args:
            tasks: some of the posterior's tasks in any order, matched by name, with any rows.
            count: number of draws.
            generator: where the random numbers come from; that of seed 0 if None.
            site: one of several observed sites alone; all of them together if None.

        Raises:
            TypeError: tasks that are no `Tasks`.
            ValueError: a task that the posterior is not of, or rows of another shape.
        """
        posterior, noise = self.of(tasks), self._noise(count, generator)
        total = torch.zeros(tasks.mask.shape, dtype=self.mean.dtype, device=tasks.mask.device)
        with torch.no_grad():
            for block in posterior.blocks(count, noise):
                some = parts.tasks_at(tasks, block.tasks)
                drawn = block.theta, some, block.shared
                for part, nats in parts.log_likelihood(self.density, *drawn, site):
                    rows = 1
                    if self.density.joint:  # the mean over draws is of a task's density
                        rows = nats.shape[-1]
                        nats = nats.sum(-1, keepdim=True).expand_as(nats)
                    mean = nats.logsumexp(0) - math.log(len(nats))
                    part.put(total[block.tasks], mean / rows)
        return total

    def predict(
        self, tasks: Tasks, count: int = DRAWS, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`count` draws of the targets: `{observed site: [count, T, N, *target_shape]}`.

        The targets that `tasks` holds are not looked at. Rows of padding hold draws too; mask them
        with `tasks.mask`. `fit.predict` gives means, standard deviations and quantiles, also of new
        tasks. Arguments and errors are those of `log_predictive`.

        Raises:
            NotImplementedError: the model's law cannot be drawn from.
        """
        posterior, noise = self.of(tasks), self._noise(count, generator)
        theta, shared = posterior.sample(count, noise)
        return self.density.predict(theta, tasks, noise, shared)

    def predictions(
        self, tasks: Tasks, count: int = DRAWS, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tasks, dict[str, Tensor]]]:
        """`predict`, some rows of some tasks at a time: these, and the draws of their targets.

        Memory is bounded by `varmeta.parts`. Where that holds all of them, they are those of
        `predict`; beyond, other ones of the same law.
        """
        posterior, noise = self.of(tasks), self._noise(count, generator)
        for block in posterior.blocks(count, noise):
            some = parts.tasks_at(tasks, block.tasks)
            drawn = block.theta, some, noise, block.shared
            for part, values in parts.predict(self.density, *drawn):
                yield part.tasks, values

    def __repr__(self) -> str:
        numbers = f"{self.mean.shape[-1]} coordinates"
        if isinstance(self, Draws):
            numbers = f"{len(self.draws)} draws of {numbers}"
        return (
            f"{type(self).__name__}({self.kind} posterior of {_some(self.names)}: {numbers} each; "
            "see mean, sd, sample, predict)"
        )

    def _noise(self, count: int, generator: torch.Generator | None) -> torch.Generator:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"count must be a number of draws, at least 1, got {count!r}")
        require_kind(
            "generator",
            generator,
            (torch.Generator, type(None)),
            "give torch.Generator().manual_seed(0), or leave it out for that",
        )
        return seeded(0, device=self.shared.device) if generator is None else generator

    def _prepared(self, count: int, generator: torch.Generator) -> TaskPosterior:
        """Of which all tasks' draws are made, after what is drawn for all of them together."""
        return self

    def _taken(self, index: Tensor) -> dict[str, Any]:
        """The fields of `select`."""
        return {
            "names": tuple(self.names[i] for i in index.tolist()),
            "shared": self.shared if self.shared.dim() == 1 else self.shared[:, index],
            "stats": {name: value[index] for name, value in self.stats.items()},
        }

    def _no_density(self) -> ValueError:
        return ValueError(f"a {self.kind} posterior has no density; use sample, mean or sd")


@dataclass(frozen=True, eq=False, repr=False)
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

    @property
    def covariance(self) -> Tensor:
        """`[T, D, D]`, zeros."""
        return self.loc.new_zeros(*self.loc.shape, self.loc.shape[-1])

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.loc.expand(count, *self.loc.shape), self.shared

    def log_predictive(
        self,
        tasks: Tasks,
        count: int = DRAWS,
        generator: torch.Generator | None = None,
        *,
        site: str | None = None,
    ) -> Tensor:
        """log p(y_n | θ_i, φ) of every row, nats: `[T, N]`; all draws are alike."""
        return super().log_predictive(tasks, 1, generator, site=site)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raises: a delta has no density."""
        raise self._no_density()

    def _taken(self, index: Tensor) -> dict[str, Any]:
        return {**super()._taken(index), "loc": self.loc[index]}


@dataclass(frozen=True, eq=False, repr=False)
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
    def covariance(self) -> Tensor:
        """`[T, D, D]`, S."""
        if self.scale.dim() == 3:
            return self.scale @ self.scale.mT
        diagonal = torch.diag_embed(self.scale**2)
        return diagonal if self.factor is None else diagonal + self.factor @ self.factor.mT

    @property
    def law(self) -> torch.distributions.Distribution:
        """As a distribution with batch shape `[T]` and event shape `[D]`."""
        if self.scale.dim() == 3:
            return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale)
        if self.factor is None:
            normal = torch.distributions.Normal(self.loc, self.scale)
            return torch.distributions.Independent(normal, 1)
        return torch.distributions.LowRankMultivariateNormal(self.loc, self.factor, self.scale**2)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def noise(like: Tensor) -> Tensor:
            shape = (count, *like.shape)
            return torch.randn(shape, dtype=like.dtype, device=like.device)

        loc, scale, factor = self.loc, self.scale, self.factor
        with global_rng(generator), torch.no_grad():  # the numbers that `law.sample` draws
            if scale.dim() == 3:
                spread = torch.einsum("tdk,stk->std", scale, noise(loc))
            elif factor is None:
                spread = noise(loc).mul_(scale)
            else:
                spread = torch.einsum("tdr,str->std", factor, noise(factor[:, 0]))
                spread = spread + noise(loc).mul_(scale)
        return spread.add_(loc).contiguous(), self.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """log N(θ_i; loc_i, S_i), nats: `[..., T, D]` to `[..., T]`."""
        if self.scale.dim() < 3:
            out: Tensor = self.law.log_prob(theta)
            return out
        offset = (theta - self.loc).reshape(-1, *self.loc.shape).permute(1, 2, 0)  # draws together
        white = torch.linalg.solve_triangular(self.scale, offset, upper=False)
        volume = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)
        nats = -0.5 * white.square().sum(1).T - volume - constant
        return nats.reshape(theta.shape[:-1])

    def _taken(self, index: Tensor) -> dict[str, Any]:
        taken = {**super()._taken(index), "loc": self.loc[index], "scale": self.scale[index]}
        return taken if self.factor is None else {**taken, "factor": self.factor[index]}


@dataclass(frozen=True, eq=False, repr=False)
class Draws(TaskPosterior):
    """Draws of each task. `draws`: `[S, T, D]`, chain after chain; `num_chains` divides S.

    `moments`: mean and standard deviation `[T, D]` where they are known better than from the draws.
    """

    draws: Tensor
    num_chains: int = 1
    moments: tuple[Tensor, Tensor] | None = None

    kind: ClassVar[str] = "draws"

    @property
    def mean(self) -> Tensor:
        """`[T, D]`."""
        return self.draws.mean(0) if self.moments is None else self.moments[0]

    @property
    def sd(self) -> Tensor:
        """`[T, D]`."""
        return self.draws.std(0) if self.moments is None else self.moments[1]

    @property
    def covariance(self) -> Tensor:
        """`[T, D, D]`, of the draws, divided by S − 1."""
        offset = (self.draws - self.mean).permute(1, 2, 0)
        return offset @ offset.mT / (len(self.draws) - 1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All draws in their order if `count` is S; thinned evenly if smaller; else resampled."""
        ready = self._prepared(count, generator)
        return ready.draws, ready.shared

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raises: draws have no density."""
        raise self._no_density()

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.draws, self.shared

    def _prepared(self, count: int, generator: torch.Generator) -> Draws:
        """Exactly `count` draws, the same ones of all tasks: φ belongs to θ."""
        total = len(self.draws)
        if count == total:
            return self
        if count < total:
            index = thinned(total, count, self.draws.device)
        else:
            index = torch.randint(total, (count,), generator=generator, device=self.draws.device)
        shared = self.shared[index] if self.shared.dim() > 1 else self.shared
        return replace(self, draws=self.draws[index], shared=shared, num_chains=1)

    def _taken(self, index: Tensor) -> dict[str, Any]:
        taken = {**super()._taken(index), "draws": self.draws[:, index]}
        if self.moments is not None:
            taken["moments"] = (self.moments[0][index], self.moments[1][index])
        return taken


def _some(names: tuple[str, ...]) -> str:
    """How many tasks, with the first names."""
    if len(names) == 1:
        return f"task {names[0]!r}"
    return f"{len(names)} tasks ({', '.join(map(repr, names[:3]))}{', …' * (len(names) > 3)})"


def thinned(total: int, count: int, device: torch.device) -> Tensor:
    """`[count]` of the positions 0 to `total` − 1, evenly chosen."""
    like: Any = {"dtype": torch.float32, "device": device}
    return torch.linspace(0, total - 1, count, **like).round().long()
