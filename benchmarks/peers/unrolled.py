"""Differentiate through the inner steps: the gradient of what was computed, not of the minimum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from benchmarks.workloads import Workload, nll


class Unrolled:
    """MAML with the prox term, batched by torch.func."""

    def __init__(self, workload: Workload) -> None:
        w, f = workload, nll(workload.name)
        self.data = w.tensors()

        def energy(theta: Tensor, theta0: Tensor, *rows: Tensor) -> Tensor:
            return f(theta, *rows) + 0.5 * w.precision * ((theta - theta0) ** 2).sum()

        def task(theta0: Tensor, *rows: Tensor) -> Tensor:
            theta = theta0
            for _ in range(w.inner_steps):
                theta = theta - w.step_size * grad(energy)(theta, theta0, *rows[:3])
            return f(theta, *rows[3:])

        def total(theta0: Tensor, weights: Tensor, *rows: Tensor) -> Tensor:
            each = vmap(task, in_dims=(None, *[0] * 6))(theta0, *rows)
            return (weights * each).sum()

        self.total = grad_and_value(total)

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """See `Implementation.step`."""
        data = self.data
        gradient, value = self.total(
            data.theta0, torch.as_tensor(weights), *data.support, *data.query
        )
        return float(value), gradient.numpy()
