"""check_gradient passes what is right and exposes the known faults of others, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE
from helpers import FLOAT, Case, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import (
    CG,
    FOMAML,
    IMAML,
    MAML,
    Density,
    Detached,
    GaussianPrior,
    GradientCheck,
    GradientDescent,
    Implicit,
    MetaSGD,
    OneStep,
    Strategy,
    Tasks,
    Unrolled,
    check_gradient,
)
from varmeta.inference.linear import Solution
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.prox import prox

FEW = GradientDescent(0.01, max_iterations=3, tolerance=0)


def shifted(*args: int) -> LinearGaussian:
    drawn = LinearGaussian.random(*args)
    return drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale - 0.2)


def check(strategy: Strategy, case: Case, **changes: Any) -> GradientCheck:
    return check_gradient(
        strategy, case.density, case.prior, case.tasks, shared=case.shared, **changes
    )


def errors(found: GradientCheck, reference: str) -> float:
    rows = found.table[found.table["reference"].str.startswith(reference)]
    assert len(rows), found.table
    return float(rows["error"].max())


def said(found: GradientCheck, *pieces: str) -> bool:
    return any(all(piece in finding for piece in pieces) for finding in found.findings)


# -- what is right passes -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 6, 3), (3, 5, 1), (4, 1, 1)], ids=str)
def test_imaml_agrees_with_every_reference(shape: tuple[int, int, int]) -> None:
    """In θ0, scales and φ; also for one task with one coordinate, where a peer returns 0."""
    problem = shifted(*shape)
    found = check(IMAML(), case_of(problem, shared_noise=True))
    assert found.ok and len(found.findings) == 1
    assert float(found.table["error"].max()) < 1e-7
    assert errors(found, "exact minimum: dense solve") < 1e-10
    exact = problem.meta_grad()
    assert np.allclose(found.gradient["loc"], exact.theta0 * np.exp(problem.log_scale), rtol=1e-8)
    assert np.allclose(found.gradient["log_scale"], exact.log_scale, rtol=1e-8)


def test_a_low_rank_prior_has_a_block_of_its_own() -> None:
    case = case_of(shifted(1))
    factor = tensor([[0.5, 0.1], [-0.3, 0.4], [0.2, 0.9]])
    found = check(IMAML(), replace(case, prior=replace(case.prior, factor=factor)))
    assert found.ok and float(found.table["error"].max()) < 1e-7
    assert set(found.table["block"]) == {"loc", "log_scale", "factor", "all"}
    assert found.gradient["factor"].shape == (6,)


def test_unrolled_to_convergence_is_one_of_the_references() -> None:
    descent = GradientDescent(0.03, max_iterations=200, tolerance=1e-9)
    found = check(IMAML(minimiser=descent), case_of(LinearGaussian.random(5, 1, 1)))
    assert found.ok
    assert errors(found, "own objective: unrolled") < 1e-6
    assert errors(found, "exact minimum: unrolled") < 1e-6


def test_maml_agrees_with_its_own_objective_and_has_no_other() -> None:
    for strategy in (MAML(minimiser=FEW), MetaSGD(minimiser=FEW)):
        found = check(strategy, case_of(shifted(1), shared_noise=True))
        assert found.ok and float(found.table["error"].max()) < 1e-7
        assert not found.table["reference"].str.startswith("exact").any()


def test_many_coordinates_are_checked_along_random_directions() -> None:
    case = case_of(LinearGaussian.random(1, 2, 33))
    found = check(IMAML(), case)
    assert found.ok and found.table["error"].max() < 1e-6
    assert not check(IMAML(adjoint=Spoiled(lambda v: 0 * v)), case).ok


def test_every_reference_is_in_float64_and_the_gradient_in_the_users_type() -> None:
    case = single(case_of(shifted(1)))
    found = check(IMAML(), case)
    assert found.ok and found.gradient["loc"].dtype == torch.float32
    assert 1e-9 < errors(found, "the same in float64") < 1e-4
    assert errors(found, "exact minimum") < 1e-4


def test_a_module_of_float32_parameters_is_checked_in_float64() -> None:
    class Line(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor([0.3, -0.2]))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x)):
                return pyro.sample("y", dist.Normal(torch.tanh(x @ self.slope) + level, 0.5), obs=y)

    model, tasks = Line(), single(case_of(LinearGaussian.random(0, 3, 2))).tasks
    density = Density(model, tasks)
    found = check_gradient(IMAML(), density, GaussianPrior.from_density(density), tasks)
    assert found.ok and "shared" in found.gradient
    assert model.slope.dtype == torch.float32


# -- broken adjoints ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoiled:
    """The implicit adjoint with its derivative passed through a function."""

    change: Callable[[Tensor], Tensor]

    def solve(self, energy: Any, start: Tensor, minimiser: Any) -> Any:
        theta, info = Implicit().solve(energy, start, minimiser)
        if theta.requires_grad:
            theta.register_hook(self.change)
        return theta, info


@dataclass(frozen=True)
class PublicCode:
    """x = ((1 + c)I + H/(λ + 10))⁻¹ v where (I + H/λ)⁻¹ v is wanted: what two peers compute."""

    lam: float

    def solve(self, matvec: Any, b: Tensor, tolerance: Tensor | None = None) -> Solution:
        def operator(v: Tensor) -> Tensor:
            return 1.0 * v + (matvec(v) - self.lam * v) / (self.lam + 10)

        found = CG().solve(operator, b)
        return replace(found, x=found.x / self.lam)


def test_a_gradient_of_zero_is_exposed_also_for_a_scalar() -> None:
    case = case_of(shifted(4, 1, 1))
    found = check(IMAML(adjoint=Spoiled(torch.zeros_like)), case)
    assert not found.ok
    assert said(found, "not that of its own objective", "it is 0")
    assert said(found, "the adjoint (Spoiled) is wrong")


def test_a_wrong_sign_is_exposed() -> None:
    found = check(IMAML(adjoint=Spoiled(torch.neg)), case_of(shifted(4, 1, 1)))
    assert not found.ok and said(found, "points the other way", "cosine -1")


def test_a_wrong_operator_is_exposed() -> None:
    problem = LinearGaussian.random(1)
    case = case_of(problem.at(log_scale=0 * problem.log_scale, theta0=problem.theta0 + 0.5))
    found = check(IMAML(adjoint=Implicit(PublicCode(1.0))), case)
    assert not found.ok and errors(found, "own objective") > 0.1
    assert said(found, "the adjoint (Implicit) is wrong")


def test_a_gradient_that_is_not_finite_is_exposed() -> None:
    found = check(IMAML(adjoint=Spoiled(lambda v: v / 0)), case_of(shifted(1)))
    assert not found.ok and said(found, "not finite")


def test_a_small_error_is_exposed_where_it_is_above_the_tolerance() -> None:
    case = case_of(shifted(1))
    spoiled = IMAML(adjoint=Spoiled(lambda v: 1.0001 * v))
    assert check(spoiled, case).ok
    assert not check(spoiled, case, tolerance=1e-6).ok
    with pytest.raises(ValueError, match="tolerance is a relative error"):
        check(spoiled, case, tolerance=0.0)


# -- budgets --------------------------------------------------------------------------------------


def stiff() -> Case:
    """∇²E from 1 to 10⁶."""
    rng, dim = np.random.default_rng(0), 7
    designs = tuple(np.diag(np.logspace(0, 3, dim)) for _ in range(2))
    targets = tuple(x @ rng.normal(size=dim) for x in designs)
    queries = tuple(rng.normal(size=(6, dim)) for _ in range(2))
    answers = tuple(rng.normal(size=6) for _ in range(2))
    scale = np.full(dim, np.log(3.0))
    return case_of(LinearGaussian(designs, targets, queries, answers, np.zeros(dim), scale, 0.0))


def test_too_few_products_on_a_stiff_problem_are_exposed() -> None:
    found = check(IMAML(adjoint=Implicit(CG(max_iterations=5))), stiff())
    assert not found.ok
    assert said(found, "CG stopped at 5 products with residual", "2 of 2 tasks", "Nystrom")


def test_enough_products_on_the_same_problem_pass() -> None:
    found = check(IMAML(adjoint=Implicit(CG(max_iterations=500))), stiff())
    assert found.ok and errors(found, "exact minimum: dense") < 1e-6
    assert float((found.tasks["curvature_max"] / found.tasks["curvature_min"]).min()) > 5e5


def test_an_inner_problem_that_is_not_solved_is_exposed() -> None:
    found = check(IMAML(minimiser=FEW), case_of(shifted(1)))
    assert not found.ok
    assert said(found, "6 of 6 tasks", "not solved", "raise max_iterations (now 3)")
    assert errors(found, "own objective: unrolled") > 0.1
    assert bool((found.tasks["distance"] > 0.01).all())


def test_unrolling_the_same_steps_is_right_for_them_and_said_to_be_no_minimum() -> None:
    found = check(IMAML(minimiser=FEW, adjoint=Unrolled()), case_of(shifted(1)))
    assert found.ok and errors(found, "own objective") < 1e-7
    assert errors(found, "exact minimum") > 0.1
    assert said(found, "exact gradient of the steps as they are run", "differs")


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (FOMAML(minimiser=FEW), "inner gradients as constants"),
        (IMAML(adjoint=OneStep(0.01)), "0.01·I for the inverse Hessian"),
        (IMAML(adjoint=Detached()), "no derivative through θ*"),
    ],
)
def test_another_gradient_by_design_is_named_with_its_cosine(strategy: Strategy, why: str) -> None:
    found = check(strategy, case_of(shifted(1)))
    assert not found.ok and said(found, "by design", "cosine", why)


def test_a_loose_tolerance_makes_the_objective_rough_or_the_gradient_wrong_and_is_named() -> None:
    descent = GradientDescent(0.03, max_iterations=500, tolerance=0.05)
    found = check(IMAML(minimiser=descent), case_of(shifted(5, 3, 1)))
    assert not found.ok and said(found, "tolerance")


# -- saddles and jumps ----------------------------------------------------------------------------


def wells(theta0: float, targets: list[float]) -> Case:
    """y ~ N(θ² + xθ, 0.3²), x = 0 in the support: two wells for y > 0, one for y < 0."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(theta**2 + x[:, 0] * theta, 0.3), obs=y)

    tasks = Tasks.from_list([(tensor([[0.0], [1.0]]), tensor([y, 1.5])) for y in targets])
    tasks = replace(tasks, is_query=torch.tensor([[False, True]]).expand(len(targets), -1))
    prior = GaussianPrior.create(tensor([theta0]), 1.0)
    return Case(Density(model, tasks), tasks, prior, tensor([]))


def test_a_saddle_is_exposed_and_the_tasks_named() -> None:
    """From the point of symmetry Newton's method has nowhere to go: ∇E = 0 at the top."""
    found = check(IMAML(), wells(0.0, [1.0, -1.0, 1.0, 1.0, -1.0]))
    assert not found.ok
    assert said(found, "3 of 5 tasks (0, 2, 3)", "indefinite", "saddle")
    assert (found.tasks["curvature_min"] < 0).tolist() == [True, False, True, True, False]
    assert found.tasks["converged"].all()  # by its gradient it is the best of minima
    assert not said(found, "CG stopped")
    assert check(IMAML(), wells(0.3, [1.0, -1.0, 1.0])).ok


def test_a_jump_within_the_difference_is_said() -> None:
    """θ0 beside the watershed: θ* is one well or the other, half a step away."""
    found = check(IMAML(), wells(2e-4, [1.0, -1.0]))
    assert not found.ok
    assert said(found, "1 of 2 tasks (0)", "jumps to another minimum", "Stochastic")
    assert errors(found, "exact minimum") < 1e-6  # along the branch it is right


def near_a_fold(distance: float) -> Case:
    """y ~ N(θ + 0.3 sin 3θ, 1): a descent's minimum vanishes at θ0 = −1.2209423893901017."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        mean = theta + x[:, 0] * torch.sin(3 * theta)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    tasks = Tasks.from_list([(tensor([[0.3], [0.0]]), tensor([1.0, 1.0]))])
    tasks = replace(tasks, is_query=torch.tensor([[False, True]]))
    prior = GaussianPrior.create(tensor([-1.2209423893901017 - distance]), 1.0)
    return Case(Density(model, tasks), tasks, prior, tensor([]))


@pytest.mark.parametrize("distance", [2e-3, 1.5e-3, 1.05e-3, 5e-4])
def test_near_a_fold_differences_are_blamed_and_not_a_right_adjoint(distance: float) -> None:
    """The curvature at θ* is 0.25 to 0.13 there, and a difference's step 0.001."""
    found = check(IMAML(), near_a_fold(distance))
    assert errors(found, "exact minimum: dense solve") < 1e-8
    assert errors(found, "exact minimum: differences") > 1e-3
    assert not said(found, "is wrong") and not said(found, "is not that of")
    assert said(found, "is that of the exact minimum's objective by a dense solve")
    assert said(found, "finite differences are off", "fold", "task 0")
    leaps = said(found, "jumps to another minimum")
    assert leaps == (distance < 1e-3) and found.ok == (not leaps)
    assert not said(found, "Lower its tolerance")
    wrong = check(IMAML(adjoint=Spoiled(lambda v: 1.1 * v)), near_a_fold(distance))
    assert not wrong.ok and said(wrong, "is not that of")


def test_losses_that_are_not_those_at_the_minimum_are_not_the_adjoints_fault() -> None:
    class Other(IMAML):
        def losses(self, density, prior, shared, tasks):  # type: ignore[no-untyped-def]
            losses, info = super().losses(density, prior, shared, tasks)
            return losses + 0.5 * (prior.loc.detach() ** 2).sum(), info

    found = check(Other(), case_of(shifted(1)))
    assert not found.ok and errors(found, "exact minimum") < 1e-7
    assert said(found, "adjoint (Implicit) is right", "losses return is not its loss_at")


# -- data types -----------------------------------------------------------------------------------


def single(case: Case) -> Case:
    tasks, prior = case.tasks.to(torch.float32), case.prior
    prior = replace(prior, loc=prior.loc.float(), log_scale=prior.log_scale.float())
    shared = [s.name for s in case.density.shared_sites]
    density = Density(case.density.model, tasks, shared=shared)
    return Case(density, tasks, prior, case.shared.float())


def test_float32_with_many_rows_shows() -> None:
    """The same problem with 20 and with 2,000 rows."""
    lost = {}
    for rows in (20, 2000):
        rng = np.random.default_rng(0)
        xs = [np.c_[np.ones(rows), rng.normal(size=rows)] for _ in range(4)]
        ys = [x @ np.array([1.0, 0.5]) + rng.normal(size=rows) for x in xs]
        zero = np.zeros(2)
        problem = LinearGaussian(
            tuple(xs[:2]), tuple(ys[:2]), tuple(xs[2:]), tuple(ys[2:]), zero, zero, 0.0
        )
        case = case_of(problem)
        wide, narrow = (check(IMAML(), c, tolerance=1e-5) for c in (case, single(case)))
        assert wide.ok
        lost[rows] = errors(narrow, "the same in float64")
        assert lost[rows] > 100 * errors(wide, "exact minimum: dense")
    assert lost[2000] > 10 * lost[20]
    assert not narrow.ok and said(narrow, "float32", "up to 4000 rows", "use float64")


def test_a_model_that_cannot_be_run_in_float64_is_said() -> None:
    weights = torch.ones(2)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(x @ weights + level, 0.5), obs=y)

    tasks = single(case_of(LinearGaussian.random(0, 3, 2))).tasks
    density = Density(model, tasks)
    with pytest.raises(ValueError, match=r"cannot be run in float64.*dtype=x\.dtype"):
        check_gradient(IMAML(), density, GaussianPrior.from_density(density), tasks)


# -- what there is no gradient to check of --------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("stochastic", "generator.*random"),
        ("joint", "no method losses"),
        ("complete pooling", "no method losses"),
        ("reptile", "do not follow the gradient of its losses"),
    ],
)
def test_strategies_without_such_a_gradient_are_refused(strategy: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{why}.*works with IMAML"):
        check(CATALOGUE[strategy].strategy, case_of(LinearGaussian.random(0)))


# -- how it reads ---------------------------------------------------------------------------------


def test_it_prints_verdict_references_findings_and_tasks() -> None:
    found = check(IMAML(minimiser=FEW), case_of(shifted(1)))
    text = str(found)
    assert repr(found) == text
    for piece in ("Gradient of IMAML: NOT OK", "dense solve", "log_scale", "cosine", "distance"):
        assert piece in text
    flat = " ".join(text.split())
    for finding in found.findings:
        assert " ".join(finding.split()) in flat


def test_the_same_seed_gives_the_same_table_and_nothing_is_changed() -> None:
    case = case_of(shifted(1), shared_noise=True)
    before = case.prior.loc.clone(), case.shared.clone()
    state = torch.get_rng_state()
    first, second = (check(IMAML(), case, seed=3).table for _ in range(2))
    assert first.equals(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before[0], case.prior.loc) and torch.equal(before[1], case.shared)


def test_a_custom_strategy_needs_losses_alone() -> None:
    """Without a minimiser to look at, the finite differences of its objective remain."""

    class Mine(MetaGradient):
        def losses(self, density, prior, shared, tasks):
            theta, info = prox(lambda t: (t - prior.loc**2).square().sum(-1), prior.loc[None])
            return theta.sum() * torch.ones(len(tasks), dtype=FLOAT), info

        def task_losses(self, density, state, batch, generator):
            return self.losses(density, state.meta.prior, state.meta.shared, batch.tasks)

        def adapt(self, density, state, tasks, generator):
            raise NotImplementedError

    found = check(Mine(), case_of(LinearGaussian.random(0)))
    assert found.ok and set(found.table["reference"]) == {"own objective: differences"}
