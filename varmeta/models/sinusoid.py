"""Sinusoid regression, the field's smallest stream of tasks (Finn, Abbeel & Levine, 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from varmeta.tasks import Tasks


def sinusoids(
    num_tasks: int = 25,
    *,
    support: int = 10,
    query: int = 10,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Callable[[torch.Generator], Tasks]:
    """Draws batches of sinusoids: amplitude U[0.1, 5], phase U[0, π], x U[−5, 5].

    Args:
        num_tasks: tasks per batch.
        support: support rows per task.
        query: query rows per task.
        noise: standard deviation of the noise on y.
        dtype: of x and y.

    Returns:
        A function of a `torch.Generator`, for `TaskSource`; inputs `[T, N, 1]`, targets `[T, N]`.
    """
    return _Sinusoids(num_tasks, support, query, noise, dtype)


@dataclass(frozen=True)
class _Sinusoids:
    """A draw that, unlike a function within a function, can be pickled."""

    num_tasks: int
    support: int
    query: int
    noise: float
    dtype: torch.dtype

    def __call__(self, generator: torch.Generator) -> Tasks:
        count, rows = self.num_tasks, self.support + self.query
        unit = torch.rand(count, 2 + rows, generator=generator, dtype=self.dtype)
        amplitude, phase = 0.1 + 4.9 * unit[:, :1], math.pi * unit[:, 1:2]
        x = 10 * unit[:, 2:] - 5
        y = amplitude * torch.sin(x - phase)
        if self.noise:
            y = y + self.noise * torch.randn(y.shape, generator=generator, dtype=self.dtype)
        is_query = (torch.arange(rows) >= self.support).expand(count, rows)
        return Tasks(
            inputs=x[..., None],
            targets=y,
            mask=torch.ones(count, rows, dtype=torch.bool),
            is_query=is_query,
            names=tuple(str(i) for i in range(count)),
            task_name="sinusoid",
        )
