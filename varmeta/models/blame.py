"""Whose error it is: what has nothing to do with a way of running a model is not caught there."""

from __future__ import annotations

import torch

_LIBRARIES = {"builtins", "torch", "functorch", "pyro", "numpy", "sympy", "varmeta"}


def is_own(error: BaseException) -> bool:
    """Whether an error is the machine's (no memory is left) or of a type that the user defined.

    Such an error goes on as it is, where others mean that an operation cannot be recorded,
    compiled or batched, and that the model is to be run in another way.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return type(error).__module__.partition(".")[0] not in _LIBRARIES


def is_unbatched(error: RuntimeError) -> bool:
    """Whether PyTorch says by an error that `vmap` cannot batch an operation."""
    text = str(error)
    return not is_own(error) and ("vmap" in text or "Batching rule" in text)
