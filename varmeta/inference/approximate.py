"""Cheap stand-ins for (H + Λ)⁻¹ that know what A = H + Λ is made of: the prior and its modules.

(Chen, Friesen, Behbahani, Doucet, Budden, Hoffman & de Freitas, 2019, Modular Meta-Learning with
Shrinkage.) As the solver of an implicit derivative, `Implicit(BlockDiagonal())`, each is exact in
its own case and wrong by what it leaves out in others; the residual that every task reports is that
of the whole A. `PriorDominated` is a preconditioner as well, `CG(preconditioner=PriorDominated())`,
and then changes nothing but the number of products: that which small scales need.

They take Λ and the modules from the energy that is solved for, and so work on models alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from varmeta.checked import Checked, Seed, Within
from varmeta.inference.linear import (
    CG,
    LinearSolver,
    MatVec,
    NeedsPrior,
    Solution,
    norm,
    relative,
)
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator


def bound(solver: LinearSolver | NeedsPrior, energy: Any) -> LinearSolver:
    """The solver, told the prior of the energy whose Hessian is A, where it needs to know.

    Raises:
        ValueError: it needs to know, and the energy is a bare function or has no prior.
    """
    inside = solver.preconditioner if isinstance(solver, CG) else solver
    if not isinstance(inside, NeedsPrior):
        return solver  # type: ignore[return-value]
    prior = getattr(energy, "prior", None)
    if prior is None:
        raise ValueError(
            f"solver is {solver!r}, which needs the prior's Λ, and the energy is a bare function "
            "or has no prior: use CG()"
        )
    done = inside.given(_constant(prior))
    return replace(solver, preconditioner=done) if isinstance(solver, CG) else done


@dataclass(frozen=True)
class PriorDominated(Checked):
    """(H + Λ)⁻¹ ≈ Λ⁻¹ = Σ: no product with H, right where the scales are small against the data's.

    Exact for H = 0; the relative error in a direction with curvature h and scale σ is hσ². One
    product is spent on the residual. As a preconditioner of `CG`: a system in units of the prior,
    whose condition is that of I + Σ^½HΣ^½ however small some scales have become.
    """

    def given(self, prior: GaussianPrior) -> _Prior:
        """See `NeedsPrior.given`."""
        return _Prior(prior)


@dataclass(frozen=True)
class Diagonal(Checked):
    """H ≈ its diagonal: (H + Λ)⁻¹b ≈ b / (h + λ), coordinate by coordinate.

    Exact where the coordinates do not interact. The diagonal is read off D products with unit
    vectors, or estimated from a few random ones, h ≈ z ∘ Hz with z of signs ±1 (Bekas, Kokiopoulou
    & Saad, 2007, An estimator for the diagonal of a matrix), which is unbiased; its variance is the
    sum of the squares of the off-diagonal entries, over the number of probes. A negative h counts
    as 0, so that the result is never further out than Σb. Of a low-rank Λ the diagonal is used.

    Attributes:
        probes: random vectors; None for the exact diagonal.
        seed: of the probes, the same for every task and solve.

    Raises:
        ValueError: probes below 1.
    """

    probes: Annotated[int, Within(1, why="None is the exact one, for D products")] | None = None
    seed: Seed = 0

    def given(self, prior: GaussianPrior) -> _Coordinates:
        """See `NeedsPrior.given`."""
        return _Coordinates(prior, self.probes, self.seed)


@dataclass(frozen=True)
class BlockDiagonal(Checked):
    """H ≈ its blocks within modules: one solve for each module, the others left alone.

    Exact where modules do not interact. Costs M solves; a block has fewer and closer eigenvalues
    than the whole, so that each takes fewer products, and none more than its module has coordinates
    (`Diagonal` is the same where each module is one coordinate).

    Attributes:
        solver: of a block.
    """

    solver: CG = field(default_factory=lambda: CG(preconditioner=PriorDominated()))

    def given(self, prior: GaussianPrior) -> _Blocks:
        """See `NeedsPrior.given`."""
        return _Blocks(prior, self.solver)


@dataclass(frozen=True, eq=False)
class _Prior:
    prior: GaussianPrior

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        x = self.prior.covariance_mv(b)
        return _solution(matvec, b, x, torch.zeros_like(b[:, 0], dtype=torch.bool), 0)

    def prepare(self, matvec: MatVec, b: Tensor) -> tuple[MatVec, int]:
        return self.prior.covariance_mv, 0


@dataclass(frozen=True, eq=False)
class _Coordinates:
    prior: GaussianPrior
    probes: int | None
    seed: int

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        dim, count = b.shape[1], b.shape[1] if self.probes is None else self.probes
        own = self.prior.precision_diagonal()
        signs: Any = None
        if self.probes is not None:
            noise = generator(self.seed)
            drawn = torch.randint(2, (count, dim), generator=noise)
            signs = (2 * drawn - 1).to(b)
        diagonal = torch.zeros_like(b)
        for k in range(count):
            if signs is None:
                unit = torch.zeros_like(b)
                unit[:, k] = 1
                diagonal[:, k] = matvec(unit)[:, k] - own[k]
            else:
                z = signs[k].expand_as(b)
                # Λ's share is known, and only H's is left to chance.
                diagonal += z * (matvec(z) - self.prior.precision_mv(z)) / count
        negative = (diagonal + own <= 0).any(-1) & (self.probes is None)
        x = b / (torch.where(diagonal < 0, 0.0, diagonal) + own)  # not clamp: a NaN is to stay
        return _solution(matvec, b, x, negative, count)


@dataclass(frozen=True, eq=False)
class _Blocks:
    prior: GaussianPrior
    solver: CG

    def solve(self, matvec: MatVec, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        x, products = torch.zeros_like(b), 0
        negative = torch.zeros_like(b[:, 0], dtype=torch.bool)
        inner = bound(self.solver, self)
        for m in range(len(self.prior.log_scale)):
            inside = (self.prior.groups == m).to(b)

            def block(v: Tensor, inside: Tensor = inside) -> Tensor:
                return inside * matvec(inside * v)

            part = inner.solve(block, inside * b, tolerance)
            x = x + inside * part.x
            negative = negative | part.negative_curvature
            products += part.products
        return _solution(matvec, b, x, negative, products)


def _solution(matvec: MatVec, b: Tensor, x: Tensor, negative: Tensor, products: int) -> Solution:
    """With the residual in the whole of A, one product more."""
    residual = relative(norm(b - matvec(x)), norm(b))
    iterations = torch.full_like(negative, products, dtype=torch.long)
    return Solution(x, residual, iterations, negative, products + 1)


def _constant(prior: GaussianPrior) -> GaussianPrior:
    """Without history: no derivative goes through a solve."""
    factor = None if prior.factor is None else prior.factor.detach()
    return prior.moved(prior.loc.detach(), prior.log_scale.detach(), factor)
