"""NUTS and its importance resampling against quadrature over (θ0, scale) in one dimension.

The noise is known and θ scalar, so that given (θ0, τ) everything is Gaussian; the two that remain
are integrated on a grid. Compared are posterior means and variances, each to four of its own Monte
Carlo standard errors. There are 18 such comparisons: a wrong seed in 900 would raise a false alarm.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import Case, case_of, tasks_of, tensor
from linear_gaussian import Array, LinearGaussian
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from varmeta.inference.base import Batch, StepInfo
from varmeta.inference.fit import Fit, fit
from varmeta.inference.nuts import PyroNUTS
from varmeta.models.prior import GaussianPrior, Hyperprior
from varmeta.seeds import generator
from varmeta.tasks import TaskSource

LIMIT = 4.0  # Monte Carlo standard errors
STRATEGY = PyroNUTS(draws=250, warmup=50, chains=2)


class Moments(NamedTuple):
    mean: Array
    sd: Array


class Truth(NamedTuple):
    loc: Moments
    scale: Moments
    theta: Moments  # [T] of the training tasks
    new: Moments  # [T'] of the new tasks, each together with the training tasks


def statistics(problem: LinearGaussian) -> tuple[Array, Array]:
    """Σx²/s² and Σxy/s² of each task's support rows, `[T, 1, 1]`."""
    h = [float(x[:, 0] @ x[:, 0]) / problem.noise2 for x in problem.designs]
    b = [
        float(x[:, 0] @ y) / problem.noise2
        for x, y in zip(problem.designs, problem.targets, strict=True)
    ]
    return np.array(h)[:, None, None], np.array(b)[:, None, None]


def quadrature(problem: LinearGaussian, new: LinearGaussian) -> Truth:
    loc = np.linspace(-10, 10, 801)[:, None]
    scale = (np.arange(1500)[None] + 0.5) / 1500 * 12  # midpoints: the density is positive at 0
    log_prior = -0.5 * loc**2 - 0.5 * scale**2  # N(0, 1) and HalfNormal(1), as in `problems`

    def given(data: LinearGaussian) -> tuple[Array, Array, Array]:
        """log p(y|θ0, τ) up to a constant, and mean and variance of θ, `[T, grid]`."""
        h, b = statistics(data)
        variance = 1 / (h + scale**-2)
        mean = variance * (b + loc / scale**2)
        evidence = 0.5 * (mean**2 / variance - (loc / scale) ** 2 + np.log(variance / scale**2))
        return evidence, mean, variance

    def moments(weights: Array, mean: Array, variance: Array | float = 0.0) -> Moments:
        first = np.sum(weights * mean, axis=(-2, -1))
        second = np.sum(weights * (mean**2 + variance), axis=(-2, -1))
        return Moments(first, np.sqrt(second - first**2))

    def normalised(log_weights: Array) -> Array:
        weights = np.exp(log_weights - log_weights.max(axis=(-2, -1), keepdims=True))
        return weights / weights.sum(axis=(-2, -1), keepdims=True)

    evidence, mean, variance = given(problem)
    posterior = normalised(log_prior + evidence.sum(0))
    more, new_mean, new_variance = given(new)
    together = normalised(log_prior + evidence.sum(0) + more)
    everywhere = np.broadcast_to(loc, posterior.shape), np.broadcast_to(scale, posterior.shape)
    return Truth(
        moments(posterior, everywhere[0]),
        moments(posterior, everywhere[1]),
        moments(posterior, mean, variance),
        moments(together, new_mean, new_variance),
    )


@cache
def problems() -> tuple[LinearGaussian, LinearGaussian, Case, GaussianPrior]:
    """Six tasks with little data each, and three new ones, at the same known noise."""
    problem, new = (
        LinearGaussian.random(seed, num_tasks, dim=1, max_rows=4).at(log_noise=0.0)
        for seed, num_tasks in ((1, 6), (30, 3))
    )
    zero, one = tensor([0.0]), tensor([1.0])
    belief = Hyperprior(zero, one, one)
    return problem, new, case_of(problem), GaussianPrior(zero, zero, zero.long(), None, belief)


@cache
def run() -> tuple[Fit, Truth]:
    problem, new, case, prior = problems()
    done = fit(STRATEGY, case.density, case.tasks.support, prior=prior, seed=1)
    return done, quadrature(problem, new)


def effective(draws: Tensor) -> Tensor:
    """Effective number of `[S, ...]` draws, chain after chain."""
    chains = draws.unflatten(0, (STRATEGY.chains, -1))
    return effective_sample_size(chains, 0, 1).clamp(max=len(draws))


def check(draws: Tensor, exact: Moments, more: Tensor | float = 0.0) -> None:
    """Mean and variance of `[S, ...]` draws; `more` is added to 1/(effective number of draws)."""
    mean, variance = torch.as_tensor(exact.mean), torch.as_tensor(exact.sd) ** 2
    for value, wanted in ((draws, mean), ((draws - mean) ** 2, variance)):
        error = value.std(0) * (1 / effective(value) + more).sqrt()
        score = (value.mean(0) - wanted).abs() / error
        assert bool((score < LIMIT).all()), f"{score} standard errors"


def test_hyperparameters_are_exact() -> None:
    done, truth = run()
    check(done.state.tensors["loc"][:, 0], truth.loc)
    check(done.state.tensors["log_scale"][:, 0].exp(), truth.scale)
    assert int(done.state.tensors["diverging"].sum()) == 0


def test_training_tasks_are_exact() -> None:
    done, truth = run()
    posterior = done.posterior()
    draws, shared = posterior.sample(500, generator(0))
    check(draws[..., 0], truth.theta)
    assert torch.equal(draws, done.state.tensors["theta"]) and shared.shape == (500, 6, 0)
    assert posterior.kind == "draws" and posterior.names == done.tasks.names  # type: ignore[union-attr]


def test_a_new_task_is_adapted_to_exactly() -> None:
    """Importance resampling has to update θ0 and the scale by what the new task says of them.

    Its own error: 1/draws for the resampling, 1/(effective weights) for the weighting, and that of
    the chains' hyperparameters, of which the worst is taken.
    """
    done, truth = run()
    _, new, _, _ = problems()
    posterior = done.adapt(tasks_of(new).support)
    draws, _ = posterior.sample(500, generator(0))
    hyper = torch.cat([done.state.tensors["loc"], done.state.tensors["log_scale"]], dim=-1)
    more = 1 / effective(hyper).min() + 1 / posterior.stats["importance_ess"]
    check(draws[..., 0], truth.new, more)
    assert bool((posterior.stats["importance_ess"] > 100).all())


def test_the_fits_prior_is_the_posterior_mean() -> None:
    done, _ = run()
    assert torch.allclose(done.prior.loc, done.state.tensors["loc"].mean(0))
    assert torch.allclose(done.prior.log_scale, done.state.tensors["log_scale"].mean(0))


def test_too_few_draws_for_a_task_are_said() -> None:
    """One draw of the hyperparameters cannot be reweighted into another place."""
    done, _ = run()
    few = replace(done.state, tensors={n: t[:3] for n, t in done.state.tensors.items()})
    tasks = tasks_of(problems()[1])
    with pytest.warns(RuntimeWarning, match="effective draws"):
        STRATEGY.adapt(done.density, few, tasks.support, generator(0))


# -- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [7, 16, 25, 36])
def test_a_resumed_run_keeps_its_draws(tmp_path: Path, when: int) -> None:
    """Stopped in a warm-up or while drawing, in the first chain or the second."""
    _, _, case, prior = problems()
    strategy = PyroNUTS(draws=10, warmup=10, chains=2)
    path = tmp_path / "run.pt"

    def stop(step: int, info: StepInfo) -> None:
        if step == when:
            raise KeyboardInterrupt

    arguments = (strategy, case.density, case.tasks.support)
    with pytest.raises(KeyboardInterrupt, match=f"step {when} of 40"):
        fit(*arguments, prior=prior, checkpoint=path, on_step=stop)
    before = torch.load(path, weights_only=True)["state"]["tensors"]
    done = fit(*arguments, prior=prior, checkpoint=path)
    kept = sum(when > chain * 20 + 10 + k for chain in range(2) for k in range(10))
    for name in ("theta", "loc", "log_scale"):
        after = done.state.tensors[name]
        assert torch.equal(after[:kept], before[name][:kept])
        assert bool((after != 0).all()), "a draw was never made"
    steps = done.state.tensors["loc"].diff(dim=0)
    assert int((steps != 0).sum()) > 12  # the chains go on moving


def test_a_resumed_chain_goes_on_from_where_it_was(tmp_path: Path) -> None:
    """The first draw after the interruption is a neighbour of the last one before it."""
    _, _, case, prior = problems()
    strategy = PyroNUTS(draws=10, warmup=10, chains=1)
    path = tmp_path / "run.pt"

    def stop(step: int, info: StepInfo) -> None:
        if step == 15:
            raise KeyboardInterrupt

    arguments = (strategy, case.density, case.tasks.support)
    with pytest.raises(KeyboardInterrupt):
        fit(*arguments, prior=prior, checkpoint=path, on_step=stop)
    saved = torch.load(path, weights_only=True)["state"]["tensors"]
    again = strategy.init(case.density, prior, case.tasks.support, generator(0))
    again.load_state_dict(torch.load(path, weights_only=True)["state"])
    batch = Batch(case.tasks.support, torch.arange(4), 4)
    strategy.step(case.density, again, batch, generator(0))
    kernel = again.cache["kernel"]
    assert float(kernel.step_size) == float(saved["step_size"])
    assert torch.equal(next(iter(kernel.inverse_mass_matrix.values())), saved["inverse_mass"])


# -- refusals -------------------------------------------------------------------------------------


def test_what_has_no_full_posterior_is_refused() -> None:
    _, _, case, prior = problems()
    with pytest.raises(ValueError, match="endless"):
        STRATEGY.prepare(TaskSource(lambda g: case.tasks), 0)
    with pytest.raises(ValueError, match="all tasks"):
        fit(STRATEGY, case.density, case.tasks, prior=prior, batch_size=2)
    with pytest.raises(ValueError, match="no hyperprior"):
        fit(STRATEGY, case.density, case.tasks, prior=case.prior)
