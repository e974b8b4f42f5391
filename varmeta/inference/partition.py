"""Which particles lie in the same basin: descents to the minima, and minima that coincide."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from varmeta.inference.base import NonFiniteLoss
from varmeta.inference.chain import Chain
from varmeta.inference.energy import FunctionEnergy
from varmeta.inference.flow import GradientFlow
from varmeta.inference.linear import CG
from varmeta.inference.minimise import Minimiser
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

RADIUS = 0.01  # prior standard deviations
_PROBES = 20  # products in which negative curvature is looked for


@dataclass(frozen=True, eq=False)
class Descent:
    """Where descents from S particles of each task ended.

    Attributes:
        theta: `[S, T, D]`.
        energy: `[S, T]`, nats.
        converged: `[S, T]` bool.
        saddle: `[S, T]` bool, a direction of negative curvature was met there.
    """

    theta: Tensor
    energy: Tensor
    converged: Tensor
    saddle: Tensor


def descend(chain: Chain, ends: Tensor, minimiser: Minimiser | None = None) -> Descent:
    """Run particles `[S, T, D]` down to minima of E_i, all at once; see `find_basins`.

    S may differ from the chain's own; their gradients are counted with the chain's.
    """
    prior, tasks, size = chain.point.prior, chain.tasks, ends.shape[:2]
    bad = (~ends.isfinite()).any(-1).any(0)
    if bool(bad.any()):
        raise NonFiniteLoss(
            f"the loss of task {tasks.names[int(bad.nonzero()[0])]!r} is not finite: particles "
            f"went off to infinity ({int(bad.sum())} of {len(tasks)} tasks). Lower the algorithm's "
            "step_size, or give it a clip"
        )

    def energy(theta: Tensor) -> Tensor:  # a particle is a row of its own
        theta = theta.unflatten(0, size)
        loss = chain.density.negative_log_likelihood(theta, tasks, chain.shared)
        return (loss + prior.penalty(theta)).flatten()

    minimiser = minimiser or GradientFlow(scale=prior.scale)
    found = minimiser.minimise(FunctionEnergy(energy), ends.flatten(0, 1))
    # Conjugate gradients from a random direction meet negative curvature where there is some.
    probe = chain.noise.other(len(ends), ends.shape[-1]).flatten(0, 1)
    solution = CG(min(_PROBES, ends.shape[-1])).solve(found.at.product, probe)
    chain.gradients += len(ends) * (found.gradients + 2 * solution.products + 1)
    done = torch.ones_like(found.grad_norm, dtype=torch.bool)
    converged = done if found.converged is None else found.converged
    advice = "raise the minimiser's max_iterations, or the algorithm's step_size is too large"
    _warn(~converged, f"did not converge: {advice}", tasks)
    saddle = solution.negative_curvature
    _warn(converged & saddle, "ended at a saddle: start elsewhere, or inject noise", tasks)
    shaped = (v.unflatten(0, size) for v in (found.theta, found.at.value, converged, saddle))
    return Descent(*shaped)


@dataclass(frozen=True, eq=False)
class Partition:
    """Particles by basin.

    Attributes:
        labels: `[S, T]` int, 0 for the lowest energy of each task.
        first: `[K, T]` int, the lowest particle of each basin; −1 where a task has no such basin.
    """

    labels: Tensor
    first: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """`[S, T, ...]` to `[K, T, ...]`: of each basin's lowest particle; basin 0 for none."""
        index = torch.where(self.first < 0, self.first[0], self.first)
        return values[index, torch.arange(index.shape[1], device=index.device)]

    def spread(self, values: Tensor) -> Tensor:
        """`[K, T, ...]` to `[S, T, ...]`: to each particle its basin's."""
        return values[self.labels, torch.arange(values.shape[1], device=values.device)]


def partition(chain: Chain, descent: Descent, radius: float = RADIUS) -> Partition:
    """Group minima that are linked by steps of at most `radius` prior standard deviations."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    scaled = (descent.theta - chain.point.prior.loc) / chain.point.prior.scale
    places, energies = scaled.double().cpu().numpy(), descent.energy.double().cpu().numpy()
    labels, first = np.zeros(energies.shape, dtype=np.int64), []
    for t in range(places.shape[1]):
        group = _linked(places[:, t], radius)
        order = np.lexsort((energies[:, t], group))  # a group's lowest particle leads it
        lead = order[np.flatnonzero(np.diff(group[order], prepend=-1))]
        rank = np.argsort(energies[lead, t], kind="stable")
        labels[:, t] = np.argsort(rank)[group]
        first.append(lead[rank])
    most = max(map(len, first))
    padded = [np.pad(f, (0, most - len(f)), constant_values=-1) for f in first]
    device = descent.theta.device
    return Partition(
        torch.as_tensor(labels, device=device), torch.as_tensor(np.stack(padded, 1), device=device)
    )


def _linked(points: np.ndarray, radius: float) -> np.ndarray:
    """Single linkage of `[S, D]` at a distance, as labels `[S]`: components of a graph.

    Points in one small cell are taken together first, so that it does not matter how many coincide.
    """
    cells = np.floor(points * (2 * math.sqrt(points.shape[1]) / radius))
    _, some, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    near = cKDTree(points[some]).query_pairs(radius, output_type="ndarray")
    graph = coo_array((np.ones(len(near)), near.T), shape=(len(some), len(some)))
    groups: np.ndarray = connected_components(graph, directed=False)[1]
    return groups[cell.reshape(-1)]


def require_adaptation(prior: GaussianPrior) -> None:
    """Raise a ValueError for a prior of no width, at which nothing adapts (`CompletePooling`)."""
    if not bool((prior.scale > 0).all()):
        raise ValueError(
            "the prior has a scale of 0: no task moves away from θ0 (CompletePooling), and there "
            "are no basins to tell apart"
        )


def _warn(which: Tensor, what: str, tasks: Tasks) -> None:
    count = int(which.sum())
    if count:
        owners = which.reshape(-1, len(tasks)).any(0).nonzero()[:, 0].tolist()
        shown = ", ".join(repr(tasks.names[i]) for i in owners[:3])
        warnings.warn(
            f"{count} of {which.numel()} descents {what} (task {shown}"
            f"{', ...' if len(owners) > 3 else ''})",
            RuntimeWarning,
            stacklevel=4,
        )
