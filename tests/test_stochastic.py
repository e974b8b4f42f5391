"""The stochastic strategy: what it learns, what it refuses, and its posteriors in ArviZ."""

from __future__ import annotations

from collections.abc import Callable

import arviz as az
import numpy as np
import pytest
import torch
from random_runs import F64, exact_gradient, flat, lines, prior_at, two_wells, wells

from varmeta import (
    SGD,
    BismutElworthyLi,
    CurvatureGated,
    Density,
    EvolutionStrategies,
    GatedPathwise,
    GaussianPrior,
    Langevin,
    Pathwise,
    PersistentES,
    Score,
    Stochastic,
    Tasks,
    fit,
    meta_gradient,
    to_arviz,
)
from varmeta.seeds import generator


def test_losses_carry_the_estimate() -> None:
    """The strategy's surrogate: its value is the mean loss, its derivative `meta_gradient`'s."""
    tasks, density = lines()
    strategy = Stochastic(Langevin(run_length=6, step_size=0.03), particles=6)
    loc = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    log_scale = torch.zeros(2, dtype=F64, requires_grad=True)
    shared = torch.tensor([0.4], dtype=F64, requires_grad=True)
    prior = GaussianPrior(loc, log_scale, torch.tensor([0, 0, 1]))
    losses, found = strategy.losses(density, prior, shared, tasks, generator(3))
    torch.testing.assert_close(losses.detach(), found.losses.mean(0))
    for i in range(len(tasks)):
        grads = torch.autograd.grad(losses[i], [loc, log_scale, shared], retain_graph=True)
        torch.testing.assert_close(torch.cat(grads), flat(found.mean)[i])


def test_parts_of_a_batch_add_up() -> None:
    """Each task draws its own noise: the same gradient however the batch is split."""
    tasks, density = lines()
    runs = [
        fit(
            Stochastic(
                SGD(run_length=4, step_size=0.03, batch_rows=1, temperature=0.5),
                steps=3,
                tasks_at_once=at_once,
            ),
            density,
            tasks,
        )
        for at_once in (None, 1)
    ]
    for name, value in runs[0].state.meta.raw.items():
        torch.testing.assert_close(value, runs[1].state.meta.raw[name], rtol=1e-9, atol=1e-12)


def test_a_memory_budget_counts_particles() -> None:
    """Four times the particles, a quarter of the tasks at once; the gradient is the same."""
    tasks, density = lines()
    many = Tasks.from_list(
        [(tasks.inputs[0], tasks.targets[0])] * 64, names=[f"t{k}" for k in range(64)]
    ).split(0.5)

    def part(particles: int) -> int:
        langevin = Langevin(run_length=3, step_size=0.01)
        strategy = Stochastic(langevin, Pathwise(), particles, steps=1, memory=1e-4)
        result = fit(strategy, density, many)
        whole = fit(Stochastic(langevin, Pathwise(), particles, steps=1), density, many)
        torch.testing.assert_close(result.prior.loc, whole.prior.loc)
        return int(result.state.cache["part"])

    assert 2 <= part(16) <= part(4) / 3.5
    assert part(4) < 64


def test_it_crosses_to_the_better_well() -> None:
    """From the wrong well the gradient of where minima lie points nowhere; that of how often does.

    θ0 starts at −0.4; the query loss wants 1.
    """
    tasks = two_wells(4)
    density = Density(wells, tasks)
    algorithm = Langevin(run_length=40, step_size=0.03, temperature=0.3)
    strategy = Stochastic(algorithm, particles=16, steps=60, learn_scale=False)
    learned = fit(strategy, density, tasks, prior=prior_at(-0.4, 1.0))
    before, _ = exact_gradient(wells, -0.4, algorithm)
    after, slope = exact_gradient(wells, float(learned.prior.loc), algorithm)
    assert float(learned.prior.loc) > 0.3 and after < before - 1 and abs(slope[0]) < 0.5


def test_the_default_suits_the_algorithm_and_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert isinstance(Stochastic().estimator_for(2), CurvatureGated)
    assert isinstance(Stochastic().estimator_for(9), Pathwise)
    assert isinstance(Stochastic(SGD()).estimator_for(9), Pathwise)
    assert isinstance(Stochastic(SGD(temperature=0.1)).estimator_for(2), CurvatureGated)
    tasks, density = lines()
    prior = GaussianPrior.from_density(density)
    got = meta_gradient(density, prior, tasks, algorithm=SGD(3, 0.01), particles=2)
    assert got.estimator.name == "Pathwise"
    with caplog.at_level("INFO", logger="varmeta"):
        fit(Stochastic(Langevin(2), steps=1), density, tasks)
    assert "Stochastic: the estimator for Langevin(run_length=2" in caplog.text
    assert "is CurvatureGated(rank=None" in caplog.text
    assert Stochastic().name == "Stochastic"
    assert Stochastic(estimator=Score()).name == "Stochastic (Score)"


def test_cost_is_counted() -> None:
    """Gradients of a task's loss: one a step and particle, two for a Hessian-vector product."""
    tasks = two_wells()
    density = Density(wells, tasks)
    algorithm = Langevin(run_length=10, step_size=0.03)

    def cost(estimator: object) -> float:
        got = meta_gradient(
            density,
            prior_at(0.1),
            tasks,
            algorithm=algorithm,
            estimator=estimator,  # type: ignore[arg-type]
            particles=6,
        )
        return got.gradients / 6

    assert cost(Score()) == 10 + 2 + 1  # a product at the start, and g
    assert cost(BismutElworthyLi()) == 10 * 3 + 1
    assert cost(CurvatureGated()) == 10 * 3 + 1
    assert cost(Pathwise()) == 10 * (1 + 3) + 1  # there and back
    assert cost(GatedPathwise(rank=1)) == 10 * (3 + 3 + 3) + 1
    assert cost(EvolutionStrategies()) == 10 + 2


@pytest.mark.parametrize("thin", [None, 3])
def test_chains_in_arviz(thin: int | None) -> None:
    """Chains are seeds. Ends of independent runs mix by construction; so do runs in one well."""
    tasks, density = lines()
    strategy = Stochastic(
        Langevin(run_length=30, step_size=0.1), steps=2, draws=400, chains=4, thin=thin
    )
    result = fit(strategy, density, tasks)
    data = to_arviz(result)
    assert dict(data.posterior.sizes)["chain"] == 4 and dict(data.posterior.sizes)["draw"] == 100
    summary = az.summary(data, var_names=["w"])
    assert (summary["r_hat"] < 1.1).all()
    most = summary["ess_bulk"].max()
    assert most > 250 if thin is None else 20 < most < 400


def test_r_hat_sees_runs_in_different_wells() -> None:
    """Cold runs that go on stay in the well that they found: R-hat says so, as it should."""
    tasks = two_wells(2)
    density = Density(wells, tasks)
    cold = Langevin(run_length=40, step_size=0.02, temperature=0.05)
    strategy = Stochastic(cold, steps=1, draws=400, chains=8, thin=2, learn_scale=False)
    result = fit(strategy, density, tasks, prior=prior_at(0.0, 1.0))
    posterior = result.adapt(tasks.support)
    summary = az.summary(to_arviz(result, tasks, posterior=posterior), var_names=["theta"])
    assert (summary["r_hat"] > 1.1).all() and summary["r_hat"].max() > 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stochastic(SGD(), Score()), "Score differentiates .* temperature is 0 in some"),
        (lambda: Stochastic(SGD(), CurvatureGated()), "CurvatureGated .* or use Pathwise"),
        (lambda: Stochastic(estimator=Score(), particles=1), "at least 2 .* Score, got 1"),
        (
            lambda: Stochastic(estimator=Score(), particles=2, antithetic=True),
            "at least 4 .* with antithetic pairs, got 2",
        ),
        (lambda: Stochastic(estimator=EvolutionStrategies(), particles=3), "must be even, got 3"),
        (lambda: Stochastic(draws=10, chains=3), "chains must divide draws, got 3 .* 10 draws"),
        (lambda: Stochastic(thin=0), "thin must be .* at least 1 or None, got 0"),
        (lambda: BismutElworthyLi(0), "horizon must be .* at least 1 or None, got 0"),
        (lambda: CurvatureGated(0), "rank must be .* at least 1 or None, got 0"),
        (lambda: CurvatureGated(slowest=0.0), "slowest must be positive .*, got 0.0"),
        (lambda: EvolutionStrategies(0.0), "width must be positive .*, got 0.0"),
        (lambda: PersistentES(windows=0), "windows must be .* at least 1, got 0"),
        (
            lambda: Stochastic(Langevin(3), PersistentES(windows=4)),
            "windows is 4, and a run has 3 steps",
        ),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_odd_antithetic_particles_are_refused() -> None:
    tasks, density = lines()
    prior = GaussianPrior.from_density(density)
    with pytest.raises(ValueError, match="antithetic particles come in pairs, got 5"):
        meta_gradient(
            density,
            prior,
            tasks,
            algorithm=Langevin(3, step_size=0.01),
            particles=5,
            antithetic=True,
        )


def test_a_task_without_support_rows_runs_on_the_prior_alone() -> None:
    """A fold of a one-row task: the law is the prior's own Ornstein–Uhlenbeck process."""
    tasks = Tasks.from_list([(torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))]).folds(2)
    density = Density(wells, tasks)
    algorithm = SGD(run_length=20, step_size=0.3, batch_rows=2, temperature=1.0)
    got = meta_gradient(density, prior_at(0.5), tasks, algorithm=algorithm, particles=20_000)
    assert abs(float(got.ends.mean()) - 0.5) < 4.5 * float(got.ends.std()) / 20_000**0.5
    variance = 1 / (1 - 0.3 / 2)  # of a stationary chain with this step
    assert float(got.ends.var()) == pytest.approx(variance, abs=4.5 * variance * np.sqrt(2 / 2e4))
