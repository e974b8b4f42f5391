"""iMAML's meta-gradient is exact at any size and condition, and its error falls as theory says.

Designs with a prescribed spectrum, and NumPy's closed forms: κ is the condition number of H + Λ.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import assert_close, case_of, leaves_of, tensor
from linear_gaussian import LinearGaussian

from varmeta.inference.energy import TaskEnergy
from varmeta.inference.imaml import IMAML
from varmeta.inference.linear import CG, Cholesky, LinearSolver
from varmeta.inference.minimise import GradientDescent
from varmeta.inference.newton import NewtonCG
from varmeta.inference.nystrom import Nystrom
from varmeta.inference.prox import Detached, Implicit, prox


def spectral(seed: int, dim: int, condition: float, num_tasks: int = 2) -> LinearGaussian:
    """σ = s = 1, so that Λ = I: H_i = X_iᵀX_i has eigenvalues from 0 to κ − 1, H + Λ from 1 to κ.

    min(D, 40) rows; log-uniform in between, along directions of its own for each task. D = 1 has
    the one eigenvalue κ; κ = 1 no data at all (rows of zeros).
    """
    rng = np.random.default_rng(seed)
    rows = min(dim, 40)
    values = np.geomspace(condition, 1, rows) - 1
    designs, targets, queries, query_targets = [], [], [], []
    for _ in range(num_tasks):
        rotation, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
        x = np.sqrt(values)[:, None] * rotation.T[:rows]
        theta = rng.normal(size=dim)
        designs.append(x)
        targets.append(x @ theta + rng.normal(size=rows))
        queries.append(rng.normal(size=(3, dim)) / np.sqrt(dim))
        query_targets.append(queries[-1] @ theta + rng.normal(size=3))
    return LinearGaussian(
        tuple(designs),
        tuple(targets),
        tuple(queries),
        tuple(query_targets),
        theta0=rng.normal(size=dim),
        log_scale=np.zeros(dim),
        log_noise=0.0,
    )


def solver(kind: str, dim: int) -> LinearSolver:
    if kind == "CG":
        return CG(max_iterations=4 * dim + 100, tolerance=1e-13)
    if kind == "Nystrom":
        few = Nystrom(min(dim, 60), 1.0, sketch="gaussian")
        return CG(max_iterations=4 * dim, tolerance=1e-13, preconditioner=few)
    return Cholesky(limit=dim)


# CG needs about √κ ln(2/δ)/2 products where there are many eigenvalues: at κ = 1e6 in rounding
# that is thousands, so that there it has a preconditioner.
SOLVED = [
    *((dim, condition, "CG") for dim in (1, 10, 100) for condition in (1.0, 1e3)),
    *((dim, condition, "Cholesky") for dim in (1, 10, 100) for condition in (1.0, 1e3, 1e6)),
    *((dim, 1e6, "Nystrom") for dim in (10, 100)),
    (1000, 1.0, "CG"),
    (1000, 1e3, "CG"),
    (1000, 1e6, "Nystrom"),
]


@pytest.mark.parametrize(("dim", "condition", "kind"), SOLVED)
def test_the_meta_gradient_is_exact(dim: int, condition: float, kind: str) -> None:
    """In θ0 and the log scales, to 1e-6 of its norm: rounding times κ is 1e-10 at the worst."""
    problem = spectral(0, dim, condition)
    prior, shared, leaves = leaves_of(case := case_of(problem))
    inner = solver(kind, dim)
    minimiser = NewtonCG(max_iterations=30, tolerance=1e-12, solver=inner)
    strategy = IMAML(minimiser=minimiser, adjoint=Implicit(inner))
    losses, info = strategy.losses(case.density, prior, shared, case.tasks)
    grads = torch.autograd.grad(losses.sum(), leaves[:2])
    exact = problem.meta_grad()
    for ours, wanted in zip(grads, (exact.theta0, exact.log_scale), strict=True):
        error = np.linalg.norm(ours.numpy() - wanted)
        assert error <= 1e-6 * np.linalg.norm(wanted)
    assert_close(losses.sum(), problem.meta(), 1e-9)
    assert not bool(info.negative_curvature.any())


# -- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [3.0, 30.0, 300.0])
def test_the_error_of_inner_steps_falls_by_kappa(condition: float) -> None:
    """‖θ_k − θ*‖ ≤ r^k ‖θ0 − θ*‖, r = (κ−1)/(κ+1) at the best step 2/(1 + κ), and no faster in
    the end. The gradient for θ0 is linear in θ_k, so its error is bounded by the same, times
    ‖Λ(H+Λ)⁻¹∇²g‖ ≤ ‖∇²g‖."""
    problem = spectral(1, 10, condition)
    rate, size = (condition - 1) / (condition + 1), 2 / (1 + condition)
    case = case_of(problem)
    stars = problem.theta_stars()
    exact, distance = problem.meta_grad().theta0, np.linalg.norm(problem.theta0 - stars, axis=1)
    bend = [np.linalg.norm(x.T @ x, 2) for x in problem.query_designs]
    errors = []
    counts = [2 * round(share * condition / 2) for share in (0.7, 1.4, 2, 4)]  # r^κ is about e⁻²
    for count in counts:
        steps = GradientDescent(size, count, tolerance=0, reduction="sum", clip=None)
        prior, shared, leaves = leaves_of(case)
        energy = TaskEnergy(case.density, case.tasks.support, shared, prior)
        start = prior.loc.detach().expand(2, -1)
        theta, _ = prox(energy, start, minimiser=steps, adjoint=Detached())
        inner = np.linalg.norm(theta.numpy() - stars, axis=1)
        assert (inner <= rate**count * distance * (1 + 1e-9) + 1e-12).all()
        strategy = IMAML(minimiser=steps, adjoint=Implicit(Cholesky()))
        losses, _ = strategy.losses(case.density, prior, shared, case.tasks)
        (grad,) = torch.autograd.grad(losses.sum(), leaves[0])
        error = float(np.linalg.norm(grad.numpy() - exact))
        assert error <= rate**count * float(distance @ bend) * (1 + 1e-9) + 1e-12
        errors.append(error)
    assert all(b < a for a, b in pairwise(errors))
    seen = np.log(errors[-1] / errors[-2]) / (counts[-1] - counts[-2])
    assert abs(seen / np.log(rate) - 1) < 0.2


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_the_error_of_cg_stays_below_chebyshevs_bound(condition: float) -> None:
    """‖x_n − x‖_A ≤ 2 ((√κ−1)/(√κ+1))^n ‖x‖_A for each task's w = A⁻¹∇g; here Λ = I, so w is
    that task's share of the gradient for θ0. And D steps are enough, up to rounding."""
    problem = spectral(2, 12, condition)
    case = case_of(problem)
    rate = (np.sqrt(condition) - 1) / (np.sqrt(condition) + 1)
    matrices = [problem.hessian(i) + np.eye(12) for i in range(2)]
    exact = np.stack([problem.subset(i).meta_grad().theta0 for i in range(2)])
    size = np.sqrt([w @ a @ w for w, a in zip(exact, matrices, strict=True)])
    errors = []
    for count in (1, 2, 3, 5, 8, 12, 16):
        minimiser = NewtonCG(tolerance=1e-12, solver=Cholesky())
        adjoint = Implicit(CG(max_iterations=count, tolerance=0))
        strategy = IMAML(minimiser=minimiser, adjoint=adjoint)
        loc = case.prior.loc.clone().requires_grad_()
        shares = []
        for i in range(2):
            tasks = case.tasks.select([i])
            prior = replace(case.prior, loc=loc)
            losses, _ = strategy.losses(case.density, prior, case.shared, tasks)
            shares.append(torch.autograd.grad(losses.sum(), loc)[0].numpy())
        left = np.stack(shares) - exact
        error = np.sqrt([e @ a @ e for e, a in zip(left, matrices, strict=True)]) / size
        rounding = 1e-14 * condition
        assert (error <= 2 * rate**count + rounding).all(), count
        errors.append(float(error.max()))
    assert all(b <= a + rounding for a, b in pairwise(errors))
    assert condition > 1e5 or errors[-1] < 1e-9


def test_more_steps_and_more_products_mend_each_its_own_error() -> None:
    """The error of an approximate gradient is at most the sum of the two."""
    problem = spectral(3, 10, 30.0)
    case = case_of(problem)
    exact = problem.meta_grad().theta0

    def error(steps: int, products: int) -> float:
        prior, shared, leaves = leaves_of(case)
        strategy = IMAML(
            minimiser=GradientDescent(2 / 31, steps, tolerance=0, reduction="sum", clip=None),
            adjoint=Implicit(CG(products, tolerance=0)),
        )
        losses, _ = strategy.losses(case.density, prior, shared, case.tasks)
        (grad,) = torch.autograd.grad(losses.sum(), leaves[0])
        return float((grad - tensor(exact)).norm() / tensor(exact).norm())

    many, enough = 400, 20
    assert error(many, enough) < 1e-9
    assert error(5, enough) > 1e-3 and error(many, 2) > 1e-3
    assert error(30, enough) < error(5, enough) and error(many, 6) < error(many, 2)
