"""TorchOpt's implicit differentiation: `custom_root` with its own conjugate gradients, by task."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import Workload, nll

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports the deprecated functorch
    import torchopt


class TorchoptRoot:
    """`torchopt.diff.implicit.custom_root` with `solve_cg(maxiter=5, rtol=1e-12)`.

    With rtol = 0 its solver divides by 0 where it has arrived early.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = w = workload
        f = nll(w.name)
        self.f = f
        data = w.tensors()
        self.theta0 = data.theta0.requires_grad_()
        self.rows = [data.task(i) for i in range(w.tasks)]

        def optimality(theta: Tensor, theta0: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            slope: Tensor = torch.func.grad(f)(theta, x, y, mask)
            return slope + w.precision * (theta - theta0)

        cg = torchopt.linear_solve.solve_cg(maxiter=w.cg_steps, rtol=1e-12, atol=0.0)

        @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=cg)
        def adapt(theta: Tensor, theta0: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            start = theta0.detach()
            for _ in range(w.inner_steps):
                with torch.enable_grad():
                    leaf = theta.detach().requires_grad_()
                    energy = f(leaf, x, y, mask) + 0.5 * w.precision * ((leaf - start) ** 2).sum()
                    (slope,) = torch.autograd.grad(energy, leaf)
                theta = leaf.detach() - w.step_size * slope
            return theta

        self.adapt = adapt

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """See `Implementation.step`; tasks of weight 0 are left out."""
        total, gradient = 0.0, torch.zeros_like(self.theta0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index in np.flatnonzero(weights):
                support, query = self.rows[index]
                theta = self.adapt(self.theta0.detach(), self.theta0, *support)
                loss = float(weights[index]) * self.f(theta, *query)
                gradient += torch.autograd.grad(loss, self.theta0)[0]
                total += float(loss.detach())
        return total, gradient.detach().numpy()
