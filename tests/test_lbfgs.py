"""L-BFGS beside the laws of `test_minimise.py`, which it is under too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FLOAT, case_of, leaves_of, tensor
from linear_gaussian import LinearGaussian
from scipy.optimize import minimize
from test_minimise import double_well, gradient, logistic, rosenbrock
from torch import Tensor

from varmeta import IMAML, LBFGS, NewtonCG
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.minimise import Minimiser


def scipy_minimum(function, start: np.ndarray) -> np.ndarray:
    def both(v: np.ndarray) -> tuple[float, np.ndarray]:
        theta = tensor(v)[None]
        return float(function(theta)), gradient(function, theta)[0].numpy()

    options = {"gtol": 1e-11, "ftol": 0, "maxiter": 1000}
    return minimize(both, start, jac=True, method="L-BFGS-B", options=options).x


def test_rosenbrock_equals_scipy_from_every_start() -> None:
    start = tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -3.0], [1.0, 1.0]])
    found = LBFGS(tolerance=1e-12).minimise(rosenbrock, start)
    assert bool(found.converged.all()) and int(found.iterations[3]) == 0
    for row, first in zip(found.theta, start, strict=True):
        assert np.allclose(row, scipy_minimum(rosenbrock, first.numpy()), atol=1e-7)


def test_logistic_regression_equals_scipy() -> None:
    found = LBFGS().minimise(logistic, torch.zeros(4, 3, dtype=FLOAT))
    for i in range(4):

        def alone(theta: Tensor, i: int = i) -> Tensor:
            return logistic(
                torch.zeros(4, 3, dtype=FLOAT).index_put((tensor(i).long(),), theta[0])
            )[i : i + 1]

        assert np.allclose(found.theta[i], scipy_minimum(alone, np.zeros(3)), atol=1e-7)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_an_ill_conditioned_quadratic(condition: float) -> None:
    """‖θ − c‖ ≤ ‖∇E‖ / smallest curvature; the tolerance is what float64 leaves of ‖∇E(start)‖."""
    curvature = torch.logspace(0, np.log10(condition), 8, dtype=FLOAT)
    centre = tensor(np.random.default_rng(0).normal(size=(3, 8)))
    found = LBFGS(max_iterations=2000, tolerance=1e-13).minimise(
        lambda t: 0.5 * (curvature * (t - centre) ** 2).sum(-1), torch.zeros(3, 8, dtype=FLOAT)
    )
    assert bool(found.converged.all())
    assert bool(((found.theta - centre).norm(dim=-1) <= found.grad_norm * (1 + 1e-9)).all())
    assert float((found.theta - centre).norm(dim=-1).max()) < 1e-12 * condition


def test_a_history_of_all_coordinates_beats_a_short_one() -> None:
    curvature = torch.logspace(0, 3, 8, dtype=FLOAT)

    def steps(history: int) -> int:
        found = LBFGS(max_iterations=1000, history=history).minimise(
            lambda t: 0.5 * (curvature * (t - 1) ** 2).sum(-1), torch.zeros(1, 8, dtype=FLOAT)
        )
        assert bool(found.converged.all())
        return int(found.iterations)

    assert steps(10) < steps(1)


def test_negative_curvature_at_the_start_is_left_out_not_followed() -> None:
    """Close to the top of the double well sᵀy < 0 for short steps."""
    start = tensor([[1e-6, 1.0], [-1e-3, 1.0], [0.1, 0.0]])
    found = LBFGS().minimise(double_well, start)
    wells = tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(found.theta.abs(), wells.abs(), atol=1e-7)
    assert bool(found.converged.all())


def test_the_line_search_backs_off_from_where_the_energy_is_not_finite() -> None:
    found = LBFGS().minimise(lambda t: (t - t.log()).sum(-1), tensor([[20.0], [0.5], [1e-3]]))
    assert bool(found.converged.all())
    assert torch.allclose(found.theta, torch.ones(3, 1, dtype=FLOAT), atol=1e-8)


def test_a_hopeless_task_does_not_disturb_another() -> None:
    """Nowhere finite, unbounded below, and an ordinary one."""

    def energy(theta: Tensor) -> Tensor:
        scale = tensor([float("nan"), 1.0, 0.0])
        return scale * theta.sum(-1) + tensor([0.0, 0.0, 5.0]) * theta.square().sum(-1)

    found = LBFGS(max_iterations=15).minimise(energy, torch.ones(3, 2, dtype=FLOAT))
    assert found.converged.tolist() == [False, False, True]
    assert float(found.theta[2].abs().max()) < 1e-8


def test_single_precision_far_from_zero() -> None:
    """The decrease drowns in the rounding of 1e4 nats long before the gradient does."""
    found = LBFGS().minimise(lambda t: 1e4 + (t - 1).square().sum(-1), torch.zeros(3, 2))
    assert found.theta.dtype == torch.float32 and bool(found.converged.all())
    assert float((found.theta - 1).abs().max()) < 1e-4


def test_every_gradient_is_counted_and_none_is_a_product() -> None:
    calls = 0

    def counted(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rosenbrock(theta)

    found = LBFGS().minimise(counted, tensor([[-1.2, 1.0], [0.0, 0.0]]))
    assert found.gradients == calls


def test_the_start_is_left_alone() -> None:
    start = torch.zeros(2, 2, dtype=FLOAT, requires_grad=True)
    found = LBFGS().minimise(rosenbrock, start)
    assert not found.theta.requires_grad and start.grad is None
    assert float(start.detach().abs().max()) == 0


def test_as_the_inner_minimiser_of_imaml() -> None:
    """The same θ* and meta-gradient as with Newton's method, from the model's own programs."""
    problem = LinearGaussian.random(1)
    results = []
    for minimiser in (LBFGS(), NewtonCG()):
        case = case_of(problem, shared_noise=True)
        prior, shared, leaves = leaves_of(case)
        energy = TaskEnergy(case.density, case.tasks.support, shared, prior)
        found = minimiser.minimise(energy, prior.loc.expand(6, -1))
        assert bool(found.converged.all())
        losses, _ = IMAML(minimiser=minimiser).losses(case.density, prior, shared, case.tasks)
        results.append((found.theta, *torch.autograd.grad(losses.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", [LBFGS, NewtonCG])
def test_a_fixed_budget_is_refused_by_line_searches(kind: type[Minimiser]) -> None:
    with pytest.raises(ValueError, match=r"tolerance must not be 0.*GradientDescent"):
        kind(tolerance=0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("field", "value"), [("max_iterations", 0), ("tolerance", -1.0), ("history", 0)]
)
def test_fields_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        LBFGS(**{field: value})  # type: ignore[arg-type]
