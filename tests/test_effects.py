"""Shared latents with priors of their own: crossed effects against the exact marginal likelihood.

The crossed design has tasks i, entries j of a shared vector and rows y = θ_i + u_j + noise, with
θ_i ~ N(θ0, s²), u_j ~ N(0, τ²): y is then one multivariate normal with the covariance
s² Z Zᵀ + τ² W Wᵀ + σ² I, by which everything here is exact.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from helpers import FLOAT, assert_close, tensor
from pyro import poutine
from scipy.optimize import minimize
from torch import Tensor

import varmeta as vm
from varmeta.inference.effects import integrated

TASKS, ENTRIES, ROWS = 12, 7, 90


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=FLOAT)


def crossed(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(one(3.0), 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(one(1.0)))
    noise = pyro.sample("noise", dist.HalfNormal(one(2.0)))
    with pyro.plate("entries", ENTRIES):
        item = pyro.sample("item", dist.Normal(one(0.0), tau))
    with pyro.plate("rows", len(x)):
        mean = level + item[x[:, 0].long()]
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)


SHARED = ["item", "tau", "noise"]


class Design:
    """An unbalanced crossed design with planted spreads, and its exact evidence."""

    def __init__(self, tau: float = 0.8, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.task, self.entry = rng.integers(TASKS, size=ROWS), rng.integers(ENTRIES, size=ROWS)
        self.task[:TASKS], self.entry[:ENTRIES] = np.arange(TASKS), np.arange(ENTRIES)
        mean = 3 + 0.6 * rng.normal(size=TASKS)[self.task]
        mean += tau * rng.normal(size=ENTRIES)[self.entry]
        self.y = mean + rng.normal(size=ROWS)

    @property
    def tasks(self) -> vm.Tasks:
        places = [self.task == k for k in range(TASKS)]
        return vm.Tasks.from_list(
            [(tensor(self.entry[p, None]), tensor(self.y[p])) for p in places]
        )

    def law(self, loc: Tensor, spreads: Tensor) -> Any:
        """Of all rows, given θ0 and (log s, log τ, log σ)."""
        z, w = (tensor(np.eye(n)[i]) for n, i in ((TASKS, self.task), (ENTRIES, self.entry)))
        s2, tau2, noise2 = (2 * spreads).exp()
        eye = torch.eye(ROWS, dtype=FLOAT)
        return td.MultivariateNormal(loc.expand(ROWS), s2 * z @ z.T + tau2 * w @ w.T + noise2 * eye)

    def loss(self, values: Tensor) -> Tensor:
        """−log p(y | θ0, s, τ, σ) − log p(τ) − log p(σ), with both densities of the values."""
        _, tau, noise = values[1:].exp()
        log_prior = td.HalfNormal(one(1.0)).log_prob(tau) + td.HalfNormal(one(2.0)).log_prob(noise)
        return -self.law(values[0], values[1:]).log_prob(tensor(self.y)) - log_prior

    def optimum(self) -> Tensor:
        def both(values: Any) -> tuple[float, Any]:
            leaf = tensor(values).requires_grad_()
            loss = self.loss(leaf)
            (grad,) = torch.autograd.grad(loss, leaf)
            return loss.item(), grad.numpy()

        best = minimize(both, [2.8, -0.4, -0.2, 0.1], jac=True, options={"gtol": 1e-9})
        return tensor(best.x)

    def effects(self, values: Tensor) -> Tensor:
        """E[u | y] there: the best linear unbiased predictors."""
        w = tensor(np.eye(ENTRIES)[self.entry])
        covariance = self.law(values[0], values[1:]).covariance_matrix
        offset = tensor(self.y) - values[0]
        return (2 * values[2]).exp() * w.T @ torch.linalg.solve(covariance, offset)


DESIGN = Design()


@cache
def density() -> vm.Density:
    return vm.Density(crossed, DESIGN.tasks, shared=SHARED)


def flat_prior(of: vm.Density) -> vm.GaussianPrior:
    return vm.GaussianPrior.from_density(of, hyperprior=False)


# -- the model ---------------------------------------------------------------------------------


def test_a_dependent_prior_is_read_and_has_its_density() -> None:
    """log p(φ) is that of the user's own laws, whatever the values of the others."""
    names = [site.name for site in density().shared_sites]
    assert names == ["tau", "noise", "item"] and density().effects.tolist() == list(range(2, 9))
    phi = torch.cat([tensor([-0.3, 0.4]), torch.linspace(-1, 1, 7, dtype=FLOAT)])
    tau, noise = phi[:2].exp()
    wanted = td.HalfNormal(one(1.0)).log_prob(tau) + td.HalfNormal(one(2.0)).log_prob(noise)
    wanted = wanted + td.Normal(one(0.0), tau).log_prob(phi[2:]).sum()
    assert float(density().shared_log_prior(phi)) == pytest.approx(float(wanted), rel=1e-12)
    prior = vm.GaussianPrior.from_density(density())
    values = {"shared_tau": tau, "shared_noise": noise, "shared_item": phi[2:]}
    model = poutine.condition(vm.hierarchy(density(), prior, DESIGN.tasks), values)
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    ours = sum(trace.nodes[name]["log_prob_sum"] for name in values)
    assert float(ours) == pytest.approx(float(wanted), rel=1e-12)


def dependent(role: str) -> Any:
    """Models whose second latent depends on the first in ways that have no answer."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        if role == "adapted":
            item = pyro.sample("item", dist.Normal(0.0, tau))
        elif role == "on adapted":
            item = pyro.sample("item", dist.Normal(level, tau))
        elif role == "support":
            item = pyro.sample("item", dist.Uniform(0.0, tau))
        else:  # unheard
            item = pyro.sample("item", dist.Normal(0.0, tau)) * 0
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(level + item, 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    ("role", "shared", "said"),
    [
        ("adapted", ["tau"], "each latent that adapts to a task, so write plain priors"),
        ("on adapted", ["tau", "item"], "changes with a latent that adapts to a task"),
        ("support", ["tau", "item"], "the support of shared latent 'item' changes"),
        ("unheard", ["tau", "item"], "shared site 'item' .*gradient is 0|does not reach"),
    ],
)
def test_a_prior_without_an_answer_is_refused_for_its_own_reason(
    role: str, shared: list[str], said: str
) -> None:
    tasks = vm.Tasks.from_list([(torch.zeros(n, 1), torch.full((n,), 0.5)) for n in (3, 2)])
    with pytest.raises(ValueError, match=said):
        vm.Density(dependent(role), tasks, shared=shared)


def test_a_location_alone_is_no_matter_of_points() -> None:
    """a ~ N(0, 1), b ~ N(a, 1): points are no problem, and the mode of a is b/2."""

    def chained(x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(one(0.0), 1.0))
        a = pyro.sample("a", dist.Normal(one(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(level + 2 * b, 1.0), obs=y)

    tasks = DESIGN.tasks.select(range(4))
    chain = vm.Density(chained, tasks, shared=["a", "b"])
    assert len(chain.effects) == 0
    found = vm.fit(vm.LaplaceEvidence(), chain, tasks, progress=False).shared
    assert float(found[1]) > 0.5
    assert float(found[0]) == pytest.approx(float(found[1]) / 2, abs=2e-3)


# -- integrated out ----------------------------------------------------------------------------


def test_the_evidence_and_its_gradient_are_those_of_the_marginal_law() -> None:
    """Of a linear-Gaussian model Laplace is exact: to rounding, away from the optimum."""
    values = tensor([2.8, -0.4, -0.1, 0.2]).requires_grad_()
    prior = vm.GaussianPrior(values[:1], values[1:2], torch.zeros(1, dtype=torch.long))
    shared = torch.cat([values[2:], torch.zeros(ENTRIES, dtype=FLOAT)])
    start = torch.zeros(TASKS, 1, dtype=FLOAT)
    found = integrated(density(), prior, shared, DESIGN.tasks, start, vm.NewtonCG())
    (ours,) = torch.autograd.grad(found.value, values)
    exact = DESIGN.loss(values)
    (wanted,) = torch.autograd.grad(exact, values)
    assert found.value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert_close(ours, wanted, 1e-8)
    assert_close(found.effects, DESIGN.effects(values.detach()), 1e-8)


def test_two_crossed_vectors_are_integrated_over_together() -> None:
    """A row hears an entry of each: ∂²E/∂u² is diagonal beside the shorter one alone."""

    def twice(x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(one(3.0), 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2, dtype=FLOAT)).to_event(1))
        long = pyro.sample("long", dist.Normal(torch.zeros(7, dtype=FLOAT), tau[0]).to_event(1))
        short = pyro.sample("short", dist.Normal(torch.zeros(3, dtype=FLOAT), tau[1]).to_event(1))
        with pyro.plate("rows", len(x)):
            mean = level + long[x[:, 0].long()] + short[x[:, 1].long()]
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    other = np.random.default_rng(5).integers(3, size=ROWS)
    places = [DESIGN.task == k for k in range(TASKS)]
    x = np.c_[DESIGN.entry, other].astype(float)
    tasks = vm.Tasks.from_list([(tensor(x[p]), tensor(DESIGN.y[p])) for p in places])
    of = vm.Density(twice, tasks, shared=["tau", "long", "short"])
    values = tensor([2.8, -0.4, -0.1, -0.6]).requires_grad_()
    prior = vm.GaussianPrior(values[:1], values[1:2], torch.zeros(1, dtype=torch.long))
    shared = torch.cat([values[2:], torch.zeros(10, dtype=FLOAT)])
    found = integrated(of, prior, shared, tasks, torch.zeros(TASKS, 1).double(), vm.NewtonCG())
    (ours,) = torch.autograd.grad(found.value, values)
    last = torch.cat([values[1:3], values.new_zeros(1)])
    w = tensor(np.eye(3)[other])
    covariance = DESIGN.law(values[0], last).covariance_matrix + (2 * values[3]).exp() * w @ w.T
    law = td.MultivariateNormal(values[0].expand(ROWS), covariance)
    exact = -law.log_prob(tensor(DESIGN.y))
    exact = exact - td.HalfNormal(values.new_ones(2)).log_prob(values[2:].exp()).sum()
    (wanted,) = torch.autograd.grad(exact, values)
    assert found.value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert_close(ours, wanted, 1e-8)


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Nothing is Gaussian or diagonal here: counts, a positive vector, two entries to a row."""
    level = pyro.sample("level", dist.Normal(one(0.0), 1.0))
    slope = pyro.sample("slope", dist.Normal(one(0.0), 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(one(0.5)))
    item = pyro.sample("item", dist.LogNormal(torch.zeros(3, dtype=FLOAT), tau).to_event(1))
    first, second = item[x[:, 0].long()], item[x[:, 1].long()]
    with pyro.plate("rows", len(x)):
        rate = (level + slope * x[:, 2]).exp() * first * second
        return pyro.sample("y", dist.Poisson(rate), obs=y)


def test_its_gradient_is_that_of_finite_differences_where_nothing_is_gaussian() -> None:
    """Central differences of step 1e-5 in float64: exact to about 1e-8 beside 1."""
    rng = np.random.default_rng(1)
    rows = []
    for n in (6, 4, 5, 7):
        x = np.c_[rng.integers(3, size=(n, 2)), rng.normal(size=n)]
        rows.append((tensor(x), tensor(rng.poisson(1.5, size=n).astype(float))))
    tasks = vm.Tasks.from_list(rows)
    of = vm.Density(counts, tasks, shared=["item", "tau"])
    point = tensor([0.2, -0.1, -0.4, -0.6, 0.3, -0.5, -0.7])
    tight = vm.NewtonCG(tolerance=1e-13)

    def value(leaf: Tensor) -> Tensor:
        factor = leaf[4:6, None]
        prior = vm.GaussianPrior(leaf[:2], leaf[2:4], torch.arange(2), factor)
        shared = torch.cat([leaf[6:], torch.zeros(3, dtype=FLOAT)])
        start = torch.zeros(4, 2, dtype=FLOAT)
        return integrated(of, prior, shared, tasks, start, tight).value

    leaf = point.clone().requires_grad_()
    (ours,) = torch.autograd.grad(value(leaf), leaf)
    ways = torch.randn(3, len(point), dtype=FLOAT, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = [(value(point + 1e-5 * h) - value(point - 1e-5 * h)) / 2e-5 for h in ways]
    assert_close(ways @ ours, torch.stack(wanted), 1e-6)


def test_a_fit_is_the_maximum_of_the_marginal_likelihood() -> None:
    """To the run's own tolerance, a hundredth of a standard error (here 0.08 to 0.35)."""
    run = vm.fit(vm.LaplaceEvidence(), density(), DESIGN.tasks, prior=flat_prior(density()))
    best = DESIGN.optimum()
    assert run.converged
    learned = torch.cat([run.prior.loc, run.prior.log_scale, run.shared[:2]])
    assert float((learned - best).abs().max()) < 2e-3
    assert run.history["loss"].iloc[-1] * TASKS == pytest.approx(DESIGN.loss(best).item(), abs=1e-4)
    found = density().constrain_shared(run.shared)
    assert float((found["item"] - DESIGN.effects(best)).abs().max()) < 2e-3
    assert run.moving()["quantity"].tolist() == [
        "loc[level]",
        "log_scale[level]",
        "shared[tau]",
        "shared[noise]",
    ]
    assert float(run.posterior().mean.mean()) == pytest.approx(float(best[0]), abs=0.2)


def test_a_spread_of_zero_goes_to_zero_and_the_run_arrives() -> None:
    """Planted τ = 0, at a seed where the exact optimum has τ below a hundredth."""
    flat = Design(tau=0.0, seed=4)
    assert float(flat.optimum()[2].exp()) < 0.01
    run = vm.fit(vm.LaplaceEvidence(), density(), flat.tasks, prior=flat_prior(density()))
    found = density().constrain_shared(run.shared)
    assert run.converged and float(found["tau"]) < 0.03
    assert float(found["item"].abs().max()) < 0.03


# -- who can -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        vm.IMAML(),
        vm.JointVariational(),
        vm.MAML(),
        vm.NoPooling(),
        vm.CompletePooling(),
        vm.PyroSVI(point_globals=True),
    ],
    ids=lambda s: s.name,
)
def test_strategies_of_points_refuse_before_training(strategy: vm.Strategy) -> None:
    with pytest.raises(ValueError, match=r"'item' depends on another one; use LaplaceEvidence"):
        vm.fit(strategy, density(), DESIGN.tasks)


def test_what_integrating_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = vm.LaplaceEvidence()
    with pytest.raises(ValueError, match="leave batch_size unset"):
        vm.fit(evidence, density(), DESIGN.tasks, batch_size=4)
    with pytest.raises(ValueError, match="logdet without probes"):
        vm.fit(replace(evidence, logdet=vm.LogDet(probes=1)), density(), DESIGN.tasks)
    monkeypatch.setattr("varmeta.inference.effects.MOST_NUMBERS", 50)
    with pytest.raises(ValueError, match=r"12 tasks × 1 coordinates × 7.*use PyroSVI"):
        vm.fit(evidence, density(), DESIGN.tasks)
    monkeypatch.undo()
    monkeypatch.setattr("varmeta.inference.effects.MOST_PASSES", -1)
    with pytest.raises(ValueError, match="a row hears several of the 7 shared effects"):
        vm.fit(evidence, density(), DESIGN.tasks)
    with pytest.raises(ValueError, match="vectorise=True: the prior of a shared latent depends"):
        vm.fit(vm.PyroSVI(vectorise=True), density(), DESIGN.tasks)


def test_strategies_that_draw_have_the_dependent_prior() -> None:
    """Runs far too short to be right: what they draw from is tested above, by its density."""
    svi = vm.PyroSVI(steps=20, draws=4, adapt_steps=1)
    nuts = vm.PyroNUTS(draws=2, warmup=0, chains=1)
    for strategy in (svi, nuts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run = vm.fit(strategy, density(), DESIGN.tasks, progress=False)
        drawn = density().constrain_shared(run.posterior().shared[:, 0])
        assert bool((drawn["tau"] > 0.05).all()) and bool((drawn["tau"] < 5).all())
        assert drawn["item"].shape[1:] == (ENTRIES,) and bool(drawn["item"].isfinite().all())
