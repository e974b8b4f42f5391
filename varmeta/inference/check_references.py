"""The references that `check_gradient` sets a meta-gradient beside.

All of them are derivatives in x `[n]`: θ0, log scales, factor and φ in one vector, 0 at the point
of interest and in units of the prior, so that one step of a finite difference fits all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from varmeta.inference.energy import TaskEnergy
from varmeta.inference.laplace import MAX_DIM, hessian
from varmeta.inference.linear import CG
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import FirstOrder, Minimiser
from varmeta.inference.newton import NewtonCG
from varmeta.inference.point import Point
from varmeta.inference.prox import Unrolled, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

_STEP = 1e-3  # of a finite difference, in units of the prior; Richardson's error is its 4th power
_FEW = 30  # coordinates up to which a difference is taken along each
_RANDOM = 8  # else along so many directions in each block
_MOST_STEPS = 500  # to unroll; each is kept
_LEAP = 0.05  # prior standard deviations that θ* cannot move along a branch within one difference
_MARGIN = 1e-3  # a block's error is relative to at least this share of the whole gradient


def directions(point: Point, seed: int) -> Tensor:
    """`[K, n]`, orthonormal, each within one block: all coordinates, or some random directions."""
    x = point.zeros()
    if len(x) <= _FEW:
        return torch.eye(len(x), dtype=x.dtype, device=x.device)
    noise, parts = generator(seed), []
    for u in point.units.values():
        size = u.numel()
        if size > _RANDOM:
            drawn = torch.randn(size, _RANDOM, generator=noise, dtype=torch.float64)
            parts.append(torch.linalg.qr(drawn).Q.T)
        else:
            parts.append(torch.eye(size, dtype=torch.float64))
    return torch.block_diag(*parts).to(x)


@dataclass(frozen=True, eq=False)
class Differences:
    """Central differences along K directions.

    Attributes:
        values: `[K, T]`, extrapolated from a whole and a half step (Richardson).
        gap: `[K, T]`, what the two disagree by: a jump, or a rough objective.
        losses: `[T]`, at the point itself.
    """

    values: Tensor
    gap: Tensor
    losses: Tensor

    def rough(self, tolerance: float) -> Tensor:
        """`[T]` bool: the disagreement is no matter of curvature or rounding, and counts."""
        slope = self.values.abs().amax(0)
        counts = tolerance * self.values.sum(1).norm()
        rounding = 1e-11 / _STEP * (1 + self.losses.abs())
        return (self.gap > torch.maximum(0.05 * slope, counts) + rounding).any(0)


def differences(objective: Callable[[Tensor], Tensor], basis: Tensor) -> Differences:
    """Differences of an objective, x `[n]` to `[T]`, along each row of `basis` `[K, n]`."""
    middle = objective(torch.zeros_like(basis[0]))
    values, gaps = [], []
    for u in basis:
        ends = [objective(c * _STEP * u) for c in (1, -1, 0.5, -0.5)]
        whole, half = (ends[0] - ends[1]) / (2 * _STEP), (ends[2] - ends[3]) / _STEP
        # A jump that is the same on both sides shows in the second differences alone, which a
        # smooth objective divides by four when the step is halved.
        bends = (ends[0] + ends[1] - 2 * middle) - 4 * (ends[2] + ends[3] - 2 * middle)
        values.append((4 * half - whole) / 3)
        gaps.append(torch.maximum((half - whole).abs(), bends.abs() / (2 * _STEP)))
    return Differences(torch.stack(values), torch.stack(gaps), middle)


def loss_gradient(point: Point, losses: Callable[[GaussianPrior, Tensor], Tensor]) -> Tensor:
    """d Σ losses / dx `[n]`, of losses `[T]` at a prior and φ."""
    x = point.zeros().requires_grad_()
    with torch.enable_grad():
        total = losses(*point.moved(x)).sum()
    if not total.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


@dataclass(eq=False)
class InnerProblem:
    """What a strategy adapts by, where it says so: E_i, where its minimiser ends and where it ends.

    Attributes:
        strategy: says which rows are inside, and what it makes of θ.
        has_minimum: E_i has the prior in it, so that θ* depends on it.
        ended: `[T, D]`, where the minimiser stopped.
        theta: `[T, D]`, the minimum found from there, to rounding.
        values: eigenvalues of ∇²E at θ, `[T, D]`; None for large D.
    """

    strategy: MetaGradient
    density: Density
    point: Point
    tasks: Tasks
    minimiser: Minimiser
    has_minimum: bool
    ended: Tensor
    theta: Tensor
    values: Tensor | None = field(default=None)

    @classmethod
    def of(cls, strategy: Any, density: Density, point: Point, tasks: Tasks) -> InnerProblem | None:
        """None for a strategy of the user's own, without a minimiser."""
        minimiser: Any = getattr(strategy, "minimiser", None)
        if not (isinstance(strategy, MetaGradient) and hasattr(minimiser, "minimise")):
            return None
        has_minimum = bool(getattr(strategy, "with_prior", True))
        empty = point.prior.loc.new_zeros(len(tasks), density.dim)
        self = cls(strategy, density, point, tasks, minimiser, has_minimum, empty, empty)
        x = point.zeros()
        self.ended = self._ended(x)
        if has_minimum:
            self.theta = self._minimum(x, self.ended)
            if density.dim <= MAX_DIM:
                dense = hessian(self._energy(x), self.theta)
                if bool(dense.isfinite().all()):
                    self.values = torch.linalg.eigvalsh(dense)
        return self

    def stats(self) -> dict[str, Tensor]:
        """Per task `[T]`: distance to the minimum, extreme eigenvalues there."""
        out = {"distance": self._units(self.ended - self.theta)}
        if self.values is not None:
            out |= {"curvature_min": self.values[:, 0], "curvature_max": self.values[:, -1]}
        return out

    def exact_losses(self, x: Tensor) -> Tensor:
        """The strategy's objective at the minimum on the same branch, `[T]`."""
        theta = self._minimum(x, self.theta)
        with torch.no_grad():
            return self._loss_at(*self.point.moved(x), theta)

    def dense(self) -> Tensor | None:
        """The implicit function theorem with a dense solve at θ*; None for large D."""
        if self.values is None:
            return None
        x = self.point.zeros()
        leaf = self.theta.clone().requires_grad_()
        (v,) = torch.autograd.grad(self._loss_at(*self.point.moved(x), leaf).sum(), leaf)
        solved = _solve(hessian(self._energy(x), self.theta), v)

        def lagrangian(prior: GaussianPrior, shared: Tensor) -> Tensor:
            energy = TaskEnergy(self.density, self._inside, shared, prior)
            loss = self._loss_at(prior, shared, self.theta)
            return loss - (solved * energy.linearise(self.theta).grad).sum(-1)

        return loss_gradient(self.point, lagrangian)

    def unrolled_as_run(self) -> Tensor | None:
        """Through the minimiser's own steps; None if they cannot be unrolled, or are too many."""
        own = self.minimiser
        if not isinstance(own, FirstOrder) or own.max_iterations > _MOST_STEPS:
            return None
        return self._unrolled(own)

    def unrolled_to_the_end(self) -> Tensor | None:
        """Through as many steps as it takes; None if that is too many."""
        if not isinstance(self.minimiser, FirstOrder):
            return None
        changes: Any = {"max_iterations": _MOST_STEPS, "tolerance": 1e-11}
        longer = replace(self.minimiser, **changes)  # type: ignore[type-var]
        start = self.point.prior.loc.expand_as(self.ended)
        found = longer.minimise(self._energy(self.point.zeros()), start)
        there = self._units(found.theta - self.theta) < 1e-6
        return self._unrolled(longer) if bool(there.all()) else None

    def leaps(self, rough: Tensor, own: Differences, basis: Tensor) -> Tensor:
        """`[T]` bool: of the rough tasks, those whose θ leaps to another minimum."""
        if not bool(rough.any()):
            return rough
        leaps = torch.zeros_like(rough)
        for u in basis[own.gap[:, rough].amax(1).topk(min(3, len(basis))).indices]:
            ends = [self._ended(c * _STEP * u) for c in (1, 0.5, -0.5, -1)]
            ends.insert(2, self.ended)
            for a, b in pairwise(ends):
                leaps |= self._units(a - b) > _LEAP
        return rough & leaps

    # -- private ----------------------------------------------------------------------------------

    def _energy(self, x: Tensor) -> TaskEnergy:
        prior, shared = self.point.moved(x)
        return TaskEnergy(self.density, self._inside, shared, prior if self.has_minimum else None)

    @property
    def _inside(self) -> Tasks:
        return self.strategy.rows_inside(self.tasks)

    def _loss_at(self, prior: GaussianPrior, shared: Tensor, theta: Tensor) -> Tensor:
        return self.strategy.loss_at(self.density, prior, shared, self.tasks, theta)

    def _ended(self, x: Tensor) -> Tensor:
        start = self.point.moved(x)[0].loc.expand(len(self.tasks), -1)
        return self.minimiser.minimise(self._energy(x), start).theta.detach()

    def _minimum(self, x: Tensor, start: Tensor) -> Tensor:
        energy, small = self._energy(x), self.density.dim <= MAX_DIM
        solver = CG(max_iterations=max(100, min(5 * self.density.dim, 1000)))
        newton = NewtonCG(max_iterations=200, tolerance=1e-9 if small else 1e-11, solver=solver)
        theta = newton.minimise(energy, start).theta
        for _ in range(2 if small else 0):  # to rounding, without a line search that stalls there
            at = energy.linearise(theta).grad.detach()
            trial = theta - _solve(hessian(energy, theta), at)
            after = energy.linearise(trial).grad.detach()
            better = after.norm(dim=-1) < at.norm(dim=-1)
            theta = torch.where(better[:, None], trial, theta)
        return theta

    def _unrolled(self, minimiser: Minimiser) -> Tensor:
        def losses(prior: GaussianPrior, shared: Tensor) -> Tensor:
            anchor = prior if self.has_minimum else None
            energy = TaskEnergy(self.density, self._inside, shared, anchor)
            start = prior.loc.expand(len(self.tasks), -1)
            theta, _ = prox(energy, start, minimiser=minimiser, adjoint=Unrolled())
            return self._loss_at(prior, shared, theta)

        return loss_gradient(self.point, losses)

    def _units(self, offset: Tensor) -> Tensor:
        """‖offset‖ in prior standard deviations, `[T, D]` to `[T]`."""
        return (offset / self.point.prior.scale).norm(dim=-1)


def _solve(matrix: Tensor, b: Tensor) -> Tensor:
    """A⁻¹b, `[T, D, D]` and `[T, D]`; NaN where A is singular."""
    solution, info = torch.linalg.solve_ex(matrix, b[..., None])
    return torch.where(info[:, None] == 0, solution[..., 0], float("nan"))


def compare_blocks(
    point: Point, basis: Tensor, own: Tensor, reference: Tensor, rounding: float
) -> dict[str, tuple[float, float, float]]:
    """`{block: (error, cosine, norm)}` of two gradients along `basis`, `[K]` each.

    An error is relative to the block's reference, or to a small share of the whole, or to
    `rounding`, whichever is the largest: a block without any gradient has no relative error.
    """
    blocks = {name: part.sum(-1) > 0 for name, part in point.split(basis.abs()).items()}
    blocks["all"] = torch.ones_like(own, dtype=torch.bool)
    least = max(float(_MARGIN * reference.norm()), rounding)
    out = {}
    for name, rows in blocks.items():
        mine, theirs = own[rows], reference[rows]
        size = float(mine.norm() * theirs.norm())
        error = float((mine - theirs).norm()) / max(float(theirs.norm()), least)
        cosine = float(mine @ theirs) / size if size > 0 else float("nan")
        out[name] = (error, cosine, float(theirs.norm()))
    return out
