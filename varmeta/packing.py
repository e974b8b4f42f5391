"""Packing: objects of known classes as plain containers, which a file may hold without any code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor


def packed(value: Any, kinds: Mapping[str, type], without: str = "") -> Any:
    """As containers of tensors, numbers and texts, which PyTorch loads with `weights_only`.

    Args:
        value: tensors, numbers, texts and dataclasses of these kinds, in lists and mappings.
        kinds: the dataclasses that there may be, by name, and classes that are values themselves.
        without: a field that is left out.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(value, (Tensor, str, int, type(None))):
        return value
    if isinstance(value, float):
        return float(value)  # NumPy's own kind would not load
    if isinstance(value, (list, tuple)):
        return [packed(item, kinds, without) for item in value]
    if isinstance(value, Mapping):
        return {str(key): packed(item, kinds, without) for key, item in value.items()}
    if isinstance(value, type) and kinds.get(value.__name__) is value:
        return {"class": value.__name__}
    if kinds.get(type(value).__name__) is not type(value):
        raise TypeError(type(value).__name__)
    known: Any = value
    named = {f.name: getattr(known, f.name) for f in fields(known) if f.init and f.name != without}
    return {"class": type(value).__name__, "fields": packed(named, kinds, without)}


def unpacked(
    value: Any,
    kinds: Mapping[str, type],
    make: Callable[..., Any] = lambda kind, given: kind(**given),
) -> Any:
    """What was packed; lists come back as tuples.

    Args:
        value: what `packed` returned.
        kinds: the dataclasses that there may be, by name.
        make: one of a class and its fields.

    Raises:
        KeyError: a class that is none of `kinds`.
    """
    if isinstance(value, (list, tuple)):
        return tuple(unpacked(item, kinds, make) for item in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"class"}:
        return kinds[value["class"]]
    if value.keys() != {"class", "fields"}:
        return {key: unpacked(item, kinds, make) for key, item in value.items()}
    return make(kinds[value["class"]], unpacked(value["fields"], kinds, make))
