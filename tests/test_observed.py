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
from pyro import poutine
from scipy import stats
from torch import Tensor

import varmeta as vm
from varmeta import Density, Tasks
from varmeta.models.observed import observed_data
from varmeta.posterior import Delta
from varmeta.scores import _accuracy, _by_site

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


# -- several observed sites, and rows that a mask leaves out ---------------------------------------


def two(x: Tensor, y: Tensor | None = None) -> None:
    """A length and a count of each row."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = a * x[:, 0]
    length, count = (None, None) if y is None else (y[:, 0], y[:, 1])
    pyro.deterministic("middle", mean)
    pyro.deterministic("twice", 2 * a)
    pyro.deterministic("spread", mean.std())  # which padding would change
    with pyro.plate("rows", len(x)):
        pyro.sample("length", dist.Normal(mean, 0.5), obs=length)
        pyro.sample("count", dist.Poisson((1 + mean).exp()), obs=count)


LENGTH = X[:, 0] + 0.5 * NOISE
RATE = (1 + X[:, 0]).exp()
COUNT = (RATE + NOISE.flip(1) * RATE.sqrt()).round().clamp(min=0)


def test_several_sites_are_scored_together_and_apart() -> None:
    data, truth = case(two, torch.stack([LENGTH, COUNT], -1))
    apart = _by_site(truth, data, 2000, 0)
    wanted = {
        "length": (stats.norm(X[:, 0], 0.5).logpdf(LENGTH), (LENGTH - X[:, 0])),
        "count": (stats.poisson(RATE).logpmf(COUNT), COUNT - RATE),
    }
    for name, (nats, error) in wanted.items():
        assert apart[f"elpd[{name}]"] == pytest.approx(nats.mean(), rel=1e-6)
        assert apart[f"rmse[{name}]"] == pytest.approx(
            float(error.square().mean().sqrt()), rel=0.02
        )
        assert 0.85 < float(apart[f"coverage[{name}]"]) < 1.0  # type: ignore[arg-type]
    total = truth.log_predictive(data).mean()
    assert float(total) == pytest.approx(sum(nats.mean() for nats, _ in wanted.values()), rel=1e-6)
    rmse, coverage = _accuracy(truth, data, 2000, 0)
    both = [float(apart[f"coverage[{name}]"]) for name in wanted]  # type: ignore[arg-type]
    assert np.isnan(rmse) and coverage == pytest.approx(sum(both) / 2)


FEW = Tasks.from_list(
    [
        (X[::9], torch.stack([length, count], -1)[::9])
        for length, count in zip(LENGTH, COUNT, strict=True)
    ],
    target_name="y",
)


@pytest.mark.filterwarnings(
    "ignore:the deterministic site 'spread'", "ignore::varmeta.NotConverged"
)
def test_sites_and_what_is_computed_on_the_way_are_exported() -> None:
    density = Density(two, FEW)
    found = vm.compare([vm.NoPooling(steps=2)], density, FEW.split(0.3))
    assert "elpd[length]" in found.table and "each observed site by itself" in str(found)
    assert "rmse[count]" in found.table and found.table["rmse"].isna().all()
    fit = vm.fit(vm.NoPooling(steps=2), density, FEW)
    data = vm.to_arviz(fit, draws=6)
    nats = {n: np.asarray(data["log_likelihood"][n]) for n in data["log_likelihood"].data_vars}
    np.testing.assert_allclose(nats["y"], nats["length"] + nats["count"], rtol=1e-9)
    a, post = np.asarray(data["posterior"]["a"]), data["posterior"]
    rows = int(FEW.mask.sum())
    assert post["middle"].dims == ("chain", "draw", "row") and post["twice"].dims[-1] == "task"
    np.testing.assert_allclose(post["twice"], 2 * a)
    by_row = a[..., np.repeat(np.arange(TASKS), rows // TASKS)] * np.tile(X[::9, 0], TASKS)
    np.testing.assert_allclose(post["middle"], by_row, rtol=1e-9)
    assert "spread" not in post


@pytest.mark.filterwarnings(
    "ignore:the deterministic site 'spread'", "ignore::varmeta.NotConverged"
)
def test_prior_predictions_are_those_of_the_learned_prior() -> None:
    """Mean a·x and variance x²σ² + 0.25 of `length`, to 5 standard errors of 2,000 draws."""
    fit = vm.fit(vm.NoPooling(steps=2), Density(two, FEW), FEW)
    data = vm.to_arviz(fit, draws=2000, log_likelihood=False)
    drawn = np.asarray(data["prior_predictive"]["length"])[0]
    x = np.tile(X[::9, 0], TASKS)
    sd = np.sqrt((x * float(fit.prior.scale)) ** 2 + 0.25)
    assert (np.abs(drawn.mean(0) - x * float(fit.prior.loc)) < 5 * sd / 2000**0.5).all()
    assert (np.abs(drawn.var(0) / sd**2 - 1) < 5 * (2 / 2000) ** 0.5).all()
    # the task's θ of a draw, which `prior` has
    theta = np.asarray(data["prior"]["a"])[0, :, -1]
    assert np.corrcoef(theta, drawn[:, -1])[0, 1] > 0.8


def times(x: Tensor, y: Tensor | None = None) -> None:
    """Times until an event; of censored ones, where x[:, 1] is 0, only that they are longer."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    law, seen = dist.Exponential((-a * x[:, 0]).exp()), x[:, 1] > 0
    with pyro.plate("rows", len(x)):
        with poutine.mask(mask=seen):
            pyro.sample("time", law, obs=y)
        after = None if y is None else -y * law.rate
        with poutine.mask(mask=~seen):
            longer = torch.zeros_like(x[:, 0]) if after is None else after
            pyro.sample(
                "longer", dist.Delta(torch.ones_like(longer), longer), obs=torch.ones_like(longer)
            )


def test_censored_rows_are_no_events() -> None:
    """Their density is that of being longer; no error and no coverage is asked of them."""
    uniform = torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=FLOAT)
    time = -uniform.log() * X[:, 0].exp()
    seen, limit = time < 1.0, time.clamp(max=1.0)
    data = Tasks.from_list([(torch.stack([X[:, 0], seen.to(FLOAT)], -1), limit)])
    density = Density(times, data)
    truth = Delta(density, data.names, density.shared_init, torch.ones(1, 1, dtype=FLOAT))
    law = stats.expon(scale=X[:, 0].exp())
    wanted = np.where(seen, law.logpdf(limit), law.logsf(limit))
    np.testing.assert_allclose(truth.log_predictive(data)[0], wanted, rtol=1e-6)
    found = observed_data(density, data)["time"]
    assert torch.equal(found.seen[0], seen)
    apart = _by_site(truth, data, 2000, 0)
    error = (limit - X[:, 0].exp())[seen]
    assert apart["rmse[time]"] == pytest.approx(float(error.square().mean().sqrt()), rel=0.03)
    assert np.isnan(float(apart["rmse[longer]"]))  # type: ignore[arg-type]
    assert list(vm.fit(vm.CompletePooling(), density, data).predict(data, draws=50).table)[3:5] == [
        "time.mean",
        "time.sd",
    ]
