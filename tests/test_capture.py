"""Captured: after many calls the recording gives the function's own numbers, or is not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from density_cases import CASES, FLOAT, build, numbers, values

from varmeta.models.capture import Captured, CapturedGradient, record, trace

CALLS = 60  # more than are made before a recording takes over
A, B = numbers(4, 3, seed=1), numbers(4, 3, seed=2)


class Counted:
    """A function that knows how often Python entered it."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def is_replayed(captured, *args):
    """Whether a call does without the function. Call it before anything is captured."""
    captured.function = counted = Counted(captured.function)
    for _ in range(CALLS):
        captured(*args)
    before = counted.calls
    captured(*args)
    return counted.calls == before


def derivatives(density, tasks, theta, shared):
    """Value, gradient, and the gradient's product with a fixed direction differentiated again."""
    leaves = [t.clone().requires_grad_() for t in (theta, shared) if t.numel()]
    phi = leaves[1] if len(leaves) > 1 else shared
    rows = density.log_likelihood(leaves[0], tasks, phi)
    grads = torch.autograd.grad(rows.sum(), leaves, create_graph=True)
    product = sum((g * (1 + torch.arange(g.numel()).reshape(g.shape))).sum() for g in grads)
    second = (
        torch.autograd.grad(product, leaves, allow_unused=True) if product.requires_grad else ()
    )
    return [rows.detach(), *(g.detach() for g in grads), *(s for s in second if s is not None)]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_derivatives_stay_bit_identical(case):
    density, fresh = build(case), build(case)
    theta, shared = values(case)
    first = derivatives(density, case.tasks, theta, shared)
    for _ in range(CALLS):
        density.log_likelihood(theta, case.tasks, shared)
    assert same(first, derivatives(density, case.tasks, theta, shared))
    elsewhere = values(case, seed=7)
    assert same(*(derivatives(d, case.tasks, *elsewhere) for d in (density, fresh)))


@pytest.mark.parametrize("name", ["normal", "network", "categorical"])
def test_a_model_seen_often_is_not_entered_any_more(name):
    case = CASES[name]
    density, (theta, shared) = build(case), values(case, 2)
    density.log_likelihood(theta, case.tasks, shared)
    (captured,) = (c for key, c in density._batched.items() if key[:2] == (1, False))
    assert is_replayed(captured, theta, shared, case.tasks.inputs, case.tasks.targets)


def test_a_density_records_its_own_method():
    """Nothing wrapped around it: the tracer looks at signatures."""
    case = CASES["normal"]
    density, (theta, shared) = build(case), values(case, 2)
    for _ in range(CALLS):
        density.log_likelihood(theta, case.tasks, shared)
    (captured,) = (c for key, c in density._batched.items() if key[:2] == (1, False))
    programs = list(captured._programs.values())
    assert programs and captured.function not in programs


# -- shapes ---------------------------------------------------------------------------------------


def test_each_shape_and_type_has_its_own_recording():
    captured = Captured(lambda a, b: (a * b).sum(-1) + torch.ones(len(a), dtype=a.dtype))
    for _ in range(CALLS):
        for rows in (1, 2, 4):
            for dtype in (torch.float32, FLOAT):
                a, b = A[:rows].to(dtype), B[:rows].to(dtype)
                assert torch.equal(captured(a, b), captured.function(a, b))


def test_more_shapes_than_are_kept_do_no_harm():
    captured = Captured(lambda a: a.sin() * a.shape[0])
    for rows in (*range(1, 41), *range(1, 41)):
        a = numbers(rows)
        for _ in range(CALLS // 2):
            assert torch.equal(captured(a), a.sin() * rows)
            assert torch.equal(captured(a + rows), (a + rows).sin() * rows)
    assert len(captured._programs) <= len(captured._calls) <= 32, "memory is bounded"


# -- what must not be recorded --------------------------------------------------------------------

RANDOM = {
    "numpy": lambda a: a * np.random.default_rng().normal(),
    "torch": lambda a: a * torch.rand(()),
    "dropout": lambda a: F.dropout(a, 0.5),
    "dropout of a constant": lambda a: a * F.dropout(torch.ones(3), 0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_stay_random(name):
    captured, a = Captured(RANDOM[name]), numbers(40, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outs = [captured(a) for _ in range(2 * CALLS)]
        assert not is_replayed(Captured(RANDOM[name]), a)
    assert not torch.equal(outs[-1], outs[-2]) and not torch.equal(outs[-1], outs[0])


def without_grad(a, b):
    with torch.no_grad():
        weight = a**2
    return weight * b


def branching(a, b):
    return a * b if float(a.detach().sum()) > 0 else a - b


@pytest.mark.parametrize("function", [without_grad, branching, lambda a, b: (a**2).detach() * b])
@pytest.mark.parametrize("start", [A, torch.zeros_like(A)])
def test_gradients_are_the_functions_own_everywhere(function, start):
    """At 0 the gradient of a² vanishes with and without `no_grad`: no evidence."""
    captured = Captured(function)
    for _ in range(CALLS):
        captured(start, B)
    for a in (A, -A, torch.zeros_like(A)):
        results = []
        for f in (captured, function):
            leaf, other = a.clone().requires_grad_(), B.clone().requires_grad_()
            value = f(leaf, other)
            grads = torch.autograd.grad(value.sum(), (leaf, other), allow_unused=True)
            results.append([value, *(torch.zeros_like(A) if g is None else g for g in grads)])
        assert same(*results)


def test_what_cannot_be_recorded_is_called():
    captured = Captured(lambda a: a * a.tolist()[0][0])
    assert not is_replayed(captured, A) and torch.equal(captured(A), A * A[0, 0])
    assert record(lambda a: a * a.tolist()[0][0], [A]) is None


# -- where it is called from ----------------------------------------------------------------------


def product(a, b):
    return (a.sin() * b).sum(-1)


TRANSFORMS = {
    "plain": lambda f: f(A, B),
    "no_grad": lambda f: torch.no_grad()(f)(A, B),
    "inference": lambda f: torch.inference_mode()(lambda: f(A.clone(), B))().clone(),
    "vmap": lambda f: torch.vmap(f)(A, B),
    "grad": lambda f: torch.func.grad(lambda a: f(a, B).sum())(A),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f))(A, B),
    "jacobian": lambda f: torch.func.jacrev(torch.func.grad(lambda a: f(a, B).sum()))(A),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_may_be_called_from_anywhere(name):
    captured, transform = Captured(product), TRANSFORMS[name]
    expected = transform(product)
    for _ in range(CALLS):
        torch.testing.assert_close(transform(captured), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(captured(A, B), product(A, B))


# -- a gradient as one program --------------------------------------------------------------------


def test_a_captured_gradient_is_the_gradient():
    counted = Counted(lambda a, b: (product(a, b) ** 2).sum())
    captured = CapturedGradient(counted, [A, B])
    recorded = counted.calls
    for k in range(3):
        leaves = [(t + k).requires_grad_() for t in (A, B)]
        value, expected = captured(*leaves), counted.function(*leaves)
        assert torch.equal(value, expected)
        # 3 is what comes down from the loss, multiplied in another order: rounding
        torch.testing.assert_close(
            torch.autograd.grad(3 * value, leaves),
            torch.autograd.grad(3 * expected, leaves),
            rtol=1e-14,
            atol=1e-14,
        )
    assert counted.calls == recorded, "Python is not entered again"


def test_a_captured_gradient_refuses_a_second_derivative():
    """Rather than leaving out the function's own curvature without a word."""
    captured = CapturedGradient(lambda a: (a**3).sum(), [A])
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(captured(leaf) ** 2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|not have been used"):
        torch.autograd.grad(grad.sum(), leaf)


def test_a_captured_gradient_of_what_cannot_be_recorded():
    captured = CapturedGradient(lambda a: (a * a.tolist()[0][0]).sum(), [A])
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(captured(leaf), leaf)
    assert torch.equal(grad, torch.full_like(A, A[0, 0].item()))


def test_arguments_in_the_same_memory_stay_apart() -> None:
    """As the start of a descent does from a prior's mean: it moves, the mean does not."""
    loc = torch.tensor([1.0, 2.0])
    start = loc.expand(1, -1)

    def function(theta: torch.Tensor, loc: torch.Tensor) -> list[torch.Tensor]:
        return [(theta - loc[None]).square().sum(-1)]

    program = record(function, [start, loc])
    assert program is not None
    assert program(start + 1.0, loc)[0].item() == 2.0
    assert trace(function, [start, loc])(start + 1.0, loc)[0].item() == 2.0


def test_what_is_written_in_place_is_recorded_with_copies() -> None:
    """As a law of Pyro does it; the recording is right at other numbers too."""

    def written(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(3, dtype=x.dtype)
        out[..., 0] = x[0]
        out[..., 1:] = x[1:] ** 2
        return out.exp().sum()

    program = record(written, [torch.tensor([0.1, 0.2, 0.3])])
    assert program is not None
    other = torch.tensor([-1.0, 2.0, 0.5])
    torch.testing.assert_close(program(other), written(other))
