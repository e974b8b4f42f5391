"""digest: a short hash of any Python object, the same in every process; functions by their code."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from varmeta.own_code import LIBRARIES, OURS

LENGTH = 12  # hexadecimal digits: two of a million objects are alike by chance once in 500 cases
_DEEPEST = 100  # objects within objects; what lies deeper, or behind so many, counts by its type
_MOST = 1_000_000
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented))
_CACHED = (cached_property, lazy_property)
_NOTED = {"_pyro_context", "_inv", "_cached_x_y"}  # by PyTorch and Pyro, in modules and transforms
_MOVING = (
    Iterator,
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
)  # as they are used
_SETTING = ("STORE_GLOBAL", "STORE_DEREF")
_HAS_DOCSTRING = 0x4000000  # a flag of code objects since Python 3.13
_NO_CLASS_CONTENT = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "_abc_impl",
}


def digest(*things: Any) -> str:
    """A hash of these objects, equal in another process for equal ones, whatever its addresses.

    Numbers, texts, containers, tensors and arrays count by their values; dictionaries and sets
    without their order; other objects by their class and what they would be pickled as, without
    attributes that are cached. A function counts by what it does: its bytecode (comments, names of
    variables and the line it stands in do not), defaults, closure and the globals that it reads;
    code of a library without these globals. Nothing is called but `__reduce_ex__`; no random
    number is drawn.
    """
    walk = _Walk()
    return _hash("digest", *map(walk, things)).hex()[:LENGTH]


def digests_of(thing: Any, *, contents: bool = True) -> dict[str, str]:
    """Of a function or another callable, a hash of each part that a user has a name for.

    Its code under "", and by its name whatever else it reads: globals, variables around it,
    defaults; the fields of a dataclass; of another object (a module, a method's `self`) its
    `attributes`, in one. Without what it sets itself, as `global count`.

    Args:
        thing: the callable.
        contents: with what is in the lists, dictionaries and other objects that it reads, which it
            may change as it runs; else they count by their class.
    """
    if isinstance(thing, types.MethodType):
        owner = digests_of(thing.__self__, contents=contents)
        found = digests_of(thing.__func__, contents=contents)
        return owner | found | {"": digest(owner[""], found[""])}
    walk = _Walk(contents=contents)
    return {name: walk(part).hex()[:LENGTH] for name, part in _named_parts(thing)}


def digest_of_class(cls: type) -> str:
    """Of a class's own code and its bases', without any value that it reads."""
    return digest([_methods(base) for base in cls.__mro__])


def unseen(thing: Any) -> str | None:
    """The first callable in it whose code is not to be had (of a user's compiled module), or None.

    Two of these may be different and have one digest.
    """
    walk = _Walk()
    walk(thing)
    return walk.unseen[0] if walk.unseen else None


class _Walk:
    """One walk through objects: each is hashed once, and one within itself by how far up it is."""

    def __init__(self, around: _Walk | None = None, *, contents: bool = True) -> None:
        self.contents: bool = around.contents if around else contents
        self.open: dict[int, int] = dict(around.open) if around else {}
        self.done: dict[int, bytes] = {}
        self.kept: list[Any] = around.kept if around else []  # alive, so that no two have one id
        self.unseen: list[str] = around.unseen if around else []

    def __call__(self, thing: Any) -> bytes:
        if type(thing) in _PLAIN:
            return _hash(type(thing).__name__, _written(thing))
        key = id(thing)
        if key in self.done:
            return self.done[key]
        if key in self.open:
            return _hash("around", str(len(self.open) - self.open[key]).encode())
        if len(self.open) > _DEEPEST or len(self.kept) > _MOST:
            return _hash("more", _name(type(thing)).encode())
        self.open[key] = len(self.open)
        self.kept.append(thing)
        self.done[key] = found = self._of(thing)
        del self.open[key]
        return found

    def _of(self, thing: Any) -> bytes:
        if isinstance(thing, Tensor):
            return _hash(
                "tensor",
                str(thing.dtype).encode(),
                repr(tuple(thing.shape)).encode(),
                *_bytes(thing),
            )
        if isinstance(thing, (np.ndarray, np.generic)):
            return self._array(np.asarray(thing))
        if not self.contents and isinstance(thing, (set, dict, list)):
            return self(type(thing))
        if isinstance(thing, (set, frozenset)):
            return _hash(_name(type(thing)), *sorted(map(self._apart, thing)))
        if type(thing) in (dict, types.MappingProxyType):
            return self._mapping(thing)
        if type(thing) in (list, tuple):
            if all(type(item) in _PLAIN for item in thing):
                return _hash(type(thing).__name__, _written(thing))
            return _hash(type(thing).__name__, *map(self, thing))
        if isinstance(thing, types.CodeType):
            return self._code(thing)
        if isinstance(thing, types.FunctionType):
            return self._mapping(dict(_function_parts(thing)))
        if isinstance(thing, type):
            return self._class(thing)
        if isinstance(thing, types.ModuleType):
            return _hash("module", thing.__name__.encode())
        if isinstance(thing, types.MethodType):
            return _hash("method", self(thing.__func__), self(thing.__self__))
        if isinstance(thing, (staticmethod, classmethod)):
            return _hash(type(thing).__name__, self(thing.__func__))
        if isinstance(thing, property):
            return _hash("property", *map(self, (thing.fget, thing.fset, thing.fdel)))
        if callable(thing) and isinstance(getattr(thing, "__wrapped__", None), types.FunctionType):
            return _hash("wrapped", self(thing.__wrapped__))  # `lru_cache`, `jit`
        if isinstance(thing, _MOVING):
            return _hash("name", _name(type(thing)).encode())
        if isinstance(thing, partial):
            given = self(thing.args), self._mapping(thing.keywords)
            return _hash("partial", self(thing.func), *given)
        if isinstance(thing, torch.distributions.Distribution):
            return _hash("law", self(type(thing)), self._mapping(_law_parts(thing)))
        if isinstance(thing, types.BuiltinFunctionType):
            owner = thing.__self__
            inside = None if isinstance(owner, (types.ModuleType, type)) else owner
            return _hash("builtin", _name(thing).encode(), self(inside))
        return self._object(thing)

    def _apart(self, thing: Any) -> bytes:
        """As if it were met first: what has no order has no first."""
        return self(thing) if type(thing) in _PLAIN else _Walk(self)(thing)

    def _array(self, array: np.ndarray) -> bytes:
        kind = repr((array.dtype.str, array.dtype.names, array.shape)).encode()
        if array.dtype.hasobject:
            return _hash("array", kind, self(tuple(array.flat)))
        return _hash("array", kind, np.ascontiguousarray(array).data)

    def _mapping(self, mapping: Mapping[Any, Any]) -> bytes:
        if all(type(part) in _PLAIN for pair in mapping.items() for part in pair):
            return _hash("plain mapping", *sorted(map(_written, mapping.items())))
        pairs = sorted(((self._apart(key), value) for key, value in mapping.items()), key=_first)
        return _hash("mapping", *(part for key, value in pairs for part in (key, self(value))))

    def _code(self, code: types.CodeType) -> bytes:
        """Not the names of its variables, nor its own, its file and lines."""
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        constants = list(code.co_consts)
        return _hash(
            "code",
            repr((*shape, code.co_flags & ~_HAS_DOCSTRING, code.co_names)).encode(),
            code.co_code,
            code.co_exceptiontable,
            *map(self, constants),
        )

    def _class(self, cls: type) -> bytes:
        bases = [self(base) for base in cls.__bases__]
        if _is_library(_file_of(cls)):
            return _hash("class", _name(cls).encode(), *bases)
        return _hash("class", *bases, self._mapping(_class_parts(cls)))

    def _object(self, thing: Any) -> bytes:
        reduced = _reduced(thing)
        if reduced is None and callable(thing) and not _is_library(_file_of(thing)):
            self.unseen.append(_name(thing))
        if reduced is None or isinstance(reduced, str):  # a lock, a file; or known by its name
            return _hash("name", _name(thing).encode(), str(reduced).encode())
        if not self.contents:
            return self(type(thing))
        return _hash("object", self(type(thing)), self(reduced))


def _hash(kind: str, *parts: bytes | memoryview) -> bytes:
    """Of parts with their lengths, so that no two lists of parts look alike."""
    found = sha256()
    for part in (kind.encode(), *parts):
        found.update(b"%d:" % memoryview(part).nbytes)
        found.update(part)
    return found.digest()


def _first(pair: tuple[bytes, Any]) -> bytes:
    return pair[0]


def _bytes(tensor: Tensor) -> list[memoryview]:
    """A tensor's values; none where it holds none."""
    dense = tensor.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.device.type == "meta" or not dense.numel():
        return []
    plain = dense.resolve_conj().resolve_neg().cpu().flatten()
    if plain.stride() != (1,):  # also of one value, which counts as contiguous whatever its stride
        plain = plain.clone(memory_format=torch.contiguous_format)
    return [plain.view(torch.uint8).numpy().data]


def _written(thing: Any) -> bytes:
    return repr(thing).encode("utf-8", "backslashreplace")


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


# -- whose code ------------------------------------------------------------------------------------


def _is_library(file: str | None) -> bool:
    return file is not None and file.startswith((OURS, "<frozen", *LIBRARIES))


def _file_of(thing: Any) -> str | None:
    """The file of the module that defines it; None for a notebook's and one that is gone."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    return None if module is None else _file_of_module(module)


def _file_of_module(module: types.ModuleType) -> str | None:
    if module.__name__ == "__main__":
        return None
    folders = list(getattr(module, "__path__", ()))  # of a package without a file
    return getattr(module, "__file__", None) or (folders or [f"<frozen {module.__name__}>"])[0]


# -- what there is in an object --------------------------------------------------------------------


def _named_parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """Of a callable: its code under "", then what else it reads, by name."""
    if isinstance(thing, types.FunctionType):
        yield from _function_parts(thing)
        return
    yield "", thing if isinstance(thing, type) else type(thing)
    if isinstance(thing, type):
        return
    reduced = _reduced(thing)
    if is_dataclass(thing) and isinstance(reduced, tuple) and isinstance(reduced[2], dict):
        yield from reduced[2].items()  # its fields
    else:
        yield "attributes", reduced


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    if function.__doc__ is not None and code.co_consts[:1] == (function.__doc__,):
        code = code.replace(co_consts=(None, *code.co_consts[1:]))
    yield "", code
    set_here = {step.argval for step in _steps(code) if step.opname in _SETTING}
    if not _is_library(code.co_filename):
        read = _globals_read(code, function.__globals__)
        yield from ((name, value) for name, value in read.items() if name not in set_here)
    arguments = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name in set_here:
            continue
        try:
            yield name, cell.cell_contents
        except ValueError:  # empty
            yield name, "nothing yet"


def _globals_read(code: types.CodeType, namespace: dict[str, Any]) -> dict[str, Any]:
    """By name, also within a module of the user's: `SCALE`, `helpers.scale`."""
    found: dict[str, Any] = {}
    name, inside = "", None  # a module of the user's, whose attribute may be read next
    for step in _steps(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
            name = step.argval
            given = sys.modules if step.opname == "IMPORT_NAME" else namespace
            inside = None
            if name in given:
                found[name] = inside = given[name]
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") and inside is not None:
            own = isinstance(inside, types.ModuleType) and not _is_library(_file_of_module(inside))
            if own and hasattr(inside, step.argval):
                value = getattr(inside, step.argval)
                found[f"{name}.{step.argval}"] = value
                if step.opname != "IMPORT_FROM":  # of which several may follow
                    name, inside = f"{name}.{step.argval}", value
            else:
                inside = None
    return found


def _steps(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Of a function, then of the functions within it."""
    yield from dis.get_instructions(code)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _steps(part)


def _class_parts(cls: type) -> dict[str, Any]:
    """What is written in a class: methods and attributes, not what Python adds."""
    functions = (types.FunctionType, staticmethod, classmethod, property)
    return {
        name: part
        for name, part in vars(cls).items()
        if isinstance(part, functions)
        or not (name in _NO_CLASS_CONTENT or (name.startswith("__") and name.endswith("__")))
    }


def _methods(cls: type) -> Any:
    """The code of a class of the user's, the name of another."""
    if _is_library(_file_of(cls)):
        return _name(cls)
    functions = {
        name: getattr(part, "fget", None) or getattr(part, "__func__", part)
        for name, part in _class_parts(cls).items()
    }
    return {name: part.__code__ for name, part in functions.items() if hasattr(part, "__code__")}


def _reduced(thing: Any) -> Any:
    """What it would be pickled as: a name, `(maker, arguments, state, ...)`, or None."""
    if isinstance(thing, torch.nn.Module):
        return None, (), _uncached(thing, {**vars(thing)})
    try:
        reduced = thing.__reduce_ex__(2)
    except Exception:  # whatever a class of the user's says to being pickled
        return (None, (), _uncached(thing, vars(thing))) if hasattr(thing, "__dict__") else None
    if isinstance(reduced, str):
        return reduced
    maker, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if isinstance(state, dict):
        state = _uncached(thing, state)
    return maker, arguments, state, _listed(items), _listed(pairs)


def _listed(items: Iterable[Any] | None) -> list[Any]:
    return [] if items is None else list(items)


def _uncached(thing: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was computed when it was first asked for, or noted when it was last used."""
    noted = _NOTED - {"_inv"} if type(thing).__name__ == "_InverseTransform" else _NOTED
    return {
        name: value
        for name, value in state.items()
        if not (isinstance(getattr(type(thing), name, None), _CACHED) or name in noted)
    }


def _law_parts(law: Any) -> dict[str, Any]:
    """Its parameters, whichever of them it was given: `logits` are cached where `probs` were."""
    state = _uncached(law, vars(law))
    state.pop("_validate_args", None)
    for name in law.arg_constraints:
        try:
            state[name] = getattr(law, name)
        except (AttributeError, NotImplementedError):
            continue
    return state
