"""Energies: what inner minimisers and adjoints see of a task, E_i(θ) and its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varmeta.models.density import Density
from varmeta.models.derivatives import second
from varmeta.models.prior import GaussianPrior, penalty, precision_mv
from varmeta.models.programs import Derivative, Linearised, Product, Programs
from varmeta.tasks import Tasks


class Energy(Protocol):
    """E_i(θ_i) for T tasks, row i depending on θ_i alone; more tensors may stand behind it."""

    def __call__(self, theta: Tensor) -> Tensor:
        """`[T, D]` to `[T]` nats, differentiable as often as the model is."""
        ...

    def gradient(self, theta: Tensor) -> Tensor:
        """∇E `[T, D]`, differentiable once in θ and in whatever E depends on."""
        ...

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """E `[T]` and ∇E `[T, D]`, detached; no graph for second derivatives is built."""
        ...

    def slope(self, theta: Tensor) -> Derivative | None:
        """∇E as what several steps are compiled with, for θ of this shape; None if it is not."""
        ...

    def linearise(self, theta: Tensor, *, gauss_newton: bool = False) -> Linearised:
        """E, ∇E and the product with ∇²E at a fixed θ; ∇E differentiable in what else E has.

        With `gauss_newton` the product is with JᵀHJ, J the derivative of the parameters z of each
        row's law (its mean, its logits) and H the Hessian of −log p(y | z), plus the prior's part.
        """
        ...


@dataclass(frozen=True, eq=False)
class FunctionEnergy:
    """An energy from any function `[T, D]` to `[T]`, by autograd.

    Attributes:
        function: the energies, nats.
        rows: `[T]`, of how many rows each is a sum; None for one.
        unit: `[D]`, what a step's length is measured by; None for nothing.
    """

    function: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    unit: Tensor | None = None

    def __call__(self, theta: Tensor) -> Tensor:
        """See `Energy`.

        Raises:
            ValueError: the function does not return one number for each task.
        """
        value = self.function(theta)
        shape = list(value.shape) if isinstance(value, Tensor) else value
        if shape != [len(theta)]:
            raise ValueError(
                f"energy must return [T] = [{len(theta)}] nats, one for each row of θ, got "
                f"{shape!r}; sum over coordinates with .sum(-1)"
            )
        return value

    def gradient(self, theta: Tensor) -> Tensor:
        """See `Energy`."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = theta if keep and theta.requires_grad else theta.detach().requires_grad_()
            return torch.autograd.grad(self(leaf).sum(), leaf, create_graph=keep)[0]

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `Energy`."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = self(leaf)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def slope(self, theta: Tensor) -> None:
        """Not compiled."""

    def linearise(self, theta: Tensor, *, gauss_newton: bool = False) -> Linearised:
        """See `Energy`.

        Raises:
            ValueError: gauss_newton; a bare function does not say what its outputs are.
        """
        if gauss_newton:
            raise ValueError(
                "curvature='gauss_newton' needs a model: a bare function does not say what its "
                "outputs are. Use curvature='hessian'"
            )
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = self(leaf)
            (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        return Linearised(value.detach(), grad, lambda v: second(grad, leaf, v))


@dataclass(frozen=True, eq=False)
class TaskEnergy:
    """E_i(θ) = f_i(θ) + ½(θ−θ0)ᵀΛ(θ−θ0), nats; f_i alone without a prior.

    Its derivatives are programs (`varmeta.models.programs`), shared by all energies of one density.

    Attributes:
        density: the model; f_i is the sum over the rows of `tasks`.
        tasks: T tasks.
        shared: φ `[P]`.
        prior: N(θ0, Σ), or None.
        around: N(θ0, Σ) that is no part of the energy, for the length of steps alone; `prior` where
            that is given.
    """

    density: Density
    tasks: Tasks
    shared: Tensor
    prior: GaussianPrior | None = None
    around: GaussianPrior | None = None

    def __call__(self, theta: Tensor) -> Tensor:
        """`[..., T, D]` to `[..., T]` nats, differentiable as often as the model is."""
        loss = self.density.negative_log_likelihood(theta, self.tasks, self.shared)
        return loss if self.prior is None else loss + self.prior.penalty(theta)

    def __post_init__(self) -> None:
        self.density.check_data(self.tasks, self.shared)

    def gradient(self, theta: Tensor) -> Tensor:
        """See `Energy`."""
        _, grad = self.value_and_gradient(theta)
        if not torch.is_grad_enabled():
            return grad
        out: Tensor = _Gradient.apply(self._programs, grad, theta, *self._parameters)
        return out

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `Energy`."""
        return self._programs.gradient(theta, self._parameters)

    def slope(self, theta: Tensor) -> Derivative | None:
        """See `Energy`."""
        return self._programs.slope(theta, self._parameters)

    def linearise(self, theta: Tensor, *, gauss_newton: bool = False) -> Linearised:
        """See `Energy`."""
        theta = theta.detach()
        at = self._programs.linearise(theta, self._parameters, gauss_newton=gauss_newton)
        with torch.enable_grad():
            grad: Tensor = _Gradient.apply(self._programs, at.grad, theta, *self._parameters)
        return Linearised(at.value, grad, at.product)

    def loss(self, theta: Tensor) -> Tensor:
        """E `[T]` and its first derivative in θ, prior and φ, all from one program."""
        out: Tensor = _Loss.apply(self._programs, theta, *self._parameters)
        return out

    @cached_property
    def rows(self) -> Tensor:
        """`[T]`, the rows of each task, at least 1."""
        return self.tasks.num_rows.clamp(min=1).to(self.shared.dtype)

    @property
    def unit(self) -> Tensor | None:
        """`[D]`, the prior's standard deviations, by which the length of steps is measured."""
        prior = self.prior or self.around
        if prior is None:
            return None
        if prior.factor is None:
            return prior.scale
        return (prior.scale**2 + prior.factor.square().sum(-1)).sqrt()

    @cached_property
    def _parameters(self) -> list[Tensor]:
        tasks, prior, buckets = self.tasks, self.prior, self.tasks.buckets
        out = [self.shared] if buckets is None else [self.shared, buckets.order, buckets.back]
        for group in (tasks,) if buckets is None else buckets.groups:
            out += [group.mask, *self.density.data(group)]
        if prior is not None:
            out += [prior.loc, prior.log_scale, prior.groups]
            out += [prior.factor] if prior.factor is not None else []
        return out

    @property
    def _programs(self) -> Programs:
        name, buckets = "likelihood" if self.prior is None else "energy", self.tasks.buckets
        count = 1 if buckets is None else len(buckets.groups)
        name = name if count == 1 else f"{name} of {count} lengths"
        energy, curve = partial(_energy, groups=count), partial(_gauss_newton, groups=count)
        return self.density.programs(name, energy, curve)


def as_energy(function: Energy | Callable[[Tensor], Tensor]) -> Energy:
    """An energy as it is, a plain function as an energy."""
    known = hasattr(function, "linearise") and hasattr(function, "gradient")
    return function if known else FunctionEnergy(function)  # type: ignore[return-value]


def _energy(density: Density, groups: int) -> Callable[..., Tensor]:
    width = _width(density)

    def energy(theta: Tensor, shared: Tensor, *tensors: Tensor) -> Tensor:
        parts, back, prior = _taken(theta, tensors, groups, width)
        losses = []
        for some, mask, *data in parts:
            rows = density.rows(some, shared, *data)
            losses.append(-torch.where(mask, rows, 0.0).sum(-1))
        loss = losses[0] if back is None else torch.cat(losses).index_select(0, back)
        if prior:
            loc, log_scale, of, *factor = prior
            loss = loss + penalty(theta, loc, log_scale.exp()[of], *factor)
        return loss

    return energy


def _width(density: Density) -> int:
    """How many tensors a group of tasks has: its mask, and what the model is given."""
    return 4 if density.noisy else 3


def _taken(
    theta: Tensor, tensors: Sequence[Tensor], groups: int, width: int
) -> tuple[list[tuple[Tensor, ...]], Tensor | None, Sequence[Tensor]]:
    """`TaskEnergy._parameters` without φ, taken apart.

    Returns:
        θ, mask and data of each group of tasks of like length; where in them each task stands, None
        if they are one; and the prior's tensors.
    """
    if groups == 1:
        return [(theta, *tensors[:width])], None, tensors[width:]
    order, back, *rest = tensors
    data = [rest[k : k + width] for k in range(0, width * groups, width)]
    some = theta.index_select(0, order).split([len(mask) for mask, *_ in data])
    return [(t, *d) for t, d in zip(some, data, strict=True)], back, rest[width * groups :]


def _gauss_newton(density: Density, groups: int) -> Callable[..., Product]:
    width = _width(density)

    def curve(theta: Tensor, shared: Tensor, *tensors: Tensor) -> Product:
        grad = torch.autograd.grad
        parts, _, prior = _taken(theta, tensors, groups, width)
        moving, leaves, loss = list[Tensor](), list[Tensor](), theta.new_zeros(())
        for some, mask, *data in parts:
            outputs = density.outputs(some, shared, *data)
            moving += [z for z in outputs if z.requires_grad]
            given = [z.detach().requires_grad_(z.requires_grad) for z in outputs]
            rows = density.rows_given(given, some.detach(), shared, *data)
            leaves += [z for z in given if z.requires_grad]
            loss = loss - torch.where(mask, rows, 0.0).sum()
        slopes = grad(loss, leaves, create_graph=True)
        # Jᵀu is linear in u, so that its derivative in u, applied to v, is Jv.
        zeros = [torch.zeros_like(z).requires_grad_() for z in moving]
        (back,) = grad(moving, theta, zeros, create_graph=True)

        def product(v: Tensor) -> Tensor:
            forward = grad(back, zeros, v, retain_graph=True)
            bent = [s for s in slopes if s.requires_grad]
            push = [f for f, s in zip(forward, slopes, strict=True) if s.requires_grad]
            turned = grad(bent, leaves, push, retain_graph=True, materialize_grads=True)
            (out,) = grad(moving, theta, turned, retain_graph=True)
            if prior:
                _, log_scale, of, *factor = prior
                out = out + precision_mv(v, log_scale.exp()[of], *factor)
            return out

        return product

    return curve


class _Gradient(torch.autograd.Function):
    """Attaches to ∇E(θ; p), already computed, its derivative in θ and p."""

    @staticmethod
    def forward(ctx: Any, programs: Programs, grad: Tensor, *tensors: Tensor) -> Tensor:
        ctx.programs = programs
        ctx.save_for_backward(*tensors)
        return grad.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        return None, None, *ctx.programs.pullback(v[0], ctx.saved_tensors, wanted)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, programs: Programs, theta: Tensor, *parameters: Tensor) -> Tensor:
        value, grad = programs.gradient(theta, parameters)
        ctx.programs = programs
        ctx.save_for_backward(grad, theta, *parameters)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seed: Tensor) -> tuple[Tensor | None, ...]:
        grad, *tensors = ctx.saved_tensors
        wanted = [False, *ctx.needs_input_grad[2:]]
        grads: list[Tensor | None] = [None] * len(tensors)
        if any(wanted):
            _, grads = ctx.programs.first(seed[0], tensors, wanted)
        return None, seed[0][:, None] * grad, *grads[1:]
