"""Starting each task where its last visit ended."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import case_of
from linear_gaussian import LinearGaussian

from varmeta import IMAML, GaussianPrior, GradientDescent, TaskSource, fit
from varmeta.inference.base import Batch
from varmeta.seeds import generator

CASE = case_of(LinearGaussian.random(3, num_tasks=5, dim=3))
FEW = GradientDescent(0.02, 5, tolerance=0)


def test_a_small_budget_gets_closer_to_the_minimum() -> None:
    prior = GaussianPrior.from_density(CASE.density)
    norms = {}
    for warm in (False, True):
        strategy = IMAML(steps=40, minimiser=FEW, warm_start=warm, learning_rate=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # five steps from θ0 are too few
            norms[warm] = fit(strategy, CASE.density, CASE.tasks, prior=prior).stats["grad_norm"]
    assert norms[True].norm() < 0.1 * norms[False].norm(), norms


def test_the_minimum_is_the_same() -> None:
    prior = GaussianPrior.from_density(CASE.density)
    cold, warm = (
        fit(IMAML(steps=15, warm_start=w), CASE.density, CASE.tasks, prior=prior)
        for w in (False, True)
    )
    torch.testing.assert_close(cold.prior.loc, warm.prior.loc, rtol=1e-6, atol=1e-6)


def test_only_visited_rows_are_remembered() -> None:
    strategy = IMAML(warm_start=True)
    prior = GaussianPrior.from_density(CASE.density)
    state = strategy.init(CASE.density, prior, CASE.tasks, generator(0))
    batch = Batch(CASE.tasks.select([1, 3]), torch.tensor([1, 3]), 5)
    strategy.step(CASE.density, state, batch, generator(0))
    seen = ~state.tensors["minima"].isnan().any(-1)
    assert seen.tolist() == [False, True, False, True, False]


def test_a_stream_never_comes_back() -> None:
    source = TaskSource(lambda g: CASE.tasks)
    with pytest.raises(ValueError, match="warm_start needs tasks that come back"):
        fit(IMAML(warm_start=True), CASE.density, source)
