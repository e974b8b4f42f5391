"""Pickles of what holds a user's own code: a sentence where the standard pickle could not go on."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

# Picklers of Python's own; any other (cloudpickle's, dill's) may know how to pickle a function.
_PLAIN = (pickle.Pickler, pickle._Pickler)


def require_picklable(what: str, value: Any) -> None:
    """To be called from `__getstate__`.

    It says nothing where `value` is copied (`copy.deepcopy` takes functions as they are), or where
    a library is at work that knows more than Python's pickle.

    Raises:
        pickle.PicklingError: the standard pickle is at work, and `value` is beyond it.
    """
    if _others_at_work():
        return
    try:
        pickle.Pickler(_Nowhere()).dump(value)
    except Exception as error:  # lambdas and local functions fail in several ways, locks in others
        name = getattr(value, "__qualname__", None) or type(value).__qualname__
        said = str(error).rstrip(". ")
        raise pickle.PicklingError(
            f"{what} {name!r} cannot be pickled ({said}): define it, and what it uses, at the top "
            "of a module and not within a function, or pickle with cloudpickle"
        ) from error


def _others_at_work() -> bool:
    """Whether it is `copy`, or a pickler that is not Python's own, that asks."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals is vars(copy):
            return True
        pickler = frame.f_locals.get("self")
        if isinstance(pickler, _PLAIN):
            return type(pickler) not in _PLAIN
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)
