"""A model with ragged tasks and awkward names, hand-made posteriors, and looks at exports."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

from varmeta.inference.base import Strategy
from varmeta.inference.fitted import Fit
from varmeta.inference.joint import JointVariational
from varmeta.inference.nuts import PyroNUTS
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Draws, Gaussian
from varmeta.tasks import Tasks, TaskSource

ARVIZ1 = int(az.__version__.split(".")[0]) >= 1
GROUPS = [
    "posterior",
    "prior",
    "posterior_predictive",
    "log_likelihood",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "sample_stats",
    "adaptation_data",
    "shrinkage_data",
]
SITES = ["a", "b", "width"]
COUNTS = {"north": 5, "süd": 1, "w/e [2]": 8}  # ragged, a single row, awkward names


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.5, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    width = pyro.sample("width", dist.LogNormal(-0.5, 0.3))
    curve = pyro.sample("curve", dist.LogNormal(-1.0, 0.5))
    mean = a + x @ b.to(x) + curve * x[:, 0] ** 2
    with pyro.plate("rows", len(x)):
        return pyro.sample("score", dist.Normal(mean, width), obs=y)


def frame() -> pd.DataFrame:
    """Rows of the groups all mixed up, so that the tasks' order is not the file's."""
    rng = np.random.default_rng(3)
    labels = rng.permutation([name for name, count in COUNTS.items() for _ in range(count)])
    data = pd.DataFrame(rng.normal(size=(len(labels), 3)), columns=["u", "v", "w"])
    data["school"] = labels
    data["mark"] = 1 + data["u"] - data["w"] + rng.normal(size=len(labels))
    return data


FRAME = frame()
TASKS = Tasks.from_frame(FRAME, task="school", inputs=["u", "v", "w"], target="mark")
T = len(TASKS)
DENSITY = Density(model, TASKS, shared=["curve"])
SHARED = torch.tensor([-0.7], dtype=torch.float64)


def unfitted(
    strategy: Strategy | None = None,
    tasks: Tasks | TaskSource = TASKS,
    density: Density = DENSITY,
    prior: GaussianPrior | None = None,
    **stats: Tensor,
) -> Fit:
    """A `Fit` at its first state: what the export does needs no training."""
    strategy = strategy or JointVariational()
    prior = prior or GaussianPrior.from_density(density)
    training = tasks if isinstance(tasks, TaskSource) else strategy.prepare(tasks, 0)
    settled = strategy.settled(density, whole=isinstance(tasks, Tasks))
    state = settled.init(density, prior, training, torch.Generator())
    return Fit(strategy, density, tasks, state, 0, pd.DataFrame(), stats, settled=settled)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(tasks: Tasks = TASKS, density: Density = DENSITY) -> Gaussian:
    count, dim = len(tasks), density.dim
    tril = 0.3 * torch.eye(dim) + 0.1 * torch.ones(dim, dim).tril(-1)
    shared = SHARED if density.shared_dim else torch.zeros(0, dtype=torch.float64)
    return Gaussian(
        density, tasks.names, shared, noise(count, dim), tril.double().expand(count, -1, -1)
    )


def hand_draws(total: int = 12, chains: int = 2) -> Draws:
    """φ differs from draw to draw, not from task to task."""
    shared = 0.3 * noise(total, 1, 1, seed=1).expand(-1, T, -1)
    return Draws(DENSITY, TASKS.names, shared, noise(total, T, DENSITY.dim), chains)


def hand_nuts() -> Fit:
    """A PyroNUTS run of 2 chains of 6 draws whose draws are made up."""
    run = unfitted(PyroNUTS(draws=6, warmup=1, chains=2))
    kept = run.state.tensors
    kept["theta"] = noise(12, T, DENSITY.dim, seed=5)
    kept["loc"] = noise(12, DENSITY.dim, seed=6)
    kept["log_scale"] = noise(12, 3, seed=7)
    kept["shared"] = noise(12, 1, seed=8)
    kept["diverging"] = torch.arange(12) % 5 == 4
    return run


def group(data: Any, name: str) -> xr.Dataset:
    found = data[name]
    return found.to_dataset() if ARVIZ1 else found


def groups_of(data: Any) -> set[str]:
    return set(data.children) if ARVIZ1 else set(data.groups())


def stacked(values: xr.DataArray) -> np.ndarray:
    """Chains one after the other again."""
    assert values.dims[:2] == ("chain", "draw")
    return values.values.reshape(-1, *values.shape[2:])


def assert_equal_exports(one: Any, other: Any) -> None:
    assert groups_of(one) == groups_of(other)
    assert dict(one.attrs) == dict(other.attrs)
    for name in groups_of(one):
        xr.testing.assert_identical(group(one, name), group(other, name))
        for key, variable in group(one, name).variables.items():
            assert variable.dtype == group(other, name)[key].dtype, (name, key)
