"""Lanczos: quadratic forms of log|B| for large symmetric B, by products with it alone.

(Ubaru, Chen & Saad, 2017, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature; Golub &
Meurant, 2010, Matrices, Moments and Quadrature.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.inference.linear import MatVec


def probes(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """`[K, T, D]`: for each task K orthogonal random directions of length √D, mean z zᵀ = I."""
    tasks, dim = like.shape
    normal = torch.randn(
        tasks, dim, count, generator=generator, dtype=like.dtype, device=like.device
    )
    return dim**0.5 * torch.linalg.qr(normal).Q.permute(2, 0, 1)


def log_quadrature(matvec: MatVec, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """zᵀ log|B| z by Lanczos quadrature, `[N]` for z `[N, D]`; and where B is not definite.

    Exact with as many steps as B has distinct eigenvalues along z. Fully reorthogonalised.
    """
    length = z.norm(dim=-1)
    matrix = tridiagonal(matvec, z / length[:, None], min(steps, z.shape[1]))
    values, vectors, finite = eigen(matrix)
    size, bad = fold(values)
    out = length**2 * (vectors[:, 0] ** 2 * size.log()).sum(-1)
    return torch.where(finite, out, float("nan")), bad


def tridiagonal(matvec: MatVec, q: Tensor, steps: int) -> Tensor:
    """Lanczos' matrix `[N, M, M]` from unit vectors q `[N, D]`.

    Where the Krylov space ends earlier the rest is the identity, cut off from the first part.
    """
    tiny = 10 * torch.finfo(q.dtype).eps
    basis = [q]
    diagonal, off = [], []
    size, alive = q.new_zeros(len(q)), q.new_ones(len(q), dtype=torch.bool)
    for step in range(steps):
        w = matvec(q)
        alpha = (q * w).sum(-1)
        diagonal.append(torch.where(alive, alpha, 1.0))
        if step == steps - 1:
            break
        held = torch.stack(basis, 1)
        for _ in range(2):  # twice is enough
            w = w - torch.einsum("nkd,nk->nd", held, torch.einsum("nkd,nd->nk", held, w))
        beta = w.norm(dim=-1)
        size = torch.maximum(size, alpha.abs() + beta)
        alive = alive & ~(beta <= tiny * size)  # a NaN goes on, and is seen in the value
        off.append(torch.where(alive, beta, 0.0))
        q = torch.where(alive[:, None], w / torch.where(alive, beta, 1.0)[:, None], 0.0)
        basis.append(q)
    matrix = torch.stack(diagonal, -1).diag_embed()
    if off:
        side = torch.stack(off, -1)
        matrix = matrix + side.diag_embed(1) + side.diag_embed(-1)
    return matrix


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors, those of I where a matrix is not finite; and where it is."""
    finite = matrix.isfinite().all(-1).all(-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], matrix, eye))
    return values, vectors, finite


def fold(values: Tensor) -> tuple[Tensor, Tensor]:
    """|eigenvalues|, away from 0, and `[T]` bool: some are not positive."""
    floor = torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return values.abs().maximum(floor), (values <= floor).any(-1)
