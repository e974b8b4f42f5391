"""Derivatives of a task energy as autograd takes them: they are what is recorded.

An energy E(θ; p) maps `[T, D]` and further tensors p to `[T]` nats, row i depending on θ_i alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

EnergyFunction = Callable[..., Tensor]


class NotTwiceDifferentiable(ValueError):
    """An operation of the model has no second derivative."""


def second(grad: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """∇²E v from the graph of ∇E; 0 where the energy is linear."""
    if not grad.requires_grad:
        return torch.zeros_like(v)
    with twice_differentiable():
        out = torch.autograd.grad(grad, leaf, v, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(v) if out is None else out


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Say which operation of the model has no second derivative, where one is taken within.

    Raises:
        NotTwiceDifferentiable: naming it.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0].rstrip(".")
        if "derivative" not in text and "differentiate twice" not in text:
            raise
        raise NotTwiceDifferentiable(
            f"the model is not twice differentiable: {text}. Implicit and unrolled meta-gradients "
            "need second derivatives: write that operation with others, or use a strategy that "
            "needs first ones alone (FOMAML, Reptile, JointVariational)"
        ) from error


def value_and_gradient(function: EnergyFunction) -> Callable[..., list[Tensor]]:
    """(θ, *p) to E and ∇E."""

    def both(theta: Tensor, *parameters: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = function(leaf, *parameters)
            grad = torch.zeros_like(theta)
            if value.requires_grad:
                (grad,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
        return [value.detach(), grad]

    return both


def first_derivatives(
    function: EnergyFunction, wanted: Sequence[bool]
) -> Callable[..., list[Tensor]]:
    """(seed, θ, *p) to E, and the gradient of Σ seed_i E_i in those of θ and p that are wanted."""

    def first(seed: Tensor, *tensors: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            tensors, leaves = _leaves(tensors, wanted)
            value = function(*tensors)
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if value.requires_grad:
                grads = torch.autograd.grad(value, leaves, seed, allow_unused=True)
        return [value.detach(), *_filled(grads, leaves)]

    return first


def pullback_of(function: EnergyFunction, wanted: Sequence[bool]) -> Callable[..., list[Tensor]]:
    """(x, θ, *p) to the gradient of Σ xᵀ∇E in those of θ and p that are wanted."""

    def pullback(x: Tensor, theta: Tensor, *parameters: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            tensors, leaves = _leaves((theta, *parameters), wanted)
            theta = tensors[0] if wanted[0] else tensors[0].requires_grad_()
            value = function(theta, *tensors[1:])
            (grad,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if grad.requires_grad:
                with twice_differentiable():
                    grads = torch.autograd.grad(grad, leaves, x, allow_unused=True)
        return _filled(grads, leaves)

    return pullback


def _leaves(
    tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Fresh leaves for all of them, and those of which a gradient is wanted."""
    fresh = tuple(t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True))
    return fresh, [t for t in fresh if t.requires_grad]


def _filled(grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(t) if g is None else g.detach() for g, t in zip(grads, leaves, strict=True)
    ]
