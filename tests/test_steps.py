"""Steps that hold: by the mean over rows, no longer than a sd of the prior, on any likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, tensor
from torch import Tensor

from varmeta import (
    ABML,
    FOMAML,
    IMAML,
    MAML,
    Adam,
    Density,
    GaussianPrior,
    GradientDescent,
    MetaSGD,
    ProximalDescent,
    Reptile,
    SigmaMAML,
    Tasks,
    fit,
)
from varmeta.inference.base import Batch
from varmeta.inference.energy import FunctionEnergy, TaskEnergy
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import FirstOrder
from varmeta.seeds import generator

PRIOR_SD = 2.0


def level(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), PRIOR_SD))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a + 0 * x[:, 0], 1.0), obs=y)


def copies(*counts: int, y: float = 1.0) -> Tasks:
    """Tasks of so many rows y each."""
    rows = [(torch.ones(n, 1, dtype=FLOAT), torch.full((n,), y, dtype=FLOAT)) for n in counts]
    return Tasks.from_list(rows)


def ends(minimiser: FirstOrder, tasks: Tasks, with_prior: bool = False) -> Tensor:
    """θ `[T]` from 0."""
    density = Density(level, tasks)
    prior = GaussianPrior.from_density(density)
    inside = prior if with_prior else None
    energy = TaskEnergy(density, tasks, density.shared_init, inside, around=prior)
    start = torch.zeros(len(tasks), 1, dtype=FLOAT)
    return minimiser.minimise(energy, start).theta[:, 0]


# -- by the mean over rows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "minimiser",
    [
        GradientDescent(0.1, 1, tolerance=0),
        GradientDescent(0.1, 7, tolerance=0, momentum=0.5),
        GradientDescent(0.1, 3, tolerance=0, in_prior_units=True),
        ProximalDescent(0.1, 3, tolerance=0),
        Adam(0.1, 3, tolerance=0),
    ],
    ids=repr,
)
def test_copies_of_the_rows_change_no_step(minimiser: FirstOrder) -> None:
    """5, 10 and 40 copies in tasks of their own, padded together."""
    found = ends(minimiser, copies(5, 10, 40))
    assert_close(found, found[:1].expand(3), 1e-6 if isinstance(minimiser, Adam) else 1e-14)
    assert float(found[0]) > 0


def test_a_step_is_the_size_times_the_mean_or_the_summed_gradient() -> None:
    """η(y − θ) per row from θ = 0; a task without rows stays."""
    tasks = copies(5, 10, 2)
    none = tasks.mask.clone()
    none[2] = False
    tasks = replace(tasks, mask=none)
    mean = ends(GradientDescent(0.1, 1, tolerance=0), tasks)
    assert_close(mean, [0.1, 0.1, 0.0], 1e-15)
    bare = GradientDescent(0.1, 1, tolerance=0, reduction="sum")
    assert_close(ends(bare, tasks), [0.5, 1.0, 0.0], 1e-15)
    units = GradientDescent(0.1, 1, tolerance=0, in_prior_units=True)
    assert_close(ends(units, tasks), [0.1 * PRIOR_SD**2, 0.1 * PRIOR_SD**2, 0.0], 1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("in_prior_units", [False, True])
def test_the_proximal_step_minimises_what_it_says(reduction: Any, in_prior_units: bool) -> None:
    """∇f(θ)/n + (t − θ)/η + Λ(t − θ0)/n = 0 at t, from θ = 0 = θ0 and so from there on."""
    tasks, eta = copies(4, 9), 0.3
    options: dict[str, Any] = {"reduction": reduction, "in_prior_units": in_prior_units}
    options["clip"] = None
    theta = [ends(ProximalDescent(eta, k, tolerance=0, **options), tasks, True) for k in (1, 2)]
    rows = tasks.num_rows.to(FLOAT)
    size = eta * (PRIOR_SD**2 if in_prior_units else 1.0)
    counted = rows if reduction == "mean" else torch.ones(2, dtype=FLOAT)
    slope = rows * (theta[0] - 1.0)
    optimality = slope / counted + (theta[1] - theta[0]) / size + theta[1] / PRIOR_SD**2 / counted
    assert float(optimality.abs().max()) < 1e-12


def test_the_minimum_is_the_same_by_mean_and_sum() -> None:
    """n/(n + 1/s²), where the steps have converged."""
    tasks = copies(5, 10, 40)
    rows = tasks.num_rows.to(FLOAT)
    for minimiser in (
        GradientDescent(0.5, 500),
        GradientDescent(0.02, 500, reduction="sum"),
        ProximalDescent(0.5, 500),
        Adam(0.05, 3000, tolerance=1e-9),
        GradientDescent(0.5, 500, clip=0.01),
    ):
        assert_close(ends(minimiser, tasks, True), rows / (rows + PRIOR_SD**-2), 1e-9)


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=x.dtype), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ theta, 0.5), obs=y)


def lines(rows: int, seed: int, count: int = 40) -> Tasks:
    """θ_i ~ N((1, −1), 1), and of each as many rows; 10 query rows."""
    noise = generator(seed)
    like: dict[str, Any] = {"dtype": FLOAT, "generator": noise}
    x = torch.randn(count, rows + 10, 2, **like)
    theta = torch.randn(count, 2, **like) + tensor([1.0, -1.0])
    y = (x @ theta[..., None])[..., 0] + 0.5 * torch.randn(count, rows + 10, **like)
    tasks = Tasks.from_list(list(zip(x, y, strict=True)))
    query = torch.zeros_like(tasks.mask)
    query[:, rows:] = True
    return replace(tasks, is_query=query, is_split=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # steps that are learned may be too long
@pytest.mark.parametrize("kind", [MAML, FOMAML, MetaSGD, Reptile, ABML], ids=lambda k: k.__name__)
def test_trained_on_few_rows_more_rows_do_no_harm(kind: type[MetaGradient]) -> None:
    """Query loss after 5 and after 20 rows, of one fit on 5 rows: more rows know more.

    The same steps on their sum were four times as long.
    """
    options: dict[str, Any] = {}
    if kind is not ABML:
        options["minimiser"] = GradientDescent(0.1, 20 if kind is Reptile else 5, tolerance=0)
    done = fit(kind(steps=30, **options), Density(line, lines(5, 0)), lines(5, 0), progress=False)
    losses = []
    for rows in (5, 20):
        tasks = lines(rows, 1)
        found = done.adapt(tasks.support)
        losses.append(float(TaskEnergy(done.density, tasks.query, found.shared)(found.mean).mean()))
    assert losses[1] < losses[0]


# -- never longer than a sd of the prior ----------------------------------------------------------


def exploding(theta: Tensor) -> Tensor:
    return (theta.exp() - 5 * theta).sum(-1)


def test_a_cut_step_keeps_its_direction_and_its_bound() -> None:
    """The largest coordinate, in the units given, moves by the clip; the others in proportion."""
    start, unit = tensor([[10.0, 3.0], [1.5, 1.6]]), tensor([2.0, 0.5])
    energy = FunctionEnergy(exploding, unit=unit)
    for clip in (0.3, 1.0):
        found = GradientDescent(1e-2, 1, tolerance=0, clip=clip).minimise(energy, start)
        free = GradientDescent(1e-2, 1, tolerance=0, clip=None).minimise(energy, start)
        moved, wanted = (f.theta - start for f in (found, free))
        assert_close((moved / unit).abs().amax(-1)[:1], [clip], 1e-12)
        assert_close(moved[0] / moved[0].norm(), wanted[0] / wanted[0].norm(), 1e-12)
        assert torch.equal(moved[1], wanted[1])
        assert found.cut is not None and found.cut.tolist() == [True, False] and free.cut is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_beyond_all_numbers_is_a_long_step_in_its_direction(dtype: torch.dtype) -> None:
    """Infinite and nearly so; what is no number is not made one."""

    def energy(theta: Tensor) -> Tensor:
        slopes = torch.tensor([float("inf"), torch.finfo(dtype).max, float("nan")], dtype=dtype)
        return slopes * theta.sum(-1)

    start, unit = torch.zeros(3, 1, dtype=dtype), torch.tensor([0.5], dtype=dtype)
    found = GradientDescent(10.0, 2, tolerance=0).minimise(FunctionEnergy(energy, unit=unit), start)
    assert found.theta[:2, 0].tolist() == [-1.0, -1.0] and bool(found.theta[2].isnan())
    assert found.diverged is not None and bool(found.diverged[2])


def test_what_knows_no_prior_is_not_cut_and_has_no_units() -> None:
    start = tensor([[3.0]])
    found = GradientDescent(1.0, 1, tolerance=0).minimise(exploding, start)
    assert_close(found.theta, start - (start.exp() - 5), 1e-12)
    with pytest.raises(ValueError, match="needs an energy that knows its prior"):
        GradientDescent(1.0, 1, in_prior_units=True).minimise(exploding, start)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_bounds_that_are_none_are_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip must be positive and finite"):
        GradientDescent(0.1, clip=clip)
    with pytest.raises(ValueError, match="clip must be positive and finite"):
        Adam(clip=clip)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        GradientDescent(0.1, reduction="average")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "minimiser",
    [
        GradientDescent(0.1, 4, tolerance=0, in_prior_units=True),
        GradientDescent(3.0, 5, tolerance=0, in_prior_units=True, momentum=0.5),
        ProximalDescent(0.1, 4, tolerance=0, in_prior_units=True),
    ],
    ids=repr,
)
def test_in_prior_units_the_units_of_theta_do_not_matter(minimiser: FirstOrder) -> None:
    """θ → aθ with its prior moved along, and inputs divided by a; cut steps or not."""
    tasks, scale = lines(5, 0, 6).support, tensor([1000.0, 0.01])
    other = replace(tasks, inputs=tasks.inputs / scale)
    thetas = []
    for data, unit in ((tasks, tensor([1.0, 1.0])), (other, scale)):
        density = Density(line, data)
        prior = GaussianPrior.create(tensor([1.0, 2.0]) * unit, 2 * unit)
        energy = TaskEnergy(density, data, density.shared_init, prior)
        thetas.append(minimiser.minimise(energy, prior.loc.expand(6, -1)).theta / unit)
    assert_close(thetas[1], thetas[0], 1e-9)


# -- finite on every likelihood -------------------------------------------------------------------


def poisson(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Poisson((x @ a).exp()), obs=y)


def negative_binomial(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        # log odds of log-mean minus log-size: mean e^{xa}, size 3
        logits = x @ a - torch.log(torch.tensor(3.0, dtype=x.dtype))
        return pyro.sample("y", dist.NegativeBinomial(3.0, logits=logits), obs=y)


def own_noise(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    s = pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a * x[:, 0], s), obs=y)


def bernoulli(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ a), obs=y)


def student(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    s = pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.StudentT(3.0, a * x[:, 0], s), obs=y)


LIKELIHOODS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "Poisson": (poisson, (0.0, 3.0, 30.0, 1000.0)),
    "negative binomial": (negative_binomial, (0.0, 3.0, 30.0, 1000.0)),
    "normal, noise of its own": (own_noise, (0.0, 1.0, 5.0, 1000.0)),
    "Bernoulli": (bernoulli, (0.0, 1.0, 1.0, 0.0)),
    "Student": (student, (0.0, 1.0, 5.0, 1000.0)),
}
UNITS = GradientDescent(1.0, 5, tolerance=0, in_prior_units=True)
STRATEGIES: dict[str, MetaGradient] = {
    "maml": MAML(),
    "maml, in prior units": MAML(
        minimiser=GradientDescent(1.0, 5, tolerance=0, in_prior_units=True)
    ),
    "maml with prior": MAML(with_prior=True, learn_scale=True),
    "fomaml": FOMAML(),
    "meta-sgd": MetaSGD(),
    "reptile": Reptile(),
    "abml": ABML(),
    "abml, plain": ABML(natural=False, minimiser=GradientDescent(0.1, 5, tolerance=0)),
    "abml, Adam": ABML(natural=False, minimiser=Adam(0.1, 5, tolerance=0)),
    "imaml, descent": IMAML(minimiser=GradientDescent(0.1, 5, tolerance=0)),
    "sigma-maml": SigmaMAML(minimiser=ProximalDescent(0.01, 10, tolerance=0)),
}


def counts(values: tuple[float, ...], dtype: torch.dtype) -> Tasks:
    """A task of six rows for each value, more or less: x = ±1 beside a constant."""
    x = torch.stack([torch.ones(6), torch.tensor([-1.0, 1.0] * 3)], -1).to(dtype)
    y = [torch.full((6,), v, dtype=dtype) for v in values]
    if max(values) > 1:
        y = [(v + torch.tensor([0, 1, 2, 0, 1, 0], dtype=dtype)) for v in y]
    tasks = Tasks.from_list([(x, v) for v in y])
    query = torch.zeros_like(tasks.mask)
    query[:, 4:] = True
    return replace(tasks, is_query=query, is_split=True)


@cache
def recorded(law: str, dtype: torch.dtype) -> tuple[Density, Tasks]:
    """One density for all strategies, whose derivatives are recorded once."""
    model, values = LIKELIHOODS[law]
    tasks = counts(values, dtype)
    return Density(model, tasks), tasks


@pytest.mark.filterwarnings("ignore:the curvature is not positive definite")  # of a few steps
@pytest.mark.parametrize("law", LIKELIHOODS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_adapting_stays_finite_on_every_likelihood(name: str, law: str) -> None:
    """θ_i, its meta-gradient and its query loss, from θ0 up to ten prior sds off either way.

    In single precision, which has the smaller range.
    """
    strategy, dtype = STRATEGIES[name], torch.float32
    density, tasks = recorded(law, dtype)
    prior = GaussianPrior.from_density(density)
    batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
    for away in (-10.0, 10.0):
        start = replace(prior, loc=prior.loc + away * prior.scale)
        state = strategy.init(density, start, tasks, generator(0))
        losses, info = strategy.task_losses(density, state, batch, generator(1))
        assert bool(losses.isfinite().all()), (away, losses)
        leaves = [t for t in state.meta.raw.values() if t.requires_grad]
        for grad in torch.autograd.grad(losses.sum(), leaves, materialize_grads=True):
            assert bool(grad.isfinite().all()), (away, grad)
        found = strategy.adapt(density, state, tasks.support, generator(2))
        assert bool(found.mean.isfinite().all())
        assert all(bool(s.to(dtype).isfinite().all()) for s in info.stats().values())


# -- never silent ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minimiser", "said"),
    [
        (GradientDescent(3.0, 6, tolerance=0, clip=None), "were led away by their inner steps"),
        (GradientDescent(3.0, 6, tolerance=0), "even their last inner step cut"),
        (GradientDescent(1e-3, 6, tolerance=0), None),
    ],
    ids=["plain", "cut", "short"],
)
@pytest.mark.parametrize("kind", [MAML, FOMAML, Reptile], ids=lambda k: k.__name__)
def test_steps_that_did_not_hold_are_named(
    kind: type[MAML], minimiser: GradientDescent, said: str | None
) -> None:
    """Steps of 3 where those above 0.5 swing ever wider (a curvature of 4 per row); at the end of
    the fit and of an adaptation."""
    tasks = lines(5, 0, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = fit(kind(steps=1, minimiser=minimiser), Density(line, tasks), tasks, progress=False)
        first = len(caught)
        done.adapt(tasks.support)
    ours = [[str(w.message) for w in part] for part in (caught[:first], caught[first:])]
    for part in ours:
        assert any(said in m for m in part) if said else not any("inner step" in m for m in part)
