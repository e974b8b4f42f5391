"""MAML and its kin on the linear-Gaussian problem, where θ_K is affine in θ0 and by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from adjoint_problems import assert_slopes, slopes
from density_cases import numbers
from helpers import FLOAT, Case, assert_close, case_of, leaves_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.inference.base import Batch, State
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.maml import FOMAML, MAML, MetaSGD, Reptile
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import GradientDescent
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

SIZES = np.array([0.01, 0.03, 0.02])
STEPS = 4


@pytest.fixture(params=[0, 1, 2])
def problem(request: pytest.FixtureRequest) -> LinearGaussian:
    return LinearGaussian.random(request.param, 5, 3)


@dataclass(frozen=True)
class ByHand:
    """K steps θ ← θ − a(Hθ − b + Λ(θ − θ0)) on task i, and g_i at their end, in NumPy.

    By the mean, a is divided by the task's number of rows.
    """

    problem: LinearGaussian
    sizes: np.ndarray
    with_prior: bool
    reduction: str = "sum"

    def end(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """θ_K `[D]`, and dθ_K/dθ0 `[D, D]`: (I − aA)^K, and aΛ's share if the prior pulls."""
        p = self.problem
        pull = np.diag(p.precision) * self.with_prior
        hessian, moment = p.hessian(i), p.designs[i].T @ p.targets[i] / p.noise2
        rows = len(p.targets[i]) if self.reduction == "mean" else 1
        a, eye = np.diag(self.sizes) / rows, np.eye(p.dim)
        theta, jacobian = p.theta0, eye
        for _ in range(STEPS):
            theta = theta - a @ (hessian @ theta - moment + pull @ (theta - p.theta0))
            jacobian = (eye - a @ (hessian + pull)) @ jacobian + a @ pull
        return theta, jacobian

    def loss(self) -> float:
        return sum(
            self.problem.query_loss(i, self.end(i)[0]) for i in range(self.problem.num_tasks)
        )

    def gradient(self, first_order: bool = False) -> np.ndarray:
        """d loss / dθ0 `[D]`; with the Hessian factors dropped if `first_order`."""
        p, total = self.problem, np.zeros(self.problem.dim)
        for i, (x, y) in enumerate(zip(p.query_designs, p.query_targets, strict=True)):
            theta, jacobian = self.end(i)
            slope = x.T @ (x @ theta - y) / p.noise2
            total += slope if first_order else jacobian.T @ slope
        return total


def steps(sizes: Any = SIZES) -> GradientDescent:
    size = sizes if isinstance(sizes, float) else tensor(sizes)
    return GradientDescent(size, STEPS, tolerance=0, reduction="sum", clip=None)


def gradient(strategy: MAML, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Σ g_i(θ_i^K), and its gradient in θ0, log scales and φ (0 where there is none)."""
    prior, shared, leaves = leaves_of(case)
    losses, _ = strategy.losses(case.density, prior, shared, case.tasks)
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    return losses.sum().detach(), list(grads)


def whole(case: Case) -> Batch:
    return Batch(case.tasks, torch.arange(len(case.tasks)), len(case.tasks))


def begun(strategy: MetaGradient, case: Case) -> State:
    return strategy.init(case.density, case.prior, case.tasks, generator(0))


# -- MAML, FOMAML ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_maml_is_the_product_of_its_steps(
    problem: LinearGaussian, with_prior: bool, checkpoint: int | None, reduction: Any
) -> None:
    """Of plain steps, by the mean and by the sum over rows."""
    exact = ByHand(problem, SIZES, with_prior, reduction)
    few = replace(steps(), reduction=reduction)
    strategy = MAML(minimiser=few, with_prior=with_prior, checkpoint=checkpoint)
    loss, (d_loc, d_scale, _) = gradient(strategy, case_of(problem))
    assert_close(loss, exact.loss(), 1e-12)
    assert_close(d_loc, exact.gradient(), 1e-11)
    assert bool((d_scale != 0).any()) is with_prior


@pytest.mark.parametrize("with_prior", [False, True])
def test_fomaml_is_maml_without_the_hessian(problem: LinearGaussian, with_prior: bool) -> None:
    """The same θ_K, so the same loss; Σ ∇g_i(θ_i^K) for its gradient."""
    exact = ByHand(problem, SIZES, with_prior)
    loss, (d_loc, d_scale, _) = gradient(
        FOMAML(minimiser=steps(), with_prior=with_prior), case_of(problem)
    )
    assert_close(loss, exact.loss(), 1e-12)
    assert_close(d_loc, exact.gradient(first_order=True), 1e-11)
    assert not bool(d_scale.any())


def test_scales_and_noise_have_their_gradient_through_the_steps(problem: LinearGaussian) -> None:
    """In the log scales with the prior, in a shared noise with and without it."""
    case = case_of(problem, shared_noise=True)
    at = {"log_scale": case.prior.log_scale, "shared": case.shared}
    for with_prior in (False, True):
        strategy = MAML(minimiser=steps(), with_prior=with_prior)

        def value(log_scale: Tensor, shared: Tensor, strategy: MAML = strategy) -> Tensor:
            prior = replace(case.prior, log_scale=log_scale)
            return strategy.losses(case.density, prior, shared, case.tasks)[0].sum()

        _, (_, d_scale, d_shared) = gradient(strategy, case)
        wanted = slopes(value, at, ["log_scale", "shared"][not with_prior :], 1e-3)
        assert_slopes({"log_scale": d_scale, "shared": d_shared}, wanted, 1e-7)


def test_long_runs_with_the_prior_are_implicit() -> None:
    """The step is the reciprocal of a bound on the curvature; 1e-7: ε^(2/3) times κ."""
    drawn = LinearGaussian.random(2, 5, 3)
    problem = drawn.at(log_noise=0.5, log_scale=drawn.log_scale - 0.3)
    case = case_of(problem)
    top = max(np.linalg.eigvalsh(problem.hessian(i)).max() for i in range(5))
    size = float(1 / (top + problem.precision.max()))
    minimiser = GradientDescent(size, 3000, reduction="sum")
    loss, (d_loc, d_scale, _) = gradient(MAML(minimiser=minimiser, with_prior=True), case)
    assert_close(loss, problem.meta(), 1e-7)
    assert_close(d_loc, problem.meta_grad().theta0, 1e-7)
    assert_close(d_scale, problem.meta_grad().log_scale, 1e-7)


def test_adapting_takes_the_steps_of_training(problem: LinearGaussian) -> None:
    case = case_of(problem)
    for with_prior in (False, True):
        strategy = MAML(minimiser=steps(), with_prior=with_prior)
        found = strategy.adapt(
            case.density, begun(strategy, case), case.tasks.support, generator(0)
        )
        exact = ByHand(problem, SIZES, with_prior)
        assert_close(found.mean, np.stack([exact.end(i)[0] for i in range(5)]), 1e-12)


# -- Meta-SGD -------------------------------------------------------------------------------------


def test_metasgd_has_the_gradient_of_its_step_sizes(problem: LinearGaussian) -> None:
    """In the log step sizes, by differences of the NumPy steps; θ0's is MAML's at these sizes."""
    case = case_of(problem)
    strategy = MetaSGD(minimiser=steps(0.02))
    state = begun(strategy, case)
    with torch.no_grad():
        state.meta.raw["log_step"] += torch.log(tensor(SIZES) / 0.02)
    losses, _ = strategy.task_losses(case.density, state, whole(case), generator(0))
    wanted = [state.meta.raw["log_step"], state.meta.raw["loc"]]
    d_step, d_loc = torch.autograd.grad(losses.sum(), wanted)

    def at(log_step: np.ndarray) -> float:
        return ByHand(problem, np.exp(log_step), False).loss()

    width, centre = 1e-4, np.log(SIZES)
    difference = [(at(centre + width * e) - at(centre - width * e)) / 2e-4 for e in np.eye(3)]
    assert_close(d_step, np.array(difference), 1e-5)
    assert_close(d_loc, ByHand(problem, SIZES, False).gradient() * case.prior.scale.numpy(), 1e-11)


def test_metasgd_moves_its_step_sizes_down_that_gradient(problem: LinearGaussian) -> None:
    """Adam's first step is the learning rate against the sign; far too small steps only grow."""
    case = case_of(problem)
    strategy = MetaSGD(minimiser=steps(0.02), learning_rate=0.01)
    state = begun(strategy, case)
    losses, _ = strategy.task_losses(case.density, state, whole(case), generator(0))
    (grad,) = torch.autograd.grad(losses.sum(), state.meta.raw["log_step"])
    strategy.step(case.density, state, whole(case), generator(0))
    assert_close(state.meta.raw["log_step"], -0.01 * grad.sign(), 1e-5)


def test_metasgd_learns_which_coordinate_to_adapt() -> None:
    """Tasks differ in the first of two coordinates alone: its step grows over the second's."""
    design = torch.randn(30, 6, 2, dtype=FLOAT, generator=generator(1))
    theta = torch.randn(30, 2, dtype=FLOAT, generator=generator(2)) * tensor([2.0, 0.0])
    noise = torch.randn(30, 6, dtype=FLOAT, generator=generator(3))
    tasks = Tasks.from_list(
        list(zip(design, (design @ theta[..., None])[..., 0] + noise, strict=True))
    )
    density = Density(line, tasks.split(0.5), shared=[])
    few = GradientDescent(0.06, 3, tolerance=0)
    strategy = MetaSGD(minimiser=few, steps=40, learning_rate=0.1)
    tasks = tasks.split(0.5)
    state = strategy.init(density, GaussianPrior.from_density(density), tasks, generator(0))
    first = last = 0.0
    for step in range(40):
        state.step = step
        last = strategy.step(density, state, Batch(tasks, torch.arange(30), 30), generator(0)).loss
        first = first or last
    grown = state.meta.raw["log_step"].detach()
    assert float(grown[0]) > 0.5 > float(grown[1]) and last < first


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=FLOAT), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ theta, 1.0), obs=y)


# -- Reptile --------------------------------------------------------------------------------------


def ends(problem: LinearGaussian, with_prior: bool = False) -> np.ndarray:
    """θ_i^K `[T, D]` on all rows, which is what Reptile adapts to."""
    merged = merge(problem)
    return np.stack([ByHand(merged, SIZES, with_prior).end(i)[0] for i in range(5)])


def merge(problem: LinearGaussian) -> LinearGaussian:
    """Query rows as more support."""
    xs = zip(problem.designs, problem.query_designs, strict=True)
    ys = zip(problem.targets, problem.query_targets, strict=True)
    return replace(
        problem,
        designs=tuple(np.concatenate(pair) for pair in xs),
        targets=tuple(np.concatenate(pair) for pair in ys),
    )


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("with_prior", [False, True])
def test_reptile_moves_towards_the_tasks(
    problem: LinearGaussian, rate: float, with_prior: bool
) -> None:
    """θ0 + ε · mean_i(θ_i^K − θ0) at the first step, whatever the scales; ε = 1 goes to the mean.
    Flat hyperprior."""
    case = case_of(problem)
    strategy = Reptile(minimiser=steps(), learning_rate=rate, with_prior=with_prior)
    state = begun(strategy, case)
    strategy.step(case.density, state, whole(case), generator(0))
    mean = ends(problem, with_prior).mean(0)
    assert_close(state.meta.prior.loc, problem.theta0 + rate * (mean - problem.theta0), 1e-12)
    assert torch.equal(state.meta.prior.log_scale, case.prior.log_scale)


def test_reptile_halves_its_rate_half_way_through_the_last_quarter(problem: LinearGaussian) -> None:
    """ε(1 + cos π/2)/2, after ε in the first three."""
    case = case_of(problem)
    strategy = Reptile(minimiser=steps(), learning_rate=0.8, steps=8)
    state = begun(strategy, case)
    state.step = 7
    strategy.step(case.density, state, whole(case), generator(0))
    mean = ends(problem).mean(0)
    assert_close(state.meta.prior.loc, problem.theta0 + 0.4 * (mean - problem.theta0), 1e-12)


def test_reptile_with_a_prior_descends_the_moreau_envelope() -> None:
    """Run to convergence, Σ_i ½‖(θ0 − θ_i*)/s‖² has the gradient Λ Σ(θ0 − θ_i*) of Σ E_i(θ_i*)."""
    problem = merge(LinearGaussian.random(3, 5, 3))
    case = case_of(problem)
    top = max(np.linalg.eigvalsh(problem.hessian(i)).max() for i in range(5))
    size = float(1 / (top + problem.precision.max()))
    minimiser = GradientDescent(size, 3000, reduction="sum")
    strategy = Reptile(minimiser=minimiser, with_prior=True)
    state = begun(strategy, case)
    losses, _ = strategy.task_losses(
        case.density, state, replace(whole(case), tasks=case.tasks.support), generator(0)
    )
    (grad,) = torch.autograd.grad(losses.sum(), state.meta.raw["loc"])
    # d/d raw = s · d/dθ0, s the scales of the prior: the units that the optimiser sees
    assert_close(grad, problem.amortised_grad().theta0 * case.prior.scale.numpy(), 1e-8)


def test_reptile_moves_the_shared_noise_down_the_tasks_losses(problem: LinearGaussian) -> None:
    """Adam's first step: its rate, against the sign of d Σ f_i(θ_i^K)/dφ at fixed θ_i^K."""
    case = case_of(problem, shared_noise=True)
    strategy = Reptile(minimiser=steps(), shared_learning_rate=0.03)
    state = begun(strategy, case)
    strategy.step(case.density, state, whole(case), generator(0))
    start = case.density.shared_init
    merged = merge(problem).at(log_noise=float(start))
    theta = np.stack([ByHand(merged, SIZES, False).end(i)[0] for i in range(5)])
    shared = start.clone().requires_grad_()
    energy = TaskEnergy(case.density, case.tasks.unsplit, shared)
    loss = energy(tensor(theta)).mean() - case.density.shared_log_prior(shared) / 5
    (grad,) = torch.autograd.grad(loss, shared)
    assert_close(state.meta.raw["shared"], -0.03 * grad.sign(), 1e-5)


# -- ANIL: only some sites adapt ------------------------------------------------------------------


def body_and_head(x: Tensor, y: Tensor | None = None) -> Tensor:
    body = pyro.sample("body", dist.Normal(torch.zeros(2, 2, dtype=FLOAT), 1.0).to_event(2))
    head = pyro.sample("head", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(torch.tanh(x @ body) @ head, 0.5), obs=y)


def test_anil_adapts_the_head_and_learns_the_body() -> None:
    tasks = Tasks.from_list([(numbers(6, 2, seed=i), numbers(6, seed=9 + i)) for i in range(4)])
    tasks = tasks.split(0.5, seed=1)
    density = Density(body_and_head, tasks, shared=["body"])
    assert [s.name for s in density.sites] == ["head"] and density.shared_dim == 4
    prior = GaussianPrior.from_density(density, hyperprior=False)
    strategy = MAML(minimiser=steps(0.02))
    at = {"loc": 0.5 * numbers(2, seed=5), "shared": numbers(4, seed=6)}

    def value(loc: Tensor, shared: Tensor) -> Tensor:
        losses, _ = strategy.losses(density, replace(prior, loc=loc), shared, tasks)
        return losses.sum()

    leaves = {name: t.clone().requires_grad_() for name, t in at.items()}
    grads = torch.autograd.grad(value(**leaves), list(leaves.values()))
    grads = dict(zip(at, grads, strict=True))
    assert_slopes(grads, slopes(value, at, list(at), 1e-3), 1e-8)
    # By hand: the steps on the head alone, the body a constant in them.
    with torch.no_grad():
        hidden = torch.tanh(tasks.support.inputs @ at["shared"].reshape(2, 2))
        theta = at["loc"].expand(4, 2)
        for _ in range(STEPS):
            error = (hidden @ theta[..., None])[..., 0] - tasks.support.targets
            error = torch.where(tasks.support.mask, error, 0.0)
            theta = theta - 0.02 * (hidden.mT @ error[..., None])[..., 0] / 0.25
    state = strategy.init(density, replace(prior, loc=at["loc"]), tasks, generator(0))
    with torch.no_grad():
        state.meta.raw["shared"] += (at["shared"] - density.shared_init) / density.shared_scale
    found = strategy.adapt(density, state, tasks.support, generator(0))
    assert_close(found.mean, theta, 1e-12)
    assert_close(found.shared, at["shared"], 1e-12)
    strategy.step(density, state, Batch(tasks, torch.arange(4), 4), generator(0))
    assert bool((state.meta.shared != at["shared"]).all()), "the body is learned across tasks"


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MAML, FOMAML, MetaSGD])
def test_scales_are_not_learned_without_the_prior(kind: type[MAML]) -> None:
    with pytest.raises(ValueError, match="learn_scale=True needs with_prior=True"):
        kind(learn_scale=True)
    assert kind(learn_scale=True, with_prior=True).learn_scale


@pytest.mark.parametrize("with_prior", [False, True])
def test_reptile_does_not_learn_scales(with_prior: bool) -> None:
    with pytest.raises(ValueError, match="learn_scale"):
        Reptile(learn_scale=True, with_prior=with_prior)
