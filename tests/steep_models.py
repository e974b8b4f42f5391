"""Tasks whose losses grow exponentially, or level off: where steps of a fixed size do not hold."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta import Density, GaussianPrior, Tasks

Row = Callable[[Tensor, Tensor], dist.Distribution]
SCALES = (2.0, 1.0)


def _model(row: Row, dtype: torch.dtype) -> Callable[..., Tensor]:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        scale = torch.tensor(SCALES, dtype=dtype)
        theta = pyro.sample("theta", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", row(theta, x[..., 0]), obs=y)

    return model


def _rate(theta: Tensor, x: Tensor) -> Tensor:
    return (theta[0] + theta[1] * x).exp()


# Of two coordinates and an input between −1 and 1, and the targets at x = −1, −.6, …, 1.
KINDS: dict[str, tuple[Row, list[float]]] = {
    "Poisson": (lambda t, x: dist.Poisson(_rate(t, x)), [90, 95, 100, 105, 110, 120]),
    "no counts": (lambda t, x: dist.Poisson(_rate(t, x)), [0, 0, 0, 0, 0, 0]),
    "negative binomial": (
        lambda t, x: dist.NegativeBinomial(t[1].exp(), logits=t[0] - t[1]).expand(x.shape),
        [90, 3, 100, 0, 110, 12],
    ),
    "exponential": (lambda t, x: dist.Exponential(_rate(t, x)), [9, 0.1, 3, 2, 1, 0.5]),
    "Weibull": (
        lambda t, x: dist.Weibull(_rate(t / 2, x), 1.5),
        [9, 0.1, 3, 2, 1, 0.5],
    ),
    "normal with a noise of its own": (
        lambda t, x: dist.Normal(t[0] + 0 * x, t[1].exp()),
        [7, 8, 9, 9.5, 10, 9],
    ),
    "separable": (lambda t, x: dist.Bernoulli(logits=t[0] + t[1] * x), [0, 0, 0, 1, 1, 1]),
    "softmax": (
        lambda t, x: dist.Categorical(
            logits=torch.stack([t[0] + 0 * x, t[1] * x, torch.zeros_like(x)], -1)
        ),
        [0, 0, 0, 1, 1, 1],
    ),
    "Student's t": (
        lambda t, x: dist.StudentT(2.0, t[0] + t[1] * x, 0.1),
        [0, 0.1, 0.2, 50, 0.4, -70],
    ),
}


def steep(kind: str, dtype: torch.dtype) -> tuple[Tasks, Density]:
    """Two tasks of a kind: the targets above, and the first four of them; half are queries."""
    row, targets = KINDS[kind]
    x = torch.linspace(-1, 1, 6, dtype=dtype)[:, None]
    whole = torch.tensor([0, 1]) if kind == "softmax" else torch.tensor([0.0])
    y = torch.tensor(targets, dtype=torch.long if len(whole) == 2 else dtype)
    tasks = Tasks.from_list([(x, y), (x[:4], y[:4])], names=["six", "four"])
    is_query = (torch.arange(6) % 2 == 1) & tasks.mask
    tasks = Tasks(tasks.inputs, tasks.targets, tasks.mask, is_query, tasks.names)
    return tasks, Density(_model(row, dtype), tasks)


def start(signs: tuple[float, float], dtype: torch.dtype) -> GaussianPrior:
    """The prior, so many of its standard deviations away."""
    scale = torch.tensor(SCALES, dtype=dtype)
    return GaussianPrior.create(torch.tensor(signs, dtype=dtype) * scale, list(SCALES))
