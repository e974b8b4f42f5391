"""Scores and exports go by what the model observes, not by the column that it was made from.

The coverage of 400 rows is within 4.5 standard errors of 0.9: one false alarm in 150,000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from varmeta import Density, Tasks
from varmeta.models.observed import observed_data
from varmeta.posterior import Delta
from varmeta.scores import _accuracy

FLOAT = torch.float64
ROWS, TASKS = 100, 4
X = torch.linspace(-1, 1, ROWS, dtype=FLOAT)[:, None]
NOISE = torch.randn(TASKS, ROWS, generator=torch.Generator().manual_seed(0), dtype=FLOAT)


def logged(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("log_y", dist.Normal(2 + a * x[:, 0], 0.5), obs=None if y is None else y.log())


def trials(x: Tensor, y: Tensor | None = None) -> None:
    """Successes among trials, two columns."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    done, count = (None, torch.tensor(20.0)) if y is None else (y[:, 0], y[:, 1])
    with pyro.plate("rows", len(x)):
        pyro.sample("done", dist.Binomial(count, logits=a * x[:, 0]), obs=done)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(3, dtype=FLOAT), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("kind", dist.Categorical(logits=x * a), obs=y)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("count", dist.Poisson((2 + a * x[:, 0]).exp()), obs=y)


def case(model: Callable[..., Any], targets: Tensor) -> tuple[Tasks, Delta]:
    """Tasks with the true a = 1 in each."""
    data = Tasks.from_list([(X, y) for y in targets])
    density = Density(model, data)
    theta = torch.ones(TASKS, density.dim, dtype=FLOAT)
    return data, Delta(density, data.names, density.shared_init, theta)


MEAN = 2 + X[:, 0]


def test_a_transformed_target_is_scored_as_it_is_modelled() -> None:
    data, truth = case(logged, (MEAN + 0.5 * NOISE).exp())
    rmse, coverage = _accuracy(truth, data, 2000, 0)
    assert rmse == pytest.approx(0.5 * float(NOISE.square().mean().sqrt()), rel=0.02)
    assert abs(coverage - 0.9) < 4.5 * (0.09 / NOISE.numel()) ** 0.5
    observed = observed_data(truth.density, data)["log_y"]
    torch.testing.assert_close(observed.value, MEAN + 0.5 * NOISE)


def test_a_target_of_two_columns_is_scored_by_the_one_that_is_drawn() -> None:
    probs = torch.sigmoid(X[:, 0])
    done = (20 * probs + NOISE * (20 * probs * (1 - probs)).sqrt()).round().clamp(0, 20)
    data, truth = case(trials, torch.stack([done, torch.full_like(done, 20.0)], -1))
    rmse, coverage = _accuracy(truth, data, 2000, 0)
    assert rmse == pytest.approx(float((done - 20 * probs).square().mean().sqrt()), rel=0.02)
    assert 0.85 < coverage <= 1.0


@pytest.mark.parametrize("dtype", [FLOAT, torch.long])
def test_classes_have_no_distance_and_counts_have_one(dtype: torch.dtype) -> None:
    data, truth = case(classes, (NOISE.abs() * 3).floor().clamp(max=2).to(dtype))
    assert all(np.isnan(_accuracy(truth, data, 100, 0)))
    rate = MEAN.exp()
    number = (rate + NOISE * rate.sqrt()).round().clamp(min=0)
    data, truth = case(counts, number.to(dtype))
    rmse, _ = _accuracy(truth, data, 4000, 0)
    assert rmse == pytest.approx(float((number - rate).square().mean().sqrt()), rel=0.02)
