"""Settings are checked when they are made: a field's annotation says what it may be.

    steps: Count = 1000
    momentum: Annotated[float, Within(0.0, 1.0, above=True)] = 0.5
    kind: Literal["auto", "laplace"] = "auto"

A dataclass that derives from `Checked` refuses everything else with a ValueError. Its own
`__post_init__`, for what several fields say together, begins with `super().__post_init__()`.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Within:
    """A range of numbers; what is not finite lies in none.

    Attributes:
        least: the lower end.
        most: the upper end.
        above: without the lower end.
        below: without the upper end.
        why: what is wrong with a number beyond it, or what to give instead.
    """

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    why: str = ""

    def __contains__(self, value: Any) -> bool:
        if not math.isfinite(value):
            return False
        low = self.least < value if self.above else self.least <= value
        return bool(low and (value < self.most if self.below else value <= self.most))

    def words(self, whole: bool) -> str:
        """The range as it is said after "must be"."""
        if whole:
            if self.most == math.inf:
                return f"a whole number of at least {self.least}"
            return f"a whole number from {self.least} to {self.most}"
        if self.most == math.inf and self.least == 0:
            return "positive and finite" if self.above else "finite and at least 0"
        low = f"{'above' if self.above else 'at least'} {self.least:g}"
        if self.most == math.inf:
            return f"finite and {low}"
        return f"{low} and {'below' if self.below else 'at most'} {self.most:g}"


Count = Annotated[int, Within(1)]
Positive = Annotated[float, Within(0, above=True)]
NotNegative = Annotated[float, Within(0)]
Seed = Annotated[int, Within(0, 2**64 - 1)]


class Checked:
    """Base of dataclasses whose fields are settings.

    Raises:
        ValueError: a field that is not what its annotation says, with what it got and what was
            wanted; for a choice, with the choices and the one that may have been meant.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, hint, options in _hints(kind):
            value = getattr(self, name)
            if not any(_is(value, option) for option in options):
                check(name, value, hint)


def check(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError unless the value of an argument is what a type hint says."""
    options = list(_options(hint))
    if any(_is(value, option) for option in options):
        return
    choices = [c for o in options if get_origin(o) is Literal for c in get_args(o)]
    words = [_words(o) for o in options if get_origin(o) is not Literal and o is not type(None)]
    if choices:
        words.insert(0, "one of " + ", ".join(map(repr, choices)))
    if type(None) in options:
        words.append("None")
    said = f"{name} must be {' or '.join(words)}, got {_short(value)}"
    meant = nearest(value, choices)
    if meant:
        raise ValueError(f"{said}{meant}")
    whys = [m.why for o in options for m in _ranges(o) if m.why]
    raise ValueError("; ".join([said, *whys]))


def nearest(value: Any, choices: Iterable[str]) -> str:
    """The choice that a mistyped value is near to, as the end of a message; empty if none is."""
    near = get_close_matches(value, list(choices), 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


@lru_cache
def _hints(kind: Any) -> tuple[tuple[str, Any, tuple[Any, ...]], ...]:
    """The fields of a class of settings, with what they may be, and each of several such things."""
    if not is_dataclass(kind):
        return ()
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # a user's class, with names that are known to its function alone
        return ()
    return tuple((f.name, hints[f.name], tuple(_options(hints[f.name]))) for f in fields(kind))


def _options(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            yield from _options(option)
    else:
        yield hint


def _ranges(hint: Any) -> list[Within]:
    found = getattr(hint, "__metadata__", ())
    return [part for part in found if isinstance(part, Within)]


def _is(value: Any, hint: Any) -> bool:
    if hasattr(hint, "__metadata__"):  # of Annotated
        return _is(value, hint.__origin__) and all(value in part for part in _ranges(hint))
    if hint is Any:
        return True
    if hint is type(None) or hint is None:
        return value is None
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real)
        return number and not isinstance(value, bool) and math.isfinite(value)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is tuple:
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(parts)
            and all(_is(v, part) for v, part in zip(value, parts, strict=True))
        )
    if origin is Sequence:
        whole = hasattr(value, "__len__") and not isinstance(value, str)
        return whole and all(_is(v, parts[0]) for v in value)
    if not isinstance(origin or hint, type):
        return True
    if getattr(hint, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, n) for n in _methods(hint))
    if origin is not None:  # a callable, a mapping: by what it is of no more is known
        return isinstance(value, origin)
    return isinstance(value, hint)


@lru_cache
def _methods(protocol: Any) -> list[str]:
    return [n for n, v in vars(protocol).items() if inspect.isfunction(v) and n[0] != "_"]


def _words(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        (kind, *_), ranges = get_args(hint), _ranges(hint)
        return " and ".join(part.words(kind is int) for part in ranges) or _words(kind)
    if get_origin(hint) is tuple:
        return "a pair of numbers, each " + _words(get_args(hint)[0])
    if get_origin(hint) is Sequence:
        return "several numbers, each " + _words(get_args(hint)[0])
    plain = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
    if hint in plain:
        return plain[hint]
    name = getattr(get_origin(hint) or hint, "__name__", str(hint))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def require_kind(argument: str, value: Any, kind: type | tuple[type, ...], remedy: str) -> None:
    """Refuse an argument that is no `kind`, before anything asks it for what only a `kind` has.

    Raises:
        TypeError: with `remedy`, which says how one is made.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        got = _short(value) if isinstance(value, type | str) else f"a {type(value).__name__}"
        wanted = " or ".join(_words(one) for one in kinds)
        raise TypeError(f"{argument} must be {wanted}, got {got}; {remedy}")


def _short(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}; write {value.__name__}()"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
