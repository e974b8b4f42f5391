"""The estimators that look at the ends of runs, against what theory says of each, bias included.

Statistical tests allow 4.5 standard errors, a false-alarm rate of 7e-6 for each number, with fixed
seeds; the others are exact up to rounding or a stated order in the temperature.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from basin_problems import (
    CENTRES,
    ERRORS,
    F64,
    QUERIES,
    Wave,
    prior_at,
    small_network,
    waves,
    wavy_tasks,
)
from helpers import widened
from scipy.optimize import brentq
from torch import Tensor

from varmeta import (
    IMAML,
    SGD,
    Density,
    GaussianPrior,
    Langevin,
    RandomDescent,
    RandomRestarts,
    Stochastic,
    Tasks,
    fit,
    meta_gradient,
)
from varmeta.inference.at_ends import (
    BasinCorrected,
    ImplicitAtParticles,
    StationaryCovariance,
    alike,
    anchored,
    half_log_det,
)
from varmeta.inference.chain import Chain
from varmeta.inference.estimators import Estimator
from varmeta.inference.flow import GradientFlow
from varmeta.inference.linear import CG
from varmeta.inference.partition import descend, partition
from varmeta.inference.point import Point

ALL: dict[str, Estimator] = {
    "stationary": StationaryCovariance(),
    "implicit": ImplicitAtParticles(),
    "occupation": BasinCorrected(),
    "laplace": BasinCorrected("laplace"),
}
LOC = 0.2


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def lines() -> tuple[Tasks, Density, GaussianPrior]:
    """Two tasks of three support rows and two query rows."""
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 2, generator=source, dtype=F64)
    y = torch.randn(2, 5, generator=source, dtype=F64)
    tasks = Tasks.from_list([(x[0], y[0]), (x[1], y[1])])
    is_query = (torch.arange(5) >= 3).expand(2, 5)
    tasks = Tasks(tasks.inputs, tasks.targets, tasks.mask, is_query, tasks.names)
    prior = GaussianPrior.create(torch.tensor([0.3, -0.2], dtype=F64), [0.8, 1.5])
    return tasks, Density(line, tasks), prior


def gaussian_truth(
    tasks: Tasks, prior: GaussianPrior, covariance: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """By θ0 `[T, 2]`: the implicit derivative, and −Cov(g, ∂E)/τ with Cov = τ covariance(A)."""
    implicit, stationary = [], []
    lam = prior.precision()
    for x, y in zip(tasks.inputs, tasks.targets, strict=True):
        curvature = x[:3].T @ x[:3] / 0.25 + lam
        mean = torch.linalg.solve(curvature, x[:3].T @ y[:3] / 0.25 + lam @ prior.loc)
        slope = x[3:].T @ (x[3:] @ mean - y[3:]) / 0.25
        implicit.append(lam @ torch.linalg.solve(curvature, slope))
        stationary.append(lam @ covariance(curvature) @ slope)
    return torch.stack(implicit), torch.stack(stationary)


@pytest.mark.parametrize("name", ["implicit", "occupation", "laplace"])
def test_on_a_quadratic_each_is_the_closed_form(name: str) -> None:
    tasks, density, prior = lines()
    truth, _ = gaussian_truth(tasks, prior, torch.linalg.inv)
    got = meta_gradient(
        density, prior, tasks, algorithm=Langevin(20), estimator=ALL[name], particles=5
    )
    assert torch.allclose(got.mean["loc"], truth, rtol=1e-8, atol=1e-9)
    assert float(got.standard_error["loc"].max()) < 1e-8


@pytest.mark.parametrize("step_size", [None, 0.03])
def test_finite_steps_widen_the_stationary_covariance(step_size: float | None) -> None:
    """By (I − step · curvature/2)⁻¹; with the default steps 1.07, as the docstring states."""
    algorithm = Langevin() if step_size is None else Langevin(150, step_size)
    default = 0.0
    for pace in Langevin().paces:
        default = (1 - pace) ** 2 * default + 2 * pace

    def covariance(a: Tensor) -> Tensor:
        if step_size is None:
            return torch.linalg.inv(a) * default
        return torch.linalg.inv(a - 0.5 * step_size * a @ a)

    tasks, density, prior = lines()
    exact, widened_truth = gaussian_truth(tasks, prior, covariance)
    got = meta_gradient(
        density,
        prior,
        tasks,
        algorithm=algorithm,
        estimator=StationaryCovariance(),
        particles=40_000,
    )
    mean, error = got.mean["loc"], got.standard_error["loc"]
    assert ((mean - widened_truth).abs() < ERRORS * error).all()
    assert float(((widened_truth - exact).abs() / error).max()) > 3  # sharp enough to tell


def test_momentum_heats() -> None:
    """E of the estimator is the covariance over τ: with momentum μ it is τ/(1 − μ)."""
    tasks, density, prior = lines()
    algorithm = Langevin(200, 0.003, momentum=0.8)
    truth, _ = gaussian_truth(tasks, prior, torch.linalg.inv)
    got = meta_gradient(
        density,
        prior,
        tasks,
        algorithm=algorithm,
        estimator=StationaryCovariance(),
        particles=10_000,
    )
    mean, error = got.mean["loc"], got.standard_error["loc"]
    # The law of these steps differs from the continuous one by a few per cent.
    assert ((mean - truth).abs() < ERRORS * error + 0.05 * truth.abs()).all()
    assert float((error / truth.abs()).max()) < 0.1


def test_cold_in_one_basin_the_covariance_is_the_implicit_derivative() -> None:
    # θ0 at a minimum of f: there the covariance has the least noise for its size.
    place = float(brentq(lambda x: x + 1.5 * np.sin(3 * x) - CENTRES[0], 0.0, 0.4))
    tasks = wavy_tasks(1)
    density, prior = Density(waves, tasks), prior_at(place)
    curvature = 1 + float(Wave(CENTRES[0]).curvature(place))
    truth = (place - QUERIES[0]) / curvature
    step_size = 0.2 / curvature
    got = meta_gradient(
        density,
        prior,
        tasks,
        algorithm=Langevin(60, step_size, temperature=1e-4),
        estimator=StationaryCovariance(),
        particles=20_000,
    )
    mean, error = float(got.mean["loc"]), float(got.standard_error["loc"])
    assert abs(mean * 0.9 - truth) < ERRORS * error + 0.01 * abs(truth)
    assert error < 0.03 * abs(truth)
    cold = {
        name: meta_gradient(
            density,
            prior,
            tasks,
            algorithm=Langevin(60, step_size, temperature=1e-4),
            estimator=ALL[name],
            particles=10,
        ).mean["loc"]
        for name in ("implicit", "occupation", "laplace")
    }
    for value in cold.values():
        assert float(value) == pytest.approx(truth, rel=1e-7)


def test_without_noise_it_is_imaml() -> None:
    """One particle of a run without noise, scales included; a network too."""
    for density, tasks, prior in (
        (*reversed(lines()[:2]), lines()[2]),
        (*small_network(), None),
    ):
        places = torch.linspace(-0.5, 0.7, density.dim, dtype=F64)  # no two hidden units alike
        start = prior or GaussianPrior.create(places, 0.8)
        loc, log_scale = (t.clone().requires_grad_() for t in (start.loc, start.log_scale))
        leaf = GaussianPrior(loc, log_scale, start.groups)
        losses, _ = IMAML(minimiser=GradientFlow(scale=start.scale)).losses(
            density, leaf, density.shared_init, tasks
        )
        got = meta_gradient(
            density,
            start,
            tasks,
            algorithm=RandomDescent(1, 1e-9),
            estimator=ImplicitAtParticles(),
            particles=1,
        )
        for t, loss in enumerate(losses):
            by_loc, by_scale = torch.autograd.grad(loss, [loc, log_scale], retain_graph=True)
            assert torch.allclose(got.mean["loc"][t], by_loc, rtol=1e-5, atol=1e-7)
            assert torch.allclose(got.mean["log_scale"][t], by_scale, rtol=1e-5, atol=1e-7)


def bent(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Two coordinates with several minima, and a shared frequency."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    pace = pyro.sample("pace", dist.Normal(torch.tensor(2.0, dtype=F64), 1.0))
    mean = torch.sin(pace * w[0] * x[..., 0]) + w[1] ** 2 * x[..., 1]
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 0.6), obs=y)


def test_laplace_against_differences_of_what_it_differentiates() -> None:
    """Σ w_k g_k with every minimum found anew at a moved θ0, scale and shared value."""
    source = torch.Generator().manual_seed(5)
    x, y = (torch.randn(2, 4, 2, generator=source, dtype=F64) for _ in range(2))
    tasks = Tasks.from_list([(a, b[:, 0]) for a, b in zip(x, y, strict=True)]).split(0.5)
    density = Density(bent, tasks, shared=["pace"])
    prior = GaussianPrior.create(torch.tensor([0.3, 0.2], dtype=F64), [1.2, 0.9])
    algorithm = Langevin(3, 1e-4, temperature=0.5, start_scale=1.5)
    options = {"algorithm": algorithm, "particles": 60}
    got = meta_gradient(density, prior, tasks, estimator=BasinCorrected("laplace"), **options)
    point = Point.of(density, prior, density.shared_init)
    ends = got.ends

    def objective(move: Tensor) -> Tensor:
        moved = Point.of(density, *point.moved(move))
        chain = Chain(algorithm, density, moved, tasks.support, len(ends), 0)
        descent = descend(chain, start)
        parts = partition(chain, descent)
        place = parts.gather(descent.theta)
        at = alike(chain, len(place))
        half, _ = half_log_det(at, place)
        logits = -anchored(at, place)[0] / 0.5 - half
        weights = logits.masked_fill(parts.first < 0, -torch.inf).softmax(0)
        g = density.negative_log_likelihood(place, tasks.query, moved.shared)
        counts.append((parts.first >= 0).sum(0).tolist())
        return (weights * g).sum(0)

    chain = Chain(algorithm, density, point, tasks.support, len(ends), 0)
    start, counts = descend(chain, ends).theta, []
    step = 1e-4
    for j, unit in enumerate(step * torch.eye(point.size, dtype=F64)):
        truth = (objective(unit) - objective(-unit)) / (2 * step)
        scale = got.estimate.mean.abs().amax(1)
        assert ((got.estimate.mean[:, j] - truth).abs() < 1e-5 * scale).all(), j
    assert all(c == counts[0] for c in counts) and min(counts[0]) > 1


def test_the_jackknife_sees_basins_found_once() -> None:
    """By leaving each particle out: its standard error, and a mean that is not moved."""
    tasks = wavy_tasks(1)
    density = Density(waves, tasks)
    options = {"algorithm": Langevin(2, 1e-4, temperature=0.5, start_scale=1.0)}
    point = Point.of(density, prior_at(LOC), density.shared_init)
    chain = Chain(options["algorithm"], density, point, tasks.support, 12, 5)
    estimator = BasinCorrected("laplace")

    def loss(theta: Tensor, phi: Tensor) -> Tensor:
        return density.negative_log_likelihood(theta, tasks.query, phi)

    whole = estimator.estimate(chain, loss)

    def without(s: int) -> Tensor:
        class Fewer(Chain):
            def run(self, x: Tensor | None = None) -> Tensor:
                return torch.cat([whole.ends[:s], whole.ends[s + 1 :]])

        some = Fewer(options["algorithm"], density, point, tasks.support, 11, 5)
        return estimator.estimate(some, loss).mean

    left = torch.stack([without(s) for s in range(12)])
    jackknife = (11 / 12 * ((left - left.mean(0)) ** 2).sum(0)).sqrt()
    assert float(jackknife[0, 0]) > 1e-3  # some basin was found once
    assert torch.allclose(whole.standard_error, jackknife, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_tasks_do_not_see_each_other(name: str) -> None:
    tasks = wavy_tasks()
    density = Density(waves, tasks)
    algorithm = Langevin(15, 0.02, temperature=0.8)

    def run(tasks: Tasks, seed: int = 2, antithetic: bool = False) -> Tensor:
        return meta_gradient(
            density,
            prior_at(LOC),
            tasks,
            algorithm=algorithm,
            estimator=ALL[name],
            particles=16,
            antithetic=antithetic,
            seed=seed,
        ).estimate.each

    together = run(tasks)
    assert torch.equal(together, run(tasks)) and not torch.equal(together, run(tasks, 3))
    alone = torch.cat([run(tasks.select([t])) for t in range(3)], dim=1)
    for other in (alone, run(widened(tasks, 2))):
        assert torch.allclose(together, other, rtol=1e-7, atol=1e-9)
    assert bool(run(tasks, antithetic=True).isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_every_particle_its_own_minimum(name: str) -> None:
    density, tasks = small_network()
    prior = GaussianPrior.create(torch.zeros(density.dim, dtype=F64), 1.5)
    algorithm = Langevin(10, 0.005, start_scale=1.0)
    got = meta_gradient(
        density, prior, tasks, algorithm=algorithm, estimator=ALL[name], particles=12
    )
    assert bool(got.estimate.each.isfinite().all()) and got.gradients > 0
    assert bool((got.estimate.standard_error > 0).any())


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_learns_with_it(name: str) -> None:
    tasks = wavy_tasks()
    strategy = Stochastic(Langevin(10, 0.02, temperature=0.8), ALL[name], steps=3, draws=20)
    result = fit(strategy, Density(waves, tasks), tasks)
    assert np.isfinite(result.history["loss"]).all()
    assert ALL[name].name in strategy.name and not ALL[name].unbiased


def test_what_cannot_work_is_refused() -> None:
    cold, noisy = RandomRestarts(5, 0.01), Langevin(5, 0.01)
    for estimator in (StationaryCovariance(), BasinCorrected(), BasinCorrected("laplace")):
        with pytest.raises(ValueError, match="is 0 in the last step"):
            estimator.check(cold, 4, False)
        with pytest.raises(ValueError, match=r"at least 2 .* got 1"):
            estimator.check(noisy, 1, False)
        with pytest.raises(ValueError, match=r"at least 4 .* pairs, got 2"):
            estimator.check(noisy, 2, True)
        estimator.check(Langevin(2, 0.01, temperature=(0.0, 1.0)), 2, False)
    ImplicitAtParticles().check(SGD(5, 0.01), 1, False)
    with pytest.raises(ValueError, match="'occupation', 'laplace', got 'mass'"):
        BasinCorrected("mass")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"radius must be positive .*, got 0"):
        BasinCorrected(radius=0)


def test_many_coordinates_and_loose_solves() -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(201, dtype=F64), 1.0).to_event(1))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    source = torch.Generator().manual_seed(0)
    x = torch.randn(6, 201, generator=source, dtype=F64)
    tasks = Tasks.from_list([(x, torch.ones(6, dtype=F64))])
    density = Density(wide, tasks)
    prior = GaussianPrior.create(torch.zeros(201, dtype=F64), 1.0)
    options = {"algorithm": Langevin(2, 1e-3), "particles": 2}
    with pytest.raises(ValueError, match=r"201 coordinates \(limit 200\): use weights='occup"):
        meta_gradient(density, prior, tasks, estimator=BasinCorrected("laplace"), **options)
    loose = ImplicitAtParticles(solver=CG(max_iterations=1))
    with pytest.warns(RuntimeWarning, match="2 of 2 implicit solves .* above a tenth"):
        meta_gradient(density, prior, tasks, estimator=loose, **options)
