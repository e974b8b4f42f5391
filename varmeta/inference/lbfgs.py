"""L-BFGS, batched over tasks: curvature learned from the gradients alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.checked import Checked, Count
from varmeta.inference.energy import Energy, as_energy
from varmeta.inference.linear import default_tolerance
from varmeta.inference.minimise import Minimum, Tolerance, goal_norm

_TRIALS = 40  # doublings or halvings of one line search
_ARMIJO = 1e-4
_WOLFE = 0.9


@dataclass(frozen=True)
class LBFGS(Checked):
    """Limited-memory BFGS with a line search that ends at a weak Wolfe point, all tasks at once.

    (Liu & Nocedal 1989, On the limited memory BFGS method; the two-loop recursion of Nocedal &
    Wright 2006, algorithm 7.4; bisection after Lewis & Overton 2013. Where the decrease drowns in
    rounding it is read off the slope, as by Hager & Zhang 2005.) Needs no step size and no
    Hessian-vector product: for models whose second derivative is dear or not there. `NewtonCG`
    needs far fewer iterations.

    Each task has its own history, step length and end. A pair (s, y) with sᵀy ≤ 0 to rounding is
    left out; a task whose line search fails starts its history anew, and stops if that fails too.

    Attributes:
        max_iterations: cap on the steps, each one gradient or a few.
        tolerance: a task stops where ‖∇E‖ ≤ tolerance · (1 + ‖∇E(start)‖); None for ε^(2/3) of the
            data type.
        history: pairs kept per task, at least 1; `[T, D]` numbers twice for each.

    Raises:
        ValueError: a field out of its range; tolerance 0, which a line search cannot keep to.

    Example:
        >>> found = LBFGS().minimise(lambda t: (t - 3).square().sum(-1), torch.zeros(2, 1))
        >>> found.theta.tolist(), found.converged.tolist()
        ([[3.0], [3.0]], [True, True])
    """

    max_iterations: Count = 100
    tolerance: Tolerance | None = None
    history: Count = 10

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
        value, grad = energy.value_and_gradient(theta)
        start_norm = grad.norm(dim=-1)
        goal = goal_norm(start_norm, self.tolerance, grad.dtype)
        memory = _Memory.empty(theta, self.history)
        iterations = torch.zeros(len(theta), dtype=torch.long, device=theta.device)
        stalled = torch.zeros_like(goal, dtype=torch.bool)
        gradients = 1
        for _ in range(self.max_iterations):
            norm = grad.norm(dim=-1)
            active = (norm > goal) & ~stalled
            if not bool(active.any()):
                break
            step = memory.direction(grad)
            slope = (step * grad).sum(-1)
            memory = memory.forget(active & ~(slope < 0))  # to rounding: no way down any more
            known = memory.known
            step = torch.where(known[:, None], step, -grad)
            slope = torch.where(known, slope, -(norm**2))
            first = torch.where(known, 1.0, 1 / norm.clamp(min=1.0))
            search = _search(energy, theta, value, step, slope, first, active)
            moved, gradients = search.found, gradients + search.gradients
            new = torch.where(moved[:, None], theta + search.length[:, None] * step, theta)
            new_grad = torch.where(moved[:, None], search.grad, grad)
            memory = memory.add(new - theta, new_grad - grad, moved)
            failed = active & ~moved
            stalled |= failed & ~known
            memory = memory.forget(failed)
            theta, grad = new, new_grad
            value = torch.where(moved, search.value, value)
            iterations += active
        at = energy.linearise(theta)
        converged = grad.norm(dim=-1) <= goal
        norm = at.grad.detach().norm(dim=-1)
        return Minimum(theta, norm, converged, iterations, gradients + 1, at, start_norm)


@dataclass(frozen=True, eq=False)
class _Memory:
    """The last K pairs of each task, the newest last.

    `steps` and `changes` of the gradient: `[K, T, D]`; `rho` `[K, T]`: 1/(sᵀy), 0 where a task has
    no pair yet, which then adds nothing.
    """

    steps: Tensor
    changes: Tensor
    rho: Tensor

    @classmethod
    def empty(cls, theta: Tensor, size: int) -> _Memory:
        zeros = theta.new_zeros(size, *theta.shape)
        return cls(zeros, zeros, zeros[..., 0])

    @property
    def known(self) -> Tensor:
        """`[T]` bool, the task has a pair."""
        return self.rho[-1] > 0

    def direction(self, grad: Tensor) -> Tensor:
        """−(inverse Hessian of BFGS)∇E, `[T, D]`; the two-loop recursion."""
        q, weights = grad, []
        for s, y, rho in zip(
            self.steps.flip(0), self.changes.flip(0), self.rho.flip(0), strict=True
        ):
            weights.append(rho * (s * q).sum(-1))
            q = q - weights[-1][:, None] * y
        curvature = self.rho[-1] * self.changes[-1].square().sum(-1)  # yᵀy / sᵀy
        q = q / torch.where(curvature > 0, curvature, 1.0)[:, None]
        for s, y, rho, weight in zip(
            self.steps, self.changes, self.rho, reversed(weights), strict=True
        ):
            q = q + (weight - rho * (y * q).sum(-1))[:, None] * s
        return -q

    def add(self, step: Tensor, change: Tensor, moved: Tensor) -> _Memory:
        """With one more pair in the tasks that moved, where its curvature is positive."""
        curvature = (step * change).sum(-1)
        eps = torch.finfo(step.dtype).eps
        keep = moved & (curvature > eps * step.norm(dim=-1) * change.norm(dim=-1))
        rho = 1 / torch.where(keep, curvature, 1.0)
        # A shift in each task alone: a pair that one task leaves out costs no other its history.
        pairs = zip((self.steps, self.changes, self.rho), (step, change, rho), strict=True)
        return _Memory(
            *(
                torch.where(_like(keep, new), torch.cat([old[1:], new[None]]), old)
                for old, new in pairs
            )
        )

    def forget(self, tasks: Tensor) -> _Memory:
        """Without any pair in these `[T]` tasks."""
        return _Memory(self.steps, self.changes, torch.where(tasks, 0.0, self.rho))


@dataclass(frozen=True, eq=False)
class _Search:
    """Where a line search ended: all `[T]`, `grad` `[T, D]`, and the gradients it took."""

    found: Tensor
    length: Tensor
    value: Tensor
    grad: Tensor
    gradients: int


def _search(
    energy: Energy,
    theta: Tensor,
    value: Tensor,
    step: Tensor,
    slope: Tensor,
    first: Tensor,
    active: Tensor,
) -> _Search:
    """Bisection to a weak Wolfe point per task, doubling until one is bracketed.

    Where the trials run out the last point that was low enough is taken, if there is one.
    """
    flat = default_tolerance(theta.dtype)
    low, high = torch.zeros_like(first), torch.full_like(first, float("inf"))
    best = _Search(torch.zeros_like(active), low, value, torch.zeros_like(theta), 0)
    length, open_ = first, active
    for count in range(1, _TRIALS + 1):
        at = torch.where(open_, length, 0.0)
        new, grad = energy.value_and_gradient(theta + at[:, None] * step)
        there = (grad * step).sum(-1)
        level = (new - value).abs() <= flat * (1 + value.abs())
        lower = new <= value + _ARMIJO * at * slope
        lower = open_ & (lower | (level & (there <= (2 * _ARMIJO - 1) * slope)))
        best = _Search(
            best.found | lower,
            torch.where(lower, at, best.length),
            torch.where(lower, new, best.value),
            torch.where(lower[:, None], grad, best.grad),
            count,
        )
        steep = there < _WOLFE * slope
        open_ = open_ & (~lower | steep)
        if not bool(open_.any()):
            break
        low = torch.where(lower, at, low)
        high = torch.where(open_ & ~lower, at, high)
        length = torch.where(high.isfinite(), 0.5 * (low + high), 2 * low)
    return best


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """`[T]` as `[T, 1]` where `values` is `[T, D]`."""
    return mask.reshape(-1, *[1] * (values.dim() - 1))
