"""NUTS and its importance resampling against quadrature over (θ0, scale) in one dimension.

The noise is known and θ scalar, so that given (θ0, τ) everything is Gaussian; the two that remain
are integrated on a grid. Compared are posterior means and standard deviations, each to five of its
own Monte Carlo standard errors: under normality one comparison in 1.7e6 is a false alarm.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import Case, case_of, tasks_of
from linear_gaussian import Array, LinearGaussian
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from varmeta.inference.base import StepInfo
from varmeta.inference.fit import Fit, fit
from varmeta.inference.nuts import PyroNUTS
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import TaskSource

FALSE_ALARM = 5.0  # standard errors
WIDTH = 2.0  # of the model's own prior, and so of the hyperprior of θ0 and of the scale
STRATEGY = PyroNUTS(draws=700, warmup=80, chains=2)


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
    scale = (np.arange(1600)[None] + 0.5) / 1600 * 12  # midpoints: the density is positive at 0
    log_prior = -0.5 * (loc / WIDTH) ** 2 - 0.5 * (scale / WIDTH) ** 2

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
    """Four tasks and three new ones, at the same known noise."""
    problem = LinearGaussian.random(3, num_tasks=4, dim=1)
    new = LinearGaussian.random(30, num_tasks=3, dim=1).at(log_noise=problem.log_noise)
    case = case_of(problem)
    return problem, new, case, GaussianPrior.from_density(case.density)


@cache
def run() -> tuple[Fit, Truth]:
    problem, new, case, prior = problems()
    done = fit(STRATEGY, case.density, case.tasks.support, prior=prior, seed=1)
    return done, quadrature(problem, new)


def check(draws: Tensor, exact: Moments, *, independent: bool = False, factor: float = 1) -> None:
    """Mean and sd of `[S, ...]` draws of two chains, to FALSE_ALARM standard errors.

    `factor` multiplies the errors, for draws that are themselves drawn from such draws.
    """
    mean, sd = torch.as_tensor(exact.mean), torch.as_tensor(exact.sd)
    for value, wanted, width in (
        (draws, mean, 1.0),
        ((draws - mean) ** 2, sd**2, 1.0),
    ):
        chains = value.unflatten(0, (STRATEGY.chains, -1))
        ess = torch.tensor(float(len(value)))
        if not independent:
            ess = effective_sample_size(chains, 0, 1).clamp(max=len(value))
        error = factor * width * value.std(0) / ess.sqrt()
        score = (value.mean(0) - wanted).abs() / error
        assert bool((score < FALSE_ALARM).all()), f"{score} standard errors"


def test_hyperparameters() -> None:
    done, truth = run()
    check(done.state.tensors["loc"][:, 0], truth.loc)
    check(done.state.tensors["log_scale"][:, 0].exp(), truth.scale)
