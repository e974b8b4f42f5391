"""Verifies the oracle in linear_gaussian.py by routes it does not use itself: scipy densities,
joint Gaussian conditioning, finite differences, quadrature, least squares, general minimisers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from linear_gaussian import Array, Gradient, LinearGaussian
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, norm

SHAPES = [(0, 6, 3), (1, 6, 3), (2, 9, 4), (3, 5, 1)]  # seed, tasks, dim
MODES = list(itertools.product((False, True), (False, True)))  # full, fit_noise
# Seeds for 6 tasks, dim 3: the optimum is interior in every mode; some sigma_j collapses for
# diagonal q only; some sigma_j collapses in every mode.
INTERIOR, DIAGONAL_COLLAPSE, COLLAPSE = 0, 1, 12


@pytest.fixture(params=SHAPES, ids=str)
def problem(request: pytest.FixtureRequest) -> LinearGaussian:
    """Evaluated away from the parameters the data were drawn from."""
    seed, num_tasks, dim = request.param
    drawn = LinearGaussian.random(seed, num_tasks, dim)
    rng = np.random.default_rng(100 + seed)
    return drawn.at(
        theta0=drawn.theta0 + 0.4 * rng.normal(size=dim),
        log_scale=drawn.log_scale + 0.3 * rng.normal(size=dim),
        log_noise=drawn.log_noise + 0.2,
    )


def relative_error(actual: Array | float, expected: Array | float) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == e.shape and np.all(np.isfinite(a)) and np.all(np.isfinite(e))
    return float(np.max(np.abs(a - e)) / np.max(np.abs(e)))


def check(actual: Array | float, expected: Array | float, tol: float) -> None:
    error = relative_error(actual, expected)
    assert error < tol, f"relative error {error:.2e} >= {tol:.0e}"


def differences(function: Callable[[Array], float | Array], at: Array, step: float = 2e-3) -> Array:
    """Sixth-order central differences; the differentiated coordinate is the last axis."""
    columns = []
    for direction in np.eye(len(at)) * step:
        f = {k: np.asarray(function(at + k * direction)) for k in (-3, -2, -1, 1, 2, 3)}
        columns.append(45 * (f[1] - f[-1]) - 9 * (f[2] - f[-2]) + (f[3] - f[-3]))
    return np.stack(columns, axis=-1) / (60 * step)


def shared(problem: LinearGaussian) -> Array:
    return np.concatenate([problem.theta0, problem.log_scale, [problem.log_noise]])


def moved(problem: LinearGaussian, vector: Array) -> LinearGaussian:
    dim = problem.dim
    return problem.at(
        theta0=vector[:dim], log_scale=vector[dim : 2 * dim], log_noise=float(vector[-1])
    )


def check_gradient(
    problem: LinearGaussian, objective: Callable[[LinearGaussian], float], gradient: Gradient
) -> None:
    """Each block on its own scale, so that a small block cannot hide behind a large one."""
    numeric = differences(lambda v: objective(moved(problem, v)), shared(problem))
    dim = problem.dim
    check(gradient.theta0, numeric[:dim], 1e-9)
    check(gradient.log_scale, numeric[dim : 2 * dim], 1e-9)
    check(gradient.log_noise, numeric[-1], 1e-9)


def conditioned(problem: LinearGaussian, i: int) -> tuple[Array, Array, Array, Array]:
    """Joint Gaussian of z = (theta, yq, y) conditioned on y: moments of theta, then of yq."""
    x, xq = problem.designs[i], problem.query_designs[i]
    loading = np.concatenate([np.eye(problem.dim), xq, x])
    noise = np.concatenate([np.zeros(problem.dim), np.full(len(xq) + len(x), problem.noise2)])
    joint = loading @ np.diag(np.exp(2 * problem.log_scale)) @ loading.T + np.diag(noise)
    keep, given = slice(0, problem.dim + len(xq)), slice(problem.dim + len(xq), None)
    gain = joint[keep, given] @ np.linalg.inv(joint[given, given])
    mean = (loading @ problem.theta0)[keep] + gain @ (problem.targets[i] - x @ problem.theta0)
    cov = joint[keep, keep] - gain @ joint[given, keep]
    d = problem.dim
    return mean[:d], cov[:d, :d], mean[d:], cov[d:, d:]


def kl_plus_loss(problem: LinearGaussian, i: int, mean: Array, cov: Array) -> float:
    """-entropy + E_q[f_i - log prior], the expectation by 3-point Gauss-Hermite (exact here)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    root, noise = np.linalg.cholesky(cov), np.exp(problem.log_noise)
    total = -float(multivariate_normal(mean, cov).entropy())
    for index in itertools.product(range(3), repeat=problem.dim):
        theta = mean + root @ nodes[list(index)]
        weight = np.prod(weights[list(index)] / np.sqrt(2 * np.pi))
        log_prior = np.sum(norm.logpdf(theta, problem.theta0, np.exp(problem.log_scale)))
        fit = np.sum(norm.logpdf(problem.targets[i], problem.designs[i] @ theta, noise))
        total -= float(weight * (log_prior + fit))
    return total


def profile(problem: LinearGaussian, scale2: Array, noise2: float, full: bool) -> float:
    """J minimised over q and theta0, in row space; sigma_j = 0 is allowed."""
    covs = [noise2 * np.eye(len(x)) + x @ np.diag(scale2) @ x.T for x in problem.designs]
    pairs = list(zip(problem.designs, covs, strict=True))
    lhs = sum(x.T @ np.linalg.solve(c, x) for x, c in pairs)
    rhs = sum(x.T @ np.linalg.solve(c, y) for (x, c), y in zip(pairs, problem.targets, strict=True))
    theta0, value = np.linalg.solve(lhs, rhs), 0.0
    for (x, c), y in zip(pairs, problem.targets, strict=True):
        logdet = np.linalg.slogdet(2 * np.pi * c)[1]
        if not full:
            logdet -= np.linalg.slogdet(c / noise2)[1]
            logdet += np.sum(np.log1p(scale2 * np.sum(x**2, axis=0) / noise2))
        error = y - x @ theta0
        value += 0.5 * float(error @ np.linalg.solve(c, error) + logdet)
    return value


def test_random_is_ragged_and_reproducible() -> None:
    for seed, num_tasks, dim in SHAPES:
        p, again = (LinearGaussian.random(seed, num_tasks, dim) for _ in range(2))
        sizes = [len(y) for y in p.targets]
        assert p.num_tasks == num_tasks and p.dim == dim
        assert min(sizes) == 1 and max(sizes) == 7 and len(set(sizes)) == min(num_tasks, 7)
        assert dim == 1 or min(sizes) < dim
        assert len({len(y) for y in p.query_targets}) > 1
        assert all(np.array_equal(a, b) for a, b in zip(p.designs, again.designs, strict=True))
        assert np.array_equal(shared(p), shared(again))
    assert not np.array_equal(LinearGaussian.random(0).theta0, LinearGaussian.random(1).theta0)


def test_losses_are_summed_log_densities(problem: LinearGaussian) -> None:
    rng, noise = np.random.default_rng(0), np.exp(problem.log_noise)
    for i in range(problem.num_tasks):
        theta = rng.normal(size=problem.dim)
        x, xq = problem.designs[i], problem.query_designs[i]
        fit = -np.sum(norm.logpdf(problem.targets[i], x @ theta, noise))
        query = -np.sum(norm.logpdf(problem.query_targets[i], xq @ theta, noise))
        prior = norm(problem.theta0, np.exp(problem.log_scale))
        penalty = np.sum(prior.logpdf(problem.theta0) - prior.logpdf(theta))
        check(problem.support_loss(i, theta), fit, 1e-13)
        check(problem.query_loss(i, theta), query, 1e-13)
        check(problem.penalised_loss(i, theta), fit + penalty, 1e-13)


def test_hessian_is_the_curvature_of_the_support_loss(problem: LinearGaussian) -> None:
    for i in range(problem.num_tasks):
        loss = lambda theta, i=i: problem.support_loss(i, theta)  # noqa: E731
        # A quadratic: differences are exact at any step, and a long one rounds less.
        inner = lambda theta, loss=loss: differences(loss, theta, 1.0)  # noqa: E731
        check(problem.hessian(i), differences(inner, problem.theta0, 1.0), 1e-11)


def test_theta_star_minimises_the_penalised_loss(problem: LinearGaussian) -> None:
    for i in range(problem.num_tasks):
        star = problem.theta_star(i)
        slope = differences(lambda t, i=i: problem.penalised_loss(i, t), star, 1.0)  # type: ignore[misc]
        assert np.max(np.abs(slope)) < 1e-9
        curvature = problem.hessian(i) + np.diag(problem.precision)
        assert np.min(np.linalg.eigvalsh(curvature)) > 0
        assert np.array_equal(star, problem.theta_stars()[i])


def test_posterior_and_predictive_against_joint_conditioning(problem: LinearGaussian) -> None:
    for i in range(problem.num_tasks):
        mean, cov, query_mean, query_cov = conditioned(problem, i)
        check(problem.theta_star(i), mean, 1e-11)
        check(problem.posterior_cov(i), cov, 1e-11)
        rows = norm.logpdf(problem.query_targets[i], query_mean, np.sqrt(np.diag(query_cov)))
        check(problem.log_predictive(i), rows, 1e-11)


def test_predictive_of_a_given_gaussian(problem: LinearGaussian) -> None:
    rng = np.random.default_rng(1)
    mean, variances = rng.normal(size=problem.dim), rng.uniform(0.1, 1, size=problem.dim)
    for i, xq in enumerate(problem.query_designs):
        expected = [
            norm.logpdf(y, x @ mean, np.sqrt(problem.noise2 + np.sum(x**2 * variances)))
            for x, y in zip(xq, problem.query_targets[i], strict=True)
        ]
        check(problem.log_predictive(i, mean, variances), np.array(expected), 1e-12)
        check(problem.log_predictive(i, mean, np.diag(variances)), np.array(expected), 1e-12)


def test_jacobian(problem: LinearGaussian) -> None:
    for i in range(problem.num_tasks):
        star = lambda t, i=i: problem.at(theta0=t).theta_star(i)  # noqa: E731
        check(problem.jacobian(i), differences(star, problem.theta0, 1.0), 1e-11)


def test_meta_gradient(problem: LinearGaussian) -> None:
    check_gradient(problem, LinearGaussian.meta, problem.meta_grad())
    # The same through the explicit Jacobian: dM/dtheta0 = sum_i J_i' grad g_i(theta_i*).
    chained = np.zeros(problem.dim)
    for i in range(problem.num_tasks):
        loss = lambda t, i=i: problem.query_loss(i, t)  # noqa: E731
        chained += problem.jacobian(i).T @ differences(loss, problem.theta_star(i), 1.0)
    check(problem.meta_grad().theta0, chained, 1e-11)


def test_log_marginal(problem: LinearGaussian) -> None:
    scale = np.diag(np.exp(2 * problem.log_scale))
    for i, (x, y) in enumerate(zip(problem.designs, problem.targets, strict=True)):
        cov = problem.noise2 * np.eye(len(y)) + x @ scale @ x.T
        task = problem.subset(i)
        check(task.log_marginal(), multivariate_normal(x @ problem.theta0, cov).logpdf(y), 1e-11)
        # Laplace's formula is exact here: -log marginal = E* + log|A Sigma| / 2.
        logdet = np.linalg.slogdet(np.linalg.inv(problem.posterior_cov(i)) @ scale)[1]
        check(
            -task.log_marginal(), problem.penalised_loss(i, task.theta_star(0)) + logdet / 2, 1e-11
        )
    check_gradient(problem, LinearGaussian.log_marginal, problem.log_marginal_grad())


def test_amortised_gradient(problem: LinearGaussian) -> None:
    check_gradient(problem, LinearGaussian.amortised, problem.amortised_grad())
    pull = np.sum(problem.precision * (problem.theta0 - problem.theta_stars()), axis=0)
    check(problem.amortised_grad().theta0, pull, 1e-12)


def test_subsets_add_up(problem: LinearGaussian) -> None:
    singles = [problem.subset(i) for i in range(problem.num_tasks)]
    check(sum(p.meta() for p in singles), problem.meta(), 1e-13)
    check(sum(p.log_marginal() for p in singles), problem.log_marginal(), 1e-13)
    check(sum(p.amortised() for p in singles), problem.amortised(), 1e-13)
    for name in ("meta_grad", "log_marginal_grad", "amortised_grad"):
        parts = [np.hstack(getattr(p, name)()) for p in singles]
        check(np.sum(parts, axis=0), np.hstack(getattr(problem, name)()), 1e-12)
        check_gradient(singles[0], getattr(LinearGaussian, name[:-5]), getattr(singles[0], name)())
    backwards = problem.subset(*reversed(range(problem.num_tasks)))
    assert np.array_equal(backwards.theta_stars(), problem.theta_stars()[::-1])


def test_delta_optimum(problem: LinearGaussian) -> None:
    theta0, thetas, value = problem.delta_optimum()
    num_tasks, dim = problem.num_tasks, problem.dim
    best = problem.at(theta0=theta0)
    # One stacked least-squares problem in z = (theta0, theta_1, ..., theta_T).
    rows, targets = [], []
    for i, (x, y) in enumerate(zip(problem.designs, problem.targets, strict=True)):
        fit = np.zeros((len(y), dim * (num_tasks + 1)))
        pull = np.zeros((dim, dim * (num_tasks + 1)))
        block = slice(dim * (i + 1), dim * (i + 2))
        fit[:, block] = x / np.exp(problem.log_noise)
        pull[:, block], pull[:, :dim] = (
            sign * np.diag(np.exp(-problem.log_scale)) for sign in (1, -1)
        )
        rows += [fit, pull]
        targets += [y / np.exp(problem.log_noise), np.zeros(dim)]
    design, target = np.concatenate(rows), np.concatenate(targets)
    solution = np.linalg.lstsq(design, target)[0]
    check(np.concatenate([theta0, thetas.ravel()]), solution, 1e-10)
    constants = sum(len(y) for y in problem.targets) * np.log(2 * np.pi * problem.noise2) / 2
    check(value, np.sum((design @ solution - target) ** 2) / 2 + constants, 1e-11)
    check(best.delta_joint(thetas), value, 1e-13)

    def joint(z: Array) -> float:
        return problem.at(theta0=z[:dim]).delta_joint(z[dim:].reshape(num_tasks, dim))

    found = np.concatenate([theta0, thetas.ravel()])
    assert np.max(np.abs(differences(joint, found, 1.0))) < 1e-9
    # theta0 is also the generalised least-squares estimate, and stationary for the amortised loss.
    assert np.max(np.abs(best.log_marginal_grad().theta0)) < 1e-9
    assert np.max(np.abs(best.amortised_grad().theta0)) < 1e-9


def random_q(problem: LinearGaussian, seed: int) -> tuple[Array, Array, Array]:
    """Means [T, D], variances [T, D], full covariances [T, D, D]."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(problem.num_tasks, problem.dim, problem.dim + 1))
    shape = (problem.num_tasks, problem.dim)
    return rng.normal(size=shape), rng.uniform(0.05, 2, size=shape), roots @ roots.mT


def test_gaussian_joint_against_quadrature(problem: LinearGaussian) -> None:
    means, variances, covs = random_q(problem, 2)
    diagonal = sum(
        kl_plus_loss(problem, i, means[i], np.diag(variances[i])) for i in range(problem.num_tasks)
    )
    full = sum(kl_plus_loss(problem, i, means[i], covs[i]) for i in range(problem.num_tasks))
    check(problem.gaussian_joint(means, variances), diagonal, 1e-11)
    check(problem.gaussian_joint(means, covs), full, 1e-11)


def test_gaussian_joint_bounds_the_log_marginal(problem: LinearGaussian) -> None:
    stars, variances = problem.theta_stars(), problem.best_variances()
    posterior = np.stack([problem.posterior_cov(i) for i in range(problem.num_tasks)])
    evidence = -problem.log_marginal()
    check(problem.gaussian_joint(stars, posterior), evidence, 1e-11)
    diagonal = problem.gaussian_joint(stars, variances)
    # In one dimension the diagonal family holds the posterior; otherwise the bound is strict.
    assert diagonal > evidence + 1e-3 if problem.dim > 1 else abs(diagonal - evidence) < 1e-11
    for seed in range(20):
        means, other, covs = random_q(problem, seed)
        assert problem.gaussian_joint(means, covs) > evidence
        assert problem.gaussian_joint(means, other) > diagonal
        assert problem.gaussian_joint(stars, other) > diagonal
        assert problem.gaussian_joint(stars + 0.01 * means, variances) > diagonal


def test_best_diagonal_q_is_stationary(problem: LinearGaussian) -> None:
    shape, half = problem.theta_stars().shape, problem.theta_stars().size

    def joint(z: Array) -> float:
        return problem.gaussian_joint(z[:half].reshape(shape), np.exp(z[half:].reshape(shape)))

    best = np.concatenate([problem.theta_stars().ravel(), np.log(problem.best_variances()).ravel()])
    assert np.max(np.abs(differences(joint, best, 2e-2))) < 1e-9


@pytest.mark.parametrize(("full", "fit_noise"), MODES)
@pytest.mark.parametrize("shape", [(INTERIOR, 6, 3), (0, 40, 3), (3, 5, 1)], ids=str)
def test_gaussian_optimum_is_stationary(
    shape: tuple[int, int, int], full: bool, fit_noise: bool
) -> None:
    problem = LinearGaussian.random(*shape)
    found = problem.gaussian_optimum(full=full, fit_noise=fit_noise)
    assert found.converged and not found.collapsed.any() and np.all(found.scale > 0)
    assert fit_noise or abs(found.noise / np.exp(problem.log_noise) - 1) < 1e-15
    best = problem.at(
        theta0=found.theta0, log_scale=np.log(found.scale), log_noise=float(np.log(found.noise))
    )
    covs = found.covs if full else np.einsum("tjj->tj", found.covs)
    check(best.gaussian_joint(found.means, covs), found.value, 1e-12)
    check(found.means, best.theta_stars(), 1e-11)
    check(covs, covs_at(best, full), 1e-11)
    # J in (theta0, log sigma, log s) at fixed q: with q optimal, this is the whole gradient.
    slope = differences(
        lambda v: moved(best, v).gaussian_joint(found.means, covs), shared(best), 1e-2
    )
    assert np.max(np.abs(slope if fit_noise else slope[:-1])) < 1e-9
    assert np.max(np.abs(found.slope * found.scale**2)) < 1e-9
    if full:  # empirical Bayes
        check(found.value, -best.log_marginal(), 1e-12)
        gradient = np.hstack(best.log_marginal_grad())
        assert np.max(np.abs(gradient if fit_noise else gradient[:-1])) < 1e-9


def covs_at(problem: LinearGaussian, full: bool) -> Array:
    if not full:
        return problem.best_variances()
    return np.stack([problem.posterior_cov(i) for i in range(problem.num_tasks)])


@pytest.mark.parametrize(("full", "fit_noise"), MODES)
@pytest.mark.parametrize("seed", [INTERIOR, DIAGONAL_COLLAPSE, COLLAPSE])
def test_gaussian_optimum_is_the_lowest_a_general_minimiser_finds(
    seed: int, full: bool, fit_noise: bool
) -> None:
    problem = LinearGaussian.random(seed)
    found = problem.gaussian_optimum(full=full, fit_noise=fit_noise)
    assert found.converged
    assert found.collapsed.any() == (seed == COLLAPSE or (seed == DIAGONAL_COLLAPSE and not full))

    def objective(z: Array) -> float:  # (sigma^2, log s^2), sigma^2 >= 0
        return profile(problem, z[:-1], float(np.exp(z[-1])), full)

    fixed = 2 * problem.log_noise
    bounds: Any = [(0.0, None)] * problem.dim + [(-6.0, 3.0) if fit_noise else (fixed, fixed)]
    at_found = objective(np.append(found.scale**2, 2 * np.log(found.noise)))
    check(at_found, found.value, 1e-12)
    rng, lowest = np.random.default_rng(seed), np.inf
    for _ in range(4):
        start: Any = np.append(np.exp(rng.normal(size=problem.dim)), fixed)
        options: Any = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500}
        result = minimize(objective, start, method="L-BFGS-B", bounds=bounds, options=options)
        if result.fun < lowest:
            lowest, scale2 = result.fun, result.x[:-1]
    assert abs(lowest - found.value) < 1e-8
    assert np.max(np.abs(scale2 - found.scale**2)) < 1e-3
    assert np.array_equal(scale2 < 1e-6, found.collapsed)


@pytest.mark.parametrize(("full", "fit_noise"), MODES)
def test_collapse_is_reported_as_a_limit(full: bool, fit_noise: bool) -> None:
    problem = LinearGaussian.random(COLLAPSE)
    found = problem.gaussian_optimum(full=full, fit_noise=fit_noise)
    dead = found.collapsed
    assert dead.any() and np.array_equal(found.scale == 0, dead) and np.all(found.slope[dead] > 0)
    assert np.all(found.means[:, dead] == found.theta0[dead])
    assert not found.covs[:, dead].any() and not found.covs[:, :, dead].any()
    # J falls to `value` from above as sigma_j -> 0, at first order `slope` in sigma_j^2.
    for j in np.flatnonzero(dead):
        gaps = []
        for tiny in (1e-3, 1e-4, 1e-5):
            scale = np.where(dead, 1e-9, found.scale)
            scale[j] = np.sqrt(tiny)
            near = problem.at(log_scale=np.log(scale), log_noise=float(np.log(found.noise)))
            near = near.at(theta0=near.delta_optimum()[0])
            value = near.gaussian_joint(near.theta_stars(), covs_at(near, full))
            gaps.append((value - found.value) / tiny)
        assert min(gaps) > 0
        assert abs(gaps[-1] / found.slope[j] - 1) < 0.01


@pytest.mark.parametrize("seed", range(6))
def test_optima_are_ordered(seed: int) -> None:
    """Richer q and more freedom can only lower J; the start (truth) can only be higher."""
    problem = LinearGaussian.random(seed)
    value = {mode: problem.gaussian_optimum(full=mode[0], fit_noise=mode[1]) for mode in MODES}
    assert all(found.converged for found in value.values())
    for flag in (False, True):
        assert value[True, flag].value < value[False, flag].value
        assert value[flag, True].value < value[flag, False].value
    assert value[True, False].value < -problem.log_marginal()
    start = problem.gaussian_joint(problem.theta_stars(), problem.best_variances())
    assert value[False, False].value < start
