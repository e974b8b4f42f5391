"""The workloads: one set of arrays each, the model as a Pyro model and as a plain torch function.

A meta-step is g_i(θ_i*) averaged over T tasks and its gradient in θ0, where θ_i* comes from
`inner_steps` gradient-descent steps on f_i(θ) + λ/2‖θ−θ0‖² from θ0, and the gradient is
λ (H_i + λ)⁻¹ ∇g_i(θ_i*) with `cg_steps` steps of conjugate gradients for the inverse. f and g are
negative log-likelihoods summed over rows, in nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 40  # units of the sinusoid network
FILTERS = 64  # of the Omniglot network
WAYS = 5
URANIUM, NOISE = 0.7, 0.75  # radon: the values that all counties share


@dataclass(frozen=True, eq=False)
class Workload:
    """Data, start and budgets of one benchmark; arrays are float32 (labels int64, masks bool).

    Attributes:
        name: which model: `sinusoid`, `omniglot`, `linear` or `radon`.
        theta0: `[D]`, the meta-parameters.
        x: `[T, N, *input_shape]`, support rows.
        y: `[T, N]`.
        mask: `[T, N]` bool, False where a row is padding.
        x_query: `[T, M, *input_shape]`, query rows; likewise `y_query` and `mask_query`.
        step_size: of the inner gradient descent.
        precision: λ.
        inner_steps: gradient-descent steps, all of which are taken.
        cg_steps: products with the Hessian in the adjoint solve.
    """

    name: str
    theta0: np.ndarray
    x: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    x_query: np.ndarray
    y_query: np.ndarray
    mask_query: np.ndarray
    step_size: float
    precision: float = 10.0
    inner_steps: int = 16
    cg_steps: int = 5

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.y)

    @property
    def dim(self) -> int:
        """D."""
        return len(self.theta0)

    @property
    def label(self) -> str:
        """For tables and files."""
        extra = f" D={self.dim}" if self.name == "linear" else ""
        return f"{self.name}{extra} T={self.tasks}"

    def first(self, count: int) -> Workload:
        """The same with its first `count` tasks alone."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("x", "y", "mask", "x_query", "y_query", "mask_query"):
            parts[key] = parts[key][:count]
        return Workload(**parts)

    def save(self, path: Path) -> None:
        """All fields to an .npz file."""
        np.savez(path, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> Workload:
        """What `save` wrote."""
        with np.load(path) as saved:
            return cls(**{k: saved[k] if saved[k].ndim else saved[k].item() for k in saved.files})

    def tensors(self, dtype: torch.dtype = torch.float32) -> TorchData:
        """θ0 and the rows as torch tensors."""

        def rows(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> Rows:
            target = torch.as_tensor(y)
            target = target.to(dtype) if target.is_floating_point() else target
            return torch.as_tensor(x).to(dtype), target, torch.as_tensor(mask)

        return TorchData(
            torch.as_tensor(self.theta0).to(dtype),
            rows(self.x, self.y, self.mask),
            rows(self.x_query, self.y_query, self.mask_query),
        )


Rows = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class TorchData:
    """θ0 `[D]` and (x, y, mask) of the support and query parts."""

    theta0: Tensor
    support: Rows
    query: Rows

    def task(self, index: int) -> tuple[Rows, Rows]:
        """Support and query of one task, without padding."""

        def part(rows: Rows) -> Rows:
            keep = rows[2][index]
            x, y, mask = (t[index] for t in rows)
            return (x, y, mask) if bool(keep.all()) else (x[keep], y[keep], mask[keep])

        return part(self.support), part(self.query)


# -- the models as plain functions of a flat θ -----------------------------------------------------


def nll(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """f(θ `[D]`, x `[N, ...]`, y `[N]`, mask `[N]`): nats, summed over the rows of one task."""
    outputs = _OUTPUTS[name]
    scale = NOISE if name == "radon" else 1.0
    constant = 0.5 * math.log(2 * math.pi) + math.log(scale)

    def function(theta: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        out = outputs(theta, x)
        if name == "omniglot":
            rows = -torch.log_softmax(out, -1).gather(-1, y[:, None])[:, 0]
        else:
            rows = 0.5 * ((y - out) / scale) ** 2 + constant
        return torch.where(mask, rows, 0.0).sum()

    return function


def split(name: str, theta: Any) -> list[Any]:
    """A flat θ `[D]` as the weights of its layers, in the order of `module.parameters()`."""
    out, start = [], 0
    for shape in SHAPES[name]:
        size = math.prod(shape)
        out.append(theta[start : start + size].reshape(shape))
        start += size
    return out


def _mlp(theta: Tensor, x: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = split("sinusoid", theta)
    h = torch.relu(F.linear(x, w1, b1))
    return F.linear(torch.relu(F.linear(h, w2, b2)), w3, b3)[:, 0]


def _conv(theta: Tensor, x: Tensor) -> Tensor:
    *convs, w, b = split("omniglot", theta)
    for weight, bias in zip(convs[::2], convs[1::2], strict=True):
        x = torch.relu(F.conv2d(x, weight, bias, stride=2, padding=1))
    return F.linear(x.mean((-2, -1)), w, b)


_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sinusoid": _mlp,
    "omniglot": _conv,
    "linear": lambda theta, x: x @ theta,
    "radon": lambda theta, x: theta[0] + theta[1] * x[:, 0] + URANIUM * x[:, 1],
}

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "sinusoid": [(HIDDEN, 1), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (1, HIDDEN), (1,)],
    "omniglot": [
        *((FILTERS, 1, 3, 3), (FILTERS,)),
        *((FILTERS, FILTERS, 3, 3), (FILTERS,)) * 3,
        *((WAYS, FILTERS), (WAYS,)),
    ],
}


# -- the models as Pyro models ---------------------------------------------------------------------


def module(name: str) -> nn.Module:
    """The network, at PyTorch's own initialisation with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "sinusoid":
            sizes = [1, HIDDEN, HIDDEN, 1]
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(sizes):
                layers += [nn.Linear(a, b), nn.ReLU()]
            return nn.Sequential(*layers[:-1])
        layers = []
        for channels in (1, FILTERS, FILTERS, FILTERS):
            layers += [nn.Conv2d(channels, FILTERS, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS, WAYS)
        )


def pyro_model(workload: Workload) -> tuple[Callable[..., Tensor], list[str], Tensor | None]:
    """A Pyro model of one task, its shared sites, and their unconstrained values φ (None: none)."""
    import pyro
    import pyro.distributions as dist

    from varmeta.models import network
    from varmeta.problems import county

    if workload.name == "sinusoid":
        model = network(module("sinusoid"), lambda out: dist.Normal(out[:, 0], 1.0))
        return model, [], None
    if workload.name == "omniglot":
        return network(module("omniglot"), lambda out: dist.Categorical(logits=out)), [], None
    if workload.name == "radon":
        return county, ["uranium", "noise"], torch.tensor([URANIUM, math.log(NOISE)])

    def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)

    return regression, [], None


# -- data ------------------------------------------------------------------------------------------


def make(name: str, tasks: int, dim: int = 100, rows: int = 50, seed: int = 0) -> Workload:
    """A workload; `dim` and `rows` are used by `linear` alone."""
    if name not in _MAKERS:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(_MAKERS)}")
    rng = np.random.default_rng(seed)
    if name == "linear":
        return _make_linear(rng, tasks, dim, rows)
    return _MAKERS[name](rng, tasks)


def _flat(net: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).numpy()


def _full(name: str, theta0: np.ndarray, step_size: float, *parts: np.ndarray) -> Workload:
    """A workload without padding."""
    x, y, x_query, y_query = (p if p.dtype == np.int64 else p.astype(np.float32) for p in parts)
    mask, mask_query = np.ones(y.shape, bool), np.ones(y_query.shape, bool)
    start = theta0.astype(np.float32)
    return Workload(name, start, x, y, mask, x_query, y_query, mask_query, step_size)


def _make_sinusoid(rng: np.random.Generator, tasks: int) -> Workload:
    # Amplitudes up to 1, not 5: with large residuals 16 steps from a random start end where most
    # tasks' curvature is negative, and then the implicit gradient is not defined.
    amplitude = rng.uniform(0.1, 1.0, (tasks, 1))
    phase = rng.uniform(0.0, math.pi, (tasks, 1))
    x = rng.uniform(-5.0, 5.0, (tasks, 20))
    y = amplitude * np.sin(x - phase)
    parts = (x[:, :10, None], y[:, :10], x[:, 10:, None], y[:, 10:])
    return _full("sinusoid", _flat(module("sinusoid")), 0.005, *parts)


def _make_omniglot(rng: np.random.Generator, tasks: int) -> Workload:
    """Characters of three random strokes; each image wobbles and carries noise."""
    shots = 1 + 3
    points = rng.uniform(5, 23, (tasks, WAYS, 1, 3, 2, 2))  # strokes, their two ends, (row, column)
    points = points + rng.normal(0, 1.0, (tasks, WAYS, shots, 3, 2, 2))
    along = np.linspace(0, 1, 24)[:, None]
    path = points[..., :1, :] * (1 - along) + points[..., 1:, :] * along  # [..., 3, 24, 2]
    grid = np.arange(28)
    ink = np.exp(-0.5 * (grid - path[..., :1]) ** 2)[..., :, None]
    ink = (ink * np.exp(-0.5 * (grid - path[..., 1:]) ** 2)[..., None, :]).max((-4, -3))
    images = ink + 0.1 * rng.normal(size=ink.shape)  # [tasks, WAYS, shots, 28, 28]
    labels = np.broadcast_to(np.arange(WAYS)[:, None], (tasks, WAYS, shots))

    def part(which: slice) -> tuple[np.ndarray, np.ndarray]:
        x, y = images[:, :, which], labels[:, :, which]
        return x.reshape(tasks, -1, 1, 28, 28), y.reshape(tasks, -1).astype(np.int64)

    parts = (*part(slice(0, 1)), *part(slice(1, None)))
    return _full("omniglot", _flat(module("omniglot")), 0.02, *parts)


def _make_linear(rng: np.random.Generator, tasks: int, dim: int = 100, rows: int = 50) -> Workload:
    x = 10 / math.sqrt(dim) * rng.normal(size=(tasks, 2 * rows, dim))
    theta = 0.3 * rng.normal(size=(tasks, dim))
    y = np.einsum("tnd,td->tn", x, theta) + rng.normal(size=(tasks, 2 * rows))
    parts = (x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:])
    return _full("linear", np.zeros(dim), 0.003, *parts)


def _make_radon(rng: np.random.Generator, tasks: int) -> Workload:
    """85 counties with 30% of the homes as query rows; any other number: counties resampled.

    A resampled task is a county drawn with replacement, its homes drawn with replacement too.
    """
    from varmeta.data import load
    from varmeta.tasks import Tasks

    frame = load("radon")
    columns = {"task": "county", "inputs": ["floor", "log_uranium"], "target": "log_radon"}
    counties = Tasks.from_frame(frame, **columns)
    pairs = [(counties.inputs[i][m], counties.targets[i][m]) for i, m in enumerate(counties.mask)]
    if tasks != len(pairs):
        drawn = [pairs[i] for i in rng.integers(len(pairs), size=tasks)]
        pairs = []
        for x, y in drawn:
            again = torch.as_tensor(rng.integers(len(y), size=len(y)))
            pairs.append((x[again], y[again]))
    split_tasks = Tasks.from_list(pairs).to(torch.float32).split(0.3)
    support, query = split_tasks.support, split_tasks.query
    arrays = (
        t.numpy() for part in (support, query) for t in (part.inputs, part.targets, part.mask)
    )
    return Workload("radon", np.array([1.4, -0.6], np.float32), *arrays, step_size=0.005)


_MAKERS: dict[str, Callable[[np.random.Generator, int], Workload]] = {
    "sinusoid": _make_sinusoid,
    "omniglot": _make_omniglot,
    "linear": _make_linear,
    "radon": _make_radon,
}
NAMES = tuple(_MAKERS)
