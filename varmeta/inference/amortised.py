"""Amortised variational meta-learning: the bound at where the inner algorithm leads.

Each task's q_i is a function of what is shared: θ_i* = argmin f_i(θ) + ½‖θ−θ0‖²_Λ, as a point or
with the inverse curvature there as covariance (Laplace), and what is shared is learned from

- point:   Σ_i ½‖θ_i*−θ0‖²_Λ + h_i(θ_i*);
- Laplace: Σ_i KL[N(θ_i*, A_i⁻¹) ‖ N(θ0, Σ)] + E h_i, A_i = ∇²f_i + Λ, with E h_i to second order:
  ½‖θ_i*−θ0‖²_Λ + h_i(θ_i*) + ½ log det A_i − ½ log det Λ + ½ tr((∇²h_i+Λ)A_i⁻¹) − D/2,

h the loss of all rows (h = f) or of the query rows (h = g). For h = f the point's gradient in θ0 is
Λ(θ0−θ*), by the envelope theorem, with no Hessian and no solve (that of the Moreau envelope: Dinh,
Tran & Nguyen, 2020, pFedMe), and the last two terms of the other cancel: it is Laplace's
approximation of −log p(D_i), as in LLAMA (Grant, Finn, Levine, Darrell & Griffiths, 2018, Recasting
Gradient-Based Meta-Learning as Hierarchical Bayes), there with a Kronecker-factored curvature.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from varmeta.inference.base import (
    Batch,
    Meta,
    State,
    StepInfo,
    gradients,
    no_scales_with_points,
)
from varmeta.inference.effects import integrated, require_bounded
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.imaml import adapt_map
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.learned import Evaluated
from varmeta.inference.linear import CG, LinearSolver
from varmeta.inference.logdet import LogDet, LogDetInfo
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import Minimiser
from varmeta.inference.newton import NewtonCG
from varmeta.inference.prox import Adjoint, Detached, Implicit, ProxInfo, is_exact, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(eq=False)
class BoundInfo:
    """How the modes and the curvature there went: `metagradient.Report`.

    Attributes:
        mode: of θ*.
        curvature: of the log-determinant; None for points.
    """

    mode: ProxInfo
    curvature: LogDetInfo | None = None

    @property
    def minimum(self) -> Tensor:
        """`[T, D]`, θ*."""
        return self.mode.minimum

    @property
    def gradients(self) -> int:
        """Gradient evaluations of each task's loss so far."""
        return self.mode.gradients + (self.curvature.gradients if self.curvature else 0)

    def stats(self) -> dict[str, Tensor]:
        """Those of the mode; `negative_curvature` and `residual` of both, `log_det_se` in nats."""
        out, seen = self.mode.stats(), self.curvature
        if seen is None:
            return out
        out["negative_curvature"] = out["negative_curvature"] | seen.indefinite
        if seen.residual is not None:
            out["residual"] = torch.maximum(out.get("residual", seen.residual), seen.residual)
        if seen.standard_error is not None:
            out["log_det_se"] = seen.standard_error
        return out


@dataclass(frozen=True, kw_only=True)
class AmortisedVariational(MetaGradient):
    """Learn the prior from a variational bound whose q_i the inner algorithm gives.

    Attributes:
        q: `"delta"`, the point θ_i*, or `"laplace"`, with A_i⁻¹ as covariance.
        outside: `"support"`, the bound on the rows that θ_i* was fitted to, which are all rows of a
            training task; or `"query"`: fitted to the support rows, evaluated on the query rows.
        gradient: `"envelope"`, with θ* held fixed, exact for points and `outside="support"` as far
            as the inner problem is solved, and the cheapest there is; `"implicit"`, through θ*;
            None for the envelope where it holds.
        minimiser: the inner algorithm.
        solver: for the implicit function.
        logdet: how the log-determinant of the curvature is found (`q="laplace"`).
        learn_scale: learn the prior's scales; None for "where it is well posed", that is with
            `q="laplace"`.

    The other attributes are those of `MetaGradient`; folds concern `outside="query"` alone.

    Raises:
        ValueError: scales to be learned with points, the envelope where it does not hold, or
            another q, outside or gradient.

    Example:
        >>> cheapest = AmortisedVariational()
        >>> cheapest.gradient, cheapest.learn_scale
        ('envelope', False)
    """

    q: Literal["delta", "laplace"] = "delta"
    outside: Literal["support", "query"] = "support"
    gradient: Literal["envelope", "implicit"] | None = None
    minimiser: Minimiser = field(default_factory=NewtonCG)
    solver: LinearSolver = field(default_factory=CG)
    logdet: LogDet = field(default_factory=LogDet)
    learn_scale: bool | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q == "delta" and self.learn_scale:
            raise ValueError(no_scales_with_points("q='laplace'"))
        stationary = self.q == "delta" and self.outside == "support"
        if self.gradient == "envelope" and not stationary:
            raise ValueError(
                "gradient='envelope' needs q='delta' and outside='support': any other bound is not "
                "stationary at θ*, and its gradient goes through θ*. Use gradient='implicit'"
            )
        # Frozen for everyone else: what None stands for is settled here once.
        if self.gradient is None:
            object.__setattr__(self, "gradient", "envelope" if stationary else "implicit")
        if self.learn_scale is None:
            object.__setattr__(self, "learn_scale", self.q == "laplace")

    @property
    def name(self) -> str:
        """`AmortisedVariational`, with Laplace and the query part if set."""
        parts = ["laplace"] if self.q == "laplace" else []
        parts += ["query"] if self.outside == "query" else []
        return "AmortisedVariational" + (f" ({', '.join(parts)})" if parts else "")

    @property
    def is_smooth(self) -> bool:
        """Without probes, and with the inner problem solved."""
        implicit = Implicit(self.solver)  # whose exactness the envelope needs of the minimum alone
        return self.logdet.probes is None and is_exact(self.minimiser, implicit)

    def settled(self, density: Density, *, whole: bool) -> Self:
        """See `MetaGradient.settled`; log-determinants of large models are found by probes."""
        dense = self.q == "delta" or self.logdet.is_dense(density.dim)
        return super().settled(density, whole=whole and dense)

    @property
    def adjoint(self) -> Adjoint:
        """How θ* is differentiated."""
        return Detached() if self.gradient == "envelope" else Implicit(self.solver)

    @property
    def kept_vectors(self) -> int:
        """See `MetaGradient.kept_vectors`: matrices, or the probes' Lanczos bases."""
        if self.q == "delta":
            return super().kept_vectors
        probes, dense = self.logdet.probes, 4 * MAX_DIM
        more = dense if probes is None else probes * (self.logdet.lanczos_steps + 20)
        return super().kept_vectors + more

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior."""
        state = super().init(density, prior, tasks, generator)
        if self.optimiser == "quasi-newton":
            assert isinstance(tasks, Tasks)
            state.tensors["minima"] = prior.loc.new_full((len(tasks), density.dim), float("nan"))
        return state

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks | TaskSource:
        """All rows for `outside="support"`; else with a query part, cross-validated if need be."""
        if self.outside == "query":
            return super().prepare(tasks, seed)
        return tasks.unsplit if isinstance(tasks, Tasks) else tasks

    def rows_inside(self, tasks: Tasks) -> Tasks:
        """All rows for `outside="support"`, else the support part."""
        return tasks.support if self.outside == "query" else tasks.unsplit

    def losses(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> tuple[Tensor, BoundInfo]:
        """The bound of each task, nats: `[T]`, differentiable in the prior and φ; and how it went.

        `generator` is of the log-determinant's probes, where there are any; seed 0 if None. `start`
        is where the inner algorithm begins, `[T, D]`; θ0 if None.
        """
        energy = TaskEnergy(density, self.rows_inside(tasks), shared, prior)
        start = prior.loc.expand(len(tasks), -1) if start is None else start
        theta, info = prox(energy, start, minimiser=self.minimiser, adjoint=self.adjoint)
        info.gradients += 2
        loss, curvature = self._bound(density, prior, shared, tasks, theta, generator)
        return loss, BoundInfo(info, curvature)

    def loss_at(
        self, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
    ) -> Tensor:
        """The bound of each task whose mode is θ `[T, D]`, nats: `[T]`."""
        return self._bound(density, prior, shared, tasks, theta)[0]

    def _bound(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        theta: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, LogDetInfo | None]:
        query = tasks.query if self.outside == "query" else None
        inside = self.rows_inside(tasks)
        outer = inside if query is None else query
        loss = TaskEnergy(density, outer, shared, prior).loss(theta)
        if self.q == "delta":
            return loss, None
        volume, curvature = self.logdet.terms(
            density, prior, shared, inside, theta, query=query, generator=generator
        )
        return loss + volume, curvature

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, BoundInfo]:
        """See `losses`."""
        meta = state.meta
        start = self.start_of(state, batch)
        return self.losses(density, meta.prior, meta.shared, batch.tasks, generator, start)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """θ_i* as a point, or with A_i⁻¹ as covariance: Laplace, up to 200 coordinates."""
        prior, shared = state.meta.fixed()
        laplace = self.q == "laplace" and density.dim <= MAX_DIM
        return adapt_map(density, prior, shared, tasks, self.minimiser, laplace)


@dataclass(frozen=True, kw_only=True)
class LaplaceEvidence(AmortisedVariational):
    """Type-II maximum likelihood: θ0, the scales and φ from Laplace's Σ_i −log p(D_i).

    Exact empirical Bayes where the model is linear-Gaussian. This is `AmortisedVariational` with
    Laplace's q on all rows of each training task.

    A shared latent whose prior has a learned spread (crossed effects: shared `tau`, and a shared
    vector `item ~ Normal(0, tau)`) is integrated out together with all θ_i, see
    `varmeta.inference.effects`: `tau` is then learned as the scales of Σ are. Posteriors of tasks
    are given the vector's mode, as they are given all of φ. That takes all tasks in every step, and
    memory and time as T · D · M + M² and M³ of its M entries.
    """

    q: Literal["delta", "laplace"] = field(default="laplace", init=False)
    outside: Literal["support", "query"] = field(default="support", init=False)
    gradient: Literal["envelope", "implicit"] | None = field(default="implicit", init=False)

    @property
    def name(self) -> str:
        """`LaplaceEvidence`."""
        return "LaplaceEvidence"

    def check_shared(self, density: Density) -> None:
        """Shared effects are integrated out, of a model with few coordinates.

        Raises:
            ValueError: shared effects, and more than 200 coordinates or probes.
        """
        if len(density.effects) and not self.logdet.is_dense(density.dim):
            raise ValueError(
                "shared effects are integrated out with the whole curvature of each task: wanted "
                f"at most {MAX_DIM} coordinates and logdet without probes, got {density.dim}"
            )

    def settled(self, density: Density, *, whole: bool) -> Self:
        """See `AmortisedVariational.settled`.

        Raises:
            ValueError: shared effects, and steps that do not see all tasks.
        """
        if len(density.effects) and not whole:
            raise ValueError(
                "shared effects are integrated out over all tasks together; leave batch_size unset"
            )
        return super().settled(density, whole=whole)

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior; the modes of θ and of shared effects unknown."""
        state = super().init(density, prior, tasks, generator)
        if len(density.effects):
            assert isinstance(tasks, Tasks)
            require_bounded(density, tasks)
            meta = Meta.start(density, prior, learn_scale=bool(self.learn_scale), integrate=True)
            state = self.with_optimisers(State(meta))
            state.tensors["minima"] = prior.loc.new_full((len(tasks), density.dim), float("nan"))
            state.tensors["effects"] = meta.raw["effects"].clone()
        return state

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """See `MetaGradient.step`; shared effects go to where they were found."""
        info = super().step(density, state, batch, generator)
        if "effects" in state.tensors:
            state.meta.raw["effects"].copy_(state.tensors["effects"])
        return info

    def evaluate(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> Evaluated:
        """See `MetaGradient.evaluate`."""
        if "effects" not in state.tensors:
            return super().evaluate(density, state, batch, generator)
        meta, tasks = state.meta, self.rows_inside(batch.tasks)
        meta.raw["effects"].copy_(state.tensors["effects"])
        start = self.start_of(state, batch)
        assert start is not None
        prior, shared = meta.prior, meta.shared
        found = integrated(density, prior, shared, tasks, start, self.minimiser, state.step)
        total = (found.value - prior.hyper_log_prob()) / batch.total
        grads = gradients(total, meta.leaves(), state.step)
        mode = found.effects - density.shared_init[density.effects]
        keep = {"minima": found.theta, "effects": mode / density.shared_scale[density.effects]}
        info = StepInfo(
            float(total.detach()), len(tasks) * found.info.gradients, found.info.stats()
        )
        return Evaluated(info, list(grads), keep)


def laplace_evidence(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    theta: Tensor,
    *,
    logdet: LogDet | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log p(D_i | θ0, Σ, φ) of each task by Laplace's approximation, nats: `[T]`.

    −f_i(θ_i) − ½‖θ_i−θ0‖²_Λ − ½ log det(∇²f_i + Λ) + ½ log det Λ; exact for linear-Gaussian models.
    A warning names tasks whose curvature is not positive definite: θ_i is no mode there, and the
    value that of |∇²f_i + Λ|.

    Args:
        density: the model.
        prior: N(θ0, Σ).
        shared: φ `[P]`.
        tasks: T tasks; all of their rows count.
        theta: `[T, D]`, the modes: for example the mean of what a Laplace strategy adapts to.
        logdet: how the determinant is found; exactly up to 200 coordinates, with probes above.
        generator: of the probes; seed 0 if None.
    """
    energy = TaskEnergy(density, tasks, shared, prior)
    volume, info = (logdet or LogDet()).terms(
        density, prior, shared, tasks, theta, generator=generator
    )
    bad = info.indefinite.nonzero()[:, 0].tolist()
    if bad:
        shown = ", ".join(tasks.names[i] for i in bad[:5])
        warnings.warn(
            f"the curvature is not positive definite at theta of {len(bad)} task(s) ({shown}), "
            "which is no mode: the evidence there is that of its absolute value",
            RuntimeWarning,
            stacklevel=2,
        )
    return -energy.loss(theta) - volume
