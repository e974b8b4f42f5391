"""The two trivial answers against closed-form Bayesian regression."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, predictive_error, tasks_of, tensor
from linear_gaussian import LinearGaussian
from scipy.optimize import minimize
from torch import Tensor

from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.minimise import GradientDescent
from varmeta.inference.pooling import CompletePooling, NoPooling
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Gaussian
from varmeta.tasks import Tasks

USER = {"theta0": np.zeros(3), "log_scale": np.full(3, np.log(2.0))}  # linear_model's own prior


def pooled(problem: LinearGaussian) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of one θ ~ N(θ0, Σ) given every support row."""
    precision, shift = np.diag(problem.precision), problem.precision * problem.theta0
    for x, y in zip(problem.designs, problem.targets, strict=True):
        precision = precision + x.T @ x / problem.noise2
        shift = shift + x.T @ y / problem.noise2
    return np.linalg.solve(precision, shift), np.linalg.inv(precision)


def pooled_fit(problem: LinearGaussian, draws: int = 4000) -> Fit:
    case = case_of(problem)
    strategy = CompletePooling(draws=draws)
    return fit(strategy, case.density, case.tasks.support, prior=case.prior)


# -- no pooling -----------------------------------------------------------------------------------


def test_no_pooling_is_each_tasks_own_posterior_under_the_users_prior() -> None:
    """Exactly: the tasks are solved, in one step, and the run says so."""
    problem = LinearGaussian.random(2).at(**USER)
    case = case_of(problem)
    for batch_size, steps in ((None, 1), (2, 3)):
        done = fit(NoPooling(), case.density, case.tasks.support, batch_size=batch_size)
        assert done.converged and len(done.history) == steps
        assert done.reason == (
            f"nothing is learned across tasks, and each has its best q (step {steps})"
        )
        exact = np.stack([problem.posterior_cov(i) for i in range(6)])
        for posterior in (done.posterior(), done.adapt(case.tasks.support)):
            assert isinstance(posterior, Gaussian)
            assert_close(posterior.mean, problem.theta_stars(), 1e-8)
            assert_close(posterior.scale @ posterior.scale.mT, exact, 1e-8)
        assert_close(done.prior.scale, np.full(3, 2.0), 1e-12)  # nothing learned
        assert float(done.prior.loc.abs().max()) == 0


def test_no_pooling_with_a_diagonal_q_is_each_tasks_best_one() -> None:
    """By Adam; a log sd's Monte Carlo error is explained in test_joint.py. Nothing that could come
    to rest is learned across tasks, so that the run goes to its limit and does not complain."""
    problem = LinearGaussian.random(2).at(**USER)
    case = case_of(problem)
    strategy = NoPooling(q="diagonal", steps=500, learning_rate=0.1)
    done = fit(strategy, case.density, case.tasks.support)
    assert done.converged is None and done.reason == ""
    posterior, sds = done.posterior(), np.sqrt(problem.best_variances())
    assert np.abs((posterior.mean.numpy() - problem.theta_stars()) / sds).max() < 0.05
    ratio = np.log(posterior.sd.numpy() / sds)
    assert np.abs(ratio).max() < 0.15 and abs(ratio.mean()) < 0.04
    assert_close(done.prior.scale, np.full(3, 2.0), 1e-12)
    assert float(done.prior.loc.abs().max()) == 0


def test_no_pooling_gives_a_task_the_same_whoever_else_is_there() -> None:
    problem = LinearGaussian.random(3)
    case = case_of(problem)
    for strategy in (NoPooling(q="delta", steps=300, learning_rate=0.2), NoPooling()):
        means = [
            fit(strategy, case.density, tasks).posterior().mean[0]
            for tasks in (case.tasks.support, case.tasks.support.select([0]))
        ]
        assert torch.allclose(*means, atol=1e-10)


def test_no_pooling_still_learns_what_is_shared() -> None:
    case = case_of(LinearGaussian.random(4), shared_noise=True)
    for strategy in (NoPooling(), NoPooling(q="diagonal", steps=5)):
        done = fit(strategy, case.density, case.tasks.support)
        assert float((done.shared - case.density.shared_init).abs()) > 0
        assert not done.state.meta.raw["loc"].any()


# -- complete pooling -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 6, 3), (1, 6, 3), (3, 5, 1)], ids=str)
def test_complete_pooling_is_bayesian_regression(shape: tuple[int, int, int]) -> None:
    """The mode exactly; the draws' moments to 5 standard errors (false alarms: 2e-5)."""
    problem = LinearGaussian.random(*shape)
    mean, cov = pooled(problem)
    done = pooled_fit(problem)
    assert_close(done.prior.loc, mean, 1e-8)
    posterior, sd = done.posterior(), np.sqrt(np.diag(cov))
    assert posterior.mean.shape == (problem.num_tasks, problem.dim)
    assert np.abs((posterior.mean.numpy() - mean) / sd).max() < 5 / np.sqrt(4000)
    assert np.abs(posterior.sd.numpy() / sd - 1).max() < 5 / np.sqrt(2 * 4000)
    draws, _ = posterior.sample(4000, torch.Generator())
    white = np.linalg.solve(np.linalg.cholesky(cov), (draws[:, 0].numpy() - mean).T)
    correlation = np.corrcoef(white) - np.eye(problem.dim) if problem.dim > 1 else np.zeros(1)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("seed", range(5))
def test_complete_pooling_predicts_with_the_exact_density(seed: int) -> None:
    """log p(y | data) of each query row to 5 Monte Carlo standard errors (false alarms: 1e-5)."""
    problem = LinearGaussian.random(seed, num_tasks=1)
    done = pooled_fit(problem)
    query = tasks_of(problem).query
    posterior = done.adapt(query)
    logp = posterior.log_predictive(query, 4000, torch.Generator())
    theta, shared = posterior.sample(4000, torch.Generator())
    error = predictive_error(done.density.log_likelihood(theta, query, shared))
    exact = tensor(problem.log_predictive(0, *pooled(problem)))
    assert bool(((logp[0] - exact).abs() < 5 * error[0]).all())


def test_complete_pooling_learns_nothing_from_the_task_it_adapts_to() -> None:
    problem = LinearGaussian.random(6)
    done = pooled_fit(problem)
    new = tasks_of(LinearGaussian.random(60, 2))
    posterior = done.adapt(new.unsplit)
    assert posterior.names == new.names
    assert torch.equal(posterior.mean, done.posterior().mean[:2])


def test_complete_pooling_finds_the_joint_mode_with_a_shared_noise() -> None:
    """Against scipy on −log p(y|θ, s) − log p(θ) − log p(s), the prior of s a density of s."""
    problem = LinearGaussian.random(7).at(**USER)
    case = case_of(problem, shared_noise=True)
    done = fit(CompletePooling(), case.density, case.tasks.support)
    x, y = np.concatenate(problem.designs), np.concatenate(problem.targets)

    def loss(u: np.ndarray) -> float:
        theta, log_s = u[:3], u[3]
        fit_ = 0.5 * np.sum((y - x @ theta) ** 2) * np.exp(-2 * log_s) + len(y) * log_s
        return float(fit_ + theta @ theta / 8 + log_s**2 / 18 + log_s)

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    assert_close(torch.cat([done.prior.loc, done.shared]), best, 1e-5)  # scipy's own accuracy
    _, shared = done.posterior().sample(10, torch.Generator())
    assert shared.shape == (10, 6, 1)


def test_a_trial_step_that_overflows_is_taken_back() -> None:
    """Counts of some 1e5 under exp(θ): the first Newton step from θ = 0 overflows exp."""

    def poisson(x: Tensor, y: Tensor | None = None) -> Tensor:
        rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0, dtype=FLOAT), 20.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Poisson(rate.exp()), obs=y)

    counts = [tensor([1e5, 1.1e5]), tensor([0.9e5])]
    tasks = Tasks.from_list([(y[:, None], y) for y in counts])
    done = fit(CompletePooling(), Density(poisson, tasks), tasks)
    assert_close(done.prior.loc, tensor([np.log(1e5)]), 1e-5)


def test_complete_pooling_needs_all_tasks() -> None:
    case = case_of(LinearGaussian.random(0))
    with pytest.raises(ValueError, match="all tasks"):
        fit(CompletePooling(), case.density, case.tasks, batch_size=2)


def test_an_unsolved_pooled_problem_is_said() -> None:
    case = case_of(LinearGaussian.random(8))
    strategy = CompletePooling(minimiser=GradientDescent(1e-4, max_iterations=3))
    with pytest.warns(RuntimeWarning, match="6 of 6 tasks did not reach"):
        fit(strategy, case.density, case.tasks)


def test_complete_pooling_reports_no_scale_whatever_the_bounds() -> None:
    """Σ = 0: tasks do not differ; bounds are for scales that are learned."""
    case = case_of(LinearGaussian.random(2))
    prior = GaussianPrior.from_density(case.density, bounds=(0.5, 10.0))
    done = fit(CompletePooling(draws=10), case.density, case.tasks.support, prior=prior)
    assert done.prior.scale.tolist() == [0.0] * 3
