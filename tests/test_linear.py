"""Conjugate gradients against dense solves, one operator or many at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import FLOAT
from torch import Tensor

from varmeta.inference.linear import CG, Solution, default_tolerance

CONDITIONS = [1.0, 1e2, 1e4, 1e6]


def operator(seed: int, tasks: int, dim: int, condition: float) -> Tensor:
    """`[T, D, D]` symmetric, eigenvalues spread evenly in log from 1/condition to 1."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(tasks, dim, dim)))[0]
    values = np.logspace(-np.log10(condition), 0, dim)
    return torch.tensor(basis * values @ basis.swapaxes(1, 2), dtype=FLOAT)


def right_sides(seed: int, tasks: int, dim: int) -> Tensor:
    return torch.randn(tasks, dim, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


def product(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: (a @ v[..., None])[..., 0]


def true_residual(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return (b - product(a)(x)).norm(dim=-1) / b.norm(dim=-1)


def rounding(a: Tensor, b: Tensor, solution: Solution) -> Tensor:
    """How far the recursive residual may drift from the true one: some ε‖A‖‖x‖/‖b‖ (Greenbaum,
    1997, Iterative Methods for Solving Linear Systems, section 7.3)."""
    size = torch.linalg.matrix_norm(a, 2) * solution.x.norm(dim=-1) / b.norm(dim=-1)
    return 10 * torch.finfo(b.dtype).eps * (1 + size)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("dim", [1, 2, 10, 100])
def test_solution_equals_dense_solve(dim: int, condition: float) -> None:
    a, b = operator(0, 3, dim, condition), right_sides(1, 3, dim)
    solution = CG(max_iterations=20 * dim + 200, tolerance=1e-11).solve(product(a), b)
    exact = torch.linalg.solve(a, b)
    # ‖x − A⁻¹b‖/‖A⁻¹b‖ ≤ condition · residual, both solvers' rounding included
    error = (solution.x - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert bool((error <= condition * (2e-11 + rounding(a, b, solution))).all())
    assert bool((solution.residual <= 1e-11).all())
    assert not bool(solution.negative_curvature.any())


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("cap", [1, 2, 5, 20, 400])
def test_reported_residual_is_the_true_one(condition: float, cap: int) -> None:
    a, b = operator(2, 4, 30, condition), right_sides(3, 4, 30)
    solution = CG(max_iterations=cap, tolerance=1e-11).solve(product(a), b)
    gap = (solution.residual - true_residual(a, b, solution.x)).abs()
    assert bool((gap <= rounding(a, b, solution)).all())
    assert bool((solution.iterations <= cap).all()) and solution.products <= cap


def test_residual_at_the_cap_is_above_the_tolerance() -> None:
    a, b = operator(4, 2, 40, 1e4), right_sides(5, 2, 40)
    solution = CG(max_iterations=5, tolerance=1e-11).solve(product(a), b)
    assert bool((solution.residual > 1e-3).all())
    assert solution.iterations.tolist() == [5, 5]


def test_error_in_the_energy_norm_falls_with_every_iteration() -> None:
    a, b = operator(6, 3, 30, 1e4), right_sides(7, 3, 30)
    exact, errors = torch.linalg.solve(a, b), []
    for cap in range(1, 30, 3):
        offset = CG(max_iterations=cap).solve(product(a), b).x - exact
        errors.append((offset * product(a)(offset)).sum(-1))
    assert bool((torch.stack(errors).diff(dim=0) < 0).all())


def test_together_equals_one_at_a_time() -> None:
    """Tasks of different difficulty: each stops where it would alone, to the last iteration."""
    parts = [operator(k, 1, 12, condition) for k, condition in enumerate(CONDITIONS)]
    a, b = torch.cat(parts), right_sides(8, 4, 12) * torch.tensor([[1.0], [1e-9], [1e9], [3.0]])
    b[:, 7:] *= torch.tensor([[0.0], [1.0], [1.0], [1.0]])  # fewer coordinates at work in one task
    solver = CG(max_iterations=25)
    together = solver.solve(product(a), b)
    for i in range(4):
        alone = solver.solve(product(a[i : i + 1]), b[i : i + 1])
        assert torch.allclose(together.x[i], alone.x[0], rtol=1e-12, atol=0)
        assert int(together.iterations[i]) == int(alone.iterations[0])
        assert torch.allclose(together.residual[i], alone.residual[0], rtol=1e-6, atol=0)
    assert len(set(together.iterations.tolist())) > 1


def test_a_task_with_nothing_to_solve_stays_at_zero() -> None:
    a, b = operator(9, 3, 6, 1e2), right_sides(10, 3, 6)
    b[1] = 0
    solution = CG().solve(product(a), b)
    assert solution.x[1].abs().max() == 0
    assert float(solution.residual[1]) == 0 and int(solution.iterations[1]) == 0
    assert torch.allclose(solution.x[[0, 2]], torch.linalg.solve(a, b)[[0, 2]], rtol=1e-8)


def test_all_zero_needs_no_product() -> None:
    def never(v: Tensor) -> Tensor:
        raise AssertionError("no product is needed")

    assert CG().solve(never, torch.zeros(2, 3, dtype=FLOAT)).products == 0


def test_each_task_keeps_its_own_tolerance() -> None:
    a, b = operator(11, 1, 30, 1e4).expand(3, -1, -1), right_sides(12, 1, 30).expand(3, -1)
    goals = torch.tensor([1e-1, 1e-4, 1e-9], dtype=FLOAT)
    solution = CG(max_iterations=500).solve(product(a), b, goals)
    assert bool((solution.residual <= goals).all())
    assert bool((solution.residual > goals * 1e-3).all()), "a task went on after its tolerance"
    assert solution.iterations.tolist() == sorted(set(solution.iterations.tolist()))


def test_a_stopped_task_does_not_move_while_others_go_on() -> None:
    a = torch.cat([operator(13, 1, 20, 2.0), operator(14, 1, 20, 1e6)])
    b = right_sides(15, 2, 20)
    x, steps = [], []
    for cap in (40, 400):
        solution = CG(max_iterations=cap).solve(product(a), b)
        x.append(solution.x)
        steps.append(solution.iterations)
    assert torch.equal(x[0][0], x[1][0]) and int(steps[0][0]) == int(steps[1][0]) < 40
    assert not torch.equal(x[0][1], x[1][1])


@pytest.mark.parametrize("values", [[1.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 0.0]])
def test_negative_curvature_is_reported_and_harmless(values: list[float]) -> None:
    """One indefinite or singular task (its steps are exact in floating point) beside a good one;
    b has a share in every direction."""
    a = torch.stack([torch.diag(torch.tensor(values)), torch.eye(3)]).to(FLOAT)
    b = torch.tensor([[1.0, 1.0, 3.0], [1.0, 2.0, 3.0]], dtype=FLOAT)
    solution = CG().solve(product(a), b)
    assert solution.negative_curvature.tolist() == [True, False]
    assert bool(solution.x.isfinite().all())
    assert torch.allclose(solution.residual, true_residual(a, b, solution.x), atol=1e-12)
    assert float(solution.residual[0]) > 1e-3
    assert torch.allclose(solution.x[1], b[1])


def test_single_precision_reaches_its_tolerance() -> None:
    a, b = operator(16, 3, 20, 1e2).float(), right_sides(17, 3, 20).float()
    solution = CG().solve(product(a), b)
    assert solution.x.dtype == torch.float32
    assert bool((solution.residual <= default_tolerance(torch.float32)).all())
    exact = torch.linalg.solve(a.double(), b.double())
    error = (solution.x - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert bool((error <= 1e2 * (solution.residual + rounding(a, b, solution))).all())


def test_what_is_not_finite_stays_so_and_harms_no_other_task() -> None:
    """In b, and in the products: never a plausible 0 with a residual of 0."""
    a, b = operator(18, 4, 5, 1e2), right_sides(19, 4, 5)
    exact = torch.linalg.solve(a, b)
    b[0, 1], b[1, 2], a[2, 0, 0] = float("nan"), float("inf"), float("nan")
    solution = CG().solve(product(a), b)
    assert not bool(solution.residual[:3].isfinite().any())
    assert not bool(solution.x[:3].isfinite().all(-1).any())
    assert torch.allclose(solution.x[3], exact[3], rtol=1e-8)
    alone = CG().solve(product(a[:1]), b[:1])
    assert bool(alone.residual.isnan()) and bool(alone.x.isnan().any())
