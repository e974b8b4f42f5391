"""Adjoints × minimisers × energies: which derivative each promises, against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from adjoint_problems import (
    WEIGHTS,
    Problem,
    Tensors,
    assert_slopes,
    bytes_held,
    derivative,
    every_problem,
    functional,
    leaves,
    linear_case,
    problem_of,
    slopes,
)
from density_cases import numbers
from helpers import FLOAT, assert_close, assert_same, tensor
from torch import Tensor

from varmeta.inference.lbfgs import LBFGS
from varmeta.inference.linear import CG, Cholesky
from varmeta.inference.minimise import Adam, FirstOrder, GradientDescent, Minimiser, ProximalDescent
from varmeta.inference.minres import MINRES
from varmeta.inference.newton import NewtonCG
from varmeta.inference.nystrom import Nystrom
from varmeta.inference.prox import Adjoint, Detached, Implicit, OneStep, Unrolled, prox
from varmeta.models.capture import CALLS_BEFORE_CAPTURE
from varmeta.models.programs import Programs

# -- run to convergence ---------------------------------------------------------------------------

EXACT = NewtonCG(tolerance=1e-14, solver=Cholesky())


@cache
def at_the_minimum(name: str) -> Tensors:
    """The derivative of the minimum itself, by differences of a minimiser run to rounding."""
    problem = problem_of(name)
    value = functional(problem, EXACT)
    return slopes(value, {**problem.at, "start": problem.start}, list(problem.at), 1e-3)


def nystrom(problem: Problem) -> Nystrom:
    """Of full rank: exact. The low-rank part makes H = A − S⁻² indefinite, which is no harm."""
    shift = (-2 * problem.at["log_scale"]).exp()[problem.groups]
    return Nystrom(3, shift, sketch="gaussian")


ADJOINTS: dict[str, Callable[[Problem], Adjoint]] = {
    "CG": lambda p: Implicit(CG()),
    "CG with Nystrom": lambda p: Implicit(CG(preconditioner=Nystrom(2, 1.0))),
    "Cholesky": lambda p: Implicit(Cholesky()),
    "MINRES": lambda p: Implicit(MINRES()),
    "Nystrom": lambda p: Implicit(nystrom(p)),
}
MINIMISERS = {
    "Newton": NewtonCG(),
    "Gauss-Newton": NewtonCG(curvature="gauss_newton", max_iterations=200),
    "LBFGS": LBFGS(),
    "descent": GradientDescent(0.05, 2000),
    "momentum": GradientDescent(0.05, 1000, momentum=0.7),
    "Adam": Adam(0.05, 3000, tolerance=1e-9, betas=(0.9, 0.99)),
}


@every_problem
@pytest.mark.parametrize("which", ADJOINTS)
def test_implicit_is_the_derivative_of_the_minimum(name: str, which: str) -> None:
    """1e-8: the default tolerances are ε^(2/3) = 4e-11."""
    problem = problem_of(name)
    grads, info = derivative(problem, NewtonCG(), ADJOINTS[which](problem))
    assert info.residual is not None and bool((info.residual < 1e-9).all())
    assert_slopes(grads, at_the_minimum(name), 1e-8)


@every_problem
@pytest.mark.parametrize("which", MINIMISERS)
def test_the_way_to_the_minimum_does_not_show(name: str, which: str) -> None:
    if name == "bare" and which == "Gauss-Newton":
        with pytest.raises(ValueError, match="needs a model"):
            derivative(problem_of(name), MINIMISERS[which], Implicit())
        return
    grads, info = derivative(problem_of(name), MINIMISERS[which], Implicit(Cholesky()))
    assert info.converged is not None and bool(info.converged.all())
    assert_slopes(grads, at_the_minimum(name), 1e-7)


@every_problem
@pytest.mark.parametrize("which", ["descent", "momentum"])
def test_unrolled_long_enough_is_implicit(name: str, which: str) -> None:
    """And then the start is forgotten."""
    problem, steps = problem_of(name), MINIMISERS[which]
    grads, info = derivative(problem, steps, Unrolled(), problem.start)
    assert info.converged is not None and bool(info.converged.all())
    assert_slopes(grads, at_the_minimum(name), 1e-7)
    assert float(grads["start"].abs().max()) < 1e-8


# -- a fixed or adaptive budget: the derivative of the algorithm as run ---------------------------

TRUNCATED: dict[str, FirstOrder] = {
    "descent": GradientDescent(0.05, 5, tolerance=0),
    "momentum": GradientDescent(0.03, 6, tolerance=0, momentum=0.8),
    "Adam": Adam(0.1, 6, tolerance=0),
    "cut descent": GradientDescent(2.0, 5, tolerance=0, clip=0.1),
    "cut momentum": GradientDescent(0.5, 6, tolerance=0, momentum=0.8, clip=0.2),
    "cut Adam": Adam(0.3, 6, tolerance=0, clip=0.2),
    "in prior units": GradientDescent(0.1, 5, tolerance=0, in_prior_units=True, clip=None),
    "proximal": ProximalDescent(0.2, 5, tolerance=0, clip=0.3),
    "descent, each task to its own end": GradientDescent(0.05, 40, tolerance=0.05, reduction="sum"),
    "momentum, each task to its own end": GradientDescent(
        0.03, 40, tolerance=0.05, momentum=0.5, reduction="sum"
    ),
    "Adam, each task to its own end": Adam(0.1, 40, tolerance=0.1),
}


@every_problem
@pytest.mark.parametrize("which", TRUNCATED)
def test_unrolled_is_the_derivative_of_the_algorithm(name: str, which: str) -> None:
    """In all it sees, the start included; 1e-8: differences over 3e-5 in rounding of 1e-15."""
    problem, steps = problem_of(name), TRUNCATED[which]
    grads, info = derivative(problem, steps, Unrolled(), problem.start)
    if steps.tolerance:
        assert len(set(info.iterations.tolist())) > 1 and int(info.iterations.max()) < 40
    at = {**problem.at, "start": problem.start}
    wanted = slopes(functional(problem, steps, info.iterations), at, list(at), 3e-5)
    assert_slopes(grads, wanted, 1e-8)


@every_problem
def test_from_the_prior_mean_both_ways_to_it_count(name: str) -> None:
    """θ0 as start and as centre of the penalty at once, as in MAML with a prior."""
    problem, steps = problem_of(name), TRUNCATED["momentum"]

    def value(loc: Tensor, adjoint: Adjoint) -> Tensor:
        energy = problem.energy(**{**problem.at, "loc": loc})
        theta, _ = prox(energy, loc.expand(4, -1), minimiser=steps, adjoint=adjoint)
        return (theta * WEIGHTS).sum()

    loc = problem.at["loc"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(loc, Unrolled()), loc)
    wanted = slopes(lambda loc: value(loc, Detached()), {"loc": loc}, ["loc"], 3e-5)
    assert_slopes({"loc": grad}, wanted, 1e-8)


@every_problem
@pytest.mark.parametrize("which", ["descent", "Adam", "momentum, each task to its own end"])
def test_checkpointing_changes_nothing_bit_for_bit(name: str, which: str) -> None:
    problem = problem_of(name)
    for _ in range(9):
        plain, before = derivative(problem, TRUNCATED[which], Unrolled(), problem.start)
    for every in (1, 3, 100):
        grads, info = derivative(
            problem, TRUNCATED[which], Unrolled(checkpoint=every), problem.start
        )
        assert_same(grads, plain)
        assert torch.equal(info.iterations, before.iterations)
        assert torch.equal(info.grad_norm, before.grad_norm)


def test_a_recording_may_come_between_there_and_back() -> None:
    """The calls of a derivative are counted, and some number of them makes a recording."""
    problem, results = linear_case(), []
    for adjoint in (Unrolled(checkpoint=3), Unrolled()):
        at = leaves(problem.at)
        energy = problem.energy(**at)
        steps = GradientDescent(0.01, 6, tolerance=0)
        theta, _ = prox(energy, problem.start, minimiser=steps, adjoint=adjoint)
        with torch.no_grad():
            for _ in range(CALLS_BEFORE_CAPTURE):
                energy.gradient(problem.start)
        results.append(torch.autograd.grad(theta.sum(), list(at.values())))
    assert_same(*results)


@pytest.mark.parametrize("tolerance", [0, 0.05])
def test_checkpointing_costs_each_gradient_once_more(
    tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations of a model's gradient in 30 steps or up to the tolerance, there and back."""
    calls, run = 0, Programs.gradient

    def counted(self: Programs, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(self, *arguments)

    monkeypatch.setattr(Programs, "gradient", counted)
    counts, problem = {}, linear_case()
    for every in (None, 1, 10, 30):
        calls = 0
        minimiser = GradientDescent(0.01, 30, tolerance=tolerance)
        derivative(problem, minimiser, Unrolled(checkpoint=every), problem.start)
        counts[every] = calls
    assert counts[None] <= 32
    assert all(count <= 2 * counts[None] for count in counts.values()), counts


def test_checkpointing_holds_fewer_bytes() -> None:
    """The activations of a bare function: of 60 steps, or of none but one θ for every ten."""
    data = numbers(4, 50, 3, seed=5)
    centre = torch.zeros(3, dtype=FLOAT, requires_grad=True)

    def energy(theta: Tensor) -> Tensor:
        return (torch.tanh(theta[:, None] * data).square().sum(-1) + 1).log().sum(-1) + (
            theta - centre
        ).square().sum(-1)

    def run(adjoint: Adjoint) -> Tensor:
        steps = GradientDescent(0.01, 60, tolerance=0)
        return prox(energy, torch.ones(4, 3, dtype=FLOAT), minimiser=steps, adjoint=adjoint)[0]

    plain = bytes_held(lambda: run(Unrolled()))
    some = bytes_held(lambda: run(Unrolled(checkpoint=10)))
    assert plain > 60 * data.nbytes
    assert some < plain / 60
    assert bytes_held(lambda: run(Unrolled(first_order=True))) == 0


def test_unrolling_a_model_holds_one_iterate_a_step() -> None:
    """TaskEnergy's derivative is computed again, so that no activations are kept; and the step
    beside it where it may be cut."""
    problem = problem_of("bent")
    at = leaves(problem.at)

    def run(steps: int, clip: float | None = 1.0) -> Tensor:
        minimiser = GradientDescent(0.01, steps, tolerance=0, clip=clip)
        energy = problem.energy(**at)
        return prox(energy, problem.start, minimiser=minimiser, adjoint=Unrolled())[0]

    one = problem.start.nbytes
    assert bytes_held(lambda: run(50)) - bytes_held(lambda: run(10)) == 2 * 40 * one
    assert bytes_held(lambda: run(50, None)) - bytes_held(lambda: run(10, None)) == 40 * one


# -- first order ----------------------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("which", TRUNCATED)
def test_first_order_is_the_identity_in_the_start_alone(name: str, which: str) -> None:
    problem = problem_of(name)
    grads, info = derivative(problem, TRUNCATED[which], Unrolled(first_order=True), problem.start)
    assert torch.equal(grads["start"], WEIGHTS)
    assert all(grads[key] is None for key in problem.at)
    _, exact = derivative(problem, TRUNCATED[which], Unrolled(), problem.start)
    assert torch.equal(info.iterations, exact.iterations) and info.gradients < exact.gradients


# -- step sizes as parameters ---------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_step_sizes_have_their_gradient(name: str, checkpoint: int | None) -> None:
    """One per coordinate, as in Meta-SGD."""
    problem = problem_of(name)
    sizes = tensor([0.02, 0.05, 0.03])
    for which in ("descent", "momentum", "Adam"):

        def value(sizes: Tensor, adjoint: Adjoint, which: str = which) -> Tensor:
            steps = replace(TRUNCATED[which], step_size=sizes)
            energy = problem.energy(**problem.at)
            theta, _ = prox(energy, problem.start, minimiser=steps, adjoint=adjoint)
            return (theta * WEIGHTS).sum()

        leaf = sizes.clone().requires_grad_()
        (grad,) = torch.autograd.grad(value(leaf, Unrolled(checkpoint=checkpoint)), leaf)
        wanted = slopes(
            lambda sizes, v=value: v(sizes, Detached()), {"sizes": sizes}, ["sizes"], 3e-5
        )
        assert_slopes({"sizes": grad}, wanted, 1e-8)


# -- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.02, 0.1, 0.3])
def test_the_error_of_one_step_is_the_norm_it_says(step: float) -> None:
    """On a quadratic with Hessian A the exact derivative is J = A⁻¹ and OneStep's is step·I, so
    that I − J₁J⁻¹ = I − step·A: ‖v − J₁A v‖ ≤ ‖I − step·A‖ ‖v‖, with equality for some v."""
    root = numbers(2, 4, 4, seed=6)
    hessian = root @ root.mT + torch.eye(4, dtype=FLOAT)
    pull = numbers(2, 4, seed=7)

    def jacobian(adjoint: Adjoint) -> Tensor:
        leaf = pull.clone().requires_grad_()
        theta, _ = prox(
            lambda t: 0.5 * (t * (hessian @ t[..., None])[..., 0]).sum(-1) - (leaf * t).sum(-1),
            torch.zeros_like(pull),
            adjoint=adjoint,
        )
        rows = [
            torch.autograd.grad(theta[:, d].sum(), leaf, retain_graph=True)[0] for d in range(4)
        ]
        return torch.stack(rows, 1)

    eye = torch.eye(4, dtype=FLOAT)
    assert_close(jacobian(Implicit(Cholesky())), hessian.inverse(), 1e-12)
    exact, one = hessian.inverse(), jacobian(OneStep(step))
    assert_close(one, step * eye.expand(2, 4, 4), 1e-12)
    norm = torch.linalg.matrix_norm(eye - step * hessian, 2)
    error = torch.linalg.matrix_norm((exact - one) @ hessian, 2)  # relative: over J = A⁻¹
    assert_close(error, norm, 1e-12)


@every_problem
def test_one_step_is_the_derivative_of_a_last_gradient_step(name: str) -> None:
    """In what the energy holds, of θ* − step ∇E(θ*) with θ* held fixed."""
    problem, step = problem_of(name), 0.05
    grads, _ = derivative(problem, NewtonCG(), OneStep(step))
    theta, _ = prox(problem.energy(**problem.at), problem.start, adjoint=Detached())
    wanted, _ = derivative(
        replace_start(problem, theta),
        GradientDescent(step, 1, tolerance=0, reduction="sum"),
        Unrolled(),
    )
    for key in problem.at:
        assert_close(grads[key], wanted[key], 1e-8)


def replace_start(problem: Problem, start: Tensor) -> Problem:
    class There(Problem):
        @property
        def start(self) -> Tensor:
            return start.detach()

    return There(problem.energy, problem.at, problem.groups)


# -- no derivative, and refusals ------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("which", ["Newton", "descent"])
def test_detached_has_no_derivative_and_the_same_value(name: str, which: str) -> None:
    problem = problem_of(name)
    energy = problem.energy(**leaves(problem.at))
    start = problem.start.requires_grad_()
    theta, info = prox(energy, start, minimiser=MINIMISERS[which], adjoint=Detached())
    assert not theta.requires_grad and info.residual is None
    other, _ = prox(energy, start, minimiser=MINIMISERS[which], adjoint=Implicit())
    assert torch.equal(theta, other.detach())


@pytest.mark.parametrize("minimiser", [NewtonCG(), LBFGS()], ids=["NewtonCG", "LBFGS"])
def test_a_line_search_cannot_be_unrolled(minimiser: Minimiser) -> None:
    problem = problem_of("bare")
    with pytest.raises(
        ValueError,
        match=rf"minimiser is {type(minimiser).__name__}, whose steps are chosen by a line search "
        "and cannot be unrolled: use GradientDescent or Adam, or the adjoint Implicit",
    ):
        derivative(problem, minimiser, Unrolled())


def test_the_value_is_that_of_the_minimiser_whatever_the_adjoint() -> None:
    problem, steps = problem_of("bent"), GradientDescent(0.05, 5, tolerance=0)
    adjoints = [Implicit(), OneStep(0.1), Unrolled(), Unrolled(checkpoint=2), Detached()]
    adjoints.append(Unrolled(first_order=True))
    found = [
        prox(problem.energy(**leaves(problem.at)), problem.start, minimiser=steps, adjoint=a)
        for a in adjoints
    ]
    for theta, info in found:
        assert torch.equal(theta.detach(), found[0][0].detach())
        assert torch.equal(info.grad_norm, found[0][1].grad_norm)
        assert torch.equal(info.reduction, found[0][1].reduction)
        assert info.iterations.tolist() == [5] * 4 and info.converged is None
