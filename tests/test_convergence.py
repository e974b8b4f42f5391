"""Runs end where their objective does, whatever the units, the limit and the start; or say so."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
from helpers import FLOAT, Case, assert_close, assert_same, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import (
    IMAML,
    MAML,
    AmortisedVariational,
    CompletePooling,
    Density,
    Fit,
    GaussianPrior,
    GradientDescent,
    JointVariational,
    LaplaceEvidence,
    NoPooling,
    NotConverged,
    PyroSVI,
    SigmaIMAML,
    Strategy,
    Tasks,
    TaskSource,
    fit,
)
from varmeta.inference.base import Meta, NonFiniteLoss, State, StepInfo
from varmeta.inference.iterate_test import IterateTest
from varmeta.inference.learned import Evaluated, flat, learned
from varmeta.inference.quasi_newton import QuasiNewton
from varmeta.seeds import generator

SMOOTH: dict[str, Strategy] = {
    "evidence": LaplaceEvidence(),
    "joint": JointVariational(),
    "imaml": IMAML(),
    "sigma-imaml": SigmaIMAML(),
    "amortised": AmortisedVariational(),
    "no pooling": NoPooling(),
    "complete pooling": CompletePooling(),
}


def line(unit: float, size: float, zero: float) -> Any:
    """y = zero + size · (a + b x/unit + noise): the same model of x and y in other units."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(zero + size * tensor(1.0), size * 2.0))
        b = pyro.sample("b", dist.Normal(tensor(0.0), size * 1.5 / unit))
        noise = pyro.sample("noise", dist.LogNormal(tensor(math.log(size)), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a + b * x[:, 0], noise), obs=y)

    return model


def counts(unit: float) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(tensor(0.0), 2.0))
        b = pyro.sample("b", dist.Normal(tensor(0.0), 1.5 / unit))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Poisson((a + b * x[:, 0]).exp()), obs=y)

    return model


def rows(kind: str, num_tasks: int = 10) -> list[tuple[Tensor, Tensor]]:
    noise = generator(3)
    pairs = []
    for k in range(num_tasks):
        x = torch.rand(5 + k % 3, 1, generator=noise, dtype=FLOAT)
        a, b = torch.randn(2, generator=noise, dtype=FLOAT) * tensor([0.8, 0.6]) + 1
        y = a + b * x[:, 0] + 0.4 * torch.randn(len(x), generator=noise, dtype=FLOAT)
        if kind == "counts":
            y = torch.poisson((0.5 * y).exp(), generator=noise)
        pairs.append((x, y))
    return pairs


def ends(strategy: Strategy, density: Density, tasks: Tasks, **options: Any) -> Fit:
    """A run that must arrive."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConverged)
        warnings.filterwarnings("ignore", ".*scale.*", RuntimeWarning)
        done = fit(strategy, density, tasks, **options)
    assert done.converged is True and done.finished
    return done


@cache
def recorded() -> tuple[Density, Tasks]:
    """One density for all strategies, whose derivatives are recorded once."""
    tasks = Tasks.from_list(rows("normal"))
    return Density(line(1, 1, 0), tasks, shared=["noise"]), tasks


@cache
def end_of(name: str) -> Fit:
    """Where the strategy ends on `recorded()` with its defaults."""
    return ends(SMOOTH[name], *recorded())


def assert_same_end(mine: Fit, other: Fit) -> None:
    """To 0.03 standard errors, each run's tolerance being 0.01; without collapsed scales."""
    first, second = (flat([*d.state.meta.raw.values()]) for d in (mine, other))
    gone = first.isinf() | ((first < -4) & (second < -4))
    away = (first - second).masked_fill(gone, 0.0).abs()
    known = mine.moving()["error"].to_numpy()
    error = torch.full_like(first, 1e-2)
    if len(known) == len(error) and not np.isnan(known).any():
        error = tensor(known).clamp(max=1.0)
    assert float((away / error).max()) < 0.03


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_units_and_zero_points_change_nothing(name: str) -> None:
    """Inputs times 1,000, targets times 50 plus 3,000, and the priors moved along."""
    unit, size, zero = 1000.0, 50.0, 3000.0
    tasks = Tasks.from_list([(unit * x, zero + size * y) for x, y in rows("normal")])
    density = Density(line(unit, size, zero), tasks, shared=["noise"])
    assert_same_end(end_of(name), ends(SMOOTH[name], density, tasks))


@pytest.mark.parametrize("name", ["evidence", "joint", "imaml"])
def test_units_change_nothing_with_a_log_link(name: str) -> None:
    pairs, found = rows("counts"), []
    for unit in (1.0, 1000.0):
        tasks = Tasks.from_list([(unit * x, y) for x, y in pairs])
        found.append(ends(SMOOTH[name], Density(counts(unit), tasks), tasks))
    assert_same_end(*found)


@pytest.mark.parametrize("name", SMOOTH)
def test_twice_the_limit_changes_nothing(name: str) -> None:
    twice = SMOOTH[name]
    if hasattr(twice, "steps"):
        twice = replace(twice, steps=2 * twice.steps)  # type: ignore[type-var]
    done = ends(twice, *recorded())
    assert_same(end_of(name).state.meta.raw, done.state.meta.raw)


@pytest.mark.parametrize("name", ["evidence", "joint", "imaml"])
@pytest.mark.parametrize("wide", [1e-3, 30.0, 1e3])
def test_started_elsewhere_it_ends_in_the_same_place(name: str, wide: float) -> None:
    """Scales off by up to a thousand, θ0 by three of its standard deviations; same hyperprior."""
    density, tasks = recorded()
    prior = GaussianPrior.from_density(density)
    away = prior.moved(prior.loc + 3 * prior.scale, prior.log_scale + math.log(wide), None)
    here, there = end_of(name), ends(SMOOTH[name], density, tasks, prior=away)
    # What `there` has learned, seen from the start of `here`.
    meta, start = there.state.meta, here.state.meta.origin
    moved = {
        "loc": (there.prior.loc - start.loc) / start.scale,
        "log_scale": there.prior.log_scale - start.log_scale,
        "shared": meta.raw["shared"],
    }
    same = replace(there, state=replace(there.state, meta=Meta(start, density, moved)))
    assert_same_end(here, same)


# -- exact ends ------------------------------------------------------------------------------------


def oracle(problem: LinearGaussian) -> tuple[np.ndarray, float]:
    """θ0, log scales and log noise of maximum marginal likelihood, and −log p there, by scipy."""
    dim = problem.dim

    def at(v: np.ndarray) -> LinearGaussian:
        return problem.at(theta0=v[:dim], log_scale=v[dim : 2 * dim], log_noise=float(v[-1]))

    def value(v: np.ndarray) -> tuple[float, np.ndarray]:
        there = at(v)
        slope = there.log_marginal_grad()
        return -there.log_marginal(), -np.r_[slope.theta0, slope.log_scale, slope.log_noise]

    start = np.r_[problem.theta0, problem.log_scale, problem.log_noise]
    found = scipy.optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-8})
    return found.x, found.fun


@pytest.mark.parametrize("strategy", [LaplaceEvidence(), JointVariational()], ids=["L", "J"])
@pytest.mark.parametrize("seed", [21, 22])
def test_linear_gaussian_runs_end_at_maximum_likelihood(strategy: Strategy, seed: int) -> None:
    problem = LinearGaussian.random(seed, num_tasks=15, dim=2)
    case = case_of(problem, shared_noise=True)
    best, least = oracle(problem)
    done = ends(strategy, case.density, case.tasks.support, prior=case.prior)
    found = np.r_[done.prior.loc, done.prior.log_scale, done.shared]
    belief = case.density.shared_log_prior(done.shared)  # weak, and not in the oracle
    assert float(done.history["loss"].iloc[-1]) * 15 + float(belief) < least + 0.05
    np.testing.assert_allclose(found[:2], best[:2], atol=0.05)
    np.testing.assert_allclose(found[2:], best[2:], atol=0.05)


def test_errors_are_those_of_the_curvature() -> None:
    """`Fit.moving` against the inverse Hessian of the evidence by differences, to a few percent."""
    problem = LinearGaussian.random(23, num_tasks=20, dim=2)
    case = case_of(problem)
    done = ends(LaplaceEvidence(), case.density, case.tasks.support, prior=case.prior)
    moving = done.moving()
    assert list(moving["quantity"]) == [
        "loc[theta.0]",
        "loc[theta.1]",
        "log_scale[0]",
        "log_scale[1]",
    ]
    assert float(moving["moves"].max()) < 0.02
    centre = np.r_[done.prior.loc, done.prior.log_scale]

    def slope(v: np.ndarray) -> np.ndarray:
        grad = problem.at(theta0=v[:2], log_scale=v[2:]).log_marginal_grad()
        return -np.r_[grad.theta0, grad.log_scale]

    eye = 1e-5 * np.eye(4)
    dense = np.stack([(slope(centre + e) - slope(centre - e)) / 2e-5 for e in eye])
    exact = np.sqrt(np.diag(np.linalg.inv(dense)))
    exact[:2] /= case.prior.scale.numpy()  # `moving` is in units of the prior at the start
    np.testing.assert_allclose(moving["error"], exact, rtol=0.05)


# -- QuasiNewton alone -----------------------------------------------------------------------------


def quasi(loss: Any, start: Tensor, steps: int = 400, tolerance: float = 0.01) -> State:
    """Minimise `loss` of two numbers, in nats of one task, from `start`."""
    case = case_of(LinearGaussian.random(0, dim=2))
    meta = Meta.start(case.density, case.prior, learn_scale=False)
    meta.raw["loc"].data.copy_(start)
    rule = QuasiNewton(tolerance, steps)
    tensors, optimisers = rule.begin(meta)
    state = State(meta, optimisers, tensors)

    def evaluate() -> Evaluated:
        leaf = meta.raw["loc"]
        value = loss(leaf)
        if not bool(value.isfinite()):
            raise NonFiniteLoss("beyond")
        return Evaluated(
            StepInfo(float(value.detach()), 1), list(torch.autograd.grad(value, [leaf]))
        )

    while state.step < steps and not state.arrived:
        rule.step(state, evaluate, 1.0)
        state.step += 1
    return state


def test_a_trial_beyond_the_models_domain_is_too_far_and_no_end() -> None:
    """−log x₀ + x₀ is infinite at and below 0, its minimum at 1."""
    state = quasi(lambda v: 50 * (v[0] - v[0].log() + (v[1] - 3) ** 2), tensor([9.0, -9.0]))
    assert state.arrived
    assert_close(state.meta.raw["loc"], [1.0, 3.0], 1e-2)


def test_where_the_objective_is_not_finite_it_says_so() -> None:
    with pytest.raises(NonFiniteLoss, match="beyond"):
        quasi(lambda v: v[0].log() + 0 * v[1], tensor([-1.0, 0.0]))


def test_a_saddle_is_left() -> None:
    """x₁ = 0 is a saddle of (x₁² − 1)²: the gradient is 0 there, and the minima are at ±1."""
    state = quasi(lambda v: 20 * ((v[1] ** 2 - 1) ** 2 + (v[0] - 2) ** 2), tensor([0.0, 0.0]))
    assert state.arrived
    assert_close(state.meta.raw["loc"].abs(), [2.0, 1.0], 1e-2)


def test_jumps_are_noticed_and_gone_on_with() -> None:
    """A staircase down to 0 whose slope points the other way on each step."""

    def stairs(v: Tensor) -> Tensor:
        away = v.norm()
        return 30 * (away + 0.4 * torch.remainder(away, 0.37) * (v[0] > -9)) ** 1.0

    start = tensor([3.0, 2.0])
    state = quasi(stairs, start, steps=300)
    assert QuasiNewton.has_jumps(state)
    assert float(state.meta.raw["loc"].detach().norm()) < 0.5 * float(start.norm())
    least = float(state.tensors["outer_least"])
    assert float(state.tensors["outer_loss"]) <= least + 1e-9, "the best point is kept"


def test_a_narrow_start_does_not_pass_for_an_end() -> None:
    """At a scale of 1e-4 the evidence is flat in it, and hardly any gradient is left."""
    tasks = Tasks.from_list(rows("normal"))
    density = Density(line(1, 1, 0), tasks, shared=["noise"])
    prior = GaussianPrior.from_density(density)
    narrow = prior.moved(prior.loc, prior.log_scale + math.log(1e-4), None)
    for strategy in (LaplaceEvidence(), JointVariational()):
        done = ends(strategy, density, tasks, prior=narrow)
        assert float(done.prior.log_scale.exp()[0]) > 0.2


# -- IterateTest alone -----------------------------------------------------------------------------


def iterates(
    noise: float, pull: float, start: float, steps: int = 20_000, seed: int = 0
) -> tuple[Tensor | None, int, list[Tensor]]:
    """Where noisy steps towards 0 end by the test: their average, after how many, all averages."""
    test, draws = IterateTest(0.2, steps), generator(seed)
    x = tensor([start, -start])
    case = case_of(LinearGaussian.random(0, dim=2))
    state = State(Meta.start(case.density, case.prior), tensors=test.begin(x))
    averages: list[Tensor] = []
    for step in range(steps):
        state.step = step
        rate = test.rate(state, 0.5)
        x = x - rate * (pull * x + noise * torch.randn(2, generator=draws, dtype=FLOAT))
        average, arrived = test.add(state, x, 1.0)
        if average is not None:
            averages.append(average)
            x = average.clone()
        if arrived:
            return average, step + 1, averages
    return None, steps, averages


def test_the_average_of_stationary_iterates_is_the_answer() -> None:
    """Ten seeds: each average is within the three tolerances of 0 that the test allows it.

    The test rejects iterates at rest now and then, and takes longer; eight of ten arrive in time.
    """
    found = [iterates(noise=2.0, pull=0.3, start=30.0, seed=seed)[0] for seed in range(10)]
    averages = [average for average in found if average is not None]
    assert len(averages) >= 8
    assert max(float(average.abs().max()) for average in averages) < 0.6


def test_iterates_that_still_move_are_not_at_an_end() -> None:
    """A pull of 1e-3 takes 2,000 steps from 30 to 10: no stretch on the way counts as rest."""
    average, _, averages = iterates(noise=0.02, pull=1e-3, start=30.0, steps=2_000)
    assert average is None and not averages


@pytest.mark.parametrize(
    "strategy", [MAML(minimiser=GradientDescent(0.05, 3, tolerance=0))], ids=str
)
def test_a_strategy_of_plain_steps_arrives_as_well(strategy: Strategy) -> None:
    """Its steps depend on the units, as its docstring says; its end does not on the limit."""
    case = case_of(LinearGaussian.random(5, num_tasks=12, dim=2))
    done = fit(strategy, case.density, case.tasks, prior=case.prior)
    assert done.converged


# -- noise -----------------------------------------------------------------------------------------


def test_steps_with_noise_end_at_the_same_place_as_those_without() -> None:
    """Draws and Adam against quadrature and quasi-Newton, within half a standard error (seed 0).

    Their tolerance is 0.2 of one, and both the average and the bias of the steps may take it up.
    """
    case = case_of(LinearGaussian.random(31, num_tasks=40, dim=1))
    prior = GaussianPrior.from_density(case.density)
    exact = ends(JointVariational(), case.density, case.tasks, prior=prior)
    noisy = fit(
        JointVariational(q_update="gradient", steps=6000), case.density, case.tasks, prior=prior
    )
    error = exact.moving()["error"].to_numpy()
    gone = flat([*learned(noisy.state.meta).values()]) - flat([*learned(exact.state.meta).values()])
    assert noisy.converged and np.abs(gone.numpy() / error).max() < 0.5


def test_minibatches_of_solved_q_find_the_scale() -> None:
    """2,000 tasks, 100 at a time: within three standard errors of the run that sees all."""
    draws = generator(7)
    theta = 2 + 0.7 * torch.randn(2000, 1, generator=draws, dtype=FLOAT)
    y = theta + torch.randn(2000, 4, generator=draws, dtype=FLOAT)
    x = torch.ones(4, 1, dtype=FLOAT)
    tasks = Tasks.from_list([(x, row) for row in y])

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(tensor(0.0), 5.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    density = Density(model, tasks)
    exact = ends(JointVariational(), density, tasks)
    done = fit(JointVariational(steps=300), density, tasks, batch_size=100)
    error = tensor(exact.moving()["error"])
    mine, other = (flat([*learned(d.state.meta).values()]) for d in (done, exact))
    gone = mine - other
    assert bool((gone.abs() < 3 * error).all())


# -- what is said ----------------------------------------------------------------------------------


def small_case() -> Case:
    return case_of(LinearGaussian.random(2, num_tasks=5, dim=2))


@pytest.mark.parametrize(
    "strategy",
    [
        IMAML(steps=2),
        LaplaceEvidence(steps=2),
        JointVariational(steps=2),
        JointVariational(q="diagonal", steps=20),
        PyroSVI(steps=20, draws=4),
    ],
    ids=lambda s: s.name,
)
def test_a_limit_that_comes_first_is_said(strategy: Strategy) -> None:
    case = small_case()
    prior = GaussianPrior.from_density(case.density)
    with pytest.warns(NotConverged, match=r"did not converge: the limit of \d+ steps came first"):
        done = fit(strategy, case.density, case.tasks, prior=prior)
    assert done.converged is False and done.finished and "raise steps" in done.reason


def test_a_schedule_of_resets_is_run_to_its_end() -> None:
    from varmeta import Reset

    case = small_case()
    done = fit(JointVariational(steps=12, resets=Reset(4)), case.density, case.tasks)
    assert done.converged is None and done.reason == "" and len(done.history) == 12


def test_a_quasi_newton_method_is_refused_where_there_is_noise() -> None:
    case = small_case()
    strategy = IMAML(optimiser="quasi-newton")
    with pytest.raises(ValueError, match="every step sees other tasks; use 'adam'"):
        fit(strategy, case.density, case.tasks, batch_size=2)
    with pytest.raises(ValueError, match="q_update='solve' does not go with q='diagonal'"):
        fit(JointVariational(q="diagonal", q_update="solve"), case.density, case.tasks)


# -- streams ---------------------------------------------------------------------------------------


def stream(bad: float) -> tuple[Density, TaskSource]:
    """Tasks of two rows; a share of them holds targets that no float can square."""

    def draw(source: torch.Generator) -> Tasks:
        y = torch.randn(8, 4, generator=source, dtype=FLOAT)
        wild = torch.rand(8, 1, generator=source) < bad
        y = torch.where(wild, 1e200, y)
        x = torch.zeros(4, 1, dtype=FLOAT)
        tasks = Tasks.from_list([(x, row) for row in y])
        return replace(tasks, is_query=tasks.mask & (torch.arange(4) > 1))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    source = TaskSource(draw)
    return Density(model, source), source


def test_a_streams_task_that_is_not_finite_is_skipped_counted_and_named() -> None:
    density, source = stream(0.02)
    with pytest.warns(RuntimeWarning, match=r"of the stream's 320 tasks were skipped.*: '\d'"):
        done = fit(IMAML(steps=40, skip=0.1), density, source)
    assert done.finished and bool(done.prior.loc.isfinite().all())
    assert 0 < int(done.state.counts["skipped"][0]) < 20


@pytest.mark.parametrize(("bad", "skip"), [(0.5, 0.05), (0.05, 0.0)])
def test_more_than_the_stated_share_stops_the_run(bad: float, skip: float) -> None:
    density, source = stream(bad)
    with pytest.raises(NonFiniteLoss, match="tasks are not finite; skip allows"):
        fit(IMAML(steps=40, skip=skip), density, source)


def test_beyond_a_jump_a_step_that_is_not_finite_is_taken_back() -> None:
    """The stairs again, with a cliff beside them where nothing is finite."""

    def stairs(v: Tensor) -> Tensor:
        away = v.norm()
        cliff = torch.where(v[1] < 0.05, torch.nan, 0.0)
        return 30 * (away + 0.4 * torch.remainder(away, 0.37)) + cliff

    state = quasi(stairs, tensor([3.0, 2.0]), steps=300)
    assert QuasiNewton.has_jumps(state)
    assert float(state.meta.raw["loc"].detach().norm()) < 2.0
    assert math.isfinite(float(state.tensors["outer_loss"]))
