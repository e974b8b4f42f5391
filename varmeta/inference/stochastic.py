"""Meta-learning through a random algorithm: E over where it lands, not one point.

Objective: Σ_i E_{θ ∼ Alg(f_i, θ0)} g_i(θ), with Alg anchored Langevin dynamics
x_{t+1} = x_t − P∇E_i(x_t) + √(2τP) ξ_t from x_0 = θ0, E_i = f_i + ½(θ−θ0)ᵀΛ(θ−θ0). θ0 acts on it in
two ways: it moves each minimum, and it changes how often each is found (Huszár, inference.vc,
2019). Both estimators of the gradient here are unbiased for both: pathwise differentiates through
the run; the score function weights each run's log-probability by its loss (Williams, 1992), less
the mean loss of the task's other particles (a leave-one-out baseline, which keeps it unbiased).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from varmeta.inference.base import Batch, State
from varmeta.inference.laplace import MAX_DIM, hessian
from varmeta.inference.metagradient import MetaGradient
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Draws, TaskPosterior
from varmeta.tasks import Tasks


@dataclass(frozen=True)
class Langevin:
    """Anchored Langevin dynamics, or anchored minibatch SGD with or without injected noise.

    Attributes:
        run_length: steps of a run.
        step_size: one number for all coordinates, units of θ² per nat (P = step_size · I); None for
            P_i = 0.2 |∇²E_i(θ0)|⁻¹, the curvature at the start, so that every task moves at its own
            pace. P belongs to the algorithm: no gradient is taken of it. Finite steps widen the
            stationary law: by a factor 1/(1 − step·curvature/2) in variance, 1.11 at the default.
        temperature: τ; 1 samples the posterior, 0 is plain gradient descent.
        batch_rows: rows of each task used in a step, drawn anew without replacement and rescaled;
            None for all.
    """

    run_length: int = 25
    step_size: float | None = None
    temperature: float = 1.0
    batch_rows: int | None = None

    def __post_init__(self) -> None:
        if self.run_length < 1 or (self.step_size is not None and self.step_size <= 0):
            raise ValueError(
                f"run_length and step_size must be positive, got {self.run_length} and "
                f"{self.step_size}"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")

    def run(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        particles: int,
        generator: torch.Generator,
        *,
        through: bool = False,
        score: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`particles` independent runs for each of T tasks.

        Args:
            density: the model; f_i is the sum over all rows of `tasks`.
            prior: the anchor, N(θ0, Σ).
            shared: φ `[P]`.
            tasks: T tasks.
            particles: S.
            generator: of the noise and of the minibatches.
            through: keep the graph through the run (pathwise).
            score: return the runs' log-probabilities with their derivative.

        Returns:
            Ends `[S, T, D]`, and `[S, T]` whose value is 0 and whose derivative in θ0, the scales
            and φ is that of the log-probability of the run (zeros unless `score`).
        """
        root = self._root(density, prior, shared, tasks)
        start = prior.loc.expand(particles, len(tasks), -1)
        x = start if through or score else start.detach()
        log_prob = x.new_zeros(particles, len(tasks))
        like: Any = {"generator": generator, "dtype": x.dtype, "device": x.device}
        for t in range(self.run_length):
            if t and not through:
                x = x.detach()
            grad = self._gradient(density, prior, shared, tasks, x, generator, through or score)
            noise = torch.randn(*x.shape, **like)
            spread = math.sqrt(2 * self.temperature)
            move = root.T(grad)
            if score:
                # d log N(x_{t+1}; x_t − R Rᵀ∇E, 2τ R Rᵀ) = ξ_tᵀ d(R⁻¹x_t − Rᵀ∇E)/√(2τ); from t = 1
                # on x_t is what it was.
                mean = root.inverse(x) - move if t == 0 else -move
                term = (noise * mean).sum(-1) / spread
                log_prob = log_prob + term - term.detach()
            x = x - root(move) + spread * root(noise)
        return (x if through else x.detach()), log_prob

    def _root(self, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks) -> _Root:
        """R with R Rᵀ = P."""
        if self.step_size is not None:
            values = prior.loc.detach().new_full((len(tasks), density.dim), 1 / self.step_size)
            eye = torch.eye(density.dim, dtype=values.dtype, device=values.device)
            return _Root(values.sqrt(), eye.expand(len(tasks), -1, -1))
        if density.dim > MAX_DIM:
            raise ValueError(
                f"step_size=None needs the dense curvature, and θ has {density.dim} coordinates "
                f"(limit {MAX_DIM}); give Langevin a step_size"
            )

        def energy(theta: Tensor) -> Tensor:
            loss = density.negative_log_likelihood(theta, tasks, shared.detach())
            return loss + prior.penalty(theta)

        start = prior.loc.detach().expand(len(tasks), -1)
        values, vectors = torch.linalg.eigh(hessian(energy, start).detach())
        floor = 1e-6 * values.abs().amax(-1, keepdim=True)
        return _Root((values.abs().clamp(min=floor) / 0.2).sqrt(), vectors)

    def _gradient(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        x: Tensor,
        generator: torch.Generator,
        create_graph: bool,
    ) -> Tensor:
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            rows = -density.log_likelihood(x, tasks, shared)
            if self.batch_rows is not None:
                rows = rows * self._row_weights(tasks, len(x), generator).to(rows)
            energy = rows.sum(-1) + prior.penalty(x)
            return torch.autograd.grad(energy.sum(), x, create_graph=create_graph)[0]

    def _row_weights(self, tasks: Tasks, particles: int, generator: torch.Generator) -> Tensor:
        """`[S, T, N]`: n_i/b on b rows drawn without replacement, 0 on the others."""
        assert self.batch_rows is not None
        mask = tasks.mask
        noise = torch.full((particles, *mask.shape), 2.0, device=mask.device)
        noise[:, mask] = torch.rand(
            particles, int(mask.sum()), generator=generator, device=mask.device
        )
        rank = noise.argsort(-1).argsort(-1)
        size = tasks.num_rows.clamp(max=self.batch_rows)[:, None]
        return (rank < size) * (tasks.num_rows[:, None] / size)


@dataclass(frozen=True)
class Stochastic(MetaGradient):
    """Learn the prior from the expected query loss of a random algorithm.

    Attributes:
        algorithm: where a task's particles go.
        estimator: `"pathwise"` (through the run; low variance while runs are short and the flow
            contracts, none at all to speak of once it expands) or `"score"` (needs a temperature
            above 0; its variance grows with the run length but not with the curvature).
        particles: runs per task and meta-step; at least 2 for the score function's baseline.
        draws: particles per task when adapting.

    The other attributes are those of `MetaGradient`; each part of a batch (`tasks_at_once`) draws
    its own noise.

    Raises:
        ValueError: the score function without noise or without a second particle.
    """

    steps: int = field(default=100, kw_only=True)
    learning_rate: float = field(default=0.1, kw_only=True)
    algorithm: Langevin = field(default_factory=Langevin)
    estimator: Literal["pathwise", "score"] = "pathwise"
    particles: int = 4
    draws: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator not in ("pathwise", "score"):
            raise ValueError(f"estimator must be 'pathwise' or 'score', got {self.estimator!r}")
        if self.estimator == "score" and self.algorithm.temperature == 0:
            raise ValueError(
                "estimator='score' differentiates the probability of the noise, and the "
                "algorithm's temperature is 0: raise it, or use 'pathwise'"
            )
        if self.particles < (2 if self.estimator == "score" else 1):
            raise ValueError(
                f"particles must be at least 2 for the score function's leave-one-out baseline "
                f"(1 for pathwise), got {self.particles}"
            )

    @property
    def kept_vectors(self) -> int:
        """See `MetaGradient.kept_vectors`: pathwise keeps every step of every particle."""
        length = self.algorithm.run_length if self.estimator == "pathwise" else 1
        return super().kept_vectors + self.particles * length

    @property
    def name(self) -> str:
        """`Stochastic`, with the estimator unless it is pathwise."""
        return "Stochastic" + (" (score)" if self.estimator == "score" else "")

    def losses(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """E_{θ∼Alg} g_i(θ) per task, nats, `[T]`, with an unbiased derivative.

        The second result is the particles' standard deviation of g_i, `[T]`.
        """
        pathwise = self.estimator == "pathwise"
        ends, log_prob = self.algorithm.run(
            density,
            prior,
            shared,
            tasks.support,
            self.particles,
            generator,
            through=pathwise,
            score=not pathwise,
        )
        g = density.negative_log_likelihood(ends, tasks.query, shared)
        if not pathwise:
            others = (g.detach().sum(0) - g.detach()) / (self.particles - 1)
            g = g + (g.detach() - others) * log_prob
        return g.mean(0), g.detach().std(0, correction=0)

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, _Runs]:
        """See `losses`."""
        prior, shared = state.meta.prior, state.meta.shared
        losses, spread = self.losses(density, prior, shared, batch.tasks, generator)
        # A run costs one gradient a step, and its derivative two more (a second-order product).
        per_task = self.particles * (3 * self.algorithm.run_length + 1)
        if self.algorithm.step_size is None:
            per_task += 2 * density.dim
        return losses, _Runs(per_task, spread)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """Where `draws` independent runs of the algorithm end."""
        prior, shared = state.meta.fixed()
        ends, _ = self.algorithm.run(density, prior, shared, tasks, self.draws, generator)
        return Draws(density, tasks.names, shared, ends)


@dataclass(frozen=True, eq=False)
class _Runs:
    """`metagradient.Report` of some runs: the particles' standard deviation of g_i, `[T]` nats."""

    gradients: int
    spread: Tensor

    def stats(self) -> dict[str, Tensor]:
        return {"query_loss_sd": self.spread}


@dataclass(frozen=True, eq=False)
class _Root:
    """R = V diag(1/s) per task, applied to `[S, T, D]`; `s`: `[T, D]`, `vectors`: `[T, D, D]`."""

    s: Tensor
    vectors: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        return torch.einsum("tij,stj->sti", self.vectors, v / self.s)

    def T(self, v: Tensor) -> Tensor:
        """Rᵀv."""
        return torch.einsum("tji,stj->sti", self.vectors, v) / self.s

    def inverse(self, v: Tensor) -> Tensor:
        """R⁻¹v."""
        return torch.einsum("tji,stj->sti", self.vectors, v) * self.s
