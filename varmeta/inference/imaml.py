"""MAP adaptation with implicit meta-gradients (iMAML).

Objective: Σ_i g_i(θ_i*), with θ_i* = argmin_θ f_i(θ) + ½(θ−θ0)ᵀΛ(θ−θ0); f_i is the support and g_i
the query part's negative log-likelihood. The gradient is Λ(H+Λ)⁻¹∇g_i for θ0 and follows from the
same implicit function for the scales and the shared parameters (Rajeswaran, Finn, Kakade & Levine,
2019, Meta-Learning with Implicit Gradients; scales as in Chen et al., 2019, Modular Meta-Learning
with Shrinkage).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from varmeta.inference.base import (
    Batch,
    Meta,
    State,
    StepInfo,
    Strategy,
    decayed,
    gradients,
    map_energy,
    objective,
    update,
    with_query,
)
from varmeta.inference.laplace import MAX_DIM, laplace_scale
from varmeta.inference.minimise import Minimiser, NewtonCG
from varmeta.inference.prox import Adjoint, Implicit, ProxInfo, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(frozen=True)
class IMAML(Strategy):
    """iMAML: adapt by MAP, learn the prior from query losses through the implicit function.

    Attributes:
        steps: meta-steps.
        learning_rate: of Adam on θ0, log scales and φ, in units of the user's prior; decays to 0
            on a cosine.
        learn_scale: learn the prior's scales from the query loss. Needs a query part.
        folds: training tasks without a query part are cross-validated: each of this many folds of
            a task's rows is the query part once. None: f and g are both all rows, which is only
            sensible with fixed scales.
        minimiser: the inner algorithm.
        adjoint: how its result is differentiated.
        posterior_kind: `"laplace"`, `"delta"`, or `"auto"`: Laplace up to 200 coordinates.

    Example:
        >>> from varmeta.inference.linear import CG
        >>> from varmeta.inference.minimise import GradientDescent
        >>> paper = IMAML(
        ...     minimiser=GradientDescent(step_size=0.01, max_iterations=16),
        ...     adjoint=Implicit(CG(max_iterations=5)),
        ...     learn_scale=False,
        ... )
    """

    steps: int = 200
    learning_rate: float = 0.05
    learn_scale: bool = True
    folds: int | None = 5
    minimiser: Minimiser = field(default_factory=NewtonCG)
    adjoint: Adjoint = field(default_factory=Implicit)
    posterior_kind: Literal["auto", "laplace", "delta"] = "auto"

    @property
    def num_steps(self) -> int:
        """`steps`."""
        return self.steps

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks | TaskSource:
        """Cross-validate tasks that have no query part."""
        return with_query(tasks, self.folds, self.learn_scale, seed)

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior."""
        meta = Meta.start(density, prior, learn_scale=self.learn_scale)
        return State(meta, {"meta": torch.optim.Adam(meta.leaves(), lr=self.learning_rate)})

    def losses(
        self, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks
    ) -> tuple[Tensor, ProxInfo]:
        """g_i(θ_i*) per task, nats: `[T]`, differentiable in the prior and φ; and how θ* went."""
        energy = map_energy(density, prior, tasks.support, shared)
        start = prior.loc.detach().expand(len(tasks), -1)
        theta, info = prox(energy, start, minimiser=self.minimiser, adjoint=self.adjoint)
        return density.negative_log_likelihood(theta, tasks.query, shared), info

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One implicit meta-gradient step."""
        losses, info = self.losses(density, state.meta.prior, state.meta.shared, batch.tasks)
        total = objective(losses, state.meta, batch, state.step)
        leaves = state.meta.leaves()
        grads = gradients(total, leaves, state.step)
        rate = decayed(self.learning_rate, state.step, self.steps)
        update(state.optimisers["meta"], leaves, grads, rate)
        stats = {
            "grad_norm": info.grad_norm,
            "residual": info.residual,
            "iterations": info.iterations,
            "converged": info.converged,
            "negative_curvature": info.negative_curvature,
        }
        return StepInfo(float(total.detach()), len(batch.tasks) * (info.gradients + 1), stats)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """θ_i* as a point, or with the inverse curvature there as covariance (Laplace)."""
        prior, shared = state.meta.fixed()
        laplace = self.posterior_kind == "laplace" or (
            self.posterior_kind == "auto" and density.dim <= MAX_DIM
        )
        return adapt_map(density, prior, shared, tasks, self.minimiser, laplace)


def adapt_map(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    minimiser: Minimiser,
    laplace: bool,
) -> TaskPosterior:
    """The MAP point of each task under a fixed prior and φ, with its curvature if `laplace`."""
    energy = map_energy(density, prior, tasks, shared)
    with torch.no_grad():
        theta, info = prox(energy, prior.loc.expand(len(tasks), -1), minimiser=minimiser)
    stats = {
        "grad_norm": info.grad_norm,
        "iterations": info.iterations,
        "converged": info.converged,
    }
    if not laplace:
        return Delta(density, tasks.names, shared, theta, stats=stats)
    tril = laplace_scale(energy, theta, tasks.names)
    return Gaussian(density, tasks.names, shared, theta, tril, laplace=True, stats=stats)
