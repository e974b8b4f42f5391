"""Small problems for random algorithms whose law is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta import Density, GaussianPrior, RandomDescent, Tasks
from varmeta.figures import grid
from varmeta.inference.stochastic import MetaGradientEstimate

F64 = torch.float64


def wells(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Rows with x = 1 see θ² (two wells at ±√y), rows with x = 0 see θ itself."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    flag = x[..., 0]
    mean = flag * theta**2 + (1 - flag) * theta
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 0.7), obs=y)


def two_wells(copies: int = 1) -> Tasks:
    """A double well as support loss, a parabola centred on one well as query loss."""
    x = torch.tensor([[1.0], [0.0]], dtype=F64).expand(copies, 2, 1)
    y = torch.ones(copies, 2, dtype=F64)
    is_query = torch.tensor([[False, True]]).expand(copies, 2)
    names = tuple(f"copy {k}" for k in range(copies))
    return Tasks(x, y, torch.ones_like(is_query), is_query, names)


def waves(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Rows with x = 1 see θ + 1.5 sin 3θ, whose square has many wells; the others θ."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    mean = theta + x[..., 0] * 1.5 * torch.sin(3 * theta)
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


SLOPES: dict[Callable[..., Tensor], Callable[[np.ndarray], np.ndarray]] = {
    wells: lambda x: -2 * x * (1 - x**2) / 0.49,
    waves: lambda x: (x + 1.5 * np.sin(3 * x) - 1) * (1 + 4.5 * np.cos(3 * x)),
}
NOISE = {wells: 0.7, waves: 1.0}


def exact_gradient(
    model: Callable[..., Tensor],
    loc: float,
    algorithm: RandomDescent,
    scale: float = 1.0,
    resolution: float = 4,
) -> tuple[float, np.ndarray]:
    """E g(x_K) and its derivatives in θ0 and the log scale, by the transition matrix.

    Where a bound acts in the bulk, 20 points for each standard deviation of the noise.
    """
    assert algorithm.step_size is not None
    chain = grid.Chain(
        SLOPES[model],
        step_size=algorithm.step_size,
        temperature=np.array(algorithm.temperatures),
        run_length=algorithm.run_length,
        precision=scale**-2,
        bound=None if algorithm.clip is None else algorithm.clip * scale,
    )
    sd = NOISE[model]

    def query(x: np.ndarray) -> np.ndarray:
        return 0.5 * (1 - x) ** 2 / sd**2 + 0.5 * np.log(2 * np.pi * sd**2)

    law = chain.law(loc, (-5.0, 5.0), resolution=resolution)
    return law.expectation(query), law.gradient(query)


def prior_at(loc: float, scale: float = 1.0) -> GaussianPrior:
    return GaussianPrior.create(torch.tensor([loc], dtype=F64), scale)


def flat(values: dict[str, Tensor]) -> Tensor:
    """`[T, n]`, all blocks side by side."""
    return torch.cat([v.flatten(1) for v in values.values()], dim=1)


def z_scores(got: MetaGradientEstimate, truth: Tensor) -> Tensor:
    """(estimate − truth)/standard error, `[T, n]`."""
    return (flat(got.mean) - truth) / flat(got.standard_error)


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Three coefficients and an offset shared by all tasks."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(torch.tensor(0.0, dtype=F64), 2.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(x @ w + offset, 0.8), obs=y)


def lines() -> tuple[Tasks, Density]:
    """Two tasks of 4 and 3 rows, two of each for the query."""
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 3, generator=source, dtype=F64)
    y = torch.randn(2, 4, generator=source, dtype=F64) + 1
    tasks = Tasks.from_list([(x[0], y[0]), (x[1, :3], y[1, :3])])
    is_query = torch.tensor([[False, True, True, False], [False, True, True, False]])
    tasks = Tasks(tasks.inputs, tasks.targets, tasks.mask, is_query & tasks.mask, tasks.names)
    return tasks, Density(line, tasks, shared=["offset"])


def moments(
    tasks: Tasks,
    algorithm: RandomDescent,
    prior: GaussianPrior,
    offset: Tensor,
    rows: list[dict[int, float]] | None = None,
) -> Tensor:
    """E g_i(x_K) `[T]` of the linear model, by the recursions of mean and covariance.

    `rows`: for each step the weights of the support rows that it uses; None: all.
    """
    out = []
    eye, zero = torch.eye(3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    for i in range(len(tasks)):
        support, query = (
            (t.inputs[i][t.mask[i]], t.targets[i][t.mask[i]]) for t in (tasks.support, tasks.query)
        )
        spread = algorithm.start_scale * prior.scale
        mean = torch.cat([prior.loc, prior.loc])  # of x_t and x_{t−1}
        cov = (spread**2).diag().repeat(2, 2)
        for t, temperature in enumerate(algorithm.temperatures):
            weight = torch.ones(len(support[1]), dtype=F64)
            if rows is not None:
                weight = torch.tensor([rows[t].get(n, 0.0) for n in range(len(weight))], dtype=F64)
            design = support[0] * weight[:, None] / 0.64
            hessian = design.T @ support[0] + prior.precision()
            linear = design.T @ (support[1] - offset) + prior.precision() @ prior.loc
            eta, momentum = algorithm.step_size, algorithm.momentum
            assert eta is not None
            top = torch.cat([(1 + momentum) * eye - eta * hessian, -momentum * eye], dim=1)
            step = torch.cat([top, torch.cat([eye, zero], dim=1)])
            mean = step @ mean + torch.cat([eta * linear, torch.zeros(3, dtype=F64)])
            noise = torch.block_diag(2 * eta * temperature * eye, zero)
            cov = step @ cov @ step.T + noise
        residual = query[1] - offset - query[0] @ mean[:3]
        spread_out = ((query[0] @ cov[:3, :3]) * query[0]).sum(-1)
        constant = 0.5 * np.log(2 * np.pi * 0.64)
        out.append(((residual**2 + spread_out) / 1.28 + constant).sum())
    return torch.stack(out)


def exact_slopes(value: Callable[[GaussianPrior, Tensor], Tensor], prior: GaussianPrior) -> Tensor:
    """d value_i by θ0, log scales, factor and offset, `[T, n]`, by autograd through the moments."""
    offset = torch.zeros(1, dtype=F64, requires_grad=True)
    factor = None if prior.factor is None else prior.factor.clone().requires_grad_()
    loc, log_scale = prior.loc.clone().requires_grad_(), prior.log_scale.clone().requires_grad_()
    leaves = [loc, log_scale, *([] if factor is None else [factor]), offset]
    each = value(prior.moved(loc, log_scale, factor), offset)
    rows = [torch.autograd.grad(v, leaves, retain_graph=True) for v in each]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


LINEAR = {
    "plain": RandomDescent(run_length=12, step_size=0.05, temperature=0.4),
    "momentum": RandomDescent(run_length=12, step_size=0.03, temperature=0.4, momentum=0.6),
    "random start": RandomDescent(run_length=12, step_size=0.05, temperature=0.4, start_scale=0.7),
    "noiseless": RandomDescent(run_length=12, step_size=0.05, momentum=0.4, start_scale=0.7),
}


def linear_prior(rank: int) -> GaussianPrior:
    factor = torch.tensor([[0.3], [-0.2], [0.5]], dtype=F64) if rank else None
    loc = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    return GaussianPrior.create(
        loc, torch.tensor([0.8, 1.5], dtype=F64), groups=torch.tensor([0, 0, 1]), factor=factor
    )
