"""prox: the one differentiable operation, θ_i* = argmin E_i(θ), with a choice of derivative.

At a stationary point ∇E(θ*, φ) = 0 the implicit function theorem gives, for everything φ that the
energy depends on (θ0, scales, shared parameters), dθ*/dφ = −(∇²E)⁻¹ ∂∇E/∂φ. For
E = f + ½(θ−θ0)ᵀΛ(θ−θ0) and φ = θ0 this is (H+Λ)⁻¹Λ (Rajeswaran, Finn, Kakade & Levine, 2019,
Meta-Learning with Implicit Gradients, eq. 6; for one dimension and λ = 1 the 1/(1+f″) of Huszár,
inference.vc, 2019). It needs products with the Hessian only, and no memory for the inner steps.

Four adjoints: `Implicit` solves for this derivative, `OneStep` takes one step for the solve,
`Unrolled` differentiates the minimiser's own steps, `Detached` has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from varmeta.checked import Checked, Count, Positive
from varmeta.inference.approximate import bound
from varmeta.inference.energy import Energy, as_energy
from varmeta.inference.linear import CG, Cholesky, LinearSolver, MatVec, NeedsPrior
from varmeta.inference.minimise import FirstOrder, Minimiser, Minimum, led_away
from varmeta.inference.minres import MINRES
from varmeta.inference.newton import Curvature, NewtonCG
from varmeta.models.programs import Linearised


@dataclass(eq=False)
class ProxInfo:
    """How far the derivative can be trusted, per task.

    Attributes:
        grad_norm: `[T]`, ‖∇E‖ at θ*, nats per unit; an implicit derivative is as exact as this is
            small.
        reduction: `[T]`, ‖∇E(θ*)‖ over 1 + ‖∇E(start)‖: what is compared with a tolerance.
        converged: `[T]` bool, the inner minimiser reached its tolerance; None if it has none.
        iterations: `[T]` int, inner iterations.
        residual: `[T]`, relative residual of the adjoint's linear solve; None before backward ran,
            and where nothing is solved.
        negative_curvature: `[T]` bool, the solve met a direction of negative curvature: θ* is no
            minimum; False before backward ran.
        gradients: gradient evaluations so far, a Hessian-vector product counted as two.
        minimum: `[T, D]`, θ* without its derivative.
        cut: `[T]` bool, the last step of a fixed inner budget was shortened to the longest allowed
            (`FirstOrder.clip`); None where none can be.
        diverged: `[T]` bool, a fixed inner budget led away from a minimum
            (`varmeta.inference.minimise.led_away`); None with a tolerance.
    """

    grad_norm: Tensor
    reduction: Tensor
    converged: Tensor | None
    iterations: Tensor
    residual: Tensor | None
    negative_curvature: Tensor
    gradients: int
    minimum: Tensor
    cut: Tensor | None = None
    diverged: Tensor | None = None

    def stats(self) -> dict[str, Tensor]:
        """The diagnostics by name, `[T]` each, without those that were never computed."""
        out = {
            "grad_norm": self.grad_norm,
            "grad_reduction": self.reduction,
            "iterations": self.iterations,
            "negative_curvature": self.negative_curvature,
        }
        if self.converged is not None:
            out["converged"] = self.converged
        for name in ("residual", "cut", "diverged"):
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        return out

    @classmethod
    def of(cls, minimum: Minimum) -> ProxInfo:
        """Before any backward pass."""
        return cls(
            grad_norm=minimum.grad_norm,
            reduction=minimum.grad_norm / (1 + minimum.start_norm),
            converged=minimum.converged,
            iterations=minimum.iterations,
            residual=None,
            negative_curvature=torch.zeros_like(minimum.grad_norm, dtype=torch.bool),
            gradients=minimum.gradients,
            minimum=minimum.theta.detach(),
            cut=minimum.cut,
            diverged=minimum.diverged,
        )


class Adjoint(Protocol):
    """How θ* is differentiated."""

    def solve(self, energy: Energy, start: Tensor, minimiser: Minimiser) -> tuple[Tensor, ProxInfo]:
        """θ* `[T, D]` with this adjoint's derivative."""
        ...


@dataclass(frozen=True)
class Implicit(Checked):
    """The implicit function theorem, one batched linear solve in the backward pass.

    Attributes:
        solver: for (∇²E)x = v; the default runs to convergence, `CG(max_iterations=5, tolerance=0)`
            is the paper's budget. `BlockDiagonal`, `Diagonal` and `PriorDominated` are cheaper
            stand-ins that know the prior.
        curvature: `"hessian"`, or `"gauss_newton"`: the part of ∇²E without the model's own second
            derivatives. It is positive definite where −log p(y | z) is convex in the parameters z
            of the rows' law (a normal mean, logits), also where θ* is no minimum; exact where
            the model is linear in θ or fits without residuals.
    """

    solver: LinearSolver | NeedsPrior = field(default_factory=CG)
    curvature: Curvature = "hessian"

    def solve(self, energy: Energy, start: Tensor, minimiser: Minimiser) -> tuple[Tensor, ProxInfo]:
        """See `Adjoint.solve`."""
        minimum = minimiser.minimise(energy, start)
        info = ProxInfo.of(minimum)
        return minimum.theta + self.correction(energy, minimum.theta, minimum.at, info), info

    def correction(self, energy: Energy, theta: Tensor, at: Linearised, info: ProxInfo) -> Tensor:
        """0 `[T, D]`, with the derivative of a minimum at θ `[T, D]` that was found somehow.

        Args:
            energy: that has the minimum.
            theta: without a derivative of its own.
            at: `energy.linearise(theta)`.
            info: what the solve is to be noted in, when backward has run.
        """
        if not at.grad.requires_grad:
            return torch.zeros_like(theta)
        product = at.product
        if self.curvature == "gauss_newton":
            product = energy.linearise(theta, gauss_newton=True).product
            info.gradients += 1
        solver = bound(self.solver, energy)
        correction: Tensor = _ImplicitCorrection.apply(at.grad, product, solver, info)
        return correction


@dataclass(frozen=True)
class OneStep(Checked):
    """One gradient step from θ*, differentiated: (∇²E)⁻¹ is taken to be step_size · I.

    (Bolte, Pauwels & Vaiter, 2023, One-step differentiation of iterative algorithms.) Costs one
    product and no solve; its relative error is at most ‖I − step_size ∇²E‖, which is small only
    where the problem is well conditioned.

    Attributes:
        step_size: units of θ² per nat; the best is 2 over the sum of ∇²E's extreme eigenvalues.
    """

    step_size: Positive

    def solve(self, energy: Energy, start: Tensor, minimiser: Minimiser) -> tuple[Tensor, ProxInfo]:
        """See `Adjoint.solve`."""
        minimum = minimiser.minimise(energy, start)
        grad, info = minimum.at.grad, ProxInfo.of(minimum)
        step = self.step_size * (grad - grad.detach())

        def spend(_: Tensor) -> None:
            info.gradients += 2  # the pullback, a product with second derivatives

        if step.requires_grad:
            step.register_hook(spend)
        return minimum.theta - step, info


@dataclass(frozen=True)
class Unrolled(Checked):
    """Differentiate the minimiser's own steps, through `start` as well: MAML's derivative.

    Exact for the algorithm as run, converged or not. Memory grows with the number of steps: for a
    model one θ `[T, D]` for each, and the step where it may be cut (`FirstOrder.clip`); for any
    other function its activations too.

    Attributes:
        checkpoint: keep only every so many-th step and compute the others again on the way back;
            a bare function (not a model) is then evaluated many times over.
        first_order: take the gradients as constants, so that the derivative in `start` is the
            identity (FOMAML) and nothing is kept.
    """

    checkpoint: Count | None = None
    first_order: bool = False

    def solve(self, energy: Energy, start: Tensor, minimiser: Minimiser) -> tuple[Tensor, ProxInfo]:
        """See `Adjoint.solve`.

        Raises:
            ValueError: a minimiser with a line search, whose steps have no derivative, or of less
                than full precision.
        """
        if not isinstance(minimiser, FirstOrder):
            raise ValueError(
                f"minimiser is {type(minimiser).__name__}, whose steps are chosen by a line search "
                "and cannot be unrolled: use GradientDescent or Adam, or the adjoint Implicit"
            )
        if minimiser.precision != "full":
            raise ValueError(
                f"precision is {minimiser.precision!r}, and unrolled steps are differentiated at "
                "full precision: leave it 'full', or use the adjoint Implicit"
            )
        path = minimiser.run(energy, start, every=self.checkpoint, first_order=self.first_order)
        with torch.no_grad():
            norm = energy.gradient(path.theta.detach()).norm(dim=-1)
        # On the way back each step is one product and one gradient again.
        gradients = path.gradients * (1 if self.first_order else 3) + 1
        fixed = minimiser.tolerance == 0
        info = ProxInfo(
            grad_norm=norm,
            reduction=norm / (1 + path.start_norm),
            converged=None if fixed else norm <= path.goal,
            iterations=path.iterations,
            residual=None,
            negative_curvature=torch.zeros_like(norm, dtype=torch.bool),
            gradients=gradients,
            minimum=path.theta.detach(),
            cut=path.cut,
            diverged=led_away(energy, start.detach(), path, norm) if fixed else None,
        )
        return path.theta, info


@dataclass(frozen=True)
class Detached(Checked):
    """No derivative at all: for Reptile, and for losses whose derivative is known otherwise."""

    def solve(self, energy: Energy, start: Tensor, minimiser: Minimiser) -> tuple[Tensor, ProxInfo]:
        """See `Adjoint.solve`."""
        minimum = minimiser.minimise(energy, start)
        return minimum.theta, ProxInfo.of(minimum)


def is_exact(minimiser: Minimiser, adjoint: Adjoint) -> bool:
    """Whether the derivative is that of the result, up to tolerances: no budget, no stand-in."""
    if isinstance(adjoint, Unrolled):
        return not adjoint.first_order
    if not isinstance(adjoint, Implicit) or adjoint.curvature != "hessian":
        return False
    budgets = [getattr(part, "tolerance", None) for part in (minimiser, adjoint.solver)]
    return isinstance(adjoint.solver, CG | MINRES | Cholesky) and 0 not in budgets


def prox(
    energy: Energy | Callable[[Tensor], Tensor],
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
        start: `[T, D]`, where the minimiser begins. It has a derivative with `Unrolled` alone; else
            the result does not depend on it except through the minimum that is found.
        minimiser: default `NewtonCG()`.
        adjoint: default `Implicit()`.

    Returns:
        θ* `[T, D]` and a `ProxInfo`, whose residual is filled in when backward has run.

    Raises:
        ValueError: a start, or a value of the energy, of another shape.

    Example:
        >>> import torch
        >>> anchor = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
        >>> def energy(theta):  # f(θ) = θ², so f″ = 2, and λ = 1
        ...     return (theta**2 + 0.5 * (theta - anchor) ** 2).sum(-1)
        >>> theta, info = prox(energy, anchor)
        >>> theta.item(), torch.autograd.grad(theta.sum(), anchor)[0].item()  # 1/(1+2)
        (1.0, 0.3333333333333333)
    """
    if not isinstance(start, Tensor) or start.dim() != 2 or not start.is_floating_point():
        got = f"{start.dtype} of shape {list(start.shape)}" if isinstance(start, Tensor) else start
        raise ValueError(
            f"start must be a floating tensor [T, D], a row for each task, got {got!r}; one task "
            "alone is start[None]"
        )
    energy, minimiser = as_energy(energy), minimiser or NewtonCG()
    if not torch.is_grad_enabled():
        adjoint = Detached()
    return (adjoint or Implicit()).solve(energy, start, minimiser)


class _ImplicitCorrection(torch.autograd.Function):
    """−(∇²E)⁻¹ ∇E(θ*): zero in value, since ∇E(θ*) = 0, but not in derivative."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, matvec: MatVec, solver: LinearSolver, info: ProxInfo
    ) -> Tensor:
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
        info, residual = ctx.info, solution.residual
        if info.residual is not None:  # two blocks may have a solve each: the worse one counts
            residual = torch.maximum(residual, info.residual)
        info.residual = residual
        info.negative_curvature = info.negative_curvature | solution.negative_curvature
        info.gradients += 2 * solution.products + 2  # and the pullback
        return -solution.x, None, None, None
