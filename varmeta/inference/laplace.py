"""Laplace's approximation: a Gaussian from the curvature at a mode, for small D."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from varmeta.inference.energy import Energy, as_energy

MAX_DIM = 200


def hessian(energy: Energy | Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """∇²E_i at θ_i as `[T, D, D]`, D products with all tasks at once."""
    product = as_energy(energy).linearise(theta).product
    eye = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    columns = [product(e.expand_as(theta)) for e in eye]
    dense = torch.stack(columns, dim=-1)
    return 0.5 * (dense + dense.mT)


def laplace_scale(
    energy: Energy | Callable[[Tensor], Tensor], theta: Tensor, names: tuple[str, ...] | None
) -> Tensor:
    """L `[T, D, D]`, lower triangular, with L Lᵀ = (∇²E)⁻¹ at the mode θ `[T, D]`.

    Where the Hessian is not positive definite θ is no mode: its negative directions are folded over
    (the inverse of |∇²E|) and a warning names the tasks, unless `names` is None.
    """
    dense = hessian(energy, theta)
    values, vectors = torch.linalg.eigh(dense)
    floor = torch.finfo(theta.dtype).eps * values.abs().amax(-1, keepdim=True)
    bad = (values <= floor).any(-1).nonzero()[:, 0].tolist()
    if bad and names is not None:
        shown = ", ".join(names[i] for i in bad[:5])
        warnings.warn(
            f"the curvature is not positive definite at the mode of {len(bad)} task(s) ({shown}): "
            "the inner problem is not solved there; raise the minimiser's max_iterations",
            RuntimeWarning,
            stacklevel=2,
        )
    root = vectors / values.abs().clamp(min=floor).sqrt()[:, None, :]  # root rootᵀ = |∇²E|⁻¹
    return torch.linalg.cholesky(root @ root.mT)
