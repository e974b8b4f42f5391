"""Basins against the exact law on a grid: which minima, how often, and how that follows θ0.

Statistical tests allow 4.5 standard errors, a false-alarm rate of 7e-6 for each number, with fixed
seeds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from basin_problems import (
    ERRORS,
    F64,
    LIMITS,
    Wave,
    border_slopes,
    law,
    prior_at,
    query,
    small_network,
    stationary_points,
    waves,
    wavy_tasks,
)
from helpers import widened

from varmeta import Density, GaussianPrior, Langevin, NonFiniteLoss, RandomDescent, RandomRestarts
from varmeta.figures import stationary
from varmeta.inference.basins import Basins, find_basins
from varmeta.inference.chain import Chain
from varmeta.inference.flow import GradientFlow
from varmeta.inference.newton import NewtonCG
from varmeta.inference.partition import Descent, descend, partition
from varmeta.inference.point import Point
from varmeta.report_basins import plot_basins

NOISY = Langevin(run_length=20, step_size=0.02, temperature=0.8)
LOC = 0.5  # a border that moves is half of a slope here


@pytest.fixture(scope="module")
def found() -> Basins:
    tasks = wavy_tasks()
    density = Density(waves, tasks)
    return find_basins(density, prior_at(LOC), tasks, algorithm=NOISY, particles=20_000)


def test_the_minima_are_those_of_the_energy(found: Basins) -> None:
    for t in range(3):
        minima, _ = stationary_points(t, LOC)
        seen = found.minima[: int(found.count[t]), t, 0].numpy()
        gap = np.abs(seen[:, None] - minima)
        assert gap.min(1).max() < 1e-8 and len(set(gap.argmin(1))) == len(seen)
        energy = found.energy[: len(seen), t].numpy()
        assert (np.diff(energy) > 0).all()
        wave = Wave((0.8, -0.4, 1.7)[t])
        expected = wave.value(seen)
        assert found.support_loss[: len(seen), t].numpy() == pytest.approx(expected, rel=1e-10)
        assert energy == pytest.approx(expected + 0.5 * (seen - LOC) ** 2, rel=1e-10)
        assert found.query_loss[: len(seen), t].numpy() == pytest.approx(query(t)(seen), rel=1e-7)


def test_occupations_their_slopes_and_losses_are_those_of_the_law(found: Basins) -> None:
    compared, told = 0, 0.0
    assert found.sensitivity is not None and found.sensitivity_se is not None
    for t in range(3):
        minima, edges = stationary_points(t, LOC)
        exact = law(t, LOC, NOISY)
        p, slopes = exact.occupations(edges, border_slopes(t, LOC))
        still = exact.occupations(edges)[1]
        means = exact.mechanisms(query(t), edges).mean
        for k in range(int(found.count[t])):
            basin = int(np.abs(minima - float(found.minima[k, t, 0])).argmin())
            share, error = float(found.occupation[k, t]), float(found.occupation_se[k, t])
            if p[basin] * len(found.labels) < 30:
                continue  # too few for a normal law
            assert abs(share - p[basin]) < ERRORS * error
            slope = float(found.sensitivity["loc"][k, t, 0]) - slopes[0, basin]
            assert abs(slope) < ERRORS * float(found.sensitivity_se["loc"][k, t, 0])
            by_scale = float(found.sensitivity["log_scale"][k, t, 0]) - slopes[1, basin]
            assert abs(by_scale) < ERRORS * float(found.sensitivity_se["log_scale"][k, t, 0])
            error = float(found.sensitivity_se["loc"][k, t, 0])
            told = max(told, abs(slopes[0, basin] - still[0, basin]) / error)
            inside = found.labels[:, t] == k
            g = query(t)(found.ends[inside, t, 0].numpy())
            assert float(found.query_loss_mean[k, t]) == pytest.approx(g.mean(), rel=1e-12)
            assert abs(g.mean() - means[basin]) < ERRORS * g.std() / len(g) ** 0.5
            compared += 1
    assert compared >= 7 and told > 2 * ERRORS  # borders held still would be seen
    sharp = (found.sensitivity["loc"] / found.sensitivity_se["loc"]).abs().nan_to_num()
    assert (sharp[:, :2].amax(0) > 8).all()  # and the test is sharp enough to fail


def test_particles_are_counted_once(found: Basins) -> None:
    total = found.occupation.nansum(0)
    assert torch.allclose(total, torch.ones_like(total), rtol=1e-12)
    assert found.slope is not None
    assert float(found.slope.nansum(0).abs().max()) < 1e-12


def test_labels_are_the_intervals_between_the_maxima() -> None:
    """Of 20,001 points none is taken elsewhere by the flow, and many are by a line search."""
    points = torch.linspace(*LIMITS, 20_001, dtype=F64)[:, None]
    wave = Wave(0.8)

    def energy(theta: torch.Tensor) -> torch.Tensor:
        mean = theta + 1.5 * torch.sin(3 * theta)
        return (0.5 * (mean - 0.8) ** 2 + 0.5 * (theta - LOC) ** 2)[:, 0]

    minima, maxima = stationary(wave, LOC)  # type: ignore[arg-type]
    truth = np.searchsorted(maxima, points[:, 0].numpy())
    wrong = {}
    # In units so large that a step could span a basin, the linear model alone keeps it short.
    for minimiser in (GradientFlow(scale=8.0), GradientFlow(), NewtonCG()):
        minimum = minimiser.minimise(energy, points)
        assert minimum.converged is not None and bool(minimum.converged.all())
        ends = np.abs(minimum.theta.numpy() - minima).argmin(1)
        wrong[minimiser] = int((ends != truth).sum())
    large, small, newton = wrong.values()
    assert large == small == 0 and newton > 1000, wrong


def test_tasks_do_not_see_each_other(found: Basins) -> None:
    tasks = wavy_tasks()
    density = Density(waves, tasks)
    options = {"algorithm": NOISY, "particles": 200, "seed": 3}
    together = find_basins(density, prior_at(LOC), tasks, **options)
    again = find_basins(density, prior_at(LOC), tasks, **options)
    assert together.table.equals(again.table)
    wide = find_basins(density, prior_at(LOC), widened(tasks, 3), **options)
    alone = [find_basins(density, prior_at(LOC), tasks.select([t]), **options) for t in range(3)]
    for other in (wide, *alone):
        for name in other.tasks.names:
            mine = together.table[together.table["task"] == name].drop(columns=["task", "borders"])
            its = other.table[other.table["task"] == name].drop(columns=["task", "borders"])
            assert mine.to_numpy() == pytest.approx(its.to_numpy(), rel=1e-7, abs=1e-9)
    other_seed = find_basins(density, prior_at(LOC), tasks, **options | {"seed": 4})
    assert not together.table.equals(other_seed.table)


def test_a_hundred_thousand_restarts_without_noise() -> None:
    tasks = wavy_tasks(1)
    algorithm = RandomRestarts(run_length=3, step_size=0.001)
    density = Density(waves, tasks)
    found = find_basins(density, prior_at(LOC), tasks, algorithm=algorithm, particles=100_000)
    assert found.slope is None and found.sensitivity is None and "no slopes" in str(found)
    assert not any("slope" in column for column in found.table.columns)
    assert 3 <= int(found.count[0]) <= len(stationary_points(0, LOC)[0])
    _, maxima = stationary_points(0, LOC)
    interval = np.searchsorted(maxima, found.ends[:, 0, 0].numpy())
    assert len(set(zip(interval, found.labels[:, 0].tolist(), strict=True))) == int(found.count[0])


def test_every_particle_its_own_minimum() -> None:
    """A network: the printed table stays short, and its symmetric minima have equal energies."""
    density, tasks = small_network()
    prior = GaussianPrior.create(torch.zeros(density.dim, dtype=F64), 1.5)
    algorithm = Langevin(run_length=20, step_size=0.005, start_scale=1.0)
    found = find_basins(density, prior, tasks, algorithm=algorithm, particles=40)
    assert bool(found.converged.all()) and int(found.count.min()) > 4
    assert list(found.table.columns[-2:]) == ["slope", "slope_se"]
    assert str(found).count("\n") < 50
    energy = found.energy[: int(found.count[0]), 0]
    assert bool((energy.diff() < 1e-8).any())  # two minima, one network
    alone = find_basins(density, prior, tasks.select([1]), algorithm=algorithm, particles=40)
    assert torch.equal(alone.labels[:, 0], found.labels[:, 1])


def test_minima_are_linked_in_units_of_the_prior() -> None:
    tasks = wavy_tasks(1)
    density = Density(waves, tasks)
    point = Point.of(density, prior_at(0.0, 2.0), density.shared_init)
    chain = Chain(RandomDescent(1, 0.1), density, point, tasks, 6, 0)
    places = torch.tensor([0.0, 0.018, 0.036, 0.08, 0.08, -1.0], dtype=F64)[:, None, None]
    energy = torch.tensor([3.0, 2.5, 2.0, 1.0, 1.1, 5.0], dtype=F64)[:, None]
    fine = torch.ones(6, 1, dtype=torch.bool)
    parts = partition(chain, Descent(places, energy, fine, ~fine), radius=0.01)
    assert parts.labels[:, 0].tolist() == [1, 1, 1, 0, 0, 2]
    assert parts.first[:, 0].tolist() == [3, 2, 5]
    with pytest.raises(ValueError, match="radius must be positive, got 0"):
        partition(chain, Descent(places, energy, fine, ~fine), radius=0)


def test_what_went_wrong_is_said() -> None:
    tasks = wavy_tasks(1)
    density = Density(waves, tasks)
    few = GradientFlow(max_iterations=2)
    with pytest.warns(RuntimeWarning, match=r"50 of 50 descents did not converge: .*'wave 0'"):
        found = find_basins(
            density, prior_at(LOC), tasks, algorithm=NOISY, particles=50, minimiser=few
        )
    assert not bool(found.converged.any())
    point = Point.of(density, prior_at(LOC), density.shared_init)
    _, maxima = stationary_points(0, LOC)
    chain = Chain(RandomDescent(1, 0.1), density, point, tasks.support, 1, 0)
    crest = torch.tensor(maxima[0], dtype=F64).reshape(1, 1, 1)
    with pytest.warns(RuntimeWarning, match="1 of 1 descents ended at a saddle"):
        descent = descend(chain, crest)
    assert bool(descent.saddle) and torch.equal(descent.theta, crest)
    with pytest.raises(NonFiniteLoss, match=r"'wave 0' is not finite: .*step_size"):
        wild = Langevin(500, 50.0, clip=None)
        find_basins(density, prior_at(LOC), tasks, algorithm=wild, particles=5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        find_basins(density, prior_at(LOC), tasks, algorithm=NOISY, particles=1)
    with pytest.raises(ValueError, match="longest must be positive"):
        GradientFlow(longest=0)
    with pytest.raises(ValueError, match="scale must be positive"):
        GradientFlow(scale=torch.tensor([1.0, -1.0]))


def test_the_numbers_are_exported(found: Basins) -> None:
    data = found.to_dataset()
    assert dict(data.sizes) == {"basin": len(found.minima), "task": 3, "coordinate": 1} | {
        "particle": 20_000
    }
    assert float(data["occupation"].sel(task="wave 1")[0]) == float(found.occupation[0, 1])
    row = found.table.iloc[0]
    assert row["theta"] == float(found.minima[0, 0, 0])
    assert row["slope[theta]"] == float(data["slope"][0, 0, 0])


@pytest.mark.parametrize("task", [None, "wave 1"])
def test_the_picture(found: Basins, task: str | None) -> None:
    fig = plot_basins(found, task)
    fig.savefig("/dev/null", format="png")
    marks = {line.get_gid() for ax in fig.axes for line in ax.lines}
    assert "energy:wave 1" in marks and "minimum:wave 1:0" in marks
    assert ("energy:wave 0" in marks) == (task is None)
    with pytest.raises(ValueError, match="no task 'wave 9'"):
        plot_basins(found, "wave 9")
