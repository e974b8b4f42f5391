"""The two trivial answers, as references: every task on its own, and all tasks as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from varmeta.checked import Count
from varmeta.inference.base import Batch, Meta, State, StepInfo, Strategy, check_finite
from varmeta.inference.joint import JointVariational
from varmeta.inference.laplace import laplace_scale
from varmeta.inference.minimise import Minimiser
from varmeta.inference.newton import NewtonCG
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Draws, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(frozen=True)
class NoPooling(JointVariational):
    """Every task on its own: the prior stays as the user wrote it, nothing is learned across tasks.

    Shared sites (`Density(shared=...)`) are shared by definition and still learned. This is
    `JointVariational` with θ0 and the scales held fixed.
    """

    learn_loc: bool = False
    learn_scale: bool | None = False

    @property
    def name(self) -> str:
        """`NoPooling`."""
        return "NoPooling"


@dataclass(frozen=True)
class CompletePooling(Strategy):
    """All tasks as one: a single θ for every task, seen or not.

    The mode of −Σ_i log p(y_i | θ, φ) − log p(θ) − log p(φ), with the user's own priors, and the
    Gaussian of its curvature there. `adapt` returns it for any task and learns nothing from it.

    Attributes:
        minimiser: for the one problem of D + P parameters.
        draws: posterior draws kept.
    """

    minimiser: Minimiser = field(default_factory=NewtonCG)
    draws: Count = 1000

    @property
    def num_steps(self) -> int:
        """1: the whole problem is solved in one step."""
        return 1

    def is_tested(self, state: State) -> bool:
        """By the minimiser's own tolerance."""
        return True

    def shortfall(self, state: State) -> str:
        """Why a run that has not arrived ended."""
        return "the minimiser did not reach its tolerance; raise its max_iterations"

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
        """All rows of the tasks; a stream has no end to pool over."""
        if isinstance(tasks, TaskSource):
            raise ValueError("CompletePooling needs Tasks, not an endless TaskSource")
        return tasks.unsplit

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """Nothing learned yet."""
        # Bounds are for scales that are learned; here Σ = 0, whatever they are.
        meta = Meta.start(density, replace(prior, bounds=None), learn_scale=False)
        total = density.dim + density.shared_dim
        empty = torch.zeros(self.draws, total, dtype=prior.loc.dtype, device=prior.loc.device)
        return State(meta, tensors={"draws": empty})

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """Solve it."""
        batch.require_all("CompletePooling")
        meta, dim = state.meta, density.dim
        units = torch.cat([meta.origin.scale, density.shared_scale])
        origin = torch.cat([meta.origin.loc, density.shared_init])

        def losses(u: Tensor) -> tuple[Tensor, Tensor]:  # [1, D + P], in units of the user's prior
            theta, shared = (origin + units * u[0]).split([dim, density.shared_dim])
            everywhere = theta.expand(len(batch.tasks), -1)
            fit = density.negative_log_likelihood(everywhere, batch.tasks, shared)
            return fit, meta.origin.penalty(theta) - density.shared_log_prior(shared)

        def energy(u: Tensor) -> Tensor:
            fit, rest = losses(u)
            return (fit.sum() + rest)[None]

        minimum = self.minimiser.minimise(energy, torch.zeros_like(origin)[None])
        with torch.no_grad():
            fit, rest = losses(minimum.theta)
        check_finite(fit, batch.tasks, state.step)
        tril = laplace_scale(energy, minimum.theta, ("all tasks",))[0]
        noise = torch.randn(
            *state.tensors["draws"].shape,
            generator=generator,
            dtype=units.dtype,
            device=units.device,
        )
        state.tensors["draws"] = origin + units * (minimum.theta[0] + noise @ tril.T)
        with torch.no_grad():
            meta.raw["loc"].copy_(minimum.theta[0, :dim])
            meta.raw["shared"].copy_(minimum.theta[0, dim:])
            meta.raw["log_scale"].fill_(-torch.inf)  # tasks do not differ: Σ = 0
        if minimum.converged is not None and bool(minimum.converged.all()):
            state.arrived = "the one problem is solved to its tolerance"
        loss = float(fit.sum() + rest) / len(batch.tasks)
        count = len(batch.tasks) * (minimum.gradients + 2 * len(origin))
        every = {"grad_norm": minimum.grad_norm}
        if minimum.converged is not None:
            every["converged"] = minimum.converged
        stats = {name: value.expand(len(batch.tasks)) for name, value in every.items()}
        return StepInfo(loss, count, stats)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """The same posterior for every task."""
        return self.unseen(density, state, tasks.names, generator)

    def unseen(
        self, density: Density, state: State, names: Sequence[str], generator: torch.Generator
    ) -> TaskPosterior:
        """The same posterior for every task."""
        theta, shared = state.tensors["draws"].split([density.dim, density.shared_dim], dim=-1)
        count = len(names)
        return Draws(
            density,
            tuple(names),
            shared[:, None].expand(-1, count, -1),
            theta[:, None].expand(-1, count, -1),
        )
