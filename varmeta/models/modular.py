"""Two problems with planted module scales, linear and spiral (Chen et al., 2019).

θ_{m,i} ~ N(φ, σ_m² I) for the coordinates of module m in task i; a task's rows are noisy readings
of a known function of all of θ_i. What a strategy that learns a scale for each module finds can be
compared with the σ_m that were planted (Chen, Friesen, Behbahani, Doucet, Budden, Hoffman & de
Freitas, 2019, Modular Meta-Learning with Shrinkage).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.models.modules import Modules
from varmeta.tasks import Tasks


@dataclass(frozen=True, eq=False)
class PlantedModules:
    """Tasks whose parameters come from modules of known scale; itself the draw of a `TaskSource`.

    M modules, D coordinates, K numbers in a row. `model` is an ordinary Pyro model of one task with
    a site for each module, so that `GaussianPrior.from_density(density)` has the right modules.

    Attributes:
        num_tasks: T, tasks per draw.
        support: support rows per task.
        query: query rows per task.
        splits: S, how often each task is drawn, each time with another part of the same rows as
            its support: scales are learned from more pairs of support and query, in the same data.
        loc: `[D]`, the planted θ0.
        scales: `[M]`, the planted standard deviations.
        modules: which module each coordinate belongs to.
        size: coordinates of each module.
        noise: `[K]`, standard deviations of a row's noise.
        readings: θ `[..., D]` to the noiseless row `[..., K]`.
        prior_scale: the model's own prior of each coordinate is N(0, prior_scale²), one for all:
            where learning starts.
    """

    num_tasks: int
    support: int
    query: int
    splits: int
    loc: Tensor
    scales: Tensor
    modules: Modules
    size: int
    noise: Tensor
    readings: Callable[[Tensor], Tensor]
    prior_scale: float

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """One task: `x` is `[N, 0]` and only says how many rows there are; `y` is `[N, K]`."""
        prior = dist.Normal(x.new_zeros(self.size), self.prior_scale).to_event(1)
        parts = [pyro.sample(name, prior) for name in self.modules.names]
        mean = self.readings(torch.cat(parts))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(mean, self.noise.to(x)).to_event(1), obs=y)

    def parameters(self, generator: torch.Generator) -> Tensor:
        """θ_i `[T, D]`: those of the tasks that a generator in the same state draws."""
        shape = (self.num_tasks, len(self.loc))
        unit = torch.randn(shape, generator=generator, dtype=self.loc.dtype)
        return self.loc + self.scales[self.modules.groups] * unit

    def spread(self, loc: Tensor) -> Tensor:
        """Root mean square of θ_{m,i} − loc in each module, `[M]`: √(σ_m² + ‖φ − loc‖²/size).

        The scales of the normal around `loc` `[D]` that is closest to the planted one, hence what a
        strategy should find whose θ0 has ended at `loc` and not at φ.
        """
        square = self.scales**2
        off = (self.loc - loc.detach().to(self.loc)) ** 2 / self.size
        return square.index_add(0, self.modules.groups, off).sqrt()

    def __call__(self, generator: torch.Generator) -> Tasks:
        """Tasks, support rows first: inputs `[ST, N, 0]`, targets `[ST, N, K]`.

        Those of the second split are behind all tasks of the first, and so on.
        """
        mean = self.readings(self.parameters(generator))[:, None]
        count, rows = self.num_tasks, self.support + self.query
        shape = (count, rows, len(self.noise))
        targets = mean + self.noise * torch.randn(shape, generator=generator, dtype=self.loc.dtype)
        part = torch.arange(rows) // self.support
        is_query = torch.stack([part != s for s in range(self.splits)])
        names = [
            f"{i}" if s == 0 else f"{i} [{s}]" for s in range(self.splits) for i in range(count)
        ]
        return Tasks(
            inputs=targets.new_zeros(count * self.splits, rows, 0),
            targets=targets.repeat(self.splits, 1, 1),
            mask=torch.ones(count * self.splits, rows, dtype=torch.bool),
            is_query=is_query.repeat_interleave(count, 0),
            names=tuple(names),
        )


def linear_modules(
    num_tasks: int = 1000,
    *,
    support: int = 4,
    query: int = 16,
    splits: int = 1,
    dtype: torch.dtype = torch.float64,
) -> PlantedModules:
    """8 modules of one coordinate each, read one by one and all together: a linear problem.

    φ = 1, σ = 8 in four modules and 2 in the others. A row holds the 8 coordinates with noise of
    standard deviation 8 (in the first four) and 5, and their sum over √8 with noise 1, which ties
    the modules together: K = 9.

    Args:
        num_tasks: tasks per draw.
        support: support rows per task. With 4 the coordinates' own readings have errors of 4 and
            2.5, next to scales of 8 and 2: the scales matter, and can be told from 1,000 tasks.
        query: query rows per task.
        splits: different choices of the support rows per task (see `PlantedModules`).
        dtype: of all numbers.

    Example:
        >>> from varmeta import Density, GaussianPrior, TaskSource
        >>> problem = linear_modules(5)
        >>> density = Density(problem.model, TaskSource(problem, seed=0))
        >>> problem.scales.tolist()
        [8.0, 8.0, 8.0, 8.0, 2.0, 2.0, 2.0, 2.0]
        >>> len(GaussianPrior.from_density(density).modules)
        8
    """

    def readings(theta: Tensor) -> Tensor:
        return torch.cat([theta, theta.sum(-1, keepdim=True) / math.sqrt(8)], -1)

    sigma = torch.tensor([8.0] * 4 + [2.0] * 4, dtype=dtype)
    noise = torch.tensor([8.0] * 4 + [5.0] * 4 + [1.0], dtype=dtype)
    return _planted(num_tasks, support, query, splits, 1.0, sigma, 1, noise, readings)


def spiral_modules(
    num_tasks: int = 1000,
    *,
    support: int = 10,
    query: int = 10,
    splits: int = 1,
    readings_per_row: int = 1,
    dtype: torch.dtype = torch.float64,
) -> PlantedModules:
    """10 modules of two coordinates each, turned by their own length: a nonlinear problem.

    φ = 2, σ = 4 in eight modules and 8 in the last two. A row holds each pair rotated by the angle
    (π/5)·‖pair‖, with noise of standard deviation 10: K = D = 20. Modules do not interact.

    Args:
        num_tasks: tasks per draw.
        support: support rows per task.
        query: query rows per task.
        splits: different choices of the support rows per task (see `PlantedModules`).
        readings_per_row: a row is the mean of so many, with noise 10/√readings_per_row: as much as
            they all say, at the price of one. From some 300 on a pair's place on its circle is
            known, and with it which minimum of E is the right one.
        dtype: of all numbers.

    Raises:
        ValueError: a count below 1, or more splits than the rows have.

    Example:
        >>> from varmeta.seeds import generator
        >>> spiral_modules(5)(generator(0)).targets.shape
        torch.Size([5, 20, 20])
    """
    if readings_per_row < 1:
        raise ValueError(f"readings_per_row must be at least 1, got {readings_per_row}")

    def readings(theta: Tensor) -> Tensor:
        first, second = theta[..., 0::2], theta[..., 1::2]
        # So that the length has a derivative where a pair is 0; no other effect in any precision.
        angle = (first**2 + second**2 + 1e-12).sqrt() * (math.pi / 5)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos * first - sin * second, sin * first + cos * second], -1).flatten(-2)

    sigma = torch.tensor([4.0] * 8 + [8.0] * 2, dtype=dtype)
    noise = torch.full((20,), 10.0 / math.sqrt(readings_per_row), dtype=dtype)
    return _planted(num_tasks, support, query, splits, 2.0, sigma, 2, noise, readings)


def _planted(
    num_tasks: int,
    support: int,
    query: int,
    splits: int,
    loc: float,
    scales: Tensor,
    size: int,
    noise: Tensor,
    readings: Callable[[Tensor], Tensor],
) -> PlantedModules:
    for name, value in (
        ("num_tasks", num_tasks),
        ("support", support),
        ("query", query),
        ("splits", splits),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if splits * support > support + query:
        raise ValueError(
            f"splits is {splits}, and {support + query} rows have no {splits} parts of {support}"
        )
    groups = torch.arange(len(scales)).repeat_interleave(size)
    return PlantedModules(
        num_tasks=num_tasks,
        support=support,
        query=query,
        splits=splits,
        loc=torch.full((len(groups),), loc, dtype=scales.dtype),
        scales=scales,
        modules=Modules(tuple(f"module{m}" for m in range(len(scales))), groups),
        size=size,
        noise=noise,
        readings=readings,
        prior_scale=5.0,
    )
