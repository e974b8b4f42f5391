"""Inner minimisers on problems whose minimum is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import FLOAT, tensor
from scipy.optimize import minimize
from torch import Tensor

from varmeta.inference.energy import as_energy
from varmeta.inference.lbfgs import LBFGS
from varmeta.inference.linear import CG, default_tolerance
from varmeta.inference.minimise import GradientDescent, Minimiser
from varmeta.inference.newton import NewtonCG

Energy = Callable[[Tensor], Tensor]

CURVATURES = tensor([[1.0, 2.0, 5.0], [0.1, 3.0, 10.0], [4.0, 4.0, 4.0]])
CENTRES = tensor([[1.0, -2.0, 0.5], [100.0, 0.0, -1.0], [0.0, 0.0, 3.0]])


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * (CURVATURES * (theta - CENTRES) ** 2).sum(-1)


def gradient(energy: Energy, theta: Tensor) -> Tensor:
    with torch.no_grad():
        return as_energy(energy).gradient(theta)


def rosenbrock(theta: Tensor) -> Tensor:
    x, y = theta.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def double_well(theta: Tensor) -> Tensor:
    """Minima at (±1, 0), a saddle at the origin."""
    x, y = theta.unbind(-1)
    return 0.25 * (x**2 - 1) ** 2 + 0.5 * y**2


def logistic_data() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 12, 3))
    return tensor(x), tensor(rng.random((4, 12)) < 0.5)


def logistic(theta: Tensor) -> Tensor:
    x, y = logistic_data()
    logits = (x @ theta[..., None])[..., 0]
    fit = torch.nn.functional.softplus(logits) - y * logits
    return fit.sum(-1) + 0.05 * theta.square().sum(-1)


PROBLEMS: dict[str, tuple[Energy, Tensor]] = {
    "quadratic": (quadratic, torch.zeros(3, 3, dtype=FLOAT)),
    "rosenbrock": (rosenbrock, tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -3.0], [1.0, 1.0]])),
    "double well": (double_well, tensor([[0.01, 1.0], [-0.01, 1.0], [1e-6, 0.0], [3.0, -2.0]])),
    "logistic": (logistic, torch.zeros(4, 3, dtype=FLOAT)),
}
MINIMISERS: dict[str, Minimiser] = {
    "newton": NewtonCG(),
    "newton, 2 products": NewtonCG(max_iterations=2000, solver=CG(max_iterations=2)),
    "lbfgs": LBFGS(),
    "lbfgs, 2 pairs": LBFGS(max_iterations=1000, history=2),
    "descent": GradientDescent(step_size=0.15, max_iterations=5000),
}
STABLE = [  # a step of 0.15 is beyond 2/λmax on Rosenbrock's valley
    (m, p) for m in MINIMISERS for p in PROBLEMS if (m, p) != ("descent", "rosenbrock")
]


@pytest.mark.parametrize(("minimiser", "problem"), STABLE)
def test_reports_hold_at_the_minimum(minimiser: str, problem: str) -> None:
    """Converged means the stated tolerance, and the gradient norm is that of the θ returned."""
    energy, start = PROBLEMS[problem]
    found = MINIMISERS[minimiser].minimise(energy, start)
    norm = gradient(energy, found.theta).norm(dim=-1)
    first = gradient(energy, start).norm(dim=-1)
    assert torch.allclose(found.grad_norm, norm, rtol=1e-9, atol=1e-15)
    assert bool(found.converged.all())
    assert bool((norm <= default_tolerance(FLOAT) * (1 + first)).all())
    assert bool((energy(found.theta) <= energy(start)).all())


@pytest.mark.parametrize(("minimiser", "problem"), STABLE)
def test_together_equals_one_at_a_time(minimiser: str, problem: str) -> None:
    energy, start = PROBLEMS[problem]
    together = MINIMISERS[minimiser].minimise(energy, start)
    for i in range(len(start)):

        def alone(theta: Tensor, i: int = i) -> Tensor:
            return energy(torch.cat([start[:i], theta, start[i + 1 :]]))[i : i + 1]

        single = MINIMISERS[minimiser].minimise(alone, start[i : i + 1])
        assert torch.allclose(together.theta[i], single.theta[0], rtol=1e-10, atol=1e-10)
        assert int(together.iterations[i]) == int(single.iterations[0])


@pytest.mark.parametrize("minimiser", MINIMISERS)
def test_quadratic_minimum_is_exact(minimiser: str) -> None:
    found = MINIMISERS[minimiser].minimise(quadratic, torch.zeros(3, 3, dtype=FLOAT))
    # ‖θ − centre‖ ≤ ‖∇E‖ / smallest curvature
    error = (found.theta - CENTRES).norm(dim=-1)
    assert bool((error <= found.grad_norm / CURVATURES.amin(-1) + 1e-13).all())
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize("steps", [1, 7, 16])
def test_gradient_descent_shrinks_each_eigencomponent_geometrically(steps: int) -> None:
    """θ_k − c = (1 − ηλ)^k (θ_0 − c) on a quadratic."""
    start = torch.ones(3, 3, dtype=FLOAT)
    found = GradientDescent(0.07, max_iterations=steps).minimise(quadratic, start)
    exact = CENTRES + (1 - 0.07 * CURVATURES) ** steps * (start - CENTRES)
    assert torch.allclose(found.theta, exact, rtol=1e-12, atol=1e-12)
    assert found.gradients == steps + 1


def test_newton_solves_a_quadratic_with_exact_systems_in_one_step() -> None:
    """With the forcing term at its floor, that is from a start close by."""
    found = NewtonCG().minimise(quadratic, CENTRES + 1e-9)
    assert found.iterations.tolist() == [1, 1, 1]
    assert torch.allclose(found.theta, CENTRES, rtol=1e-12, atol=1e-12)


def test_rosenbrock_minimum() -> None:
    energy, start = PROBLEMS["rosenbrock"]
    found = NewtonCG().minimise(energy, start)
    assert torch.allclose(found.theta, torch.ones(4, 2, dtype=FLOAT), atol=1e-6)
    assert int(found.iterations[3]) == 0  # started there


def test_logistic_regression_equals_scipy() -> None:
    found = NewtonCG().minimise(logistic, torch.zeros(4, 3, dtype=FLOAT))
    for i in range(4):

        def loss(v: np.ndarray, i: int = i) -> tuple[float, np.ndarray]:
            theta = torch.zeros(4, 3, dtype=FLOAT)
            theta[i] = tensor(v)
            return float(logistic(theta)[i]), gradient(logistic, theta)[i].numpy()

        best = minimize(loss, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-10})
        assert np.allclose(found.theta[i], best.x, atol=1e-8)


@pytest.mark.parametrize("height", [1e-6, 1e-3, 0.1])
def test_newton_leaves_a_saddle_for_the_well_on_its_side(height: float) -> None:
    """Along x the curvature is negative at the start: a plain Newton step would climb to 0."""
    start = tensor([[height, 1.0], [-height, 1.0], [height, 0.0]])
    found = NewtonCG().minimise(double_well, start)
    assert bool(found.converged.all())
    assert torch.allclose(found.theta, tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]), atol=1e-8)


def test_energy_never_rises_from_one_newton_step_to_the_next() -> None:
    for energy, start in PROBLEMS.values():
        values = torch.stack(
            [energy(NewtonCG(max_iterations=k).minimise(energy, start).theta) for k in range(1, 15)]
        )
        slack = 100 * torch.finfo(FLOAT).eps * (1 + values.abs().amax())
        assert bool((values.diff(dim=0) <= slack).all())


@pytest.mark.parametrize(
    "minimiser",
    [NewtonCG(max_iterations=8), GradientDescent(0.09, max_iterations=200)],
)
def test_a_converged_task_stands_still_while_another_goes_on(
    minimiser: NewtonCG | GradientDescent,
) -> None:
    def energy(theta: Tensor) -> Tensor:  # the second is a quartic, on which both are slow
        return torch.stack([2 * theta[0].square().sum(), (theta[1] ** 4).sum()])

    start = tensor([[1e-3, 0.0], [1.0, 2.0]])
    few = minimiser.minimise(energy, start)
    more = replace(minimiser, max_iterations=minimiser.max_iterations + 5).minimise(energy, start)
    assert few.converged.tolist() == [True, False]
    assert int(few.iterations[0]) < int(few.iterations[1]) < int(more.iterations[1])
    assert torch.equal(few.theta[0], more.theta[0]) and not torch.equal(few.theta[1], more.theta[1])


@pytest.mark.parametrize("capped", [NewtonCG(max_iterations=1), GradientDescent(1e-4)])
def test_a_capped_run_says_so(capped: Minimiser) -> None:
    energy, start = PROBLEMS["rosenbrock"]
    found = capped.minimise(energy, start)
    assert found.converged.tolist() == [False, False, False, True]
    assert torch.allclose(found.grad_norm, gradient(energy, found.theta).norm(dim=-1))


def test_the_line_search_backs_off_from_where_the_energy_is_not_finite() -> None:
    """E = θ − log θ, NaN for θ < 0: the first Newton step from 20 leads to −340."""
    found = NewtonCG().minimise(lambda t: (t - t.log()).sum(-1), tensor([[20.0], [0.5]]))
    assert bool(found.converged.all())
    assert torch.allclose(found.theta, torch.ones(2, 1, dtype=FLOAT), atol=1e-8)


@pytest.mark.parametrize("minimiser", [NewtonCG(), GradientDescent(0.1)])
def test_an_energy_that_is_nowhere_finite_or_has_no_minimum_is_not_converged(
    minimiser: Minimiser,
) -> None:
    def energy(theta: Tensor) -> Tensor:  # nowhere finite, unbounded below, and an ordinary one
        scale = tensor([float("nan"), 1.0, 0.0])
        return scale * theta.sum(-1) + tensor([0.0, 0.0, 5.0]) * theta.square().sum(-1)

    found = minimiser.minimise(energy, torch.ones(3, 2, dtype=FLOAT))
    assert found.converged.tolist() == [False, False, True]
    assert float(found.theta[2].abs().max()) < 1e-8


def test_start_is_left_alone_and_the_result_is_detached() -> None:
    start = torch.zeros(3, 3, dtype=FLOAT, requires_grad=True)
    for minimiser in (NewtonCG(), GradientDescent(0.1)):
        found = minimiser.minimise(quadratic, start)
        assert not found.theta.requires_grad and start.grad is None
        assert float(start.detach().abs().max()) == 0


def test_evaluations_are_counted() -> None:
    calls = 0

    def counted(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return quadratic(theta)

    start = torch.zeros(3, 3, dtype=FLOAT)
    assert GradientDescent(0.1).minimise(counted, start).gradients == calls
    calls = 0
    newton = NewtonCG().minimise(counted, start)
    products = newton.gradients - calls  # each counts twice
    assert products > 0 and products % 2 == 0


def test_curvature_product_is_the_hessians() -> None:
    energy, start = PROBLEMS["rosenbrock"]
    at = as_energy(energy).linearise(start)
    assert torch.equal(at.value, energy(start)) and torch.equal(at.grad, gradient(energy, start))
    v = torch.randn(start.shape, dtype=FLOAT, generator=torch.Generator().manual_seed(0))
    for i in range(len(start)):
        dense = torch.autograd.functional.hessian(lambda t, i=i: rosenbrock(t[None])[0], start[i])
        for _ in range(2):  # the graph is kept
            assert torch.allclose(at.product(v)[i], dense @ v[i], rtol=1e-12)
