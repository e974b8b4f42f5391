"""The marginal likelihood of what all tasks share, every task's θ_i integrated out by Laplace.

ψ = (θ0, log scales, φ), and for many ψ at once

    log p̂(D | ψ) = Σ_i −f_i(θ_i*; φ) − ½‖z_i*‖² − ½ log det(I + S ∇²f_i S),  θ = θ0 + S z,

S the diagonal of the scales and z_i* the mode of −f_i − ½‖z‖² (Tierney & Kadane, 1986, Accurate
Approximations for Posterior Moments; within a hierarchy: Rue, Martino & Chopin, 2009, Approximate
Bayesian Inference for Latent Gaussian Models; Kristensen et al., 2016, TMB). Exact where f_i is a
parabola. In z a scale of 0 is like any other. The gradient is exact: that of the log-determinant
through z_i* by the implicit function theorem (Margossian et al., 2020, Hamiltonian Monte Carlo
Using an Adjoint-Differentiated Laplace Approximation).

All draws of ψ and all tasks are one batch, in parts that fit a memory budget (`varmeta.parts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta import parts
from varmeta.models.density import Density
from varmeta.models.derivatives import twice_differentiable
from varmeta.tasks import Tasks

_NEWTON = 60  # steps at most, shortened ones counted
_SHORTEST = 2.0**-30
_ARMIJO = 1e-4
_SMALL = 50_000  # numbers in a tensor: all tasks in one call, padding and all


@dataclass(frozen=True, eq=False)
class Points:
    """S values of ψ.

    Attributes:
        loc: `[S, D]`, θ0.
        log_scale: `[S, M]`.
        shared: `[S, P]`, φ.
        groups: `[D]` int, which of the M scales each coordinate uses.
    """

    loc: Tensor
    log_scale: Tensor
    shared: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.loc)

    @property
    def scale(self) -> Tensor:
        """`[S, D]`, the standard deviation of each coordinate."""
        return self.log_scale.exp()[:, self.groups]

    def select(self, index: Tensor | slice) -> Points:
        """Those at these positions."""
        return Points(self.loc[index], self.log_scale[index], self.shared[index], self.groups)


@dataclass(frozen=True, eq=False)
class Reference:
    """Each task's f_i to second order at one point, from which modes are predicted.

    Without a slope and a curvature the point itself is the prediction.

    Attributes:
        theta: `[T, D]`.
        slope: `[T, D]`, ∇f_i.
        curvature: `[T, D, D]`, ∇²f_i, without what bends down.
    """

    theta: Tensor
    slope: Tensor | None = None
    curvature: Tensor | None = None

    def select(self, index: Tensor | slice) -> Reference:
        """Of these tasks."""
        if self.slope is None or self.curvature is None:
            return Reference(self.theta[index])
        return Reference(self.theta[index], self.slope[index], self.curvature[index])

    def predict(self, index: Tensor, points: Points) -> Tensor:
        """z_i* `[S, t, D]` of these tasks were f_i its parabola here, whatever φ."""
        scale, here = points.scale[:, None], self.select(index)
        slope, curved = here.slope, here.curvature
        offset = here.theta - points.loc[:, None]
        if slope is None or curved is None:
            return offset / scale
        right = scale * ((curved @ offset[..., None])[..., 0] - slope)
        matrix = whitened(curved, scale)
        root, _ = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(right[..., None], root)[..., 0]


@dataclass(frozen=True, eq=False)
class Inner:
    """The modes of t tasks for s values of ψ, and the Gaussians around them.

    Attributes:
        z: `[s, t, D]`, z_i*.
        value: `[s, t]` nats, f_i + ½‖z‖² there.
        slope: `[s, t, D]`, ∇f_i there, over θ.
        curvature: `[s, t, D, D]`, ∇²f_i there.
        root: `[s, t, D, D]`, the Cholesky factor of I + S∇²f_iS (of its absolute value where that
            is not positive definite).
        converged: `[s, t]` bool, the mode was reached.
        indefinite: `[s, t]` bool, the curvature is not positive definite: no mode.
    """

    z: Tensor
    value: Tensor
    slope: Tensor
    curvature: Tensor
    root: Tensor
    converged: Tensor
    indefinite: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """`[s, t]` nats, Laplace's log p(D_i | ψ)."""
        return -self.value - self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def at(self, u: Tensor) -> Tensor:
        """z `[..., s, t, D]` at so many standard deviations u of the Gaussian from the mode."""
        return self.z + _backwards(self.root, u)


@dataclass(frozen=True, eq=False)
class Block:
    """Some tasks for some values of ψ.

    Attributes:
        part: the tasks.
        draws: which values of ψ.
        points: these.
        inner: their modes.
    """

    part: parts.Part
    draws: slice
    points: Points
    inner: Inner


@dataclass(frozen=True, eq=False)
class Total:
    """log p̂(D | ψ) of S values of ψ.

    Attributes:
        log_evidence: `[S]` nats, the sum over tasks; −inf where a task's is not a number.
        gradient: in θ0, the log scales and φ, as `Points`; None where it was not asked for.
        unsolved: `[S, T]` bool, tasks whose mode was not found.
        losses: `[T]` nats, −log p̂(D_i | ψ) for the first ψ.
        known: every f_i at its mode for the first ψ.
    """

    log_evidence: Tensor
    gradient: Points | None
    unsolved: Tensor
    losses: Tensor
    known: Reference


class Marginal:
    """log p̂(D | ψ) of one set of tasks.

    Args:
        density: the model.
        tasks: T tasks, of which all rows count.

    Attributes:
        evaluations: of one task's loss or its gradient so far, a Hessian counted as 2 D.
    """

    def __init__(self, density: Density, tasks: Tasks) -> None:
        self.density, self.tasks = density, tasks
        self.evaluations = 0
        self._buckets: list[parts.Part] | None = None
        self._numbers = 0

    def total(
        self,
        points: Points,
        start: Reference,
        *,
        gradient: bool = False,
    ) -> Total:
        """log p̂(D | ψ) of all tasks together.

        Args:
            points: S values of ψ.
            start: from which the modes are sought.
            gradient: whether its gradient in ψ is wanted.
        """
        count, tasks = len(points), len(self.tasks)
        like = points.loc
        value, unsolved = (
            like.new_zeros(count),
            torch.zeros(count, tasks, dtype=torch.bool, device=like.device),
        )
        losses, dim = like.new_zeros(tasks), self.density.dim
        theta, first = like.new_zeros(tasks, dim), like.new_zeros(tasks, dim)
        second = like.new_zeros(tasks, dim, dim)
        slopes = [torch.zeros_like(t) for t in (points.loc, points.log_scale, points.shared)]
        for block in self.blocks(points, start, heavy=gradient):
            each, index = block.inner.log_evidence, block.part.index
            value[block.draws] += each.sum(-1)
            unsolved[block.draws, index] = ~block.inner.converged | block.inner.indefinite
            if block.draws.start == 0:
                losses[index] = -each[0]
                at, inner = block.points, block.inner
                theta[index] = at.loc[0] + at.scale[0] * inner.z[0]
                first[index], second[index] = inner.slope[0], _no_less_than_flat(inner.curvature[0])
            if gradient:
                for whole, part in zip(slopes, self._gradient(block), strict=True):
                    whole[block.draws] += part
        a, b, c = slopes
        found = Points(a, b, c, points.groups) if gradient else None
        bad = ~value.isfinite()
        known = Reference(theta, first, second)
        return Total(value.masked_fill(bad, -torch.inf), found, unsolved, losses, known)

    def blocks(
        self, points: Points, start: Reference, *, heavy: bool = False, copies: int = 1
    ) -> Iterator[Block]:
        """The modes of all tasks for all ψ, some at a time.

        Args:
            points: S values of ψ.
            start: as of `total`.
            heavy: a graph of third derivatives will be made of each.
            copies: so many other θ will be looked at around each mode, at once.
        """
        for part, draws in self.shares(len(points), points, heavy=heavy, copies=copies):
            some = points.select(draws)
            z = start.predict(part.index, some)
            yield Block(part, draws, some, self.solve(part, some, z))

    def shares(
        self, count: int, points: Points, *, heavy: bool = False, copies: int = 1
    ) -> Iterator[tuple[parts.Part, slice]]:
        """Tasks and draws that are looked at together."""
        numbers = self._numbers_per_row(points)
        most = parts.AT_ONCE // (1 + self.density.dim * heavy)
        for bucket in self._parts(count * numbers):
            width = numbers * bucket.tasks.mask.shape[1]
            width = max(width, copies * self.density.dim * parts.AT_ONCE // parts.LARGEST)
            whole = len(bucket.index)
            for some in parts.slices(whole, width, most):
                part = bucket
                if some.stop - some.start < whole:
                    inside = parts.tasks_at(bucket.tasks, some)
                    part = parts.Part(inside, bucket.index[some], bucket.columns)
                for draws in parts.slices(count, width * len(part.index), most):
                    yield part, draws

    def loss(self, part: parts.Part, points: Points, z: Tensor) -> Tensor:
        """f_i + ½‖z‖² `[..., s, t]` at z `[..., s, t, D]`, nats, detached."""
        scale, loc = points.scale[:, None], points.loc[:, None]
        copies = z.reshape(-1, *z.shape[-3:])
        rows = self._numbers_per_row(points) * part.tasks.mask.numel() * len(points)
        nats = []
        for some in parts.slices(len(copies), rows, parts.AT_ONCE):
            theta = loc + scale * copies[some]
            shared = points.shared[:, None].expand(*theta.shape[:-1], -1)
            with torch.no_grad():
                found = self.density.negative_log_likelihood(
                    theta.flatten(0, 1), part.tasks, shared.flatten(0, 1)
                )
            nats.append(found.reshape(theta.shape[:-1]))
        total = torch.cat(nats).reshape(z.shape[:-1]) + 0.5 * z.square().sum(-1)
        self.evaluations += total.numel()
        return total

    def solve(self, part: parts.Part, points: Points, z: Tensor) -> Inner:
        """The modes from z `[s, t, D]`, by Newton steps of the whole batch at once."""
        eps, enough = torch.finfo(z.dtype).eps, self.tolerance(z.dtype)
        z = z.detach()
        here = _State.at(self, part, points, z)
        length = torch.ones_like(here.value)
        for _ in range(_NEWTON):
            active = (here.decrement > enough) & (length > _SHORTEST)
            if not bool(active.any()):
                break
            trial = here.z + torch.where(active, length, 0.0)[..., None] * here.step
            new = _State.at(self, part, points, trial)
            flat = 64 * eps * (1 + here.value.abs())
            low = here.value - _ARMIJO * length * here.decrement.square() + flat
            good = active & (new.value <= low) & new.decrement.isfinite()
            here = here.where(good, new)
            length = torch.where(good, 1.0, torch.where(active, 0.5 * length, length))
        # Where rounding leaves no better point a standard deviation's thousandth will do.
        converged = here.decrement <= max(1e-4, enough)
        return Inner(
            here.z, here.value, here.slope, here.curvature, here.root, converged, here.indefinite
        )

    @staticmethod
    def tolerance(dtype: torch.dtype) -> float:
        """Standard deviations that a mode may be off: 1e-6, in float32 2e-3."""
        return float(torch.finfo(dtype).eps ** 0.38)

    def derivatives(
        self, part: parts.Part, theta: Tensor, shared: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f_i `[s, t]`, ∇f_i `[s, t, D]` and ∇²f_i `[s, t, D, D]`; with a graph if `keep`."""
        dim = self.density.dim
        self.evaluations += theta.shape[0] * theta.shape[1] * (1 + 2 * dim)
        with torch.enable_grad(), twice_differentiable():
            leaf = theta if keep else theta.detach().requires_grad_()
            loss = self.density.negative_log_likelihood(leaf, part.tasks, shared)
            slope = derivative(loss.sum(), leaf)
            columns = [
                derivative(slope[..., d].sum(), leaf, keep=keep or d + 1 < dim) for d in range(dim)
            ]
        curvature = torch.stack(columns, -1)
        curvature = 0.5 * (curvature + curvature.mT)
        if keep:
            return loss, slope, curvature
        return loss.detach(), slope.detach(), curvature.detach()

    # -- private ----------------------------------------------------------------------------------

    def _gradient(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Of Σ_t log p̂(D_t | ψ) in θ0, log scales and φ, `[s, ·]` each."""
        points, inner = block.points, block.inner
        with torch.enable_grad():
            loc, log_scale, phi = leaves = [
                t.detach().requires_grad_() for t in (points.loc, points.log_scale, points.shared)
            ]
            z = inner.z.detach().requires_grad_()
            moved = Points(loc, log_scale, phi, points.groups)
            scale = moved.scale[:, None]
            theta = moved.loc[:, None] + scale * z
            shared = moved.shared[:, None].expand(*z.shape[:-1], -1)
            loss, slope, curvature = self.derivatives(block.part, theta, shared, keep=True)
            # log det B, with the derivative tr(B⁻¹ dB): root and folds need none of their own.
            inverse = torch.cholesky_inverse(inner.root)
            volume = 0.5 * (inverse * whitened(curvature, scale)).sum((-2, -1))
            first = torch.autograd.grad(
                -volume.sum(), [z, *leaves], retain_graph=True, materialize_grads=True
            )
            pull = torch.cholesky_solve(first[0][..., None], inner.root)[..., 0]
            rest = -loss - (pull * (scale * slope + z)).sum(-1)
            second = torch.autograd.grad(rest.sum(), leaves, materialize_grads=True)
        self.evaluations += 4 * z.shape[0] * z.shape[1] * (1 + self.density.dim)
        a, b, c = (x + y for x, y in zip(first[1:], second, strict=True))
        return a, b, c

    def _parts(self, each: int) -> list[parts.Part]:
        """All tasks by their length; in one, where padding is cheaper than calls."""
        if self.density.joint or each * self.tasks.mask.numel() <= _SMALL:
            index = torch.arange(len(self.tasks), device=self.tasks.mask.device)
            return [parts.Part(self.tasks, index, slice(None))]
        if self._buckets is None:
            self._buckets = parts.by_length(self.tasks)
        return self._buckets

    def _numbers_per_row(self, points: Points) -> int:
        if not self._numbers:
            shape = (1, len(self.tasks), -1)
            theta = points.loc[:1, None].expand(*shape)
            shared = points.shared[:1, None].expand(*shape)
            self._numbers = parts.numbers_per_row(self.density, theta, self.tasks, shared)
        return self._numbers


@dataclass(frozen=True, eq=False)
class _State:
    """Where the Newton iteration stands, and its next step: see `Inner`."""

    z: Tensor
    value: Tensor
    slope: Tensor
    curvature: Tensor
    root: Tensor
    step: Tensor
    decrement: Tensor
    indefinite: Tensor

    @classmethod
    def at(cls, marginal: Marginal, part: parts.Part, points: Points, z: Tensor) -> _State:
        scale = points.scale[:, None]
        shared = points.shared[:, None].expand(*z.shape[:-1], -1)
        theta = points.loc[:, None] + scale * z
        loss, slope, curvature = marginal.derivatives(part, theta, shared)
        gradient, matrix = scale * slope + z, whitened(curvature, scale)
        finite = loss.isfinite() & gradient.isfinite().all(-1) & matrix.isfinite().all(-1).all(-1)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        matrix = torch.where(finite[..., None, None], matrix, eye)
        root, failed = torch.linalg.cholesky_ex(matrix)
        indefinite = failed > 0
        if bool(indefinite.any()):
            root = root.clone()
            root[indefinite] = _folded(matrix[indefinite])
        step = -torch.cholesky_solve(gradient[..., None], root)[..., 0]
        decrement = (-(step * gradient).sum(-1)).clamp(min=0).sqrt()
        nothing = torch.where(finite, decrement, torch.nan)
        value = torch.where(finite, loss + 0.5 * z.square().sum(-1), torch.nan)
        return cls(z, value, slope, curvature, root, step, nothing, indefinite)

    def where(self, good: Tensor, new: _State) -> _State:
        """`new` where it is good."""
        if bool(good.all()):
            return new

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(good.reshape(good.shape + (1,) * (a.dim() - 2)), b, a)

        return _State(*(pick(getattr(self, n), getattr(new, n)) for n in _FIELDS))


_FIELDS = ("z", "value", "slope", "curvature", "root", "step", "decrement", "indefinite")


def _no_less_than_flat(matrix: Tensor) -> Tensor:
    """Its negative eigenvalues as 0."""
    values, vectors = torch.linalg.eigh(matrix.nan_to_num())
    return (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT


def whitened(curvature: Tensor, scale: Tensor) -> Tensor:
    """I + S H S for H `[..., D, D]` and the diagonal of S `[..., D]`."""
    eye = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    return eye + scale[..., :, None] * curvature * scale[..., None, :]


def _folded(matrix: Tensor) -> Tensor:
    """Cholesky factor of |B|, its eigenvalues not below a thousandth of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    size = values.abs()
    size = size.clamp(min=1e-3 * size.amax(-1, keepdim=True))
    return torch.linalg.cholesky_ex((vectors * size[..., None, :]) @ vectors.mT).L


def _backwards(root: Tensor, u: Tensor) -> Tensor:
    """L⁻ᵀu, `[..., s, t, D]`."""
    right = u.reshape(-1, *u.shape[-3:]).permute(1, 2, 3, 0)
    white = torch.linalg.solve_triangular(root.mT, right, upper=True)
    return white.permute(3, 0, 1, 2).reshape(u.shape)


def derivative(of: Tensor, at: Tensor, *, keep: bool = True) -> Tensor:
    """d of / d at, with a graph; 0 where there is no way."""
    if not of.requires_grad:
        return torch.zeros_like(at)
    found = torch.autograd.grad(
        of, at, create_graph=True, retain_graph=True, allow_unused=True, materialize_grads=True
    )[0]
    return found
