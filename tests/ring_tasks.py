"""Tasks whose solutions form a ring, for the tests of mode connectivity."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from helpers import FLOAT
from torch import Tensor

from varmeta import Density, Tasks
from varmeta.inference.connectivity import Kind, ModePath, mode_path

SD = 0.1


def ring(x: Tensor, y: Tensor | None = None) -> Tensor:
    """y ~ N(w1² + w2², 0.1²): every point of a circle fits alike."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal((w**2).sum(), SD), obs=y)


def rings(radii: list[float], rows: int = 1) -> tuple[Density, Tasks, Tensor, Tensor]:
    """A ring of each radius, and two solutions on it, the task's number turned by so many rad."""
    pairs = [
        (torch.zeros(rows, 1, dtype=FLOAT), torch.full((rows,), r**2, dtype=FLOAT)) for r in radii
    ]
    tasks = Tasks.from_list(pairs, names=[f"ring {i}" for i in range(len(radii))])
    angle, r = torch.arange(len(radii), dtype=FLOAT), torch.tensor(radii, dtype=FLOAT)[:, None]
    a = r * torch.stack([angle.cos(), angle.sin()], -1)
    return Density(ring, tasks), tasks, a, -a


def found(kind: Kind = "bezier", **options: Any) -> ModePath:
    density, tasks, a, b = rings([1.0, 0.7])
    return mode_path(density, None, a, b, tasks, kind=kind, **{"steps": 40} | options)


def constant(rows: int = 1) -> float:
    """−log N(0; 0, SD²), nats, of so many rows."""
    return rows * math.log(SD * math.sqrt(2 * math.pi))
