"""Each task's best full Gaussian: the rule of points, the solver, and the bound that it reaches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import torch
from helpers import FLOAT, assert_close, case_of, tensor, widened
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import Density, GaussianPrior, Tasks
from varmeta.inference.families import GaussianQ
from varmeta.inference.free_energy import cubature, free_energy
from varmeta.inference.natural import Rule, Solved, laplace_start, quadrature, solve
from varmeta.seeds import generator

LIKE = torch.zeros(1, dtype=FLOAT)
DEGREE = {1: 21, 2: 7}

# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_weights_means_and_second_moments_are_those_of_a_standard_normal(
    dim: int, dtype: torch.dtype
) -> None:
    """To 1e-12 in double precision, and to the rounding of single precision there."""
    rule = quadrature(dim, torch.zeros(1, dtype=dtype))
    assert rule.points.dtype == rule.weights.dtype == dtype
    assert rule.points.shape == (len(rule.weights), dim)
    points, weights = rule.points.double(), rule.weights.double()
    allowed = 1e-12 if dtype == torch.float64 else 5e-6
    assert abs(float(weights.sum()) - 1) < allowed
    assert float((weights @ points).abs().max()) < allowed
    second = points.T @ (weights[:, None] * points)
    assert float((second - torch.eye(dim, dtype=FLOAT)).abs().max()) < allowed


@pytest.mark.parametrize("dim", [3, 7, 12])
def test_where_it_is_no_product_every_odd_moment_is_0(dim: int) -> None:
    """The points are antithetic and have one weight: every polynomial of degree 3 is exact."""
    rule = quadrature(dim, LIKE)
    assert len(rule.points) == max(32, 4 * dim)
    half = len(rule.points) // 2
    assert torch.equal(rule.points[:half], -rule.points[half:])
    assert_close(rule.weights, torch.full_like(rule.weights, 1 / len(rule.weights)), 1e-14)


@pytest.mark.parametrize("dim", [1, 2])
def test_degree_of_exactness(dim: int) -> None:
    """Every monomial up to the degree said: Π (p_k − 1)!! for even powers, 0 for odd ones."""
    rule = quadrature(dim, LIKE)
    for powers in itertools.product(range(DEGREE[dim] + 1), repeat=dim):
        if sum(powers) > DEGREE[dim]:
            continue
        found = float(rule.weights @ (rule.points ** tensor(powers)).prod(-1))
        odd = any(p % 2 for p in powers)
        exact = 0.0 if odd else float(math.prod(math.prod(range(p - 1, 0, -2)) for p in powers))
        size = float(rule.weights @ (rule.points ** tensor(powers)).prod(-1).abs())
        assert abs(found - exact) < 1e-12 * max(size, 1.0), powers


def test_one_rule_is_the_same_each_time() -> None:
    torch.manual_seed(1)
    first = quadrature(5, LIKE)
    torch.manual_seed(2)
    assert torch.equal(first.points, quadrature(5, LIKE).points)


# -- linear-Gaussian tasks: exact ------------------------------------------------------------------


def priors(dim: int) -> dict[str, GaussianPrior]:
    loc, scale = torch.linspace(-1, 1, dim, dtype=FLOAT), torch.linspace(0.3, 2, dim, dtype=FLOAT)
    factor = torch.randn(dim, 2, generator=generator(3), dtype=FLOAT)
    return {
        "diagonal": GaussianPrior.create(loc, scale),
        "low rank": GaussianPrior.create(loc, scale, factor=factor),
        "narrow": GaussianPrior.create(loc, 1e-3 * scale),
        "wide": GaussianPrior.create(loc, 1e3 * scale),
    }


def exact_posterior(problem: LinearGaussian, prior: GaussianPrior) -> tuple[np.ndarray, np.ndarray]:
    """Means `[T, D]` and covariances `[T, D, D]` by dense algebra."""
    own = np.linalg.inv(prior.covariance().numpy())
    means, covs = [], []
    for x, y in zip(problem.designs, problem.targets, strict=True):
        cov = np.linalg.inv(own + x.T @ x / problem.noise2)
        covs.append(cov)
        means.append(cov @ (own @ prior.loc.numpy() + x.T @ y / problem.noise2))
    return np.stack(means), np.stack(covs)


def at_prior(prior: GaussianPrior, count: int) -> tuple[Tensor, Tensor]:
    tril = torch.linalg.cholesky(prior.covariance())
    return prior.loc.expand(count, -1).clone(), tril.expand(count, -1, -1).clone()


def cubature_rule(dim: int) -> Rule:
    points = cubature(dim, FLOAT, torch.device("cpu"))
    return Rule(points, torch.full_like(points[:, 0], 1 / len(points)))


@pytest.mark.parametrize("name", ["diagonal", "low rank", "narrow", "wide"])
@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_linear_gaussian_tasks_are_solved_exactly(dim: int, name: str) -> None:
    """In two iterations at most from Laplace's start, whatever the rule of degree 3; from the prior
    in as many as it takes to narrow a hundredfold at a time."""
    problem = LinearGaussian.random(4, num_tasks=5, dim=dim)
    case, prior = case_of(problem), priors(dim)[name]
    tasks = case.tasks.support
    means, covs = exact_posterior(problem, prior)
    sds = np.sqrt(np.diagonal(covs, axis1=1, axis2=2))
    mean, tril, _ = laplace_start(case.density, prior, case.shared, tasks)
    rule = quadrature(dim, LIKE)
    found = {
        "laplace": solve(case.density, prior, case.shared, tasks, mean, tril, rule),
        "prior": solve(case.density, prior, case.shared, tasks, *at_prior(prior, 5), rule),
        "cubature": solve(case.density, prior, case.shared, tasks, mean, tril, cubature_rule(dim)),
    }
    for start, solved in found.items():
        assert bool(solved.converged.all()), start
        assert np.abs((solved.mean.numpy() - means) / sds).max() < 1e-5, start
        ours = (solved.tril @ solved.tril.mT).numpy()
        assert np.abs((ours - covs) / (sds[:, :, None] * sds[:, None, :])).max() < 1e-5, start
        assert not solved.tril.triu(1).any(), start
        assert int(solved.iterations.max()) <= (4 if start == "prior" else 2), start


# -- other likelihoods: the minimum of F -----------------------------------------------------------


def counts_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Poisson((x @ theta).exp()), obs=y)


def choices_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ theta), obs=y)


def own_noise_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Each task has a noise of its own; two coordinates."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0, dtype=x.dtype), 1.0))
    s = pyro.sample("s", dist.LogNormal(torch.tensor(0.0, dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a * x[:, 1], s), obs=y)


MODELS: dict[str, Callable[..., Tensor]] = {
    "counts": counts_model,
    "choices": choices_model,
    "own noise": own_noise_model,
}


def problem_of(kind: str, wide: float = 1.0) -> tuple[Density, Tasks, GaussianPrior]:
    """Four tasks of 2 to 9 rows."""
    draws, pairs = generator(11), []
    for rows in (2, 3, 5, 9):
        x = torch.ones(rows, 2, dtype=FLOAT)
        x[:, 1] = torch.randn(rows, generator=draws, dtype=FLOAT)
        theta = torch.randn(2, generator=draws, dtype=FLOAT)
        value = x @ theta
        noise = torch.randn(rows, generator=draws, dtype=FLOAT)
        y = {
            "counts": torch.poisson(value.exp(), generator=draws),
            "choices": (noise < value).to(FLOAT),
            "own noise": theta[0] * x[:, 1] + 0.7 * noise,
        }[kind]
        pairs.append((x, y))
    tasks = Tasks.from_list(pairs)
    density = Density(MODELS[kind], tasks)
    factor = wide * tensor([[0.5], [-0.4]])
    prior = GaussianPrior.create(tensor([0.2, -0.1]), tensor([wide, 0.8 * wide]), factor=factor)
    return density, tasks, prior


def solved(density: Density, tasks: Tasks, prior: GaussianPrior) -> Solved:
    shared = torch.zeros(0, dtype=FLOAT)
    mean, tril, _ = laplace_start(density, prior, shared, tasks)
    return solve(density, prior, shared, tasks, mean, tril, quadrature(prior.dim, LIKE))


def bounds(density: Density, tasks: Tasks, prior: GaussianPrior, q: GaussianQ) -> Tensor:
    """F `[T]` by the rule."""
    rule = quadrature(prior.dim, LIKE)
    points = rule.points[:, None].expand(-1, len(tasks), -1)
    shared = torch.zeros(0, dtype=FLOAT)
    return free_energy(density, prior, shared, tasks, q, points, rule_weights=rule.weights)


every_kind = pytest.mark.parametrize("kind", MODELS)


@every_kind
@pytest.mark.parametrize("wide", [0.3, 1.0, 3.0])
def test_the_gradient_of_the_bound_vanishes(kind: str, wide: float) -> None:
    """By autograd, in the mean and in L, in units in which q is N(0, I)."""
    density, tasks, prior = problem_of(kind, wide)
    found = solved(density, tasks, prior)
    assert bool(found.converged.all())
    mean, tril = (t.clone().requires_grad_() for t in (found.mean, found.tril))
    total = bounds(density, tasks, prior, GaussianQ(mean, factor=tril.tril())).sum()
    for_mean, for_tril = torch.autograd.grad(total, [mean, tril])
    assert float((found.tril.mT @ for_mean[..., None]).abs().max()) < 1e-5
    assert float((found.tril.mT @ for_tril).tril().abs().max()) < 1e-5


@every_kind
def test_no_minimisation_from_elsewhere_gets_lower(kind: str) -> None:
    """SciPy's BFGS on the mean and L of each task, from the prior and from narrow q around θ0."""
    density, tasks, prior = problem_of(kind)
    found = solved(density, tasks, prior)
    least = bounds(density, tasks, prior, found.q).detach().numpy()
    dim, (row, column) = prior.dim, torch.tril_indices(prior.dim, prior.dim)
    for i in range(len(tasks)):
        one = tasks.select([i])

        def value(v: np.ndarray, one: Tasks = one) -> tuple[float, np.ndarray]:
            leaf = tensor(v).requires_grad_()
            entries = torch.where(row == column, leaf[dim:].exp(), leaf[dim:])
            tril = torch.zeros(dim, dim, dtype=FLOAT).index_put((row, column), entries)
            q = GaussianQ(leaf[None, :dim], factor=tril[None])
            loss = bounds(density, one, prior, q).sum()
            (grad,) = torch.autograd.grad(loss, leaf)
            return float(loss.detach()), grad.numpy()

        for width in (1.0, 0.05):
            log_sd = np.where(row == column, math.log(width), 0.0)
            start = np.r_[prior.loc.numpy(), log_sd]
            end = scipy.optimize.minimize(
                value, start, jac=True, method="BFGS", options={"gtol": 1e-8}
            )
            assert least[i] < end.fun + 1e-9
            assert end.fun < least[i] + 1e-6, "BFGS itself has not arrived"


@every_kind
def test_where_it_starts_does_not_matter(kind: str) -> None:
    density, tasks, prior = problem_of(kind)
    here = solved(density, tasks, prior)
    shared, rule = torch.zeros(0, dtype=FLOAT), quadrature(prior.dim, LIKE)
    mean, tril = at_prior(prior, len(tasks))
    there = solve(density, prior, shared, tasks, mean + 0.5, 0.3 * tril, rule)
    assert bool(there.converged.all())
    assert_close(there.mean, here.mean, 1e-4)
    assert_close(there.tril, here.tril, 1e-4)
    again = solve(density, prior, shared, tasks, here.mean, here.tril, rule)
    assert not again.iterations.any() and torch.equal(again.mean, here.mean)


@every_kind
def test_company_and_padding_change_nothing(kind: str) -> None:
    """Alone, in company, and with rows of padding: to the solver's tolerance."""
    density, tasks, prior = problem_of(kind)
    all_of_them = solved(density, tasks, prior)
    padded = solved(density, widened(tasks, 4), prior)
    parts = [solved(density, tasks.select([i]), prior) for i in range(len(tasks))]
    for name in ("mean", "tril"):
        whole = getattr(all_of_them, name)
        assert_close(getattr(padded, name), whole, 1e-6)
        assert_close(torch.cat([getattr(part, name) for part in parts]), whole, 1e-6)


def test_single_precision_arrives_at_its_own_tolerance() -> None:
    density, tasks, prior = problem_of("choices")
    exact = solved(density, tasks, prior)
    single = replace(tasks, inputs=tasks.inputs.float(), targets=tasks.targets.float())
    narrow = GaussianPrior.create(
        prior.loc.float(),
        prior.scale.float(),
        factor=None if prior.factor is None else prior.factor.float(),
    )
    shared = torch.zeros(0)
    small = Density(choices_model, single)
    mean, tril, _ = laplace_start(small, narrow, shared, single)
    found = solve(small, narrow, shared, single, mean, tril, quadrature(2, mean))
    assert found.mean.dtype == torch.float32 and bool(found.converged.all())
    sds = (exact.tril**2).sum(-1).sqrt()
    assert float(((found.mean - exact.mean) / sds).abs().max()) < 1e-2
    assert_close(found.tril @ found.tril.mT, exact.tril @ exact.tril.mT, 1e-2)


# -- one coordinate: against the evidence ----------------------------------------------------------


def rate_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0, dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Poisson(rate.exp()), obs=y)


def rates(prior_sd: float) -> tuple[Density, Tasks, GaussianPrior]:
    data = [tensor([0.0, 1.0]), tensor([3.0, 5.0, 4.0]), tensor([900.0]), tensor([2.0] * 8)]
    tasks = Tasks.from_list([(y[:, None], y) for y in data])
    prior = GaussianPrior.create(tensor([0.0]), prior_sd)
    return Density(rate_model, tasks), tasks, prior


def log_evidence(density: Density, one: Tasks, prior: GaussianPrior, centre: float) -> float:
    """log ∫ p(y | θ) N(θ; θ0, σ²) dθ of one task, by quadrature around the posterior."""

    def joint(theta: float) -> float:
        at = tensor([[theta]])
        value = prior.log_prob(at) - density.negative_log_likelihood(at, one)
        return float(value.sum())

    top = joint(centre)
    sd = float(prior.scale[0])
    inside, _ = scipy.integrate.quad(
        lambda t: math.exp(joint(t) - top), centre - 12 * sd, centre + 3, points=[centre], limit=300
    )
    return top + math.log(inside)


def test_the_bound_lies_below_the_log_evidence_and_close_to_it() -> None:
    """A lower bound whatever the rule's points, since 11 of them average exp(θ) to 1e-6 here."""
    density, tasks, prior = rates(1.0)
    found = solved(density, tasks, prior)
    bound = -bounds(density, tasks, prior, found.q)
    for i in range(len(tasks)):
        exact = log_evidence(density, tasks.select([i]), prior, float(found.mean[i, 0]))
        assert exact - 0.02 < float(bound[i]) < exact + 1e-6


def test_tasks_whose_points_overflow_at_the_start_converge() -> None:
    """Under an sd of 10 the rule's outer points from the prior are exp(52) and exp(−52) rows; from
    an sd of 200 they are beyond what a float can hold."""
    density, tasks, prior = rates(10.0)
    shared, rule = torch.zeros(0, dtype=FLOAT), quadrature(1, LIKE)
    best = solved(density, tasks, prior)
    assert bool(best.converged.all())
    for start in (10.0, 200.0):
        mean = torch.zeros(len(tasks), 1, dtype=FLOAT)
        tril = torch.full((len(tasks), 1, 1), start, dtype=FLOAT)
        found = solve(density, prior, shared, tasks, mean, tril, rule)
        assert bool(found.converged.all())
        assert_close(found.mean, best.mean, 1e-5)
        assert_close(found.tril, best.tril, 1e-5)
    for i in range(len(tasks)):
        exact = log_evidence(density, tasks.select([i]), prior, float(best.mean[i, 0]))
        bound = -float(bounds(density, tasks, prior, best.q)[i])
        assert exact - 0.5 < bound < exact + 1e-3
