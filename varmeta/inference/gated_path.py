"""Pathwise, save along the directions in which a run expands: for many dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varmeta.checked import Count, Positive
from varmeta.inference.chain import Chain, Slope
from varmeta.inference.estimators import Pathwise, State, others_mean
from varmeta.inference.gated import gate, inner, orthonormal, prior_rate

Seen = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class GatedPathwise(Pathwise):
    """δ_{t+1} = (∂m_t/∂x_t − V (G − gate(G)) Vᵀ) δ_t + ∂m_t/∂x, in k directions V, G = Vᵀ(∂m/∂x)V.

    The derivative goes along the path as `Pathwise`'s does, except that no component in V grows:
    what the gate takes away is differentiated through the noise. V follows the flow's own tangent,
    V_{t+1} = orth(∂m_t/∂x_t V_t), and so turns into the directions that expand fastest (its leading
    Lyapunov vectors; Benettin et al. 1980) at the rate at which a derivative would explode along
    them. Of all other directions nothing needs to be known, which is what `CurvatureGated` needs in
    many dimensions; where nothing expands this is `Pathwise`. Unbiased whatever V is. Needs
    injected noise in every step.

    Cost: 3 gradient evaluations and 2k + 1 Hessian-vector products a step. Keeps the states
    of a run, with V, and of long ones about 2√K.

    Attributes:
        rank: k, at most D of them are used.
        slowest: the slowest contraction that is followed in V, as a multiple of the prior's own.
    """

    rank: Count = 2
    slowest: Positive = 1.0

    needs_noise: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def begin(self, chain: Chain) -> State:
        """See `Pathwise.begin`; with random directions."""
        rank = min(self.rank, chain.density.dim)
        drawn = chain.noise.other(rank, chain.particles, chain.density.dim)
        return *super().begin(chain), orthonormal(drawn)

    def step(self, chain: Chain, t: int, state: State) -> tuple[State, Seen]:
        """See `Pathwise.step`; V, D and R⁻ᵀVDVᵀξ/σ, the gate taking VDVᵀ from this step."""
        theta, before, basis = state
        momentum, root = chain.algorithm.momentum, chain.root
        linear = chain.linear(t, theta, before, curved=True)
        turned = torch.stack([root.T(linear.pull(root.inverse_T(v))[0]) for v in basis])
        turned = turned - momentum * basis
        matrix = inner(basis, turned)
        matrix = 0.5 * (matrix + matrix.mT)
        taken = matrix - gate(matrix, 1 - self.slowest * prior_rate(chain, t))
        score = chain.noise.normal(t) / chain.sigma(t)
        removed = root.inverse_T(_within(basis, taken, score))
        after = linear.value + chain.shock(t)
        return (after, theta, orthonormal(turned)), (basis, taken, removed)

    def back(
        self,
        chain: Chain,
        linear: Slope,
        v: Tensor,
        losses: Tensor,
        seen: Seen,
    ) -> tuple[Tensor, Tensor]:
        """See `Pathwise.back`."""
        basis, taken, removed = seen
        along, rest = linear.pull(v)
        held = chain.root.inverse_T(_within(basis, taken, chain.root.T(v)))
        centred = losses - others_mean(losses, chain.antithetic)
        return along - held + centred[..., None] * removed, rest

    def kept_vectors(self, run_length: int) -> int:
        """V with every state."""
        return super().kept_vectors(run_length) * (1 + self.rank)


def _within(basis: Tensor, taken: Tensor, v: Tensor) -> Tensor:
    """V D Vᵀv, `[S, T, D]`."""
    within = torch.einsum("kstd,std->stk", basis, v)
    return torch.einsum("kstd,stkl,stl->std", basis, taken, within)
