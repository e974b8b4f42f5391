"""What each linear solver promises beyond the laws in `test_linear_laws.py`."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as scipy_linalg
import torch
from helpers import FLOAT, assert_close
from test_linear import operator, product, right_sides, true_residual
from torch import Tensor

from varmeta.inference.linear import CG, Cholesky, MatVec, Neumann, default_tolerance
from varmeta.inference.minres import MINRES
from varmeta.inference.nystrom import Nystrom

STEPS = [1, 2, 3, 5, 8]


def textbook_cg(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """One system `[D, D]`, `[D]`: Golub & Van Loan (2013), algorithm 11.3.3."""
    x, r = torch.zeros_like(b), b
    p = r
    for _ in range(steps):
        alpha = (r @ r) / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


@pytest.mark.parametrize("steps", STEPS)
def test_cg_of_fixed_length_is_the_textbooks(steps: int) -> None:
    a, b = operator(0, 3, 20, 1e3), right_sides(1, 3, 20)
    solution = CG(max_iterations=steps, tolerance=0.0).solve(product(a), b)
    assert solution.products == steps and solution.iterations.tolist() == [steps] * 3
    for i in range(3):
        assert_close(solution.x[i], textbook_cg(a[i], b[i], steps), 1e-12)
        other, _ = scipy_linalg.cg(a[i].numpy(), b[i].numpy(), rtol=0.0, maxiter=steps)
        assert_close(solution.x[i], other, 1e-12)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_minres_of_fixed_length_is_scipys(steps: int, shift: float) -> None:
    a = operator(2, 3, 20, 1e3) - shift * torch.eye(20, dtype=FLOAT)
    b = right_sides(3, 3, 20)
    solution = MINRES(max_iterations=steps, tolerance=0.0).solve(product(a), b)
    assert solution.products == steps + 1 and solution.iterations.tolist() == [steps] * 3
    for i in range(3):
        other, _ = scipy_linalg.minres(a[i].numpy(), b[i].numpy(), rtol=1e-300, maxiter=steps)
        assert_close(solution.x[i], other, 1e-11)


@pytest.mark.parametrize("condition", [2.0, 1e2, 1e4])
def test_error_of_cg_is_below_the_chebyshev_bound(condition: float) -> None:
    """‖x_n − x‖_A ≤ 2((√κ−1)/(√κ+1))^n ‖x‖_A (Saad 2003, equation 6.128), down to rounding."""
    a, b = operator(4, 3, 60, condition), right_sides(5, 3, 60)
    exact = torch.linalg.solve(a, b)

    def energy(v: Tensor) -> Tensor:
        return (v * product(a)(v)).sum(-1).sqrt()

    rate = (condition**0.5 - 1) / (condition**0.5 + 1)
    for steps in (1, 2, 4, 8, 16, 32, 64):
        x = CG(max_iterations=steps, tolerance=0.0).solve(product(a), b).x
        bound = 2 * rate**steps + 1e-14 * condition
        assert bool((energy(x - exact) <= bound * energy(exact)).all())


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_residual_of_minres_is_the_smallest_in_the_krylov_space(shift: float) -> None:
    a = operator(6, 1, 12, 1e2) - shift * torch.eye(12, dtype=FLOAT)
    b = right_sides(7, 1, 12)
    space = [b[0]]
    for steps in range(1, 7):
        basis = torch.stack(space, -1)
        image = a[0] @ torch.linalg.qr(basis)[0]
        best = b[0] - image @ torch.linalg.lstsq(image, b[0, :, None]).solution[:, 0]
        found = MINRES(max_iterations=steps, tolerance=0.0).solve(product(a), b)
        assert_close(found.residual[0] * b[0].norm(), best.norm(), 1e-9)
        space.append(a[0] @ space[-1])


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.2, 0.9])
def test_minres_meets_negative_curvature_where_the_krylov_space_has_it(shift: float) -> None:
    """At the first k where A on the Krylov space, VᵀAV, has an eigenvalue at or below 0."""
    a = operator(8, 1, 12, 1e2) - shift * torch.eye(12, dtype=FLOAT)
    b, space = right_sides(9, 1, 12), []
    power = b[0]
    for steps in range(1, 8):
        space.append(power / power.norm())
        power = a[0] @ space[-1]
        basis = torch.linalg.qr(torch.stack(space, -1))[0]
        lowest = torch.linalg.eigvalsh(basis.mT @ a[0] @ basis)[0]
        assert abs(float(lowest)) > 1e-6, "too close to call"
        found = MINRES(max_iterations=steps, tolerance=0.0).solve(product(a), b)
        assert bool(found.negative_curvature) == bool(lowest <= 0)


def test_an_indefinite_system_stops_cg_and_not_minres() -> None:
    """Eigenvalues of both signs, in one task of two."""
    a, b = operator(10, 2, 15, 1e2), right_sides(11, 2, 15)
    a[0] -= 0.113 * torch.eye(15, dtype=FLOAT)
    exact = torch.linalg.solve(a, b)
    stopped, solved = (s.solve(product(a), b) for s in (CG(400), MINRES(400)))
    assert stopped.negative_curvature.tolist() == [True, False]
    assert float(stopped.residual[0]) > 1e-3 and bool(stopped.x.isfinite().all())
    assert solved.negative_curvature.tolist() == [True, False]
    assert bool((solved.residual <= 2 * default_tolerance(FLOAT)).all())
    assert_close(solved.x, exact, 1e-7)


@pytest.mark.parametrize("consistent", [True, False])
def test_minres_solves_a_singular_system_in_the_least_squares_sense(consistent: bool) -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=FLOAT)
    b = torch.tensor([[1.0, 2.0, 3.0, 0.0 if consistent else 4.0]], dtype=FLOAT)
    solution = MINRES(max_iterations=20).solve(lambda v: values * v, b)
    assert_close(solution.x[0, :3], b[0, :3] / values[:3], 1e-10)
    left = 0.0 if consistent else 4.0 / float(b.norm())
    assert abs(float(solution.residual) - left) < 1e-10
    assert bool(solution.negative_curvature) != consistent


def test_minres_ends_at_a_least_squares_solution_whatever_the_basis() -> None:
    """Eigenvalues of both signs and four zeros, in double precision: the residual is b's share in
    the null space."""
    basis = torch.linalg.qr(right_sides(35, 36, 12).reshape(3, 12, 12))[0]
    values = torch.linspace(-1, 3, 12, dtype=FLOAT)
    values[:4] = 0
    values[4] = -0.7
    a, b = basis * values @ basis.mT, right_sides(36, 3, 12)
    solution = MINRES().solve(product(a), b)
    null = (basis.mT @ b[..., None])[:, :4, 0].norm(dim=-1) / b.norm(dim=-1)
    assert_close(solution.residual, null, 1e-9)
    assert bool((solution.iterations <= 12).all())


@pytest.mark.parametrize("terms", [1, 2, 3, 10])
def test_neumann_is_the_partial_sum(terms: int) -> None:
    a, b = operator(12, 3, 8, 30.0), right_sides(13, 3, 8)
    step = 0.7
    contraction = torch.eye(8, dtype=FLOAT) - step * a
    powers = [torch.linalg.matrix_power(contraction, k) for k in range(terms)]
    solution = Neumann(terms, step).solve(product(a), b)
    assert_close(solution.x, step * product(torch.stack(powers).sum(0))(b), 1e-13)
    assert solution.products == terms and solution.iterations.tolist() == [terms] * 3
    if terms == 1:
        assert torch.equal(solution.x, step * b)  # one-step differentiation


def test_error_of_neumann_falls_at_the_rate_of_the_contraction() -> None:
    """Along the slowest eigenvector exactly, and at least so fast in every direction."""
    a, step = operator(14, 2, 6, 20.0), 0.9
    rate = torch.linalg.matrix_norm(torch.eye(6, dtype=FLOAT) - step * a, 2)
    slowest = torch.linalg.eigh(a).eigenvectors[..., 0]
    for b, exactly in ((slowest, True), (right_sides(15, 2, 6), False)):
        exact = torch.linalg.solve(a, b)
        for terms in (1, 4, 16, 64):
            error = (Neumann(terms, step).solve(product(a), b).x - exact).norm(dim=-1)
            ratio = error / (rate**terms * exact.norm(dim=-1))
            assert bool((ratio <= 1 + 1e-9).all())
            assert not exactly or bool((ratio >= 1 - 1e-9).all())


@pytest.mark.parametrize("terms", [30, 3000])
def test_a_divergent_series_shows_in_the_residual(terms: int) -> None:
    """α = 3 in a task with eigenvalues up to 1: ‖I − αA‖ = 2; another task converges."""
    a = torch.stack([torch.eye(4, dtype=FLOAT), 0.3 * torch.eye(4, dtype=FLOAT)])
    b = right_sides(16, 2, 4)
    solution = Neumann(terms, 3.0).solve(product(a), b)
    assert not bool(solution.residual[0] <= 1e3)
    assert float(solution.residual[1]) < 1e-12
    assert_close(solution.x[1], b[1] / 0.3, 1e-12)


def low_rank(seed: int, dim: int, rank: int, size: float = 1e3) -> Tensor:
    """`[2, D, D]` positive semidefinite of this rank, eigenvalues from 1 to `size`."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(2, dim, rank)))[0]
    values = np.logspace(0, np.log10(size), rank)
    return torch.tensor(basis * values @ basis.swapaxes(1, 2), dtype=FLOAT)


def diagonal(values: Tensor) -> Tensor:
    return torch.diag_embed(values)


SHIFTS = {
    "number": 0.01,
    "[]": torch.tensor(0.01),
    "[D]": torch.logspace(-2, 1, 30, dtype=FLOAT),
    "[T, D]": torch.logspace(-2, 1, 60, dtype=FLOAT).reshape(2, 30),
}


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_nystrom_is_exact_for_low_rank_plus_the_shift(sketch: str, kind: str, size: float) -> None:
    """Rank 5 from 5 columns, whichever they are. Recovering H from its columns costs digits: up
    to √ε of its largest eigenvalue in units of the smallest shift."""
    shift = SHIFTS[kind]
    full = torch.as_tensor(shift, dtype=FLOAT).expand(2, 30)
    a, b = low_rank(17, 30, 5, size) + diagonal(full), right_sides(18, 2, 30)
    solution = Nystrom(5, shift, sketch).solve(product(a), b)  # type: ignore[arg-type]
    assert_close(solution.x, torch.linalg.solve(a, b), 1e-8 + 1e-13 * size / 0.01)
    assert solution.products == 6 and solution.iterations.tolist() == [5, 5]
    assert not bool(solution.negative_curvature.any())


def test_nystrom_stays_below_a_and_grows_with_the_rank() -> None:
    """H_k ⪯ H_(k+1) ⪯ H in the order of semidefinite matrices, so bᵀ(H_k + ρI)⁻¹b falls to
    bᵀA⁻¹b."""
    a, b = operator(19, 2, 20, 1e4), right_sides(20, 2, 20)
    exact = (b * torch.linalg.solve(a, b)).sum(-1)
    for sketch in ("columns", "gaussian"):
        values = torch.stack(
            [
                (b * Nystrom(rank, 5e-5, sketch).solve(product(a), b).x).sum(-1)  # type: ignore[arg-type]
                for rank in range(1, 21)
            ]
        )
        assert bool((values.diff(dim=0) <= 1e-6 * values[:-1]).all())
        assert bool((values >= exact * (1 - 1e-6)).all())
        assert_close(values[-1], exact, 1e-6)
        assert bool((values[0] > 2 * exact).all())


def test_more_columns_than_coordinates_are_all_of_them() -> None:
    a, b = operator(21, 2, 6, 10.0), right_sides(22, 2, 6)
    solution = Nystrom(50, 0.05).solve(product(a), b)
    assert solution.products == 7
    assert_close(solution.x, torch.linalg.solve(a, b), 1e-12)


def test_the_same_seed_takes_the_same_columns() -> None:
    a, b = operator(23, 2, 20, 1e2), right_sides(24, 2, 20)
    for sketch in ("columns", "gaussian"):
        x = [
            Nystrom(4, 0.005, sketch, seed).solve(product(a), b).x  # type: ignore[arg-type]
            for seed in (0, 0, 1)
        ]
        assert torch.equal(x[0], x[1]) and not torch.allclose(x[0], x[2])


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_nystrom_reports_that_h_is_indefinite_though_a_is_not(sketch: str) -> None:
    """H has an eigenvalue −0.5 in one task of two; ρ = 1. The signs are kept: from all columns
    the solution is exact."""
    values = torch.tensor([[3.0, 2.0, 1.0, 0.0, -0.5], [3.0, 2.0, 1.0, 0.0, 0.0]], dtype=FLOAT)
    basis = torch.linalg.qr(right_sides(25, 10, 5).reshape(2, 5, 5))[0]
    a, b = basis * (values + 1)[:, None] @ basis.mT, right_sides(26, 2, 5)
    nystrom = Nystrom(5, 1.0, sketch)  # type: ignore[arg-type]
    solution = nystrom.solve(product(a), b)
    assert solution.negative_curvature.tolist() == [True, False]
    assert_close(solution.x, torch.linalg.solve(a, b), 1e-12)
    found = CG(preconditioner=nystrom).solve(product(a), b)  # A is positive definite, says CG
    assert found.negative_curvature.tolist() == [False, False]
    assert_close(found.x, torch.linalg.solve(a, b), 1e-9)


@pytest.mark.parametrize("unit", [1.0, 1e8])
@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_preconditioned_cg_needs_fewer_iterations(sketch: str, unit: float) -> None:
    """Low rank plus a shift of different sizes, plus a small tail: CG alone walks through all. The
    unit of A changes √(rᵀM⁻¹r), and not when CG stops."""
    shift = torch.logspace(-2, 0, 80, dtype=FLOAT)
    a = low_rank(27, 80, 8, 1e4) + 1e-4 * operator(28, 2, 80, 10.0) + diagonal(shift.expand(2, -1))
    a, b, shift = unit * a, right_sides(29, 2, 80), unit * shift
    plain = CG(max_iterations=2000).solve(product(a), b)
    preconditioner = Nystrom(12, shift, sketch)  # type: ignore[arg-type]
    found = CG(max_iterations=2000, preconditioner=preconditioner).solve(product(a), b)
    assert bool((4 * found.iterations < plain.iterations).all())
    assert found.products == 12 + int(found.iterations.max())
    assert bool((found.residual <= default_tolerance(FLOAT)).all())
    # The residual that CG carries along leaves the true one by the rounding of products alone.
    rounding = torch.finfo(FLOAT).eps * torch.linalg.matrix_norm(a, 2) * found.x.norm(dim=-1)
    gap = (found.residual - true_residual(a, b, found.x)).abs()
    assert bool((gap < rounding / b.norm(dim=-1)).all())
    loose = CG(max_iterations=2000, tolerance=1e-4, preconditioner=preconditioner)
    early = loose.solve(product(a), b)
    assert_close(early.residual, true_residual(a, b, early.x), 1e-4)
    assert_close(found.x, torch.linalg.solve(a, b), 1e-7)


def test_the_preconditioner_levels_what_it_saw() -> None:
    """M⁻¹A is (λ_min + ρ)/ρ for each eigenvector in the span of the columns (Frangella et al.,
    section 5), and M⁻¹ is 1/ρ outside and at λ_min."""
    a = torch.linspace(1.5, 20.5, 20, dtype=FLOAT).expand(1, -1)  # columns are eigenvectors
    inverse, cost = Nystrom(8, 0.5).prepare(lambda v: a * v, torch.ones_like(a))
    assert cost == 8
    matrix = torch.stack([inverse(row[None])[0] for row in torch.eye(20, dtype=FLOAT)])
    diagonal = matrix.diagonal()
    assert_close(matrix, torch.diag(diagonal), 1e-12)
    seen = (diagonal - 2.0).abs() > 1e-9
    assert int(seen.sum()) == 7  # and the eighth is λ_min
    levels = diagonal[seen] * a[0][seen]
    assert_close(levels, levels[:1].expand(7), 1e-12)
    lowest = 0.5 * levels[0]
    assert bool(lowest < a[0][seen].min()) and float((a[0][~seen] - lowest).abs().min()) < 1e-10


def test_the_preconditioner_is_positive_definite_though_a_is_not() -> None:
    a = torch.tensor([[4.0, 2.0, 1.0, -2.0]], dtype=FLOAT)
    inverse, _ = Nystrom(4, 1.0).prepare(lambda v: a * v, a)
    assert_close(inverse(torch.ones_like(a)), 1 / (a.clamp(min=1.0)), 1e-12)


class Flipped:
    """A preconditioner that is not positive definite."""

    def prepare(self, matvec: MatVec, b: Tensor) -> tuple[MatVec, int]:
        return lambda v: -v, 0


def test_a_preconditioner_that_is_not_positive_definite_stops_cg() -> None:
    a, b = operator(31, 2, 5, 10.0), right_sides(32, 2, 5)
    solution = CG(preconditioner=Flipped()).solve(product(a), b)
    assert solution.residual.tolist() == [1.0, 1.0] and float(solution.x.abs().max()) == 0
    assert not bool(solution.negative_curvature.any())  # A is


def test_cholesky_takes_as_many_products_as_coordinates() -> None:
    a, b = operator(33, 2, 7, 1e2), right_sides(34, 2, 7)
    a[1, 0, 1] += 0.01  # not symmetric: the residual is that of A as given
    solution = Cholesky().solve(product(a), b)
    assert solution.products == 7 and solution.iterations.tolist() == [7, 7]
    assert_close(solution.x, torch.linalg.solve(0.5 * (a + a.mT), b), 1e-11)
    assert_close(solution.residual[1], true_residual(a, b, solution.x)[1], 1e-9)
    assert float(solution.residual[1]) > 1e-5


def test_cholesky_solves_a_singular_system_in_the_least_squares_sense() -> None:
    values = torch.tensor([2.0, 0.0, -1.0], dtype=FLOAT)
    b = torch.tensor([[1.0, 2.0, 2.0]], dtype=FLOAT)
    solution = Cholesky().solve(lambda v: values * v, b)
    assert bool(solution.negative_curvature)
    assert torch.equal(solution.x, torch.tensor([[0.5, 0.0, -2.0]], dtype=FLOAT))
    assert abs(float(solution.residual) - 2 / 3) < 1e-15
