"""Convolutions as products of windows are convolutions, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta import Density, Tasks
from varmeta.inference.energy import TaskEnergy
from varmeta.models import network
from varmeta.models.convolution import product_conv2d
from varmeta.models.operations import BatchedOperations
from varmeta.models.programs import Programs


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


class Convolutions(TorchDispatchMode):
    """Counts those of the library."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (4, 4)])
@pytest.mark.parametrize("window", [(1, 1), (2, 3), (3, 3), (5, 4)])
def test_the_same_value(window: tuple[int, int], stride: tuple[int, int]) -> None:
    """Windows that fit and that do not, over the edge and off it, and pixels that are in none."""
    for size in (5, 6), (7, 7), (8, 9):
        for padding in (0, 0), (1, 1), (2, 1):
            image, weight, bias = numbers(3, 2, *size), numbers(4, 2, *window, seed=1), numbers(4)
            for b in (bias, None):
                wanted = torch.conv2d(image, weight, b, stride, padding)
                got = product_conv2d(image, weight, b, stride, padding)
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
                assert got.is_contiguous(), "a model may ask for a view of it"


@pytest.mark.parametrize("channels", [1, 4])  # few taps and many are laid out differently
def test_derivatives_with_weights_of_each_task(channels: int) -> None:
    """First and second ones, by finite differences; under `vmap` as the library's."""

    def product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return product_conv2d(x, w, b, (2, 2), (1, 1))

    def library(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.conv2d(x, w, b, (2, 2), (1, 1))

    shapes = (2, 2, channels, 4, 3), (2, 2, channels, 2, 2), (2, 2)
    tensors = [numbers(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    batched = torch.vmap(product)
    wanted = torch.vmap(library)(*tensors)
    torch.testing.assert_close(batched(*tensors), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(batched, tensors)
    assert torch.autograd.gradgradcheck(batched, tensors)
    twice = torch.vmap(torch.vmap(product, (None, 0, None)), (0, None, 0))
    image, weight, bias = (t.detach() for t in tensors)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(
                twice(image, weight, bias)[i, j], library(image[i], weight[j], bias[i])
            )


IMAGE, WEIGHT = numbers(2, 4, 9, 9), numbers(4, 4, 3, 3, seed=1)
CASES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "stride 2": (lambda: torch.conv2d(IMAGE, WEIGHT, stride=2, padding=1), 0),
    "a layer": (lambda: nn.Conv2d(4, 4, 2, 2, dtype=FLOAT)(IMAGE), 0),
    "no padding but at the edge": (lambda: torch.conv2d(IMAGE, WEIGHT, None, 3, "valid"), 1),
    "stride 1": (lambda: torch.conv2d(IMAGE, WEIGHT), 1),
    "dilated": (lambda: torch.conv2d(IMAGE, WEIGHT, stride=2, dilation=2), 1),
    "groups": (lambda: torch.conv2d(IMAGE, WEIGHT[:, :2], stride=2, groups=2), 1),
    "one image": (lambda: torch.conv2d(IMAGE[0], WEIGHT, stride=2), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_a_product(name: str) -> None:
    """Where windows overlap little and it will be compiled; else the library's, as it was."""
    function, library = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = function()
        torch.manual_seed(0)
        with Convolutions() as seen, BatchedOperations(compiled=True):
            got = function()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert seen.count == library
    with torch.random.fork_rng(), Convolutions() as seen, BatchedOperations():
        function()
    assert seen.count == 1


def test_a_network_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient and product with the Hessian, recorded as what would be compiled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(
            *(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh()),
            *(nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Tanh()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
        ).to(FLOAT)
    model = network(layers, lambda out: dist.Categorical(logits=out))
    labels = torch.tensor([0, 1, 1])
    tasks = Tasks.from_list([(numbers(3, 1, 6, 7, seed=i), labels) for i in range(2)])
    density = Density(model, tasks)
    theta, v = (0.5 * numbers(2, density.dim, seed=s) for s in (5, 6))
    # inductor takes seconds
    monkeypatch.setattr(Programs, "_finish", lambda self, graph, tensors, **_: graph)
    found = []
    for d in (density, density.compiled()):
        energy = TaskEnergy(d, tasks, d.shared_init)
        with Convolutions() as seen:
            at = energy.linearise(theta)
            found.append([energy.gradient(theta), at.value, at.grad, at.product(v)])
        assert (seen.count == 0) == (d is not density)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert set(d.execution().values()) == {"compiled"}
