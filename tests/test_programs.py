"""Programs: a recorded derivative is the written one bit for bit, or is not used and says so."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from density_cases import CASES, build, energy_of, numbers, second_order, values
from helpers import FLOAT, assert_same
from torch import Tensor

from varmeta.inference.energy import TaskEnergy
from varmeta.models import programs as programs_module
from varmeta.models.capture import CALLS_BEFORE_CAPTURE, KEPT_SHAPES, trace
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.models.programs import Programs
from varmeta.models.simplify import direct, split_linear
from varmeta.tasks import Tasks

SOON = 8
CALLS = SOON + 2


@pytest.fixture(autouse=True)
def recorded_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """After fewer calls than usual, which are slow as written."""
    monkeypatch.setattr(programs_module, "CALLS_BEFORE_CAPTURE", SOON)


@dataclass(frozen=True)
class At:
    """An energy with its tensors, at a point and with a direction."""

    density: Density
    tasks: Tasks
    tensors: dict[str, Tensor]
    v: Tensor

    def energy(self) -> tuple[TaskEnergy, list[Tensor]]:
        """With its tensors as leaves."""
        given = {n: t.clone().requires_grad_() for n, t in self.tensors.items() if n != "theta"}
        groups = torch.arange(self.density.dim)
        prior = GaussianPrior(given["loc"], given["log_scale"], groups, given.get("factor"))
        return TaskEnergy(self.density, self.tasks, given["shared"], prior), list(given.values())

    def everything(self) -> dict[str, list[Tensor]]:
        """All that minimisers, solvers and adjoints ask of an energy."""
        energy, leaves = self.energy()
        theta = self.tensors["theta"].clone().requires_grad_()
        of = [theta, *leaves]
        loss = energy.loss(theta)
        first = torch.autograd.grad(loss.sum(), of, allow_unused=True, materialize_grads=True)
        grad = energy.gradient(theta)
        at = energy.linearise(theta)
        pulled = torch.autograd.grad(at.grad, leaves, self.v, allow_unused=True)
        with torch.no_grad():
            plain = energy.gradient(theta)
        return {
            "loss": [loss.detach(), *first],
            "gradient": [grad.detach(), plain],
            "pullback": list(torch.autograd.grad(grad, of, self.v, allow_unused=True)),
            "linearise": [at.value, at.grad.detach(), at.product(self.v), at.product(2 * self.v)],
            "pullback of linearise": list(pulled),
        }


def at(name: str, density: Density | None = None, seed: int = 0, rank: int = 0) -> At:
    case = CASES[name]
    theta, shared = values(case, seed=seed)
    dim = case.dim
    tensors = {
        "theta": theta,
        "loc": 0.3 * numbers(dim, seed=seed + 3),
        "log_scale": 0.3 * numbers(dim, seed=seed + 4),
        "shared": shared,
    }
    if rank:
        tensors["factor"] = 0.3 * numbers(dim, rank, seed=seed + 5)
    return At(density or build(case), case.tasks, tensors, numbers(*theta.shape, seed=seed + 6))


# -- recorded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("normal", 0),
        ("logistic", 0),
        ("categorical", 2),
        ("network", 1),
    ],
)
def test_recorded_is_as_written_bit_for_bit(name: str, rank: int) -> None:
    """Where it was recorded, and elsewhere."""
    here = at(name, rank=rank)
    elsewhere = at(name, here.density, seed=20, rank=rank)
    written = here.everything(), at(name, seed=20, rank=rank).everything()
    assert here.density.execution() == {}, "one call records nothing"
    for _ in range(CALLS):
        here.everything()
    how = here.density.execution()
    assert set(how.values()) == {"recorded"}
    assert {n.split()[1] for n in how} == {"gradient", "first", "pullback", "linearise"}
    assert_same(here.everything(), written[0])
    assert_same(elsewhere.everything(), written[1])


def test_products_are_turned_only_where_that_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer's gradient is then the transpose of no product, which would have to be copied."""
    copies: list[bool] = []

    def weighted(theta: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ theta.reshape(-1, 3, 4).mT).square().sum((-2, -1))

    def wrong(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        (tanh,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
        with graph.graph.inserting_before(tanh):
            tanh.args = (graph.graph.call_function(torch.ops.aten.mul.Tensor, (*tanh.args, 1.001)),)
        graph.recompile()
        return graph

    def counted(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        copies.append(sum(n.target is torch.ops.aten.clone.default for n in graph.graph.nodes))
        return direct(graph)

    monkeypatch.setattr(programs_module, "direct", counted)
    theta, x = numbers(2, 12), numbers(2, 5, 4, seed=1)
    for turned, recordings in ((programs_module.turn_products, [False]), (wrong, [True, True])):
        monkeypatch.setattr(programs_module, "turn_products", turned)
        programs = Programs(weighted, "toy")
        written = programs.gradient(theta, [x])
        for _ in range(CALLS):
            found = programs.gradient(theta, [x])
        assert_same(found, written)
        assert programs.report == {"gradient": "recorded"}
        assert copies == recordings
        copies.clear()


def test_recording_waits_for_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product of a linearisation counts as one."""
    monkeypatch.setattr(programs_module, "CALLS_BEFORE_CAPTURE", CALLS_BEFORE_CAPTURE)

    here = at("normal")
    energy, _ = here.energy()
    with torch.no_grad():
        for _ in range(CALLS_BEFORE_CAPTURE - 1):
            energy.gradient(here.tensors["theta"])
        assert here.density.execution() == {}
        energy.gradient(here.tensors["theta"])
        first = dict(here.density.execution())
        assert list(first.values()) == ["recorded"]
    linearised = energy.linearise(here.tensors["theta"])
    for _ in range(CALLS_BEFORE_CAPTURE - 1):
        linearised.product(here.v)
    assert here.density.execution() == first
    energy.linearise(here.tensors["theta"])
    assert here.density.execution()["energy: linearise"] == "recorded"


def test_the_model_is_not_entered_any_more() -> None:
    calls = 0
    case = CASES["normal"]

    def counted(x: Tensor, y: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return case.model(x, y)

    here = at("normal", Density(counted, case.tasks, shared=case.shared))
    for _ in range(CALLS):
        here.everything()
    before = calls
    here.everything()
    assert calls == before


def test_a_recording_serves_all_energies_of_a_density() -> None:
    """Other data, prior and φ of the same shapes are arguments, not constants of it."""
    case = CASES["normal"]
    density = build(case)
    for _ in range(CALLS):
        at("normal", density).everything()
    known = dict(density.execution())
    other = Tasks.from_list(
        [(numbers(n, 2, seed=50 + n), numbers(n, seed=60 + n)) for n in (6, 3, 2)]
    )
    assert other.inputs.shape == case.tasks.inputs.shape
    there = at("normal", density, seed=7)
    fresh = At(build(case), other, there.tensors, there.v)
    assert_same(At(density, other, there.tensors, there.v).everything(), fresh.everything())
    assert density.execution() == known


# -- what cannot be recorded ----------------------------------------------------------------------


def branching(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Reads a value of its data, which no recording can hold."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    mean = _Doubled.apply(x @ w)
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class _Doubled(torch.autograd.Function):
    """2z, written so that a value is read from z, in value and derivative."""

    generate_vmap_rule = False

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return 2 * z if z.detach().sum().item() < float("inf") else z

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: object, *v: Tensor) -> Tensor:
        return 2 * v[0]

    @staticmethod
    def vmap(info: object, in_dims: tuple, z: Tensor) -> tuple[Tensor, int]:
        return _Doubled.apply(z), in_dims[0]


def noisy(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Draws a number that hardly matters, but matters: a recording would draw it once for all."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        mean = (2 + 1e-10 * DRAWS.random()) * (x @ w)
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


DRAWS = random.Random(0)


@pytest.mark.parametrize("model", [branching, noisy])
def test_what_cannot_be_recorded_is_run_as_written_and_said(
    model: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """And right: y ~ N(2xw, 1) by hand."""
    tasks = Tasks.from_list([(numbers(4, 2, seed=i), numbers(4, seed=9 + i)) for i in range(3)])
    density = Density(model, tasks)
    theta, v = numbers(3, 2, seed=1), numbers(3, 2, seed=2)
    energy = TaskEnergy(density, tasks, density.shared_init)
    for _ in range(CALLS):
        grad, product = energy.gradient(theta), energy.linearise(theta).product(v)
    how = density.execution()
    assert how.keys() == {"likelihood: gradient", "likelihood: linearise"}
    assert all(h.startswith("as written: ") for h in how.values())
    assert "is run as written" in caplog.text
    x = 2 * tasks.inputs
    residual = (x @ theta[..., None])[..., 0] - tasks.targets
    torch.testing.assert_close(grad, (x.mT @ residual[..., None])[..., 0], rtol=1e-7, atol=1e-7)
    wanted = (x.mT @ (x @ v[..., None]))[..., 0]
    torch.testing.assert_close(product, wanted, rtol=1e-7, atol=1e-7)


# -- the cut at v ---------------------------------------------------------------------------------


def test_what_does_not_depend_on_v_is_computed_before_it() -> None:
    """No transcendental function, nothing of θ alone, is left in the product."""
    v, theta, weight = (numbers(4, 3, seed=s) for s in range(3))
    graph = trace(second_order, [v, theta, weight])
    before, after = split_linear(graph)
    value, grad, *residuals = before(theta, weight)
    wanted = second_order(v, theta, weight)
    assert_same([value, grad, after(v, *residuals)[0]], wanted)
    nodes = list(after.graph.nodes)
    first, *rest = [n for n in nodes if n.op == "placeholder"]
    moving = {first}
    for node in nodes:
        if node.op == "call_function":
            assert any(a in moving for a in node.all_input_nodes), f"{node} is free of v"
            moving.add(node)
    assert len(rest) == len(residuals)
    assert not any("tanh.default" in str(n.target) for n in nodes)
    assert any("tanh.default" in str(n.target) for n in before.graph.nodes)
    with torch.no_grad():
        other = numbers(4, 3, seed=5)
        assert_same(after(other, *residuals)[0], second_order(other, theta, weight)[2])


@pytest.mark.parametrize("recorded", [False, True])
def test_the_product_is_linear_and_symmetric(recorded: bool) -> None:
    here = at("network")
    for _ in range(CALLS * recorded):
        here.everything()
    energy, _ = here.energy()
    product = energy.linearise(here.tensors["theta"]).product
    u, v = here.v, numbers(*here.v.shape, seed=40)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(product(u + v), product(u) + product(v), **close)
    torch.testing.assert_close(product(-3.0 * v), -3.0 * product(v), **close)
    assert torch.equal(product(torch.zeros_like(v)), torch.zeros_like(v))
    torch.testing.assert_close((u * product(v)).sum(-1), (v * product(u)).sum(-1), **close)


def test_an_energy_without_curvature_has_a_product_of_zero() -> None:
    programs = Programs(lambda theta, w: (theta * w).sum(-1), "line")
    theta, w = numbers(4, 3, seed=1), numbers(4, 3, seed=2)
    for _ in range(CALLS):
        linearised = programs.linearise(theta, [w])
        product = linearised.product(theta)
        assert torch.equal(product, torch.zeros_like(theta)) and torch.equal(linearised.grad, w)
        assert_same(programs.pullback(theta, [theta, w], [True, True]), [0 * theta, theta])
    assert set(programs.report.values()) == {"recorded"}


# -- shapes ---------------------------------------------------------------------------------------


def test_each_shape_and_type_has_its_own_recording() -> None:
    programs = Programs(energy_of, "toy")
    theta, weight, v = (numbers(5, 3, seed=s) for s in range(3))
    for _ in range(CALLS):
        for rows in (1, 3, 5):
            for dtype in (torch.float32, FLOAT):
                t, w, u = (a[:rows].to(dtype) for a in (theta, weight, v))
                value, grad, product = second_order(u, t, w)
                assert_same(list(programs.gradient(t, [w])), [value, grad])
                found = programs.linearise(t, [w])
                assert_same([found.value, found.grad, found.product(u)], [value, grad, product])
    assert len(programs._kept) == 2 * 3 * 2


def test_more_shapes_than_are_kept_do_no_harm() -> None:
    """The shape that was not used for longest is forgotten, a recorded one too, and comes back."""
    programs = Programs(energy_of, "toy")

    def check(rows: int) -> None:
        theta, weight = numbers(rows, 2, seed=1), numbers(rows, 2, seed=2)
        value, grad, _ = second_order(theta, theta, weight)
        assert_same(list(programs.gradient(theta, [weight])), [value, grad])

    for _ in range(CALLS):
        check(1)
    assert len(programs._kept) == 1
    for rows in range(2, KEPT_SHAPES + 10):
        check(rows)
        check(1)  # in use: kept
    assert len(programs._kept) == 1 and len(programs._calls) == KEPT_SHAPES
    for rows in range(2, KEPT_SHAPES + 2):
        check(rows)
    assert len(programs._kept) == 0 and len(programs._calls) == KEPT_SHAPES
    for _ in range(CALLS):
        check(1)
    assert len(programs._kept) == 1 and len(programs._calls) == KEPT_SHAPES
