"""Batched matrix-free linear solvers: A_i x_i = b_i for all tasks at once.

Here are conjugate gradients, the Neumann series and dense Cholesky; `minres.py` has MINRES and
`nystrom.py` the Nyström approximation, a solver and a preconditioner for `CG`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from varmeta.checked import Checked, Within
from varmeta.models.prior import GaussianPrior
from varmeta.models.programs import Derivative

MatVec = Callable[[Tensor], Tensor]


Iterations = Annotated[int, Within(1, why="0 would return x = 0 whatever b is")]
SolveTolerance = Annotated[
    float,
    Within(
        0,
        why="leave it out for a default that fits the data type, or give 0 for exactly "
        "max_iterations iterations",
    ),
]


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found, per task.

    Attributes:
        x: `[T, D]`.
        residual: `[T]`, ‖b − Ax‖ / ‖b‖ (0 where b = 0). `CG` and `Neumann` carry it along in their
            recursion: the true one up to rounding, about ε‖A‖‖x‖/‖b‖. The others compute it. Above
            1, or not finite: x is worse than 0, the solver diverged.
        iterations: `[T]` int, iterations that went into the task, each one product with A.
        negative_curvature: `[T]` bool, evidence was met that A is not positive definite: a
            direction with pᵀAp ≤ 0. `CG` stops there and x is the last iterate before it; each
            solver says what it does. Without such evidence A may still be indefinite. For
            `Nystrom` it concerns H = A − ρI.
        products: batched products with A that were computed, those for a preconditioner or a final
            residual included.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    negative_curvature: Tensor
    products: int


class LinearSolver(Protocol):
    """Anything that solves A_i x_i = b_i for all tasks at once, from products with A alone."""

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """Solve for every task; tasks are independent.

        Args:
            matvec: v ↦ Av, `[T, D]` to `[T, D]`, linear and symmetric in each task.
            b: `[T, D]`.
            tolerance: `[T]`, relative residuals that override the solver's own, per task. Solvers
                of a fixed amount of work take it and ignore it.

        Raises:
            ValueError: b is not `[T, D]`, or a tolerance is out of reach for its data type.
        """
        ...


class Preconditioner(Protocol):
    """A cheap symmetric positive definite stand-in for A⁻¹."""

    def prepare(self, matvec: MatVec, b: Tensor) -> tuple[MatVec, int]:
        """The map v ↦ M⁻¹v, `[T, D]` to `[T, D]`, and the products with A that it cost."""
        ...


@runtime_checkable
class NeedsPrior(Protocol):
    """A solver or preconditioner that has to be told the prior in A = H + Λ."""

    def given(self, prior: GaussianPrior) -> Any:
        """The solver (or preconditioner) for this prior."""
        ...


@dataclass(frozen=True)
class CG(Checked):
    """Conjugate gradients for symmetric positive definite operators (Hestenes & Stiefel 1952).

    Each task stops on its own: at its tolerance, at the iteration cap, or where it meets negative
    curvature, which is reported and never damped away.

    Attributes:
        max_iterations: cap on the iterations, at least 1. A small number (the iMAML paper uses 5)
            gives a cheap approximation, whose residual is reported.
        tolerance: relative residual at which a task stops; None for ε^(2/3) of the data type
            (4e-11 in float64, 2e-5 in float32). 0: exactly `max_iterations` products, and the
            host never waits for the device, so that the solve can be traced and run
            asynchronously; a task that has converged to rounding (a recursive residual of ε²) or
            met negative curvature is kept as it is, and so is one that reached the tolerance
            given to `solve`.
        preconditioner: for example `Nystrom(rank, shift)`. Residual and tolerance stay those of
            the system as given. It must be positive definite: where rᵀM⁻¹r ≤ 0 the task stops.
    """

    max_iterations: Iterations = 100
    tolerance: SolveTolerance | None = None
    preconditioner: Preconditioner | NeedsPrior | None = None

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """See `LinearSolver.solve`."""
        goal = relative_goal(b, self.tolerance, tolerance)
        b, scale = unit_scale(b)
        x, r = 0 * b, b  # 0, but NaN where b is not finite
        inverse: MatVec = _identity
        products = 0
        if isinstance(self.preconditioner, NeedsPrior):
            raise ValueError(
                f"the preconditioner {self.preconditioner!r} has to be told the prior first: solve "
                "through prox on an energy that has one, or take Nystrom"
            )
        if self.preconditioner is not None:
            inverse, products = self.preconditioner.prepare(matvec, b)
        p = z = inverse(r)
        rr, rz = (r * r).sum(-1), (r * z).sum(-1)
        size = rr.sqrt()
        goal = goal * size
        negative = torch.zeros_like(rr, dtype=torch.bool)
        iterations = torch.zeros_like(rr, dtype=torch.long)
        active = (size > 0) & ~(rz <= 0)  # a NaN in M goes on, into x, and is seen there
        state: Sequence[Tensor] = (x, r, p, rr, rz, goal, active, negative, iterations)
        if self.tolerance == 0 and self.preconditioner is None and isinstance(matvec, Derivative):
            state = matvec.repeat(_conjugate_step, state, self.max_iterations)
            products = self.max_iterations
        else:
            step = partial(_conjugate_step, inverse=inverse)
            for _ in range(self.max_iterations):
                if self.tolerance != 0 and not bool(state[6].any()):  # none is active
                    break
                state = step(matvec, *state)
                products += 1
        x, _, _, rr, _, _, _, negative, iterations = state
        return Solution(x * scale, relative(rr.sqrt(), size), iterations, negative, products)


@dataclass(frozen=True)
class Neumann(Checked):
    """The Neumann series, x = α Σ_{k<K} (I − αA)^k b, cut off after K terms.

    It is K steps of Richardson's iteration from 0 (of gradient descent on ½xᵀAx − bᵀx), so that
    its error falls like ‖I − αA‖^K, and grows where that norm is above 1: the residual
    ‖(I − αA)^K b‖/‖b‖ then is above 1 or, after an overflow, not finite. As a hypergradient:
    Lorraine, Vicol & Duvenaud (2020, Optimizing Millions of Hyperparameters by Implicit
    Differentiation). One term, x = αb, is one-step differentiation (Bolte, Pauwels & Vaiter 2023,
    One-step differentiation of iterative algorithms): the derivative of the last of many gradient
    steps of size α.

    K products with A, the last of them for the residual alone, whatever the tolerance; the host
    never waits for the device. `negative_curvature` is reported where a term t = (I − αA)^k b has
    tᵀAt ≤ 0, and changes nothing else. `iterations` are the K terms (0 where b = 0).

    Attributes:
        terms: K, at least 1.
        step_size: α, above 0 and below 2/‖A‖ to converge; in units of 1/A (θ² per nat where A is
            the Hessian of an energy).
    """

    terms: Annotated[int, Within(1, why="1 is one-step differentiation")]
    step_size: Annotated[
        float,
        Within(
            0,
            above=True,
            why="the series converges below 2 over the largest eigenvalue of A, so give 1 over a "
            "bound on it",
        ),
    ]

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """See `LinearSolver.solve`; `tolerance` is ignored."""
        check_shape(b)
        b, scale = unit_scale(b)
        x, term, tt = 0 * b, b, (b * b).sum(-1)
        size, rounding = tt.sqrt(), torch.finfo(b.dtype).eps ** 4 * tt
        negative = torch.zeros_like(tt, dtype=torch.bool)
        for _ in range(self.terms):
            x = x + self.step_size * term
            product = matvec(term)
            # Below ε² of b the products of two terms may underflow: no evidence of anything.
            negative |= (tt > rounding) & ((term * product).sum(-1) <= 0)
            term = term - self.step_size * product
            tt = (term * term).sum(-1)
        iterations = self.terms * (size > 0).long()
        residual = relative(tt.sqrt(), size)
        return Solution(x * scale, residual, iterations, negative, self.terms)


@dataclass(frozen=True)
class Cholesky(Checked):
    """A dense solve for small D: D products with the unit vectors, then a Cholesky factor.

    The matrix is symmetrised, ½(A + Aᵀ). A task where the factor does not exist is not positive
    definite to rounding: `negative_curvature` is reported, and the task solved by its eigenvalues,
    leaving out those below Dε times the largest (so a singular system gets its least-squares
    solution of smallest norm). The residual is that of A as given, not symmetrised. `iterations`
    and products are D, whatever the tolerance; the host waits for the device once.

    Attributes:
        limit: largest D, at least 1: `[T, D, D]` numbers are held, three times over.
    """

    limit: Annotated[int, Within(1, why="it is the largest D to be solved densely")] = 500

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """See `LinearSolver.solve`; `tolerance` is ignored.

        Raises:
            ValueError: D is above `limit`.
        """
        check_shape(b)
        dim = b.shape[1]
        if dim > self.limit:
            raise ValueError(
                f"limit is {self.limit}, and b has D = {dim} coordinates: use CG(), which needs no "
                f"matrix, or allow a dense one with Cholesky(limit={dim})"
            )
        b, scale = unit_scale(b)
        matrix = columns(matvec, torch.eye(dim, dtype=b.dtype, device=b.device), b)
        finite = matrix.isfinite().all(-1).all(-1)[:, None]
        symmetric = torch.where(finite[..., None], 0.5 * (matrix + matrix.mT), 0.0)
        factor, info = torch.linalg.cholesky_ex(symmetric)
        negative = (info > 0) & finite[:, 0]
        x = torch.cholesky_solve(b[..., None], factor)[..., 0]
        if bool(negative.any()):
            x = torch.where(negative[:, None], _by_eigenvalues(symmetric, b), x)
        x = torch.where(finite, x, float("nan"))
        residual = relative(norm(b - (matrix @ x[..., None])[..., 0]), norm(b))
        iterations = torch.full_like(negative, dim, dtype=torch.long)
        return Solution(x * scale, residual, iterations, negative, dim)


def default_tolerance(dtype: torch.dtype) -> float:
    """ε^(2/3): about what a well conditioned problem reaches in this data type."""
    return torch.finfo(dtype).eps ** (2 / 3)


def columns(matvec: MatVec, basis: Tensor, b: Tensor) -> Tensor:
    """A times each column of `basis` `[D, K]` or `[T, D, K]`, one product each: `[T, D, K]`."""
    basis = basis.expand(len(b), -1, -1)
    products = [matvec(basis[..., k].contiguous()) for k in range(basis.shape[-1])]
    return torch.stack(products, -1) if products else torch.zeros_like(basis)


def norm(v: Tensor) -> Tensor:
    """‖v‖ of each row, `[T, D]` to `[T]`."""
    return (v * v).sum(-1).sqrt()


def relative(residual: Tensor, size: Tensor) -> Tensor:
    """Residual over ‖b‖, both `[T]`; 0 where both are 0."""
    return residual / torch.where(size == 0, 1.0, size)


def unit_scale(b: Tensor) -> tuple[Tensor, Tensor]:
    """b with entries of size 1 at most, and the powers of two `[T, 1]` that give b back.

    Squared norms then neither overflow nor underflow, whatever the unit of b, and not one bit of a
    solution changes otherwise.
    """
    total = b.abs().sum(-1, keepdim=True)
    exponent = torch.frexp(total).exponent - 1  # 2^exponent ≤ total: it is finite
    usable = total.isfinite() & (total > 0)
    scale = torch.ldexp(torch.ones_like(total), torch.where(usable, exponent, 0))
    return b / scale, scale


def relative_goal(b: Tensor, own: float | None, given: Tensor | None) -> Tensor:
    """Relative residual `[T]` at which each task stops: `given`, or else the solver's `own`.

    At least ε²: what the recursions subtract below it no longer shows in x, and squares of it may
    underflow.
    """
    check_shape(b)
    limits = torch.finfo(b.dtype)
    least = min(10 * limits.eps, default_tolerance(b.dtype))
    if given is None:
        value = default_tolerance(b.dtype) if own is None else own
        out_of_reach = 0 < value < least
        given = b.new_full((len(b),), value)
    elif own == 0:  # a look at the values would wait for the device
        out_of_reach = False
    else:
        low = (given < least) & (given != 0)
        out_of_reach = bool(low.any())
        value = float(given[low].min()) if out_of_reach else 0.0
    if out_of_reach:
        raise ValueError(
            f"tolerance is {value:.3g}, below what {b.dtype} can reach: give at least {least:.2g}, "
            "None for a default that fits the data type, or 0 for a fixed number of iterations"
        )
    return given.clamp(min=limits.eps**2)


def check_shape(b: Tensor) -> None:
    """b must be `[T, D]`."""
    if b.ndim != 2:
        raise ValueError(
            f"b must be [T, D], a row for each task, got the shape {list(b.shape)}; "
            "one system alone is b[None]"
        )


def _identity(v: Tensor) -> Tensor:
    return v


def _conjugate_step(
    matvec: MatVec,
    x: Tensor,
    r: Tensor,
    p: Tensor,
    rr: Tensor,
    rz: Tensor,
    goal: Tensor,
    active: Tensor,
    negative: Tensor,
    iterations: Tensor,
    inverse: MatVec = _identity,
) -> tuple[Tensor, ...]:
    """One iteration of `CG` for all tasks: its arguments after the product, one step on."""
    ap = matvec(p)
    curvature = torch.linalg.vecdot(p, ap)
    iterations = iterations + active
    negative = negative | (active & (curvature <= 0))
    active = active & ~negative
    # `where` and not a product with the mask: a stopped task may hold 0/0 here.
    alpha = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)[:, None]
    x, r = torch.addcmul(x, alpha, p), torch.addcmul(r, alpha, ap, value=-1)
    z = inverse(r)
    rr, new = torch.linalg.vecdot(r, r), torch.linalg.vecdot(r, z)
    beta = torch.where(active, new / torch.where(active, rz, 1.0), 0.0)[:, None]
    p = torch.addcmul(z, beta, p)
    active = active & (rr.sqrt() > goal) & ~(new <= 0)
    return x, r, p, rr, new, goal, active, negative, iterations


def _by_eigenvalues(matrix: Tensor, b: Tensor) -> Tensor:
    """Least-squares solution of smallest norm of a symmetric, finite system."""
    values, vectors = torch.linalg.eigh(matrix)
    size = values.abs()
    floor = b.shape[1] * torch.finfo(b.dtype).eps * size.amax(-1, keepdim=True)
    kept = size > floor
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return (vectors @ (inverse[..., None] * (vectors.mT @ b[..., None])))[..., 0]
