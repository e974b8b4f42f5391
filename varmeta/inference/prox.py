"""prox: the one differentiable operation, θ_i* = argmin E_i(θ), with its implicit derivative.

At a stationary point ∇E(θ*, φ) = 0 the implicit function theorem gives, for everything φ that the
energy depends on (θ0, scales, shared parameters), dθ*/dφ = −(∇²E)⁻¹ ∂∇E/∂φ. For
E = f + ½(θ−θ0)ᵀΛ(θ−θ0) and φ = θ0 this is (H+Λ)⁻¹Λ (Rajeswaran, Finn, Kakade & Levine, 2019,
Meta-Learning with Implicit Gradients, eq. 6; for one dimension and λ = 1 the 1/(1+f″) of Huszár,
inference.vc, 2019). It needs products with the Hessian only, and no memory for the inner steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from varmeta.inference.linear import CG, MatVec
from varmeta.inference.minimise import Energy, Minimiser, Minimum, NewtonCG


@dataclass(eq=False)
class ProxInfo:
    """How far the implicit gradient can be trusted, per task.

    Attributes:
        grad_norm: `[T]`, ‖∇E‖ at θ*, nats per unit; the derivative is as exact as this is small.
        converged: `[T]` bool, the inner minimiser reached its tolerance.
        iterations: `[T]` int, inner iterations.
        residual: `[T]`, relative residual of the adjoint's linear solve; NaN before backward ran.
        negative_curvature: `[T]` bool, the solve met a direction of negative curvature: θ* is no
            minimum; False before backward ran.
        gradients: gradient evaluations so far, a Hessian-vector product counted as two.
    """

    grad_norm: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor
    negative_curvature: Tensor
    gradients: int


class Adjoint(Protocol):
    """How θ* is differentiated: attach a derivative to a minimum that was found without one."""

    def attach(self, energy: Energy, minimum: Minimum, info: ProxInfo) -> Tensor:
        """θ* `[T, D]` with the minimum's value and this adjoint's derivative."""
        ...


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem, one batched linear solve in the backward pass.

    Attributes:
        solver: for (∇²E)x = v; the default runs to convergence, `CG(max_iterations=5)` is the
            paper's budget.
    """

    solver: CG = field(default_factory=CG)

    def attach(self, energy: Energy, minimum: Minimum, info: ProxInfo) -> Tensor:
        """See `Adjoint.attach`."""
        leaf = minimum.theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=True)
        if not grad.requires_grad:
            return minimum.theta
        info.gradients += 1

        def matvec(v: Tensor) -> Tensor:
            return torch.autograd.grad(grad, leaf, v, retain_graph=True)[0]

        correction: Tensor = _ImplicitCorrection.apply(grad, matvec, self.solver, info)
        return minimum.theta + correction


def prox(
    energy: Energy,
    start: Tensor,
    *,
    minimiser: Minimiser | None = None,
    adjoint: Adjoint | None = None,
) -> tuple[Tensor, ProxInfo]:
    """θ_i* = argmin E_i from `start`, differentiable in every tensor that the energy closes over.

    Use ordinary autograd on the result (`torch.autograd.grad`, `backward`), not `torch.func.grad`,
    and first derivatives only.

    Args:
        energy: `[T, D]` to `[T]` nats, row i depending on θ_i alone.
        start: `[T, D]`, where the minimiser begins; the result does not depend on it except
            through the minimum that is found.
        minimiser: default `NewtonCG()`.
        adjoint: default `Implicit()`.

    Returns:
        θ* `[T, D]` and a `ProxInfo`, whose residual is filled in when backward has run.

    Example:
        >>> import torch
        >>> anchor = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
        >>> def energy(theta):  # f(θ) = θ², so f″ = 2, and λ = 1
        ...     return (theta**2 + 0.5 * (theta - anchor) ** 2).sum(-1)
        >>> theta, info = prox(energy, anchor)
        >>> theta.item(), torch.autograd.grad(theta.sum(), anchor)[0].item()  # 1/(1+2)
        (1.0, 0.3333333333333333)
    """
    minimum = (minimiser or NewtonCG()).minimise(energy, start)
    info = ProxInfo(
        grad_norm=minimum.grad_norm,
        converged=minimum.converged,
        iterations=minimum.iterations,
        residual=torch.full_like(minimum.grad_norm, float("nan")),
        negative_curvature=torch.zeros_like(minimum.converged),
        gradients=minimum.gradients,
    )
    if not torch.is_grad_enabled():
        return minimum.theta, info
    return (adjoint or Implicit()).attach(energy, minimum, info), info


class _ImplicitCorrection(torch.autograd.Function):
    """−(∇²E)⁻¹ ∇E(θ*): zero in value, since ∇E(θ*) = 0, but not in derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, matvec: MatVec, solver: CG, info: ProxInfo) -> Tensor:
        ctx.matvec, ctx.solver, ctx.info = matvec, solver, info
        return torch.zeros_like(grad)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "prox has a first derivative only: a second one (create_graph=True) would silently "
                "lack the change of the Hessian"
            )
        solution = ctx.solver.solve(ctx.matvec, v[0])
        ctx.info.residual = solution.residual
        ctx.info.negative_curvature = solution.negative_curvature
        ctx.info.gradients += 2 * solution.products
        return -solution.x, None, None, None
