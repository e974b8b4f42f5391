"""The curvature-gated estimator: along the path where that contracts, by the score elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from varmeta.checked import Count, Positive
from varmeta.inference.chain import Chain, Slope
from varmeta.inference.estimators import Attached, Path, Weighted, on_loc
from varmeta.inference.pilot import eigh

FULL = 8  # coordinates up to which the gate sees all of the curvature
_WARM_UP = 3  # power iterations before the first step: the subspace is only followed after that


@dataclass(frozen=True)
class CurvatureGated(Weighted):
    """δ_{t+1} = gate(∂m_t/∂x_t) δ_t + ∂m_t/∂x, the gate holding every eigenvalue below 1.

    Needs injected noise in every step. Where E is convex this is `Pathwise`; along directions of
    negative curvature, where a derivative along the path would explode, the noise takes over.

    In few dimensions the gate sees the whole Hessian. In many it sees the k directions in which the
    curvature is largest in size, followed by a step of power iteration for each step of the run
    (Saad 2011, Numerical Methods for Large Eigenvalue Problems, §5: subspace iteration); the others
    are taken to contract at their mean rate, for which the step before gives a Hutchinson estimate.
    Unbiased whatever the gate does: it only moves variance about.

    Cost: a gradient evaluation and k Hessian-vector products a step, k + 1 where k < D. Keeps a few
    times k vectors of θ's size a particle.

    Attributes:
        rank: k; None for all of up to 8 coordinates, and 4 of more.
        slowest: the slowest contraction that is followed, as a multiple of the prior's own, λ: an
            eigenvalue of ∇²E below slowest · λ counts as that.
    """

    rank: Count | None = None
    slowest: Positive = 1.0

    def path(self, chain: Chain) -> Path:
        """See `Weighted.path`."""
        dim = chain.density.dim
        default = dim if dim <= FULL else 4
        return Gated(chain, min(self.rank or default, dim), self.slowest)

    def kept_vectors(self, run_length: int) -> int:
        """The subspace and its derivatives."""
        return super().kept_vectors(run_length) + 6 * (self.rank or 8)


@dataclass(eq=False)
class Gated(Path):
    """δ_t = ρ (I − VVᵀ) dθ0/dx + V C in coordinates in which P = I.

    Attributes:
        chain: what runs.
        rank: k.
        slowest: see `CurvatureGated`.
        basis: V, `[k, S, T, D]`, orthonormal.
        inside: C, `[S, T, k, n]`.
        rest: ρ, `[S, T]`.
        mean_rate: of contraction outside V, in the step before, `[S, T]`.
    """

    chain: Chain
    rank: int
    slowest: float
    basis: Tensor = field(init=False)
    inside: Tensor = field(init=False)
    rest: Tensor = field(init=False)
    mean_rate: Tensor | None = None

    def __post_init__(self) -> None:
        chain, dim = self.chain, self.chain.density.dim
        like = chain.point.prior.loc
        size = (chain.particles, len(chain.tasks))
        if self.rank == dim:
            eye = torch.eye(dim, dtype=like.dtype, device=like.device)
            self.basis = eye[:, None, None].expand(dim, *size, dim)
        else:
            self.basis = orthonormal(chain.noise.other(self.rank, chain.particles, dim))
            start = chain.linear(0, chain.start(), chain.start(), curved=True)
            for _ in range(_WARM_UP):
                turned = torch.stack([self._turned(start, v)[0] for v in self.basis])
                self.basis = orthonormal(_deviating(self.basis, turned))
        self.rest = like.new_ones(size)
        self.inside = self._onto_basis()
        self._before, self._rest_before = self.inside, self.rest  # no velocity at the start

    def curved(self, t: int) -> bool:
        """Always."""
        return True

    def pull(self, linear: Slope, score: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path.pull`; nothing new where the subspace is all there is."""
        pulled = [self._turned(linear, v) for v in self.basis]
        turned = torch.stack([a for a, _ in pulled])  # Aᵀ V
        direct = torch.stack([r for _, r in pulled], dim=-2)  # Vᵀ∂m/∂x
        self._pulled = turned, direct
        if self.rank < self.chain.density.dim:
            return linear.pull(score)
        root, white = self.chain.root, self.chain.root.T(score)  # V = I
        along = torch.einsum("kstd,stk->std", turned, white)  # Aᵀ applied to it
        return root.inverse_T(along), torch.einsum("stkn,stk->stn", direct, white)

    def advance(self, t: int, linear: Slope, along: Tensor) -> Attached:
        """See `Path.advance`."""
        chain, momentum = self.chain, self.chain.algorithm.momentum
        turned, direct = self._pulled
        matrix = inner(self.basis, turned) - momentum * _eye(self.basis)
        matrix = 0.5 * (matrix + matrix.mT)
        anchor = prior_rate(chain, t)
        gated = gate(matrix, 1 - self.slowest * anchor)
        after = gated @ self.inside + direct
        if momentum:
            after = after + momentum * (self.inside - self._before)
        basis, rest = self.basis, self.rest
        if self.rank < chain.density.dim:
            rate = self.mean_rate
            rest = rest if rate is None else rate.clamp(min=0, max=1) * rest + anchor
            rest = (rest + momentum * (self.rest - self._rest_before)).clamp(min=0, max=1)
            self._rest_before = self.rest
            self.mean_rate = self._outside_rate(t, along, matrix)
            basis = orthonormal(_deviating(self.basis, turned))
            # The same δ, seen from the new subspace.
            overlap = inner(basis, self.basis)
            old = self._onto_basis()
            self.basis = basis
            outside = self._onto_basis() - overlap @ old
            after = overlap @ after + rest[..., None, None] * outside
            self._before = overlap @ self._before
            self.inside = overlap @ self.inside + self.rest[..., None, None] * outside
        self._before, self.inside, self.rest = self.inside, after, rest
        return lambda a: self._transposed(a, basis, after, rest)

    # -- parts ------------------------------------------------------------------------------------

    def _turned(self, linear: Slope, v: Tensor) -> tuple[Tensor, Tensor]:
        """In whitened coordinates: Aᵀv, and vᵀ∂m/∂x.

        A is symmetric where no move is clipped. Elsewhere the gate looks at its symmetric part, and
        the subspace follows Aᵀ; what a step contributes is exact all the same, whatever they are.
        """
        along, rest = linear.pull(self.chain.root.inverse_T(v))
        return self.chain.root.T(along), rest

    def _transposed(self, a: Tensor, basis: Tensor, inside: Tensor, rest: Tensor) -> Tensor:
        """aᵀδ, `[S, T, n]`."""
        white = self.chain.root.T(a)
        within = (basis * white).sum(-1)  # Vᵀa, [k, S, T]
        out = torch.einsum("kst,stkn->stn", within, inside)
        if self.rank == self.chain.density.dim:
            return out
        beyond = white - torch.einsum("kst,kstd->std", within, basis)
        return out + on_loc(self.chain, rest[..., None] * self.chain.root.inverse_T(beyond))

    def _onto_basis(self) -> Tensor:
        """Vᵀ dθ0/dx, `[S, T, k, n]`."""
        each = [on_loc(self.chain, self.chain.root.inverse_T(v)) for v in self.basis]
        return torch.stack(each, dim=-2)

    def _outside_rate(self, t: int, along: Tensor, matrix: Tensor) -> Tensor:
        """ξᵀAξ/ξᵀξ outside V, of this step's own ξ, `[S, T]`."""
        chain = self.chain
        noise, momentum = chain.noise.normal(t), chain.algorithm.momentum
        turned = chain.sigma(t) * chain.root.T(along) - momentum * noise
        within = (self.basis * noise).sum(-1).movedim(0, -1)
        mixed = (self.basis * turned).sum(-1).movedim(0, -1)
        inner = (within[..., None, :] @ matrix @ within[..., None])[..., 0, 0]
        product = (noise * turned).sum(-1) - 2 * (within * mixed).sum(-1) + inner
        return product / ((noise**2).sum(-1) - (within**2).sum(-1))


def gate(matrix: Tensor, most: Tensor) -> Tensor:
    """`[S, T, k, k]`, the same eigenvectors, no eigenvalue above `most` `[T]` in size.

    NaN where the matrix is not finite, for the loss of that run to be found to be so.
    """
    most = most[:, None]
    if matrix.shape[-1] == 1:
        return matrix.clamp(-most[..., None], most[..., None])
    values, vectors = eigh(matrix)
    values = torch.maximum(torch.minimum(values, most), -most)
    return (vectors * values[..., None, :]) @ vectors.mT


def prior_rate(chain: Chain, t: int) -> Tensor:
    """Mean eigenvalue of η_t RᵀΛR, `[T]`: how fast the prior alone contracts in step t."""
    root, precision = chain.root, chain.point.prior.scale**-2 * chain.pace(t)
    if root.vectors is None:
        return (precision / root.s**2).mean(-1).expand(len(chain.tasks))
    turned = torch.einsum("tji,j->ti", root.vectors**2, precision * root.unit**2)
    return (turned / root.s**2).mean(-1)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """LᵀR of two `[k, S, T, D]`: `[S, T, k, k]`."""
    return torch.einsum("ksti,lsti->stkl", left, right)


def _eye(basis: Tensor) -> Tensor:
    return torch.eye(len(basis), dtype=basis.dtype, device=basis.device)


def _deviating(basis: Tensor, turned: Tensor) -> Tensor:
    """A step of power iteration with A − I.

    Large there are the stiffest directions and those that expand most; the bulk of a network's
    curvatures is close to 0.
    """
    return turned - basis


def orthonormal(vectors: Tensor) -> Tensor:
    """`[k, S, T, D]`, orthonormal with the same span, by Cholesky, twice for the rounding."""
    for _ in range(2):
        gram = inner(vectors, vectors)
        diagonal = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eps = torch.finfo(gram.dtype).eps * diagonal + torch.finfo(gram.dtype).tiny
        lower = torch.linalg.cholesky_ex(gram + eps * _eye(vectors)).L
        inverse = torch.linalg.solve_triangular(lower, _eye(vectors), upper=False)
        vectors = torch.einsum("stkl,lstd->kstd", inverse, vectors)
    return vectors
