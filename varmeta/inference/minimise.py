"""Batched inner minimisers: θ_i* = argmin E_i(θ_i) for all tasks at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from varmeta.inference.linear import CG, default_tolerance

Energy = Callable[[Tensor], Tensor]
_HALVINGS = 30
_ARMIJO = 1e-4
_FORCING = 0.01  # loosest residual of a Newton system: a product is cheap beside a new gradient


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimiser stopped, per task.

    Attributes:
        theta: `[T, D]`.
        grad_norm: `[T]`, ‖∇E_i‖ there, nats per unit of θ.
        converged: `[T]` bool, the tolerance was reached.
        iterations: `[T]` int.
        gradients: batched gradient evaluations, a Hessian-vector product counted as two.
    """

    theta: Tensor
    grad_norm: Tensor
    converged: Tensor
    iterations: Tensor
    gradients: int


class Minimiser(Protocol):
    """Anything that minimises `energy: [T, D] → [T]` nats from `start` `[T, D]`."""

    def minimise(self, energy: Energy, start: Tensor) -> Minimum:
        """Minimise every task's energy; tasks are independent."""
        ...


@dataclass(frozen=True)
class GradientDescent:
    """Plain gradient descent, a fixed number of steps at most.

    Attributes:
        step_size: one number for all coordinates, units of θ² per nat; must be below 2 over the
            largest curvature.
        max_iterations: cap on the steps (the iMAML paper uses 16).
        tolerance: a task stops where ‖∇E‖ ≤ tolerance · (1 + ‖∇E(start)‖); None for ε^(2/3) of the
            data type.
    """

    step_size: float
    max_iterations: int = 16
    tolerance: float | None = None

    def minimise(self, energy: Energy, start: Tensor) -> Minimum:
        """See `Minimiser.minimise`."""
        theta = start.detach()
        grad = gradient(energy, theta)
        goal = _goal(grad, self.tolerance)
        iterations = torch.zeros(len(theta), dtype=torch.long, device=theta.device)
        gradients = 1
        for _ in range(self.max_iterations):
            active = grad.norm(dim=-1) > goal
            if not bool(active.any()):
                break
            theta = torch.where(active[:, None], theta - self.step_size * grad, theta)
            iterations += active
            grad = gradient(energy, theta)
            gradients += 1
        norm = grad.norm(dim=-1)
        return Minimum(theta, norm, norm <= goal, iterations, gradients)


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
    """

    max_iterations: int = 50
    tolerance: float | None = None
    solver: CG = field(default_factory=lambda: CG(max_iterations=50))

    def minimise(self, energy: Energy, start: Tensor) -> Minimum:
        """See `Minimiser.minimise`."""
        theta = start.detach()
        value, grad, matvec = curvature_at(energy, theta)
        goal, flat = _goal(grad, self.tolerance), default_tolerance(theta.dtype)
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
            solution = self.solver.solve(matvec, right, forcing)
            slope = (solution.x * grad).sum(-1)
            downhill = (slope < 0)[:, None]
            step = torch.where(downhill, solution.x, right)
            slope = torch.where(downhill[:, 0], slope, -(norm**2))
            length = active.to(theta.dtype)
            for _ in range(_HALVINGS):
                trial = theta + length[:, None] * step
                new_value, new_grad, new_matvec = curvature_at(energy, trial)
                gradients += 1
                # Close to the minimum the decrease drowns in rounding; a smaller gradient will do.
                level = (new_value - value).abs() <= flat * (1 + value.abs())
                good = level & (new_grad.norm(dim=-1) < norm)
                good |= new_value <= value + _ARMIJO * length * slope
                if bool((good | ~active).all()):
                    break
                length = torch.where(good, length, 0.5 * length)
            failed = active & ~good
            stalled |= failed
            if bool(failed.any()):
                trial = torch.where(failed[:, None], theta, trial)
                new_value, new_grad, new_matvec = curvature_at(energy, trial)
                gradients += 1
            theta, value, grad, matvec = trial, new_value, new_grad, new_matvec
            iterations += active
            gradients += 2 * solution.products
        norm = grad.norm(dim=-1)
        return Minimum(theta, norm, norm <= goal, iterations, gradients)


def gradient(energy: Energy, theta: Tensor) -> Tensor:
    """∇E_i at θ_i, `[T, D]`, detached."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(energy(leaf).sum(), leaf)[0]


def curvature_at(
    energy: Energy, theta: Tensor
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Value `[T]`, gradient `[T, D]`, and the product v ↦ ∇²E_i v_i, all at a fixed θ.

    One gradient graph is kept and traversed once per product.
    """
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        value = energy(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)

    def matvec(v: Tensor) -> Tensor:
        if not grad.requires_grad:  # a linear energy has no curvature
            return torch.zeros_like(v)
        out = torch.autograd.grad(grad, leaf, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(v) if out is None else out

    return value.detach(), grad.detach(), matvec


def _goal(grad: Tensor, tolerance: float | None) -> Tensor:
    relative = default_tolerance(grad.dtype) if tolerance is None else tolerance
    return relative * (1 + grad.norm(dim=-1))
