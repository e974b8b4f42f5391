"""Each task's best Gaussian q_i with a full covariance, by natural-gradient steps.

F_i(q) = KL[q ‖ N(θ0, Σ)] + E_q f_i over q = N(m, LLᵀ), E_q by a fixed rule of points z_s and
weights w_s with Σ w z = 0 and Σ w zzᵀ = I, so that quadratic f_i are averaged exactly. With
g_s = ∇f(m + Lz_s) the gradients are ∇_m F = Σ w g + Λ(m − θ0) and, in L, tril(Σ w g zᵀ + ΛL − L⁻ᵀ):
by Stein's identity the mean of the Hessian without a Hessian. A step sets the precision to what
makes the second vanish, q⁻¹ ← L⁻ᵀ W L⁻¹ with W = LᵀΛL + Σ w (Lᵀg)zᵀ (its lower triangle,
mirrored), and the mean by a Newton step with it: Newton's method averaged over q (Opper &
Archambeau, 2009, The Variational Gaussian Approximation Revisited; Khan & Rue, 2023, The Bayesian
Learning Rule, section 4.2), exact in one step for linear-Gaussian tasks. A step is halved until F_i
does not rise. Where ten steps are not enough, as in tasks of few rows under a wide prior, L-BFGS
goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from varmeta.inference.base import NonFiniteLoss, check_finite, non_finite_gradient
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.families import GaussianQ
from varmeta.inference.free_energy import free_energy
from varmeta.inference.laplace import laplace_scale
from varmeta.inference.lbfgs import LBFGS
from varmeta.inference.modes import find_modes
from varmeta.inference.newton import NewtonCG
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

MAX_DIM = 40  # coordinates up to which full covariances are the default
_PRODUCT = {1: 11, 2: 4}  # Gauss-Hermite points a dimension, where their product is small
_MOST_NATURAL, _MOST_BFGS = 10, 200
_HALVINGS = 12
# Of a step's change of precision in a direction: widths grow threefold at most, and shrink a
# hundredfold, since where points overflow almost the curvature there says nothing of elsewhere.
_LEAST, _MOST = 0.1, 1e4
_ROUNDS = 3  # of L-BFGS, each in the units of the q where the one before ended


@dataclass(frozen=True, eq=False)
class Rule:
    """Points `[S, K]` and weights `[S]` that average over N(0, I); degree 3 at least."""

    points: Tensor
    weights: Tensor


def quadrature(dim: int, like: Tensor) -> Rule:
    """A rule without noise for E under N(0, I) in `dim` dimensions, in the data type of `like`.

    One dimension: 11 Gauss-Hermite points (degree 21); two: 4 × 4 (degree 7); more: max(32, 4 dim)
    antithetic Sobol points, turned so that their second moments are exact (degree 3, and close to
    the law beyond).
    """
    to: Any = {"dtype": like.dtype, "device": like.device}
    if dim in _PRODUCT:
        nodes, weights = np.polynomial.hermite_e.hermegauss(_PRODUCT[dim])
        weights = weights / weights.sum()
        grid = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), -1).reshape(-1, dim)
        each = np.stack(np.meshgrid(*[weights] * dim, indexing="ij"), -1).prod(-1).reshape(-1)
        return Rule(torch.as_tensor(grid, **to), torch.as_tensor(each, **to))
    half = max(16, 2 * dim)
    uniform = SobolEngine(dim, scramble=True, seed=0).draw(half, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    second = torch.linalg.cholesky(normal.T @ normal / half)
    normal = torch.linalg.solve_triangular(second, normal.T, upper=False).T
    points = torch.cat([normal, -normal])
    return Rule(points.to(**to), torch.full((2 * half,), 0.5 / half, **to))


@dataclass(frozen=True, eq=False)
class Solved:
    """Each task's best q.

    Attributes:
        mean: `[T, D]`.
        tril: `[T, D, D]`, L.
        slope: `[T]`, size of the gradient of F in units in which q is N(0, I).
        converged: `[T]` bool.
        iterations: `[T]` int.
        gradients: gradient evaluations of each task's loss.
    """

    mean: Tensor
    tril: Tensor
    slope: Tensor
    converged: Tensor
    iterations: Tensor
    gradients: int

    @property
    def q(self) -> GaussianQ:
        """As a family's member."""
        return GaussianQ(self.mean, factor=self.tril)

    def stats(self) -> dict[str, Tensor]:
        """Diagnostics per task, `[T]` each."""
        return {"grad_norm": self.slope, "iterations": self.iterations, "converged": self.converged}


def laplace_start(
    density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, step: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Mean, L and gradient evaluations of Laplace's q, found from θ0: where steps can begin.

    Raises:
        NonFiniteLoss: a task's loss, or its curvature, is not finite there; `step` is named.
    """
    energy = TaskEnergy(density, tasks, shared, prior)
    value, grad = energy.value_and_gradient(prior.loc.expand(len(tasks), -1))
    check_finite(value, tasks, step)
    if not bool(grad.isfinite().all()):
        raise NonFiniteLoss(non_finite_gradient(step))
    theta, info = find_modes(density, prior, shared, tasks, NewtonCG())
    tril = laplace_scale(energy, theta, None)
    return theta, tril, info.gradients + 1 + 2 * prior.dim


def solve(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    mean: Tensor,
    tril: Tensor,
    rule: Rule,
    tolerance: float | None = None,
) -> Solved:
    """The q_i that minimise F_i, from `mean` `[T, D]` and `tril` `[T, D, D]`; no gradients kept.

    A task stops where its slope is below `tolerance`; None for 1e-6 in float64, 1e-3 in float32.
    """
    prior = prior.moved(*(None if t is None else t.detach() for t in _parts(prior)))  # type: ignore[arg-type]
    with torch.no_grad():
        return _Steps(density, prior, shared.detach(), tasks, rule).run(mean, tril, tolerance)


def _parts(prior: GaussianPrior) -> tuple[Tensor, Tensor, Tensor | None]:
    return prior.loc, prior.log_scale, prior.factor


@dataclass(eq=False)
class _Steps:
    density: Density
    prior: GaussianPrior
    shared: Tensor
    tasks: Tasks
    rule: Rule
    gradients: int = 0

    def run(self, mean: Tensor, tril: Tensor, tolerance: float | None) -> Solved:
        goal = tolerance or (1e-6 if mean.dtype == torch.float64 else 1e-3)
        mean, tril, size, iterations = self.natural(mean, tril, goal)
        for number in range(_ROUNDS):
            rest = (size > (goal if number == 0 else 10 * goal)).nonzero()[:, 0]
            if not len(rest):
                break
            chosen = replace(self, tasks=self.tasks.select(rest.cpu()), gradients=0)
            found = chosen.quasi_newton(mean[rest], tril[rest], goal)
            mean[rest], tril[rest], size[rest] = found.mean, found.tril, found.slope
            iterations[rest] += found.iterations
            spent = found.gradients + chosen.gradients
            self.gradients += spent * len(rest) // len(mean)
        return Solved(mean, tril, size, size <= 10 * goal, iterations, self.gradients)

    def natural(
        self, mean: Tensor, tril: Tensor, goal: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Up to ten natural-gradient steps: mean, L, slope and number of steps."""
        rounding = torch.finfo(mean.dtype).eps ** 0.5
        precision = self.prior.precision()
        value, slopes = self.evaluate(mean, tril)
        for _ in range(_HALVINGS):  # points far out may overflow where the mode does not
            wild = ~value.isfinite()
            if not bool(wild.any()):
                break
            tril = torch.where(wild[:, None, None], 0.5 * tril, tril)
            value, slopes = self.evaluate(mean, tril)
        iterations = torch.zeros(len(mean), dtype=torch.long, device=mean.device)
        stalled = torch.zeros_like(iterations, dtype=torch.bool)
        for count in range(_MOST_NATURAL + 1):
            white, along = self.directions(mean, tril, slopes, precision)
            size = _size(white, along)
            active = (size > goal) & ~stalled
            if count == _MOST_NATURAL or not bool(active.any()):
                break
            iterations += active
            length = active.to(value)
            for _ in range(_HALVINGS):
                trial_mean, trial_tril = self.moved(mean, tril, white, along, length)
                new_value, new_slopes = self.evaluate(trial_mean, trial_tril)
                # Close to the best q the decrease drowns in rounding: a smaller slope will do.
                level = (new_value - value).abs() <= 1e-3 * rounding * (1 + value.abs())
                good = (new_value <= value) | (level & (size < 1e-2))
                if bool((good | ~active).all()):
                    break
                length = torch.where(good, length, 0.5 * length)
            stalled |= active & ~good
            keep = active & good
            mean, tril, value = (
                _where(keep, new, old)
                for new, old in (
                    (trial_mean, mean),
                    (trial_tril, tril),
                    (new_value, value),
                )
            )
            slopes = [_where(keep, n, o) for n, o in zip(new_slopes, slopes, strict=True)]
        return mean, tril, size, iterations

    def quasi_newton(self, mean: Tensor, tril: Tensor, goal: float) -> Solved:
        """On from there by L-BFGS on F itself, in coordinates in which q is N(0, I)."""
        count, dim = mean.shape
        row, column = torch.tril_indices(dim, dim, device=mean.device)
        prior, points = self.prior, self.rule.points[:, None].expand(-1, count, -1)

        def q(moved: Tensor) -> GaussianQ:
            entries = torch.where(row == column, moved[:, dim:].exp(), moved[:, dim:])
            place = torch.arange(count, device=mean.device)[:, None]
            inner = moved.new_zeros(count, dim, dim).index_put((place, row, column), entries)
            shift = (tril @ moved[:, :dim, None])[..., 0]
            return GaussianQ(mean + shift, factor=tril @ inner)

        def energy(moved: Tensor) -> Tensor:
            weights = self.rule.weights
            return free_energy(
                self.density,
                prior,
                self.shared,
                self.tasks,
                q(moved),
                points,
                rule_weights=weights,
            )

        method = LBFGS(max_iterations=_MOST_BFGS, tolerance=goal, history=20)
        with torch.no_grad():
            found = method.minimise(energy, mean.new_zeros(count, dim + len(row)))
        best = q(found.theta)
        assert best.factor is not None
        # In units of the q that was found: those of its start may have been far too narrow.
        _, slopes = self.evaluate(best.mean, best.factor)
        size = _size(*self.directions(best.mean, best.factor, slopes, prior.precision()))
        gradients = found.gradients * len(points)
        return Solved(best.mean, best.factor, size, size <= 10 * goal, found.iterations, gradients)

    def evaluate(self, mean: Tensor, tril: Tensor) -> tuple[Tensor, list[Tensor]]:
        """F `[T]`, infinite where it is not a number, Σ w g `[T, D]`, Σ w (Lᵀg)zᵀ `[T, D, D]`."""
        points, weights = self.rule.points, self.rule.weights
        theta = mean + torch.einsum("tdk,sk->std", tril, points)
        self.gradients += len(points)
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            loss = self.density.negative_log_likelihood(leaf, self.tasks, self.shared)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        q = GaussianQ(mean, factor=tril)
        value = q.kl(self.prior) + torch.einsum("s,st->t", weights, loss.detach())
        first = torch.einsum("s,std->td", weights, grad)
        second = torch.einsum("s,std,sk->tdk", weights, grad, points)
        second = tril.mT @ second
        finite = value.isfinite() & first.isfinite().all(-1) & second.isfinite().all((-2, -1))
        value = torch.where(finite, value, torch.inf)
        return value, [first, second]

    def directions(
        self, mean: Tensor, tril: Tensor, slopes: list[Tensor], precision: Tensor
    ) -> tuple[Tensor, Tensor]:
        """W `[T, D, D]`, which is I at the best L, and Lᵀ∇_m F `[T, D]`."""
        first, second = slopes
        lower = second.tril()
        mirrored = lower + second.tril(-1).mT
        white = tril.mT @ precision @ tril + mirrored
        pull = (precision @ (mean - self.prior.loc)[..., None])[..., 0]
        along = (tril.mT @ (first + pull)[..., None])[..., 0]
        return white, along

    def moved(
        self, mean: Tensor, tril: Tensor, white: Tensor, along: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q after a share `length` `[T]` of the step."""
        values, vectors = torch.linalg.eigh(torch.nan_to_num(white))
        values = values.clamp(min=_LEAST)
        share = length[:, None]
        step = vectors @ ((vectors.mT @ along[..., None]) / values[..., None])
        mean = mean - share * (tril @ step)[..., 0]
        precision = 1 - share + share * values.clamp(max=_MOST)
        inner = (vectors / precision[..., None, :]) @ vectors.mT  # in units of the old q
        root, _ = torch.linalg.cholesky_ex(inner)
        return mean, tril @ root


def _size(white: Tensor, along: Tensor) -> Tensor:
    """`[T]`, the size of F's gradient where q is N(0, I)."""
    eye = torch.eye(white.shape[-1], dtype=white.dtype, device=white.device)
    return (0.5 * (white - eye).square().sum((-2, -1)) + along.square().sum(-1)).sqrt()


def _where(tasks: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in these `[T]` tasks, else `old`."""
    return torch.where(tasks.reshape(-1, *[1] * (new.dim() - 1)), new, old)
