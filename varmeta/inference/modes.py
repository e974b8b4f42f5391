"""The mode of each task's posterior under a fixed prior, also where Newton-CG does not find it."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.inference.energy import TaskEnergy
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.minimise import Minimiser
from varmeta.inference.newton import NewtonCG
from varmeta.inference.pilot import curvature_at_rest
from varmeta.inference.prox import ProxInfo, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks


def find_modes(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    minimiser: Minimiser,
) -> tuple[Tensor, ProxInfo]:
    """θ_i* `[T, D]` from θ0, and its diagnostics; nothing is differentiated.

    Where `NewtonCG` has not reached its tolerance, as far from a mode of a model that bends (a
    noise of each task's own), saddle-free Newton steps go down from θ0 and it goes on from where
    they come to rest (up to 200 coordinates).
    """
    with torch.no_grad():
        energy = TaskEnergy(density, tasks, shared, prior)
        start = prior.loc.expand(len(tasks), -1)
        theta, info = prox(energy, start, minimiser=minimiser)
        if not isinstance(minimiser, NewtonCG) or density.dim > MAX_DIM:
            return theta, info
        assert info.converged is not None
        if bool(info.converged.all()):
            return theta, info
        rest = (~info.converged).nonzero()[:, 0]
        some = TaskEnergy(density, tasks.select(rest.cpu()), shared, prior)
        way = curvature_at_rest(some, start[rest], prior.scale)
        again, second = prox(some, way.theta, minimiser=minimiser)
        lower = some.value_and_gradient(again)[0] <= some.value_and_gradient(theta[rest])[0]
        assert second.converged is not None
        better = lower | second.converged
        index = rest[better]
        theta = theta.clone()
        theta[index] = again[better]
        for name in ("grad_norm", "reduction", "converged", "negative_curvature"):
            getattr(info, name)[index] = getattr(second, name)[better]
        info.iterations[rest] += second.iterations
        info.gradients += (way.gradients + second.gradients + 2) * len(rest) // len(tasks)
        info.minimum = theta
        return theta, info
