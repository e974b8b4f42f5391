"""NUTS over ψ with every task marginalised: Pyro's sampler on the density of `marginal.py`.

(Margossian et al., 2020, Hamiltonian Monte Carlo Using an Adjoint-Differentiated Laplace
Approximation.) One ψ at a time has too little arithmetic to pay for a call of each operation, so
that one or two Newton steps from the predicted modes, the value and its gradient are one recorded
program; where these steps do not arrive, the careful way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varmeta.inference.belief import Belief
from varmeta.inference.marginal import Marginal, Reference, derivative, whitened
from varmeta.models.capture import Unrecordable, agree, trace

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
    def make(
        cls, belief: Belief, marginal: Marginal, mode: Tensor, known: Reference, steps: int
    ) -> Potential:
        """With its program, of so many Newton steps: one is enough where tasks are parabolas.

        Without one for 0 steps.
        """
        if not steps:
            return cls(belief, marginal, mode, known, None)
        function = _program(belief, marginal, mode, steps)
        given = [mode[belief.free], *_data(marginal, known)]
        program: Callable[..., Any] | None
        try:
            program = trace(function, given)
            agree(program, function, given, exact=False)
        except Unrecordable:
            program = None
        return cls(belief, marginal, mode, known, program)

    def __call__(self, z: Mapping[str, Tensor]) -> Tensor:
        """Differentiable once in `z["psi"]` `[K]`."""
        out: Tensor = _Attach.apply(self.value_and_gradient, z["psi"])
        return out

    def value_and_gradient(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar and `[K]`; infinite where a task's evidence is not a number."""
        if self.quick is not None:
            self.marginal.evaluations += len(self.known.theta) * (
                7 + 10 * self.known.theta.shape[1]
            )
            with torch._C.DisableTorchFunction():  # nothing of interest to a mode, which costs time
                value, slope, worst = self.quick(psi.detach(), *_data(self.marginal, self.known))
            if float(worst) <= self.marginal.tolerance(psi.dtype):  # not where it is NaN
                return -value, -slope
        raw = self.mode.index_copy(0, self.belief.free, psi.detach())[None]
        points = self.belief.points(raw)
        before, first = self.belief.log_prob_and_gradient(raw)
        total = self.marginal.total(points, self.known, gradient=True)
        assert total.gradient is not None
        whole = self.belief.pulled_back(total.gradient) + first
        return -(total.log_evidence[0] + before[0]), -whole[0, self.belief.free]


def _data(marginal: Marginal, known: Reference) -> list[Tensor]:
    tasks = marginal.tasks
    assert known.slope is not None and known.curvature is not None
    near = [known.theta, known.slope, known.curvature]
    return [*near, tasks.inputs, tasks.targets, tasks.mask]


def _program(
    belief: Belief, marginal: Marginal, mode: Tensor, steps: int
) -> Callable[..., list[Tensor]]:
    density, groups, free = marginal.density, belief.meta.origin.groups, belief.free

    def at(
        theta: Tensor, shared: Tensor, x: Tensor, y: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        value = -torch.where(mask, density.rows(theta, shared, x, y), 0.0).sum(-1)
        slope = derivative(value.sum(), theta)
        columns = [derivative(slope[..., d].sum(), theta) for d in range(theta.shape[-1])]
        curvature = torch.stack(columns, -1)
        return value, slope, 0.5 * (curvature + curvature.mT)

    def evaluate(
        psi: Tensor, theta: Tensor, slope: Tensor, curvature: Tensor, *data: Tensor
    ) -> list[Tensor]:
        with torch.enable_grad():
            leaf = psi.detach().requires_grad_()
            points = belief.points(mode.index_copy(0, free, leaf)[None])
            loc, log_scale, shared = points.loc[0], points.log_scale[0], points.shared[0]
            scale = log_scale.exp()[groups]
            fixed, middle, phi = scale.detach(), loc.detach(), shared.detach()
            right = fixed * ((curvature @ (theta - middle)[..., None])[..., 0] - slope)
            z = _solved(whitened(curvature, fixed), right)
            for _ in range(steps):
                trial = (middle + fixed * z).detach().requires_grad_()
                _, g, h = (t.detach() for t in at(trial, phi, *data))
                z = z - _solved(whitened(h, fixed), fixed * g + z)
            z = z.detach().requires_grad_()
            value, g, h = at(loc + scale * z, shared, *data)
            matrix, pull = whitened(h, scale), scale * g + z
            root, failed = torch.linalg.cholesky_ex(matrix.detach())
            volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            # log det B, with the derivative tr(B⁻¹ dB)
            moved = 0.5 * (torch.cholesky_inverse(root) * matrix).sum((-2, -1))
            along, first = torch.autograd.grad(
                -moved.sum(), [z, leaf], retain_graph=True, materialize_grads=True
            )
            way = torch.cholesky_solve(along[..., None], root)[..., 0]
            before = belief.log_prob(points)[0]
            rest = -value.sum() - (way * pull).sum() + before
            (second,) = torch.autograd.grad(rest, [leaf], materialize_grads=True)
            step = torch.cholesky_solve(pull.detach()[..., None], root)[..., 0]
            decrement = (step * pull.detach()).sum(-1).clamp(min=0).sqrt()
            energy = (value + 0.5 * z.square().sum(-1)).detach()
            total = before.detach() - (energy + volume).sum()
        return [total, first + second, (decrement + failed).amax()]

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
