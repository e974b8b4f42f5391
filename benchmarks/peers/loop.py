"""The implicit gradient written by hand in plain torch, task by task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import Workload, nll


class Loop:
    """What one would write without a library."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.f = nll(workload.name)
        self.data = workload.tensors()
        self.rows = [self.data.task(i) for i in range(workload.tasks)]

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """See `Implementation.step`; tasks of weight 0 are left out."""
        total, gradient = 0.0, torch.zeros_like(self.data.theta0)
        for index in np.flatnonzero(weights):
            loss, slope = self.task(index)
            total += float(weights[index]) * float(loss)
            gradient += float(weights[index]) * slope
        return total, gradient.numpy()

    def task(self, index: int) -> tuple[Tensor, Tensor]:
        """g_i(θ_i*) and its gradient in θ0."""
        w, theta0 = self.workload, self.data.theta0
        support, query = self.rows[index]

        def slope(theta: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
            leaf = theta.detach().requires_grad_()
            energy = self.f(leaf, *support) + 0.5 * w.precision * ((leaf - theta0) ** 2).sum()
            return leaf, torch.autograd.grad(energy, leaf, create_graph=create_graph)[0]

        theta = theta0
        for _ in range(w.inner_steps):
            theta = theta - w.step_size * slope(theta)[1]
        leaf, at_minimum = slope(theta, create_graph=True)
        loss = self.f(leaf, *query)
        (b,) = torch.autograd.grad(loss, leaf)
        x, r, p, rr = torch.zeros_like(b), b, b, b @ b
        for _ in range(w.cg_steps):
            if float(rr) == 0.0:
                break
            (ap,) = torch.autograd.grad(at_minimum, leaf, p, retain_graph=True)
            pap = p @ ap
            if float(pap) == 0.0:  # underflow: arrived
                break
            alpha = rr / pap
            x, r = x + alpha * p, r - alpha * ap
            new = r @ r
            p, rr = r + new / rr * p, new
        return loss.detach(), w.precision * x
