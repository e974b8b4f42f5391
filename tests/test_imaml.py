"""iMAML: its meta-gradient, what it converges to, and its posteriors, against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, leaves_of, linear_model, tasks_of, tensor
from linear_gaussian import LinearGaussian

from varmeta.inference.base import Batch
from varmeta.inference.fit import fit
from varmeta.inference.imaml import IMAML
from varmeta.inference.linear import CG
from varmeta.inference.prox import Implicit
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Gaussian
from varmeta.seeds import generator
from varmeta.tasks import Tasks, TaskSource

SHAPES = [(0, 6, 3), (1, 6, 3), (2, 9, 4), (3, 5, 1), (4, 1, 1)]  # seed, tasks, dim


@pytest.fixture(params=SHAPES, ids=str)
def problem(request: pytest.FixtureRequest) -> LinearGaussian:
    drawn = LinearGaussian.random(*request.param)
    return drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale - 0.2)


def test_meta_gradient_is_exact(problem: LinearGaussian) -> None:
    """In θ0, the log scales and the shared log noise."""
    case = case_of(problem, shared_noise=True)
    prior, shared, leaves = leaves_of(case)
    losses, info = IMAML().losses(case.density, prior, shared, case.tasks)
    grads = torch.autograd.grad(losses.sum(), leaves)
    exact = problem.meta_grad()
    assert_close(losses.sum(), problem.meta(), 1e-9)
    assert_close(grads[0], exact.theta0, 1e-8)
    assert_close(grads[1], exact.log_scale, 1e-8)
    assert_close(grads[2][0], exact.log_noise, 1e-8)
    assert bool((info.residual < 1e-10).all())


def test_without_a_query_part_query_and_support_coincide() -> None:
    """f = g: the gradient is that of Σ f_i(θ_i*), the oracle's with its support rows twice."""
    drawn = LinearGaussian.random(5)
    both = replace(drawn, query_designs=drawn.designs, query_targets=drawn.targets)
    case = case_of(both)
    prior, shared, leaves = leaves_of(case)
    losses, _ = IMAML().losses(case.density, prior, shared, case.tasks.support)
    grads = torch.autograd.grad(losses.sum(), leaves[:2])
    assert_close(grads[0], both.meta_grad().theta0, 1e-8)
    assert_close(grads[1], both.meta_grad().log_scale, 1e-8)


def test_a_step_goes_down_that_gradient() -> None:
    """Adam's first step is the learning rate against the gradient's sign, in the prior's units."""
    problem = LinearGaussian.random(6).at(theta0=np.array([2.0, -3.0, 1.0]))
    case = case_of(problem)
    strategy = IMAML(learning_rate=0.01)
    state = strategy.init(case.density, case.prior, case.tasks, generator(0))
    info = strategy.step(case.density, state, Batch(case.tasks, torch.arange(6), 6), generator(0))
    exact = problem.meta_grad()
    for name, grad in (("loc", exact.theta0), ("log_scale", exact.log_scale)):
        assert_close(state.meta.raw[name], -0.01 * np.sign(grad), 1e-5)
    assert_close(info.loss, problem.meta() / 6, 1e-9)  # flat hyperprior
    assert info.gradients > 0 and info.stats["residual"].shape == (6,)


def test_a_batch_counts_the_prior_once_for_all_tasks() -> None:
    """Averaged over all batches of two, the loss of a step is that of all tasks."""
    case = case_of(LinearGaussian.random(7), shared_noise=True)
    prior = GaussianPrior.from_density(case.density)  # with a hyperprior
    losses = []
    for index in [[0, 1], [2, 3], [4, 5], list(range(6))]:
        strategy = IMAML()
        state = strategy.init(case.density, prior, case.tasks, generator(0))
        batch = Batch(case.tasks.select(index), torch.tensor(index), 6)
        losses.append(strategy.step(case.density, state, batch, generator(0)).loss)
    assert_close(np.mean(losses[:3]), losses[3], 1e-9)


def test_a_run_ends_where_the_meta_gradient_vanishes() -> None:
    """The query loss is quadratic in θ0; at its minimum the oracle's gradient is 0."""
    problem = LinearGaussian.random(8, num_tasks=12)
    start = problem.at(theta0=problem.theta0 + np.array([1.0, -1.0, 0.5]))
    case = case_of(start)
    done = fit(
        IMAML(steps=150, learning_rate=0.1, learn_scale=False),
        case.density,
        case.tasks,
        prior=case.prior,
    )
    there = start.at(theta0=done.prior.loc.numpy())
    before, after = (np.abs(p.meta_grad().theta0).max() for p in (start, there))
    assert after < 1e-3 * before
    assert torch.equal(done.prior.log_scale, case.prior.log_scale)


def test_the_papers_budget_approximates_the_gradient_and_says_how_well() -> None:
    problem = LinearGaussian.random(2, 9, 4)
    case = case_of(problem)
    errors, residuals = [], []
    for products in (1, 2, 5):
        prior, shared, leaves = leaves_of(case)
        strategy = IMAML(adjoint=Implicit(CG(max_iterations=products)))
        losses, info = strategy.losses(case.density, prior, shared, case.tasks)
        grad = torch.autograd.grad(losses.sum(), leaves[0])[0]
        exact = problem.meta_grad().theta0
        errors.append(np.abs(grad.numpy() - exact).max() / np.abs(exact).max())
        residuals.append(float(info.residual.max()))
    assert residuals[0] > residuals[1] > 1e-3 > residuals[2]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_learning_scales_from_the_rows_adapted_to_is_refused() -> None:
    case = case_of(LinearGaussian.random(0))
    strategy = IMAML(folds=None)
    source = TaskSource(lambda g: case.tasks.support)
    for tasks in (case.tasks.support, source):
        with pytest.raises(ValueError, match="no query part and learn_scale"):
            strategy.prepare(tasks, 0)
    with pytest.raises(ValueError, match="no query part and learn_scale"):
        IMAML().prepare(source, 0)  # a stream has no folds
    assert strategy.prepare(case.tasks, 0) is case.tasks
    fixed = IMAML(folds=None, learn_scale=False)
    assert fixed.prepare(case.tasks.support, 0).is_split is False  # type: ignore[union-attr]


def test_folds_are_a_cross_validation() -> None:
    """Fitting unsplit tasks is fitting their folds."""
    case = case_of(LinearGaussian.random(9))
    whole, seed = case.tasks.unsplit, 3
    results = [
        fit(IMAML(steps=3), case.density, tasks, prior=case.prior, seed=seed)
        for tasks in (whole, whole.folds(5, seed=seed))
    ]
    assert torch.equal(results[0].prior.loc, results[1].prior.loc)
    assert torch.equal(results[0].prior.log_scale, results[1].prior.log_scale)
    assert results[0].posterior().names == whole.names  # the tasks, not the folds


def test_a_stream_is_learned_from() -> None:
    def draw(g: torch.Generator) -> Tasks:
        return tasks_of(LinearGaussian.random(int(torch.randint(1000, (), generator=g))))

    source = TaskSource(draw, seed=1)
    density = Density(linear_model(3, 0.5), source)
    done = fit(IMAML(steps=3), density, source)
    assert done.finished and bool((done.prior.loc != density.prior_loc).all())


# -- posteriors -----------------------------------------------------------------------------------


def test_laplace_is_the_exact_posterior_of_tasks_never_seen(problem: LinearGaussian) -> None:
    """Under the learned prior, given the support rows."""
    case = case_of(problem)
    strategy = IMAML(steps=2, posterior_kind="laplace")
    done = fit(strategy, case.density, case.tasks, prior=case.prior)
    new = LinearGaussian.random(77, 5, problem.dim)
    there = new.at(
        theta0=done.prior.loc.numpy(),
        log_scale=done.prior.log_scale.numpy(),
        log_noise=problem.log_noise,
    )
    posterior = done.adapt(tasks_of(new).support)
    assert isinstance(posterior, Gaussian) and posterior.kind == "laplace"
    assert_close(posterior.mean, there.theta_stars(), 1e-8)
    exact = np.stack([there.posterior_cov(i) for i in range(5)])
    assert_close(posterior.scale @ posterior.scale.mT, exact, 1e-8)
    assert_close(posterior.sd, np.sqrt(np.diagonal(exact, axis1=1, axis2=2)), 1e-8)


def test_posterior_of_the_training_tasks_uses_all_their_rows() -> None:
    problem = LinearGaussian.random(10)
    case = case_of(problem)
    done = fit(
        IMAML(steps=1, learning_rate=1e-12, optimiser="adam"),
        case.density,
        case.tasks,
        prior=case.prior,
    )
    rows = zip(problem.designs, problem.query_designs, strict=True)
    targets = zip(problem.targets, problem.query_targets, strict=True)
    merged = replace(
        problem,
        designs=tuple(np.concatenate(pair) for pair in rows),
        targets=tuple(np.concatenate(pair) for pair in targets),
    )
    assert_close(done.posterior().mean, merged.theta_stars(), 1e-8)


def test_delta_is_the_same_mode_without_a_spread() -> None:
    case = case_of(LinearGaussian.random(11))
    gaussian, delta = (
        fit(IMAML(steps=1, posterior_kind=kind), case.density, case.tasks, prior=case.prior).adapt(
            case.tasks.support
        )
        for kind in ("laplace", "delta")
    )  # type: ignore[misc]
    assert isinstance(delta, Delta) and torch.equal(delta.mean, gaussian.mean)
    assert float(delta.sd.abs().max()) == 0


@pytest.mark.parametrize(("dim", "kind"), [(200, "laplace"), (201, "delta")])
def test_laplace_by_default_up_to_200_coordinates(dim: int, kind: str) -> None:
    x = torch.randn(2, 3, dim, dtype=FLOAT, generator=generator(0))
    tasks = Tasks.from_list([(row, tensor([0.0, 1.0, 2.0])) for row in x])
    density = Density(linear_model(dim, 1.0), tasks)
    strategy = IMAML()
    state = strategy.init(density, GaussianPrior.from_density(density), tasks, generator(0))
    assert strategy.adapt(density, state, tasks, generator(0)).kind == kind
