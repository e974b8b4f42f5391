"""ABML: its meta-gradient, where many steps lead, and what it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from adjoint_problems import Tensors, assert_slopes, leaves, slopes
from helpers import FLOAT, assert_close, case_of, leaves_of
from linear_gaussian import LinearGaussian
from test_logdet import AT, DIM, problem
from torch import Tensor

from varmeta import ABML, Adam, Density, GaussianPrior, GradientDescent, Tasks, fit
from varmeta.inference.base import Batch
from varmeta.posterior import Gaussian
from varmeta.seeds import generator


def cubature(tasks: int, dim: int) -> Tensor:
    """±√D e_j, `[2D, T, D]`: the mean of any quadratic under a standard normal, exactly."""
    half = dim**0.5 * torch.eye(dim, dtype=FLOAT)
    return torch.cat([half, -half])[:, None].expand(-1, tasks, -1)


def test_many_steps_lead_to_the_best_diagonal_gaussian() -> None:
    """Linear-Gaussian: the posterior mean, and 1/(H_jj + 1/σ_j²) as variance."""
    drawn = LinearGaussian.random(0, 5, 3)
    case = case_of(drawn)
    strategy = ABML(minimiser=GradientDescent(0.5, 4000, tolerance=1e-11))
    with torch.no_grad():
        mean, sd, info = strategy.adapted(
            case.density, case.prior, case.shared, case.tasks.support, cubature(5, 3)
        )
    assert info.converged is not None and bool(info.converged.all())
    assert_close(mean, drawn.theta_stars(), 1e-8)
    assert_close(sd**2, drawn.best_variances(), 1e-8)


def test_the_bound_there_is_that_of_the_oracle() -> None:
    """Of all rows, at q_i adapted to the support rows."""
    drawn = LinearGaussian.random(1, 4, 2)
    case = case_of(drawn)
    points = cubature(4, 2)
    strategy = ABML(minimiser=GradientDescent(0.02, 7, tolerance=0))
    arguments = case.density, case.prior, case.shared
    with torch.no_grad():
        mean, sd, _ = strategy.adapted(*arguments, case.tasks.support, points)
        bounds, _ = strategy.bounds(*arguments, case.tasks, points, points)
    merged = replace(
        drawn,
        designs=tuple(np.r_[a, b] for a, b in zip(drawn.designs, drawn.query_designs, strict=True)),
        targets=tuple(np.r_[a, b] for a, b in zip(drawn.targets, drawn.query_targets, strict=True)),
    )
    assert_close(bounds.sum(), merged.gaussian_joint(mean.numpy(), (sd**2).numpy()), 1e-10)


@pytest.mark.parametrize(
    "minimiser",
    [GradientDescent(0.05, 6, tolerance=0), Adam(0.1, 4, tolerance=0)],
    ids=["descent", "adam"],
)
def test_gradient_is_that_of_differences(minimiser: GradientDescent | Adam) -> None:
    """In θ0, the scales, the low-rank factor and φ, with the draws held fixed."""
    density, tasks = problem()
    strategy = ABML(minimiser=minimiser)
    like = {"generator": generator(5), "dtype": FLOAT}
    noise, fresh = (torch.randn(4, len(tasks), DIM, **like) for _ in range(2))  # type: ignore[call-overload]

    def total(**at: Tensor) -> Tensor:
        prior = GaussianPrior(at["loc"], at["log_scale"], torch.arange(DIM), at["factor"])
        bounds, _ = strategy.bounds(density, prior, at["shared"], tasks, noise, fresh)
        return bounds.sum()

    plain: Tensors = {n: t for n, t in AT.items() if n != "theta"}
    at = leaves(plain)
    grads = torch.autograd.grad(total(**at), list(at.values()))
    found = dict(zip(at, grads, strict=True))
    assert_slopes(found, slopes(total, plain, list(plain), 1e-3), 1e-8)


def test_what_it_learns_is_the_joint_optimum() -> None:
    """All rows in both places and steps to convergence: the joint bound's minimum is its own."""
    drawn = LinearGaussian.random(2, num_tasks=8, dim=2)
    best = drawn.gaussian_optimum()
    assert best.converged and not best.collapsed.any()
    strategy = ABML(minimiser=GradientDescent(0.3, 200, tolerance=0))
    sizes = []
    for away in (0.0, 0.1):
        at = drawn.at(theta0=best.theta0 + away, log_scale=np.log(best.scale) + away)
        case = case_of(at)
        prior, shared, moving = leaves_of(case)
        points = cubature(8, 2)
        bounds, _ = strategy.bounds(case.density, prior, shared, case.tasks.support, points, points)
        grads = torch.autograd.grad(bounds.sum(), moving[:2])
        sizes.append(float(torch.cat(grads).norm()))
        assert bounds.sum() > best.value - 1e-9
    assert sizes[0] < 1e-6 * sizes[1]


def test_a_step_counts_its_draws() -> None:
    """K steps there and back (3 each) and one look at the end, and once outside, of S draws."""
    case = case_of(LinearGaussian.random(3))
    strategy = ABML(samples=4, minimiser=GradientDescent(0.01, 5, tolerance=0))
    state = strategy.init(case.density, case.prior, case.tasks, generator(0))
    info = strategy.step(case.density, state, Batch(case.tasks, torch.arange(6), 6), generator(0))
    assert info.gradients == 6 * 4 * (3 * 5 + 1 + 1)


def test_adapting_is_training_s_adaptation() -> None:
    case = case_of(LinearGaussian.random(4))
    strategy = ABML(steps=1)
    done = fit(strategy, case.density, case.tasks, prior=case.prior)
    posterior = done.adapt(case.tasks.support)
    assert isinstance(posterior, Gaussian) and posterior.kind == "gaussian"
    assert posterior.sd.shape == (6, 3) and bool((posterior.sd > 0).all())
    assert posterior.stats["iterations"].tolist() == [15] * 6


def test_memory_counts_every_step_of_every_draw() -> None:
    case = case_of(LinearGaussian.random(5))
    parts = []
    for samples in (2, 20):
        strategy = ABML(samples=samples, memory=0.02)
        state = strategy.init(case.density, case.prior, case.tasks, generator(0))
        batch = Batch(case.tasks, torch.arange(6), 6)
        parts.append(strategy._part_size(case.density, state, batch))
    assert parts[0] is not None and parts[1] is not None and parts[0] > 5 * parts[1]


@pytest.mark.parametrize("samples", [0, 3, -2])
def test_draws_come_in_pairs(samples: int) -> None:
    with pytest.raises(ValueError, match=f"samples must be .* got {samples}"):
        ABML(samples=samples)


def test_scales_small_beside_the_start_need_no_other_step_size() -> None:
    """Steps are in the prior's units: at a thousandth of the scale the same ones converge."""
    drawn = LinearGaussian.random(6, 4, 2)
    small = drawn.at(log_scale=drawn.log_scale - np.log(1000))
    case = case_of(small)
    strategy = ABML(minimiser=GradientDescent(0.03, 2000, tolerance=1e-10))
    with torch.no_grad():
        mean, sd, _ = strategy.adapted(
            case.density, case.prior, case.shared, case.tasks.support, cubature(4, 2)
        )
    assert_close((mean - case.prior.loc) * 1000, (small.theta_stars() - small.theta0) * 1000, 1e-6)
    assert_close(sd**2, small.best_variances(), 1e-8)


def counted(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.ones((), dtype=x.dtype), 2.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Poisson((a + 0 * x[:, 0]).exp()), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT])
def test_behind_a_log_link_it_is_near_the_exact_posterior(dtype: torch.dtype) -> None:
    """y = 0 to 1,000 in four rows, a ~ N(1, 2²), from the prior on; the truth by quadrature.

    Within a posterior sd, and the sd within a quarter; for the default budget and its own draws.
    """
    values = (0.0, 1.0, 3.0, 30.0, 100.0, 1000.0)
    rows = [(torch.ones(4, 1, dtype=dtype), torch.full((4,), y, dtype=dtype)) for y in values]
    tasks = Tasks.from_list(rows)
    done = fit(ABML(steps=1, learning_rate=1e-12), Density(counted, tasks), tasks, progress=False)
    found = done.adapt(tasks)
    assert isinstance(found, Gaussian)
    grid = np.linspace(-15, 12, 200_001)
    for y, mean, sd in zip(values, found.mean[:, 0], found.scale[:, 0], strict=True):
        log = -0.5 * ((grid - 1) / 2) ** 2 + 4 * (y * grid - np.exp(grid))
        weight = np.exp(log - log.max()) / np.exp(log - log.max()).sum()
        centre = weight @ grid
        spread = np.sqrt(weight @ (grid - centre) ** 2)
        assert abs(float(mean) - centre) < spread, y
        assert 0.8 < float(sd) / spread < 1.25, y
