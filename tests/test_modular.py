"""The problems with planted scales: they are what they say, and the scales are found again."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from varmeta import (
    CG,
    LBFGS,
    BlockDiagonal,
    Density,
    Diagonal,
    GaussianPrior,
    Implicit,
    NewtonCG,
    PriorDominated,
    ProximalDescent,
    SigmaIMAML,
    SigmaMAML,
    SigmaReptile,
    Tasks,
    TaskSource,
    fit,
)
from varmeta.models import PlantedModules, linear_modules, spiral_modules
from varmeta.seeds import generator

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("draw", [linear_modules, spiral_modules])
# Over 24 other seeds, the maximiser of the query likelihood on 1,000 tasks with these rows had
# every scale within 10% of the planted one in 22: a new seed fails with a chance of about 8%.
# The standard deviation of a log scale was 0.028 (wide modules) and 0.039 (narrow ones).
PROBLEM = linear_modules(1000, support=3, query=9, splits=4)
TASKS = PROBLEM(generator(0))
DENSITY = Density(PROBLEM.model, TASKS)
START = GaussianPrior.from_density(DENSITY, hyperprior=False)


# -- what they are ---------------------------------------------------------------------------------


@BOTH
def test_shapes_and_seeds(draw: type[PlantedModules]) -> None:
    problem = draw(7, support=2, query=5, splits=3)
    tasks, dim = problem(generator(1)), len(problem.loc)
    assert tasks.inputs.shape == (21, 7, 0)
    assert tasks.targets.shape == (21, 7, len(problem.noise))
    assert tasks.support.num_rows.tolist() == [2] * 21
    assert tasks.query.num_rows.tolist() == [5] * 21
    assert problem.parameters(generator(1)).shape == (7, dim)
    assert torch.equal(tasks.targets, problem(generator(1)).targets)
    assert not torch.equal(tasks.targets, problem(generator(2)).targets)
    source = TaskSource(problem, seed=3)
    assert torch.equal(source.batch(4).targets, source.batch(4).targets)


@BOTH
def test_splits_have_the_same_rows_and_other_support(draw: type[PlantedModules]) -> None:
    one, three = draw(4, support=2, query=5), draw(4, support=2, query=5, splits=3)
    first, all_of = one(generator(0)), three(generator(0))
    assert torch.equal(all_of.targets, first.targets.repeat(3, 1, 1))
    used = (~all_of.is_query).view(3, 4, 7).sum(0)
    assert used.tolist() == [[1] * 6 + [0]] * 4


@BOTH
def test_the_model_is_what_was_planted(draw: type[PlantedModules]) -> None:
    """−log p of rows at the θ they came from is N·Σ(log ξ_k + ½ log 2π) + ½χ², 6 errors wide."""
    problem = draw(2000, support=1, query=2)
    tasks = problem(generator(5))
    density = Density(problem.model, tasks)
    theta = problem.parameters(generator(5))
    loss = density.negative_log_likelihood(theta, tasks).mean()
    constant = 3 * (problem.noise.log() + 0.5 * math.log(2 * math.pi)).sum()
    degrees = 3 * len(problem.noise)
    assert float(loss - constant) == pytest.approx(
        degrees / 2, abs=6 * math.sqrt(degrees / 2 / 2000)
    )
    for m, scale in enumerate(problem.scales):
        inside = (theta - problem.loc)[:, problem.modules.groups == m]
        error = 6 * float(scale) / math.sqrt(2 * inside.numel())
        assert float(inside.std()) == pytest.approx(float(scale), abs=error)


@BOTH
def test_sites_are_the_modules(draw: type[PlantedModules]) -> None:
    problem = draw(2)
    density = Density(problem.model, problem(generator(0)))
    modules = GaussianPrior.from_density(density).modules
    assert modules.names == problem.modules.names
    assert torch.equal(modules.groups, problem.modules.groups)


def test_spread_is_the_moment_around_another_centre() -> None:
    problem = spiral_modules(20000)
    centre = torch.linspace(-3, 6, 20, dtype=torch.float64)
    square = (problem.parameters(generator(1)) - centre).square()
    seen = square.mean(0).view(10, 2).mean(1).sqrt()
    assert torch.allclose(problem.spread(centre), seen, rtol=0.02)  # 4 standard errors
    assert torch.equal(problem.spread(problem.loc), problem.scales)


def test_a_spiral_keeps_lengths_and_is_smooth_at_zero() -> None:
    readings = spiral_modules(1).readings
    theta = torch.randn(20, generator=generator(0), dtype=torch.float64) * 5
    pairs = theta.view(10, 2).norm(dim=-1)
    assert torch.allclose(readings(theta).view(10, 2).norm(dim=-1), pairs)
    eighth = torch.zeros(20, dtype=torch.float64)
    eighth[0] = 5.0  # an angle of π
    assert torch.allclose(readings(eighth), -eighth, atol=1e-9)
    zero = torch.zeros(20, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(readings, zero)
    assert torch.allclose(jacobian, torch.eye(20, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be at least 1"),
        ({"support": 4, "query": 4, "splits": 3}, "8 rows have no 3 parts of 4"),
        ({"readings_per_row": 0}, "readings_per_row must be at least 1, got 0"),
    ],
)
def test_errors(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spiral_modules(**wrong)


def test_a_row_of_many_readings_is_their_mean() -> None:
    """4 rows of 1 reading and 1 row of 4 have likelihoods that differ by a constant in θ."""
    y = 10 * torch.randn(4, 20, generator=generator(0), dtype=torch.float64)
    theta = torch.randn(2, 1, 20, generator=generator(1), dtype=torch.float64)
    losses = []
    for count, targets in ((1, y), (4, y.mean(0, keepdim=True))):
        tasks = Tasks.from_list([(targets.new_zeros(len(targets), 0), targets)])
        density = Density(spiral_modules(1, readings_per_row=count).model, tasks)
        losses.append([density.negative_log_likelihood(x, tasks).item() for x in theta])
    assert np.diff(losses[0]) == pytest.approx(np.diff(losses[1]), rel=1e-9)


# -- recovery --------------------------------------------------------------------------------------


def maximiser(problem: PlantedModules, tasks: Tasks) -> np.ndarray:
    """Scales that, with θ0, minimise the mean query loss at the closed-form MAP, by scipy."""
    dim, rows, held = len(problem.loc), problem.support, problem.query
    design = problem.readings(torch.eye(dim, dtype=torch.float64)).T / problem.noise[:, None]
    seen, wanted = (part.targets.mean(1) / problem.noise for part in (tasks.support, tasks.query))
    pull = rows * seen @ design

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        both = torch.tensor(point, requires_grad=True)
        precision = torch.exp(-2 * both[dim:])
        matrix = rows * design.T @ design + precision.diag()
        theta = torch.linalg.solve(matrix, (pull + precision * both[:dim]).T).T
        value = 0.5 * held * (theta @ design.T - wanted).square().sum(-1).mean()
        (slope,) = torch.autograd.grad(value, both)
        return value.item(), slope.numpy()

    start = np.r_[np.zeros(dim), np.full(dim, math.log(problem.prior_scale))]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-13}).x
    return np.exp(found[dim:])


def slope(
    density: Density, tasks: Tasks, prior: GaussianPrior, adjoint: Implicit, minimiser: object
) -> Tensor:
    """Gradient of the mean query loss in the log scales, `[M]`."""
    scales = prior.log_scale.detach().clone().requires_grad_()
    at = prior.moved(prior.loc.detach(), scales, None)
    strategy = SigmaIMAML(minimiser=minimiser, adjoint=adjoint)
    losses, _ = strategy.losses(density, at, density.shared_init, tasks)
    return torch.autograd.grad(losses.mean(), scales)[0]


COMMON = {"steps": 60, "learning_rate": 0.15, "posterior_kind": "delta"}
STRATEGIES = {
    "exact": (SigmaIMAML(**COMMON), 1000),
    "unrolled": (
        SigmaMAML(
            minimiser=ProximalDescent(
                0.5, 30, tolerance=0, momentum=0.7, reduction="sum", clip=None
            ),
            **COMMON,
        ),
        1000,
    ),
    "reptile": (SigmaReptile(**COMMON), 1000),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_linear_scales_are_found_again(name: str) -> None:
    """Within 10% of what was planted, always ranked, and within 6% of what these tasks allow.

    The 6%: two of the standard deviations above, for what minibatches leave; σ-Reptile's θ0 is
    another estimate than the maximiser's.
    """
    strategy, batch = STRATEGIES[name]
    result = fit(strategy, DENSITY, TASKS, prior=START, batch_size=batch)
    scale = result.prior.log_scale.exp()
    best = torch.tensor(maximiser(PROBLEM, TASKS))
    assert float((scale / PROBLEM.scales - 1).abs().max()) < 0.1
    assert float(scale[:4].min()) > float(scale[4:].max())
    assert float((scale / best - 1).abs().max()) < 0.06


def test_spiral_scales_are_where_the_gradient_vanishes() -> None:
    """At φ, where the minima are known: its sign changes within 0.8 and 1.25 of what was planted.

    On two other seeds with twice the tasks a slope was 6.0 standard errors from 0 on average at
    0.85, and 3.9 at 1.15, so about 4 and more here, further out: one of 20 has the wrong sign with
    a chance of about 0.1%.
    """
    start_of = runpy.run_path(str(ROOT / "examples" / "shrinkage.py"))["MostLikely"]
    problem = spiral_modules(500, support=1, query=3, splits=4, readings_per_row=300)
    tasks = problem(generator(2))
    density = Density(problem.model, tasks)
    start = GaussianPrior.from_density(density, hyperprior=False)
    adjoint = Implicit(CG(preconditioner=PriorDominated()))
    for factor in (0.8, 1.25):
        prior = start.moved(problem.loc, (factor * problem.scales).log(), None)
        found = slope(density, tasks, prior, adjoint, start_of())
        assert bool((found * (factor - 1) > 0).all()), found


# -- stand-ins for the inverse ---------------------------------------------------------------------


def relative_error(
    density: Density, tasks: Tasks, prior: GaussianPrior, solver: object, minimiser: object
) -> float:
    """‖g − g_exact‖/‖g_exact‖ of the query loss's gradient in the log scales."""

    adjoints = Implicit(CG(preconditioner=PriorDominated())), Implicit(solver)
    exact, found = (slope(density, tasks, prior, each, minimiser) for each in adjoints)
    return float((found - exact).norm() / exact.norm())


def linear_error(solver: object, shrink: float) -> float:
    prior = START.moved(PROBLEM.loc, PROBLEM.scales.log() + math.log(shrink), None)
    some = TASKS.select(range(100))
    return relative_error(DENSITY, some, prior, solver, NewtonCG())


def test_blocks_are_exact_where_modules_do_not_interact() -> None:
    problem = spiral_modules(20, support=2, query=5)
    tasks = problem(generator(0))
    density = Density(problem.model, tasks)
    prior = GaussianPrior.create(problem.loc, problem.scales / 4, groups=problem.modules)
    error = relative_error(density, tasks, prior, BlockDiagonal(), LBFGS(tolerance=1e-8))
    assert error < 1e-4  # of the solves


def test_blocks_of_one_coordinate_are_the_diagonal() -> None:
    for shrink in (1.0, 0.1):
        block, diagonal = (linear_error(s, shrink) for s in (BlockDiagonal(), Diagonal()))
        assert block == pytest.approx(diagonal, rel=1e-6)


@pytest.mark.parametrize("solver", [BlockDiagonal(), Diagonal(), PriorDominated()])
def test_stand_ins_become_exact_as_scales_become_small(solver: object) -> None:
    """What is left out is of the order of hσ² beside Λ: with σ/10 the error is a hundredth.

    (hσ², of the largest curvature h of three rows, is 0.08 at the larger scales: the next order,
    for which a quarter is allowed.)
    """
    errors = [linear_error(solver, shrink) for shrink in (0.02, 0.002)]
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.25)


def test_stand_ins_are_far_off_where_the_sum_ties_modules_together() -> None:
    """At the planted scales hσ² is about 200: nothing bounds them, and they are not small."""
    for solver in (BlockDiagonal(), Diagonal(), PriorDominated()):
        assert linear_error(solver, 1.0) > 0.1
