"""One-dimensional tasks with several minima, known to the grid, and a small network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta import Density, GaussianPrior, Langevin, Tasks
from varmeta.figures import grid, implicit_slope, stationary
from varmeta.models import network

F64 = torch.float64
ERRORS = 4.5  # standard errors: a false-alarm rate of 7e-6 for each comparison
LIMITS = (-9.0, 9.0)
CENTRES, QUERIES = (0.8, -0.4, 1.7), (1.0, 0.3, -0.6)


def waves(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Rows see θ + x sin 3θ: with x = 1.5 their squared error has many minima, with 0 one."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    mean = theta + x[..., 0] * torch.sin(3 * theta)
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def wavy_tasks(count: int = 3) -> Tasks:
    """Each a row with waves for the support and one without for the query."""
    x = torch.tensor([[1.5], [0.0]], dtype=F64).expand(count, 2, 1)
    y = torch.tensor([CENTRES[:count], QUERIES[:count]], dtype=F64).T
    is_query = torch.tensor([[False, True]]).expand(count, 2)
    names = tuple(f"wave {k}" for k in range(count))
    return Tasks(x, y.contiguous(), torch.ones_like(is_query), is_query, names)


@dataclass(frozen=True)
class Wave:
    """One of these tasks as `varmeta.figures` takes them."""

    centre: float
    limits: tuple[float, float] = LIMITS

    def value(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        return 0.5 * (x + 1.5 * np.sin(3 * x) - self.centre) ** 2 + 0.5 * np.log(2 * np.pi)

    def slope(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        return (x + 1.5 * np.sin(3 * x) - self.centre) * (1 + 4.5 * np.cos(3 * x))

    def curvature(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        bent = -13.5 * np.sin(3 * x) * (x + 1.5 * np.sin(3 * x) - self.centre)
        return (1 + 4.5 * np.cos(3 * x)) ** 2 + bent


def query(task: int):  # type: ignore[no-untyped-def]
    return lambda x: 0.5 * (x - QUERIES[task]) ** 2 + 0.5 * np.log(2 * np.pi)


def stationary_points(task: int, loc: float) -> tuple[np.ndarray, np.ndarray]:
    return stationary(Wave(CENTRES[task]), loc)  # type: ignore[arg-type]


def border_slopes(task: int, loc: float) -> np.ndarray:
    """The maxima's derivatives in θ0 and in the log scale, at scale 1, `[2, K − 1]`."""
    edges = stationary_points(task, loc)[1]
    moves = implicit_slope(Wave(CENTRES[task]), edges)  # type: ignore[arg-type]
    return moves * np.stack([np.ones_like(edges), 2 * (edges - loc)])


def law(task: int, loc: float, algorithm: Langevin) -> grid.Law:
    chain = grid.Chain(
        Wave(CENTRES[task]).slope,
        algorithm.step_size or 0.0,
        np.array(algorithm.temperatures),
        algorithm.run_length,
        bound=algorithm.clip,
    )
    return chain.law(loc, (-6.0, 6.0), resolution=4)


def prior_at(loc: float, scale: float = 1.0) -> GaussianPrior:
    return GaussianPrior.create(torch.tensor([loc], dtype=F64), scale)


def small_network() -> tuple[Density, Tasks]:
    """Two tasks of a network of 7 weights, whose hidden units can be swapped and turned over."""
    source = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    net = net.double()
    x = 2 * torch.randn(2, 6, 1, generator=source, dtype=F64)
    tasks = Tasks.from_list([(a, torch.sin(2 * a[:, 0])) for a in x]).split(0.4)
    return Density(network(net, lambda out: dist.Normal(out[:, 0], 0.3)), tasks), tasks
