"""Log-determinants of a task's curvature and their derivatives: the volume of Laplace's Gaussian.

At θ*, with H = ∇²f, Λ = Σ⁻¹ and A = H + Λ, Laplace's q is N(θ*, A⁻¹). With Σ = R Rᵀ everything is
computed in the prior's units, B = RᵀAR = I + RᵀHR, so that no unit of θ and no small scale spoils
the condition: log det B = log det A − log det Λ, and where the data say nothing B is I.

Small D: B itself and its eigenvalues. Large D: stochastic Lanczos quadrature (Ubaru, Chen & Saad,
2017, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature) for the value, and for the
derivative tr(A⁻¹ dA) ≈ mean_k (A⁻¹ Λ w_k)ᵀ dA w_k with probes w_k = R z_k (Hutchinson, 1990), one
solve each. Both go on through θ* and φ by third derivatives of f (`third.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from varmeta.checked import Checked, Within
from varmeta.inference.energy import FunctionEnergy, TaskEnergy
from varmeta.inference.lanczos import eigen, fold, log_quadrature, probes
from varmeta.inference.laplace import MAX_DIM, hessian
from varmeta.inference.linear import CG, LinearSolver, MatVec
from varmeta.inference.third import bent
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator as new_generator
from varmeta.tasks import Tasks

_AUTOMATIC_PROBES = 8


@dataclass(eq=False)
class LogDetInfo:
    """How the curvature looked, per task.

    Attributes:
        indefinite: `[T]` bool, A is not positive definite: θ is no minimum. The value then is that
            of |A|, negative eigenvalues (in the prior's units) folded over.
        gradients: gradient evaluations of a task so far; a product with H counts as two, the
            derivative of one as four.
        residual: `[T]`, worst relative residual of the probes' solves; None without probes.
        standard_error: `[T]` nats, of the value, over the probes; None without (or with one).
    """

    indefinite: Tensor
    gradients: int
    residual: Tensor | None = None
    standard_error: Tensor | None = None


@dataclass(frozen=True)
class LogDet(Checked):
    """How log-determinants and traces of the curvature are found.

    Attributes:
        probes: random directions per task, orthogonal, at most D (where they leave no error); None
            for a dense matrix up to 200 coordinates and 8 probes above.
        lanczos_steps: of each probe's quadrature, at most D; its error falls like
            exp(−4 steps / √κ), κ the condition of I + RᵀHR.
        solver: for the probes' systems with I + RᵀHR, which carry the derivative.

    Raises:
        ValueError: a number that is not a whole number of at least 1.
    """

    probes: Annotated[int, Within(1, why="leave it None for the automatic choice")] | None = None
    lanczos_steps: Annotated[int, Within(1, why="one step sees a single moment of A")] = 20
    solver: LinearSolver = field(default_factory=CG)

    def is_dense(self, dim: int) -> bool:
        """Whether the whole matrix is computed, and nothing is random."""
        return self.probes is None and dim <= MAX_DIM

    def terms(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        theta: Tensor,
        *,
        query: Tasks | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, LogDetInfo]:
        """½ log det A − ½ log det Λ [+ ½ tr((G+Λ)A⁻¹) − D/2], nats: `[T]`, and how it went.

        Differentiable once in θ, the prior and φ. The bracket is there with `query` rows, whose
        loss has the Hessian G = ∇²g(θ).

        Args:
            density: the model; f is the sum over all rows of `tasks`.
            prior: N(θ0, Σ).
            shared: φ `[P]`.
            tasks: T tasks.
            theta: `[T, D]`, the mode of each.
            query: T tasks, or None.
            generator: of the probes; seed 0 if None.
        """
        parts = _Parts(density, prior, shared, tasks, theta, query)
        if self.is_dense(density.dim):
            return parts.dense()
        generator = generator or new_generator(0, device=theta.device)
        count = min(self.probes or _AUTOMATIC_PROBES, density.dim)
        return parts.by_probes(probes(count, theta, generator), self.lanczos_steps, self.solver)


@dataclass(eq=False)
class _Parts:
    """The arguments of `LogDet.terms`, and the two ways to its result."""

    density: Density
    prior: GaussianPrior
    shared: Tensor
    tasks: Tasks
    theta: Tensor
    query: Tasks | None

    def dense(self) -> tuple[Tensor, LogDetInfo]:
        """By the eigenvalues of B; where it is indefinite, |B| stands in its place."""
        root = self._dense_root()
        r, dim = root.detach(), self.density.dim
        curvature = self._hessian(self.tasks)
        eye = torch.eye(dim, dtype=r.dtype, device=r.device)
        values, vectors, finite = eigen(eye + r.mT @ curvature @ r)
        size, bad = fold(values)
        sign = torch.where(values < 0, -1.0, 1.0)
        info = LogDetInfo(bad, 2 * dim)
        value = 0.5 * size.log().sum(-1)
        weight = (0.5 * sign / size).diag_embed()  # d value / d B, in B's eigenbasis
        out = 0 * value
        if self.query is not None:
            other = self._hessian(self.query)
            info.gradients += 2 * dim
            inner = vectors.mT @ (eye + r.mT @ other @ r) @ vectors
            value = value + 0.5 * (inner.diagonal(dim1=-2, dim2=-1) / size).sum(-1) - 0.5 * dim
            weight = weight + 0.5 * _slope_of_inverse(size, sign) * inner
            along = vectors @ (0.5 / size).diag_embed() @ vectors.mT
            out = out + (along * (root.mT @ other @ root)).sum((-2, -1))
            out = out + self._bent(self.query, *_rows(r @ along @ r.mT), info)
        weight = vectors @ weight @ vectors.mT
        out = out + (weight * (root.mT @ curvature @ root)).sum((-2, -1))
        out = out + self._bent(self.tasks, *_rows(r @ weight @ r.mT), info)
        return _with_derivative(torch.where(finite, value, float("nan")), out), info

    def by_probes(self, z: Tensor, steps: int, solver: LinearSolver) -> tuple[Tensor, LogDetInfo]:
        """By probes z `[K, T, D]`."""
        root, count, dim = _Root.of(self.prior), len(z), self.density.dim
        product = self._products(self.tasks, count)

        def matvec(v: Tensor) -> Tensor:
            return v + root.transposed(product(root(v)))

        flat = z.flatten(0, 1)
        forms, bad = log_quadrature(matvec, flat, steps)
        forms = 0.5 * forms.unflatten(0, (count, -1))
        solution = solver.solve(matvec, flat)
        u, w = root(solution.x), root(flat)
        residual, bad = solution.residual, bad | solution.negative_curvature
        spent = 2 * (min(steps, dim) + solution.products) + 1
        left, out = u, 0.5 * self.prior.log_det()
        directions = w.unflatten(0, (count, -1))
        info = LogDetInfo(bad, spent * count)
        if self.query is not None:
            other = self._products(self.query, count)

            def weighed(v: Tensor) -> Tensor:
                return other(v) + self.prior.precision_mv(v).detach()

            forms = forms + 0.5 * ((u * weighed(w)).sum(-1).unflatten(0, (count, -1)) - dim)
            second = solver.solve(matvec, root.transposed(weighed(u)))
            left = u - root(second.x)
            residual = torch.maximum(residual, second.residual)
            bad = bad | second.negative_curvature
            info.gradients += (2 * second.products + 5) * count
            along = 0.5 / count * u.unflatten(0, (count, -1))
            out = out + (along * self.prior.precision_mv(directions)).sum((0, -1))
            out = out + self._bent(self.query, along, directions, info)
        along = 0.5 / count * left.unflatten(0, (count, -1))
        out = out + (along * self.prior.precision_mv(directions)).sum((0, -1))
        out = out + self._bent(self.tasks, along, directions, info)
        info.indefinite = bad.unflatten(0, (count, -1)).any(0)
        info.residual = residual.unflatten(0, (count, -1)).amax(0)
        if 1 < count < dim:
            info.standard_error = forms.std(0) / count**0.5
        return _with_derivative(forms.mean(0), out), info

    def _hessian(self, tasks: Tasks) -> Tensor:
        energy = TaskEnergy(self.density, tasks, self.shared.detach())
        return hessian(energy, self.theta.detach()).detach()

    def _products(self, tasks: Tasks, count: int) -> MatVec:
        """v ↦ Hv for K directions of each task at once, `[K T, D]`."""
        shared = self.shared.detach()

        def loss(theta: Tensor) -> Tensor:
            theta = theta.unflatten(0, (count, -1))
            return self.density.negative_log_likelihood(theta, tasks, shared).flatten()

        return FunctionEnergy(loss).linearise(self.theta.detach().repeat(count, 1)).product

    def _dense_root(self) -> Tensor:
        """R `[D, D]` with R Rᵀ = Σ, differentiable in the prior."""
        if self.prior.factor is None:
            return self.prior.scale.diag()
        return torch.linalg.cholesky_ex(self.prior.covariance()).L

    def _bent(self, tasks: Tasks, left: Tensor, right: Tensor, info: LogDetInfo) -> Tensor:
        """`bent` at θ and φ, counted."""
        info.gradients += 4 * len(right) if torch.is_grad_enabled() else 0
        return bent(self.density, tasks, left, right, self.theta, self.shared)


@dataclass(frozen=True, eq=False)
class _Root:
    """R = S(I + F Fᵀ)^½ for Σ = S(I + F Fᵀ)S, without a graph; `gain` `[R]`, `left` `[D, R]`."""

    scale: Tensor
    left: Tensor | None = None
    gain: Tensor | None = None

    @classmethod
    def of(cls, prior: GaussianPrior) -> _Root:
        scale = prior.scale.detach()
        if prior.factor is None:
            return cls(scale)
        factor = prior.factor.detach() / scale[:, None]
        values, vectors = torch.linalg.eigh(factor.mT @ factor)
        return cls(scale, factor @ vectors, 1 / (1 + (1 + values.clamp(min=0)).sqrt()))

    def __call__(self, v: Tensor) -> Tensor:
        """Rv for v `[..., D]`."""
        return self.scale * self._symmetric(v)

    def transposed(self, v: Tensor) -> Tensor:
        """Rᵀv for v `[..., D]`."""
        return self._symmetric(self.scale * v)

    def _symmetric(self, v: Tensor) -> Tensor:
        if self.left is None or self.gain is None:
            return v
        return v + ((v @ self.left) * self.gain) @ self.left.mT


def _rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric C `[T, D, D]` as Σ_k c_k e_kᵀ: rows c and unit vectors e, both `[D, T, D]`."""
    rows = matrix.transpose(0, 1)
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return rows, eye[:, None].expand_as(rows)


def _slope_of_inverse(size: Tensor, sign: Tensor) -> Tensor:
    """Divided differences of 1/|λ|, `[T, D, D]`: the derivative of |B|⁻¹ in B's eigenbasis."""
    a, b, s = size[:, :, None], size[:, None, :], sign[:, :, None]
    same = s == sign[:, None, :]
    return torch.where(same, -s / (a * b), s * (b - a) / (a * b * (a + b)))


def _with_derivative(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the derivative of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())
