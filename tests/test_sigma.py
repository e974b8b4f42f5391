"""Shrinkage strategies: their gradients against closed forms, and what the scales converge to.

That joint MAP collapses below Chen et al.'s threshold and is biased above it is in
`test_joint_truth.py`; that the validation gradient does neither is here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, leaves_of, linear_model, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import (
    CG,
    Cholesky,
    Density,
    GaussianPrior,
    GradientDescent,
    Implicit,
    ProximalDescent,
    SigmaIMAML,
    SigmaMAML,
    SigmaReptile,
    Tasks,
    Unrolled,
    check_gradient,
    fit,
)
from varmeta.inference.approximate import PriorDominated
from varmeta.inference.base import Batch
from varmeta.models import Modules
from varmeta.seeds import generator

PROBLEM = LinearGaussian.random(1, 9, 5)
GROUPS = torch.tensor([0, 1, 1, 0, 2])  # modules of two, two and one coordinates
LONG = ProximalDescent(0.05, 400, reduction="sum", clip=None)


def by_module(per_coordinate: np.ndarray) -> np.ndarray:
    return np.bincount(GROUPS.numpy(), weights=per_coordinate)


def modular(problem: LinearGaussian = PROBLEM) -> tuple[LinearGaussian, GaussianPrior]:
    """The problem with one scale per module, and varmeta's prior of it."""
    scales = np.array([-0.4, -0.7, -1.1])
    problem = problem.at(
        theta0=problem.theta0 + 0.5, log_scale=scales[GROUPS.numpy()], log_noise=0.3
    )
    modules = Modules(("a", "b", "c"), GROUPS)
    return problem, GaussianPrior.create(
        tensor(problem.theta0), tensor(scales).exp(), groups=modules
    )


@pytest.mark.parametrize(
    "strategy",
    [
        SigmaIMAML(),
        SigmaIMAML(adjoint=Implicit(Cholesky())),
        SigmaIMAML(minimiser=LONG),
        SigmaMAML(minimiser=LONG, adjoint=Unrolled(checkpoint=50)),
        SigmaMAML(minimiser=LONG, adjoint=Unrolled(), scale_adjoint=Implicit()),
    ],
    ids=["default", "dense", "descent", "unrolled", "unrolled and implicit"],
)
def test_the_gradient_in_every_scale_is_the_closed_form(strategy: SigmaIMAML) -> None:
    """2 σ_m⁻² (θ_m − θ0_m)ᵀ[(H + Λ)⁻¹∇g]_m for log σ_m, and the oracle's."""
    problem, prior = modular()
    case = replace(case_of(problem), prior=prior)
    prior, shared, leaves = leaves_of(case)
    losses, info = strategy.losses(case.density, prior, shared, case.tasks)
    loc, log_scale = torch.autograd.grad(losses.sum(), leaves[:2])
    exact = problem.meta_grad()
    assert_close(loc, exact.theta0, 1e-7)
    assert_close(log_scale, by_module(exact.log_scale), 1e-7)
    paper = np.zeros(5)
    for i in range(problem.num_tasks):
        theta, x, y = problem.theta_star(i), problem.query_designs[i], problem.query_targets[i]
        slope = -x.T @ (y - x @ theta) / problem.noise2
        solved = np.linalg.solve(problem.hessian(i) + np.diag(problem.precision), slope)
        paper += 2 * problem.precision * (theta - problem.theta0) * solved
    assert_close(log_scale, by_module(paper), 1e-7)
    assert info.converged is None or bool(info.converged.all())


def test_finite_differences_agree() -> None:
    """Of unrolled steps as run, far from converged, with and without a low-rank part."""
    problem, prior = modular()
    case = case_of(problem, shared_noise=True)
    few = SigmaMAML(
        minimiser=ProximalDescent(0.02, 6, tolerance=0, reduction="sum", clip=None),
        adjoint=Unrolled(5),
    )
    for factor in (None, tensor(0.3 * np.cos(np.arange(10)).reshape(5, 2))):
        start = replace(prior, factor=factor)
        table = check_gradient(few, case.density, start, case.tasks, tolerance=1e-6).table
        own = table[table["reference"] == "own objective: differences"]
        assert len(own) >= 4 and own["error"].max() < 1e-8, table


def test_theta0_from_the_joint_objective() -> None:
    """Its gradient is Λ(θ0 − θ_i*), summed; the scales keep that of the query loss."""
    problem, prior = modular()
    case = replace(case_of(problem), prior=prior)
    prior, shared, leaves = leaves_of(case)
    for strategy in (
        SigmaIMAML(loc_from="joint"),
        SigmaMAML(loc_from="joint", minimiser=LONG),
        SigmaReptile(),
    ):
        losses, _ = strategy.losses(case.density, prior, shared, case.tasks)
        loc, log_scale = torch.autograd.grad(losses.sum(), leaves[:2])
        pulled = problem.precision * (problem.theta0 - problem.theta_stars())
        assert_close(loc, pulled.sum(0), 1e-7)
        assert_close(log_scale, by_module(problem.meta_grad().log_scale), 1e-7)
        assert_close(losses.sum(), problem.meta(), 1e-8)


def test_reptile_moves_theta0_to_the_mean_of_the_tasks() -> None:
    """θ0 + ε · mean_i(θ_i* − θ0) at the first step, in every coordinate alike; Adam moves the
    scales against the sign of their gradient."""
    problem, prior = modular()
    case = case_of(problem)
    strategy = SigmaReptile(loc_rate=0.3, learning_rate=0.02)
    state = strategy.init(case.density, prior, case.tasks, generator(0))
    batch = Batch(case.tasks, torch.arange(9), 9)
    strategy.step(case.density, state, batch, generator(0))
    moved = 0.3 * (problem.theta_stars().mean(0) - problem.theta0)
    after = state.meta.fixed()[0]
    assert_close(after.loc - prior.loc, moved, 1e-7)
    signs = np.sign(by_module(problem.meta_grad().log_scale))
    assert_close(after.log_scale - prior.log_scale, -0.02 * signs, 1e-5)


# -- one dimension --------------------------------------------------------------------------------


def one_dimension(variance: float, rows: int) -> tuple[Density, Tasks]:
    """Two tasks with the second moments that a population of this variance has exactly.

    Unit noise, `rows` rows in either part. With a, b the means of a task's parts around φ = 2 the
    query loss is quadratic in them, and its gradient in σ needs E a² = variance + 1/rows and
    E ab = variance alone.
    """
    a = math.sqrt(variance + 1 / rows)
    b = variance / a
    pairs = [
        (torch.ones(2 * rows, 1, dtype=FLOAT), tensor(2 + s * np.repeat([a, b], rows)))
        for s in (1, -1)
    ]
    tasks = Tasks.from_list(pairs)
    tasks = replace(tasks, is_query=(torch.arange(2 * rows) >= rows).expand(2, -1))
    return Density(linear_model(1, 1.0), tasks), tasks


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("variance", [0.05, 1.5])
def test_the_validation_gradient_is_consistent(rows: int, variance: float) -> None:
    """d/d log σ² = −n w(1−w)² σ² (variance/σ² − 1), w = nσ²/(1 + nσ²): 0 at the truth alone.

    0.05 is below 4/n, where joint MAP collapses from anywhere (`test_joint_truth.py`).
    """
    density, tasks = one_dimension(variance, rows)
    for v in (0.1 * variance, variance, 7 * variance):
        log_scale = tensor([0.5 * math.log(v)]).requires_grad_()
        prior = GaussianPrior(tensor([2.0]), log_scale, torch.zeros(1, dtype=torch.long))
        losses, _ = SigmaIMAML().losses(density, prior, density.shared_init, tasks)
        (slope,) = torch.autograd.grad(losses.mean(), log_scale)
        w = rows * v / (1 + rows * v)
        wanted = -2 * rows * w * (1 - w) ** 2 * v * (variance / v - 1)
        assert abs(float(slope) - wanted) < 1e-9


@pytest.mark.parametrize(
    ("strategy", "start"),
    [(SigmaIMAML, 0.1), (SigmaIMAML, 4.0), (SigmaReptile, 4.0), (SigmaMAML, 4.0)],
)
def test_the_scale_found_is_the_true_one(strategy: type[SigmaIMAML], start: float) -> None:
    variance = 0.6
    density, tasks = one_dimension(variance, 2)
    prior = GaussianPrior.create(tensor([1.8]), start * math.sqrt(variance))
    options = {"minimiser": ProximalDescent(0.3, 12, tolerance=0, reduction="sum", clip=None)}
    chosen = strategy(steps=200, learning_rate=0.1, **(options if strategy is SigmaMAML else {}))  # type: ignore[arg-type]
    done = fit(chosen, density, tasks, prior=prior)
    assert abs(float(done.prior.scale) / math.sqrt(variance) - 1) < 1e-3
    assert abs(float(done.prior.loc) - 2) < 0.02


# -- long adaptation ------------------------------------------------------------------------------


def test_proximal_descent_ends_at_the_same_minimum() -> None:
    problem, prior = modular()
    case = case_of(problem)
    strategy = SigmaIMAML(
        minimiser=ProximalDescent(0.05, 1000, tolerance=1e-13, reduction="sum", clip=None)
    )
    losses, info = strategy.losses(case.density, prior, case.shared, case.tasks)
    assert_close(losses.sum(), problem.meta(), 1e-10)
    assert bool(info.converged.all())  # type: ignore[union-attr]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_no_scale_is_too_small_for_it(momentum: float) -> None:
    """At σ = 1e-6 a bare step of 0.01 overshoots by 1e10; here θ stays at θ0, its derivative 1."""
    problem, prior = modular()
    case = case_of(problem)
    tiny = prior.moved(
        prior.loc.clone().requires_grad_(),
        torch.full_like(prior.log_scale, math.log(1e-6)).requires_grad_(),
        None,
    )
    steps = ProximalDescent(0.01, 100, tolerance=0, momentum=momentum, reduction="sum", clip=None)
    losses, _ = SigmaMAML(minimiser=steps).losses(case.density, tiny, case.shared, case.tasks)
    at_start = problem.at(log_scale=np.full(5, math.log(1e-6)))
    assert_close(losses.sum(), at_start.meta(), 1e-6)
    slopes = torch.autograd.grad(losses.sum(), [tiny.loc, tiny.log_scale])
    assert_close(slopes[0], at_start.meta_grad().theta0, 1e-6)
    assert float(slopes[1].abs().max()) < 1e-6
    bare = GradientDescent(0.01, 100, tolerance=0, momentum=momentum, reduction="sum", clip=None)
    with torch.no_grad():
        lost, _ = SigmaIMAML(minimiser=bare).losses(case.density, tiny, case.shared, case.tasks)
    assert not bool((lost < 1e6).all())


@pytest.mark.filterwarnings("ignore:SigmaMAML. the data hardly tell the scale of 'c'")  # few tasks
def test_a_longer_adaptation_does_not_drift() -> None:
    """Once at the minimum, ten times the steps change nothing, with scales learned on the way."""
    problem, prior = modular()
    case = case_of(problem)
    done = fit(
        SigmaMAML(
            steps=5,
            minimiser=ProximalDescent(0.05, 200, tolerance=0, reduction="sum", clip=None),
            optimiser="adam",
        ),
        case.density,
        case.tasks,
        prior=prior,
    )
    ends = []
    for steps in (400, 4000):
        own = done.strategy
        longer = replace(
            own, minimiser=ProximalDescent(0.05, steps, tolerance=0, reduction="sum", clip=None)
        )  # type: ignore[type-var]
        with torch.no_grad():
            losses, _ = longer.losses(case.density, done.prior, case.shared, case.tasks)
        ends.append(losses)
    assert_close(ends[1], ends[0], 1e-8)


def test_a_task_without_rows_does_not_drown_the_others() -> None:
    """At rest Adam's slope is 1/eps: through three steps it would cancel to nothing but noise."""
    from varmeta import IMAML, Adam

    case = case_of(LinearGaussian.random(2, 4, 2))
    empty = replace(case.tasks, mask=case.tasks.mask.clone())
    empty.mask[1] &= empty.is_query[1]
    strategy = IMAML(minimiser=Adam(0.1, 10, tolerance=0), adjoint=Unrolled())

    def slope(tasks: Tasks) -> Tensor:
        prior, shared, leaves = leaves_of(case)
        losses, _ = strategy.losses(case.density, prior, shared, tasks)
        return torch.autograd.grad(losses.sum(), leaves[0])[0]

    alone = sum(slope(empty.select([i])) for i in range(4))
    assert_close(slope(empty), alone, 1e-9)
    theta = case.prior.loc.detach()
    row = empty.select([1])
    direct = theta.clone().requires_grad_()
    loss = case.density.negative_log_likelihood(direct[None], row.query, case.shared)
    assert_close(slope(row), torch.autograd.grad(loss.sum(), direct)[0], 1e-9)


# -- what is refused ------------------------------------------------------------------------------


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loc_from must be one of .*'joint', got 'map'"):
        SigmaIMAML(loc_from="map")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loc_from must be 'joint' for SigmaReptile"):
        SigmaReptile(loc_from="validation")
    with pytest.raises(ValueError, match="loc_rate must be above 0"):
        SigmaReptile(loc_rate=0)
    problem, prior = modular()
    case = case_of(problem)
    with pytest.raises(ValueError, match="two objectives"):
        check_gradient(SigmaReptile(), case.density, prior, case.tasks)
    with pytest.raises(ValueError, match=r"needs the prior's Λ.*use CG\(\)"):
        fit_of_a_function()


def fit_of_a_function() -> None:
    from varmeta import prox

    anchor = tensor([[1.0]]).requires_grad_()
    prox(
        lambda t: (t**2 + (t - anchor) ** 2).sum(-1),
        tensor([[0.0]]),
        adjoint=Implicit(PriorDominated()),
    )


def test_bounds_are_kept_and_a_scale_that_wants_to_leave_stays_at_the_edge() -> None:
    problem, _ = modular()
    case = case_of(problem)
    low, high = 0.5, 0.6
    prior = GaussianPrior.from_density(
        case.density, scales=Modules(("a", "b", "c"), GROUPS), bounds=(low, high)
    )
    for strategy in (SigmaIMAML(steps=30), SigmaReptile(steps=30)):
        seen = []

        def look(step: int, info: object, seen: list[int] = seen) -> None:
            seen.append(step)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            done = fit(strategy, case.density, case.tasks, prior=prior, on_step=look)
        scale = done.prior.log_scale.exp()
        assert bool(((scale >= low - 1e-12) & (scale <= high + 1e-12)).all()) and seen
        assert bool(((scale - low).abs() < 1e-9).any() | ((scale - high).abs() < 1e-9).any())


def test_of_two_solves_the_worse_one_is_reported() -> None:
    problem, prior = modular()
    case = replace(case_of(problem), prior=prior)
    prior, shared, leaves = leaves_of(case)
    reported = []
    for own, scales in (
        (Implicit(), PriorDominated()),
        (Implicit(PriorDominated()), None),
        (Implicit(PriorDominated()), CG()),
    ):
        strategy = SigmaIMAML(
            adjoint=own, scale_adjoint=None if scales is None else Implicit(scales)
        )
        losses, info = strategy.losses(case.density, prior, shared, case.tasks)
        torch.autograd.grad(losses.sum(), leaves[:2])
        reported.append(info.residual)
    assert_close(reported[0], reported[1], 1e-9)
    assert_close(reported[2], reported[1], 1e-9)
    assert float(reported[1].min()) > 1e-3  # type: ignore[union-attr]
