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

from varmeta.inference.base import Batch, State
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.laplace import MAX_DIM, laplace_scale
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import Minimiser
from varmeta.inference.modes import find_modes
from varmeta.inference.newton import NewtonCG
from varmeta.inference.prox import Adjoint, Implicit, ProxInfo, is_exact, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(frozen=True, kw_only=True)
class IMAML(MetaGradient):
    """iMAML: adapt by MAP, learn the prior from query losses through the implicit function.

    Attributes:
        minimiser: the inner algorithm.
        adjoint: how its result is differentiated.
        warm_start: start each training task where its last visit ended, not at θ0: a fixed inner
            budget gets much closer to the minimum, and a tolerance, which is relative to the
            gradient at the start, is met more tightly. Where a task has several minima it may stay
            in another one than a new task would find. Quasi-Newton steps always do, so that what
            they minimise has no jumps. Adapting always starts at θ0.
        posterior_kind: `"laplace"`, `"delta"`, or `"auto"`: Laplace up to 200 coordinates.

    The other attributes are those of `MetaGradient`.

    Example:
        >>> from varmeta.inference.linear import CG
        >>> from varmeta.inference.minimise import GradientDescent
        >>> paper = IMAML(
        ...     minimiser=GradientDescent(step_size=0.01, max_iterations=16, tolerance=0),
        ...     adjoint=Implicit(CG(max_iterations=5, tolerance=0)),
        ...     learn_scale=False,
        ... )
    """

    minimiser: Minimiser = field(default_factory=NewtonCG)
    adjoint: Adjoint = field(default_factory=Implicit)
    warm_start: bool = False
    posterior_kind: Literal["auto", "laplace", "delta"] = "auto"

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior; nothing visited yet."""
        state = super().init(density, prior, tasks, generator)
        if self.warm_start and isinstance(tasks, TaskSource):
            raise ValueError("warm_start needs tasks that come back, and a stream's do not")
        if self.warm_start or (self.optimiser == "quasi-newton" and self.finds_minima):
            assert isinstance(tasks, Tasks)
            state.tensors["minima"] = prior.loc.new_full((len(tasks), density.dim), float("nan"))
        return state

    @property
    def finds_minima(self) -> bool:
        """Whether θ* is a minimum, wherever the inner algorithm begins; no unrolled steps."""
        return isinstance(self.adjoint, Implicit)

    @property
    def is_smooth(self) -> bool:
        """With an exact adjoint."""
        return is_exact(self.minimiser, self.adjoint)

    def losses(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        start: Tensor | None = None,
    ) -> tuple[Tensor, ProxInfo]:
        """g_i(θ_i*) per task, nats: `[T]`, differentiable in the prior and φ; and how θ* went.

        `start` is where the inner algorithm begins, `[T, D]`; θ0 if None.
        """
        theta, info = self._adapted(density, prior, shared, tasks, start)
        return self.loss_at(density, prior, shared, tasks, theta), info

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, ProxInfo]:
        """See `losses`; begins where each task ended last, if that is kept."""
        prior, shared = state.meta.prior, state.meta.shared
        start = self.start_of(state, batch)
        theta, info = self._adapted(density, prior, shared, batch.tasks, start)
        return self.loss_at(density, prior, shared, batch.tasks, theta), info

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """θ_i* as a point, or with the inverse curvature there as covariance (Laplace)."""
        prior, shared = state.meta.fixed()
        laplace = self.posterior_kind == "laplace" or (
            self.posterior_kind == "auto" and density.dim <= MAX_DIM
        )
        return adapt_map(density, prior, shared, tasks, self.minimiser, laplace)

    def _adapted(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        start: Tensor | None,
    ) -> tuple[Tensor, ProxInfo]:
        energy = TaskEnergy(density, self.rows_inside(tasks), shared, prior)
        start = prior.loc.expand(len(tasks), -1) if start is None else start
        return prox(energy, start, minimiser=self.minimiser, adjoint=self.adjoint)


def adapt_map(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    minimiser: Minimiser,
    laplace: bool,
) -> TaskPosterior:
    """The MAP point of each task under a fixed prior and φ, with its curvature if `laplace`."""
    theta, info = find_modes(density, prior, shared, tasks, minimiser)
    stats = info.stats()
    if not laplace:
        return Delta(density, tasks.names, shared, theta, stats=stats)
    tril = laplace_scale(TaskEnergy(density, tasks, shared, prior), theta, tasks.names)
    return Gaussian(density, tasks.names, shared, theta, tril, laplace=True, stats=stats)
