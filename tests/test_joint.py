"""The joint variational objective, its optimum, its resets and its per-task table."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FLOAT,
    Case,
    assert_close,
    assert_same,
    case_of,
    leaves_of,
    tasks_of,
    tensor,
)
from linear_gaussian import GaussianOptimum, LinearGaussian
from torch import Tensor

from varmeta.inference.base import Batch, State
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.families import GaussianQ
from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.free_energy import cubature, free_energy
from varmeta.inference.joint import JointVariational
from varmeta.inference.resets import Reset
from varmeta.posterior import Delta, Gaussian, TaskPosterior
from varmeta.seeds import generator
from varmeta.tasks import TaskSource

INTERIOR = [0, 2, 3, 4, 5, 6, 7]  # seeds for (6 tasks, 3 dims) whose optimum has positive scales


def points_for(q: GaussianQ) -> Tensor:
    """Those of the cubature rule, for every task: quadratics are averaged exactly."""
    rule = cubature(q.noise_dim, FLOAT, torch.device("cpu"))
    return rule[:, None].expand(-1, len(q.mean), -1)


def at(problem: LinearGaussian, optimum: GaussianOptimum) -> LinearGaussian:
    return problem.at(
        theta0=optimum.theta0,
        log_scale=np.log(optimum.scale),
        log_noise=float(np.log(optimum.noise)),
    )


STEPPED = [
    JointVariational(q=q, q_update="gradient")  # type: ignore[arg-type]
    for q in ("delta", "diagonal", "low_rank", "full")
]
SOLVED = JointVariational(q="full", q_update="solve", prior_update="gradient")
every_family = pytest.mark.parametrize("strategy", STEPPED, ids=lambda s: s.q)
every_way = pytest.mark.parametrize(
    "strategy", [*STEPPED, SOLVED], ids=lambda s: f"{s.q} {s.q_update}"
)


# -- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 6, 3), (1, 6, 3), (2, 9, 4), (3, 5, 1)], ids=str)
def test_bound_is_exact_under_a_cubature_rule(shape: tuple[int, int, int]) -> None:
    """Any diagonal q, not only the best one."""
    problem = LinearGaussian.random(*shape)
    case = case_of(problem, shared_noise=True)
    rng = np.random.default_rng(0)
    means = rng.normal(size=(problem.num_tasks, problem.dim))
    sds = np.exp(rng.normal(size=means.shape))
    q = GaussianQ(tensor(means), tensor(sds))
    values = free_energy(
        case.density, case.prior, case.shared, case.tasks.support, q, points_for(q)
    )
    assert_close(values.sum(), problem.gaussian_joint(means, sds**2), 1e-12)
    for i, value in enumerate(values):  # task by task too
        one = problem.subset(i)
        assert_close(value, one.gaussian_joint(means[i : i + 1], sds[i : i + 1] ** 2), 1e-11)


@pytest.mark.parametrize("seed", INTERIOR)
@pytest.mark.parametrize("fit_noise", [False, True])
def test_bound_is_stationary_at_the_exact_optimum(seed: int, fit_noise: bool) -> None:
    """In θ0, the log scales, the log noise, and every mean and log sd."""
    problem = LinearGaussian.random(seed)
    optimum = problem.gaussian_optimum(fit_noise=fit_noise)
    assert optimum.converged and not optimum.collapsed.any()
    case = case_of(at(problem, optimum), shared_noise=True)
    prior, shared, leaves = leaves_of(case)
    mean = tensor(optimum.means).requires_grad_()
    log_sd = tensor(np.diagonal(optimum.covs, axis1=1, axis2=2)).sqrt().log().requires_grad_()
    q = GaussianQ(mean, log_sd.exp())
    total = free_energy(case.density, prior, shared, case.tasks.support, q, points_for(q)).sum()
    assert_close(total, optimum.value, 1e-9)
    leaves = [*leaves[: 3 if fit_noise else 2], mean, log_sd]
    grads = torch.autograd.grad(total, leaves, retain_graph=True)
    # Against the KL's own gradients per task, which the likelihood's (or other tasks') cancel.
    size = (
        torch.autograd.functional.jacobian(
            lambda m: prior.kl(m, log_sd.detach().exp()).sum(), mean.detach()
        )
        .abs()
        .max()
    )
    for grad in grads:
        assert float(grad.abs().max() / size.detach()) < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_delta_objective_is_exact_and_stationary_at_its_optimum(seed: int) -> None:
    problem = LinearGaussian.random(seed)
    theta0, thetas, value = problem.delta_optimum()
    case = case_of(problem.at(theta0=theta0))
    prior, shared, (loc, _, _) = leaves_of(case)
    theta = tensor(thetas).requires_grad_()
    total = TaskEnergy(case.density, case.tasks.support, shared, prior)(theta).sum()
    assert_close(total, value, 1e-11)
    pull = (prior.scale**-2 * (theta - loc)).abs().max()
    for grad in torch.autograd.grad(total, [loc, theta]):
        assert float(grad.abs().max() / pull.detach()) < 1e-9


# -- what a run converges to ----------------------------------------------------------------------


@cache
def long_run(seed: int) -> tuple[LinearGaussian, Case, Fit]:
    """The noise is a constant of the model, the hyperprior flat: the optimum is the oracle's."""
    drawn = LinearGaussian.random(seed)
    problem = drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale + 0.3)
    case = case_of(problem)
    strategy = JointVariational(
        q="diagonal", steps=500, learning_rate=0.1, adapt_steps=400, tolerance=0.01
    )
    return problem, case, fit(strategy, case.density, case.tasks.support, prior=case.prior)


def check_q(posterior: TaskPosterior, means: np.ndarray, sds: np.ndarray) -> None:
    """Means to 0.05 sd. A log sd is a random walk pulled to its optimum: with Adam's steps of the
    order of the learning rate times a noisy gradient's sign and the cosine decay, some 4% remain
    for each (T·D of them: up to 15%), but no more than 4% in the mean."""
    assert isinstance(posterior, Gaussian)
    assert np.abs((posterior.mean.numpy() - means) / sds).max() < 0.05
    ratio = np.log(posterior.sd.numpy() / sds)
    assert np.abs(ratio).max() < 0.15 and abs(ratio.mean()) < 0.04


@pytest.mark.parametrize("seed", [0, 2])
def test_a_run_converges_to_the_optimum(seed: int) -> None:
    problem, _, done = long_run(seed)
    optimum = problem.gaussian_optimum()
    assert np.abs((done.prior.loc.numpy() - optimum.theta0) / optimum.scale).max() < 0.02
    assert np.abs(done.prior.scale.numpy() / optimum.scale - 1).max() < 0.02
    check_q(done.posterior(), optimum.means, np.sqrt(np.diagonal(optimum.covs, axis1=1, axis2=2)))


def test_adapting_finds_the_best_diagonal_gaussian_for_tasks_seen_or_not() -> None:
    problem, _, done = long_run(0)
    new = LinearGaussian.random(50, 4).at(log_noise=problem.log_noise)
    learned = {"theta0": done.prior.loc.numpy(), "log_scale": done.prior.log_scale.numpy()}
    for data in (problem, new):
        there = data.at(**learned)
        q = done.adapt(tasks_of(data).support)
        check_q(q, there.theta_stars(), np.sqrt(there.best_variances()))


def test_the_delta_run_converges_to_its_optimum() -> None:
    drawn = LinearGaussian.random(3)
    problem = drawn.at(theta0=drawn.theta0 + 0.5)
    case = case_of(problem)
    done = fit(
        JointVariational(q="delta", steps=600, learning_rate=0.1, tolerance=1e-6),
        case.density,
        case.tasks.support,
        prior=case.prior,
    )
    theta0, thetas, value = problem.delta_optimum()
    posterior = done.posterior()
    assert isinstance(posterior, Delta)
    assert torch.equal(done.prior.log_scale, case.prior.log_scale)
    assert_close(done.prior.loc, theta0, 1e-3)
    assert_close(posterior.mean, thetas, 1e-3)
    assert_close(done.history["loss"].iloc[-1], value / 6, 1e-5)


# -- the table ------------------------------------------------------------------------------------


def settled(strategy: JointVariational, case: Case) -> JointVariational:
    return strategy.settled(case.density, whole=True)


def advance(strategy: JointVariational, case: Case, state: State, steps: int) -> None:
    tasks = case.tasks.support
    batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
    for _ in range(steps):
        strategy.step(case.density, state, batch, generator(0, state.step))
        state.step += 1


@every_family
def test_q_starts_at_the_prior(strategy: JointVariational) -> None:
    case = case_of(LinearGaussian.random(0))
    strategy, q = settled(strategy, case), strategy.q
    state = strategy.init(case.density, case.prior, case.tasks.support, generator(0))
    posterior = strategy.posterior(case.density, state, case.tasks.support, generator(0))
    assert torch.allclose(posterior.mean, case.prior.loc.expand(6, -1))
    if q != "delta":  # a low-rank q starts a little wider: its columns may not be 0
        slack = 0.02 if q == "low_rank" else 1e-12
        assert torch.allclose(posterior.sd, case.prior.scale.expand(6, -1), rtol=slack)


@every_family
def test_a_reset_puts_every_q_back_to_the_prior_and_forgets_its_momentum(
    strategy: JointVariational,
) -> None:
    """The step after a reset is, bit for bit, that of a table and optimiser made new there."""
    case = case_of(LinearGaussian.random(0))
    strategy = settled(replace(strategy, resets=Reset(4), steps=12), case)
    tasks = case.tasks.support
    run, fresh = (strategy.init(case.density, case.prior, tasks, generator(0)) for _ in range(2))
    advance(strategy, case, run, 4)
    with torch.no_grad():  # as learned so far, but for the table
        for name, leaf in fresh.meta.raw.items():
            leaf.copy_(run.meta.raw[name])
        fresh.tensors["rows"].copy_(strategy._start(fresh.meta).expand(6, -1))
    fresh.optimisers["meta"].load_state_dict(run.state_dict()["optimisers"]["meta"])
    fresh.step = run.step
    before = {name: t.clone() for name, t in run.tensors.items()}
    advance(strategy, case, run, 1)
    advance(strategy, case, fresh, 1)
    assert_same(run.state_dict(), fresh.state_dict())
    assert not torch.equal(before["rows"], run.tensors["rows"])


def test_resets_happen_at_their_period_and_not_at_the_start_or_end() -> None:
    """Distance of the means from θ0 falls in the step after a reset only."""
    case = case_of(LinearGaussian.random(2))
    strategy = JointVariational(q="diagonal", resets=Reset(5), steps=20, learn_loc=False)
    strategy = settled(strategy, case)
    state = strategy.init(case.density, case.prior, case.tasks.support, generator(0))
    distance = []
    for _ in range(20):
        advance(strategy, case, state, 1)
        distance.append(float(state.tensors["rows"][:, :3].abs().mean()))
    falls = [step for step in range(1, 20) if distance[step] < 0.5 * distance[step - 1]]
    assert falls == [5, 10, 15]
    assert distance[-1] == max(distance[-5:])  # the last q is a converging one, not a reset one


@every_way
def test_a_batch_touches_its_own_rows_only(strategy: JointVariational) -> None:
    case = case_of(LinearGaussian.random(0))
    tasks = case.tasks.support
    strategy = settled(strategy, case)
    state = strategy.init(case.density, case.prior, tasks, generator(0))
    advance(strategy, case, state, 3)  # every row has momentum
    names = ["rows", "visits"]
    names += ["momentum", "square"] if strategy.q_update == "gradient" else []
    before = {name: state.tensors[name].clone() for name in names}
    index = torch.tensor([1, 4])
    strategy.step(case.density, state, Batch(tasks.select(index), index, 6), generator(0))
    for name in names:
        moved = (state.tensors[name] != before[name]).reshape(6, -1).any(-1)
        assert moved.tolist() == [False, True, False, False, True, False]


def test_a_rows_step_does_not_depend_on_the_batch_size() -> None:
    """With the prior fixed a task's first step alone is that in company: a delta q's step of Adam
    to rounding, a solved q to the solver's tolerance."""
    case = case_of(LinearGaussian.random(0))
    tasks = case.tasks.support
    fixed = JointVariational(q="delta", learn_loc=False)
    for strategy, tolerance in ((fixed, 1e-12), (replace(SOLVED, learn_loc=False), 1e-8)):
        ready, results = settled(strategy, case), []
        for index in (torch.arange(6), torch.tensor([2])):
            state = ready.init(case.density, case.prior, tasks, generator(0))
            ready.step(case.density, state, Batch(tasks.select(index), index, 6), generator(0))
            results.append(state.tensors["rows"][2])
        assert_close(*results, tolerance)


def test_adapting_starts_at_the_learned_prior() -> None:
    _, case, done = long_run(0)
    ran = done.settled
    assert isinstance(ran, JointVariational)
    start = replace(done, settled=replace(ran, adapt_steps=0))
    with pytest.warns(RuntimeWarning, match="is untouched: it stands at θ0"):
        posterior = start.adapt(case.tasks.unsplit.select([0, 1]))
    assert_close(posterior.mean, done.prior.loc.expand(2, -1), 1e-12)
    assert_close(posterior.sd, done.prior.scale.expand(2, -1), 1e-12)


def test_adapting_leaves_the_run_alone() -> None:
    _, case, done = long_run(0)
    before = done.state.state_dict()
    done.adapt(case.tasks.support)
    assert_same(done.state.state_dict(), before)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": "delta", "learn_scale": True}, "no solution"),
        ({"q": "laplace"}, "q must be"),
        ({"samples": 3}, "even number"),
        ({"samples": 0}, "samples must be a whole number of at least 2, got 0"),
        ({"rank": 0}, "rank must be .*at least 1, got 0"),
        ({"batch_rows": 0}, "batch_rows must be .*at least 1 or None, got 0"),
        (
            {"expectation": "exact"},
            "one of 'auto', 'quadrature', 'draws', 'cubature', got 'exact'",
        ),
        ({"q_update": "adam"}, "q_update must be one of 'auto', 'solve', 'gradient', got 'adam'"),
        ({"prior_update": "newton"}, "'auto', 'quasi-newton', 'gradient', 'closed_form', got"),
        ({"steps": 0}, "steps must be .* at least 1, got 0"),
        ({"tolerance": 0.0}, r"tolerance must be positive .*, got 0\.0"),
        ({"learning_rate": -1.0}, r"learning_rate must be positive .*, got -1\.0"),
        ({"shift": True, "prior_update": "closed_form"}, "use 'gradient'"),
        ({"parametrisation": "whitened", "prior_update": "closed_form"}, "use 'gradient'"),
        ({"parametrisation": "whitened", "shift": True}, "leave shift False"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointVariational(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "whole", "message"),
    [
        ({"q": "diagonal"}, True, "q_update='solve' does not go with q='diagonal'"),
        ({"batch_rows": 2}, True, "does not go with batch_rows; use 'gradient'"),
        ({"shift": True}, True, "does not go with shift; use 'gradient'"),
        ({"parametrisation": "whitened"}, True, "does not go with parametrisation='whitened'"),
        ({"resets": Reset(3)}, True, "does not go with resets; use 'gradient'"),
        ({"expectation": "draws"}, True, "does not go with expectation='draws'"),
        (
            {"prior_update": "quasi-newton"},
            False,
            "prior_update='quasi-newton' needs all tasks in every step; use 'gradient'",
        ),
        (
            {"q_update": "gradient", "prior_update": "quasi-newton"},
            True,
            "prior_update='quasi-newton' needs q_update='solve'; use 'gradient'",
        ),
    ],
)
def test_choices_that_rule_each_other_out_are_refused(
    arguments: dict[str, Any], whole: bool, message: str
) -> None:
    case = case_of(LinearGaussian.random(0))
    with pytest.raises(ValueError, match=message):
        JointVariational(**{"q_update": "solve"} | arguments).settled(case.density, whole=whole)


@pytest.mark.parametrize(
    ("arguments", "whole", "chosen"),
    [
        ({}, True, ("full", "solve", "quadrature", "quasi-newton")),
        ({}, False, ("full", "solve", "quadrature", "gradient")),
        ({"expectation": "cubature"}, True, ("full", "solve", "cubature", "quasi-newton")),
        ({"prior_update": "closed_form"}, True, ("full", "solve", "quadrature", "closed_form")),
        ({"q": "diagonal"}, True, ("diagonal", "gradient", "draws", "gradient")),
        ({"q_update": "gradient"}, True, ("full", "gradient", "draws", "gradient")),
        ({"resets": Reset(3)}, True, ("full", "gradient", "draws", "gradient")),
        ({"batch_rows": 2}, False, ("full", "gradient", "draws", "gradient")),
    ],
)
def test_open_choices_are_made_as_documented(
    arguments: dict[str, Any], whole: bool, chosen: tuple[str, ...]
) -> None:
    case = case_of(LinearGaussian.random(0))
    ready = JointVariational(**arguments).settled(case.density, whole=whole)
    assert (ready.q, ready.q_update, ready.expectation, ready.prior_update) == chosen
    assert ready.settled(case.density, whole=whole) == ready


@pytest.mark.parametrize(("dim", "family"), [(40, "full"), (41, "diagonal")])
def test_full_q_is_the_default_up_to_40_coordinates(dim: int, family: str) -> None:
    case = case_of(LinearGaussian.random(0, num_tasks=1, dim=dim))
    assert settled(JointVariational(), case).q == family


def test_a_strategy_that_leaves_choices_open_cannot_begin() -> None:
    case = case_of(LinearGaussian.random(0))
    with pytest.raises(ValueError, match="leaves choices open; call fit, or init of"):
        JointVariational().init(case.density, case.prior, case.tasks.support, generator(0))


def test_a_stream_is_refused() -> None:
    source = TaskSource(lambda g: tasks_of(LinearGaussian.random(0)))
    with pytest.raises(ValueError, match="no end"):
        JointVariational().prepare(source, 0)


def test_scales_are_learned_where_that_is_well_posed() -> None:
    case = case_of(LinearGaussian.random(0))
    for strategy, learned in [
        (JointVariational(), True),
        (JointVariational(learn_scale=False), False),
        (JointVariational(q="delta"), False),
    ]:
        ready = settled(strategy, case)
        state = ready.init(case.density, case.prior, case.tasks.support, generator(0))
        assert state.meta.raw["log_scale"].requires_grad is learned


def test_query_rows_are_used_too() -> None:
    case = case_of(LinearGaussian.random(0))
    prepared = JointVariational().prepare(case.tasks, 0)
    assert not prepared.is_split and torch.equal(prepared.num_rows, case.tasks.num_rows)
    assert torch.equal(prepared.mask, replace(case.tasks).mask)
