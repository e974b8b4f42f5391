"""Newton-CG, batched over tasks: no step size to choose, and quadratic convergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from varmeta.inference.approximate import NeedsPrior, bound
from varmeta.inference.energy import Energy, as_energy
from varmeta.inference.linear import CG, LinearSolver, default_tolerance
from varmeta.inference.minimise import Minimum, check_budget, goal_norm
from varmeta.models.programs import Linearised

Curvature = Literal["hessian", "gauss_newton"]
_HALVINGS = 30
_ARMIJO = 1e-4
_FORCING = 0.01  # loosest residual of a Newton system: a product is cheap beside a new gradient


@dataclass(frozen=True)
class NewtonCG:
    """Truncated Newton with conjugate gradients and a backtracking line search.

    (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1; the iMAML paper's Hessian-free
    variant.) Needs no step size; quadratic convergence near a minimum. Where CG meets negative
    curvature the step so far, or the steepest descent, is taken.

    Attributes:
        max_iterations: cap on Newton steps.
        tolerance: a task stops where ‖∇E‖ ≤ tolerance · (1 + ‖∇E(start)‖); None for ε^(2/3) of the
            data type.
        solver: for the Newton systems.
        curvature: `"hessian"`, or `"gauss_newton"` (see `Implicit`), with which every step goes
            down, but convergence is linear where the model bends.
    """

    max_iterations: int = 50
    tolerance: float | None = None
    solver: LinearSolver | NeedsPrior = field(default_factory=lambda: CG(max_iterations=50))
    curvature: Curvature = "hessian"

    def __post_init__(self) -> None:
        check_budget(self.max_iterations, self.tolerance)
        check_curvature(self.curvature)
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
        goal = goal_norm(start_norm, self.tolerance, grad.dtype)
        flat, solver = default_tolerance(theta.dtype), bound(self.solver, energy)
        iterations = torch.zeros(len(theta), dtype=torch.long, device=theta.device)
        stalled = torch.zeros_like(goal, dtype=torch.bool)
        gradients = 1
        for _ in range(self.max_iterations):
            norm = grad.norm(dim=-1)
            active = (norm > goal) & ~stalled
            if not bool(active.any()):
                break
            forcing = norm.sqrt().clamp(flat, _FORCING)
            right = torch.where(active[:, None], -grad, 0.0)
            product = at.product
            if self.curvature == "gauss_newton":
                product = energy.linearise(theta, gauss_newton=True).product
                gradients += 1
            solution = solver.solve(product, right, forcing)
            slope = (solution.x * grad).sum(-1)
            downhill = (slope < 0)[:, None]
            step = torch.where(downhill, solution.x, right)
            slope = torch.where(downhill[:, 0], slope, -(norm**2))
            length = active.to(theta.dtype)
            for _ in range(_HALVINGS):
                trial = theta + length[:, None] * step
                new = energy.linearise(trial)
                gradients += 1
                good = _decreased(value, norm, new, length * slope, flat)
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
        norm = grad.norm(dim=-1)
        return Minimum(theta, norm, norm <= goal, iterations, gradients, at, start_norm)


def _decreased(
    value: Tensor, norm: Tensor, new: Linearised, expected: Tensor, flat: float
) -> Tensor:
    """`[T]` bool: enough lower; `expected` is the change that the slope promises."""
    # Close to the minimum the decrease drowns in rounding; a smaller gradient will do.
    level = (new.value - value).abs() <= flat * (1 + value.abs())
    smaller = new.grad.detach().norm(dim=-1) < norm
    return (level & smaller) | (new.value <= value + _ARMIJO * expected)


def check_curvature(curvature: str) -> None:
    """Raise a ValueError unless it is one of the two."""
    if curvature not in ("hessian", "gauss_newton"):
        raise ValueError(f"curvature must be 'hessian' or 'gauss_newton', got {curvature!r}")
