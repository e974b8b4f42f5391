"""Shared effects integrated out: the evidence where a shared vector has a spread of its own.

Crossed effects (students × lecturers): one factor are the tasks, with their θ_i, the other is a
shared vector u `[M]` whose prior p(u | ρ) has a learned spread. As a point u would take that spread
to 0, so u is integrated out along with every θ_i, by Laplace's approximation at their joint mode:

    −log p(y | θ0, Σ, ρ) = E + ½ Σ_i log det A_i − ½ T log det Λ + ½ log det S − ½ M log 2π,
    E = Σ_i f_i(θ_i, u, ρ) + Σ_i ½‖θ_i−θ0‖²_Λ − log p(u | ρ),
    A_i = ∂²E/∂θ_i²,  B_i = ∂²E/∂θ_i∂u,  S = ∂²E/∂u² − Σ_i B_iᵀ A_i⁻¹ B_i

(S is the Schur complement of the tasks in E's Hessian, whose determinant is det S · Π det A_i).
Exact where the model is linear-Gaussian, what lme4's maximum likelihood maximises there, and
elsewhere its and TMB's approximation (Kristensen, Nielsen, Berg, Skaug & Bell, 2016, TMB: Automatic
Differentiation and Laplace Approximation). With C = S⁻¹ and W_i = −A_i⁻¹B_i its derivative is

    ½ tr(C dS) = ½ Σ_i [tr(W_i C W_iᵀ dA_i) + 2 tr((W_i C)ᵀ dB_i)] + ½ tr(C d ∂²E/∂u²),

2D + 1 passes over the data where a row hears one entry of u (∂²E/∂u² is diagonal: crossed effects).
Where it hears several, a pass more for each entry but those of the largest vector, if a row hears
one of these. The mode moves along by the implicit function theorem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varmeta.inference.base import NonFiniteLoss, check_finite
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.logdet import LogDet
from varmeta.inference.minimise import Minimiser
from varmeta.inference.prox import Detached, ProxInfo, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

MOST_NUMBERS = 200_000_000  # in B `[T, D, M]` and S `[M, M]`: 1.6 GB each in double precision
MOST_PASSES = 300  # entries of u that may be heard beside another one
_STEPS, _HALVINGS = 50, 20
_ARRIVED = 1e-12  # nats that a Newton step of u would gain


@dataclass(frozen=True, eq=False)
class Curvature:
    """E's Hessian at a point, in blocks.

    Attributes:
        root: `[T, D, D]`, lower triangular L with L Lᵀ = A_i.
        cross: B, `[T, D, M]`.
        inverse: C = S⁻¹, `[M, M]`.
        log_det: log det S, nats.
        few: `[K]`, the entries of u beside which ∂²E/∂u² is diagonal.
    """

    root: Tensor
    cross: Tensor
    inverse: Tensor
    log_det: Tensor
    few: Tensor

    @property
    def moves(self) -> Tensor:
        """W `[T, D, M]`: how the mode of θ_i follows u."""
        return -torch.cholesky_solve(self.cross, self.root)


@dataclass(frozen=True, eq=False)
class Integrated:
    """The evidence of all tasks together, and where its mode is.

    Attributes:
        value: −log p(y, ρ | θ0, Σ), nats, with the priors of all of φ; differentiable once in the
            prior and in φ but u.
        losses: `[T]`, each task's part of it without what concerns u alone, detached.
        theta: `[T, D]`, the mode.
        effects: u `[M]`, the mode.
        info: of the tasks' inner problems.
    """

    value: Tensor
    losses: Tensor
    theta: Tensor
    effects: Tensor
    info: ProxInfo


def require_bounded(density: Density, tasks: Tasks) -> None:
    """Raise a ValueError where the matrices would not fit."""
    count, most = len(density.effects), MOST_NUMBERS
    numbers = max(len(tasks) * density.dim * count, len(tasks) * density.shared_dim, count**2)
    if numbers > most:
        raise ValueError(
            f"integrating over the {count} shared effects takes matrices of {numbers:.1e} numbers "
            f"({len(tasks)} tasks × {density.dim} coordinates × {count}), wanted at most {most:.0e}"
            ": take the factor with the fewer levels as the shared one, or use PyroSVI"
        )


def integrated(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    start: Tensor,
    minimiser: Minimiser,
    step: int = 0,
) -> Integrated:
    """Laplace's −log p(y, ρ | θ0, Σ) with every θ_i and u = φ[density.effects] integrated out.

    Args:
        density: the model.
        prior: N(θ0, Σ).
        shared: φ `[P]`; u is where the search for the mode begins.
        tasks: T tasks, all of whose rows count.
        start: `[T, D]`, where the search for θ begins.
        minimiser: of each θ_i given u.
        step: for error messages.

    Raises:
        NonFiniteLoss: no finite value there.
        ValueError: rows that hear several entries of a large u.
    """
    fixed = _Energy(density, tasks, density.effects)
    with torch.no_grad():
        still = prior.moved(prior.loc.detach(), prior.log_scale.detach(), _detached(prior.factor))
    theta, phi, at, info = _mode(fixed, still, shared.detach(), start, minimiser, step)
    leaves = _Leaves.of(prior, phi)
    with torch.enable_grad():
        losses = TaskEnergy(density, tasks, leaves.shared, leaves.prior).loss(theta)
        rest = fixed.of_priors(leaves.shared)
        # What has the mode's own derivatives: the volumes.
        point = theta.clone().requires_grad_()
        volume, bent = LogDet().terms(density, leaves.prior, leaves.shared, tasks, point)
        turned = fixed.curving(leaves.prior, leaves.shared, point, at)
        third = _plain_grad(volume.sum() + turned, [point, *leaves.tensors])
        way = _way_back(at, third[0], third[1][density.effects])
        slopes = fixed.slope_along(leaves.prior, leaves.shared, theta, *way)
        implicit = _plain_grad(slopes, leaves.tensors)
        first = _plain_grad(losses.sum() + rest, leaves.tensors)
    grads = [a + b - c for a, b, c in zip(first, third[1:], implicit, strict=True)]
    grads[0][density.effects] = 0.0  # it is at its mode, whatever it is told
    count = len(density.effects)
    own = rest.detach() + 0.5 * at.log_det - 0.5 * count * math.log(2 * math.pi)
    each = (losses + volume).detach()
    check_finite(each, tasks, step)
    value = each.sum() + own
    if not bool(value.isfinite()):
        raise NonFiniteLoss(f"step {step}: the evidence of the shared effects is not finite")
    moving = [shared, prior.loc, prior.log_scale, prior.factor]
    for tensor, grad in zip([t for t in moving if t is not None], grads, strict=True):
        value = value + (grad * (tensor - tensor.detach())).sum()
    info.gradients += bent.gradients + 8 * density.dim + 12
    return Integrated(value, each, theta, phi[density.effects], info)


@dataclass(frozen=True, eq=False)
class _Leaves:
    """Prior and φ as leaves of a graph of their own."""

    prior: GaussianPrior
    shared: Tensor

    @classmethod
    def of(cls, prior: GaussianPrior, shared: Tensor) -> _Leaves:
        loc, log_scale = (t.detach().requires_grad_() for t in (prior.loc, prior.log_scale))
        factor = None if prior.factor is None else prior.factor.detach().requires_grad_()
        return cls(prior.moved(loc, log_scale, factor), shared.detach().requires_grad_())

    @property
    def tensors(self) -> list[Tensor]:
        """φ, θ0, the log scales and the low-rank factor if there is one."""
        prior = self.prior
        out = [self.shared, prior.loc, prior.log_scale]
        return out if prior.factor is None else [*out, prior.factor]


@dataclass(frozen=True, eq=False)
class _Energy:
    """Derivatives of the whole, Σ_i f_i(θ_i, φ) − log p(φ)."""

    density: Density
    tasks: Tasks
    effects: Tensor

    def of_priors(self, shared: Tensor) -> Tensor:
        """−log p(φ), nats: a density of u's unconstrained values, and of the others' own."""
        density, total = self.density, -self.density.shared_log_prior(shared)
        sizes = [site.size for site in density.shared_sites]
        for site, flat in zip(density.shared_sites, shared.split(sizes), strict=True):
            if site.depends == "spread":
                there = flat.reshape(site.unconstrained_shape)
                jacobian = site.transform.log_abs_det_jacobian(there, site.constrain(flat))
                total = total - jacobian.sum()
        return total

    def slopes(self, theta: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """θ, a copy of φ for each task `[T, P]`, Σ f_i's derivatives in both, with a graph."""
        each = shared.expand(len(theta), -1)
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        each = each if each.requires_grad else each.clone().requires_grad_()
        loss = self.density.negative_log_likelihood(theta, self.tasks, each).sum()
        of_theta, of_each = _grad(loss, [theta, each])
        return theta, each, of_theta, of_each

    def whole_slope(self, theta: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """φ `[P]`, one for all tasks, and the derivative of the whole in it, with a graph."""
        shared = shared if shared.requires_grad else shared.detach().requires_grad_()
        losses = self.density.negative_log_likelihood(theta, self.tasks, shared)
        return shared, _grad(losses.sum() + self.of_priors(shared), [shared])[0]

    def at(self, prior: GaussianPrior, theta: Tensor, shared: Tensor) -> tuple[Tensor, Curvature]:
        """E's derivative in u `[M]`, and its Hessian."""
        u = self.effects
        with torch.enable_grad():
            theta, each, of_theta, _ = self.slopes(theta.detach(), shared.detach())
            rows = [_grad(of_theta[:, d].sum(), [theta, each]) for d in range(theta.shape[-1])]
            leaf, slope = self.whole_slope(theta.detach(), shared.detach())
            own, few = self._of_effects(leaf, slope[u])
        curve = torch.stack([row[0].detach() for row in rows], 1) + prior.precision()
        cross = torch.stack([row[1].detach()[:, u] for row in rows], 1)
        root, bad = torch.linalg.cholesky_ex(0.5 * (curve + curve.mT))
        white = torch.linalg.solve_triangular(root, cross, upper=False).flatten(0, 1)
        schur = own - white.mT @ white
        factor, worse = torch.linalg.cholesky_ex(0.5 * (schur + schur.mT))
        if bool(bad.any()) or int(worse):
            raise NonFiniteLoss(
                "the curvature is not positive definite at the mode of the tasks and the shared "
                "effects; tighten the model's priors"
            )
        log_det = 2 * factor.diagonal().log().sum()
        return slope[u].detach(), Curvature(
            root, cross, torch.cholesky_inverse(factor), log_det, few
        )

    def _of_effects(self, leaf: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """∂²E/∂u² `[M, M]`, and the entries of u beside which it is diagonal."""
        like: Any = {"dtype": leaf.dtype, "device": leaf.device}
        random = torch.randn(len(slope), generator=generator(0, device=leaf.device), **like)

        def product(v: Tensor) -> Tensor:
            return _grad((slope * v).sum(), [leaf])[0].detach()[self.effects]

        for few in self._candidates():
            many = torch.ones_like(random).index_fill(0, few, 0.0)
            diagonal = many * product(many)
            off = many * product(many * random) - random * diagonal
            if float(off.norm()) <= torch.finfo(off.dtype).eps ** 0.5 * float(diagonal.norm()):
                own = diagonal.diag()
                for k in few:
                    own[k] = own[:, k] = product(torch.zeros_like(random).index_fill(0, k, 1.0))
                return own, few
        raise ValueError(
            f"a row hears several of the {len(slope)} shared effects, or their prior is not one of "
            f"independent entries; beside one vector of which a row hears one entry, up to "
            f"{MOST_PASSES} such entries are integrated over. Use PyroSVI"
        )

    def _candidates(self) -> list[Tensor]:
        """Which entries of u may be heard beside another one: none, all but a vector, or all."""
        sites = [s.size for s in self.density.shared_sites if s.depends == "spread"]
        places = torch.arange(sum(sites), device=self.effects.device)
        parts = places.split(sites)
        largest = max(range(len(parts)), key=lambda k: sites[k])
        rest = [part for k, part in enumerate(parts) if k != largest]
        choices = [places[:0], torch.cat([places[:0], *rest]), places]
        return [few for few in choices if len(few) <= MOST_PASSES]

    def curving(self, prior: GaussianPrior, shared: Tensor, theta: Tensor, at: Curvature) -> Tensor:
        """½ tr(C S), C and W held fixed: of no use but for its derivative, that of ½ log det S."""
        u, inverse, moves = self.effects, at.inverse, at.moves
        along = moves @ inverse  # W C, [T, D, M]
        around = along @ moves.mT  # W C Wᵀ, [T, D, D]
        theta, each, of_theta, _ = self.slopes(theta, shared)
        total = (around.sum(0) * prior.precision()).sum()
        for d in range(theta.shape[-1]):
            own, cross = _grad(of_theta[:, d].sum(), [theta, each])
            total = total + (around[:, d] * own).sum() + 2 * (along[:, d] * cross[:, u]).sum()
        leaf, slope = self.whole_slope(theta, shared)
        many = torch.ones_like(inverse[0]).index_fill(0, at.few, 0.0)
        (own,) = _grad((slope[u] * many).sum(), [leaf])
        total = total + (many * inverse.diagonal() * own[u]).sum()
        for k in at.few:  # its row and its column, what two of the few share once
            (own,) = _grad(slope[u[k]], [leaf])
            total = total + ((1 + many) * inverse[k] * own[u]).sum()
        return 0.5 * total

    def slope_along(
        self, prior: GaussianPrior, shared: Tensor, theta: Tensor, way: Tensor, effects: Tensor
    ) -> Tensor:
        """∂E/∂(θ, u) times a direction `[T, D]`, `[M]`, differentiable in prior and φ."""
        theta = theta.detach().requires_grad_()
        losses = self.density.negative_log_likelihood(theta, self.tasks, shared)
        whole = losses.sum() + prior.penalty(theta).sum() + self.of_priors(shared)
        of_theta, of_shared = _grad(whole, [theta, shared])
        return (way * of_theta).sum() + (effects * of_shared[self.effects]).sum()


def _mode(
    energy: _Energy,
    prior: GaussianPrior,
    shared: Tensor,
    start: Tensor,
    minimiser: Minimiser,
    step: int,
) -> tuple[Tensor, Tensor, Curvature, ProxInfo]:
    """θ, φ with u at E's mode, and the curvature there: Newton steps of u, halved if need be."""
    u, spent = energy.effects, 0

    def solved(shared: Tensor, theta: Tensor) -> tuple[Tensor, ProxInfo, float]:
        task = TaskEnergy(energy.density, energy.tasks, shared, prior)
        with torch.no_grad():
            theta, info = prox(task, theta, minimiser=minimiser, adjoint=Detached())
            losses = task.value_and_gradient(theta)[0]
            return theta, info, float(losses.sum() + energy.of_priors(shared))

    theta, info, value = solved(shared, start)
    if not math.isfinite(value):
        task = TaskEnergy(energy.density, energy.tasks, shared, prior)
        check_finite(task.value_and_gradient(theta)[0], energy.tasks, step)
    for _ in range(_STEPS):
        spent += info.gradients + 2 * theta.shape[-1] + 6
        slope, at = energy.at(prior, theta, shared)
        move = -at.inverse @ slope
        gain = -0.5 * float(slope @ move)
        if not math.isfinite(gain):
            raise NonFiniteLoss(f"step {step}: the gradient in the shared effects is not finite")
        if gain <= _ARRIVED * (1 + abs(value)):
            break
        for halved in range(_HALVINGS):
            length = 0.5**halved
            there = shared.clone()
            there[u] += length * move
            ahead = theta + length * (at.moves @ move)
            trial = solved(there, ahead)
            if trial[2] <= value - 1e-4 * length * gain:
                break
        else:  # nothing is gained but rounding
            break
        shared, (theta, info, value) = there, trial
    info.gradients = spent
    return theta, shared, at, info


def _way_back(at: Curvature, of_theta: Tensor, of_effects: Tensor) -> tuple[Tensor, Tensor]:
    """E's inverse Hessian times (`[T, D]`, `[M]`)."""
    inner = torch.cholesky_solve(of_theta[..., None], at.root)[..., 0]
    effects = at.inverse @ (of_effects - torch.einsum("tdm,td->m", at.cross, inner))
    return inner + at.moves @ effects, effects


def _plain_grad(of: Tensor, at: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(of, at, materialize_grads=True))


def _grad(of: Tensor, at: list[Tensor]) -> list[Tensor]:
    if not of.requires_grad:
        return [torch.zeros_like(t) for t in at]
    return list(torch.autograd.grad(of, at, create_graph=True, materialize_grads=True))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
