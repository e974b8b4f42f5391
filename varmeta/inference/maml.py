"""Gradient-based baselines: adapt by a few steps from θ0, differentiated as they are.

MAML (Finn, Abbeel & Levine, 2017) minimises Σ_i g_i(θ_i^K), θ_i^K reached from θ0 by K gradient
steps on f_i, and differentiates through the steps. FOMAML takes the inner gradients as constants,
so that d θ_i^K/d θ0 = I. Meta-SGD (Li, Zhou, Chen & Li, 2017) learns a step size per coordinate
beside θ0. Reptile (Nichol, Achiam & Schulman, 2018) moves θ0 towards θ_i^K and needs no query part.

The steps are by the mean over a task's rows, as in the papers, so that their step sizes hold here
and a task with more rows takes no longer steps (`GradientDescent.reduction`); beyond the papers, no
step is longer than a standard deviation of the prior in any coordinate (`FirstOrder.clip`), so that
θ_i stays finite behind a log link and with a log scale. They are steps in θ as it is written: a
column in other units wants another step size, or `GradientDescent(in_prior_units=True)`.
ANIL (Raghu, Raghu, Bengio & Vinyals, 2020) is any of these on a model that adapts only some of its
sites: `Density(model, tasks, shared=[...])` names the others, which are then learned across tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from varmeta.checked import Count, Positive
from varmeta.inference.base import Batch, State, update
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import FirstOrder, GradientDescent
from varmeta.inference.prox import Detached, ProxInfo, Unrolled, is_exact, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


def _steps(size: float, count: int) -> FirstOrder:
    return GradientDescent(size, max_iterations=count, tolerance=0)


@dataclass(frozen=True, kw_only=True)
class MAML(MetaGradient):
    """MAML: a few unrolled gradient steps from θ0.

    Attributes:
        minimiser: the steps; their size is in units of θ² per nat and wants tuning to the model
            (0.01 and 5 of them: the paper's, and about the best on radon and sinusoids).
        with_prior: take the steps on f_i + ½(θ−θ0)ᵀΛ(θ−θ0) instead of f_i alone; the scales can
            be learned then.
        checkpoint: keep only every so many-th step for the way back (`Unrolled`).
        learn_scale: learn the scales of the prior; only with `with_prior`.

    The other attributes are those of `MetaGradient`.

    Raises:
        ValueError: learn_scale without with_prior.
    """

    learn_scale: bool = False
    minimiser: FirstOrder = field(default_factory=lambda: _steps(0.01, 5))
    with_prior: bool = False
    checkpoint: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_scale and not self.with_prior:
            raise ValueError(
                "learn_scale=True needs with_prior=True: without the prior in the inner steps the "
                "loss does not depend on its scales"
            )

    @property
    def adjoint(self) -> Unrolled:
        """How the steps are differentiated."""
        return Unrolled(checkpoint=self.checkpoint)

    @property
    def is_smooth(self) -> bool:
        """Where the steps are differentiated."""
        return is_exact(self.minimiser, self.adjoint)

    @property
    def kept_vectors(self) -> int:
        """See `MetaGradient.kept_vectors`: one more for each step, two where it may be cut."""
        each = 1 if self.minimiser.clip is None else 2
        return super().kept_vectors + each * self.minimiser.max_iterations

    def steps_of(self, state: State) -> FirstOrder:
        """The inner minimiser as it stands."""
        return self.minimiser

    def losses(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        minimiser: FirstOrder | None = None,
    ) -> tuple[Tensor, ProxInfo]:
        """g_i(θ_i^K) per task, nats: `[T]`, differentiable in the prior and φ; and how it went."""
        theta, info = prox(
            self._energy(density, self.rows_inside(tasks), shared, prior),
            prior.loc.expand(len(tasks), -1),
            minimiser=minimiser or self.minimiser,
            adjoint=self.adjoint,
        )
        return self.loss_at(density, prior, shared, tasks, theta), info

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, ProxInfo]:
        """See `losses`."""
        meta, minimiser = state.meta, self.steps_of(state)
        return self.losses(density, meta.prior, meta.shared, batch.tasks, minimiser)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """θ_i^K as a point: the same steps as in training, on all rows."""
        prior, shared = state.meta.fixed()
        energy = self._energy(density, tasks, shared, prior)
        start = prior.loc.expand(len(tasks), -1)
        with torch.no_grad():
            theta, info = prox(energy, start, minimiser=self.steps_of(state))
        return Delta(density, tasks.names, shared, theta, stats=info.stats())

    def _energy(
        self, density: Density, tasks: Tasks, shared: Tensor, prior: GaussianPrior
    ) -> TaskEnergy:
        """What the steps descend; the prior measures their length in any case."""
        inside = prior if self.with_prior else None
        return TaskEnergy(density, tasks, shared, inside, around=prior)


@dataclass(frozen=True, kw_only=True)
class FOMAML(MAML):
    """First-order MAML: the derivative of the inner steps is taken to be the identity."""

    @property
    def adjoint(self) -> Unrolled:
        """How the steps are differentiated: not at all."""
        return Unrolled(first_order=True)


@dataclass(frozen=True, kw_only=True)
class MetaSGD(MAML):
    """Meta-SGD: MAML that learns a step size for each coordinate.

    They start at the minimiser's and are learned as logarithms: positive, where the paper lets them
    change sign.
    """

    may_stay: ClassVar[bool] = True

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, φ and the log step sizes."""
        state = super().init(density, prior, tasks, generator)
        state.meta.raw["log_step"] = torch.zeros_like(prior.loc).requires_grad_()
        return self.with_optimisers(State(state.meta))

    def steps_of(self, state: State) -> FirstOrder:
        """The inner minimiser with the step sizes `[D]` as they stand."""
        sizes = self.minimiser.step_size * state.meta.raw["log_step"].exp()
        return replace(self.minimiser, step_size=sizes)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class Reptile(MAML):
    """Reptile: θ0 ← θ0 + ε · mean_i(θ_i^K − θ0), with ε falling to 0 on a cosine.

    The gradient of mean_i ½‖θ0 − θ_i^K‖² with θ_i^K held fixed, in units of the user's prior, less
    that prior's own pull; with the prior in the inner problem and run to convergence, that of the
    Moreau envelope (Dinh, Tran & Nguyen, 2020, pFedMe). φ follows mean_i f_i(θ_i^K). The scales
    are not learned, and a query part counts as more support.

    Attributes:
        learning_rate: ε.
        minimiser: more steps than MAML's by default: θ0 moves by what they moved.
        shared_learning_rate: of Adam on φ.
    """

    learning_rate: Positive = 0.5
    minimiser: FirstOrder = field(default_factory=lambda: _steps(0.003, 50))
    shared_learning_rate: Positive = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_scale:
            raise ValueError("learn_scale must be False: Reptile has no loss that sees the scales")

    @property
    def is_smooth(self) -> bool:
        """Never: θ0 and φ follow different objectives."""
        return False

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks | TaskSource:
        """All rows of each task as they are."""
        return tasks

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0 and φ at the user's prior."""
        state = super().init(density, prior, tasks, generator)
        raw = state.meta.raw
        state.optimisers["meta"] = torch.optim.SGD([raw["loc"]], lr=self.learning_rate)
        if density.shared_dim:
            state.optimisers["shared"] = torch.optim.Adam(
                [raw["shared"]], lr=self.shared_learning_rate
            )
        return state

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, ProxInfo]:
        """½‖(θ0 − θ_i^K)/s‖² + f_i(θ_i^K) per task, s the scales of the user's prior."""
        tasks, prior, shared = batch.tasks.unsplit, state.meta.prior, state.meta.shared
        theta, info = prox(
            self._energy(density, tasks, shared, prior),
            prior.loc.detach().expand(len(tasks), -1),
            minimiser=self.minimiser,
            adjoint=Detached(),
        )
        distance = (prior.loc - theta.detach()) / state.meta.origin.scale
        loss = TaskEnergy(density, tasks, shared).loss(theta.detach())
        return 0.5 * distance.square().sum(-1) + loss, info

    def apply(self, state: State, leaves: list[Tensor], grads: list[Tensor]) -> None:
        """One step of each optimiser on what is its own."""
        names = [n for n, t in state.meta.raw.items() if t.requires_grad]
        for name, grad in zip(names, grads, strict=True):
            optimiser, rate = ("meta", self.learning_rate)
            if name == "shared":
                optimiser, rate = ("shared", self.shared_learning_rate)
            leaf, step = state.meta.raw[name], self.rate(state, rate)
            update(state.optimisers[optimiser], [leaf], [grad], step)
