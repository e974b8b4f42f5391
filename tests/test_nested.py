"""NestedLaplace against quadrature: the posterior of the prior itself, and of tasks given all."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_same, case_of, tensor
from linear_gaussian import LinearGaussian
from scipy.special import expit
from torch import Tensor

import varmeta as vm
from varmeta.inference.marginal import Marginal, Points, Reference
from varmeta.inference.marginal_nuts import Potential
from varmeta.inference.proposal import Proposal, resampled
from varmeta.problems import school
from varmeta.seeds import generator

Y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
SE = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
WIDTH = 10.0  # of the model's prior of an effect


def schools(count: int = 8) -> vm.Tasks:
    rows = [(tensor([[s]]), tensor([y])) for s, y in zip(SE[:count], Y[:count], strict=True)]
    return vm.Tasks.from_list(rows, names=[*"ABCDEFGH"][:count])


def log_law(tau: np.ndarray, law: str) -> np.ndarray:
    if law == "half-normal":
        return -0.5 * (tau / WIDTH) ** 2
    if law == "half-cauchy":
        return -np.log1p((tau / WIDTH) ** 2)
    return 0 * tau


@cache
def eight_schools(law: str) -> dict[str, np.ndarray]:
    """By quadrature over log τ, everything else in closed form: mean and sd of μ, log τ and θ_i.

    And the 5%, 50% and 95% quantiles of log τ.
    """
    log_tau = np.linspace(-9, 7, 4001)
    tau = np.exp(log_tau)[:, None]
    variance = SE**2 + tau**2
    precision = 1 / WIDTH**2 + (1 / variance).sum(1)
    mu, spread = (Y / variance).sum(1) / precision, precision**-0.5
    fit = -0.5 * np.log(variance).sum(1) - 0.5 * (Y**2 / variance).sum(1)
    fit += 0.5 * mu**2 * precision - 0.5 * np.log(precision)
    weight = np.exp(fit - fit.max() + log_law(tau[:, 0], law) + log_tau)
    weight /= weight.sum()
    share = tau**2 / variance
    theta = share * Y + (1 - share) * mu[:, None]
    var = share * SE**2 + ((1 - share) * spread[:, None]) ** 2

    def moments(mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle = weight @ mean
        return middle, np.sqrt(weight @ (var + mean**2) - middle**2)

    out = {}
    for name, (m, v) in {
        "loc": (mu[:, None], spread[:, None] ** 2),
        "log_scale": (log_tau[:, None], 0 * tau),
        "theta": (theta, var),
    }.items():
        out[name], out[f"{name} sd"] = moments(m, v)
    out["quantiles"] = np.interp([0.05, 0.5, 0.95], weight.cumsum(), log_tau)
    return out


def near(mean: Tensor, sd: Tensor, truth: dict[str, np.ndarray], name: str, shift: float) -> None:
    """Within so many standard deviations; sds to 10%."""
    off = np.abs(mean.numpy() - truth[name]) / truth[f"{name} sd"]
    ratio = sd.numpy() / truth[f"{name} sd"]
    assert off.max() < shift, (name, off)
    assert ratio.min() > 0.9 and ratio.max() < 1.1, (name, ratio)


@pytest.mark.parametrize("law", ["half-normal", "half-cauchy", "flat"])
def test_eight_schools_is_that_of_quadrature(law: str) -> None:
    """Point estimates of the scale leave 0.07 to 0.25 of these standard deviations."""
    tasks = schools()
    density = vm.Density(school, tasks)
    prior = vm.GaussianPrior.from_density(density, scale_law=law)  # type: ignore[arg-type]
    result = vm.fit(vm.NestedLaplace(), density, tasks, prior=prior)
    assert result.converged and "k̂" in result.reason
    truth, kept = eight_schools(law), result.state.tensors
    for name in ("loc", "log_scale"):
        near(kept[name].mean(0), kept[name].std(0), truth, name, 0.1)
    found = np.quantile(kept["log_scale"].numpy(), [0.05, 0.5, 0.95])
    assert np.abs(found - truth["quantiles"]).max() < 0.3 * truth["log_scale sd"][0]
    posterior = result.posterior()
    near(posterior.mean[:, 0], posterior.sd[:, 0], truth, "theta", 0.06)
    drawn, _ = posterior.sample(1000, generator(0))
    near(drawn.mean(0)[:, 0], drawn.std(0)[:, 0], truth, "theta", 0.15)


def test_a_new_task_counts_as_if_it_had_been_in_the_run() -> None:
    """Seven schools learned from, the eighth adapted to: its posterior is that of all eight."""
    all_of_them = schools()
    tasks = schools(7)
    density = vm.Density(school, tasks)
    result = vm.fit(vm.NestedLaplace(), density, tasks)
    posterior = result.adapt(all_of_them.select([7]))
    truth = eight_schools("half-normal")
    last = {name: value[-1:] for name, value in truth.items()}
    near(posterior.mean[:, 0], posterior.sd[:, 0], last, "theta", 0.08)
    assert posterior.shared.shape == (1000, 1, 0) and "importance_ess" in posterior.stats


def test_the_potential_of_nuts_is_the_density_of_the_draws() -> None:
    """Value and gradient, by the recorded program and by the careful way."""
    case = case_of(LinearGaussian.random(3, num_tasks=3, dim=1), shared_noise=True)
    tasks, density = case.tasks.support, case.density
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        strategy = vm.NestedLaplace(draws=20, rounds=1, points=0, tolerance=0.1)
        state = vm.fit(strategy, density, tasks).state
    target = state.cache["target"]
    psi = state.tensors["psi"][:3]
    made = [
        Potential.make(target.belief, target.marginal, target.mode, target.known, steps)
        for steps in (0, 1)
    ]
    assert made[0].quick is None and made[1].quick is not None
    wanted, slopes = target(psi)[0], target.gradient(psi)
    for potential in made:
        for k in range(len(psi)):
            value, slope = potential.value_and_gradient(psi[k])
            torch.testing.assert_close(value, -wanted[k], rtol=1e-7, atol=1e-6)
            torch.testing.assert_close(slope, -slopes[k], rtol=1e-5, atol=1e-5)


def test_nuts_stopped_and_resumed_is_nuts_as_a_whole(tmp_path: Path) -> None:
    """Bit for bit, from a file, in the middle of a chain."""
    tasks = schools()
    density = vm.Density(school, tasks)
    strategy = vm.NestedLaplace(sampler="nuts", draws=20, warmup=3, chains=1, tolerance=0.1)
    whole = vm.fit(strategy, density, tasks)
    assert strategy.name == "NestedLaplace (NUTS)" and "R-hat" in whole.reason

    def stop(step: int, _: object) -> None:
        if step == whole.state.step - 8:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        vm.fit(strategy, density, tasks, checkpoint=path, on_step=stop)
    assert_same(
        vm.fit(strategy, density, tasks, checkpoint=path).state.state_dict(),
        whole.state.state_dict(),
    )


# -- closed forms and quadrature of other kinds ----------------------------------------------------


def test_linear_gaussian_is_that_of_a_grid_over_the_scales() -> None:
    """Two scales on a grid, θ0 and tasks in closed form given them."""
    case = case_of(LinearGaussian.random(5, num_tasks=8, dim=2))
    tasks = case.tasks.support
    prior = vm.GaussianPrior.from_density(case.density, scales="coordinate")
    result = vm.fit(vm.NestedLaplace(), case.density, tasks, prior=prior)
    noise = float(case.density.model.noise)  # type: ignore[union-attr]
    xs = [tasks.inputs[i, tasks.mask[i]].numpy() for i in range(len(tasks))]
    ys = [tasks.targets[i, tasks.mask[i]].numpy() for i in range(len(tasks))]
    axis = np.linspace(-5.5, 3.5, 61)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    sd = np.exp(grid)
    precision = np.tile(np.eye(2) / 4.0, (len(grid), 1, 1))  # θ0 ~ N(0, 2²)
    pull, fit = np.zeros((len(grid), 2)), np.zeros(len(grid))
    for x, y in zip(xs, ys, strict=True):
        cov = np.einsum("nd,gd,md->gnm", x, sd**2, x) + noise**2 * np.eye(len(y))
        inverse = np.linalg.inv(cov)
        precision += x.T @ inverse @ x
        pull += np.einsum("nd,gnm,m->gd", x, inverse, y)
        fit -= 0.5 * np.linalg.slogdet(cov)[1] + 0.5 * np.einsum("n,gnm,m->g", y, inverse, y)
    cov = np.linalg.inv(precision)
    loc = np.einsum("gij,gj->gi", cov, pull)
    fit += 0.5 * (pull * loc).sum(1) - 0.5 * np.linalg.slogdet(precision)[1]
    weight = fit + (grid - 0.5 * (sd / 2.0) ** 2).sum(1)  # half-normal of width 2, over log σ
    weight = np.exp(weight - weight.max())
    weight /= weight.sum()
    truth = {"loc": weight @ loc, "log_scale": weight @ grid}
    variance = weight @ (loc**2 + cov.diagonal(axis1=1, axis2=2))
    truth["loc sd"] = np.sqrt(variance - truth["loc"] ** 2)
    truth["log_scale sd"] = np.sqrt(weight @ grid**2 - truth["log_scale"] ** 2)
    kept = result.state.tensors
    for name in ("loc", "log_scale"):
        near(kept[name].mean(0), kept[name].std(0), truth, name, 0.12)
    assert not kept["bent"].any() and bool((kept["task_k"] == -torch.inf).all())


def coin(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", x.shape[-2]):
        law = dist.Bernoulli(logits=level + 0.0 * x[..., 0])
        return pyro.sample("y", law, obs=y)


@cache
def coins() -> tuple[vm.Tasks, dict[str, np.ndarray]]:
    """30 groups of 3 tosses; truth by quadrature over θ0, log σ and every level."""
    source = np.random.default_rng(2)
    heads = source.binomial(3, expit(source.normal(0.5, 2.0, 30)))
    rows = [(torch.zeros(3, 1, dtype=FLOAT), tensor(np.arange(3) < h).to(FLOAT)) for h in heads]
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    loc, log_sd = np.linspace(-3.5, 4.5, 81), np.linspace(-4.5, 2.5, 141)
    at = loc[:, None, None] + np.exp(log_sd)[None, :, None] * nodes
    p = expit(at)
    levels = np.stack([(p**h * (1 - p) ** (3 - h)) @ weights for h in range(4)])
    counts = np.bincount(heads, minlength=4)
    fit = np.einsum("h,hab->ab", counts, np.log(levels))
    fit += -0.5 * (loc[:, None] / 2) ** 2 - 0.5 * (np.exp(log_sd) / 2) ** 2 + log_sd
    weight = np.exp(fit - fit.max())
    weight /= weight.sum()

    def moments(mean: np.ndarray, square: np.ndarray) -> tuple[float, float]:
        middle = float((weight * mean).sum())
        return middle, math.sqrt(float((weight * square).sum()) - middle**2)

    out: dict[str, np.ndarray] = {}
    for name, value in (("loc", loc[:, None] + 0 * log_sd), ("log_scale", log_sd + 0 * fit)):
        pair = moments(value, value**2)
        out[name], out[f"{name} sd"] = (np.array([v]) for v in pair)
    each = []
    for h in range(4):
        like = p**h * (1 - p) ** (3 - h) * weights
        each.append(moments((like * at).sum(-1) / levels[h], (like * at**2).sum(-1) / levels[h]))
    out["theta"], out["theta sd"] = (np.array([each[h][k] for h in heads]) for k in (0, 1))
    return vm.Tasks.from_list(rows), out


def test_laplace_is_corrected_where_a_task_is_no_parabola() -> None:
    """Three tosses a group: Laplace alone puts the scale off by a fifth of an sd, or more."""
    tasks, truth = coins()
    density = vm.Density(coin, tasks)
    result = vm.fit(vm.NestedLaplace(), density, tasks)
    kept, posterior = result.state.tensors, result.posterior()
    assert result.converged and bool(kept["bent"].all())
    for name in ("loc", "log_scale"):
        near(kept[name].mean(0), kept[name].std(0), truth, name, 0.12)
    near(posterior.mean[:, 0], posterior.sd[:, 0], truth, "theta", 0.1)
    plain = vm.fit(vm.NestedLaplace(points=0), density, tasks).state.tensors["log_scale"]
    off = (plain.mean(0).numpy() - truth["log_scale"]) / truth["log_scale sd"]
    assert abs(off[0]) > 0.2, off


def count(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    size = pyro.sample("size", dist.Gamma(2.0, 0.5))
    with pyro.plate("rows", x.shape[-2]):
        mean = (level[0] + level[1] * x[..., 0]).exp()
        return pyro.sample("y", dist.GammaPoisson(size, size / mean), obs=y)


def counts() -> vm.Tasks:
    noise = torch.Generator().manual_seed(0)
    rows = []
    for n in (2, 3, 7, 4, 3):
        x = torch.randn(n, 1, generator=noise, dtype=FLOAT)
        rows.append((x, torch.poisson((0.5 + 0.5 * x[:, 0]).exp(), generator=noise)))
    return vm.Tasks.from_list(rows)


def test_marginal_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `laplace_evidence` and differences, in one part and in many."""
    tasks = counts()
    density = vm.Density(count, tasks, shared=["size"])
    prior = vm.GaussianPrior.from_density(density, scales="coordinate")
    noise = torch.Generator().manual_seed(1)
    monkeypatch.setattr(Marginal, "tolerance", staticmethod(lambda dtype: 1e-11))  # for differences

    def points(values: Tensor) -> Points:
        return Points(*values.split([2, 2, 1], -1), prior.groups)

    raw = 0.5 * torch.randn(4, 5, generator=noise, dtype=FLOAT)
    known = Reference(torch.zeros(5, 2, dtype=FLOAT))
    found = Marginal(density, tasks).total(points(raw), known, gradient=True)
    assert not found.unsolved.any() and found.gradient is not None
    at = points(raw[:1])
    own = vm.GaussianPrior(at.loc[0], at.log_scale[0], prior.groups)
    wanted = vm.laplace_evidence(density, own, at.shared[0], tasks, found.known.theta)
    torch.testing.assert_close(found.losses, -wanted, rtol=1e-9, atol=1e-9)
    whole = torch.cat([found.gradient.loc, found.gradient.log_scale, found.gradient.shared], -1)
    for k in range(5):
        move = torch.zeros(5, dtype=FLOAT)
        move[k] = 1e-5
        ends = [
            Marginal(density, tasks).total(points(raw + s * move), found.known).log_evidence
            for s in (1, -1)
        ]
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, whole[:, k], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("varmeta.parts.AT_ONCE", 8)
    monkeypatch.setattr("varmeta.inference.marginal._SMALL", 0)
    parted = Marginal(density, tasks).total(points(raw), known, gradient=True)
    torch.testing.assert_close(parted.log_evidence, found.log_evidence)
    assert parted.gradient is not None
    torch.testing.assert_close(parted.gradient.shared, found.gradient.shared)


def test_a_proposal_is_normalised_and_drawn_from() -> None:
    """Importance weights of a normal law have mean 1: to 1%, of 20,000 quasi-random draws."""
    axes = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    left, right = tensor([[0.5, 1, 2], [1, 1, 1]]), tensor([[1, 1, 0.7], [2, 1, 1]])
    proposal = Proposal(
        tensor([[0, 0, 0], [1, 0, 0]]).to(FLOAT),
        axes.expand(2, 3, 3),
        left,
        right,
        tensor([1e4, 1e4]),
    )
    x = proposal.sample(generator(0))
    law = torch.distributions.MultivariateNormal(torch.zeros(3).to(FLOAT), 0.5 * axes @ axes.T)
    assert abs(float((law.log_prob(x) - proposal.log_prob(x)).exp().mean()) - 1) < 0.01
    picked = resampled(tensor([0.5, 0.25, 0.25]), 8, generator(0))
    assert picked.bincount().tolist() == [4, 2, 2]


# -- what is refused, and what is said -------------------------------------------------------------


def square(x: Tensor, y: Tensor | None = None) -> Tensor:
    """θ and −θ are the same to the data."""
    theta = pyro.sample("theta", dist.Normal(0.3, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(theta**2 + 0.0 * x[..., 0], 0.2), obs=y)


def test_other_modes_are_named() -> None:
    x, noise = torch.zeros(4, 1, dtype=FLOAT), 0.1 * tensor([1, -1, 2, -2])
    rows = [(x, middle + noise) for middle in (1.0, 1.5, 0.8, 1.2)]
    tasks = vm.Tasks.from_list(rows, names=["a", "b", "c", "d"])
    with pytest.warns(RuntimeWarning, match=r"of 4 tasks \(.* has another mode with up to"):
        vm.fit(vm.NestedLaplace(draws=100, rounds=2), vm.Density(square, tasks), tasks)


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_improper_posterior_is_refused(tasks: int) -> None:
    """σ flat, and with no hyperprior θ0 flat too: two groups do not bound σ, three do."""
    few = schools(tasks)
    density = vm.Density(school, few)
    prior = vm.GaussianPrior.from_density(density, hyperprior=False)
    with pytest.raises(ValueError, match=r"do not bound the scale of 'effect' .* improper"):
        vm.fit(vm.NestedLaplace(), density, few, prior=prior)


def refused() -> list[tuple[Callable[[vm.Density], vm.GaussianPrior], str]]:
    make = vm.GaussianPrior.from_density
    return [
        (lambda d: make(d, rank=1), "takes a diagonal prior; build it with rank=0"),
        (lambda d: make(d, bounds=(0.1, 10.0)), "knows no bounds of the scales"),
    ]


@pytest.mark.parametrize(("prior", "said"), refused())
def test_priors_that_are_refused(
    prior: Callable[[vm.Density], vm.GaussianPrior], said: str
) -> None:
    density = vm.Density(school, schools())
    with pytest.raises(ValueError, match=said):
        vm.fit(vm.NestedLaplace(), density, schools(), prior=prior(density))


def wide(x: Tensor, y: Tensor | None = None) -> Tensor:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(101, dtype=x.dtype), 1.0).to_event(1))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + weights.sum() * x[..., 0], 1.0), obs=y)


def test_too_many_shared_numbers_are_refused() -> None:
    tasks = schools()
    density = vm.Density(wide, tasks, shared=["weights"])
    with pytest.raises(
        ValueError, match=r"are 103 numbers, .* 100 at most: name fewer sites in sh"
    ):
        vm.fit(vm.NestedLaplace(), density, tasks)


def with_param(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    shift = pyro.param("shift", lambda: torch.zeros((), dtype=FLOAT))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + shift * 0.01 * x[..., 0], x[..., 0]), obs=y)


def test_a_param_without_a_prior_is_a_point_and_said_to_be() -> None:
    tasks = schools()
    result = vm.fit(vm.NestedLaplace(draws=200), vm.Density(with_param, tasks), tasks)
    assert "'shift', which has no prior, is a point" in result.reason
    kept = result.state.tensors
    assert kept["psi"].shape[1] == 2 and kept["shared"].unique().numel() == 1


def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    tasks = schools()
    stopped: list[vm.Fit] = []

    def stop(step: int, _: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    density = vm.Density(school, tasks)
    with pytest.raises(KeyboardInterrupt):
        vm.fit(vm.NestedLaplace(), density, tasks, checkpoint=path, on_step=stop)
    del stopped
    result = vm.fit(vm.NestedLaplace(steps=1, rounds=1), density, tasks)
    result.state.tensors.pop("loc")
    with pytest.raises(ValueError, match="no draws yet: the run was stopped at step"):
        result.adapt(tasks)


def test_rounds_that_do_not_suffice_are_no_convergence() -> None:
    tasks = schools()
    density = vm.Density(school, tasks)
    with pytest.warns(vm.NotConverged, match="1 rounds of draws do not cover the posterior"):
        result = vm.fit(vm.NestedLaplace(draws=40, rounds=1), density, tasks)
    assert result.converged is False and re.match(r"1 rounds .* k̂", result.reason)


def test_compare_and_arviz_know_what_is_carried() -> None:
    tasks = schools()
    density = vm.Density(school, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        strategies = [vm.NestedLaplace(draws=200), vm.LaplaceEvidence(steps=3), vm.IMAML(
            steps=2, posterior_kind="delta", learn_scale=False, folds=None
        )]  # fmt: skip
        result = vm.compare(strategies, density, tasks, draws=50)
    table = result.table.set_index("strategy")
    assert table["carries"].tolist() == ["tasks, prior", "tasks", "nothing"]
    assert table["pareto_k"].iloc[0] < 0.7 and "θ,ψ" in str(result)
    run = result.outcomes["NestedLaplace"].fit
    data = vm.to_arviz(run, draws=100)
    assert data.posterior["effect_scale"].shape == data.posterior["effect_loc"].shape == (1, 100)
    spread = data.posterior["effect"] - data.posterior["effect_loc"]
    assert abs(float(np.corrcoef(
        np.abs(spread).mean("task").values[0], data.posterior["effect_scale"].values[0]
    )[0, 1])) > 0.5  # fmt: skip  # a draw of tasks goes with its draw of the scale
    assert "effect_scale" not in data.constant_data
    new = vm.to_arviz(run, replace(tasks, names=tuple("IJKLMNOP")))
    assert "effect_scale" not in new.posterior and "effect_scale" in new.prior


def test_a_task_without_rows_has_the_spread_of_the_prior_too() -> None:
    """θ ~ N(θ0, σ²), averaged over the posterior of both: by quadrature."""
    tasks = schools()
    result = vm.fit(vm.NestedLaplace(), vm.Density(school, tasks), tasks)
    theta, _ = result.unseen(["I", "J"]).sample(1000, generator(0))
    truth, kept = eight_schools("half-normal"), result.state.tensors
    variance = truth["loc sd"][0] ** 2 + float(kept["log_scale"].exp().square().mean())
    assert abs(float(theta.mean()) - truth["loc"][0]) < 0.15 * variance**0.5
    assert abs(float(theta.std()) / variance**0.5 - 1) < 0.15
