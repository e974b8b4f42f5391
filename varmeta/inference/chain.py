"""A random algorithm at work on some tasks: its steps, and the derivative of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.inference.descent import RandomDescent
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.noise import Noise
from varmeta.inference.pilot import curvature_at_rest
from varmeta.inference.point import Point
from varmeta.models.density import Density
from varmeta.models.derivatives import twice_differentiable
from varmeta.tasks import Tasks

Pull = Callable[..., tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Chain:
    """`particles` runs of an algorithm for each of T tasks.

    Everything here that depends on prior and φ takes x, the `Point`'s vector, `[..., n]`: one for
    all runs, or `[S, T, n]`, one for each.

    Attributes:
        algorithm: what a step does.
        density: the model; f_i is the sum over all rows of `tasks`.
        point: θ0, scales and φ.
        tasks: T tasks.
        particles: S.
        seed: of all random numbers.
        antithetic: runs come in pairs s and s + S/2 with opposite normal numbers.
        gradients: gradient evaluations so far of each task's loss, a Hessian-vector product counted
            as two.

    Raises:
        ValueError: an odd number of antithetic particles; no step size where θ is long.
    """

    algorithm: RandomDescent
    density: Density
    point: Point
    tasks: Tasks
    particles: int
    seed: int
    antithetic: bool = False
    gradients: int = 0

    def __post_init__(self) -> None:
        if self.antithetic and self.particles % 2:
            raise ValueError(f"antithetic particles come in pairs, got {self.particles}")

    # -- running ----------------------------------------------------------------------------------

    def start(self, x: Tensor | None = None) -> Tensor:
        """x_0, `[S, T, D]`, differentiable in x."""
        prior, _ = self.point.moved(self._x(x))
        start, spread = prior.loc, self.algorithm.start_scale
        if spread:
            start = start + spread * prior.scale * self.noise.start()
        return start.expand(self.particles, len(self.tasks), -1)

    def start_pull(self, v: Tensor) -> Tensor:
        """vᵀ dx_0/dx for each run, `[S, T, D]` to `[S, T, n]`."""
        with torch.enable_grad():
            x = self.spread_out()
            return torch.autograd.grad(self.start(x), x, v)[0]

    def path(self, count: int, thin: int) -> Tensor:
        """`count` states of each run, `thin` steps apart, from its end on: `[S, count, T, D]`."""
        theta = before = self.start().detach()
        kept = []
        for t in range(self.algorithm.run_length + (count - 1) * thin):
            theta, before = self.step(t, theta, before)
            past = t + 1 - self.algorithm.run_length
            if past >= 0 and past % thin == 0:
                kept.append(theta)
        return torch.stack(kept, dim=1)

    def step(
        self, t: int, theta: Tensor, before: Tensor, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_{t+1} and x_t from x_t and x_{t−1}, `[S, T, D]` each; nothing is differentiated."""
        with torch.no_grad():
            mean, _ = self._mean(t, theta, before, self._slope(t, theta, self._x(x)))
            return mean + self.shock(t), theta

    def run(self, x: Tensor | None = None) -> Tensor:
        """The ends x_K, `[S, T, D]`, without history."""
        theta = before = self.start(x).detach()
        for t in range(self.algorithm.run_length):
            theta, before = self.step(t, theta, before, x)
        return theta

    def shock(self, t: int) -> Tensor:
        """σ_t R ξ_t, `[S, T, D]`."""
        if self.sigma(t) == 0:
            return self.point.prior.loc.new_zeros(())
        return self.sigma(t) * self.root(self.noise.normal(t))

    def sigma(self, t: int) -> float:
        """σ_t = √(2τ_tη_t)."""
        schedule = self.algorithm.temperatures
        return float((2 * schedule[min(t, len(schedule) - 1)] * self.pace(t)) ** 0.5)

    def pace(self, t: int) -> float:
        """η_t: P_t = η_t R Rᵀ."""
        paces = self.algorithm.paces
        return paces[min(t, len(paces) - 1)]

    # -- derivatives ------------------------------------------------------------------------------

    def linear(self, t: int, theta: Tensor, before: Tensor, *, curved: bool) -> Slope:
        """The mean of step t as a function of x_t and x, linearised; x_{t−1} acts by −μ.

        A coordinate whose move is clipped stays where it is but for a constant. Without `curved`
        nothing is known of its dependence on x_t, and no second derivative taken.
        """
        grad, pull = self.slope(theta, t=t, curved=curved)
        mean, free = self._mean(t, theta, before, grad)
        momentum, pace = self.algorithm.momentum, self.pace(t)

        def back(v: Tensor) -> tuple[Tensor, Tensor]:
            v_free = v if free is None else torch.where(free, v, 0.0)
            along, rest = pull(-pace * self.root(self.root.T(v_free)))
            if free is not None:  # no derivative, be that of the loss too large for a number
                none = ~free.any(-1, keepdim=True)
                along, rest = along.masked_fill(none, 0.0), rest.masked_fill(none, 0.0)
            return (1 + momentum) * v + along, rest

        return Slope(mean, back)

    def slope(self, theta: Tensor, *, t: int | None = None, curved: bool = True) -> Slope:
        """∇E_i at θ `[S, T, D]`, with the rows of step t, or all of them.

        Without `curved` its product with ∂/∂θ is 0.
        """
        with torch.enable_grad():
            x = self.spread_out()
            prior, shared = self.point.moved(x)
            leaf = theta.detach().requires_grad_()
            second = curved or self.density.shared_dim > 0
            likelihood = self._likelihood_slope(t, leaf, shared, second)
            grad = likelihood + prior.precision_mv(leaf - prior.loc)
        wanted = [leaf, x] if curved else [x]
        self.gradients += self.particles

        def pull(v: Tensor) -> tuple[Tensor, Tensor]:
            self.gradients += 2 * self.particles if second else 0
            with twice_differentiable():
                *along, rest = torch.autograd.grad(
                    grad, wanted, v, retain_graph=True, materialize_grads=True
                )
            return (along[0] if along else torch.zeros_like(v)), rest

        return Slope(grad.detach(), pull)

    def outside(self, loss: Loss, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g `[S, T]`, ∂g/∂θ `[S, T, D]` and ∂g/∂x `[S, T, n]` of a loss of (θ, φ)."""
        with torch.enable_grad():
            x = self.spread_out()
            leaf = theta.detach().requires_grad_()
            value = loss(leaf, self.point.moved(x)[1])
            along, rest = torch.autograd.grad(value.sum(), [leaf, x], materialize_grads=True)
        self.gradients += self.particles
        return value.detach(), along, rest

    def spread_out(self) -> Tensor:
        """x at this point, one leaf for each run, `[S, T, n]`."""
        x = self.point.zeros().expand(self.particles, len(self.tasks), -1)
        return x.clone().requires_grad_()

    # -- parts ------------------------------------------------------------------------------------

    @property
    def shared(self) -> Tensor:
        """φ `[P]`."""
        return self.point.shared

    @cached_property
    def noise(self) -> Noise:
        """Where the random numbers come from."""
        like = self.point.prior.loc
        return Noise(self.tasks, self.particles, like, self.algorithm, self.seed, self.antithetic)

    @cached_property
    def root(self) -> Root:
        """R, with P_t = η_t R Rᵀ."""
        prior, dim = self.point.prior, self.density.dim
        if self.algorithm.step_size is not None:
            return Root(self.algorithm.step_size**-0.5 * torch.ones_like(prior.loc))
        if dim > MAX_DIM:
            raise ValueError(
                f"step_size=None needs the dense curvature, and θ has {dim} coordinates "
                f"(limit {MAX_DIM}); give {type(self.algorithm).__name__} a step_size"
            )

        def energy(theta: Tensor) -> Tensor:
            loss = self.density.negative_log_likelihood(theta, self.tasks, self.shared)
            return loss + prior.penalty(theta)

        start = prior.loc.expand(len(self.tasks), -1)
        values, vectors, gradients, _ = curvature_at_rest(energy, start, prior.scale)
        self.gradients += gradients
        return Root(values.sqrt(), vectors, prior.scale)

    def _x(self, x: Tensor | None) -> Tensor:
        return self.point.zeros() if x is None else x

    def _mean(
        self, t: int, theta: Tensor, before: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The mean of x_{t+1}, and which coordinates' moves are within the bound (None: all)."""
        move, free = self.pace(t) * self.root(self.root.T(grad)), None
        if self.algorithm.clip is not None:
            bound = self.algorithm.clip * self.point.prior.scale
            free = move.abs() <= bound
            move = torch.maximum(torch.minimum(move, bound), -bound)
        mean = theta - move
        if self.algorithm.momentum:
            mean = mean + self.algorithm.momentum * (theta - before)
        return mean, free

    def _slope(self, t: int, theta: Tensor, x: Tensor) -> Tensor:
        self.gradients += self.particles
        prior, shared = self.point.moved(x)
        likelihood = self._likelihood_slope(t, theta, shared, False)
        return likelihood + prior.precision_mv(theta - prior.loc)

    def _likelihood_slope(
        self, t: int | None, theta: Tensor, shared: Tensor, create_graph: bool
    ) -> Tensor:
        weights = None if t is None else self.noise.row_weights(t)
        with torch.enable_grad():
            leaf = theta if create_graph else theta.detach().requires_grad_()
            rows = -self.density.log_likelihood(
                leaf, self.tasks, shared if create_graph else shared.detach()
            )
            total = rows.sum() if weights is None else (rows * weights).sum()
            return torch.autograd.grad(total, leaf, create_graph=create_graph)[0]


class Slope(NamedTuple):
    """A vector field at `[S, T, D]`, and its products from the left.

    Attributes:
        value: `[S, T, D]`.
        pull: v `[S, T, D]` to vᵀ∂value/∂θ `[S, T, D]` and vᵀ∂value/∂x `[S, T, n]`.
    """

    value: Tensor
    pull: Pull


@dataclass(frozen=True, eq=False)
class Root:
    """R = diag(u) V diag(1/s), applied to `[..., T, D]`.

    Attributes:
        s: `[D]` or `[T, D]`.
        vectors: V, `[T, D, D]`; None for I.
        unit: u, `[D]`, or 1.
    """

    s: Tensor
    vectors: Tensor | None = None
    unit: Tensor | float = 1.0

    def __call__(self, v: Tensor) -> Tensor:
        """Rv."""
        return self.unit * self._turn("tij,...tj->...ti", v / self.s)

    def T(self, v: Tensor) -> Tensor:
        """Rᵀv."""
        return self._turn("tji,...tj->...ti", self.unit * v) / self.s

    def inverse(self, v: Tensor) -> Tensor:
        """R⁻¹v."""
        return self._turn("tji,...tj->...ti", v / self.unit) * self.s

    def inverse_T(self, v: Tensor) -> Tensor:
        """R⁻ᵀv."""
        return self._turn("tij,...tj->...ti", v * self.s) / self.unit

    def _turn(self, how: str, v: Tensor) -> Tensor:
        return v if self.vectors is None else torch.einsum(how, self.vectors, v)
