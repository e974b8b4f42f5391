"""Compiled programs give what the written ones do, to rounding; else these run."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from density_cases import energy_of, numbers, second_order
from helpers import FLOAT, assert_same
from torch import Tensor

from varmeta.inference.energy import TaskEnergy
from varmeta.models import programs as programs_module
from varmeta.models.capture import compile_graph, trace
from varmeta.models.density import Density
from varmeta.models.programs import Derivative, Programs
from varmeta.tasks import Tasks


def small(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(torch.tanh(x @ w), 1.0), obs=y)


TASKS = Tasks.from_list([(numbers(4, 2, seed=i), numbers(4, seed=9 + i)) for i in range(3)])


def derivatives(density: Density) -> list[Tensor]:
    energy = TaskEnergy(density, TASKS, density.shared_init)
    theta, v = numbers(3, 2, seed=1), numbers(3, 2, seed=2)
    at = energy.linearise(theta)
    return [energy.gradient(theta), at.value, at.grad, at.product(v)]


@pytest.fixture
def inductor() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of PyTorch's own import
        importlib.import_module("torch._inductor.config")
        return importlib.import_module("torch._inductor")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's, when it is imported
def test_compiled_is_the_same_to_rounding() -> None:
    """The first call compiles: seconds each, so one small model and two derivatives."""
    density = Density(small, TASKS)
    compiled = density.compiled()
    for a, b in zip(derivatives(compiled), derivatives(density), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    names = "gradient", "linearise", "product"
    assert compiled.execution() == {f"likelihood: {name}": "compiled" for name in names}
    assert density.execution() == {}, "the uncompiled density is left as it was"


def descend(slope: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A step, and what it moved along."""
    grad = slope(x)
    return x - 0.1 * grad, grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_steps_that_are_compiled_together_are_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    """Of a gradient in one type and a product in another; two programs each are called."""
    programs = Programs(energy_of, "toy", compiled=True)
    for rows, dtype, which in ((4, FLOAT, "gradient"), (2, torch.float32, "product")):
        theta, weight, v = (numbers(rows, 3, seed=s).to(dtype) for s in range(3))
        derivative: Derivative | None
        if which == "gradient":
            derivative, start, order = programs.slope(theta, [weight]), theta, 1
        else:
            product = programs.linearise(theta, [weight]).product
            assert isinstance(product, Derivative)
            derivative, start, order = product, v, 2
        assert derivative is not None
        found = derivative.repeat(descend, (start, start), 6)
        wanted = start, start
        for _ in range(6):
            wanted = descend(
                lambda u, o=order, t=theta, w=weight: second_order(u, u if o == 1 else t, w)[o],
                *wanted,
            )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=100 * torch.finfo(dtype).eps)
    compiled = "3 x gradient", "3 x product", "linearise"
    assert programs.report == dict.fromkeys(compiled, "compiled"), "single ones are not needed"
    assert sum("3 x" in key[0] for key in programs._kept) == 2
    assert "as written" not in caplog.text


def test_steps_on_many_numbers_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, weight = numbers(4, 3), numbers(4, 3, seed=1)
    for large, name in ((11, "1 x gradient"), (12, "2 x gradient")):
        monkeypatch.setattr(programs_module, "LARGE", large)
        programs = Programs(energy_of, "toy", compiled=True)
        monkeypatch.setattr(programs, "_finish", lambda graph, tensors, **_: graph)
        slope = programs.slope(theta, [weight])
        assert slope is not None
        slope.repeat(descend, (theta, theta), 2)
        assert programs.report == {name: "compiled"}


def test_steps_that_cannot_be_compiled_are_taken_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theta, weight = numbers(4, 3), numbers(4, 3, seed=1)
    programs = Programs(energy_of, "toy", compiled=True)
    monkeypatch.setattr(
        programs, "_finish", lambda graph, tensors, **_: graph
    )  # inductor takes seconds
    slope = programs.slope(theta, [weight])
    assert slope is not None

    def reads(slope: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor]:
        return (x - slope(x) if x.sum().item() < 1e9 else x,)

    (found,) = slope.repeat(reads, (theta,), 2)
    first = theta - second_order(theta, theta, weight)[1]
    torch.testing.assert_close(found, first - second_order(first, first, weight)[1])
    assert programs.report["2 x gradient"].startswith("as written: ")
    assert "2 x gradient is run as written" in caplog.text


def test_where_compiling_fails_the_model_is_run_as_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, inductor: ModuleType
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler found\nand more lines")

    monkeypatch.setattr(inductor, "compile", broken)
    plain = Density(small, TASKS)
    hopeful = plain.compiled()
    assert_same(derivatives(hopeful), derivatives(plain))
    assert set(hopeful.execution().values()) == {"as written: RuntimeError: no C++ compiler found"}
    assert "is run as written: RuntimeError: no C++ compiler found" in caplog.text


def test_what_cannot_be_called_from_cpp_is_called_from_python(
    monkeypatch: pytest.MonkeyPatch, inductor: ModuleType
) -> None:
    asked = []

    def compile(graph: Any, tensors: Any, options: dict[str, Any] | None) -> Any:
        asked.append("cpp_wrapper" in (options or {}))
        if asked[-1]:
            raise RuntimeError("no headers")
        return graph

    monkeypatch.setattr(inductor, "compile", compile)
    tensors = [numbers(4, 3, seed=s) for s in range(3)]
    graph = trace(second_order, tensors)
    for many in (False, True):
        found = compile_graph(graph, tensors, many=many)(*tensors)
        for a, b in zip(found, second_order(*tensors), strict=True):
            torch.testing.assert_close(a, b)
    assert asked == [False, True, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sum_into_few_places_is_compiled_with_several_threads() -> None:
    """The gradient in scales that coordinates share: PyTorch 2.13 fails to share it out."""

    def scatter(seed: Tensor, groups: Tensor) -> list[Tensor]:
        return [seed.new_zeros(1).index_put((groups,), seed.sum(0), accumulate=True)]

    tensors = [numbers(3, 3), torch.zeros(3, dtype=torch.long)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = compile_graph(trace(scatter, tensors), tensors)(*tensors)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], tensors[0].sum()[None])
