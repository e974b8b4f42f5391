"""How much memory a task needs, so that a batch can be split to fit a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.inference.energy import FunctionEnergy, TaskEnergy
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks


def bytes_per_task(
    density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, vectors: int
) -> int:
    """Bytes that adapting the longest of these tasks keeps.

    Measured, not modelled: what autograd saves for products with the Hessian, each storage once,
    and `vectors` of θ's size for the solver and the minimiser.
    """
    longest = tasks.select([int(tasks.num_rows.argmax())])
    energy = TaskEnergy(density, longest, shared, prior)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    theta = prior.loc.detach().expand(1, -1).clone()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        at = FunctionEnergy(energy).linearise(theta)
        at.product(torch.ones_like(theta))
    return sum(saved.values()) + vectors * density.dim * theta.element_size()
