"""The strategies of the command line by name, and their settings from the shell or a TOML file."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from varmeta.inference.abml import ABML
from varmeta.inference.amortised import AmortisedVariational, LaplaceEvidence
from varmeta.inference.base import Strategy
from varmeta.inference.estimators import Score
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.maml import FOMAML, MAML, MetaSGD, Reptile
from varmeta.inference.nested import NestedLaplace
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import CompletePooling, NoPooling
from varmeta.inference.resets import Reset
from varmeta.inference.sigma import SigmaIMAML, SigmaMAML, SigmaReptile
from varmeta.inference.stochastic import Stochastic
from varmeta.inference.svi import PyroSVI

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "imaml": IMAML,
    "maml": MAML,
    "fomaml": FOMAML,
    "meta-sgd": MetaSGD,
    "reptile": Reptile,
    "sigma-imaml": SigmaIMAML,
    "sigma-maml": SigmaMAML,
    "sigma-reptile": SigmaReptile,
    "amortised": AmortisedVariational,
    "laplace-evidence": LaplaceEvidence,
    "abml": ABML,
    "joint": JointVariational,
    "joint-reset": lambda: JointVariational(resets=Reset(250)),
    "joint-delta": lambda: JointVariational(q="delta"),
    "joint-full": lambda: JointVariational(q="full"),
    "stochastic": Stochastic,
    "stochastic-score": lambda: Stochastic(estimator=Score(), particles=8),
    "nested-laplace": NestedLaplace,
    "marginal-nuts": lambda: NestedLaplace(sampler="nuts"),
    "nuts": PyroNUTS,
    "svi": PyroSVI,
    "no-pooling": NoPooling,
    "complete-pooling": CompletePooling,
}
DEFAULT = "nested-laplace,laplace-evidence,joint,imaml,no-pooling,complete-pooling"
_BASE = "strategy"  # the key of a TOML table that names the strategy under a name of its own


@dataclass
class Changes:
    """What is to be set in a strategy, or in a part of it.

    Attributes:
        value: the whole part anew, if it is set.
        source: where that was said, for errors.
        parts: changes of its fields.
    """

    value: Any = None
    source: str = ""
    parts: dict[str, Changes] = field(default_factory=dict)

    def at(self, path: Sequence[str]) -> Changes:
        """The changes of the part at this path, made if there are none yet."""
        found = self
        for name in path:
            found = found.parts.setdefault(name, Changes())
        return found


def choose(
    names: Sequence[str],
    *,
    steps: int | None = None,
    tolerance: float | None = None,
    settings: Sequence[str] = (),
    config: Path | None = None,
) -> dict[str, Strategy]:
    """Strategies by their name on the command line, set up.

    What is said of one strategy outweighs what is said of all: `settings`, then `config`, then
    `steps` and `tolerance`.

    Args:
        names: of `STRATEGIES`, or of tables in `config`; tables with a name of their own run too.
        steps: upper limit, for every strategy with that field.
        tolerance: of what is learned, for every strategy with that field.
        settings: `NAME.FIELD=VALUE` each.
        config: a TOML file with a table for each strategy.

    Raises:
        ValueError: an unknown strategy or field, or a value that does not fit; with the choices.
    """
    tables = {} if config is None else _read(config)
    own = {name: str(table.pop(_BASE)) for name, table in tables.items() if _BASE in table}
    made: dict[str, Strategy] = {}
    for name in [*names, *(n for n in own if n not in names)]:
        if name in made:
            raise ValueError(
                f"strategies: {name!r} is named twice; a second one needs its own name"
            )
        made[name] = _default(name, own)
    if not made:
        raise ValueError("strategies: there are none; name at least one")
    changes = {name: Changes() for name in made}
    for what, number, least in (("steps", steps, 1), ("tolerance", tolerance, 0)):
        if number is None:
            continue
        if not (number >= least and number > 0):
            raise ValueError(f"--{what} must be positive, got {number:g}")
        able = [name for name, strategy in made.items() if what in _fields(strategy)]
        if not able:
            raise ValueError(f"--{what} fits none of {', '.join(made)}: none of them has {what}")
        for name in able:
            _put(changes[name].at([what]), number, f"--{what} {number}")
    for name, table in tables.items():
        _require(name, made, f"--config: table [{name}]")
        for path, value in _leaves(table):
            place = f"--config: {'.'.join([name, *path])}"
            value = _parsed(value, place) if isinstance(value, str) else value
            _put(changes[name].at(path), value, place)
    for text in settings:
        key, equals, value = text.partition("=")
        name, dot, rest = key.strip().partition(".")
        if not (equals and dot and rest):
            raise ValueError(f"--set {text}: wanted NAME.FIELD=VALUE, such as joint.q=full")
        _require(name, made, f"--set {text}")
        value = _parsed(value.strip(), f"--set {text}")
        _put(changes[name].at(rest.split(".")), value, f"--set {text}")
    return {name: _changed(strategy, changes[name], name) for name, strategy in made.items()}


def table_names(chosen: Mapping[str, Strategy]) -> dict[str, Strategy]:
    """The same strategies by the names that they have in tables and files.

    A strategy's own; that of the command line where it is of the user's making, or where two
    strategies have the same.
    """
    own = [strategy.name for strategy in chosen.values()]
    free = {name for name in own if own.count(name) == 1} - set(chosen)
    return {
        strategy.name if name in STRATEGIES and strategy.name in free else name: strategy
        for name, strategy in chosen.items()
    }


def described(part: Any) -> str:
    """As one would write it: the limit of steps, and what differs from the defaults."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return getattr(part, "__name__", None) or repr(part)
    shown = []
    for f in dataclasses.fields(part):
        value, default = getattr(part, f.name), f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if f.init and (f.name == "steps" or repr(value) != repr(default)):
            shown.append(f"{f.name}={described(value)}")
    return f"{type(part).__name__}({', '.join(shown)})"


# -- reading ---------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"--config: no file {str(path)!r}; give a TOML file that is there")
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is no TOML file: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(
                f"--config: {name!r} in {path} stands in no table; write it below the name of its "
                "strategy, as [joint]"
            )
    return tables


def _default(name: str, own: Mapping[str, str]) -> Strategy:
    choices = ", ".join(STRATEGIES)
    if name in own and name in STRATEGIES:
        raise ValueError(
            f"--config: [{name}] has the key 'strategy' and the name of a strategy that there is; "
            "give it a name of its own"
        )
    if name not in own and name not in STRATEGIES:
        raise ValueError(f"strategies: no strategy {name!r}; there are: {choices}")
    base = own.get(name, name)
    if base not in STRATEGIES:
        raise ValueError(f"--config: [{name}] has strategy = {base!r}; there are: {choices}")
    return STRATEGIES[base]()


def _require(name: str, made: Mapping[str, Strategy], where: str) -> None:
    if name in made:
        return
    if name in STRATEGIES:
        raise ValueError(
            f"{where}: {name!r} is not among the strategies of this run, {', '.join(made)}; add it "
            "to --strategies"
        )
    choices = ", ".join(dict.fromkeys([*made, *STRATEGIES]))
    remedy = ". One of your own making needs the key strategy, such as strategy = 'joint'"
    raise ValueError(
        f"{where}: no strategy {name!r}; there are: {choices}" + remedy * ("[" in where)
    )


def _leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _put(changes: Changes, value: Any, source: str) -> None:
    changes.value, changes.source = value, source
    changes.parts.clear()  # said earlier, of what is replaced here


def _parsed(text: str, source: str) -> Any:
    """A Python literal, `Reset(250)` and the like from varmeta, or else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        maker, given, named = _call(node)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    try:
        return maker(*given, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def _call(node: ast.Call) -> tuple[type, list[Any], dict[str, Any]]:
    """One of varmeta's public dataclasses and its arguments, which may be such calls too."""
    maker = _parts().get(node.func.id) if isinstance(node.func, ast.Name) else None
    if maker is None or any(k.arg is None for k in node.keywords):
        raise ValueError(ast.unparse(node))

    def value(argument: ast.expr) -> Any:
        if not isinstance(argument, ast.Call):
            return ast.literal_eval(argument)
        inner, given, named = _call(argument)
        return inner(*given, **named)

    return maker, [value(a) for a in node.args], {str(k.arg): value(k.value) for k in node.keywords}


def _parts() -> dict[str, type]:
    """Public dataclasses: minimisers, solvers, estimators, algorithms."""
    import varmeta

    found = ((name, getattr(varmeta, name)) for name in varmeta.__all__)
    return {n: v for n, v in found if isinstance(v, type) and dataclasses.is_dataclass(v)}


# -- setting ---------------------------------------------------------------------------------------


def _fields(part: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(part) if f.init]


def _changed(part: Any, changes: Changes, place: str) -> Any:
    """The part with its changes, all of one level at once: they may depend on each other."""
    hints, new = get_type_hints(type(part)), {}
    for name, change in changes.parts.items():
        source = change.source or next(c.source for c in _all(change) if c.source)
        if name not in _fields(part):
            raise ValueError(
                f"{source}: {place} ({type(part).__name__}) has no field {name!r}; there are: "
                f"{', '.join(_fields(part))}"
            )
        value = getattr(part, name)
        if change.source:
            value = _fitting(change.value, hints[name], f"{place}.{name}", source)
        if change.parts:
            if not dataclasses.is_dataclass(value) or isinstance(value, type):
                raise ValueError(
                    f"{source}: {place}.{name} is {described(value)} and has no fields of its own"
                )
            value = _changed(value, Changes(parts=change.parts), f"{place}.{name}")
        new[name] = value
    try:
        return dataclasses.replace(part, **new) if new else part
    except (TypeError, ValueError) as error:
        said = "; ".join(c.source for c in _all(changes) if c.source)
        raise ValueError(f"{said}: {error}") from None


def _all(changes: Changes) -> Iterator[Changes]:
    for change in changes.parts.values():
        yield change
        yield from _all(change)


def _fitting(value: Any, hint: Any, place: str, source: str) -> Any:
    """The value, if it is what the field wants."""
    if isinstance(value, str) and _wants_callable(hint):
        from pyro.infer import autoguide

        value = getattr(autoguide, value, value)
    if not _fits(value, hint):
        raise ValueError(f"{source}: {place} must be {_words(hint)}, got {value!r}")
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if _wants_callable(hint):
        return callable(value)
    try:
        return isinstance(value, get_origin(hint) or hint)
    except TypeError:  # a protocol that cannot be asked
        return not isinstance(value, (str, int, float, type(None)))


def _words(hint: Any) -> str:
    """What a field wants."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(option) for option in get_args(hint))
    plain = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    if hint in plain or hint is type(None):
        return plain.get(hint, "None")
    if _wants_callable(hint):
        return "the name of a guide in pyro.infer.autoguide"
    able = [name for name, part in _parts().items() if _is_kind(part, hint)]
    return f"one of {', '.join(f'{n}(…)' for n in able)}" if able else str(hint)


def _is_kind(part: type, hint: Any) -> bool:
    try:
        return issubclass(part, hint)
    except TypeError:  # a protocol with data members: by its methods
        wanted = [n for n, v in vars(hint).items() if inspect.isfunction(v) and n[0] != "_"]
        return bool(wanted) and all(hasattr(part, name) for name in wanted)


def _wants_callable(hint: Any) -> bool:
    return get_origin(hint) is Callable or hint is Callable
