"""Estimators that look at where runs end, and not at how they got there.

A run that has mixed has forgotten its start, and the law of its ends is π ∝ exp(−E_i/τ). Then

    ∇E_π g = E_π ∂g − Cov_π(g, ∂E)/τ,

∂ being the derivative in θ0, scales and φ at a fixed θ. As τ → 0 within one basin this becomes the
implicit derivative of iMAML. In several, a share w_k of the mass lies at the minimum of basin k,
and the limit is Σ_k w_k [implicit_k + (g_k − ḡ) ∂log w_k] with log w_k = −E_k/τ − ½ log det ∇²E_k
up to a constant: the first term is iMAML's, averaged over the outcome; the second is what iMAML
leaves out, that θ0 also changes how often each minimum is found.

All three are biased, each in the way that its docstring states. None differentiates the run, so
that memory is flat in its length and none of them has a tail that grows with it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varmeta.checked import Positive
from varmeta.inference.chain import Chain, Loss
from varmeta.inference.descent import RandomDescent
from varmeta.inference.diagnostics import LOOSE
from varmeta.inference.estimators import Estimate, Estimator, others_mean
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.linear import CG, LinearSolver
from varmeta.inference.minimise import Minimiser
from varmeta.inference.partition import RADIUS, descend, partition
from varmeta.models.derivatives import twice_differentiable


class _Heated(Estimator):
    """What needs the temperature of the law that runs end in."""

    unbiased: ClassVar[bool] = False

    def check(self, algorithm: RandomDescent, particles: int, antithetic: bool) -> None:
        """Raise a ValueError if nothing is injected in the last step, or for too few particles."""
        if algorithm.temperatures[-1] == 0:
            raise ValueError(
                f"{self.name} needs the temperature of the law in which runs end, and the "
                "algorithm's is 0 in the last step: raise it, or use Pathwise() or "
                "ImplicitAtParticles()"
            )
        least = 4 if antithetic else 2
        if particles < least:
            raise ValueError(
                f"particles must be at least {least} for the leave-one-out baseline of "
                f"{self.name}{' with antithetic pairs' if antithetic else ''}, got {particles}"
            )


@dataclass(frozen=True)
class StationaryCovariance(_Heated):
    """∂g − (g − b) ∂E/τ at the ends, as if these were draws of π ∝ exp(−E/τ).

    b is the mean loss of the task's other particles, τ that of the last step, over 1 − μ with
    momentum μ, which heats the law by as much. Needs a temperature above 0 in the last step.

    Biased unless runs have mixed: of a run that stays in the basin where it began, it knows of the
    basin's place alone. Finite steps widen the law (see `RandomDescent`), and the covariance with
    it: by 1/(1 − step · curvature/2) on a quadratic, 1.07 by default. Random rows heat it
    further, by an amount that is not known. Its variance grows as 1/τ.

    Cost: a gradient evaluation a step and two at the end; no second derivatives.
    """

    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """See `Estimator.estimate`."""
        ends = chain.run()
        losses, _, direct = chain.outside(loss, ends)
        _, pull = anchored(chain, ends)
        centred = losses - others_mean(losses, chain.antithetic)
        each = direct - centred[..., None] * pull / heat(chain.algorithm)
        return Estimate(losses, each, ends, chain.antithetic)


@dataclass(frozen=True)
class ImplicitAtParticles(Estimator):
    """iMAML averaged over the outcome: ∂g − (∂∇E)ᵀ(∇²E)⁻¹∇g at each particle's minimum.

    Each particle is run down from its end to the minimum of its basin. This is the location part
    of the gradient alone, that of the minima found: biased wherever θ0 changes how often each is
    found, and by O(τ) where the spread around a minimum matters. Works without noise: with one
    minimum, or a single particle of a run that has converged, it is iMAML.

    The estimate's `losses` are those where the runs end, so that they compare with those of other
    estimators; the gradient is of g at the minima.

    Cost: a gradient evaluation a step, the descent, and one linear solve for each particle, all of
    them at once.

    Attributes:
        minimiser: of the descents; None for `GradientFlow`, see `find_basins`.
        solver: for the systems with ∇²E.
    """

    minimiser: Minimiser | None = None
    solver: LinearSolver = field(default_factory=CG)

    unbiased: ClassVar[bool] = False

    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """See `Estimator.estimate`."""
        ends = chain.run()
        losses, _, _ = chain.outside(loss, ends)
        minima = descend(chain, ends, self.minimiser).theta
        _, each = implicit(chain, loss, minima, self.solver)
        return Estimate(losses, each, ends, chain.antithetic)


@dataclass(frozen=True)
class BasinCorrected(_Heated):
    """Basin-corrected iMAML: Σ_k w_k [implicit_k + (g_k − ḡ) ∂log w_k] over the basins found.

    With `"occupation"` w_k is the share of the particles that ended in basin k, and ∂log w_k is
    −∂E_k/τ up to a constant: a particle's contribution is that of `StationaryCovariance` at its
    minimum, plus the implicit derivative there. With `"laplace"` w_k ∝ exp(−E_k/τ) |∇²E_k|^−½, and
    ∂log w_k has the change of the determinant too, the movement of the minimum included; how often
    each was found does not count, so that runs need not have mixed as long as they find every
    minimum that matters. Given the basins it then has no noise, and its standard error is the
    jackknife's over particles: how much hangs on basins that a single particle found.

    Both are limits for small τ, with an error of O(τ), and state the derivative of a stationary
    law; momentum counts as for `StationaryCovariance`. Needs a temperature above 0 in the last
    step.

    Cost: that of `ImplicitAtParticles`, but solves for basins only; `"laplace"` D Hessian-vector
    products and as many third derivatives for each basin.

    Attributes:
        weights: `"occupation"` or `"laplace"`.
        minimiser: of the descents; None for `GradientFlow`, see `find_basins`.
        solver: for the systems with ∇²E.
        radius: minima closer than this, in prior standard deviations, are one.

    Raises:
        ValueError: other weights; `"laplace"` with more than 200 coordinates.
    """

    weights: Literal["occupation", "laplace"] = "occupation"
    minimiser: Minimiser | None = None
    solver: LinearSolver = field(default_factory=CG)
    radius: Positive = RADIUS

    @property
    def name(self) -> str:
        """With the weights, unless they are the default."""
        return "BasinCorrected" + (", laplace" if self.weights == "laplace" else "")

    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """See `Estimator.estimate`."""
        if self.weights == "laplace" and chain.density.dim > MAX_DIM:
            raise ValueError(
                f"weights='laplace' needs the dense curvature, and θ has {chain.density.dim} "
                f"coordinates (limit {MAX_DIM}): use weights='occupation'"
            )
        ends = chain.run()
        losses, _, _ = chain.outside(loss, ends)
        descent = descend(chain, ends, self.minimiser)
        parts = partition(chain, descent, self.radius)
        place = parts.gather(descent.theta)
        at = alike(chain, len(place))
        g, moved = implicit(at, loss, place, self.solver)
        energy, pull = anchored(at, place)
        slope = -pull / heat(chain.algorithm)
        if self.weights == "occupation":
            value = parts.spread(g)
            centred = value - others_mean(value, chain.antithetic)
            each = parts.spread(moved) + centred[..., None] * parts.spread(slope)
        else:
            half, change = half_log_det(at, place)
            logits = (-energy / heat(chain.algorithm) - half).masked_fill(
                parts.first < 0, -torch.inf
            )
            each = _jackknife(logits, g, moved, slope - change, parts.labels)
        chain.gradients += at.gradients
        return Estimate(losses, each, ends, chain.antithetic)


# -- parts -----------------------------------------------------------------------------------------


def heat(algorithm: RandomDescent) -> float:
    """τ of the law exp(−E/τ) in which runs end: the last step's, over 1 − μ."""
    return algorithm.temperatures[-1] / (1 - algorithm.momentum)


def alike(chain: Chain, count: int) -> Chain:
    """The same chain for so many particles."""
    return Chain(chain.algorithm, chain.density, chain.point, chain.tasks, count, chain.seed)


def anchored(chain: Chain, theta: Tensor) -> tuple[Tensor, Tensor]:
    """E at θ `[S, T, D]`, `[S, T]` nats, and ∂E/∂x there, `[S, T, n]`."""
    with torch.enable_grad():
        x = chain.spread_out()
        value = _energy(chain, theta.detach(), x)
        (pull,) = torch.autograd.grad(value.sum(), x)
    chain.gradients += chain.particles
    return value.detach(), pull


def implicit(
    chain: Chain, loss: Loss, theta: Tensor, solver: LinearSolver
) -> tuple[Tensor, Tensor]:
    """g at minima `[S, T, D]`, `[S, T]`, and its derivative in x as they move, `[S, T, n]`.

    Warns:
        RuntimeWarning: solves that ended with a relative residual above a tenth.
    """
    losses, along, direct = chain.outside(loss, theta)
    slope, size = chain.slope(theta), theta.shape[:2]

    def system(v: Tensor) -> Tensor:
        return slope.pull(v.unflatten(0, size))[0].flatten(0, 1)

    solution = solver.solve(system, along.flatten(0, 1))
    loose = int((~(solution.residual <= LOOSE)).sum())
    if loose:
        warnings.warn(
            f"{loose} of {len(solution.residual)} implicit solves at the minima ended with a "
            "relative residual above a tenth: raise the solver's max_iterations, or see whether "
            "they are minima",
            RuntimeWarning,
            stacklevel=3,
        )
    return losses, direct - slope.pull(solution.x.unflatten(0, size))[1]


def half_log_det(chain: Chain, theta: Tensor) -> tuple[Tensor, Tensor]:
    """½ log det ∇²E at minima `[S, T, D]`, `[S, T]`, and its derivative in x, `[S, T, n]`.

    The derivative is that of the determinant at the minimum, which moves with x. Negative
    eigenvalues count by their size.
    """
    dim = theta.shape[-1]
    eye = torch.eye(dim, dtype=theta.dtype, device=theta.device)
    slope = chain.slope(theta)
    columns = [slope.pull(e.expand_as(theta))[0] for e in eye]
    dense = torch.stack(columns, dim=-1)
    values, vectors = torch.linalg.eigh(0.5 * (dense + dense.mT))
    inverse = (vectors / values[..., None, :]) @ vectors.mT
    along, total = torch.zeros_like(theta), theta.new_zeros(*theta.shape[:2], chain.point.size)
    with torch.enable_grad(), twice_differentiable():
        x, leaf = chain.spread_out(), theta.detach().requires_grad_()
        value = _energy(chain, leaf, x).sum()
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        for d, e in enumerate(eye):  # tr(A⁻¹ dA), a column of A at a time
            (column,) = torch.autograd.grad(grad, leaf, e.expand_as(leaf), create_graph=True)
            by_place, by_x = torch.autograd.grad(
                column, [leaf, x], 0.5 * inverse[..., d], retain_graph=True, materialize_grads=True
            )
            along, total = along + by_place, total + by_x
    chain.gradients += 4 * dim * chain.particles
    back = torch.einsum("stij,stj->sti", inverse, along)
    return 0.5 * values.abs().log().sum(-1), total - slope.pull(back)[1]


def _energy(chain: Chain, theta: Tensor, x: Tensor) -> Tensor:
    prior, shared = chain.point.moved(x)
    loss = chain.density.negative_log_likelihood(theta, chain.tasks, shared)
    return loss + prior.penalty(theta)


def _jackknife(logits: Tensor, g: Tensor, moved: Tensor, slope: Tensor, labels: Tensor) -> Tensor:
    """Σ_k w_k [moved_k + (g_k − ḡ) slope_k] as `[S, T, n]`, whose spread is the jackknife's.

    `logits` of w and g `[K, T]`; a particle's absence matters where its basin is its alone.
    """

    def result(weights: Tensor) -> Tensor:  # [O, K, T] to [O, T, n]
        centred = weights * (g - (weights * g).sum(1, keepdim=True))
        out: Tensor = torch.einsum("okt,ktn->otn", weights, moved)
        return out + torch.einsum("okt,ktn->otn", centred, slope)

    count, basins = len(labels), len(logits)
    whole = result(logits.softmax(0)[None])[0]
    lonely = torch.stack([(labels == k).sum(0) == 1 for k in range(basins)])
    if basins == 1 or not bool(lonely.any()):
        return whole.expand(count, *whole.shape)
    itself = torch.eye(basins, dtype=torch.bool, device=logits.device)[..., None]
    without = result(
        logits.expand(basins, *logits.shape).masked_fill(itself, -torch.inf).softmax(1)
    )
    left = torch.where(lonely[..., None], without, whole)
    each = left[labels, torch.arange(labels.shape[1], device=labels.device)]
    return whole + (count - 1) * (each.mean(0) - each)
