"""The Nyström approximation of A = H + ρI: a direct solver, and a preconditioner for CG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from varmeta.checked import Checked, Seed, Within
from varmeta.inference.linear import (
    MatVec,
    Solution,
    check_shape,
    columns,
    norm,
    relative,
    unit_scale,
)
from varmeta.seeds import generator

Sketch = Literal["columns", "gaussian"]


@dataclass(frozen=True, eq=False)
class Nystrom(Checked):
    """(H_k + ρI)⁻¹b by Woodbury's identity, H_k = HΩ(ΩᵀHΩ)⁺ΩᵀH from K products.

    The operator handed to `solve` is A = H + ρI, **with the shift in it**: in a MAP problem A is
    the Hessian of the energy, H that of the negative log-likelihood and ρ the prior's precision.
    The approximation needs H ⪰ 0 of rapidly falling spectrum; it is exact where rank H ≤ K (for
    almost every choice of columns) and where K ≥ D.

    All is done in units of ρ^(-1/2), where the shift is 1 and the eigenvalues of H are curvatures
    in units of the prior's, so that a ρ of different sizes is no approximation.

    As a solver (Hataya & Yamada 2023, Nyström Method for Accurate and Scalable Implicit
    Differentiation): K products and one for the residual, whatever the tolerance; `iterations` are
    K. As a preconditioner, `CG(preconditioner=Nystrom(...))`: K products, then those of CG
    (Frangella, Tropp & Udell 2021, Randomized Nyström Preconditioning: what lies outside the span
    is taken to have the smallest eigenvalue found).

    An indefinite H: the solver reports `negative_curvature` where uᵀHu < 0 beyond rounding for
    some u in the span of the columns, and keeps the signs in H_k, so that K = D still solves; A
    itself may be positive definite. What the columns do not see is not reported. The
    preconditioner must be positive definite and takes 0 for a negative eigenvalue; `CG` reports
    what it then meets in A.

    Numerics: ΩᵀHΩ is inverted by its eigenvalues, without those below the rounding error in HΩ
    (which plays the part of the shift in Frangella et al.), and H_k is brought to
    UΛUᵀ by a QR factor, so that (H_k + I)⁻¹ = I − UΛ(I + Λ)⁻¹Uᵀ has no cancellation.

    Attributes:
        rank: K, at least 1; more than D is taken as D.
        shift: ρ > 0, the multiple of the identity in A (a float), or its diagonal `[D]` or
            `[T, D]`; in units of A. No derivative is taken through it.
        sketch: Ω, the same for all tasks: `"columns"` takes K columns of H, as in Hataya &
            Yamada; `"gaussian"` takes standard normal mixtures of them, as in Frangella et al.,
            and does better where single coordinates carry most of H. The span for a smaller K lies
            in that for a larger one.
        seed: of the random choice, made by `seeds.generator`: every solve with the same D uses the
            same Ω, on every device.
    """

    rank: Annotated[int, Within(1, why="it is the number of products with A")]
    shift: float | Tensor
    sketch: Sketch = "columns"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        shift = torch.as_tensor(self.shift)
        if shift.ndim > 2 or not bool(((shift > 0) & shift.isfinite()).all()):
            got = self.shift if shift.ndim == 0 else f"{list(shift.shape)} from {shift.min():.3g}"
            raise ValueError(
                f"shift must be positive and finite, a number, [D] or [T, D], got {got}; give the "
                "multiple of the identity that A contains (the prior's precision), or use CG() or "
                "MINRES() where there is none"
            )

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        """See `LinearSolver.solve`; `tolerance` is ignored."""
        check_shape(b)
        b, scale = unit_scale(b)
        root = self._root(b)
        vectors, values, negative = self._eigen(matvec, b, root)
        x = _shrink(vectors, values / (1 + values), b / root) / root
        residual = relative(norm(b - matvec(x)), norm(b))
        rank = vectors.shape[-1]
        iterations = torch.full_like(negative, rank, dtype=torch.long)
        return Solution(x * scale, residual, iterations, negative, rank + 1)

    def prepare(self, matvec: MatVec, b: Tensor) -> tuple[MatVec, int]:
        """See `Preconditioner.prepare`."""
        root = self._root(b)
        vectors, values, _ = self._eigen(matvec, b, root)
        values = torch.where(values < 0, 0.0, values)  # not clamp: a NaN is to stay
        rest = values[:, :1]  # the smallest: they ascend
        weights = (values - rest) / (1 + values)  # 1 − (1 + λ_min)/(1 + λ)
        return lambda v: _shrink(vectors, weights, v / root) / root, vectors.shape[-1]

    def _root(self, b: Tensor) -> Tensor:
        """√ρ, `[1]`, `[D]` or `[T, D]`."""
        if not isinstance(self.shift, Tensor):
            return b.new_full((1,), self.shift**0.5)
        if not (self.shift.ndim == 0 or _fits(self.shift, b)):
            raise ValueError(
                f"shift has the shape {list(self.shift.shape)}, b {list(b.shape)}: give a number, "
                "[D] or [T, D]"
            )
        return self.shift.detach().to(b).sqrt()

    def _eigen(self, matvec: MatVec, b: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U `[T, D, K]` and Λ `[T, K]` of H_k in units of ρ^(-1/2), and uᵀHu < 0, `[T]` bool."""
        omega = self._omega(b)
        image = columns(lambda v: matvec(v / root) / root, omega, b) - omega
        finite = image.isfinite().all(-1).all(-1)[:, None]
        image = torch.where(finite[..., None], image, 0.0)  # or eigh fails for all tasks
        core = omega.mT @ image
        core_values, core_vectors = torch.linalg.eigh(0.5 * (core + core.mT))
        # What is subtracted to get H from A, and each product, carries rounding of this size.
        error = 10 * torch.finfo(b.dtype).eps * (1 + torch.linalg.vector_norm(image, dim=(-2, -1)))
        kept = core_values.abs() > error[:, None]
        weights = torch.where(kept, torch.where(kept, core_values, 1.0).abs().rsqrt(), 0.0)
        half = image @ (core_vectors * weights[:, None])  # H_k = half · signs · halfᵀ
        basis, triangle = torch.linalg.qr(half)
        small = (triangle * core_values.sign()[:, None]) @ triangle.mT
        values, rotation = torch.linalg.eigh(0.5 * (small + small.mT))
        negative = finite[:, 0] & (core_values < -error[:, None]).any(-1)
        return basis @ rotation, torch.where(finite, values, float("nan")), negative

    def _omega(self, b: Tensor) -> Tensor:
        """Ω with orthonormal columns, `[D, K]`."""
        dim = b.shape[1]
        # Drawn by NumPy on the CPU: a GPU uses the same columns, and a traced solve (`make_fx`)
        # holds them as constants, where a draw by PyTorch would be repeated with other numbers.
        source = np.random.default_rng(generator(self.seed).initial_seed())
        if self.sketch == "gaussian":
            normal = source.standard_normal((min(self.rank, dim), dim)).T
            omega = np.linalg.qr(normal)[0]
        else:
            omega = np.eye(dim)[:, source.permutation(dim)[: self.rank]]
        return torch.from_numpy(omega).to(b)


def _shrink(vectors: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    """v − U diag(w) Uᵀv, `[T, D]`."""
    inner = weights * (vectors.mT @ v[..., None])[..., 0]
    return v - (vectors @ inner[..., None])[..., 0]


def _fits(shift: Tensor, b: Tensor) -> bool:
    return shift.shape == b.shape or shift.shape == b.shape[1:]
