"""Location and probability against the exact law on a grid, which takes the gradient apart.

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

from varmeta import (
    IMAML,
    BismutElworthyLi,
    CompletePooling,
    Density,
    GaussianPrior,
    JointVariational,
    Langevin,
    NoPooling,
    RandomRestarts,
    Stochastic,
    TaskSource,
    fit,
    meta_gradient,
)
from varmeta.inference.at_ends import ImplicitAtParticles
from varmeta.inference.estimators import others_mean, standard_error
from varmeta.inference.mechanisms import Mechanisms, _probability, mechanisms, mechanisms_at
from varmeta.inference.partition import Partition
from varmeta.models import sinusoids
from varmeta.report_basins import plot_mechanisms

NOISY = Langevin(run_length=20, step_size=0.02, temperature=0.8)
LOC = 0.5


def run(particles: int = 300, seed: int = 0, tasks=None, **options) -> Mechanisms:  # type: ignore[no-untyped-def]
    tasks = wavy_tasks() if tasks is None else tasks
    density = Density(waves, tasks)
    options = {"algorithm": NOISY, "particles": particles, "seed": seed} | options
    return mechanisms_at(density, prior_at(LOC), tasks, **options)


@pytest.fixture(scope="module")
def found() -> Mechanisms:
    return run(20_000)


def test_both_parts_are_those_of_the_law(found: Mechanisms) -> None:
    sharp, told = 0, 0.0
    for t in range(3):
        _, edges = stationary_points(t, LOC)
        exact = law(t, LOC, NOISY)
        parts = exact.mechanisms(query(t), edges, border_slopes(t, LOC))
        still = exact.mechanisms(query(t), edges).probability.sum()
        gap = abs(still - parts.probability.sum())
        told = max(told, gap / float(found.probability_se["loc"][t]))
        truths = {
            "location": parts.location.sum(),
            "probability": parts.probability.sum(),
            "total": exact.gradient(query(t))[0],
        }
        for part, truth in truths.items():
            mean = float(getattr(found, part)["loc"][t])
            error = float(getattr(found, f"{part}_se")["loc"][t])
            assert abs(mean - truth) < ERRORS * error, (t, part)
            sharp += abs(truth) > 8 * error
        by_scale = float(found.total["log_scale"][t]) - exact.gradient(query(t))[1]
        assert abs(by_scale) < ERRORS * float(found.total_se["log_scale"][t])
    assert told > 2 * ERRORS  # borders held still would be seen
    assert sharp >= 4  # so that a part in the wrong place would be seen


def test_the_parts_add_up_particle_by_particle(found: Mechanisms) -> None:
    each = found.each
    gap = each["total"] - each["location"] - each["probability"]
    assert float(gap.abs().max()) < 1e-12 * float(each["total"].abs().max())
    same = meta_gradient(
        found.density,
        prior_at(LOC),
        found.tasks,
        algorithm=NOISY,
        estimator=BismutElworthyLi(),
        particles=20_000,
    )
    assert torch.allclose(same.estimate.each, each["total"], rtol=1e-10, atol=1e-12)


def test_implicit_is_the_gradient_at_the_particles_minima() -> None:
    found = run(200)
    same = meta_gradient(
        found.density,
        prior_at(LOC),
        found.tasks,
        algorithm=NOISY,
        estimator=ImplicitAtParticles(),
        particles=200,
    )
    for name, value in found.implicit.items():
        assert torch.allclose(value, same.mean[name], rtol=1e-7, atol=1e-9)
        error = found.implicit_se[name]
        assert torch.allclose(error, same.standard_error[name], rtol=1e-6, atol=1e-9)


def test_the_standard_errors_are_the_spread_of_repeated_runs() -> None:
    """Of 40 runs: an estimate of a ratio of standard deviations is off by 1/√78 = 11%.

    All at once: a task draws by its name.
    """
    one = wavy_tasks()
    names = tuple(f"wave {t}, run {k}" for k in range(40) for t in range(3))
    many = one._take(torch.arange(120) % 3, names)
    result = mechanisms_at(
        Density(waves, one), prior_at(LOC), many, algorithm=NOISY, particles=80, seed=100
    )
    for part in ("total", "location", "probability"):
        means, errors = (
            getattr(result, name)["loc"].reshape(40, 3) for name in (part, f"{part}_se")
        )
        ratio = means.std(0) / (errors**2).mean(0).sqrt()
        assert bool(((ratio - 1).abs() < ERRORS * 0.113).all()), (part, ratio)


def test_the_standard_error_knows_that_the_basins_means_are_estimates() -> None:
    """Where g varies more within basins than between: by leaving out each particle in turn."""
    source = torch.Generator().manual_seed(2)
    count = 200
    labels = (torch.rand(count, 1, generator=source) < 0.3).long()
    losses = 3 * torch.randn(count, 1, generator=source, dtype=F64) + 0.1 * labels
    weights = torch.randn(count, 1, 1, generator=source, dtype=F64) + (labels[..., None] - 0.3)

    def each(keep: torch.Tensor) -> torch.Tensor:
        parts = Partition(labels[keep], torch.zeros(2, 1, dtype=torch.long))
        g = losses[keep]
        return _probability(g, others_mean(g), weights[keep], parts)[0]

    every = torch.arange(count)
    left = torch.stack([each(every[every != s]).mean(0) for s in range(count)])
    jackknife = ((count - 1) / count * ((left - left.mean(0)) ** 2).sum(0)).sqrt()
    assert torch.allclose(standard_error(each(every)), jackknife, rtol=0.05)


def test_the_share(found: Mechanisms) -> None:
    for t in range(3):
        _, edges = stationary_points(t, LOC)
        parts = law(t, LOC, NOISY).mechanisms(query(t), edges, border_slopes(t, LOC))
        size = [abs(parts.location.sum()), abs(parts.probability.sum())]
        truth = size[1] / sum(size)
        assert abs(float(found.share[t]) - truth) < ERRORS * float(found.share_se[t]) + 0.01
    assert float(found.share_se.max()) < 0.2


def test_tasks_do_not_see_each_other() -> None:
    tasks = wavy_tasks()
    together = run(100, 3)
    assert together.table.equals(run(100, 3).table)
    assert not together.table.equals(run(100, 4).table)
    for other in (
        run(100, 3, widened(tasks, 2)),
        *(run(100, 3, tasks.select([t])) for t in (0, 2)),
    ):
        for name in other.tasks.names:
            mine = together.table[together.table["task"] == name].iloc[:, 2:-2]
            its = other.table[other.table["task"] == name].iloc[:, 2:-2]
            assert mine.to_numpy() == pytest.approx(its.to_numpy(), rel=1e-6, abs=1e-8, nan_ok=True)


def test_one_minimum_has_no_probability_part() -> None:
    """A parabola: all of it is location, and the implicit derivative is all of that."""
    tasks = wavy_tasks(1)
    tasks = tasks._map(lambda t: 0 * t if t is tasks.inputs else t)
    found = run(4000, tasks=tasks, algorithm=Langevin(60, 0.1, temperature=0.5))
    assert int(found.labels.max()) == 0
    assert float(found.each["probability"].abs().max()) < 1.0
    assert float(found.probability["loc"].abs()) < ERRORS * float(found.probability_se["loc"])
    assert float(found.share) < 0.2
    gap = float(found.total["loc"] - found.implicit["loc"])
    assert abs(gap) < ERRORS * float(found.total_se["loc"])


def test_every_particle_its_own_minimum() -> None:
    density, tasks = small_network()
    prior = GaussianPrior.create(torch.zeros(density.dim, dtype=F64), 1.5)
    algorithm = Langevin(10, 0.005, start_scale=1.0)
    found = mechanisms_at(density, prior, tasks, algorithm=algorithm, particles=12)
    assert float(found.lonely.max()) > 0 and "alone in their basin" in repr(found)
    assert len(found.table) == 2 and "coordinate" not in found.table
    assert bool(np.isfinite(found.table["total"]).all())
    for t in range(2):
        labels = found.labels[:, t]
        alone = labels.bincount()[labels] == 1
        assert float(found.each["probability"][alone, t].abs().max()) == 0
        assert float(found.lonely[t]) == float(alone.double().mean())


@pytest.mark.parametrize(
    "strategy",
    [IMAML(steps=2), JointVariational(steps=2, adapt_steps=2), NoPooling(steps=2, adapt_steps=2)],
    ids=lambda s: s.name,
)
def test_of_any_strategy(strategy) -> None:  # type: ignore[no-untyped-def]
    tasks = wavy_tasks()
    result = fit(strategy, Density(waves, tasks), tasks)
    found = mechanisms(result, particles=20)
    direct = mechanisms_at(result.density, result.prior, tasks, algorithm=Langevin(), particles=20)
    assert found.table.equals(direct.table)
    assert list(found.table["task"]) == list(tasks.names)
    some = mechanisms(result, tasks.select([1]), particles=20)
    assert list(some.table["task"]) == ["wave 1"]


def test_the_algorithm_is_the_strategys_own() -> None:
    tasks = wavy_tasks()
    result = fit(Stochastic(NOISY, steps=1), Density(waves, tasks), tasks)
    own = mechanisms(result, particles=20)
    assert own.table.equals(mechanisms(result, algorithm=NOISY, particles=20).table)
    other = fit(IMAML(steps=1), Density(waves, tasks), tasks, prior=prior_at(LOC))
    default = mechanisms(other, particles=20)
    assert default.table.equals(mechanisms(other, algorithm=Langevin(), particles=20).table)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is 0 in some step"):
        run(10, algorithm=RandomRestarts(5, 0.01))
    with pytest.raises(ValueError, match="at least 4, got 3"):
        run(3)
    result = fit(IMAML(steps=1), Density(waves, wavy_tasks()), wavy_tasks())
    result.tasks = TaskSource(sinusoids(num_tasks=2, support=2, query=2))
    with pytest.raises(ValueError, match="stream's tasks are not kept; pass tasks"):
        mechanisms(result)
    pooled = fit(CompletePooling(draws=4), Density(waves, wavy_tasks()), wavy_tasks())
    with pytest.raises(ValueError, match=r"scale of 0: no task moves .*CompletePooling"):
        mechanisms(pooled)


def test_the_table_the_text_and_the_picture(found: Mechanisms) -> None:
    row = found.table.iloc[1]
    assert row["task"] == "wave 1" and row["coordinate"] == "theta"
    assert row["probability"] == float(found.probability["loc"][1, 0])
    assert row["share"] == float(found.share[1])
    assert repr(found).startswith("Mechanisms(3 × 'task', 20000 particles, share of probability 0.")
    assert str(found).count("\n") == 4
    fig = plot_mechanisms(found)
    fig.savefig("/dev/null", format="png")
    (total,) = (line for line in fig.axes[0].lines if line.get_gid() == "total")
    assert np.allclose(total.get_xdata(), found.total["loc"][:, 0])
    assert plot_mechanisms(found, "theta").axes[0].get_xlabel() == "d E g / d theta"
    with pytest.raises(ValueError, match="no coordinate 'slope'; there are: theta"):
        plot_mechanisms(found, "slope")
