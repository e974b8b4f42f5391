"""Oracle problems as varmeta objects, and what several test files compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

FLOAT = torch.float64


@dataclass(frozen=True)
class Case:
    """A problem as varmeta sees it, at the oracle's θ0, scales and noise.

    `tasks` are split: support and query rows of the oracle. `shared` is log s `[1]`, or `[0]` where
    the noise is a constant of the model.
    """

    density: Density
    tasks: Tasks
    prior: GaussianPrior
    shared: Tensor


def tensor(values: Any) -> Tensor:
    return torch.tensor(np.array(values), dtype=FLOAT)


@dataclass(frozen=True)
class LinearModel:
    """y ~ N(xθ, noise²), θ one vector site; None makes the noise a shared latent."""

    dim: int
    noise: float | None = None

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        centre = torch.zeros(self.dim, dtype=x.dtype)
        theta = pyro.sample("theta", dist.Normal(centre, 2.0).to_event(1))
        law = dist.LogNormal(0.0, 3.0)
        sd = pyro.sample("noise", law) if self.noise is None else self.noise
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(x @ theta, sd), obs=y)


def linear_model(dim: int, noise: float | None = None) -> Callable[..., Tensor]:
    """`LinearModel`."""
    return LinearModel(dim, noise)


def tasks_of(problem: LinearGaussian) -> Tasks:
    """Support rows first, then the query rows, which are marked as such."""
    parts = zip(
        problem.designs,
        problem.query_designs,
        problem.targets,
        problem.query_targets,
        strict=True,
    )
    rows = [(tensor(np.r_[x, xq]), tensor(np.r_[y, yq])) for x, xq, y, yq in parts]
    tasks = Tasks.from_list(rows)
    first = torch.tensor([len(y) for y in problem.targets])[:, None]
    return replace(tasks, is_query=tasks.mask & (torch.arange(tasks.mask.shape[1]) >= first))


def case_of(problem: LinearGaussian, *, shared_noise: bool = False) -> Case:
    """The same problem for varmeta, with one scale per coordinate and a flat hyperprior."""
    tasks = tasks_of(problem)
    noise = None if shared_noise else float(np.exp(problem.log_noise))
    density = Density(
        linear_model(problem.dim, noise), tasks, shared=["noise"] if shared_noise else []
    )
    prior = GaussianPrior(
        tensor(problem.theta0), tensor(problem.log_scale), torch.arange(problem.dim)
    )
    shared = tensor([problem.log_noise] if shared_noise else [])
    return Case(density, tasks, prior, shared)


def leaves_of(case: Case) -> tuple[GaussianPrior, Tensor, list[Tensor]]:
    """Prior and φ as leaves, and these leaves: θ0, log scales, φ."""
    loc, log_scale, shared = (
        t.clone().requires_grad_() for t in (case.prior.loc, case.prior.log_scale, case.shared)
    )
    return replace(case.prior, loc=loc, log_scale=log_scale), shared, [loc, log_scale, shared]


def widened(tasks: Tasks, extra: int) -> Tasks:
    """The same tasks with `extra` more rows of padding, filled as `Tasks` fills them."""

    def more(t: Tensor) -> Tensor:
        return torch.cat([t, t[:, :1].expand(-1, extra, *t.shape[2:])], dim=1)

    wide = tasks._map(more)
    off = torch.arange(wide.mask.shape[1]) < tasks.mask.shape[1]
    return replace(wide, mask=wide.mask & off, is_query=wide.is_query & off)


def predictive_error(rows: Tensor) -> Tensor:
    """Standard error of log mean_s exp(rows) over S independent draws, `[S, ...]` to `[...]`."""
    weights = (rows - rows.amax(0)).exp()
    return weights.std(0) / weights.mean(0) / len(rows) ** 0.5


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    a, e = (
        np.asarray(v.detach() if isinstance(v, Tensor) else v, dtype=np.float64)
        for v in (actual, expected)
    )
    assert a.shape == e.shape, (a.shape, e.shape)
    assert np.isfinite(a).all() and np.isfinite(e).all()
    return float(np.abs(a - e).max() / np.abs(e).max()) if e.size else 0.0


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    error = relative_error(actual, expected)
    assert error < tolerance, f"relative error {error:.2e} is not below {tolerance:.0e}"


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, through dictionaries, lists and tensors (NaN equals NaN)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(torch.nan_to_num(a.to_dense()), torch.nan_to_num(b.to_dense()))
    else:
        assert a == b or (a != a and b != b)
