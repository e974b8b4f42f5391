"""The seed alone decides splits, starts, fits and draws, whatever the default data type is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE
from helpers import assert_close, assert_same
from torch import Tensor

from varmeta import Density, Tasks, TaskSource, fit
from varmeta.inference.descent import SGD
from varmeta.inference.noise import Noise
from varmeta.models import linear_modules, sinusoids
from varmeta.posterior import Draws
from varmeta.seeds import generator

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runs of a few steps


def both(make: Callable[[], Any]) -> list[Any]:
    """What `make` returns under either default, which is left as it was found."""
    found, before = [], torch.get_default_dtype()
    try:
        for dtype in (torch.float32, F64):
            torch.set_default_dtype(dtype)
            found.append(make())
            assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)
    return found


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Priors in plain numbers, two of which are read off draws."""
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Gamma(2.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + slope * x[..., 0], noise), obs=y)


def tasks() -> Tasks:
    rng = generator(0)
    rows = [torch.randn(4 + i, 2, generator=rng, dtype=F64) for i in range(5)]
    return Tasks.from_list([(r[:, :1], r[:, 1]) for r in rows])


def test_splits_and_minibatches() -> None:
    def made() -> Any:
        given = tasks()
        split, few = given.split(0.4, seed=3), given.minibatch(3, generator(5))
        parts = [split, given.folds(3, seed=4), *given.hold_out(2, seed=1), few[0]]
        stream = TaskSource(sinusoids(num_tasks=3, support=4, query=2)).batch(2)
        planted = linear_modules(4)(generator(6))
        every = [*parts, stream, planted]
        return [[t.inputs, t.targets, t.mask, t.is_query, list(t.names)] for t in every], few[1]

    assert_same(*both(made))


def test_rows_of_sgd_and_thinned_draws() -> None:
    def made() -> Any:
        given, density = tasks(), Density(line, tasks())
        like = torch.zeros(5, 2, dtype=F64)
        noise = Noise(given, 4, like, SGD(run_length=9, batch_rows=2), 7)
        draws = torch.arange(999.0, dtype=F64)[:, None, None].expand(-1, 5, 3)
        thinned = Draws(density, given.names, density.shared_init, draws)
        return [noise.row_weights(k) for k in range(9)], thinned.sample(123, generator(0))[0]

    assert_same(*both(made))


@pytest.mark.parametrize(
    "prior",
    [
        lambda: dist.HalfNormal(0.1),
        lambda: dist.HalfCauchy(2.5),
        lambda: dist.Cauchy(0.0, 0.3),
        lambda: dist.Gamma(2.0, 0.1),
        lambda: dist.InverseGamma(2.3, 1.1),
        lambda: dist.Beta(2.1, 3.0),
        lambda: dist.LogNormal(0.1, 3.0),
        lambda: dist.Uniform(0.1, 1e3),
        lambda: dist.Exponential(0.3).expand([3]).to_event(1),
        lambda: dist.StudentT(1.0, 0.0, 2.1),
        lambda: dist.Weibull(1.1, 2.3),
        lambda: dist.Dirichlet(torch.full((3,), 0.7)),
        lambda: dist.Gumbel(0.1, 1.3),
    ],
)
def test_starts_are_read_off_the_same_draws(prior: Callable[[], Any]) -> None:
    """Up to the rounding of the prior's own numbers in single precision."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        site = pyro.sample("site", prior())
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(x[..., 0] + (site * site).sum(), 1.0), obs=y)

    def made() -> Any:
        density = Density(model, tasks())
        return torch.stack([density.prior_loc, density.prior_scale])

    single, double = both(made)
    assert_close(single, double, 1e-6)


def test_a_narrow_prior_keeps_its_width() -> None:
    """Where single precision would round it away."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        ends = torch.tensor([1000.0, 1000.0 + 1e-6], dtype=F64)
        site = pyro.sample("site", dist.Uniform(*ends).to_event(0))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(1e7 * (site - 1000.0), 1.0), obs=y)

    for density in both(lambda: Density(model, tasks())):
        # The logit of a uniform variable is logistic.
        assert abs(float(density.prior_scale) - math.pi / 3**0.5) < 1e-6


@pytest.mark.parametrize(
    "name", ["imaml", "joint low rank, half resets", "stochastic", "sgd", "abml", "svi", "nuts"]
)
def test_fits_and_draws(name: str) -> None:
    def made() -> Any:
        given = tasks().split(0.4)
        density = Density(line, given, shared=["noise"])
        run = fit(CATALOGUE[name].strategy, density, given.support, seed=3)
        known, fresh = run.posterior(), run.adapt(given.query)
        theta, _ = known.sample(7, generator(1))
        learned = [run.prior.loc, run.prior.log_scale, run.shared, run.history["loss"].tolist()]
        return learned, theta, fresh.mean, fresh.sd, known.predict(given, 3, generator(2))

    assert_same(*both(made))
