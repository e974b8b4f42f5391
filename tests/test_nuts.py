"""NUTS and its importance resampling against quadrature over (θ0, scale) in one dimension.

The noise is known and θ scalar, so that given (θ0, τ) everything is Gaussian; the two that remain
are integrated on a grid. Compared are posterior means and variances, each to four of its own Monte
Carlo standard errors. With 22 such comparisons one seed in 700 would raise a false alarm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Case, assert_same, case_of, tasks_of, tensor
from linear_gaussian import Array, LinearGaussian
from pyro.infer import NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from varmeta.inference import nuts, nuts_kernel
from varmeta.inference.base import Batch, StepInfo
from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.nuts import PyroNUTS
from varmeta.models import Density, GaussianPrior, Hyperprior, capture
from varmeta.seeds import generator
from varmeta.tasks import Tasks, TaskSource

LIMIT = 4.0  # Monte Carlo standard errors
STRATEGY = PyroNUTS(draws=150, warmup=50, chains=2, target_accept=0.9)


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
    scale = (np.arange(1400)[None] + 0.5) / 1400 * 12  # midpoints: the density is positive at 0
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
        for seed, num_tasks in ((15, 6), (30, 3))
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
    draws, shared = posterior.sample(300, generator(0))
    check(draws[..., 0], truth.theta)
    assert torch.equal(draws, done.state.tensors["theta"]) and shared.shape == (300, 6, 0)
    assert posterior.kind == "draws" and posterior.names == done.tasks.names  # type: ignore[union-attr]


def test_a_new_task_is_adapted_to_exactly() -> None:
    """Importance resampling has to update θ0 and the scale by what the new task says of them.

    Its own error: 1/draws for the resampling, 1/(effective weights) for the weighting, and that of
    the chains' hyperparameters, of which the worst is taken.
    """
    done, truth = run()
    _, new, _, _ = problems()
    posterior = done.adapt(tasks_of(new).support)
    draws, _ = posterior.sample(300, generator(0))
    hyper = torch.cat([done.state.tensors["loc"], done.state.tensors["log_scale"]], dim=-1)
    more = 1 / effective(hyper).min() + 1 / posterior.stats["importance_ess"]
    check(draws[..., 0], truth.new, more)
    assert bool((posterior.stats["importance_ess"] > 100).all())


def test_the_fits_prior_is_the_posterior_mean() -> None:
    done, _ = run()
    assert torch.allclose(done.prior.loc, done.state.tensors["loc"].mean(0))
    assert torch.allclose(done.prior.log_scale, done.state.tensors["log_scale"].mean(0))


def test_a_new_tasks_draws_come_with_their_own_shared_values() -> None:
    """Hyperparameters in two clusters: θ0 = ±10 with φ = 3 or 4, where the data say nothing."""
    case = case_of(LinearGaussian.random(0, dim=1), shared_noise=True)
    strategy = PyroNUTS(draws=50, chains=1)
    state = strategy.init(case.density, case.prior, case.tasks, generator(0))
    high = torch.arange(50) % 3 == 0
    state.tensors["loc"][:, 0] = torch.where(high, 10.0, -10.0)
    state.tensors["log_scale"][:] = -5.0
    state.tensors["shared"][:, 0] = torch.where(high, 4.0, 3.0)
    posterior = strategy.adapt(case.density, state, case.tasks, generator(0))
    theta, shared = posterior.sample(50, generator(0))
    assert torch.equal(shared, torch.where(theta > 0, 4.0, 3.0).to(shared))
    assert 0 < int((theta > 0).sum()) < theta.numel()


def test_too_few_draws_for_a_task_are_said() -> None:
    """One draw of the hyperparameters cannot be reweighted into another place."""
    done, _ = run()
    names = ("loc", "log_scale", "shared")
    few = replace(done.state, tensors={n: done.state.tensors[n][:3] for n in names})
    tasks = tasks_of(problems()[1])
    with pytest.warns(RuntimeWarning, match="effective draws"):
        STRATEGY.adapt(done.density, few, tasks.support, generator(0))


# -- interrupted ----------------------------------------------------------------------------------


DIVERGED = "ignore:.*NUTS transitions diverged:RuntimeWarning"  # the warm-ups here are too short


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poor middle will do, and recording does not pay for so few transitions."""
    monkeypatch.setattr(nuts, "_QUICK_STEPS", 10)
    monkeypatch.setattr(capture, "record", lambda function, tensors: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings(DIVERGED)
@pytest.mark.parametrize(
    ("strategy", "stops"),
    [
        # In warm-up, at its end, between draws, and between chains.
        (PyroNUTS(draws=3, warmup=3, chains=2), range(1, 12)),
        # Pyro averages step sizes in windows from 20 transitions of warm-up on.
        (PyroNUTS(draws=2, warmup=20, chains=1), (3, 19, 20)),
        (PyroNUTS(draws=3, warmup=0, chains=1), (1, 2)),
    ],
)
def test_a_chain_interrupted_anywhere_is_the_one_that_was_not(
    strategy: PyroNUTS, stops: Iterable[int], tmp_path: Path
) -> None:
    _, _, case, prior = problems()
    given = strategy, case.density, case.tasks.support
    whole, path = fit(*given, prior=prior), tmp_path / "run.pt"
    for when in stops:

        def stop(step: int, info: StepInfo, when: int = when) -> None:
            if step == when:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match=f"step {when} of {strategy.num_steps}"):
            fit(*given, prior=prior, checkpoint=path, on_step=stop)
    done = fit(*given, prior=prior, checkpoint=path)
    assert_same(done.state.state_dict(), whole.state.state_dict())
    for column in ("loss", "gradients"):
        assert done.history[column].tolist() == whole.history[column].tolist()


# -- where a chain begins -------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings(DIVERGED)
def test_a_chain_begins_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first transition leaves from a draw around the quick fit, at that point's energy.

    The energy of a draw of the Gaussian with the middle's curvature is above the middle's by about
    half a chi-square of n = 8 degrees of freedom, whose 1 − 1e-6 quantile is 43.
    """
    _, _, case, prior = problems()
    told: list[Tensor] = []
    left: list[tuple[Tensor, float]] = []
    begin, sample = nuts_kernel.Kernel.begin, NUTS.sample

    def begins(self: nuts_kernel.Kernel) -> dict[str, Tensor]:
        chain = begin(self)
        told.append(chain["position"])
        assert float(chain["energy"]) == float(self.energy(self.split(chain["position"])))
        middle = float(self.energy(self.split(self.middle)))
        assert abs(float(chain["energy"]) - middle) < 0.5 * 43
        return chain

    def leaves(self: NUTS, params: dict[str, Tensor]) -> dict[str, Tensor]:
        z, energy, _ = self._fetch_from_cache()
        left.append((torch.cat([z[name].reshape(-1) for name in params]), float(energy)))
        moved: dict[str, Tensor] = sample(self, params)
        return moved

    monkeypatch.setattr(nuts_kernel.Kernel, "begin", begins)
    monkeypatch.setattr(NUTS, "sample", leaves)
    done = fit(PyroNUTS(draws=2, warmup=1, chains=2), case.density, case.tasks.support, prior=prior)
    assert len(told) == 2 and not torch.equal(*told)  # chains begin apart
    assert torch.equal(left[0][0], told[0]) and torch.equal(left[3][0], told[1])
    assert done.history["loss"].max() < 2 * done.history["loss"].min() + 10


@pytest.mark.usefixtures("quick")
def test_the_mass_matrix_is_in_pyros_order() -> None:
    """Pyro sorts the sites by name; the model here has its shared ones the other way around."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        wide = pyro.sample("wide", dist.Normal(0.0, 100.0))
        narrow = pyro.sample("narrow", dist.Normal(0.0, 0.01))
        with pyro.plate("rows", len(x)):
            mean = theta + narrow + wide * x[..., 0]
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    zeros = torch.zeros(2, 1, dtype=torch.float64)
    tasks = Tasks.from_list([(zeros, zeros[:, 0])] * 2)
    density = Density(model, tasks, shared=["wide", "narrow"])
    strategy = PyroNUTS(draws=1, warmup=1, chains=1)
    prior = GaussianPrior.from_density(density)
    state = strategy.init(density, prior, tasks, generator(0))
    strategy.step(density, state, Batch(tasks, torch.arange(2), 2), generator(0))
    kernel = state.cache["kernel"]
    (sites,) = kernel._nuts.inverse_mass_matrix
    assert list(sites) == list(kernel.shapes) == sorted(sites)
    sizes = state.tensors["inverse_mass"].diagonal().sqrt()
    widths = dict(zip(kernel.shapes, kernel.split(sizes).values(), strict=True))
    assert float(widths["shared_wide"]) > 50 and float(widths["shared_narrow"]) < 0.02


# -- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", ["loc", "log_scale"])
def test_chains_that_disagree_are_reported(coordinate: str) -> None:
    """Two chains of 200 draws, one of them moved by two standard deviations; and none moved."""
    _, _, case, prior = problems()
    strategy = PyroNUTS(draws=200, chains=2)
    state = strategy.init(case.density, prior, case.tasks.support, generator(0))
    for tensor_ in (state.tensors["loc"], state.tensors["log_scale"]):
        tensor_.copy_(torch.randn(tensor_.shape, generator=generator(1)))
    strategy._finish(state)  # silent: warnings are errors
    state.tensors[coordinate][200:] += 2
    with pytest.warns(RuntimeWarning, match=r"worst R-hat 1\.[3-9].*raise draws \(now 200\)"):
        strategy._finish(state)


# -- refusals -------------------------------------------------------------------------------------


def test_what_has_no_full_posterior_is_refused() -> None:
    _, _, case, prior = problems()
    with pytest.raises(ValueError, match="endless"):
        STRATEGY.prepare(TaskSource(lambda g: case.tasks), 0)
    with pytest.raises(ValueError, match="all tasks"):
        fit(STRATEGY, case.density, case.tasks, prior=prior, batch_size=2)
    with pytest.raises(ValueError, match="no hyperprior"):
        fit(STRATEGY, case.density, case.tasks, prior=case.prior)
