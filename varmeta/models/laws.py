"""Laws: their parameters, read and replaced, for Gauss–Newton products and draws of one type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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


def _parameters(base: Any) -> dict[str, Tensor]:
    """What the constructor was given: a categorical knows probs and logits and keeps one."""
    kept = {k: vars(base)[k] for k in base.arg_constraints if isinstance(vars(base).get(k), Tensor)}
    if "logits" in kept:
        kept.pop("probs", None)
    return kept
