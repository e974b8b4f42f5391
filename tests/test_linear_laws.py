"""Every linear solver, under the same laws. A new one is a new line in the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import FLOAT, assert_same
from test_linear import CONDITIONS, operator, product, right_sides, rounding, true_residual
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta.inference.linear import CG, Cholesky, LinearSolver, Neumann, default_tolerance
from varmeta.inference.minres import MINRES
from varmeta.inference.nystrom import Nystrom


@dataclass(frozen=True)
class Entry:
    """A solver and what it promises.

    `full`: for eigenvalues from 1/condition to 1 and dimension D, one that solves to the default
    tolerance. `short`: one that stops long before. `indefinite`: it also solves where eigenvalues
    are negative. `fixed`: one of a fixed number of products with A that never waits for the device.
    """

    full: Callable[[float, int], LinearSolver]
    short: LinearSolver
    worst: float = 1e6
    indefinite: bool = False
    fixed: LinearSolver | None = None


def shift(condition: float) -> float:
    return 0.5 / condition  # below the smallest eigenvalue: H = A − ρI is positive definite


SOLVERS = {
    "cg": Entry(
        lambda condition, dim: CG(max_iterations=20 * dim + 400),
        CG(max_iterations=3),
        fixed=CG(max_iterations=6, tolerance=0.0),
    ),
    "cg, preconditioned": Entry(
        lambda condition, dim: CG(
            20 * dim + 400, preconditioner=Nystrom(max(dim // 2, 1), shift(condition))
        ),
        CG(max_iterations=3, preconditioner=Nystrom(2, 0.1)),
        fixed=CG(4, 0.0, Nystrom(3, 0.005)),
    ),
    "minres": Entry(
        lambda condition, dim: MINRES(max_iterations=20 * dim + 400),
        MINRES(max_iterations=3),
        indefinite=True,
        fixed=MINRES(max_iterations=6, tolerance=0.0),
    ),
    "neumann": Entry(
        # ‖I − αA‖ = (κ−1)/(κ+1), and exp(−2K/(κ+1)) is below ε^(2/3) for this K
        lambda condition, dim: Neumann(int(13 * condition) + 20, 2 / (1 + 1 / condition)),
        Neumann(terms=3, step_size=1.0),
        worst=1e2,
        fixed=Neumann(terms=6, step_size=1.0),
    ),
    "nystrom": Entry(
        lambda condition, dim: Nystrom(dim, shift(condition)), Nystrom(2, 0.1), indefinite=True
    ),
    "nystrom, gaussian": Entry(
        lambda condition, dim: Nystrom(dim, shift(condition), "gaussian"),
        Nystrom(2, 0.1, "gaussian"),
        indefinite=True,
    ),
    "cholesky": Entry(lambda condition, dim: Cholesky(), Cholesky(), indefinite=True),
}
every = pytest.mark.parametrize("name", SOLVERS)
never_waits = pytest.mark.parametrize("name", [k for k, e in SOLVERS.items() if e.fixed])


@every
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("dim", [1, 2, 10, 60])
def test_solution_equals_dense_solve(name: str, dim: int, condition: float) -> None:
    if condition > SOLVERS[name].worst:
        pytest.skip("too many products")
    check_dense(SOLVERS[name].full(condition, dim), condition, dim)


@every
def test_solution_in_200_dimensions_equals_dense_solve(name: str) -> None:
    check_dense(SOLVERS[name].full(1e2, 200), 1e2, 200)


def check_dense(solver: LinearSolver, condition: float, dim: int) -> None:
    a, b = operator(0, 2, dim, condition), right_sides(1, 2, dim)
    solution = solver.solve(product(a), b)
    exact = torch.linalg.solve(a, b)
    error = (solution.x - exact).norm(dim=-1) / exact.norm(dim=-1)
    reached = default_tolerance(FLOAT) + rounding(a, b, solution)
    assert bool((error <= condition * reached).all())
    if condition <= 1e4:  # beyond, MINRES and Nyström may stop short of it, and say so
        assert bool((solution.residual <= 2 * reached).all())
    assert not bool(solution.negative_curvature.any())


@every
@pytest.mark.parametrize("kind", ["full", "short"])
@pytest.mark.parametrize("lowest", [0.01, 0.0, -0.3])
def test_reported_residual_is_the_true_one(name: str, kind: str, lowest: float) -> None:
    """Also of systems that the solver cannot solve: singular and indefinite."""
    entry = SOLVERS[name]
    solver = entry.short if kind == "short" else entry.full(1e2, 12)
    a = operator(2, 3, 12, 1e2) - (0.01 - lowest) * torch.eye(12, dtype=FLOAT)
    b = right_sides(3, 3, 12)
    solution = solver.solve(product(a), b)
    true = true_residual(a, b, solution.x)
    if not bool(solution.residual.isfinite().all()):  # a series that overflowed
        assert name == "neumann" and not bool((true < 1e100).any())
        return
    gap = (solution.residual - true).abs()
    # a series that diverges adds rounding as large as its largest term
    limit = 1e-12 + rounding(a, b, solution) + 1e-10 * (solution.residual > 1) * solution.residual
    assert bool((gap <= limit).all())


@pytest.mark.parametrize("name", [k for k, e in SOLVERS.items() if e.indefinite])
def test_indefinite_systems_are_solved_and_reported(name: str) -> None:
    """Eigenvalues from −0.5 to 0.5, none nearer to 0 than 0.04 (|A⁻¹| = 25)."""
    a = operator(4, 3, 12, 1e2)
    values, vectors = torch.linalg.eigh(a)
    values = torch.linspace(-0.5, 0.5, 12, dtype=FLOAT).expand_as(values)
    a, b = vectors * values[:, None] @ vectors.mT, right_sides(5, 3, 12)
    solution = SOLVERS[name].full(1e2, 12).solve(product(a), b)
    assert bool(solution.negative_curvature.all())
    assert bool((solution.residual <= default_tolerance(FLOAT)).all())
    assert torch.allclose(solution.x, torch.linalg.solve(a, b), rtol=0, atol=1e-8)


@every
@pytest.mark.parametrize("kind", ["full", "short"])
def test_together_equals_one_at_a_time(name: str, kind: str) -> None:
    a = torch.cat([operator(k, 1, 9, 10.0 ** (k + 1)) for k in range(2)] + [operator(7, 1, 9, 3.0)])
    a[1] -= 0.05 * torch.eye(9, dtype=FLOAT)  # indefinite, beside two that are not
    b = right_sides(6, 3, 9) * torch.tensor([[1.0], [1e-9], [1e9]])
    entry = SOLVERS[name]
    solver = entry.short if kind == "short" else entry.full(1e2, 9)
    together = solver.solve(product(a), b)
    for i in range(3):
        alone = solver.solve(product(a[i : i + 1]), b[i : i + 1])
        # bit-close: a batched product may add in another order, which MINRES on the indefinite
        # task amplifies by its condition
        assert torch.allclose(together.x[i], alone.x[0], rtol=1e-7, atol=1e-11 * float(b[i].norm()))
        assert torch.equal(together.iterations[i], alone.iterations[0])
        assert torch.equal(together.negative_curvature[i], alone.negative_curvature[0])


@every
def test_nothing_to_solve_gives_zero(name: str) -> None:
    a, b = operator(9, 3, 6, 1e2), right_sides(10, 3, 6)
    b[1] = 0
    solution = SOLVERS[name].full(1e2, 6).solve(product(a), b)
    assert float(solution.x[1].abs().max()) == 0 and float(solution.residual[1]) == 0
    assert torch.allclose(solution.x[[0, 2]], torch.linalg.solve(a, b)[[0, 2]], rtol=1e-8)
    assert not bool(solution.negative_curvature.any())


@every
def test_no_tasks_and_no_coordinates_are_no_special_case(name: str) -> None:
    for shape in ((0, 4), (3, 0)):
        solution = SOLVERS[name].full(1e2, 4).solve(lambda v: v, torch.zeros(shape, dtype=FLOAT))
        assert solution.x.shape == shape and solution.residual.shape == shape[:1]


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_harms_no_other_task(name: str, bad: float) -> None:
    a, b = operator(18, 3, 5, 1e2), right_sides(19, 3, 5)
    solver = SOLVERS[name].full(1e2, 5)
    clean = solver.solve(product(a), b)
    b[0, 1], a[1, 0, 0] = bad, bad
    solution = solver.solve(product(a), b)
    assert not bool(solution.residual[:2].isfinite().any())
    assert not bool(solution.x[0].isfinite().all())
    if bad != bad:  # an infinite product may stop a task at x = 0, with a residual that shows it
        assert not bool(solution.x[1].isfinite().all())
    assert torch.allclose(solution.x[2], clean.x[2], rtol=1e-12)
    assert not bool(solution.negative_curvature[2])


@every
def test_single_precision_reaches_its_tolerance(name: str) -> None:
    a, b = operator(16, 3, 20, 30.0).float(), right_sides(17, 3, 20).float()
    solution = SOLVERS[name].full(30.0, 20).solve(product(a), b)
    assert solution.x.dtype == solution.residual.dtype == torch.float32
    reached = 2 * default_tolerance(torch.float32)
    assert bool((solution.residual <= reached).all())
    exact = torch.linalg.solve(a.double(), b.double())
    error = (solution.x - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert bool((error <= 30 * (reached + rounding(a, b, solution))).all())


@every
@pytest.mark.parametrize("exponent", [-80, 100])
def test_the_unit_of_b_changes_nothing(name: str, exponent: int) -> None:
    """2^±100 in single precision: squares of such numbers are 0 or infinite."""
    a, b = operator(20, 3, 8, 10.0).float(), right_sides(21, 3, 8).float()
    solver = SOLVERS[name].full(10.0, 8)
    one, other = (solver.solve(product(a), b * 2.0**e) for e in (0, exponent))
    assert_same(other.x * 2.0**-exponent, one.x)
    assert_same(other.residual, one.residual)


@every
def test_a_tolerance_for_each_task_is_accepted(name: str) -> None:
    a, b = operator(22, 2, 7, 10.0), right_sides(23, 2, 7)
    goals = torch.tensor([1e-2, 1e-6], dtype=FLOAT)
    solution = SOLVERS[name].full(10.0, 7).solve(product(a), b, goals)
    assert bool((solution.residual <= goals).all())
    for i in range(2):  # and a task that has stopped does not move while the other goes on
        alone = (
            SOLVERS[name].full(10.0, 7).solve(product(a[i : i + 1]), b[i : i + 1], goals[i : i + 1])
        )
        assert torch.allclose(solution.x[i], alone.x[0], rtol=1e-9, atol=0)


@every
def test_one_system_alone_is_refused_with_the_mend(name: str) -> None:
    with pytest.raises(ValueError, match=r"b must be \[T, D\].* got the shape \[4\].*b\[None\]"):
        SOLVERS[name].short.solve(lambda v: v, torch.ones(4))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        waiting = (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.masked_select)
        self.count += func.overloadpacket in (*waiting, aten.equal)
        return func(*args, **(kwargs or {}))


@never_waits
@pytest.mark.parametrize("goal", [None, 1e-3])
def test_a_fixed_number_of_products_never_waits_for_the_device(
    name: str, goal: float | None
) -> None:
    solver = SOLVERS[name].fixed
    assert solver is not None
    a, b = operator(24, 3, 10, 1e2), right_sides(25, 3, 10)
    b[0] = 0
    goals = None if goal is None else torch.full((3,), goal, dtype=FLOAT)
    with Waits() as waits:
        solver.solve(product(a), b, goals)
    assert waits.count == 0
    with Waits() as waits:  # the counter can count
        CG().solve(product(a), b)
    assert waits.count > 0


@never_waits
def test_a_fixed_number_of_products_can_be_traced(name: str) -> None:
    solver = SOLVERS[name].fixed
    assert solver is not None

    def solve(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        found = solver.solve(product(a), b)
        return found.x, found.residual, found.iterations, found.negative_curvature

    traced = make_fx(solve)(operator(26, 3, 10, 1e2), right_sides(27, 3, 10))
    a, b = operator(28, 3, 10, 1e2), right_sides(29, 3, 10)
    a[0] -= 0.3 * torch.eye(10, dtype=FLOAT)  # other turns than the traced run took
    b[1] = 0
    assert_same(traced(a, b), solve(a, b))


@never_waits
def test_a_fixed_number_of_products_is_kept_and_harmless(name: str) -> None:
    """Far beyond convergence: nothing moves any more, and nothing is mistaken for curvature."""
    fixed = SOLVERS[name].fixed
    assert fixed is not None
    count, many = ("terms", 4_000) if isinstance(fixed, Neumann) else ("max_iterations", 1_000)
    a, b = operator(30, 3, 8, 10.0), right_sides(31, 3, 8)
    a[2] = torch.eye(8, dtype=FLOAT)
    found = [
        replace(fixed, **{count: n}).solve(product(a), b)  # type: ignore[type-var]
        for n in (many, many + 7)
    ]
    assert found[1].products == found[0].products + 7
    assert torch.equal(found[0].x, found[1].x)
    assert not bool(found[1].negative_curvature.any())
    assert bool((found[1].residual < 1e-13).all())
    assert torch.allclose(found[1].x, torch.linalg.solve(a, b), rtol=1e-10)


WRONG: dict[str, Callable[[], object]] = {
    r"max_iterations must .* at least 1, got 0; ": lambda: CG(max_iterations=0),
    r"max_iterations must .* at least 1, got -3; ": lambda: MINRES(max_iterations=-3),
    r"max_iterations must .* whole .*got 2.5; ": lambda: MINRES(max_iterations=2.5),  # type: ignore[arg-type]
    r"tolerance must .* at least 0 .*, got -1.0; leave it": lambda: CG(tolerance=-1.0),
    r"tolerance must .* finite .* got nan; leave it": lambda: MINRES(tolerance=float("nan")),
    r"terms must .* got 0; 1 is one-step": lambda: Neumann(0, 0.1),
    r"step_size must .* got 0.0; .* below 2 over": lambda: Neumann(1, 0.0),
    r"step_size must .* got inf; .* below 2 over": lambda: Neumann(1, float("inf")),
    r"rank must .* got 0; ": lambda: Nystrom(0, 1.0),
    r"shift must be positive .* got 0.0; .* CG\(\)": lambda: Nystrom(3, 0.0),
    r"shift must .* \[3\] from -1; ": lambda: Nystrom(3, torch.tensor([1.0, -1.0, 2.0])),
    r"sketch must be one of 'columns', 'gaussian', got 'rows'": lambda: Nystrom(
        3,
        1.0,
        "rows",  # type: ignore[arg-type]
    ),
    r"limit must .* got 0; ": lambda: Cholesky(limit=0),
    r"limit is 4, and b has D = 5 .* CG\(\).* Cholesky\(limit=5\)": lambda: Cholesky(4).solve(
        lambda v: v, torch.ones(2, 5)
    ),
    r"shift has the shape \[3\], b \[2, 5\]: give": lambda: Nystrom(2, torch.ones(3)).solve(
        lambda v: v, torch.ones(2, 5)
    ),
    r"tolerance is 1e-07, below what torch.float32 can .* 1.2e-06, None": lambda: CG(
        tolerance=1e-7
    ).solve(lambda v: v, torch.ones(2, 5)),
    r"tolerance is 1e-17, below what torch.float64 can .* 2.2e-15, None": lambda: MINRES().solve(
        lambda v: v, torch.ones(2, 5, dtype=FLOAT), torch.tensor([1e-3, 1e-17], dtype=FLOAT)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_work_is_refused_with_the_mend(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
