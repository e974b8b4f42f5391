"""The curvature of a task where descent from θ0 comes to rest: what sets the pace of its runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.inference.energy import FunctionEnergy

_MOST, _HALVINGS = 50, 20
_ARMIJO = 1e-4
_LONGEST = 3.0  # prior standard deviations of a step
_GAIN = 0.01  # nats that a Newton step must promise to be worth it: a tenth of a posterior sd
_FLATTEST = 0.01  # times the prior's curvature, below which no direction counts


class Curvature(NamedTuple):
    """|∇²E_i| where a descent came to rest, in units of the prior's scales.

    Attributes:
        values: its eigenvalues, `[T, D]`, 1 being about the prior's own.
        vectors: `[T, D, D]`, columns.
        gradients: evaluations of each task's gradient, a Hessian-vector product counted as two.
        theta: where that is, `[T, D]`.
    """

    values: Tensor
    vectors: Tensor
    gradients: int
    theta: Tensor


def curvature_at_rest(
    energy: Callable[[Tensor], Tensor], start: Tensor, scale: Tensor
) -> Curvature:
    """Go down from `start` `[T, D]` by Newton steps, and take the curvature there.

    A step divides by the size of the curvature along each of its directions, so that it goes down
    at a saddle too (Dauphin et al. 2014, saddle-free Newton); along each it is at most 3 prior
    standard deviations long, and it is halved until E falls as it should. It ends where a step
    would gain less than 0.01 nats, whatever the units of θ. A task that is not finite has NaN for
    its curvature.

    Args:
        energy: E, from `[T, D]` to `[T]` nats.
        start: θ0 for each task.
        scale: of the prior, `[D]`.
    """
    theta, count = start.detach(), 0
    stalled = torch.zeros_like(theta[:, 0], dtype=torch.bool)
    eye = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    for iteration in range(_MOST + 1):
        at = FunctionEnergy(energy).linearise(theta)
        columns = [scale * at.product((scale * e).expand_as(theta)) for e in eye]
        dense = torch.stack(columns, dim=-1)
        values, vectors = eigh(0.5 * (dense + dense.mT))
        eps = torch.finfo(values.dtype).eps
        floor = (eps * values.abs().amax(-1, keepdim=True)).clamp(min=_FLATTEST)
        size, slope = torch.maximum(values.abs(), floor), scale * at.grad.detach()
        usable = torch.where(size.isfinite(), size, 1.0)  # else the prior's curvature, for now
        count += 1 + 2 * len(eye)
        along = torch.einsum("tij,ti->tj", vectors, slope)
        active = ((along**2 / usable).sum(-1) > 2 * _GAIN) & ~stalled
        if iteration == _MOST or not bool(active.any()):
            break
        each = (-along / usable).clamp(-_LONGEST, _LONGEST)
        move = torch.einsum("tij,tj->ti", vectors, each)
        expected = _ARMIJO * (move * slope).sum(-1)
        length, good = torch.ones_like(expected), torch.zeros_like(stalled)
        for _ in range(_HALVINGS):
            trial = theta + (length[:, None] * scale) * move
            with torch.no_grad():
                good = energy(trial) <= at.value + length * expected
            count += 1
            if bool((good | ~active).all()):
                break
            length = torch.where(good, length, 0.5 * length)
        theta = torch.where((good & active)[:, None], trial, theta)
        stalled = stalled | (active & ~good)
    return Curvature(size, vectors, count, theta)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of `[..., D, D]`; NaN for the eigenvalues of what is not finite.

    The solver itself stops at such a matrix, with an error that knows of no task.
    """
    bad = ~matrix.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(matrix.masked_fill(bad[..., None, None], 0.0))
    return values.masked_fill(bad[..., None], torch.nan), vectors
