"""The estimators that look at the ends of runs, in several wells: the bias that theory gives each.

Truths are the exact law on a grid and quadrature of the stationary law. Statistical tests allow 4.5
standard errors, a false-alarm rate of 7e-6 for each number, with fixed seeds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from basin_problems import (
    CENTRES,
    ERRORS,
    QUERIES,
    Wave,
    law,
    prior_at,
    query,
    stationary_points,
    waves,
    wavy_tasks,
)

from varmeta import (
    Density,
    Langevin,
    meta_gradient,
)
from varmeta.inference.at_ends import (
    BasinCorrected,
    ImplicitAtParticles,
    StationaryCovariance,
)
from varmeta.inference.estimators import Estimator
from varmeta.inference.stochastic import MetaGradientEstimate

ALL: dict[str, Estimator] = {
    "implicit": ImplicitAtParticles(),
    "occupation": BasinCorrected(),
}
LOC = 0.2


def test_the_covariance_is_that_of_the_law_and_its_bias_that_of_a_run_which_has_not_mixed() -> None:
    tasks = wavy_tasks()
    density = Density(waves, tasks)
    algorithm = Langevin(run_length=20, step_size=0.02, temperature=0.8)
    got = meta_gradient(
        density,
        prior_at(LOC),
        tasks,
        algorithm=algorithm,
        estimator=StationaryCovariance(),
        particles=20_000,
    )
    far = 0.0
    for t in range(3):
        exact, g = law(t, LOC, algorithm), query(t)
        centred = exact.expectation(g)
        truth = exact.expectation(lambda x, g=g, c=centred: (g(x) - c) * (x - LOC)) / 0.8
        mean, error = float(got.mean["loc"][t]), float(got.standard_error["loc"][t])
        assert abs(mean - truth) < ERRORS * error
        far = max(far, abs(mean - exact.gradient(g)[0]) / error)
    assert far > 5


def test_mixed_it_is_the_gradient_of_the_stationary_law() -> None:
    tasks = wavy_tasks(1)
    density = Density(waves, tasks)
    algorithm = Langevin(run_length=250, step_size=0.01, temperature=2.0)
    got = meta_gradient(
        density,
        prior_at(LOC),
        tasks,
        algorithm=algorithm,
        estimator=StationaryCovariance(),
        particles=6000,
    )
    truth = by_quadrature(0, 2.0)
    mean, error = float(got.mean["loc"]), float(got.standard_error["loc"])
    # Not quite mixed, and in steps: within an eighth.
    assert abs(mean - truth) < ERRORS * error + 0.125 * abs(truth) and error < 0.1 * abs(truth)


def by_quadrature(task: int, tau: float) -> float:
    """d E_π g / dθ0 of the stationary law exp(−E/τ)."""
    x = np.linspace(-9, 9, 40_001)
    energy = Wave(CENTRES[task]).value(x) + 0.5 * (x - LOC) ** 2
    p = np.exp(-(energy - energy.min()) / tau)
    p /= p.sum()
    g = query(task)(x)
    return float((p * (g - p @ g)) @ (x - LOC)) / tau


def by_implicit(task: int, minima: np.ndarray) -> np.ndarray:
    """g′ λ/(λ + f″) at each minimum."""
    return (minima - QUERIES[task]) / (1 + Wave(CENTRES[task]).curvature(minima))


@pytest.mark.parametrize("task", [0, 1])
def test_laplace_approaches_the_stationary_gradient_as_the_temperature_falls(task: int) -> None:
    """However unmixed the runs are, with an error of O(τ); iMAML's part alone does not."""
    tasks = wavy_tasks()
    density = Density(waves, tasks)
    errors = []
    for tau in (0.08, 0.04, 0.02):
        algorithm = Langevin(2, 1e-4, temperature=tau, start_scale=2.0)
        got, location = (
            float(
                meta_gradient(
                    density,
                    prior_at(LOC),
                    tasks.select([task]),
                    algorithm=algorithm,
                    estimator=estimator,
                    particles=400,
                ).mean["loc"]
            )
            for estimator in (BasinCorrected("laplace"), ImplicitAtParticles())
        )
        truth = by_quadrature(task, tau)
        errors.append(abs(got - truth))
        assert abs(got - truth) < 0.2 * abs(location - truth)
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


def test_the_parts_are_what_theory_says_of_a_cold_run_in_many_wells() -> None:
    """implicit: Σ p_k implicit_k, the grid's location; occupation: that and −Cov(g_k, ∂E_k)/τ."""
    tasks = wavy_tasks(2).select([1])
    density = Density(waves, tasks)
    schedule = (1.0,) * 80 + (0.02,) * 40  # ends in several wells, and cold
    algorithm = Langevin(120, 0.02, temperature=schedule)
    minima, edges = stationary_points(1, LOC)
    p, _ = law(1, LOC, algorithm).occupations(edges)
    inner = by_implicit(1, minima)
    got = {
        name: meta_gradient(
            density,
            prior_at(LOC),
            tasks,
            algorithm=algorithm,
            estimator=ALL[name],
            particles=4000,
        )
        for name in ("implicit", "occupation")
    }

    def within(found: MetaGradientEstimate, truth: float) -> None:
        mean, error = float(found.mean["loc"]), float(found.standard_error["loc"])
        assert abs(mean - truth) < ERRORS * error
        assert error < 0.15 * abs(truth)

    within(got["implicit"], float(p @ inner))
    parts = law(1, LOC, algorithm).mechanisms(query(1), edges)
    assert float(p @ inner) == pytest.approx(parts.location.sum(), rel=0.1)  # O(τ)
    missed = float(got["implicit"].mean["loc"]) - (parts.location + parts.probability).sum()
    assert missed > 20 * float(got["implicit"].standard_error["loc"])
    g = query(1)(minima)
    within(got["occupation"], float(p @ inner + p @ ((g - p @ g) * (minima - LOC)) / 0.02))
    # Of the same particles the two differ by the covariance over those, exactly.
    ends = got["implicit"].ends.numpy()[:, 0, 0]
    nearest = np.searchsorted(edges, ends)
    pair = np.cov(g[nearest], minima[nearest] - LOC)[0, 1] / 0.02
    gap = float(got["occupation"].mean["loc"] - got["implicit"].mean["loc"])
    assert gap == pytest.approx(pair, rel=1e-7)
    assert torch.equal(got["implicit"].losses, got["occupation"].losses)
    exact = query(1)(got["implicit"].ends.numpy()[..., 0])
    assert np.allclose(got["implicit"].losses.numpy(), exact)
