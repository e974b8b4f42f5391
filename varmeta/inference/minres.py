"""MINRES: the minimal residual method for symmetric systems that may be indefinite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.checked import Checked
from varmeta.inference.linear import (
    Iterations,
    MatVec,
    Solution,
    SolveTolerance,
    default_tolerance,
    norm,
    relative,
    relative_goal,
    unit_scale,
)


@dataclass(frozen=True)
class MINRES(Checked):
    """MINRES (Paige & Saunders 1975, Solution of Sparse Indefinite Systems of Linear Equations).

    For symmetric operators, positive definite or not: of all x in the Krylov space the one with
    the smallest ‖b − Ax‖, which therefore never grows. Each task stops on its own, at its
    tolerance or at the iteration cap.

    A singular system without a solution ends at a least-squares solution, where
    ‖Ar‖ ≤ ε^(2/3)‖A‖‖r‖; so does one of a condition number above ε^(-2/3), for which this data type
    is too short. Where rounding hides this (most often in single precision), x grows without
    bound, and the residual, above 1, says so.

    Negative curvature is reported and harmless: `negative_curvature` is set at the first iteration
    where the Lanczos matrix VᵀAV is not positive definite, which is where the residual r has
    rᵀAr ≤ 0 (Liu & Roosta 2022, MINRES: From Negative Curvature Detection to Monotonicity
    Properties), and MINRES goes on. A task that converges before its Krylov space
    meets such a direction is not marked.

    The recursion stops on its own estimate of the residual, which in an ill-conditioned system may
    fall below the true one by the rounding in x, up to ε times the squared condition number
    (Sleijpen, van der Vorst & Modersitzki 2000). The true one is reported: one more product, in
    `products` and not in `iterations`.

    Attributes:
        max_iterations: cap on the iterations, at least 1.
        tolerance: relative residual at which a task stops; None for ε^(2/3) of the data type
            (4e-11 in float64, 2e-5 in float32). 0: exactly `max_iterations` iterations, and the
            host never waits for the device; a task that has converged to rounding, or reached the
            tolerance given to `solve`, is kept as it is.
    """

    max_iterations: Iterations = 100
    tolerance: SolveTolerance | None = None

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """See `LinearSolver.solve`."""
        goal = relative_goal(b, self.tolerance, tolerance)
        b, scale = unit_scale(b)
        size = norm(b)
        goal = goal * size
        active = size > 0
        x = 0 * b  # 0, but NaN where b is not finite
        v = b / torch.where(active, size, 1.0)[:, None]
        old_v, w, old_w = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(v)
        # The Lanczos matrix VᵀAV = QR, column by column: α and β are its entries, cos and sin the
        # last reflection in Q; δ̄ and ε what that left in the next columns of R; φ̄ the residual.
        beta, cos, sin = torch.zeros_like(size), -torch.ones_like(size), torch.zeros_like(size)
        delta_bar, epsilon, phi_bar = beta, beta, size
        largest, nothing = beta, default_tolerance(b.dtype)  # ‖A‖ to a factor of 2 or so
        negative = torch.zeros_like(active)
        iterations = torch.zeros_like(size, dtype=torch.long)
        products = 0
        for _ in range(self.max_iterations):
            if self.tolerance != 0 and not bool(active.any()):
                break
            on = active[:, None]
            y, old_beta = matvec(v) - beta[:, None] * old_v, beta
            products += 1
            iterations += active
            alpha = (v * y).sum(-1)
            y = y - alpha[:, None] * v
            beta = norm(y)
            delta = cos * delta_bar + sin * alpha
            gamma_bar = sin * delta_bar - cos * alpha
            negative |= active & (cos * gamma_bar >= 0)  # rᵀAr = −cos · γ̄ · φ̄²
            # ‖Ar‖ = φ̄ · ‖(γ̄, cos · β)‖. Where it is nothing beside ‖A‖‖r‖, r lies in the null space
            # of A, x is a least-squares solution, and a step would divide by rounding.
            largest = torch.maximum(largest, torch.maximum(old_beta, alpha.abs()) + beta)
            singular = torch.hypot(gamma_bar, cos * beta) <= nothing * largest
            gamma = torch.where(singular, 1.0, torch.hypot(gamma_bar, beta))
            w, old_w = (v - epsilon[:, None] * old_w - delta[:, None] * w) / gamma[:, None], w
            epsilon, delta_bar = sin * beta, -cos * beta
            cos, sin = gamma_bar / gamma, beta / gamma
            x = torch.where(on & ~singular[:, None], x + (cos * phi_bar)[:, None] * w, x)
            phi_bar = torch.where(singular, phi_bar, sin * phi_bar)
            # A stopped task goes round with v = 0: its other numbers stay finite, and are unused.
            active = active & ~singular & (phi_bar > goal)
            old_v = v
            v = torch.where(active[:, None], y / torch.where(active, beta, 1.0)[:, None], 0.0)
        residual = relative(norm(b - matvec(x)), size)
        return Solution(x * scale, residual, iterations, negative, products + 1)
