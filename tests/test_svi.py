"""Pyro's guides on the hierarchy: densities in units, the optimum, guides written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Case, assert_close, assert_same, case_of, tasks_of
from linear_gaussian import LinearGaussian
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from varmeta.inference.base import Batch, Meta, StepInfo
from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.svi import PyroSVI, _guide
from varmeta.inference.svi_model import global_sites, model_in_units
from varmeta.models import GaussianPrior, Hyperprior
from varmeta.models.density import Density
from varmeta.seeds import generator
from varmeta.tasks import Tasks, TaskSource


def weakly(case: Case) -> GaussianPrior:
    """The case's prior with beliefs so wide that they move no optimum by more than 1e-7."""
    wide = torch.full_like(case.prior.loc, 1e4)
    return replace(case.prior, hyperprior=Hyperprior(case.prior.loc, wide, wide))


def run(strategy: PyroSVI, case: Case, **options: Any) -> Fit:
    return fit(strategy, case.density, case.tasks.support, prior=weakly(case), **options)


SMALL = case_of(LinearGaussian.random(0, 4, 2), shared_noise=True)
BELIEF = GaussianPrior.from_density(SMALL.density)


# -- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_units_change_the_density_by_their_jacobian(centred: bool) -> None:
    """And without it for points: log p of θ0, scales and φ is that of `Meta.log_prior`."""
    tasks = SMALL.tasks.support
    meta = Meta.start(SMALL.density, BELIEF)
    for number, raw in enumerate(meta.raw.values()):
        raw.detach().normal_(generator=generator(number))
    u = torch.randn(4, 2, dtype=torch.float64, generator=generator(9))
    prior, shared = meta.fixed()
    theta = BELIEF.loc + BELIEF.scale * u if centred else prior.loc + prior.scale * u
    data = global_sites(meta) | {"theta_units" if centred else "z": u}

    def log_density(point: bool) -> Tensor:
        model = model_in_units(SMALL.density, BELIEF, tasks, centred=centred, point_globals=point)
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace()
        assert torch.allclose(trace.nodes["_RETURN"]["value"], theta)
        return trace.log_prob_sum()

    rows = -SMALL.density.negative_log_likelihood(theta, tasks, shared).sum()
    units = (
        u.numel() / 2 * BELIEF.scale.log().sum()
        if centred
        else u.numel() / 2 * prior.scale.log().sum()
    )
    at_points = rows + prior.log_prob(theta).sum() + units + meta.log_prior()
    assert_close(log_density(True), at_points, 1e-12)
    noise = SMALL.density.constrain_shared(shared)["noise"]
    jacobian = BELIEF.scale.log().sum() + prior.log_scale.sum() + noise.log()
    jacobian = jacobian + SMALL.density.shared_scale.log().sum()
    assert_close(log_density(False), at_points + jacobian, 1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_loss_is_the_joint_objective_at_the_same_draws(samples: int) -> None:
    """KL and expectation by draws: log q − log N(θ; θ0, Σ) + f, minus log p(θ0, scales, φ)."""
    strategy = PyroSVI(point_globals=True, centred=True, samples=samples)
    tasks = SMALL.tasks.support
    state = strategy.init(SMALL.density, BELIEF, tasks, generator(0))
    for number, leaf in enumerate(_guide(state)):
        leaf.detach().normal_(generator=generator(number))
    loc, sd = (
        next(t for n, t in state.tensors.items() if part in n).detach().clone()
        for part in (".locs.", ".scales.")
    )
    theta, raw = strategy._draw(state, samples, generator(7))
    info = strategy.step(SMALL.density, state, Batch(tasks, torch.arange(4), 4), generator(7))
    meta = Meta(BELIEF, SMALL.density, {name: value[0] for name, value in raw.items()})
    q = torch.distributions.Normal(
        BELIEF.loc + BELIEF.scale * loc, BELIEF.scale * torch.nn.functional.softplus(sd)
    )
    losses = SMALL.density.negative_log_likelihood(theta, tasks, meta.shared)
    losses = losses + q.log_prob(theta).sum(-1) - meta.prior.log_prob(theta)
    assert_close(info.loss, losses.mean() - meta.log_prior() / 4, 1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_particles_are_runs_side_by_side(centred: bool) -> None:
    """In Pyro's plate of particles, each with a θ0, scales and φ of its own, or all with one."""
    model = model_in_units(SMALL.density, BELIEF, SMALL.tasks, centred=centred, point_globals=False)
    single = poutine.trace(model).get_trace()
    names = [n for n, v in single.nodes.items() if v["type"] == "sample" and not v["is_observed"]]
    several: dict[str, Tensor] = {}
    for number, name in enumerate(n for n in names if n != "tasks"):
        shape = single.nodes[name]["value"].shape
        lead = (5,) if name in ("z", "theta_units") else (5, 1)
        several[name] = torch.randn(*lead, *shape, dtype=torch.float64, generator=generator(number))
    for given in (None, "loc_units", "shared_noise_units"):
        data = several if given is None else several | {given: several[given][0, 0]}
        plate = pyro.plate("particles", 5, dim=-2)
        trace = poutine.trace(poutine.condition(plate(model), data=data)).get_trace()
        trace.compute_log_prob()
        total = sum(
            node["log_prob"].expand(5, -1).sum(-1)
            for node in trace.nodes.values()
            if "log_prob" in node and node["log_prob"].dim()
        )
        for k in range(5):
            one = {
                n: v if n == given else v[k] if n in ("z", "theta_units") else v[k, 0]
                for n, v in data.items()
            }
            alone = poutine.trace(poutine.condition(model, data=one)).get_trace()
            assert_close(total[k], alone.log_prob_sum(), 1e-12)  # type: ignore[index]
            theta = trace.nodes["_RETURN"]["value"]
            assert_close(theta[k], alone.nodes["_RETURN"]["value"], 1e-12)


def test_units_of_measurement_do_not_matter() -> None:
    """Reaction times in ms or in s: the same run, up to the rounding of float32 prior widths."""

    def make(unit: float) -> tuple[Density, Tasks]:
        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            level = pyro.sample("level", dist.Normal(0.25 * unit, 0.1 * unit))
            drift = pyro.sample("drift", dist.Normal(0.0, 0.02 * unit))
            with pyro.plate("rows", len(x)):
                mean = level + drift * x[:, 0]
                return pyro.sample("y", dist.Normal(mean, 0.05 * unit), obs=y)

        x = torch.randn(3, 5, 1, dtype=torch.float64, generator=generator(0))
        y = 0.3 + 0.05 * torch.randn(3, 5, dtype=torch.float64, generator=generator(1))
        tasks = Tasks.from_list([(x[i], unit * y[i]) for i in range(3)])
        return Density(model, tasks, shared=["drift"]), tasks

    for centred in (False, True):
        strategy = PyroSVI(centred=centred, steps=40, draws=5)
        seconds, thousandths = (fit(strategy, *make(unit)) for unit in (1.0, 1000.0))
        assert_close(thousandths.prior.loc / 1000, seconds.prior.loc, 1e-5)
        assert_close(thousandths.shared / 1000, seconds.shared, 1e-5)
        assert_close(thousandths.posterior().mean / 1000, seconds.posterior().mean, 1e-5)


# -- what a run converges to ----------------------------------------------------------------------


def test_points_and_a_diagonal_guide_have_the_joint_optimum() -> None:
    """That of `JointVariational` (tests/test_joint.py holds it to the same oracle).

    Each of the T·D means is a noisy gradient's walk: pulled with strength 1 in units of its sd by
    an ELBO whose θ-gradient has about unit variance per draw, here 4 of them, at a last learning
    rate that falls to 0. Its bound is a second-order quantity and so the sharper test: with 42
    parameters off by 0.1 sd, 42 · 0.1²/2 = 0.2 nats in all would be missing.
    """
    drawn = LinearGaussian.random(0)
    problem = drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale + 0.3)
    optimum, case = problem.gaussian_optimum(), case_of(problem)
    strategy = PyroSVI(
        point_globals=True, centred=True, steps=500, learning_rate=0.1, samples=4, draws=2
    )
    done = run(strategy, case)
    assert np.abs((done.prior.loc.numpy() - optimum.theta0) / optimum.scale).max() < 0.05
    assert np.abs(done.prior.scale.numpy() / optimum.scale - 1).max() < 0.05
    loc, sd = (
        next(t for n, t in done.state.tensors.items() if part in n).detach()
        for part in (".locs.", ".scales.")
    )
    means = (case.prior.loc + case.prior.scale * loc).numpy()
    sds = (case.prior.scale * torch.nn.functional.softplus(sd)).numpy()
    best = np.sqrt(np.diagonal(optimum.covs, axis1=1, axis2=2))
    assert np.abs((means - optimum.means) / best).max() < 0.2
    assert np.abs(np.log(sds / best)).max() < 0.15
    there = problem.at(theta0=done.prior.loc.numpy(), log_scale=done.prior.log_scale.numpy())
    excess = there.gaussian_joint(means, sds**2) - optimum.value
    assert -1e-9 < excess < 0.2


def test_a_full_gaussian_guide_is_the_exact_posterior_given_the_globals() -> None:
    """1000 draws: four standard errors of a mean are 0.13 sd, of a covariance 0.18 sd² (√2 of it
    on the diagonal). Added is 0.1 for the guide's own stochastic optimisation."""
    problem = LinearGaussian.random(1, 3, 2)
    case = case_of(problem)
    strategy = PyroSVI(AutoMultivariateNormal, adapt_steps=1000, learning_rate=0.05, draws=1000)
    state = strategy.init(case.density, weakly(case), case.tasks.support, generator(0))
    posterior = strategy.adapt(case.density, state, case.tasks.support, generator(1))
    theta, _ = posterior.sample(1000, generator(0))
    for i in range(3):
        exact = problem.posterior_cov(i)
        sd = np.sqrt(np.diag(exact))
        draws = theta[:, i].numpy()
        assert np.abs((draws.mean(0) - problem.theta_star(i)) / sd).max() < 0.23
        assert np.abs((np.cov(draws.T) - exact) / np.outer(sd, sd)).max() < 0.28


def test_adapting_holds_the_globals_and_leaves_the_run_alone() -> None:
    strategy = PyroSVI(steps=5, adapt_steps=5, draws=7)
    done = fit(strategy, SMALL.density, SMALL.tasks.support)
    before = done.state.state_dict()
    new = tasks_of(LinearGaussian.random(8, 3, 2)).support
    posterior = done.adapt(new)
    assert_same(done.state.state_dict(), before)
    theta, shared = posterior.sample(7, generator(0))
    assert theta.shape == (7, 3, 2) and posterior.names == new.names
    assert_close(shared, done.shared.expand(7, 3, 1), 1e-12)
    drawn = done.posterior().sample(7, generator(0))[1]
    assert drawn.shape == (7, 4, 1) and len(drawn.unique()) == 7  # one φ a draw


# -- guides ---------------------------------------------------------------------------------------


def by_hand(model: Callable[[], Tensor]) -> Callable[[], None]:
    """What `AutoNormal` is for the θ_i."""
    shape = poutine.trace(model).get_trace().nodes["theta_units"]["value"].shape

    def guide() -> None:
        zero = torch.zeros(shape, dtype=torch.float64)
        loc = pyro.param("mine.locs", zero)
        sd = pyro.param("mine.scales", zero + 0.1, constraint=constraints.softplus_positive)
        with pyro.plate("tasks", shape[0], dim=-1):
            pyro.sample("theta_units", dist.Normal(loc, sd).to_event(1))

    return guide


@pytest.mark.parametrize("at_once", [False, True])
def test_a_guide_written_by_hand_is_the_autoguide_that_it_copies(at_once: bool) -> None:
    tasks = SMALL.tasks.support
    strategy = PyroSVI(
        point_globals=True,
        centred=True,
        steps=6,
        samples=2,
        adapt_steps=3,
        draws=3,
        vectorise=at_once,
    )
    ours, theirs = (
        fit(replace(strategy, guide=guide), SMALL.density, tasks) for guide in (by_hand, AutoNormal)
    )
    assert_close(ours.history["loss"], theirs.history["loss"], 1e-12)
    for a, b in (
        (ours.posterior(), theirs.posterior()),
        (ours.adapt(tasks.unsplit), theirs.adapt(tasks.unsplit)),
    ):
        assert_close(a.mean, b.mean, 1e-12)


def everything(model: Callable[[], Tensor]) -> Callable[[], None]:
    """All sites, and z given θ0: a dependence that no autoguide above knows."""
    nodes = poutine.trace(model).get_trace().nodes

    def guide() -> None:
        drawn = {}
        for name in ("loc_units", "scale_units", "shared_noise_units"):
            start = torch.zeros_like(nodes[name]["value"])
            loc = pyro.param(f"{name} loc", start)
            drawn[name] = pyro.sample(name, dist.Normal(loc, 0.1).to_event(loc.dim()))
        shape = nodes["z"]["value"].shape
        slope = pyro.param("slope", torch.zeros(shape, dtype=torch.float64))
        with pyro.plate("tasks", shape[0], dim=-1):
            pyro.sample("z", dist.Normal(slope * drawn["loc_units"], 0.5).to_event(1))

    return guide


@pytest.mark.parametrize("at_once", [False, True])
def test_a_guide_of_everything_adapts_to_new_tasks_too(at_once: bool) -> None:
    strategy = PyroSVI(everything, steps=40, samples=2, adapt_steps=5, draws=5, vectorise=at_once)
    done = fit(strategy, SMALL.density, SMALL.tasks)
    loss = done.history["loss"]
    assert loss.iloc[-10:].mean() < loss.iloc[:10].mean()
    new = tasks_of(LinearGaussian.random(8, 3, 2))
    assert done.adapt(new.unsplit).mean.shape == (3, 2)


@pytest.mark.parametrize(
    "guide",
    [AutoIAFNormal, partial(AutoIAFNormal, num_transforms=2), AutoLowRankMultivariateNormal],
)
def test_flows_and_low_rank_guides_run_and_resume(guide: Any, tmp_path: Path) -> None:
    """A flow's random permutations are not parameters; they come from the seed."""
    strategy = PyroSVI(guide, steps=30, samples=2, adapt_steps=3, draws=5)
    whole = fit(strategy, SMALL.density, SMALL.tasks)
    assert whole.history["loss"].iloc[-5:].mean() < whole.history["loss"].iloc[:5].mean()
    assert whole.posterior().mean.dtype == torch.float64
    assert whole.adapt(SMALL.tasks.unsplit).mean.shape == (4, 2)

    def stop(step: int, info: StepInfo) -> None:
        if step == 10:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(strategy, SMALL.density, SMALL.tasks, checkpoint=path, on_step=stop)
    resumed = fit(strategy, SMALL.density, SMALL.tasks, checkpoint=path)
    assert_same(resumed.state.state_dict(), whole.state.state_dict())
    assert_same(resumed.posterior().mean, whole.posterior().mean)


# -- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [False, True])
def test_adapting_within_a_run_takes_the_guide_as_it_stands(point: bool) -> None:
    """Its mean of θ0, which new tasks begin at; `meta` is as it was at the start.

    The mean of 10,000 draws with a standard deviation of 1.3 is off by .06 once in 10,000 times.
    """
    strategy = PyroSVI(point_globals=point, steps=21, learning_rate=0.3, adapt_steps=0, draws=10000)
    tasks = SMALL.tasks.support
    state = strategy.init(SMALL.density, BELIEF, tasks, generator(0))
    batch = Batch(tasks, torch.arange(4), 4)
    for step in range(20):
        strategy.step(SMALL.density, state, batch, generator(0, step))
        state.step += 1
    before = state.state_dict()
    within = strategy.adapt(SMALL.density, state, tasks, generator(1)).mean
    assert_same(state.state_dict(), before)
    assert not bool(state.meta.raw["loc"].any())
    name = "AutoDelta" if point else "AutoNormal.locs"
    units = state.tensors[f"guide {name}.loc_units"].detach()
    assert float(units.abs().min()) > 0.1  # at the prior it would be 0
    assert_close(within, (BELIEF.loc + BELIEF.scale * units).expand(4, 2), 0.06)


# -- refusals -------------------------------------------------------------------------------------


def without_theta(model: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: None


def one_task_only(model: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda model: 3, r"guide test_.*<lambda> must return a guide.*got 3"),
        (without_theta, r"without_theta has the sites .*'loc_units': .*the model .*'z': \(4, 2\)"),
        (one_task_only, r"'z': \(1, 2\).*the model .*'z': \(4, 2\)"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(guide: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("test_.*<", ".*<")):
        fit(PyroSVI(guide, point_globals=True), SMALL.density, SMALL.tasks)


def counts_from_the_left(model: Callable[[], Tensor]) -> Callable[[], Tensor]:
    shape = poutine.trace(model).get_trace().nodes["z"]["value"].shape

    def guide() -> None:
        draw = pyro.sample("all", dist.Normal(torch.zeros(shape), 1.0).to_event(2), infer=AUXILIARY)
        with pyro.plate("tasks", shape[0], dim=-1):
            pyro.sample("z", dist.Delta(draw[: shape[0]], event_dim=1))

    return guide


AUXILIARY = {"is_auxiliary": True}


def test_a_guide_that_cannot_draw_at_once_is_refused_where_it_should() -> None:
    strategy = PyroSVI(counts_from_the_left, point_globals=True, steps=1, samples=2, draws=2)
    fit(strategy, SMALL.density, SMALL.tasks)
    with pytest.raises(ValueError, match=r"two draws at once, .*'z': \(2, 2, 4, 2\).*vectorise=F"):
        fit(replace(strategy, vectorise=True), SMALL.density, SMALL.tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"guide": 3}, "guide must be"), ({"samples": 0}, "samples"), ({"draws": 1}, "draws")],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyroSVI(**options)


def test_what_has_no_hierarchy_is_refused() -> None:
    for prior, message in (
        (GaussianPrior.from_density(SMALL.density, hyperprior=False), "no hyperprior"),
        (GaussianPrior.from_density(SMALL.density, rank=1), "diagonal prior"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(PyroSVI(), SMALL.density, SMALL.tasks, prior=prior)
    with pytest.raises(ValueError, match="all tasks"):
        fit(PyroSVI(), SMALL.density, SMALL.tasks, batch_size=2)
    with pytest.raises(ValueError, match="endless"):
        PyroSVI().prepare(TaskSource(lambda g: SMALL.tasks), 0)


def test_a_strategys_text_has_no_addresses() -> None:
    """A checkpoint is recognised by it in another process."""
    for guide in (lambda model: AutoNormal(model), partial(AutoNormal, init_scale=0.2), by_hand):
        assert " at 0x" not in repr(PyroSVI(guide)) and " at 0x" not in PyroSVI(guide).name
    assert repr(PyroSVI(partial(AutoNormal, init_scale=0.2))) != repr(PyroSVI())
    assert PyroSVI(point_globals=True).name == "PyroSVI (AutoNormal, point globals)"
