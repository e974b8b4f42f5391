"""The gradient flow, followed to its end: which minimum a point lies in the basin of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varmeta.checked import Checked, Count, Positive
from varmeta.inference.energy import Energy, as_energy
from varmeta.inference.linear import CG, LinearSolver, default_tolerance
from varmeta.inference.minimise import Minimum, Tolerance, goal_norm

_WRONG, _RIGHT = 0.25, 0.1  # error of a step's linear model, relative to the gradient
_FORCING = 0.01  # loosest residual of a step's system


@dataclass(frozen=True, eq=False)
class GradientFlow(Checked):
    """Follow dz/dt = −∇E to where it rests, θ = scale · z, with implicit steps in time.

    Pseudo-transient continuation (Kelley & Keyes 1998, Convergence Analysis of Pseudo-Transient
    Continuation): a step solves (I/h + ∇²E)Δz = −∇E, which is the flow while h is short and
    Newton's method once it is long. A step is taken back, and h cut to a quarter, where ∇E changes
    otherwise than its linear model says by more than a quarter of its length, and where the system
    is not positive definite; h grows by three where the model is good to a tenth. So unlike a line
    search it does not jump into another basin, as long as no basin is narrower than `longest`. In
    more than one dimension the basins of a flow depend on the units, and `scale` sets them.

    It stays where it starts if ∇E is 0 there, be it a saddle.

    Attributes:
        scale: unit of each coordinate, one number or `[D]`; the prior's scales, as a rule.
        longest: step of any coordinate, in these units.
        max_iterations: cap on the steps, each two gradients and a linear solve.
        tolerance: a task stops where ‖∇E‖ ≤ tolerance · (1 + ‖∇E(start)‖); None for ε^(2/3) of the
            data type.
        solver: for the steps' systems.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> found = GradientFlow().minimise(
        ...     lambda t: ((t**2 - 1) ** 2).sum(-1), torch.tensor([[0.1], [-2.0]])
        ... )
        >>> found.theta.round(decimals=3).tolist()
        [[1.0], [-1.0]]
    """

    scale: Positive | Tensor = 1.0
    longest: Positive = 0.1
    max_iterations: Count = 300
    tolerance: Tolerance | None = None
    solver: LinearSolver = field(default_factory=lambda: CG(max_iterations=50))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not bool((torch.as_tensor(self.scale) > 0).all()):
            raise ValueError(f"scale must be positive, got {self.scale}")

    def minimise(self, energy: Energy | Callable[[Tensor], Tensor], start: Tensor) -> Minimum:
        """See `Minimiser.minimise`."""
        energy, theta, scale = as_energy(energy), start.detach(), self.scale
        flat = default_tolerance(theta.dtype)
        iterations = torch.zeros(len(theta), dtype=torch.long, device=theta.device)
        gradients, goal, start_norm, time = 0, *[torch.zeros_like(theta[:, 0])] * 3
        for count in range(self.max_iterations + 1):
            at = energy.linearise(theta)
            grad = at.grad.detach()
            norm, slope = grad.norm(dim=-1), scale * grad
            steepest, gradients = slope.abs().amax(-1), gradients + 1
            if count == 0:
                start_norm, goal = norm, goal_norm(norm, self.tolerance, grad.dtype)
                time = (self.longest / steepest).clamp(max=1.0)  # 1: the prior's own time
            active = norm > goal
            if count == self.max_iterations or not bool(active.any()):
                break

            def system(v: Tensor, at=at, time=time) -> Tensor:  # type: ignore[no-untyped-def]
                return v / time[:, None] + scale * at.product(scale * v)

            right = torch.where(active[:, None], -slope, 0.0)
            solution = self.solver.solve(system, right, norm.sqrt().clamp(flat, _FORCING))
            cut = (self.longest / solution.x.abs().amax(-1)).clamp(max=1.0)[:, None]
            move = cut * solution.x
            expected = (1 - cut) * slope - move / time[:, None]
            trial = theta + scale * move
            found = scale * energy.value_and_gradient(trial)[1]
            error = (found - expected).norm(dim=-1) / slope.norm(dim=-1)
            good = active & ~solution.negative_curvature & (error <= _WRONG)
            theta = torch.where(good[:, None], trial, theta)
            grown = torch.where(error < _RIGHT, 3.0, 1.0) * cut[:, 0].clamp(min=0.25)
            time = time * torch.where(good, grown, 0.25)
            iterations += active
            gradients += 1 + 2 * solution.products
        return Minimum(theta, norm, norm <= goal, iterations, gradients, at, start_norm)
