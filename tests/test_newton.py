"""NewtonCG where θ cannot resolve its gradient: converged, and right."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import FLOAT, case_of
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import LaplaceEvidence, NewtonCG, fit
from varmeta.inference.energy import TaskEnergy
from varmeta.models.prior import GaussianPrior

SCALES = [[1e-8] * 3, [1e-5] * 3, [1e-3] * 3, [1.0] * 3, [1e3] * 3, [1e-5, 1.0, 1e3]]


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("centre", [0.0, 1e4])
def test_it_converges_at_any_scale(scales: Sequence[float], centre: float) -> None:
    """To the closed form: within 1e-7 of a scale, or some units in the last place of θ."""
    for seed in range(3):
        problem = LinearGaussian.random(seed).at(log_scale=np.log(scales))
        problem = problem.at(theta0=problem.theta0 + centre)
        case = case_of(problem)
        rows = case.tasks.support
        energy = TaskEnergy(case.density, rows, case.shared, case.prior)
        found = NewtonCG().minimise(energy, case.prior.loc.expand(len(rows), -1))
        assert found.converged is not None and bool(found.converged.all())
        wanted = problem.theta_stars()
        allowed = 1e-7 * np.array(scales) + 8 * np.finfo(float).eps * (1 + np.abs(wanted))
        assert (np.abs(found.theta.numpy() - wanted) < allowed).all()
        assert int(found.iterations.max()) < 10 and found.gradients < 60


def test_rounding_is_no_excuse_elsewhere() -> None:
    """One step of a problem that needs more has not converged, also with a huge coordinate."""
    target = torch.tensor([[1e8, 3.0]], dtype=FLOAT)

    def energy(theta: torch.Tensor) -> torch.Tensor:
        return (theta - target).square().sum(-1) + (theta - target)[:, 1].pow(4)

    start = target + torch.tensor([[0.0, 5.0]], dtype=FLOAT)
    found = NewtonCG(max_iterations=1).minimise(energy, start)
    assert found.converged is not None and not bool(found.converged)
    assert bool(NewtonCG().minimise(energy, start).converged)


def test_a_fit_at_tiny_scales_gives_no_false_alarm() -> None:
    case = case_of(LinearGaussian.random(0).at(log_scale=np.log([1e-5] * 3)))
    prior = GaussianPrior.create(case.prior.loc, 1e-5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        done = fit(
            LaplaceEvidence(steps=2, learn_scale=False),
            case.density,
            case.tasks.support,
            prior=prior,
            progress=False,
        )
        done.adapt(case.tasks.support)
    assert not [w for w in seen if "inner minimiser" in str(w.message)]
    assert bool(done.stats["converged"].all())


@pytest.mark.parametrize("start", [-20.0, 5.0, 50.0])
def test_a_far_start_behind_a_log_link_excuses_nothing(start: float) -> None:
    """e^50 is a gradient of 1e21, relative to which any other would do: θ* must still be θ*."""

    def energy(theta: Tensor) -> Tensor:
        return (theta.exp() - 100 * theta + 0.125 * (theta - 1) ** 2).sum(-1)

    found = NewtonCG().minimise(energy, torch.full((1, 1), start, dtype=torch.float64))
    slope = float(found.theta.exp() - 100 + 0.25 * (found.theta - 1))
    assert bool(found.converged.all()) and abs(slope) < 1e-4
