"""Every law of Pyro that a task's rows can have: evaluated, drawn, fitted, scored and exported.

Draws are compared with a law's mean to 5 standard errors: under normality one number in 1.7e6 is a
false alarm, and some 30 numbers are compared.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from benchmarks import what_works
from benchmarks.observed_laws import LAWS, NOT_ROWS, STAND_INS, model, tasks
from varmeta import Density, LaplaceEvidence, Tasks, fit, to_arviz
from varmeta.inference.energy import TaskEnergy
from varmeta.models import programs
from varmeta.models.apart import NotApart, take_apart
from varmeta.seeds import generator

FLOAT = torch.float64
LOOPS = {"SineBivariateVonMises", "Wishart"}  # their constructors look at values
# These do not keep what they were given; vmap draws from them all the same.
UNKNOWN = {"GaussianHMM", "GammaGaussianHMM", "GaussianMRF", "IndependentHMM"}
# Their densities take one temperature for all rows of all tasks, their draws one for each task.
SCALAR = {"RelaxedOneHotCategorical", "RelaxedOneHotCategoricalStraightThrough"}
every_law = pytest.mark.parametrize("name", LAWS)


def theta_of(count: int, *draws: int) -> Tensor:
    return 0.3 * torch.randn(*draws, count, 1, generator=generator(5), dtype=FLOAT)


@cache
def case(name: str) -> tuple[Tasks, Density]:
    data = tasks(name)
    return data, Density(model(name), data)


@contextmanager
def plain() -> Iterator[None]:
    """Pyro's laws as they are: unchecked, and (the generalised Pareto needs it) of one type."""
    torch.set_default_dtype(FLOAT)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def by_hand(name: str, theta: Tensor, data: Tasks) -> Tensor:
    """One task after the other, with Pyro's own law: θ `[T, 1]` to `[T, N]`."""
    out = torch.zeros(data.mask.shape, dtype=FLOAT)
    with plain():
        for i, mask in enumerate(data.mask):
            law = LAWS[name](0.1 + theta[i] * data.inputs[i, mask, 0])
            out[i, mask] = law.log_prob(data.targets[i, mask]).to(FLOAT)
    return out


def test_no_law_is_forgotten() -> None:
    laws = {
        name
        for name, kind in vars(dist).items()
        if inspect.isclass(kind) and issubclass(kind, torch.distributions.Distribution)
    }
    assert laws == set(LAWS) | set(NOT_ROWS) and not set(LAWS) & set(NOT_ROWS)


@every_law
def test_likelihood_is_the_loop_over_tasks(name: str) -> None:
    """Together, apart and one by one, value and gradient."""
    (data, density), theta = case(name), theta_of(3).requires_grad_()
    assert (density._how == "one by one") == (name in LOOPS)
    wanted = by_hand(name, theta, data)
    (slope,) = torch.autograd.grad(wanted.sum(), theta)
    ways = {density._how} if name in LOOPS | UNKNOWN | SCALAR else {density._how, "apart"}
    for how in ways:
        density = copy.copy(density)
        density._run_as(how)  # type: ignore[arg-type]
        rows = density.log_likelihood(theta, data)
        torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=1e-6)
        (got,) = torch.autograd.grad(rows.sum(), theta)
        torch.testing.assert_close(got, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in LAWS if n not in LOOPS])
def test_draws_come_from_the_law_of_their_task(name: str) -> None:
    """The law that is drawn from, caught: its density is that of the loop over tasks and draws."""
    m = 0.1 + theta_of(2, 3) * torch.linspace(-1, 1, 4, dtype=FLOAT)  # [3, 2, 4]
    with plain():
        laws = [[LAWS[name](each) for each in row] for row in m]
        if name in UNKNOWN:
            with pytest.raises(NotApart):
                take_apart(laws[0][0])
            return
        apart = [[take_apart(law)[0] for law in row] for row in laws]
        build = take_apart(laws[0][0])[1]
        tensors = [
            torch.stack([torch.stack([parts[k] for parts in row]) for row in apart])
            for k in range(len(apart[0][0]))
        ]
        built = build(tensors, (3, 2))
        assert built.batch_shape == (3, 2, 4) and built.event_shape == laws[0][0].event_shape
        torch.manual_seed(0)
        y = (STAND_INS[name](m.flatten()) if name in STAND_INS else built).sample()
        y = y.reshape(3, 2, 4, *built.event_shape)
        if name in SCALAR:
            return
        wanted = [[law.log_prob(y[s, t]) for t, law in enumerate(r)] for s, r in enumerate(laws)]
        wanted = torch.stack([torch.stack(row) for row in wanted])
        torch.testing.assert_close(built.log_prob(y), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in LAWS if n not in LOOPS])
def test_predictions_have_the_targets_shape(name: str, caplog: pytest.LogCaptureFixture) -> None:
    (data, density), theta = case(name), theta_of(3, 2)
    if name in STAND_INS:
        with pytest.raises(NotImplementedError, match=f"cannot predict: {name} has no sampler"):
            density.predict(theta, data, generator(0))
        return
    state = torch.random.get_rng_state()
    first, again, other = (density.predict(theta, data, generator(k))["y"] for k in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (2, *data.targets.shape)
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    if first.is_floating_point() and bool((first % 1 != 0).any()):
        assert not torch.equal(first, other) and not torch.equal(first[0], first[1])
    assert "one by one" not in caplog.text


MOMENTS = {  # scipy's means and sds, given m
    "StudentT": lambda m: scipy.stats.t(5.0, m, 0.5),
    "Laplace": lambda m: scipy.stats.laplace(m, 0.5),
    "Exponential": lambda m: scipy.stats.expon(scale=(-m).exp()),
    "Weibull": lambda m: scipy.stats.weibull_min(1.5, scale=m.exp()),
    "Geometric": lambda m: scipy.stats.geom(torch.sigmoid(m), loc=-1),
    "Beta": lambda m: scipy.stats.beta(m.exp(), 1.5),
    "BetaBinomial": lambda m: scipy.stats.betabinom(6, m.exp(), 1.5),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_draws_have_the_moments_that_scipy_knows(name: str) -> None:
    """Tasks with other θ, so that a draw from another task's law would show."""
    (data, density), count = case(name), 2000
    theta = torch.tensor([[-1.0], [0.5], [1.0]], dtype=FLOAT)
    drawn = density.predict(theta.expand(count, 3, 1), data, generator(1))["y"].to(FLOAT)
    law = MOMENTS[name](0.1 + theta * data.inputs[..., 0])
    error = (drawn.mean(0) - torch.as_tensor(law.mean())).abs()
    assert bool((error < 5 * torch.as_tensor(law.std()) / count**0.5).all())


@pytest.mark.parametrize("name", ["StudentT", "BetaBinomial", "MultivariateNormal", "Stable"])
def test_drawing_takes_as_long_as_the_sampler(name: str) -> None:
    """Beside one call of the law's own sampler for as many rows; draw by draw it was 50 times."""
    some = tasks(name, 100)
    density, theta = Density(model(name), some), theta_of(100, 50)
    seconds, m = [], torch.zeros(50 * some.mask.numel(), dtype=FLOAT)
    for call in (
        lambda: density.predict(theta, some, generator(0)),
        lambda: LAWS[name](m).sample(),
    ):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    assert seconds[0] < 5 * seconds[1] + 0.05


@pytest.mark.filterwarnings("ignore:Singular sample")  # of PyTorch's Wishart
@pytest.mark.parametrize("name", ["OrderedLogistic", "NanMaskedNormal", "Wishart"])
def test_it_is_fitted_scored_and_exported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One law that writes in place, one that looks at values, one in a loop."""
    monkeypatch.setattr(programs, "CALLS_BEFORE_CAPTURE", 10**6)  # recording takes longer
    data, density = case(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fit(LaplaceEvidence(steps=1), density, data)
    nats = result.posterior().log_predictive(data, 3, generator(0))
    assert bool(nats.isfinite().all()) and bool((nats[data.mask] != 0).all())
    shape = to_arviz(result, draws=2)["posterior_predictive"]["y"].shape
    assert shape == (1, 2, int(data.mask.sum()), *data.targets.shape[2:])


def test_ordered_logistic_is_a_difference_of_sigmoids() -> None:
    (data, density), theta = case("OrderedLogistic"), theta_of(3)
    cuts = torch.tensor([-0.5, 0.5, 1.0], dtype=FLOAT)
    rows = density.log_likelihood(theta, data)
    below = torch.sigmoid(cuts - (0.1 + theta * data.inputs[..., 0])[..., None])
    ends = [torch.zeros_like(below[..., :1]), below, torch.ones_like(below[..., :1])]
    probs = torch.cat(ends, -1).diff(dim=-1)
    wanted = probs.gather(-1, data.targets[..., None].long())[..., 0].log()
    torch.testing.assert_close(rows[data.mask], wanted[data.mask])


def ordinal(x: Tensor, y: Tensor | None = None) -> None:
    """Learned cut points, weights of rows, some rows left out, and a second site in two columns."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    gaps = pyro.sample("gaps", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    cuts = torch.cat([gaps[:1], gaps[1:].exp()]).cumsum(0)
    grade, pair = (None, None) if y is None else (y[:, 0], y[:, 1:])
    with pyro.plate("rows", len(x)):
        with pyro.poutine.mask(mask=x[:, 0] > -1), pyro.poutine.scale(scale=2.0):
            pyro.sample("grade", dist.OrderedLogistic(a * x[:, 0], cuts), obs=grade)
        tril = torch.eye(2, dtype=x.dtype) * gaps[1].exp()
        pyro.sample("pair", dist.MultivariateNormal(a * x, scale_tril=tril), obs=pair)


def test_two_sites_apart_with_shared_values_of_each_draw() -> None:
    pairs = []
    for i in range(3):
        x = torch.randn(4, 2, generator=generator(i), dtype=FLOAT)
        grade = torch.arange(i, i + 4)[:, None] % 4
        pairs.append((x, torch.cat([grade.to(FLOAT), x.flip(1)], 1)))
    data = Tasks.from_list(pairs)
    density = Density(ordinal, data, shared=["gaps"])
    assert density._how == "apart"
    theta = theta_of(3, 2)
    phi = 0.4 * torch.randn(2, 3, 3, generator=generator(7), dtype=FLOAT)
    rows = density.log_likelihood(theta, data, phi)
    drawn = density.predict(theta, data, generator(0), phi)
    assert drawn["grade"].shape == (2, 3, 4) and drawn["pair"].shape == (2, 3, 4, 2)
    for s, i in [(s, i) for s in range(2) for i in range(3)]:
        x, y, a, gaps = data.inputs[i], data.targets[i], theta[s, i], phi[s, i]
        cuts = torch.cat([gaps[:1], gaps[1:].exp()]).cumsum(0)
        grade = dist.OrderedLogistic(a * x[:, 0], cuts, validate_args=False).log_prob(y[:, 0])
        pair = dist.Normal(a * x, gaps[1].exp()).log_prob(y[:, 1:]).sum(-1)
        wanted = torch.where(x[:, 0] > -1, 2 * grade, 0.0) + pair
        torch.testing.assert_close(rows[s, i], wanted)


def test_gauss_newton_of_a_law_apart() -> None:
    """Of one predictor, m: (∂m/∂θ)² times the curvature of −log p in m, by autograd."""
    (data, density), theta = case("OrderedLogistic"), theta_of(3)
    energy = TaskEnergy(density, data, density.shared_init)
    got = energy.linearise(theta, gauss_newton=True).product(torch.ones_like(theta))
    m = (0.1 + theta * data.inputs[..., 0]).requires_grad_()
    cuts = torch.tensor([-0.5, 0.5, 1.0], dtype=FLOAT)
    nats = dist.OrderedLogistic(m, cuts, validate_args=False).log_prob(data.targets)
    (slope,) = torch.autograd.grad(-nats[data.mask].sum(), m, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), m)
    torch.testing.assert_close(got, (bend * data.inputs[..., 0] ** 2).sum(-1, keepdim=True))


# -- models that vmap cannot run ------------------------------------------------------------------


def branching(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a if bool(a > 0) else 2 * a, 1.0), obs=y)


def indexing(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = a * x[:, 0]
    mean[x[:, 0] > 0] = 2 * mean[x[:, 0] > 0]
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("kind", ["branching", "indexing"])
def test_what_cannot_be_batched_is_run_in_a_loop(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    function: Any = {"branching": branching, "indexing": indexing}[kind]
    data = tasks("Normal")
    with caplog.at_level(logging.WARNING, "varmeta"):
        density = Density(function, data)
        theta = 0.3 * torch.randn(3, density.dim, generator=generator(1), dtype=FLOAT)
        rows = density.log_likelihood(theta.expand(2, 3, -1), data)
        density.predict(theta, data, generator(0))
        energy = TaskEnergy(density, data, density.shared_init)
        for _ in range(programs.CALLS_BEFORE_CAPTURE + 1):  # a recording would hold every task
            energy.value_and_gradient(theta)
    assert density.execution()["likelihood: gradient"].startswith("as written")
    assert caplog.text.count("is run task by task") == 1 and len(caplog.records) == 1
    if kind == "branching":
        mean = torch.where(theta > 0, theta, 2 * theta)
    else:
        x = data.inputs[..., 0]
        mean = theta * torch.where(x > 0, 2 * x, x)
    wanted = dist.Normal(mean, 1.0).log_prob(data.targets)
    for draw in rows:
        torch.testing.assert_close(draw[data.mask], wanted[data.mask])


class Twice(dist.Normal):
    """A class of a user's own, which changes what it is given."""

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(2 * loc, scale, validate_args=validate_args)


def test_a_users_own_class_is_drawn_as_it_is() -> None:
    data = Tasks.from_list([(torch.ones(400, 1, dtype=FLOAT), torch.zeros(400, dtype=FLOAT))] * 2)

    def doubled(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", Twice(a * x[:, 0], torch.tensor(0.1, dtype=FLOAT)), obs=y)

    theta = torch.tensor([[1.0], [-3.0]], dtype=FLOAT)
    drawn = Density(doubled, data).predict(theta, data, generator(0))["y"]
    assert bool(((drawn.mean(-1) - 2 * theta[:, 0]).abs() < 5 * 0.1 / 20).all())


# -- the page -------------------------------------------------------------------------------------


def test_the_page_has_a_row_for_each_law_and_says_what_is_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "CALLS_BEFORE_CAPTURE", 10**6)
    page = Path("docs/what-works.md").read_text()
    rows = what_works.rows_of(page)
    assert list(rows) == list(LAWS)
    for name in ("OrderedLogistic", "VonMises3D"):
        assert rows[name] == what_works.try_law(name), name
