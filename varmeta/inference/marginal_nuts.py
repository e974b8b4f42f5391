"""NUTS over ψ with every task marginalised: Pyro's sampler on the density of `marginal.py`.

(Margossian et al., 2020, Hamiltonian Monte Carlo Using an Adjoint-Differentiated Laplace
Approximation.) One ψ at a time has too little arithmetic to pay for a call of each operation, so
that two Newton steps from the predicted modes, the value and its gradient are one recorded program;
where these steps do not arrive, the careful way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varmeta.inference.belief import Belief
from varmeta.inference.marginal import Marginal, Points, Reference, derivative, whitened
from varmeta.inference.nuts_kernel import Sampler
from varmeta.models.capture import record

_STEPS = 2
CHAIN = ("position", "slope", "energy", "adaptation", "count")  # see `Sampler`


@dataclass(frozen=True, eq=False)
class Potential:
    """−log p̂(D | ψ) − log p(ψ) at one ψ, nats, and its gradient, over what has a prior.

    Attributes:
        belief: the vector's meaning and its prior density.
        marginal: of all tasks.
        mode: `[n]`, where what has no prior stands.
        known: of every task, near its mode.
        quick: a recorded program; None where the model cannot be recorded.
    """

    belief: Belief
    marginal: Marginal
    mode: Tensor
    known: Reference
    quick: Callable[..., Any] | None

    @classmethod
    def make(cls, belief: Belief, marginal: Marginal, mode: Tensor, known: Reference) -> Potential:
        """With its program."""
        points = belief.points(mode[None])
        marginal.evaluations += 0
        program = record(_program(marginal, points.groups), _arguments(marginal, points, known))
        return cls(belief, marginal, mode, known, program)

    def __call__(self, z: Mapping[str, Tensor]) -> Tensor:
        """Differentiable once in `z["psi"]` `[K]`."""
        out: Tensor = _Attach.apply(self.value_and_gradient, z["psi"])
        return out

    def value_and_gradient(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar and `[K]`; infinite where a task's evidence is not a number."""
        raw = self.mode.clone()
        raw[self.belief.free] = psi.detach()
        points = self.belief.points(raw[None])
        before, slope = self.belief.log_prob_and_gradient(raw[None])
        found = self._quickly(points)
        if found is None:
            total = self.marginal.total(points, self.known, gradient=True)
            assert total.gradient is not None
            found = total.log_evidence[0], total.gradient
        value, gradient = found
        whole = self.belief.pulled_back(gradient) + slope
        return -(value + before[0]), -whole[0, self.belief.free]

    def _quickly(self, points: Points) -> tuple[Tensor, Points] | None:
        if self.quick is None:
            return None
        dim = points.loc.shape[-1]
        self.marginal.evaluations += len(self.known.theta) * (7 + 10 * dim)
        value, loc, log_scale, shared, worst = self.quick(
            *_arguments(self.marginal, points, self.known)
        )
        if not float(worst) <= self.marginal.tolerance(points.loc.dtype):  # NaN too
            return None
        return value, Points(loc[None], log_scale[None], shared[None], points.groups)


def sampler(potential: Potential, axes: Tensor, warmup: int, target_accept: float) -> Sampler:
    """Ready for chains around the mode, with the curvature there as mass matrix."""
    middle = potential.mode[potential.belief.free]
    made = Sampler(potential, {"psi": middle.shape})
    made.start(middle, axes @ axes.T, warmup=warmup, target_accept=target_accept)
    return made


def _arguments(marginal: Marginal, points: Points, known: Reference) -> list[Tensor]:
    tasks = marginal.tasks
    assert known.slope is not None and known.curvature is not None
    psi = [points.loc[0], points.log_scale[0], points.shared[0]]
    return [
        *psi,
        known.theta,
        known.slope,
        known.curvature,
        tasks.inputs,
        tasks.targets,
        tasks.mask,
    ]


def _program(marginal: Marginal, groups: Tensor) -> Callable[..., list[Tensor]]:
    density = marginal.density

    def loss(theta: Tensor, shared: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return -torch.where(mask, density.rows(theta, shared, x, y), 0.0).sum(-1)

    def at(theta: Tensor, shared: Tensor, *data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = loss(theta, shared, *data)
        slope = derivative(value.sum(), theta)
        columns = [derivative(slope[..., d].sum(), theta) for d in range(theta.shape[-1])]
        curvature = torch.stack(columns, -1)
        return value, slope, 0.5 * (curvature + curvature.mT)

    def evaluate(
        loc: Tensor,
        log_scale: Tensor,
        shared: Tensor,
        theta: Tensor,
        slope: Tensor,
        curvature: Tensor,
        *data: Tensor,
    ) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (loc, log_scale, shared)]
            scale = leaves[1].exp()[groups]
            fixed = scale.detach()
            offset = theta - loc
            right = fixed * ((curvature @ offset[..., None])[..., 0] - slope)
            z = _solved(whitened(curvature, fixed), right)
            for _ in range(_STEPS):
                leaf = (loc + fixed * z).detach().requires_grad_()
                _, g, h = (t.detach() for t in at(leaf, shared.detach(), *data))
                z = z - _solved(whitened(h, fixed), fixed * g + z)
            z = z.detach().requires_grad_()
            value, g, h = at(leaves[0] + scale * z, leaves[2], *data)
            matrix, pull = whitened(h, scale), scale * g + z
            root, failed = torch.linalg.cholesky_ex(matrix.detach())
            volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            inverse = torch.cholesky_inverse(root)
            moved = 0.5 * (inverse * matrix).sum((-2, -1))
            first = torch.autograd.grad(
                -moved.sum(), [z, *leaves], retain_graph=True, materialize_grads=True
            )
            way = torch.cholesky_solve(first[0][..., None], root)[..., 0]
            rest = -value - (way * pull).sum(-1)
            second = torch.autograd.grad(rest.sum(), leaves, materialize_grads=True)
            step = torch.cholesky_solve(pull.detach()[..., None], root)[..., 0]
            decrement = (step * pull.detach()).sum(-1).clamp(min=0).sqrt()
            worst = (decrement + failed).amax()
            energy = value.detach() + 0.5 * z.detach().square().sum(-1)
            grads = [a + b for a, b in zip(first[1:], second, strict=True)]
        return [-(energy + volume).sum(), *grads, worst]

    return evaluate


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    root, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right[..., None], root)[..., 0]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Callable[[Tensor], tuple[Tensor, Tensor]], psi: Tensor) -> Tensor:
        value, slope = both(psi)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seed: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, seed[0] * slope
