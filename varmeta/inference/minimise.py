"""Batched inner minimisers of first order: θ_i* = argmin E_i(θ_i) for all tasks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from varmeta.checked import Checked, Count, Positive, Within
from varmeta.inference.energy import Energy, as_energy
from varmeta.inference.linear import default_tolerance
from varmeta.inference.pace import Pace, length_of
from varmeta.models.programs import Derivative, Linearised, Product

_CUT = 0.999  # of the longest step; a step as long as that was shortened
_FAR = 1e3  # standard deviations of the prior

Memory = tuple[Tensor, ...]
Precision = Literal["full", "tf32", "bf16"]


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimiser stopped, per task.

    Attributes:
        theta: `[T, D]`.
        grad_norm: `[T]`, ‖∇E_i‖ there, nats per unit of θ.
        converged: `[T]` bool, the tolerance was reached; None if it is 0, a fixed budget.
        iterations: `[T]` int.
        gradients: batched gradient evaluations, a Hessian-vector product counted as two.
        at: the energy linearised at θ.
        start_norm: `[T]`, ‖∇E_i‖ at the start.
        cut: `[T]` bool, the last step of a fixed budget was shortened; None where none can be.
        diverged: `[T]` bool, a fixed budget led away (`led_away`); None with a tolerance.
    """

    theta: Tensor
    grad_norm: Tensor
    converged: Tensor | None
    iterations: Tensor
    gradients: int
    at: Linearised
    start_norm: Tensor
    cut: Tensor | None = None
    diverged: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Path:
    """Where a fixed or adaptive number of steps ended.

    Attributes:
        theta: `[T, D]`, differentiable where it was asked for.
        start_norm: `[T]`, ‖∇E_i‖ at the start.
        goal: `[T]`, the norm to reach; 0 in a fixed budget.
        iterations: `[T]` int.
        gradients: batched gradient evaluations.
        cut: `[T]` bool, the last step of a fixed budget was shortened; None where none can be.
    """

    theta: Tensor
    start_norm: Tensor
    goal: Tensor
    iterations: Tensor
    gradients: int
    cut: Tensor | None = None


Tolerance = Annotated[
    float, Within(0, why="0 is exactly max_iterations, None what the data type can reach")
]
Clip = Annotated[
    float,
    Within(
        0,
        above=True,
        why="it is the longest step in standard deviations of the prior, and None leaves steps as "
        "they are",
    ),
]
Decay = Annotated[float, Within(0, 1, below=True)]


class Minimiser(Protocol):
    """Anything that minimises `energy: [T, D] → [T]` nats from `start` `[T, D]`."""

    def minimise(self, energy: Energy | Callable[[Tensor], Tensor], start: Tensor) -> Minimum:
        """Minimise every task's energy; tasks are independent."""
        ...


class FirstOrder(Checked, ABC):
    """A minimiser whose steps are functions of the gradients so far, and so can be unrolled.

    Attributes:
        step_size: one number, or `[D]` one per coordinate.
        max_iterations: cap on the steps.
        tolerance: a task stops where ‖∇E‖ ≤ tolerance · (1 + ‖∇E(start)‖); None for ε^(2/3) of the
            data type; 0 for exactly `max_iterations` steps, which a device runs without waiting.
        precision: of the matrix products in the steps: `"full"`; `"tf32"`, 10 bits of mantissa on
            GPUs that have it, nothing elsewhere; `"bf16"`, 7 bits. θ* is then less exact, its
            derivative is taken at full precision. Not for unrolled steps.
        clip: the longest step, in standard deviations of the prior: a step that is longer in any
            coordinate is shortened as a whole, so that a gradient of e^30 behind a log link leads
            one sd down its direction and not out of the floating-point numbers. The minimum stays
            where it is. None for no bound, as in the papers. Where an energy knows no prior there
            is none either.
    """

    step_size: Positive | Tensor
    max_iterations: Count
    tolerance: Tolerance | None
    precision: Precision
    clip: Clip | None

    @abstractmethod
    def begin(self, theta: Tensor) -> Memory:
        """What is remembered from step to step, before the first."""

    @abstractmethod
    def move(
        self, count: int, theta: Tensor, grad: Tensor, memory: Memory, pace: Pace
    ) -> tuple[Tensor, Memory]:
        """θ after one more step, the first `count` being taken, and the new memory."""

    def size(self, energy: Energy) -> float | Tensor:
        """What multiplies a gradient of this energy."""
        return self.step_size

    def pace(self, energy: Energy) -> Pace:
        """How long this energy's steps are."""
        unit = getattr(energy, "unit", None)
        longest = None if self.clip is None or unit is None else self.clip * unit
        return Pace(self.size(energy), longest)

    def minimise(self, energy: Energy | Callable[[Tensor], Tensor], start: Tensor) -> Minimum:
        """See `Minimiser.minimise`."""
        energy = as_energy(energy)
        with torch.no_grad(), _products(self.precision, start.device):
            start = start.detach()
            slope = energy.slope(start) if self.tolerance == 0 and self.uniform else None
            pace = self.pace(energy)
            path = self.run(energy, start) if slope is None else self._budget(slope, start, pace)
        at = energy.linearise(path.theta)
        norm = at.grad.detach().norm(dim=-1)
        converged, diverged = None, None
        if self.tolerance == 0:
            diverged = led_away(energy, start, path, norm)
        else:
            converged = norm <= path.goal
        count = path.gradients + 1
        return Minimum(
            path.theta,
            norm,
            converged,
            path.iterations,
            count,
            at,
            path.start_norm,
            path.cut,
            diverged,
        )

    @property
    def uniform(self) -> bool:
        """Whether all steps are the same function of θ, gradient and memory, and always will be."""
        return False

    def _budget(self, slope: Derivative, start: Tensor, pace: Pace) -> Path:
        """The steps of a fixed budget, compiled together."""
        unknown = torch.full_like(start[:, 0], -1.0)
        size = torch.as_tensor(pace.size, dtype=start.dtype, device=start.device)
        longest = pace.longest
        if longest is None:
            longest = torch.full_like(start[0], float("inf"))
        state = (start, unknown, unknown, size, longest, *self.begin(start))
        theta, norm, length, *_ = slope.repeat(self._step, state, self.max_iterations)
        iterations = torch.full_like(norm, self.max_iterations, dtype=torch.long)
        goal = torch.zeros_like(norm)
        cut = None if pace.longest is None else length > _CUT
        return Path(theta, norm, goal, iterations, self.max_iterations, cut)

    def _step(
        self,
        slope: Product,
        theta: Tensor,
        norm: Tensor,
        length: Tensor,
        size: Tensor,
        longest: Tensor,
        *memory: Tensor,
    ) -> tuple[Tensor, ...]:
        """One of `uniform` steps; the norm is that of the first gradient, −1 before it."""
        grad = slope(theta)
        moved, memory = self.move(0, theta, grad, memory, Pace(size, longest))
        norm = torch.where(norm < 0, grad.norm(dim=-1), norm)
        return moved, norm, length_of(moved - theta, longest), size, longest, *memory

    def run(
        self,
        energy: Energy,
        start: Tensor,
        *,
        every: int | None = None,
        first_order: bool = False,
    ) -> Path:
        """The steps themselves, differentiable in `start` and the energy while grad is enabled.

        Args:
            energy: of `[T, D]`.
            start: `[T, D]`.
            every: keep θ only at each so many steps for the way back, and compute the others again.
            first_order: take the gradients, and the steps made of them, as constants.
        """
        theta, memory = start, self.begin(start.detach())
        goal = start_norm = torch.zeros_like(start[:, 0].detach())
        iterations = torch.zeros(len(start), dtype=torch.long, device=start.device)
        if self.tolerance == 0:
            iterations = iterations + self.max_iterations
        gradients, reached, done = 0, 0, False
        pace, cut = self.pace(energy), None
        if first_order:
            size = pace.size.detach() if isinstance(pace.size, Tensor) else pace.size
            pace = Pace(size, None if pace.longest is None else pace.longest.detach())
        stride = every or self.max_iterations

        def segment(begin: int, theta: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
            nonlocal start_norm, goal, iterations, gradients, reached, done, cut
            for count in range(begin, min(begin + stride, self.max_iterations)):
                grad = energy.gradient(theta.detach() if first_order else theta)
                grad = grad.detach() if first_order else grad
                again = count < reached  # computed again on the way back
                gradients, reached = gradients + 1, max(reached, count + 1)
                moved, memory = self.move(count, theta, grad, memory, pace)
                if count == 0:
                    start_norm = grad.detach().norm(dim=-1)
                    goal = goal_norm(start_norm, self.tolerance, grad.dtype)
                if self.tolerance == 0:
                    if count == self.max_iterations - 1 and pace.longest is not None:
                        step = moved.detach() - theta.detach()
                        cut = length_of(step, pace.longest.detach()) > _CUT
                    theta = moved
                    continue
                norm = grad.detach().norm(dim=-1)
                active = norm > goal
                if not bool(active.any()):
                    done = True
                    break
                theta = torch.where(active[:, None], moved, theta)
                if not again:
                    iterations = iterations + active
            return theta, *memory

        for begin in range(0, self.max_iterations, stride):
            if every is None or not torch.is_grad_enabled():
                theta, *rest = segment(begin, theta, *memory)
            else:
                theta, *rest = checkpoint(
                    segment,
                    begin,
                    theta,
                    *memory,
                    use_reentrant=False,
                    early_stop=False,
                    preserve_rng_state=False,  # a step draws nothing
                )
            memory = tuple(rest)
            if done:
                break
        return Path(theta, start_norm, goal, iterations, gradients, cut)


@dataclass(frozen=True, eq=False)
class GradientDescent(FirstOrder):
    """Gradient descent by the mean over a task's rows, with heavy-ball momentum if asked for.

    A step is −step_size · ∇E/n, n the number of the task's rows, so that a task with more of them
    takes no longer steps; the minimum is that of E. Papers that average their loss (MAML, iMAML)
    give such step sizes, and their λ is then Λ/n. A task without rows counts as one row, and so
    does an energy that knows no rows (a bare function).

    Attributes:
        step_size: one number, or `[D]`; units of θ² per nat; below 2 over the largest curvature of
            E/n (of E, with the sum).
        max_iterations: cap on the steps (the iMAML paper uses 16).
        tolerance: see `FirstOrder`; 0 for exactly `max_iterations` steps.
        momentum: share of the last step that is taken again (Polyak 1964), in [0, 1).
        precision: see `FirstOrder`.
        reduction: `"mean"` over rows, or `"sum"`: steps of −step_size · ∇E.
        in_prior_units: step in θ/s, s the prior's standard deviations: −step_size · s² · ∇E/n. The
            step size is then a pure number, and the units of θ do not matter. Plain steps, as in
            the papers, are the default.
        clip: see `FirstOrder`.

    Raises:
        ValueError: a field out of its range; steps in prior units, and the energy has no prior.
    """

    step_size: Positive | Tensor
    max_iterations: Count = 16
    tolerance: Tolerance | None = None
    momentum: Annotated[float, Within(0, 1, below=True)] = 0.0
    precision: Precision = "full"
    reduction: Literal["mean", "sum"] = "mean"
    in_prior_units: bool = False
    clip: Clip | None = 1.0

    @property
    def uniform(self) -> bool:
        """See `FirstOrder`; step sizes in a tensor may be learned."""
        return not isinstance(self.step_size, Tensor)

    def begin(self, theta: Tensor) -> Memory:
        """The last step, if there is momentum."""
        return (torch.zeros_like(theta),) if self.momentum else ()

    def size(self, energy: Energy) -> float | Tensor:
        """See `FirstOrder.size`: `[D]` for one number of rows, `[T, 1]` or `[T, D]` for each."""
        size = self.step_size
        if self.in_prior_units:
            unit = getattr(energy, "unit", None)
            if unit is None:
                raise ValueError(
                    "in_prior_units=True needs an energy that knows its prior, and this one has "
                    "none: leave in_prior_units False"
                )
            size = size * unit**2
        rows = getattr(energy, "rows", None)
        return size if rows is None or self.reduction == "sum" else size / rows[:, None]

    def move(
        self, count: int, theta: Tensor, grad: Tensor, memory: Memory, pace: Pace
    ) -> tuple[Tensor, Memory]:
        """See `FirstOrder.move`."""
        if pace.longest is None and isinstance(pace.size, float) and not self.momentum:
            return torch.sub(theta, grad, alpha=pace.size), ()
        step = pace.size * grad
        if not self.momentum:
            return theta - pace.bounded(step), ()
        step = pace.bounded(self.momentum * memory[0] - step)
        return theta + step, (step,)


@dataclass(frozen=True, eq=False)
class ProximalDescent(GradientDescent):
    """Gradient descent on f that takes the prior's pull implicitly, so that no scale is too small.

    θ⁺ = argmin_t ∇f(θ)ᵀt/n + ½‖t − θ‖²/η + ½(t − θ0)ᵀΛ(t − θ0)/n, the proximal gradient step
    (Parikh & Boyd, 2014, Proximal Algorithms, section 4.2) on E/n, E = f + ½‖θ − θ0‖²_Λ and n the
    number of the task's rows (1 with `reduction="sum"`). For a diagonal Λ it is a gradient step on
    E of size 1/(n/η + λ_j) in coordinate j: a bare step of size η on the sum diverges where a scale
    is below √(η/2), and a scale that is learned can become so small. (Of a low-rank Λ the diagonal
    part alone is taken implicitly, which is at least as much.) Without a prior in the energy it is
    gradient descent.

    Attributes:
        step_size: η, units of θ² per nat; below 2 over the largest curvature of f/n, whatever Λ is.

    The other attributes are those of `GradientDescent`.
    """

    def size(self, energy: Energy) -> float | Tensor:
        """See `FirstOrder.size`; differentiable in the scales."""
        size, prior = super().size(energy), getattr(energy, "prior", None)
        return size if prior is None else 1 / (1 / size + prior.scale**-2)


@dataclass(frozen=True, eq=False)
class Adam(FirstOrder):
    """Adam (Kingma & Ba 2015): steps of about `step_size` whatever the scale of the gradient.

    By the mean over rows or by their sum they are the same steps, but for `eps`.

    Attributes:
        step_size: units of θ.
        max_iterations: cap on the steps.
        tolerance: see `FirstOrder`; 0 for exactly `max_iterations` steps.
        betas: decay of the averages of the gradient and of its square.
        eps: nats per unit of θ; keeps the derivative of an unrolled run finite where a gradient
            vanishes.
        precision: see `FirstOrder`.
        clip: see `FirstOrder`.
    """

    step_size: Positive | Tensor = 0.1
    max_iterations: Count = 100
    tolerance: Tolerance | None = None
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    precision: Precision = "full"
    clip: Clip | None = 1.0

    def begin(self, theta: Tensor) -> Memory:
        """Averages of the gradient and of its square."""
        return torch.zeros_like(theta), torch.zeros_like(theta)

    def move(
        self, count: int, theta: Tensor, grad: Tensor, memory: Memory, pace: Pace
    ) -> tuple[Tensor, Memory]:
        """See `FirstOrder.move`."""
        (first, second), (a, b) = memory, self.betas
        first = a * first + (1 - a) * grad
        second = b * second + (1 - b) * grad**2
        # eps² inside the root: its derivative at 0 must be finite for an unrolled run.
        size = (second / (1 - b ** (count + 1)) + self.eps**2).sqrt()
        # At rest, as a task without rows is at θ0, a slope of 1/eps in each step would be raised to
        # the power of their number, and what cancels in theory would drown all other tasks.
        size = torch.where(second > 0, size, 1.0)
        step = pace.size * (first / (1 - a ** (count + 1))) / size
        return theta - pace.bounded(step), (first, second)


def led_away(energy: Energy, start: Tensor, path: Path, norm: Tensor) -> Tensor:
    """For which tasks a fixed budget's steps led away from a minimum, `[T]` bool.

    That is where θ is not finite, is more than a thousand standard deviations of the prior from its
    start, or has a larger gradient there, of norm `norm` `[T]`, than at the start (beyond a nat per
    standard deviation: at a start that is a minimum already any gradient is larger).
    """
    with torch.no_grad():
        unit = getattr(energy, "unit", None)
        unit = torch.ones_like(start[0]) if unit is None else unit
        far = ((path.theta - start) / unit).abs().amax(-1)
        steeper = norm <= path.start_norm + 1 / unit.amin()
        return ~((far <= _FAR) & steeper & norm.isfinite())


@contextmanager
def _products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products of this precision within; PyTorch's settings are left as found."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif precision == "tf32" and device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield


def goal_norm(norm: Tensor, tolerance: float | None, dtype: torch.dtype) -> Tensor:
    """The gradient norm `[T]` at which a task has converged, from that at the start."""
    relative = default_tolerance(dtype) if tolerance is None else tolerance
    floor = torch.finfo(dtype).eps
    if 0 < relative < floor:
        raise ValueError(
            f"tolerance is {relative:g}, and {dtype} has a precision of {floor:g}: raise it, leave "
            "it None, or use float64 data"
        )
    return relative * (1 + norm)
