"""Joint variational optimisation against exact answers: empirical Bayes, EM, and the collapse.

With the cubature rule the bound of a linear-Gaussian problem has no noise, so that a run can be
held against the oracle to many digits, whether the q_i are solved or descend by Adam.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, Case, assert_close, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import Density, Fit, GaussianPrior, JointVariational, Reset, Tasks, fit, prox
from varmeta.inference.base import Batch, Meta
from varmeta.inference.closed_form import add_moments, maximise, no_moments
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.families import Family, GaussianQ
from varmeta.inference.free_energy import free_energy
from varmeta.inference.table import new_table
from varmeta.models import Hyperprior
from varmeta.posterior import Gaussian
from varmeta.seeds import generator

CPU = torch.device("cpu")
# By Adam, without noise; the tolerance is so small that only the limit ends it.
EXACT = JointVariational(
    q="diagonal",
    q_update="gradient",
    expectation="cubature",
    steps=1000,
    learning_rate=0.1,
    tolerance=1e-9,
)
SOLVED = JointVariational(tolerance=1e-6)  # every q_i to its best in each step


def away(seed: int, num_tasks: int = 6, dim: int = 3) -> LinearGaussian:
    """A problem whose prior starts away from where its data were drawn."""
    drawn = LinearGaussian.random(seed, num_tasks, dim)
    return drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale + 0.3)


def run(strategy: JointVariational, case: Case) -> Fit:
    return fit(strategy, case.density, case.tasks.support, prior=case.prior)


def covariances(posterior: Any) -> Tensor:
    assert isinstance(posterior, Gaussian)
    if posterior.scale.dim() == 3:
        return posterior.scale @ posterior.scale.mT
    out = (posterior.scale**2).diag_embed()
    return out if posterior.factor is None else out + posterior.factor @ posterior.factor.mT


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [
        (SOLVED, 1e-6),
        (replace(SOLVED, prior_update="closed_form"), 1e-4),
        (replace(EXACT, q="full", prior_update="gradient"), 1e-5),
        (replace(EXACT, q="full", prior_update="closed_form"), 1e-5),
    ],
    ids=["quasi-newton", "solved closed_form", "gradient", "closed_form"],
)
def test_full_q_is_empirical_bayes(strategy: JointVariational, tolerance: float) -> None:
    """θ0, every scale, every posterior mean and covariance, and the evidence itself."""
    problem = away(2)
    case = case_of(problem)
    done = run(strategy, case)
    exact = problem.gaussian_optimum(full=True)
    assert exact.converged and not exact.collapsed.any()
    there = problem.at(theta0=exact.theta0, log_scale=np.log(exact.scale))
    assert_close(done.prior.loc, exact.theta0, tolerance)
    assert_close(done.prior.scale, exact.scale, tolerance)
    cov = np.stack([there.posterior_cov(i) for i in range(6)])
    fresh = [done.adapt(case.tasks.support)] if strategy.q == "auto" else []
    for posterior in (done.posterior(), *fresh):
        assert_close(posterior.mean, there.theta_stars(), tolerance)
        assert_close(covariances(posterior), cov, tolerance)
    assert_close(done.history["loss"].iloc[-1] * 6, -there.log_marginal(), 1e-8)
    assert list(done.history["step"]) == list(range(1, len(done.history) + 1))
    assert done.converged is (strategy.q == "auto")


@pytest.mark.parametrize("update", ["gradient", "closed_form"])
def test_diagonal_q_is_its_closed_form(update: str) -> None:
    problem = away(2)
    done = run(replace(EXACT, prior_update=update), case_of(problem))  # type: ignore[arg-type]
    exact = problem.gaussian_optimum()
    assert exact.converged and not exact.collapsed.any()
    assert_close(done.prior.loc, exact.theta0, 1e-5)
    assert_close(done.prior.scale, exact.scale, 1e-5)
    assert_close(done.posterior().mean, exact.means, 1e-5)
    assert_close(covariances(done.posterior()), exact.covs, 1e-5)


def test_diagonal_plus_one_column_is_full_in_two_dimensions() -> None:
    problem = away(4, dim=2)
    exact = problem.gaussian_optimum(full=True)
    assert exact.converged and not exact.collapsed.any()
    done = run(replace(EXACT, q="low_rank", rank=1), case_of(problem))
    assert_close(done.prior.scale, exact.scale, 1e-4)
    assert_close(done.posterior().mean, exact.means, 1e-4)
    assert_close(covariances(done.posterior()), exact.covs, 1e-3)
    assert_close(done.history["loss"].iloc[-1] * 6, exact.value, 1e-6)


def test_whitened_has_the_same_optimum() -> None:
    problem = away(5)
    exact = problem.gaussian_optimum()
    done = run(replace(EXACT, parametrisation="whitened"), case_of(problem))
    assert_close(done.prior.loc, exact.theta0, 1e-2)
    assert_close(done.prior.scale, exact.scale, 1e-2)
    assert_close(done.history["loss"].iloc[-1] * 6, exact.value, 1e-5)


HYPER = {
    "quasi-newton": (SOLVED, 1e-5),
    "solved closed_form": (replace(SOLVED, prior_update="closed_form"), 1e-4),
    "gradient": (replace(EXACT, q="full"), 1e-4),
    "closed_form": (replace(EXACT, q="full", prior_update="closed_form"), 1e-4),
}


@pytest.mark.parametrize(
    ("way", "learn_scale"), [*((way, True) for way in HYPER), ("quasi-newton", False)]
)
def test_a_hyperprior_counts_once(way: str, learn_scale: bool) -> None:
    """The optimum is stationary in θ0 and the log scales, the hyperprior's part included."""
    strategy, tolerance = HYPER[way]
    problem = away(1, num_tasks=8, dim=2)
    case = case_of(problem)
    belief = Hyperprior(
        tensor([0.3, -0.2]), tensor([0.2, 1.0]), tensor([0.5] if learn_scale else [0.5, 2.0])
    )
    prior = replace(case.prior, hyperprior=belief)
    if learn_scale:  # one scale for both coordinates
        prior = replace(prior, log_scale=tensor([0.0]), groups=torch.zeros(2, dtype=torch.long))
    done = run(replace(strategy, learn_scale=learn_scale), replace(case, prior=prior))
    loc, log_scale = (t.clone().requires_grad_() for t in (done.prior.loc, done.prior.log_scale))
    learned = done.prior.moved(loc, log_scale, None)
    posterior = done.posterior()
    assert isinstance(posterior, Gaussian)
    q = GaussianQ(posterior.mean, factor=posterior.scale)
    total = q.kl(learned).sum() - learned.hyper_log_prob()
    slopes = torch.autograd.grad(total, [loc, log_scale])
    size = torch.autograd.grad(learned.hyper_log_prob(), [loc, log_scale])
    assert (slopes[0].abs() < tolerance * size[0].abs()).all()
    if learn_scale:
        assert (slopes[1].abs() < tolerance * size[1].abs()).all()


# -- minibatches ----------------------------------------------------------------------------------


def test_minibatches_of_tasks_and_rows_reach_the_same_optimum() -> None:
    """200 tasks, 20 a step, half of the rows: θ0 to 0.1 σ, the scales to 10%, two coordinates."""
    problem = away(3, num_tasks=200, dim=2)
    case = case_of(problem)
    strategy = JointVariational(
        q="diagonal",
        steps=1500,
        tolerance=0.01,
        learning_rate=0.05,
        samples=4,
        batch_rows=3,
        prior_update="gradient",
    )
    done = fit(strategy, case.density, case.tasks.support, prior=case.prior, batch_size=20)
    exact = problem.gaussian_optimum()
    assert np.abs((done.prior.loc.numpy() - exact.theta0) / exact.scale).max() < 0.1
    assert np.abs(done.prior.scale.numpy() / exact.scale - 1).max() < 0.1


def test_minibatches_of_tasks_and_solved_q_reach_the_closed_forms_optimum() -> None:
    """200 tasks, 20 a step, sums kept over all: to a hundredth of a standard error, without noise.

    Sums over the batch alone would jump by √10 of them in every step.
    """
    problem = away(3, num_tasks=200, dim=2)
    case = case_of(problem)
    strategy = JointVariational(prior_update="closed_form", steps=100)
    done = fit(strategy, case.density, case.tasks.support, prior=case.prior, batch_size=20)
    exact = problem.gaussian_optimum(full=True)
    assert exact.converged
    away_by = (done.prior.loc.numpy() - exact.theta0) / exact.scale * 200**0.5
    assert np.abs(away_by).max() < 0.01
    assert np.abs(np.log(done.prior.scale.numpy() / exact.scale)).max() * 400**0.5 < 0.01


def test_a_minibatch_of_rows_is_unbiased() -> None:
    """Every pair of rows enumerated by many draws: mean of the weighted sums within 4 standard
    errors of the sum over all rows (6 tasks; false alarm 4e-4)."""
    case = case_of(LinearGaussian.random(0))
    tasks, theta = case.tasks.support, tensor(np.ones((6, 3)))
    exact = case.density.negative_log_likelihood(theta, tasks)
    noise, sums = generator(3), []
    for _ in range(2000):
        part, weight = tasks.minibatch(2, noise)
        assert part.mask.shape[1] <= 2 and torch.equal(part.num_rows, tasks.num_rows.clamp(max=2))
        sums.append(weight * case.density.negative_log_likelihood(theta, part))
    values = torch.stack(sums)
    error = values.std(0) / len(values) ** 0.5
    few = tasks.num_rows <= 2  # nothing is left out there
    assert torch.allclose(values.mean(0)[few], exact[few])
    assert ((values.mean(0) - exact).abs()[~few] < 4 * error[~few]).all()


KEEPING = {
    "resets": JointVariational(
        q="diagonal", prior_update="closed_form", steps=40, resets=Reset(7, fraction=0.5)
    ),
    "solved": JointVariational(prior_update="closed_form", steps=40),
}


@pytest.mark.parametrize("way", KEEPING)
def test_moments_kept_from_visits_are_those_of_the_table(way: str) -> None:
    """After any sequence of batches and resets the running sums are those of the visited rows."""
    strategy = KEEPING[way]
    case = case_of(LinearGaussian.random(1, num_tasks=10))
    tasks = case.tasks.support
    strategy = strategy.settled(case.density, whole=False)
    state = strategy.init(case.density, case.prior, tasks, generator(0))
    for step in range(30):
        index = torch.randperm(8, generator=generator(1, step))[:3].sort().values  # 8, 9: never
        strategy.step(
            case.density, state, Batch(tasks.select(index), index, 10), generator(2, step)
        )
        state.step += 1
    kept = {name: t.clone() for name, t in state.tensors.items() if name.startswith("moment")}
    strategy._count_again(state)
    assert 0 < kept["moment_count"] <= 8
    for name, value in kept.items():
        torch.testing.assert_close(value, state.tensors[name], rtol=1e-10, atol=1e-10)


# -- the gradient of every bound ------------------------------------------------------------------


def logistic(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ w + bias), obs=y)


def logistic_case() -> Case:
    noise = generator(5)
    pairs = []
    for rows in (4, 7, 2):
        x = torch.randn(rows, 2, generator=noise, dtype=FLOAT)
        pairs.append((x, (torch.rand(rows, generator=noise) < 0.5).to(FLOAT)))
    tasks = Tasks.from_list(pairs)
    density = Density(logistic, tasks, shared=["bias"])
    return Case(density, tasks, GaussianPrior.from_density(density, rank=1), tensor([0.3]))


@pytest.mark.parametrize("family", ["delta", "diagonal", "low_rank", "full"])
@pytest.mark.parametrize("parametrisation", ["plain", "whitened"])
def test_gradients_are_those_of_finite_differences(family: Any, parametrisation: Any) -> None:
    """In θ0, the scales, the low-rank factor, φ, and every column of every q, noise held fixed."""
    case = logistic_case()
    strategy = JointVariational(
        q=family, rank=1, parametrisation=parametrisation, q_update="gradient"
    )
    rows_of = Family(family, 2, 1 if family == "low_rank" else 0)
    rows = 0.3 * torch.randn(3, rows_of.num_columns, generator=generator(1), dtype=FLOAT)
    meta = Meta.start(case.density, case.prior, learn_scale=family != "delta")
    noise = torch.randn(4, 3, 3, generator=generator(2), dtype=FLOAT)
    names = list(meta.raw)

    def total(rows: Tensor, *raw: Tensor) -> Tensor:
        moved = Meta(meta.origin, meta.density, dict(zip(names, raw, strict=True)))
        q = strategy._q(moved, moved.prior, rows)
        points = noise[..., : q.noise_dim] if q.noise_dim else None
        losses = free_energy(case.density, moved.prior, moved.shared, case.tasks, q, points)
        return losses.sum() - moved.log_prior()

    leaves = [rows, *(0.1 * torch.ones_like(t) for t in meta.raw.values())]
    inputs = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(total, inputs, eps=1e-6, atol=1e-6)


def test_with_shift_every_q_follows_theta0() -> None:
    case = case_of(LinearGaussian.random(0))
    tasks, step = case.tasks.support, 0.7
    moved = {}
    plain = JointVariational(q="diagonal")
    for open_ in (replace(plain, shift=True), plain):
        strategy = open_.settled(case.density, whole=True)
        state = strategy.init(case.density, case.prior, tasks, generator(0))
        strategy.step(case.density, state, Batch(tasks, torch.arange(6), 6), generator(1))
        means = []
        for _ in range(2):
            means.append(strategy.posterior(case.density, state, tasks, generator(0)).mean)
            with torch.no_grad():
                state.meta.raw["loc"] += step
        moved[strategy.shift] = means[1] - means[0]
    torch.testing.assert_close(moved[True], (step * case.prior.scale).expand(6, -1))
    assert not moved[False].any()


# -- why scales are not learned with point posteriors ---------------------------------------------


def coordinate_ascent(between: float, start: float, rows: int, sweeps: int) -> float:
    """σ² after sweeps of joint MAP over (θ, θ0, σ²): θ_i by `prox`, then θ0 and σ² in closed form.

    Two tasks of `rows` unit-noise observations, the variance of whose task means is `between`.
    """

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    away = math.sqrt(between)
    x = torch.zeros(rows, 1, dtype=FLOAT)
    tasks = Tasks.from_list([(x, x[:, 0] - away), (x, x[:, 0] + away)])
    density = Density(model, tasks)
    prior = GaussianPrior.create(torch.zeros(1, dtype=FLOAT), math.sqrt(start))
    meta = Meta.start(density, prior, learn_scale=False, learn_loc=False)
    theta = torch.zeros(2, 1, dtype=FLOAT)
    for _ in range(sweeps):
        energy = TaskEnergy(density, tasks, meta.shared, meta.prior)
        with torch.no_grad():
            theta, _ = prox(energy, theta)
        sums = no_moments(meta)
        add_moments(sums, meta, GaussianQ(theta), 1.0)
        maximise(sums, meta, 2, loc=True, scale=True)
    return float(meta.prior.scale) ** 2


def test_joint_map_collapses_where_chen_et_al_say() -> None:
    """Below S = 4/N from anywhere, above it from below the unstable fixed point; else the biased
    value ½(S − 2/N + √(S(S − 4/N))), not the consistent S − 1/N."""
    rows = 4  # N
    for between in (1.5 / rows, 3.6 / rows):
        assert coordinate_ascent(between, start=10 * between, rows=rows, sweeps=400) < 1e-6
    between = 6 / rows
    root = math.sqrt(between * (between - 4 / rows))
    low, high = (0.5 * (between - 2 / rows + sign * root) for sign in (-1, 1))
    assert coordinate_ascent(between, start=0.98 * low, rows=rows, sweeps=200) < 1e-6
    for start in (1.02 * low, high, 10 * high):
        reached = coordinate_ascent(between, start=start, rows=rows, sweeps=200)
        assert abs(reached / high - 1) < 1e-6
    assert high < 0.8 * (between - 1 / rows)


def test_the_table_takes_as_many_numbers_as_said() -> None:
    for family in (Family("delta", 3), Family("diagonal", 3), Family("low_rank", 3, 2)):
        row = family.row_of(
            GaussianPrior.create(torch.zeros(3), 1.0), torch.zeros(3), torch.ones(3)
        )
        table = new_table(row, 5)
        assert sum(t.numel() for t in table.values()) == 5 * (3 * family.num_columns + 1)
