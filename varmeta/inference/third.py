"""Third derivatives of a task's loss: how products with its Hessian change with θ and φ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varmeta.models.density import Density
from varmeta.tasks import Tasks

_DIRECTIONS_AT_ONCE = 16  # as many copies of a model's activations are held


def bent(
    density: Density, tasks: Tasks, left: Tensor, right: Tensor, theta: Tensor, shared: Tensor
) -> Tensor:
    """0 `[T]`, with the first derivative in θ and φ of Σ_k left_kᵀ ∇²f_i(θ_i; φ) right_k.

    Some directions at a time, so that memory does not grow with their number.

    Args:
        density: the model; f_i is the sum over all rows of `tasks`.
        tasks: T tasks.
        left: `[K, T, D]`, taken as constant.
        right: `[K, T, D]`, taken as constant.
        theta: `[T, D]`.
        shared: φ `[P]`.
    """
    out: Tensor = _Bent.apply(density, tasks, left.detach(), right.detach(), theta, shared)
    return out


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        density: Density,
        tasks: Tasks,
        left: Tensor,
        right: Tensor,
        theta: Tensor,
        shared: Tensor,
    ) -> Tensor:
        ctx.density, ctx.tasks = density, tasks
        ctx.save_for_backward(left, right, theta, shared)
        return theta.new_zeros(len(theta))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seed: Tensor) -> tuple[Tensor | None, ...]:
        left, right, *tensors = ctx.saved_tensors
        total = [torch.zeros_like(t) for t in tensors]
        size = _DIRECTIONS_AT_ONCE
        for u, w in zip(left.split(size), right.split(size), strict=True):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in tensors]
                theta = leaves[0].expand_as(u)
                loss = ctx.density.negative_log_likelihood(theta, ctx.tasks, leaves[1]).sum()
                slope = _derivative(loss, theta, torch.ones_like(loss))
                turned = _derivative(slope, theta, w)
                if not turned.requires_grad:  # a Hessian that depends on nothing
                    continue
                weighted = seed[0][:, None] * u
                grads = torch.autograd.grad(turned, leaves, weighted, materialize_grads=True)
            total = [t + g for t, g in zip(total, grads, strict=True)]
        return None, None, None, None, *total


def _derivative(of: Tensor, at: Tensor, seed: Tensor) -> Tensor:
    if not of.requires_grad:
        return torch.zeros_like(at)
    return torch.autograd.grad(of, at, seed, create_graph=True, materialize_grads=True)[0]
