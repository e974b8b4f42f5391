"""The random algorithm and its two estimators, against exact expectations.

Statistical tests compare a mean over independent batches with the truth and allow 4.5 standard
errors, a false-alarm rate of about 1e-5 each (Student's t with 39 degrees of freedom: 6e-5).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from varmeta import Density, GaussianPrior, Langevin, Stochastic, Tasks
from varmeta.seeds import generator

F64 = torch.float64
BATCHES, ERRORS = 40, 4.5


def wells(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Rows with x = 1 see θ² (two wells at ±√y), rows with x = 0 see θ itself."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    flag = x[..., 0]
    mean = flag * theta**2 + (1 - flag) * theta
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 0.7), obs=y)


def two_wells() -> Tasks:
    """One task: a double well as support loss, a parabola centred on one well as query loss."""
    x = torch.tensor([[1.0], [0.0]], dtype=F64)
    y = torch.tensor([1.0, 1.0], dtype=F64)
    tasks = Tasks.from_list([(x, y)])
    return Tasks(
        tasks.inputs, tasks.targets, tasks.mask, torch.tensor([[False, True]]), tasks.names
    )


def prior_at(loc: float, log_scale: float = 0.0) -> tuple[GaussianPrior, Tensor, Tensor]:
    loc_leaf = torch.tensor([loc], dtype=F64, requires_grad=True)
    scale_leaf = torch.tensor([log_scale], dtype=F64, requires_grad=True)
    prior = GaussianPrior(loc_leaf, scale_leaf, torch.zeros(1, dtype=torch.long))
    return prior, loc_leaf, scale_leaf


def grid_expectation(loc: float, log_scale: float, algorithm: Langevin) -> float:
    """E g(x_T) by pushing the density through a transition matrix on a fine grid."""
    assert algorithm.step_size is not None
    points = np.linspace(-4, 4, 1201)
    width = points[1] - points[0]
    variance = 2 * algorithm.step_size * algorithm.temperature

    def drift(x: np.ndarray) -> np.ndarray:
        slope = -2 * x * (1 - x**2) / 0.49 + np.exp(-2 * log_scale) * (x - loc)
        return x - algorithm.step_size * slope

    def normal(offset: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * offset**2 / variance) / np.sqrt(2 * np.pi * variance)

    density = normal(points - drift(np.array(loc)))
    move = normal(points[:, None] - drift(points)[None, :]) * width
    for _ in range(algorithm.run_length - 1):
        density = move @ density
    query = 0.5 * (1 - points) ** 2 / 0.49 + 0.5 * np.log(2 * np.pi * 0.49)
    return float((density * query).sum() * width)


def mean_and_error(draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.stack([draw(k) for k in range(BATCHES)])
    return values.mean(0), values.std(0) / BATCHES**0.5


@pytest.mark.parametrize("estimator", ["pathwise", "score"])
@pytest.mark.parametrize("loc", [-0.6, 0.05, 0.8])
def test_unbiased_in_a_double_well(estimator: str, loc: float) -> None:
    """Both mechanisms at once: where the wells are, and how often each is found."""
    algorithm = Langevin(run_length=25, step_size=0.03, temperature=0.3)
    strategy = Stochastic(algorithm, estimator=estimator, particles=1000)  # type: ignore[arg-type]
    tasks = two_wells()
    density = Density(wells, tasks)

    def draw(k: int) -> Tensor:
        prior, *leaves = prior_at(loc)
        loss, _ = strategy.losses(density, prior, density.shared_init, tasks, generator(0, k))
        return torch.stack(
            [loss.sum().detach(), *torch.cat(torch.autograd.grad(loss.sum(), leaves))]
        )

    step = 1e-4
    exact = [
        grid_expectation(loc, 0.0, algorithm),
        (
            grid_expectation(loc + step, 0.0, algorithm)
            - grid_expectation(loc - step, 0.0, algorithm)
        )
        / (2 * step),
        (grid_expectation(loc, step, algorithm) - grid_expectation(loc, -step, algorithm))
        / (2 * step),
    ]
    mean, error = mean_and_error(draw)
    assert ((mean - torch.tensor(exact, dtype=F64)).abs() < ERRORS * error).all()
    assert (error < 0.2).all()  # and the test is sharp enough to fail


def test_location_alone_is_not_the_gradient() -> None:
    """The oracle sees the probability mechanism: the implicit derivative alone is far off."""
    algorithm = Langevin(run_length=400, step_size=0.03, temperature=0.3)
    slope = (
        grid_expectation(0.001, 0.0, algorithm) - grid_expectation(-0.001, 0.0, algorithm)
    ) / 0.002
    curvature = (6 - 2) / 0.49  # f″ at a well
    within = [(z - 1) / 0.49 / (1 + curvature) for z in (-1.0, 1.0)]
    assert abs(slope) > 2 * max(abs(w) for w in within)


def test_no_temperature_is_gradient_descent_differentiated_exactly() -> None:
    tasks = two_wells()
    density = Density(wells, tasks)
    strategy = Stochastic(
        Langevin(run_length=15, step_size=0.05, temperature=0.0), particles=1, learn_scale=False
    )

    def value(loc: float, log_scale: float) -> tuple[Tensor, list[Tensor]]:
        prior, *leaves = prior_at(loc, log_scale)
        loss, _ = strategy.losses(density, prior, density.shared_init, tasks, generator(0))
        return loss.sum().detach(), list(torch.autograd.grad(loss.sum(), leaves))

    _, grads = value(0.4, -0.2)
    step = 1e-5
    for grad, (a, b) in zip(grads, [(step, 0.0), (0.0, step)], strict=True):
        up, down = value(0.4 + a, -0.2 + b)[0], value(0.4 - a, -0.2 - b)[0]
        assert float(grad) == pytest.approx(float((up - down) / (2 * step)), rel=1e-8)


def test_minibatches_against_every_sequence() -> None:
    """Three steps on one of three rows each: 27 equally likely runs, all enumerated."""
    x = torch.ones(3, 1, dtype=F64)
    y = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    tasks = Tasks.from_list([(x, y)])
    density = Density(wells, tasks)
    step_size, loc = 0.02, 0.7

    def by_hand(loc_leaf: Tensor) -> Tensor:
        ends = []
        for rows in itertools.product(range(3), repeat=3):
            theta = loc_leaf
            for row in rows:
                slope = -3 * 2 * theta * (y[row] - theta**2) / 0.49 + (theta - loc_leaf)
                theta = theta - step_size * slope
            ends.append(((y - theta**2) ** 2 / 0.98 + 0.5 * np.log(2 * np.pi * 0.49)).sum())
        return torch.stack(ends).mean()

    leaf = torch.tensor(loc, dtype=F64, requires_grad=True)
    exact = by_hand(leaf)
    truth = torch.stack([exact.detach(), *torch.autograd.grad(exact, leaf)])
    strategy = Stochastic(
        Langevin(run_length=3, step_size=step_size, temperature=0.0, batch_rows=1),
        particles=200,
        learn_scale=False,
    )

    def draw(k: int) -> Tensor:
        prior, loc_leaf, _ = prior_at(loc)
        loss, _ = strategy.losses(density, prior, density.shared_init, tasks, generator(1, k))
        return torch.stack([loss.sum().detach(), *torch.autograd.grad(loss.sum(), loc_leaf)[0]])

    mean, error = mean_and_error(draw)
    assert ((mean - truth).abs() < ERRORS * error).all()
    assert (error < 0.05 * truth.abs()).all()


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_stationary_law_on_a_quadratic() -> None:
    """Mean of the posterior; covariance widened by the 1/(1 − 0.2/2) that the docstring states."""
    torch_rng = generator(3)
    x = torch.randn(2, 6, 2, generator=torch_rng, dtype=F64)
    y = torch.randn(2, 6, generator=torch_rng, dtype=F64)
    tasks = Tasks.from_list([(x[0], y[0]), (x[1, :3], y[1, :3])])
    density = Density(line, tasks)
    prior = GaussianPrior.create(torch.tensor([0.3, -0.2], dtype=F64), [0.8, 1.5])
    count = 40_000
    ends, _ = Langevin(run_length=60).run(
        density, prior, density.shared_init, tasks, count, generator(4)
    )
    for i, rows in enumerate((6, 3)):
        design = x[i, :rows]
        precision = design.T @ design / 0.25 + prior.precision()
        mean = torch.linalg.solve(
            precision, design.T @ y[i, :rows] / 0.25 + prior.precision() @ prior.loc
        )
        cov = torch.linalg.inv(precision) / 0.9
        sd = cov.diagonal().sqrt()
        assert ((ends[:, i].mean(0) - mean).abs() < ERRORS * sd / count**0.5).all()
        got = torch.cov(ends[:, i].T)
        tolerance = ERRORS * torch.sqrt((cov**2 + sd[:, None] ** 2 * sd**2) / count)
        assert ((got - cov).abs() < tolerance).all()


def test_wide_theta_needs_a_step_size() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(300, dtype=F64), 1.0).to_event(1))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(x[..., 0] * w.sum(), 1.0), obs=y)

    tasks = Tasks.from_list([(torch.ones(2, 1, dtype=F64), torch.ones(2, dtype=F64))])
    density = Density(model, tasks)
    prior = GaussianPrior.from_density(density)
    with pytest.raises(ValueError, match=r"300 coordinates .*give Langevin a step_size"):
        Langevin().run(density, prior, density.shared_init, tasks, 1, generator(0))
    ends, _ = Langevin(step_size=1e-4).run(
        density, prior, density.shared_init, tasks, 2, generator(0)
    )
    assert ends.shape == (2, 1, 300)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stochastic(estimator="reinforce"), "'pathwise' or 'score', got 'reinforce'"),
        (lambda: Stochastic(Langevin(temperature=0.0), estimator="score"), "temperature is 0"),
        (lambda: Stochastic(estimator="score", particles=1), "at least 2 .* got 1"),
        (lambda: Langevin(temperature=-1.0), "temperature must not be negative, got -1.0"),
        (lambda: Langevin(step_size=0.0), "must be positive, got 25 and 0.0"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
