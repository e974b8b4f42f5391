"""The variational free energy of one q_i, F_i = KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i ≥ −log p(y_i)."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.inference.energy import TaskEnergy
from varmeta.inference.families import GaussianQ
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks


def cubature(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """±√K e_j, `[2K, K]`: averages every polynomial of degree 3 under N(0, I) exactly."""
    eye = dim**0.5 * torch.eye(dim, dtype=dtype, device=device)
    return torch.cat([eye, -eye])


def free_energy(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    q: GaussianQ,
    points: Tensor | None,
    weight: Tensor | None = None,
    rule_weights: Tensor | None = None,
) -> Tensor:
    """F_i = KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i per task, nats, `[B]`: the negative evidence bound.

    Args:
        density: the model.
        prior: N(θ0, Σ).
        shared: `[P]`.
        tasks: B tasks.
        q: their q_i; a point stands for its delta limit, without the divergent constant.
        points: `[S, B, K]`, standardised points at which f is averaged: normal draws, or those of a
            cubature rule; None for a point.
        weight: `[B]`, how many rows each row of a task stands for; None for one.
        rule_weights: `[S]`, of the points; None for equal ones.
    """
    if points is None:
        expected = TaskEnergy(density, tasks, shared).loss(q.mean)
    else:
        each = density.negative_log_likelihood(q.draws(points), tasks, shared)
        expected = each.mean(0) if rule_weights is None else rule_weights @ each
    return q.kl(prior) + (expected if weight is None else weight.to(expected) * expected)
