"""Laws: their parameters, read and replaced, for Gauss–Newton products and draws of one type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.utils import lazy_property

_KEPT = {"_cached_x_y", "_inv", "_validate_args", "_batch_shape", "_event_shape"}  # no numbers


def law_parameters(law: Any) -> list[Tensor]:
    """The floating tensors that a distribution was given as parameters, wrappers looked through.

    Raises:
        ValueError: it has none of its own (a mixture, say).
    """
    base = law
    while "base_dist" in vars(base):
        base = base.base_dist
    values = [v for v in _parameters(base).values() if v.is_floating_point()]
    if not values:
        raise ValueError(
            f"curvature='gauss_newton': an observed {type(base).__name__} has no parameters of its "
            "own to be differentiated in; use curvature='hessian'"
        )
    return values


def law_with(law: Any, values: Iterator[Tensor]) -> Any:
    """The same law with its parameters replaced, in the order of `law_parameters`."""
    if "base_dist" in vars(law):
        law = copy.copy(law)
        law.base_dist = law_with(law.base_dist, values)
        return law
    # Through the constructor: a categorical normalises its logits there, which bends them.
    given = _parameters(law)
    new = {k: next(values) if v.is_floating_point() else v for k, v in given.items()}
    return type(law)(**new, validate_args=False)


def law_in(dtype: torch.dtype, law: Any) -> Any:
    """The same law with parameters, and so draws, of this data type, whatever the default is.

    As it is where it was given no floating tensors of its own (a beta, an LKJ).
    """
    try:
        return law_with(law, iter([value.to(dtype) for value in law_parameters(law)]))
    except (ValueError, TypeError, NotImplementedError):
        return law


def tensors_in(part: Any) -> list[Tensor]:
    """All numbers that a law, a transform or a constraint was made of, as tensors in a fixed order.

    What is computed when it is first asked for is left out.
    """
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, (bool, int, float)):
        return [torch.as_tensor(part)]
    if isinstance(part, (list, tuple)):
        return [tensor for one in part for tensor in tensors_in(one)]
    if not isinstance(part, (Distribution, Transform, Constraint)):
        return []
    kinds = type(part).__mro__
    lazy = {n for n in vars(part) if any(isinstance(vars(k).get(n), lazy_property) for k in kinds)}
    names = [name for name in sorted(vars(part)) if name not in lazy | _KEPT]
    return [tensor for name in names for tensor in tensors_in(vars(part)[name])]


def _parameters(base: Any) -> dict[str, Tensor]:
    """What the constructor was given: a categorical knows probs and logits and keeps one."""
    kept = {k: vars(base)[k] for k in base.arg_constraints if isinstance(vars(base).get(k), Tensor)}
    if "logits" in kept:
        kept.pop("probs", None)
    return kept
