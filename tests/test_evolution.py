"""Evolution strategies, whole runs at once or in windows, against exact expectations.

A statistical test here allows 4.5 standard errors: a false-alarm rate of 7e-6 for each number
compared (about 20, on fixed seeds).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from random_runs import (
    F64,
    LINEAR,
    exact_gradient,
    exact_slopes,
    linear_prior,
    lines,
    moments,
    prior_at,
    two_wells,
    wells,
    z_scores,
)
from torch import Tensor

from varmeta import (
    Density,
    EvolutionStrategies,
    Langevin,
    Pathwise,
    PersistentES,
    RandomRestarts,
    meta_gradient,
)

ERRORS = 4.5


def test_evolution_strategies_see_the_smoothed_objective() -> None:
    """Smoothed in θ0 and the log scale together: its gradient by Gauss–Hermite quadrature."""
    width, tasks = 0.25, two_wells()
    algorithm = Langevin(run_length=12, step_size=0.03, temperature=0.3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    smooth = sum(
        a * b * exact_gradient(wells, 0.3 + width * x, algorithm, float(np.exp(width * z)))[1]
        for (x, a), (z, b) in itertools.product(zip(nodes, weights, strict=True), repeat=2)
    )
    got = meta_gradient(
        Density(wells, tasks),
        prior_at(0.3),
        tasks,
        algorithm=algorithm,
        estimator=EvolutionStrategies(width),
        particles=200_000,
        seed=7,
    )
    assert (z_scores(got, torch.from_numpy(smooth)).abs() < ERRORS).all()
    # And the bias, which theory puts at O(width²), is seen.
    sharp = torch.from_numpy(exact_gradient(wells, 0.3, algorithm)[1])
    assert z_scores(got, sharp)[0, 0].abs() > 2 * ERRORS


def test_one_window_is_plain_evolution() -> None:
    tasks, density = lines()
    chosen = LINEAR["plain"]
    plain, one = (
        meta_gradient(
            density, linear_prior(1), tasks, algorithm=chosen, estimator=estimator, particles=8
        )
        for estimator in (EvolutionStrategies(), PersistentES(windows=1))
    )
    torch.testing.assert_close(plain.estimate.each, one.estimate.each)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("chosen", ["plain", "noiseless"])
def test_evolution_on_a_quadratic(chosen: str, windows: int) -> None:
    """There smoothing changes no derivative in θ0 or φ; in the scales it does by O(s²)."""
    tasks, density = lines()
    prior, algorithm = linear_prior(0), LINEAR[chosen]
    truth = exact_slopes(lambda p, offset: moments(tasks, algorithm, p, offset), prior)
    got = meta_gradient(
        density,
        prior,
        tasks,
        algorithm=algorithm,
        estimator=PersistentES(0.01, windows=windows),
        particles=40_000,
        seed=9,
    )
    z = z_scores(got, truth)
    assert (z.abs() < ERRORS).all(), z


def test_restarts_by_evolution_and_path() -> None:
    """A random start, then descent: the mean over starts by quadrature, both estimators."""
    tasks = two_wells()
    density = Density(wells, tasks)
    algorithm = RandomRestarts(run_length=8, step_size=0.03, start_scale=0.5)

    def by_quadrature(loc: Tensor) -> Tensor:
        nodes = torch.linspace(-5, 5, 2001, dtype=F64)
        weights = torch.softmax(-(nodes**2) / 2, 0)
        x = loc + 0.5 * nodes
        for _ in range(8):
            x = x - 0.03 * (-2 * x * (1 - x**2) / 0.49 + (x - loc))
        return (0.5 * (1 - x) ** 2 / 0.49) @ weights

    leaf = torch.tensor(0.1, dtype=F64, requires_grad=True)
    (truth,) = torch.autograd.grad(by_quadrature(leaf), leaf)
    for estimator in (Pathwise(), EvolutionStrategies(1e-3)):
        got = meta_gradient(
            density,
            prior_at(0.1),
            tasks,
            algorithm=algorithm,
            estimator=estimator,
            particles=40_000,
            seed=10,
        )
        assert abs(float(got.mean["loc"]) - float(truth)) < ERRORS * float(
            got.standard_error["loc"]
        )
