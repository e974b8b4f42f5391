"""Batched matrix-free linear solvers: A_i x_i = b_i for all tasks at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found, per task.

    Attributes:
        x: `[T, D]`.
        residual: `[T]`, ‖b − Ax‖ / ‖b‖ (0 where b = 0), as the recursion carries it along: the true
            one up to rounding, about ε‖A‖‖x‖/‖b‖.
        iterations: `[T]` int, products with A used.
        negative_curvature: `[T]` bool, a direction with pᵀAp ≤ 0 was met, so that A is not
            positive definite and x is only the last iterate before it.
        products: batched products with A that were computed.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    negative_curvature: Tensor
    products: int


@dataclass(frozen=True)
class CG:
    """Conjugate gradients for symmetric positive definite operators (Hestenes & Stiefel 1952).

    Each task stops on its own: at its tolerance, at the iteration cap, or where it meets negative
    curvature, which is reported and never damped away.

    Attributes:
        max_iterations: cap on the products with A. A small number (the iMAML paper uses 5) gives a
            cheap approximation, whose residual is reported.
        tolerance: relative residual at which a task stops; None for ε^(2/3) of the data type
            (4e-11 in float64, 2e-5 in float32).
    """

    max_iterations: int = 100
    tolerance: float | None = None

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """Solve for b `[T, D]`; `tolerance` `[T]` overrides the field, per task."""
        if tolerance is None:
            relative = default_tolerance(b.dtype) if self.tolerance is None else self.tolerance
            tolerance = torch.full_like(b[:, 0], relative)
        x, r = 0 * b, b.clone()  # 0, but NaN where b is not finite
        p, rr = r, (r * r).sum(-1)
        size = rr.sqrt()
        goal = tolerance * size
        negative = torch.zeros_like(rr, dtype=torch.bool)
        iterations = torch.zeros_like(rr, dtype=torch.long)
        active = size > 0
        products = 0
        while products < self.max_iterations and bool(active.any()):
            ap = matvec(p)
            products += 1
            curvature = (p * ap).sum(-1)
            iterations += active
            negative |= active & (curvature <= 0)
            active = active & ~negative
            # `where` and not a product with the mask: a stopped task may hold 0/0 here.
            alpha = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)[:, None]
            x, r = x + alpha * p, r - alpha * ap
            new = (r * r).sum(-1)
            beta = torch.where(active, new / torch.where(rr > 0, rr, 1.0), 0.0)[:, None]
            p, rr = r + beta * p, new
            active = active & (rr.sqrt() > goal)
        residual = rr.sqrt() / torch.where(size == 0, 1.0, size)
        return Solution(x, residual, iterations, negative, products)


def default_tolerance(dtype: torch.dtype) -> float:
    """ε^(2/3): about what a well conditioned problem reaches in this data type."""
    return torch.finfo(dtype).eps ** (2 / 3)
