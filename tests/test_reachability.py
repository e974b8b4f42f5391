"""The reachability gap: 0 where there is one basin, exact where a task sits in another one."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, case_of
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import IMAML, Density, GaussianPrior, JointVariational, Reset, Tasks, fit
from varmeta.inference.reachability import reachability_gap


def two_wells(x: Tensor, y: Tensor | None = None) -> Tensor:
    """y ~ N(θ², 0.5²): ±√y fit alike, so that only the prior tells them apart."""
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0, dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(theta**2, 0.5), obs=y)


@pytest.mark.parametrize("q", ["delta", "diagonal", "full"])
def test_there_is_none_where_there_is_one_basin(q: str) -> None:
    """Both posteriors are the optimum of the same convex problem."""
    case = case_of(LinearGaussian.random(2))
    strategy = JointVariational(
        q=q,  # type: ignore[arg-type]
        q_update="gradient",
        expectation="cubature",
        tolerance=1e-9,
        steps=800,
        learning_rate=0.1,
        adapt_steps=800,
    )
    gap = reachability_gap(fit(strategy, case.density, case.tasks.support, prior=case.prior))
    assert gap.shape == (6,) and gap.abs().max() < 1e-5


def test_where_every_q_is_solved_there_is_none_to_rounding() -> None:
    case = case_of(LinearGaussian.random(2))
    done = fit(JointVariational(), case.density, case.tasks.support, prior=case.prior)
    assert reachability_gap(done).abs().max() < 1e-9


def test_it_is_exact_where_a_task_sits_in_a_well_that_theta0_does_not_lead_to() -> None:
    """Task 0's q_i is put in the other well by hand; the objective there is known."""
    x = torch.zeros(3, 1, dtype=FLOAT)
    tasks = Tasks.from_list([(x, x[:, 0] + 1.0), (x, x[:, 0] + 1.2)])
    density = Density(two_wells, tasks)
    prior = GaussianPrior.create(torch.tensor([0.8], dtype=FLOAT), 1.0)
    strategy = JointVariational(q="delta", steps=300, learning_rate=0.1, learn_loc=False)
    done = fit(strategy, density, tasks, prior=prior)
    assert reachability_gap(done).abs().max() < 1e-8
    done.state.tensors["rows"][0] = -1.0 - 0.8  # θ = −1, measured from θ0
    there = torch.tensor([[-1.0]], dtype=FLOAT)
    here = done.adapt(tasks).mean[:1]
    first = tasks.select([0])

    def energy(theta: Tensor) -> float:
        loss = density.negative_log_likelihood(theta, first) + prior.penalty(theta)
        return float(loss.sum())

    gap = reachability_gap(done)
    assert abs(float(gap[0]) - (energy(here) - energy(there))) < 1e-9
    assert float(gap[0]) < -1 and abs(float(gap[1])) < 1e-8  # the far well is the worse one


def test_resets_close_it() -> None:
    """Five steps lead a fresh q_i less far than 200 led the kept ones; with resets both take 5."""
    case = case_of(LinearGaussian.random(0))
    few = JointVariational(q="delta", steps=200, learning_rate=0.1, adapt_steps=5)
    done = [
        fit(strategy, case.density, case.tasks.support, prior=case.prior)
        for strategy in (few, replace(few, resets=Reset(5)))
    ]
    wide, closed = (float(reachability_gap(d).mean()) for d in done)
    assert wide > 0.05 and abs(closed) < 0.05 * wide


def test_strategies_that_keep_nothing_have_none() -> None:
    case = case_of(LinearGaussian.random(0))
    done = fit(IMAML(steps=1), case.density, case.tasks, prior=case.prior)
    with pytest.raises(ValueError, match=r"IMAML keeps nothing of a task.*0 by definition"):
        reachability_gap(done)
