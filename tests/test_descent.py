"""Random algorithms: their laws, and runs that do not depend on what runs beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from random_runs import F64, exact_gradient, lines, moments, prior_at, two_wells, wells
from torch import Tensor

from varmeta import (
    SGD,
    Density,
    GaussianPrior,
    Langevin,
    RandomDescent,
    RandomRestarts,
    Tasks,
    meta_gradient,
)
from varmeta.inference.chain import Chain
from varmeta.inference.point import Point

ERRORS = 4.5  # standard errors: a false-alarm rate of 7e-6 a number
ALGORITHMS: dict[str, RandomDescent] = {
    "Langevin": Langevin(run_length=20, step_size=0.02),
    "own pace": Langevin(run_length=5),
    "momentum": Langevin(run_length=5, step_size=0.02, momentum=0.7),
    "SGD": SGD(run_length=5, step_size=0.02, batch_rows=1),
    "SGD with replacement": SGD(run_length=5, step_size=0.02, batch_rows=2, replacement=True),
    "restarts": RandomRestarts(run_length=5, step_size=0.02),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
PRIOR = GaussianPrior.create(torch.tensor([0.3, -0.2, 0.5], dtype=F64), 0.8)


def chain_of(algorithm: RandomDescent, tasks: Tasks, density: Density, **options: object) -> Chain:
    point = Point.of(density, PRIOR, density.shared_init)
    return Chain(algorithm, density, point, tasks, 6, 1, **options)  # type: ignore[arg-type]


@every_algorithm
def test_a_run_is_the_same_alone_and_with_padding(algorithm: RandomDescent) -> None:
    tasks, density = lines()
    tasks = tasks.unsplit
    together = chain_of(algorithm, tasks, density).run()
    assert torch.equal(together, chain_of(algorithm, tasks, density).run())  # same seed
    for i in range(len(tasks)):
        alone = chain_of(algorithm, tasks.select([i]), density).run()
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-12, atol=1e-12)
    order = torch.tensor([3, 0, 1, 2, 0, 1])  # padding among the rows, and more of it
    mask = torch.cat([tasks.mask, torch.zeros_like(tasks.mask[:, :2])], dim=1)
    mask = torch.stack([mask[:, k] if k < 4 else mask[:, 4] for k in [3, 0, 1, 2, 4, 5]], dim=1)
    padded = Tasks(
        tasks.inputs[:, order],
        tasks.targets[:, order],
        mask,
        torch.zeros_like(mask),
        tasks.names,
    )
    moved = chain_of(algorithm, padded, density).run()
    if algorithm.batch_rows is None:
        torch.testing.assert_close(moved, together, rtol=1e-10, atol=1e-10)
    else:  # the rows' order has changed, and their draws follow the order
        assert moved.shape == together.shape
        front = Tasks(
            torch.cat([tasks.inputs, tasks.inputs[:, :2]], dim=1),
            torch.cat([tasks.targets, tasks.targets[:, :2]], dim=1),
            torch.cat([tasks.mask, torch.zeros_like(tasks.mask[:, :2])], dim=1),
            torch.zeros(2, 6, dtype=torch.bool),
            tasks.names,
        )
        wider = chain_of(algorithm, front, density).run()
        torch.testing.assert_close(wider, together, rtol=1e-10, atol=1e-10)


@every_algorithm
def test_other_seeds_and_names_draw_other_numbers(algorithm: RandomDescent) -> None:
    tasks, density = lines()
    point = Point.of(density, PRIOR, density.shared_init)
    run = Chain(algorithm, density, point, tasks.unsplit, 6, 1).run()
    assert not torch.allclose(run, Chain(algorithm, density, point, tasks.unsplit, 6, 2).run())
    assert len({tuple(end.tolist()) for end in run.flatten(0, 1)}) > 3


@every_algorithm
def test_steps_can_be_had_again(algorithm: RandomDescent) -> None:
    """What the way back through a run relies on: any step's numbers, in any order."""
    tasks, density = lines()
    chain = chain_of(algorithm, tasks.unsplit, density)
    steps = list(range(algorithm.run_length))
    forward = [(chain.shock(t), chain.noise.row_weights(t)) for t in steps]
    backward = [(chain.shock(t), chain.noise.row_weights(t)) for t in reversed(steps)][::-1]
    for (a, rows_a), (b, rows_b) in zip(forward, backward, strict=True):
        assert torch.equal(a, b)
        assert (rows_a is None and rows_b is None) or torch.equal(rows_a, rows_b)  # type: ignore[arg-type]


def test_an_epoch_takes_every_row_once() -> None:
    tasks, density = lines()
    algorithm = SGD(run_length=8, step_size=0.02, batch_rows=3)  # 4 and 3 rows: 2 and 1 step
    noise = chain_of(algorithm, tasks.unsplit, density).noise
    weights = torch.stack([noise.row_weights(t) for t in range(8)])  # type: ignore[misc]
    used = weights > 0
    assert (used[0::2] | used[1::2])[:, :, 0].all() and not (used[0::2] & used[1::2])[:, :, 0].any()
    assert torch.equal(used[:, :, 1].sum(-1), torch.full((8, 6), 3))
    torch.testing.assert_close(
        weights.sum(-1), tasks.unsplit.num_rows.to(F64).expand(8, 6, 2)
    )  # each step's weights stand for all rows
    assert used[0, :, 0].float().mean(0).max() < 1  # and the order is another one for each run


def test_antithetic_runs_are_mirrored() -> None:
    """On a quadratic the mean of a pair is the noiseless run."""
    tasks, density = lines()
    algorithm = Langevin(run_length=10, step_size=0.03, start_scale=0.5)
    ends = chain_of(algorithm, tasks.unsplit, density, antithetic=True).run()
    still = chain_of(RandomDescent(run_length=10, step_size=0.03), tasks.unsplit, density).run()
    torch.testing.assert_close(ends.unflatten(0, (2, 3)).mean(0), still[:3])


def test_mean_loss_on_a_quadratic() -> None:
    tasks, density = lines()
    algorithm = Langevin(
        run_length=15,
        step_size=0.04,
        temperature=np.geomspace(2, 0.5, 15),
        momentum=0.4,
        start_scale=0.6,
    )
    got = meta_gradient(density, PRIOR, tasks, algorithm=algorithm, particles=20_000, seed=2)
    exact = moments(tasks, algorithm, PRIOR, torch.zeros(1, dtype=F64))
    error = got.losses.std(0) / 20_000**0.5
    assert ((got.losses.mean(0) - exact).abs() < ERRORS * error).all()
    assert (error < 0.05).all()


def test_mean_loss_in_a_double_well() -> None:
    tasks = two_wells()
    algorithm = Langevin(run_length=25, step_size=0.03, temperature=0.3)
    got = meta_gradient(
        Density(wells, tasks), prior_at(0.05), tasks, algorithm=algorithm, particles=40_000
    )
    exact, _ = exact_gradient(wells, 0.05, algorithm)
    assert abs(float(got.losses.mean()) - exact) < ERRORS * float(got.losses.std()) / 200


def flat_line(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_stationary_law_on_a_quadratic() -> None:
    """Mean of the posterior; covariance widened by 1.07, as the docstring states.

    v ← (1 − η_t)² v + 2η_t, in units of the posterior's; what is left of the start is e^-12.
    """
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 2, generator=source, dtype=F64)
    y = torch.randn(2, 6, generator=source, dtype=F64)
    tasks = Tasks.from_list([(x[0], y[0]), (x[1, :3], y[1, :3])])
    density = Density(flat_line, tasks)
    prior = GaussianPrior.create(torch.tensor([0.3, -0.2], dtype=F64), [0.8, 1.5])
    count = 40_000
    point = Point.of(density, prior, density.shared_init)
    ends = Chain(Langevin(), density, point, tasks, count, 4).run()
    widened = 0.0
    for pace in Langevin().paces:
        widened = (1 - pace) ** 2 * widened + 2 * pace
    assert round(widened, 2) == 1.07
    for i, rows in enumerate((6, 3)):
        design = x[i, :rows]
        precision = design.T @ design / 0.25 + prior.precision()
        mean = torch.linalg.solve(
            precision, design.T @ y[i, :rows] / 0.25 + prior.precision() @ prior.loc
        )
        cov = torch.linalg.inv(precision) * widened
        sd = cov.diagonal().sqrt()
        assert ((ends[:, i].mean(0) - mean).abs() < ERRORS * sd / count**0.5).all()
        got = torch.cov(ends[:, i].T)
        tolerance = ERRORS * torch.sqrt((cov**2 + sd[:, None] ** 2 * sd**2) / count)
        assert ((got - cov).abs() < tolerance).all()


def test_a_path_goes_on_after_the_end() -> None:
    tasks, density = lines()
    algorithm = Langevin(run_length=4, step_size=0.02)
    path = chain_of(algorithm, tasks.unsplit, density).path(3, thin=2)
    assert path.shape == (6, 3, 2, 3)
    for k in range(3):
        longer = Langevin(run_length=4 + 2 * k, step_size=0.02)
        torch.testing.assert_close(path[:, k], chain_of(longer, tasks.unsplit, density).run())


def test_wide_theta_needs_a_step_size() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(300, dtype=F64), 1.0).to_event(1))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(x[..., 0] * w.sum(), 1.0), obs=y)

    tasks = Tasks.from_list([(torch.ones(2, 1, dtype=F64), torch.ones(2, dtype=F64))])
    density = Density(model, tasks)
    prior = GaussianPrior.from_density(density)
    with pytest.raises(ValueError, match=r"300 coordinates .*give Langevin a step_size"):
        meta_gradient(density, prior, tasks, algorithm=Langevin())
    wide = meta_gradient(density, prior, tasks, algorithm=Langevin(step_size=1e-4), particles=2)
    assert wide.ends.shape == (2, 1, 300)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Langevin(temperature=-1.0),
            "temperature must be .* at least 0 .*, got -1.0",
        ),
        (lambda: Langevin(step_size=0.0), "step_size must be positive .*, got 0.0"),
        (lambda: Langevin(3, temperature=[1.0, 2.0]), "one number, or .* 3 steps, got 2"),
        (lambda: SGD(momentum=1.0), "momentum must be at least 0 and below 1, got 1.0"),
        (lambda: SGD(batch_rows=0), "batch_rows must be .* at least 1 or None, got 0"),
        (lambda: RandomRestarts(start_scale=-1.0), "start_scale must be .* at least 0, got -1.0"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
