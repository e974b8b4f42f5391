"""Rows of a task that are one draw: a Gaussian process is a model of a task too."""

from __future__ import annotations

import logging

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from varmeta import Density, LaplaceEvidence, Tasks, fit, loo, to_arviz
from varmeta.models import programs
from varmeta.posterior import Gaussian
from varmeta.seeds import generator

FLOAT = torch.float64


def process(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A level, and a process of unit length and standard deviation 0.7 around it."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    cov = 0.49 * (-0.5 * (x - x.mT) ** 2).exp() + 0.1 * torch.eye(len(x), dtype=x.dtype)
    return pyro.sample("y", dist.MultivariateNormal(level.expand(len(x)), cov), obs=y)


def case(*sizes: int) -> Tasks:
    pairs = []
    for i, n in enumerate(sizes):
        x = torch.linspace(-1, 1, n, dtype=FLOAT)[:, None]
        y = torch.randn(n, generator=generator(i), dtype=FLOAT) + i
        pairs.append((x, y))
    return Tasks.from_list(pairs)


def covariance(n: int) -> np.ndarray:
    x = np.linspace(-1, 1, n)
    return 0.49 * np.exp(-0.5 * (x - x[:, None]) ** 2) + 0.1 * np.eye(n)


def test_a_process_is_scored_by_the_task(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scipy: of a level N(m, s²) the rows are N(m, K + s²), one density for a task."""
    monkeypatch.setattr(programs, "CALLS_BEFORE_CAPTURE", 10**6)
    tasks = case(5, 5, 5)
    with caplog.at_level(logging.WARNING, "varmeta"):
        density = Density(process, tasks)
    assert density.joint and caplog.text.count("a task is the unit of scoring") == 1
    theta = torch.tensor([[0.5], [1.0], [2.0]], dtype=FLOAT)
    nats = density.log_likelihood(theta, tasks)
    wanted = [
        multivariate_normal(np.full(5, float(m)), covariance(5)).logpdf(y)
        for m, y in zip(theta, tasks.targets, strict=True)
    ]
    np.testing.assert_allclose(nats.sum(-1), wanted, rtol=1e-10)
    assert bool((nats == nats[:, :1]).all())
    sd = torch.full((3, 1), 0.4, dtype=FLOAT)
    posterior = Gaussian(density, tasks.names, density.shared_init, theta, sd)
    lpd = posterior.log_predictive(tasks, 20_000, generator(0)).sum(-1)
    wanted = [
        multivariate_normal(np.full(5, float(m)), covariance(5) + 0.16).logpdf(y)
        for m, y in zip(theta, tasks.targets, strict=True)
    ]
    np.testing.assert_allclose(lpd, wanted, atol=0.1)  # se about 0.01; by rows it is off by 1
    result = fit(LaplaceEvidence(steps=2), density, tasks, progress=False)
    with pytest.raises(ValueError, match="all rows of a task are one draw"):
        loo(result.posterior(), result.prior, tasks)
    data = to_arviz(result, draws=4)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "task")
    assert data["posterior_predictive"]["y"].shape == (1, 4, 15)
    drawn = density.predict(theta.expand(4000, 3, 1), tasks, generator(1))["y"]
    got = np.cov(drawn[:, 1].numpy().T)
    # 25 entries, each with a standard error below 0.59 √2 / √4000 = 0.013
    np.testing.assert_allclose(got, covariance(5), atol=5 * 0.0135)


def test_tasks_of_other_lengths_are_refused_before_training() -> None:
    density = Density(process, case(5, 5))
    with pytest.raises(ValueError, match=r"draws all rows .* 3 to 5 rows; wanted the same number"):
        fit(LaplaceEvidence(steps=1), density, case(5, 3))
