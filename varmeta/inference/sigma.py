"""Modular shrinkage: which modules of a model adapt, learned as a prior scale for each.

θ_{m,i} ~ N(θ0_m, σ_m² I) for the coordinates of module m in task i. A task adapts by MAP, the
scales follow the loss on its query part: d g_i/d log σ_m² = σ_m⁻² (θ_m − θ0_m)ᵀ[(H + Λ)⁻¹∇g_i]_m
(Chen, Friesen, Behbahani, Doucet, Budden, Hoffman & de Freitas, 2019, Modular Meta-Learning with
Shrinkage). A module that need not adapt loses its scale and stays at θ0, however long a task
adapts. Learned from the loss of the very rows that were adapted to, all scales would go to 0 or be
biased: see `JointVariational`, which refuses it.

The modules are those of the prior: `GaussianPrior.from_density(density, scales="layer")`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from varmeta.checked import Within
from varmeta.inference.approximate import PriorDominated
from varmeta.inference.base import State, update
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.imaml import IMAML
from varmeta.inference.linear import CG
from varmeta.inference.minimise import Minimiser, ProximalDescent
from varmeta.inference.newton import NewtonCG
from varmeta.inference.prox import Adjoint, Implicit, ProxInfo, Unrolled, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior, penalty
from varmeta.tasks import Tasks, TaskSource


def _solver() -> CG:
    # The condition of H + Λ is the square of the ratio of the scales; in their units it is not.
    return CG(preconditioner=PriorDominated())


def _newton() -> NewtonCG:
    return NewtonCG(solver=replace(_solver(), max_iterations=50))


@dataclass(frozen=True, kw_only=True)
class SigmaIMAML(IMAML):
    """σ-iMAML: θ0 and the scale of every module by implicit gradients of the query loss.

    Attributes:
        minimiser: the inner algorithm, for as many steps as it likes: nothing is kept of them.
            (`ProximalDescent` where a descent is wanted: plain steps diverge where a scale has
            become small.)
        adjoint: how θ* is differentiated. `Implicit(CG(preconditioner=PriorDominated()))`, the
            default, is exact; `Implicit(BlockDiagonal())`, `Implicit(Diagonal())` and
            `Implicit(PriorDominated())` are cheaper.
        scale_adjoint: the same for the scales alone; None for `adjoint`.
        loc_from: θ0 follows the query loss, `"validation"`, or `"joint"`, Σ_i of the support's
            f_i(θ_i*) + ½‖θ_i* − θ0‖²_Λ, whose gradient needs no derivative of θ*: it is
            Λ(θ0 − θ_i*). The scales and φ follow the query loss in any case.

    The other attributes are those of `IMAML`.

    Raises:
        ValueError: no such loc_from.
    """

    minimiser: Minimiser = field(default_factory=_newton)
    adjoint: Adjoint = field(default_factory=lambda: Implicit(_solver()))
    scale_adjoint: Implicit | None = None
    loc_from: Literal["validation", "joint"] = "validation"

    @property
    def is_smooth(self) -> bool:
        """With one objective for all that is learned, and an exact adjoint of it."""
        exact = self.scale_adjoint is None and self.loc_from == "validation"
        return exact and super().is_smooth

    def loss_at(
        self, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
    ) -> Tensor:
        """g_i at θ; what θ0 has from the joint objective instead is added, with the value 0."""
        losses = super().loss_at(density, prior, shared, tasks, theta)
        if self.loc_from == "validation":
            return losses
        fixed = _scales_held(prior)
        pull = penalty(theta.detach(), fixed.loc, fixed.scale, fixed.factor)
        return losses + (pull - pull.detach())

    def _adapted(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        start: Tensor | None,
    ) -> tuple[Tensor, ProxInfo]:
        if self.loc_from == "joint":
            prior = _loc_held(prior)
        own = prior if self.scale_adjoint is None else _scales_held(prior)
        inside = self.rows_inside(tasks)
        energy = TaskEnergy(density, inside, shared, own)
        start = own.loc.expand(len(tasks), -1) if start is None else start
        theta, info = prox(energy, start, minimiser=self.minimiser, adjoint=self.adjoint)
        if self.scale_adjoint is not None and torch.is_grad_enabled():
            scales = TaskEnergy(density, inside, shared.detach(), _loc_held(prior))
            at = scales.linearise(theta)
            info.gradients += 1
            theta = theta + self.scale_adjoint.correction(scales, theta.detach(), at, info)
        return theta, info


@dataclass(frozen=True, kw_only=True)
class SigmaMAML(SigmaIMAML):
    """σ-MAML: the same through the unrolled steps of a descent, exact for the steps as run.

    Attributes:
        minimiser: a hundred steps of size 0.01; the size is in units of θ² per nat and wants
            tuning to the model.
        adjoint: how the steps are differentiated; every tenth θ is kept, the others computed again.
        scale_adjoint: None for the unrolled derivative of the scales too. An `Implicit` costs less
            and is right where the steps have converged, exactly or as its solver approximates.

    The other attributes are those of `SigmaIMAML`.
    """

    minimiser: Minimiser = field(default_factory=lambda: ProximalDescent(0.01, 100, tolerance=0))
    adjoint: Adjoint = field(default_factory=lambda: Unrolled(checkpoint=10))


@dataclass(frozen=True, kw_only=True)
class SigmaReptile(SigmaIMAML):
    """σ-Reptile: θ0 ← θ0 + ε · mean_i(θ_i* − θ0), and the scales by the implicit gradient.

    θ0's step is the gradient of the joint objective in units of Σ, so that without a prior's pull
    (scales without bound, a few steps) it is Reptile's. A θ0 that starts far away comes slowly
    where scales are small, since tasks hardly leave it then: give it time, or
    `SigmaIMAML(loc_from="joint")`, whose optimiser makes steps of its own length.

    Attributes:
        loc_rate: ε, falling to 0 on a cosine.
        learning_rate: of Adam on the log scales and φ.
        loc_from: `"joint"`.

    The other attributes are those of `SigmaIMAML`.

    Raises:
        ValueError: θ0 from the query loss; a loc_rate out of (0, 1].
    """

    loc_from: Literal["validation", "joint"] = "joint"
    loc_rate: Annotated[float, Within(0, 1, above=True)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loc_from != "joint":
            raise ValueError(
                "loc_from must be 'joint' for SigmaReptile; SigmaIMAML has the other one"
            )

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior."""
        state = super().init(density, prior, tasks, generator)
        raw = state.meta.raw
        state.optimisers = {"loc": torch.optim.SGD([raw["loc"]], lr=self.loc_rate)}
        rest = [t for t in state.meta.leaves() if t is not raw["loc"]]
        if rest:
            state.optimisers["meta"] = torch.optim.Adam(rest, lr=self.learning_rate)
        return state

    def apply(self, state: State, leaves: list[Tensor], grads: list[Tensor]) -> None:
        """θ0 by a step in units of Σ, the others by Adam."""
        loc, units = state.meta.raw["loc"], state.meta.origin.scale
        (pull,) = (g for t, g in zip(leaves, grads, strict=True) if t is loc)
        step = state.meta.fixed()[0].covariance_mv(pull / units) / units
        update(state.optimisers["loc"], [loc], [step], self.rate(state, self.loc_rate))
        rest = [(t, g) for t, g in zip(leaves, grads, strict=True) if t is not loc]
        if rest:
            tensors, slopes = zip(*rest, strict=True)
            rate = self.rate(state, self.learning_rate)
            update(state.optimisers["meta"], tensors, slopes, rate)


def _loc_held(prior: GaussianPrior) -> GaussianPrior:
    """The prior with its θ0 as a constant."""
    return prior.moved(prior.loc.detach(), prior.log_scale, prior.factor)


def _scales_held(prior: GaussianPrior) -> GaussianPrior:
    """The prior with its scales as constants."""
    factor = None if prior.factor is None else prior.factor.detach()
    return prior.moved(prior.loc, prior.log_scale.detach(), factor)
