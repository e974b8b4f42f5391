"""The implicit derivative of θ* against closed forms and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import FLOAT, Case, assert_close, case_of, leaves_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.inference.energy import Energy, TaskEnergy
from varmeta.inference.linear import CG
from varmeta.inference.minimise import GradientDescent
from varmeta.inference.newton import NewtonCG
from varmeta.inference.prox import Implicit, OneStep, ProxInfo, prox

SHAPES = [(0, 6, 3), (1, 6, 3), (2, 9, 4), (3, 5, 1), (4, 1, 1)]  # seed, tasks, dim


def solve(case: Case) -> tuple[Tensor, ProxInfo, list[Tensor]]:
    """θ* of the support energies, with prior and φ as leaves."""
    prior, shared, leaves = leaves_of(case)
    energy = TaskEnergy(case.density, case.tasks.support, shared, prior)
    theta, info = prox(energy, prior.loc.detach().expand(len(case.tasks), -1))
    return theta, info, leaves


# -- the linear-Gaussian oracle -------------------------------------------------------------------


@pytest.fixture(params=SHAPES, ids=str)
def problem(request: pytest.FixtureRequest) -> LinearGaussian:
    drawn = LinearGaussian.random(*request.param)
    return drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale - 0.2)


def test_minimum_is_the_posterior_mean(problem: LinearGaussian) -> None:
    theta, info, _ = solve(case_of(problem, shared_noise=True))
    assert_close(theta, problem.theta_stars(), 1e-8)
    assert bool(info.converged.all())


def test_derivative_in_the_prior_mean(problem: LinearGaussian) -> None:
    """dθ_i*/dθ0 = (H_i + Λ)⁻¹Λ; in the scalar problem with one task too."""
    theta, _, (loc, _, _) = solve(case_of(problem))
    for i in range(problem.num_tasks):
        rows = [
            torch.autograd.grad(theta[i, d], loc, retain_graph=True)[0] for d in range(problem.dim)
        ]
        assert_close(torch.stack(rows), problem.jacobian(i), 1e-8)


def test_derivative_in_scales_and_noise(problem: LinearGaussian) -> None:
    """Against autograd through the closed form A⁻¹(Xᵀy/s² + Λθ0)."""
    case = case_of(problem, shared_noise=True)
    theta, _, leaves = solve(case)
    loc, log_scale, log_noise = (t.detach().clone().requires_grad_() for t in leaves)
    exact = []
    for x, y in zip(problem.designs, problem.targets, strict=True):
        weighted = tensor(x).T * (-2 * log_noise).exp()
        precision = (-2 * log_scale).exp()
        exact.append(
            torch.linalg.solve(
                weighted @ tensor(x) + precision.diag(), weighted @ tensor(y) + precision * loc
            )
        )
    v = torch.randn(theta.shape, dtype=FLOAT, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((theta * v).sum(), leaves)
    wanted = torch.autograd.grad((torch.stack(exact) * v).sum(), [loc, log_scale, log_noise])
    for a, b in zip(ours, wanted, strict=True):
        assert_close(a, b, 1e-8)


def test_derivative_in_a_low_rank_prior() -> None:
    problem = LinearGaussian.random(0)
    case = case_of(problem)
    factor = tensor([[0.5, 0.1], [-0.3, 0.4], [0.2, 0.9]]).requires_grad_()
    energy = TaskEnergy(
        case.density, case.tasks.support, case.shared, replace(case.prior, factor=factor)
    )
    theta, _ = prox(energy, case.prior.loc.expand(6, -1))
    sigma = (2 * case.prior.log_scale).exp().diag() + factor @ factor.T
    exact = []
    for i, x in enumerate(problem.designs):
        precision = sigma.inverse()
        shift = tensor(x.T @ problem.targets[i] / problem.noise2) + precision @ case.prior.loc
        exact.append(torch.linalg.solve(tensor(problem.hessian(i)) + precision, shift))
    v = torch.randn(6, 3, dtype=FLOAT, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((theta * v).sum(), factor)
    (wanted,) = torch.autograd.grad((torch.stack(exact) * v).sum(), factor)
    assert_close(theta, torch.stack(exact), 1e-8)
    assert_close(ours, wanted, 1e-8)


def test_the_derivative_is_that_of_the_minimum_not_of_the_path() -> None:
    """Two inner algorithms that find the same θ* give the same derivative; the start has none."""
    problem = LinearGaussian.random(5)
    grads = []
    for minimiser in (NewtonCG(), GradientDescent(0.04, max_iterations=2_000, tolerance=1e-10)):
        case = case_of(problem)
        prior, shared, leaves = leaves_of(case)
        start = torch.zeros(6, 3, dtype=FLOAT, requires_grad=True)
        energy = TaskEnergy(case.density, case.tasks.support, shared, prior)
        theta, _ = prox(energy, start, minimiser=minimiser)
        grads.append(torch.autograd.grad(theta.square().sum(), leaves[:2], retain_graph=True))
        assert torch.autograd.grad(theta.sum(), start, allow_unused=True)[0] is None
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-8)


# -- one dimension: inference.vc, 2019 ------------------------------------------------------------


def wavy(theta: Tensor) -> Tensor:
    """Multimodal, f″ between −1.8 and 2 (units of λ): prox has jumps, and slopes above 1."""
    return (0.3 * torch.sin(2.5 * theta) + 0.05 * theta**2).sum(-1)


def toy(anchors: Tensor, minimiser: NewtonCG | None = None) -> tuple[Tensor, ProxInfo]:
    def energy(theta: Tensor) -> Tensor:
        return wavy(theta) + 0.5 * (theta - anchors).square().sum(-1)

    return prox(energy, anchors.detach(), minimiser=minimiser)


def test_toy_derivative_is_one_over_one_plus_curvature() -> None:
    """At many θ0, except within a finite difference's width of a jump to another minimum."""
    anchors = torch.linspace(-4, 4, 161, dtype=FLOAT)[:, None].requires_grad_()
    theta, info = toy(anchors)
    (slope,) = torch.autograd.grad(theta.sum(), anchors)
    curvature = 0.1 - 0.3 * 2.5**2 * torch.sin(2.5 * theta.detach())
    assert bool(info.converged.all())
    assert_close(slope, 1 / (1 + curvature), 1e-9)
    width, exact = 1e-5, NewtonCG(tolerance=1e-14)
    up, down = (toy(anchors.detach() + sign * width, exact)[0] for sign in (1, -1))
    same_well = (up - down).abs() < 0.01
    assert int((~same_well).sum()) < 8  # jumps
    # The difference's own error, of order width² f‴²/(1 + f″)⁵, explodes at the folds.
    regular = same_well & (1 + curvature > 0.2)
    assert int(regular.sum()) > 120
    difference = (up - down) / (2 * width)
    assert_close(slope[regular], difference[regular], 1e-7)
    assert float(slope.max()) > 1.1 and float(slope.min()) < 0.5  # repelled and attracted


def test_a_scalar_parameter_of_a_single_task_has_its_gradient() -> None:
    """D = 1, T = 1: λ(θ−θ0)²/2 + (θ−3)²; θ* = (λθ0 + 6)/(λ + 2)."""
    loc = tensor([1.0]).requires_grad_()
    log_lam = tensor(0.7).requires_grad_()
    theta, _ = prox(
        lambda t: (t - 3).square().sum(-1) + 0.5 * log_lam.exp() * (t - loc).square().sum(-1),
        torch.zeros(1, 1, dtype=FLOAT),
    )
    lam = log_lam.detach().exp()
    d_loc, d_lam = torch.autograd.grad(theta.sum(), [loc, log_lam])
    assert_close(theta[0], (lam * 1 + 6) / (lam + 2)[None], 1e-10)
    assert_close(d_loc, (lam / (lam + 2))[None], 1e-10)
    assert_close(d_lam, lam * (2 * 1.0 - 6) / (lam + 2) ** 2, 1e-9)


# -- what is reported -----------------------------------------------------------------------------


def quadratic(anchor: Tensor, curvature: Tensor) -> Energy:
    """f has the Hessian's diagonal `curvature` `[T, D]`, λ = 1."""
    return lambda t: 0.5 * (curvature * t**2 + (t - anchor) ** 2).sum(-1)


def test_residual_is_filled_in_by_backward() -> None:
    anchor = torch.ones(2, 3, dtype=FLOAT, requires_grad=True)
    theta, info = prox(quadratic(anchor, tensor([[1.0, 2, 3], [4, 5, 6]])), anchor)
    assert info.residual is None and not bool(info.negative_curvature.any())
    before = info.gradients
    theta.sum().backward()
    assert bool((info.residual < 1e-10).all()) and not bool(info.negative_curvature.any())
    assert info.gradients > before


def test_a_small_budget_shows_in_the_residual_and_in_the_error() -> None:
    """Jacobian-vector products from 1, 2, ... products with A: both fall to rounding."""
    curvature = torch.logspace(-1, 2, 6, dtype=FLOAT)[None]
    residuals, errors = [], []
    for budget in range(1, 9):
        anchor = torch.ones(1, 6, dtype=FLOAT, requires_grad=True)
        theta, info = prox(
            quadratic(anchor, curvature), anchor, adjoint=Implicit(CG(max_iterations=budget))
        )
        (grad,) = torch.autograd.grad(theta.sum(), anchor)
        residuals.append(float(info.residual))
        # in the norm of A = 1 + f″, in which CG's error must fall
        errors.append(float(((grad - 1 / (1 + curvature)) ** 2 * (1 + curvature)).sum().sqrt()))
    assert all(r > 1e-3 for r in residuals[:4])
    assert all(b < a for a, b in pairwise(errors[:6]))
    assert residuals[-1] < 1e-8 and errors[-1] < 1e-8


def test_an_unconverged_inner_problem_is_reported() -> None:
    problem = LinearGaussian.random(6)
    case = case_of(problem)
    prior, shared, _ = leaves_of(case)
    energy = TaskEnergy(case.density, case.tasks.support, shared, prior)
    start = prior.loc.detach().expand(6, -1)
    _, info = prox(energy, start, minimiser=GradientDescent(1e-3, max_iterations=3))
    assert not bool(info.converged.any()) and bool((info.grad_norm > 1e-3).all())


def test_negative_curvature_at_a_saddle_is_reported() -> None:
    """Started exactly on the saddle of −θ² + θ²/2 the gradient is 0: nothing to descend; the
    derivative there is meaningless, which the report must say. The other task is fine."""
    anchor = torch.zeros(2, 1, dtype=FLOAT, requires_grad=True)
    theta, info = prox(quadratic(anchor, tensor([[-2.0], [1.0]])), anchor)
    theta.sum().backward()
    assert bool(info.converged.all())
    assert info.negative_curvature.tolist() == [True, False]
    assert anchor.grad is not None and bool(anchor.grad.isfinite().all())


def test_without_gradients_the_value_is_the_same_and_nothing_is_attached() -> None:
    case = case_of(LinearGaussian.random(7), shared_noise=True)
    theta, _, _ = solve(case)
    with torch.no_grad():
        plain, info, _ = solve(case)
    assert torch.equal(plain, theta.detach())
    assert not plain.requires_grad and info.residual is None


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    anchor = torch.ones(1, 1, dtype=FLOAT, requires_grad=True)
    theta, _ = prox(lambda t: (t**4 + 0.5 * (t - anchor) ** 2).sum(-1), anchor)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(theta.sum(), anchor, create_graph=True)


def test_backward_can_run_twice() -> None:
    case = case_of(LinearGaussian.random(8))
    theta, _, leaves = solve(case)
    first = torch.autograd.grad(theta.sum(), leaves[0], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(theta.sum(), leaves[0])[0], first)


def test_single_precision() -> None:
    anchor = torch.ones(1, 1, requires_grad=True)
    theta, _ = prox(quadratic(anchor, torch.tensor([[2.0]])), anchor)
    assert theta.dtype == torch.float32
    (slope,) = torch.autograd.grad(theta.sum(), anchor)
    assert abs(float(slope) - 1 / 3) < 1e-6


# -- what it costs --------------------------------------------------------------------------------


def test_one_steps_way_back_is_counted() -> None:
    """A product with second derivatives, which counts as two gradients."""
    case = case_of(LinearGaussian.random(0))
    prior, shared, leaves = leaves_of(case)
    energy = TaskEnergy(case.density, case.tasks.support, shared, prior)
    start = prior.loc.detach().expand(len(case.tasks), -1)
    theta, info = prox(energy, start, adjoint=OneStep(0.1))
    before = info.gradients
    torch.autograd.grad(theta.sum(), leaves[0])
    assert info.gradients == before + 2


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (
            torch.zeros(3),
            r"start must be a floating .* \[T, D\].*float32 of shape \[3\]",
        ),
        (torch.zeros(2, 3, 1), r"of shape \[2, 3, 1\]"),
        (torch.zeros(2, 3, dtype=torch.long), "torch.int64 of shape"),
        (1.0, "got 1.0"),
    ],
)
def test_a_start_of_another_shape_is_refused(start: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prox(lambda theta: theta.square().sum(-1), start)


@pytest.mark.parametrize("energy", [lambda t: t.square(), lambda t: t.square().sum()])
def test_an_energy_of_another_shape_is_refused(energy: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"energy must return \[T\] = \[2\] nats.*got \["):
        prox(energy, torch.ones(2, 3))
