"""Data, and models of many kinds: what `benchmarks.stale` and the tests of fingerprints keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from varmeta import Density, Tasks
from varmeta.models import linear_modules, network
from varmeta.problems import county
from varmeta.seeds import generator

F64 = torch.float64
SCALE = 2.0
OPTIONS = {"tails": {"light", "heavy", "none"}, "laws": [dist.Normal, dist.StudentT]}
LAW = dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0)


def data(count: int = 3, shift: float = 0.0) -> Tasks:
    rng = generator(0)
    draw = partial(torch.randn, generator=rng, dtype=F64)
    pairs = [(draw(n, 1), draw(n) + shift) for n in (4, 3, 5, 4)[:count]]
    names = ["beta", "alpha", "gamma", "delta"][:count]
    return Tasks.from_list(pairs, names=names, input_names=["dose"]).split(0.3)


def mean_of(theta: Tensor, x: Tensor) -> Tensor:
    return theta * x[..., 0] * SCALE


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    law = OPTIONS["laws"][0] if "light" in OPTIONS["tails"] else dist.Cauchy
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", law(mean_of(theta, x), 0.5), obs=y)


def noisy(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", LAW)
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(theta * x[..., 0], noise), obs=y)


def around(noise: float, prior: float = 2.0, site: str = "theta") -> Callable[..., Tensor]:
    """A model in a closure."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample(site, dist.Normal(0.0, prior))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(theta * x[..., 0], noise), obs=y)

    return model


def heavy(x: Tensor, y: Tensor | None = None) -> Tensor:
    """As `around(0.5)`, with another likelihood."""
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.StudentT(3.0, theta * x[..., 0], 0.5), obs=y)


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.weight = PyroSample(dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.weight * x[..., 0] + self.bias
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def counting() -> Callable[..., Tensor]:
    """A model that keeps a count, a list and a cache as it runs."""
    plain, calls, seen = around(0.5), 0, []

    @lru_cache
    def half(rows: int) -> float:
        return 0.5 * rows

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        seen.append(tuple(x.shape))
        half(len(x))
        return plain(x, y)

    return model


def mlp() -> Callable[..., Any]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    return network(net.double(), lambda out: dist.Normal(out[:, 0], 0.3))


def two_inputs() -> Tasks:
    x = torch.ones(3, 2, dtype=F64)
    return Tasks.from_list([(x, x[:, 0]), (2 * x, x[:, 0])], names="ab")


def planted() -> Tasks:
    return linear_modules(3, support=2, query=2)(generator(0))


# A density, and tasks of its kind.
DENSITIES: dict[str, Callable[[], tuple[Density, Tasks]]] = {
    "function": lambda: (Density(line, data()), data()),
    "shared law": lambda: (Density(noisy, data(), shared=["noise"]), data()),
    "closure": lambda: (Density(around(0.5), data()), data()),
    "module": lambda: (Density(Regression(), data()), data()),
    "network": lambda: (Density(mlp(), data()), data()),
    "library's": lambda: (Density(county, two_inputs(), shared=["noise"]), two_inputs()),
    "method": lambda: (Density(linear_modules(3).model, planted()), planted()),
    "counting": lambda: (Density(counting(), data()), data()),
    "partial": lambda: (Density(partial(line), data()), data()),
}
