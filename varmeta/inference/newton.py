"""Newton-CG, batched over tasks: no step size to choose, and quadratic convergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from varmeta.checked import Checked, Count
from varmeta.inference.approximate import bound
from varmeta.inference.energy import Energy, as_energy
from varmeta.inference.linear import CG, LinearSolver, NeedsPrior, default_tolerance
from varmeta.inference.minimise import Minimum, Tolerance, goal_norm
from varmeta.models.programs import Linearised

Curvature = Literal["hessian", "gauss_newton"]
_HALVINGS = 30
_ARMIJO = 1e-4
_ULPS = 4  # of θ: a component of the gradient that so little makes is rounding
_SLOW = 0.1  # of the last gradient's norm: from there on it is asked whether rounding is left
_STEEPEST = 1e6  # gradient at the start to which a tolerance is relative at most
_FORCING = 0.01  # loosest residual of a Newton system: a product is cheap beside a new gradient


@dataclass(frozen=True)
class NewtonCG(Checked):
    """Truncated Newton with conjugate gradients and a backtracking line search.

    (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1; the iMAML paper's Hessian-free
    variant.) Needs no step size; quadratic convergence near a minimum. Where CG meets negative
    curvature the step so far, or the steepest descent, is taken.

    What θ cannot resolve is not asked for: where the norm hardly falls any more, components of ∇E
    no larger than what four units in the last place of θ make of it, |∇²E·4ε|θ||, count as 0. With
    a prior scale of 1e-5 and θ of 1 that is 1e-5: far above the tolerance, and exact to 1e-15.

    Attributes:
        max_iterations: cap on Newton steps; behind a log link a far start takes one for each unit.
        tolerance: a task stops where ‖∇E‖ ≤ tolerance · (1 + ‖∇E(start)‖), ∇E without what is
            rounding; None for ε^(2/3) of the data type. The norm at the start counts up to 1e6: at
            a start behind an exponential it can be any number, and would excuse any other.
        solver: for the Newton systems.
        curvature: `"hessian"`, or `"gauss_newton"` (see `Implicit`), with which every step goes
            down, but convergence is linear where the model bends.
    """

    max_iterations: Count = 100
    tolerance: Tolerance | None = None
    solver: LinearSolver | NeedsPrior = field(default_factory=lambda: CG(max_iterations=50))
    curvature: Curvature = "hessian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance == 0:
            raise ValueError(
                "tolerance must not be 0: a line search has no fixed budget. Use GradientDescent "
                "for one, or leave tolerance None"
            )

    def minimise(self, energy: Energy | Callable[[Tensor], Tensor], start: Tensor) -> Minimum:
        """See `Minimiser.minimise`."""
        energy = as_energy(energy)
        theta = start.detach()
        at = energy.linearise(theta)
        value, grad = at.value, at.grad.detach()
        start_norm = grad.norm(dim=-1)
        goal = goal_norm(start_norm.clamp(max=_STEEPEST), self.tolerance, grad.dtype)
        flat, solver = default_tolerance(theta.dtype), bound(self.solver, energy)
        iterations = torch.zeros(len(theta), dtype=torch.long, device=theta.device)
        stalled = torch.zeros_like(goal, dtype=torch.bool)
        floor, last = torch.zeros_like(grad), torch.full_like(goal, torch.inf)
        gradients = 1
        for _ in range(self.max_iterations):
            norm = _beyond(grad, floor)
            slow = (norm > goal) & (norm > _SLOW * last)
            if bool(slow.any()):
                floor = torch.where(slow[:, None], _rounding(at, theta), floor)
                norm, gradients = _beyond(grad, floor), gradients + 2
            active = (norm > goal) & ~stalled
            if not bool(active.any()):
                break
            last, forcing = norm, norm.sqrt().clamp(flat, _FORCING)
            right = torch.where(active[:, None] & (grad.abs() > floor), -grad, 0.0)
            product = at.product
            if self.curvature == "gauss_newton":
                product = energy.linearise(theta, gauss_newton=True).product
                gradients += 1
            solution = solver.solve(product, right, forcing)
            slope = -(solution.x * right).sum(-1)
            downhill = (slope < 0)[:, None]
            step = torch.where(downhill, solution.x, right)
            slope = torch.where(downhill[:, 0], slope, -(norm**2))
            length = active.to(theta.dtype)
            for _ in range(_HALVINGS):
                trial = theta + length[:, None] * step
                new = energy.linearise(trial)
                gradients += 1
                good = _decreased(value, norm, new, length * slope, flat, floor)
                if bool((good | ~active).all()):
                    break
                length = torch.where(good, length, 0.5 * length)
            failed = active & ~good
            stalled |= failed
            if bool(failed.any()):
                trial = torch.where(failed[:, None], theta, trial)
                new = energy.linearise(trial)
                gradients += 1
            theta, at = trial, new
            value, grad = at.value, at.grad.detach()
            iterations += active
            gradients += 2 * solution.products
        converged = _beyond(grad, floor) <= goal
        if not bool(converged.all()):
            converged = converged | (_beyond(grad, _rounding(at, theta)) <= goal)
            gradients += 2
        return Minimum(theta, grad.norm(dim=-1), converged, iterations, gradients, at, start_norm)


def _rounding(at: Linearised, theta: Tensor) -> Tensor:
    """`[T, D]`: the largest components of ∇E that are rounding of θ."""
    return at.product(_ULPS * torch.finfo(theta.dtype).eps * theta.abs()).detach().abs()


def _beyond(grad: Tensor, floor: Tensor) -> Tensor:
    """`[T]`, the gradient's norm without components up to `floor`."""
    return torch.where(grad.abs() > floor, grad, 0.0).norm(dim=-1)


def _decreased(
    value: Tensor, norm: Tensor, new: Linearised, expected: Tensor, flat: float, floor: Tensor
) -> Tensor:
    """`[T]` bool: enough lower; `expected` is the change that the slope promises."""
    # Close to the minimum the decrease drowns in rounding; a smaller gradient will do.
    level = (new.value - value).abs() <= flat * (1 + value.abs())
    smaller = _beyond(new.grad.detach(), floor) < norm
    return (level & smaller) | (new.value <= value + _ARMIJO * expected)
