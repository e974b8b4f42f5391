"""varmeta as a user would call it: any Pyro model, `IMAML.losses`, ordinary autograd."""

from __future__ import annotations

import numpy as np
import torch

import varmeta as vm
from benchmarks.workloads import Workload, pyro_model


def strategy(workload: Workload) -> vm.IMAML:
    """iMAML with exactly the workload's budgets."""
    return vm.IMAML(
        minimiser=vm.GradientDescent(
            step_size=workload.step_size,
            max_iterations=workload.inner_steps,
            tolerance=0.0,
            reduction="sum",
            clip=None,
        ),
        adjoint=vm.Implicit(vm.CG(max_iterations=workload.cg_steps, tolerance=0.0)),
        learn_scale=False,
    )


def tasks_of(workload: Workload) -> vm.Tasks:
    """The workload's arrays as split tasks."""
    data = workload.tensors()
    x, y, mask = (torch.cat([a, b], dim=1) for a, b in zip(data.support, data.query, strict=True))
    is_query = torch.arange(mask.shape[1]) >= data.support[2].shape[1]
    names = tuple(map(str, range(len(y))))
    return vm.Tasks(x, y, mask, is_query & mask, names, is_split=True)


class VarmetaEager:
    """`strategy.losses(density, prior, shared, tasks)` and `torch.autograd.grad`."""

    def __init__(self, workload: Workload) -> None:
        model, shared, phi = pyro_model(workload)
        self.tasks = tasks_of(workload)
        self.density = self.prepare(vm.Density(model, self.tasks, shared=shared))
        self.shared = self.density.shared_init if phi is None else phi
        loc = torch.as_tensor(workload.theta0).requires_grad_()
        self.prior = vm.GaussianPrior.create(loc, workload.precision**-0.5)
        self.strategy = strategy(workload)

    def prepare(self, density: vm.Density) -> vm.Density:
        """The density as it is."""
        return density

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """See `Implementation.step`."""
        losses, _ = self.strategy.losses(self.density, self.prior, self.shared, self.tasks)
        total = (losses * torch.as_tensor(weights)).sum()
        (gradient,) = torch.autograd.grad(total, self.prior.loc)
        return float(total.detach()), gradient.numpy()
