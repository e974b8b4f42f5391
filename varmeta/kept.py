"""Kept: a strategy's posteriors and scores on disk, which no kill makes a comparison repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from varmeta.digest import digest
from varmeta.files import BrokenFile, load
from varmeta.files import packed as as_file
from varmeta.inference.fitted import Fit
from varmeta.models.density import Density
from varmeta.posterior import Delta, Draws, Gaussian, TaskPosterior
from varmeta.runs import RunFolder
from varmeta.scores import Score

PARTS = ("posteriors", "gap", "scores")
_KINDS = {cls.__name__: cls for cls in (Delta, Gaussian, Draws, Score)}
_Value = TypeVar("_Value")


class Kept:
    """What was computed from one fit, each part in `states/NAME.PART.pt` of a run's folder.

    A part counts for the very state that it was computed from alone, and is computed again where
    its file is missing or cannot be read. The files hold tensors, numbers and texts, and are loaded
    with `weights_only=True`.

    Args:
        run: the folder; None to keep nothing.
        name: the strategy's.
        fit: its run.
    """

    def __init__(self, run: RunFolder | None, name: str, fit: Fit) -> None:
        self._run, self._name, self._density = run, name, fit.density
        self._state = digest(fit.state.state_dict()) if run is not None else ""

    def once(self, part: str, make: Callable[[], _Value]) -> _Value:
        """What `make` returned when it was first called for this part, or returns now.

        Args:
            part: one of `PARTS`.
            make: returns task posteriors, scores, tensors, numbers and texts, in containers; with a
                posterior of another kind than varmeta's, nothing is kept.
        """
        if self._run is None:
            return make()
        file = part_file(self._run, self._name, part)
        found = self._load(self._run.folder / file)
        if found is not None:
            value: _Value = _unpacked(found, self._density)
            return value
        value = make()
        try:
            packed = _packed(value)
        except TypeError:
            return value
        self._run.write(file, as_file({"state": self._state, "value": packed}))
        return value

    def _load(self, path: Path) -> Any:
        if not path.exists():
            return None
        try:
            saved = load(path, {"state": str})
        except BrokenFile:  # its content can be computed again
            return None
        return saved["value"] if saved["state"] == self._state else None


def part_file(run: RunFolder, name: str, part: str) -> str:
    """A part's file, from the run's folder."""
    return f"states/{run.file_name(name)}.{part}.pt"


def _packed(value: Any) -> Any:
    """As plain containers of tensors, numbers and texts.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(value, (Tensor, str, int, type(None))):
        return value
    if isinstance(value, float):
        return float(value)  # NumPy's own kind would not load
    if isinstance(value, (list, tuple)):
        return [_packed(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _packed(item) for key, item in value.items()}
    if type(value) not in _KINDS.values():
        raise TypeError(type(value).__name__)
    named = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "density"}
    return {"class": type(value).__name__, "fields": _packed(named)}


def _unpacked(value: Any, density: Density) -> Any:
    if isinstance(value, list):
        return tuple(_unpacked(item, density) for item in value)
    if not isinstance(value, dict):
        return value
    if value.keys() != {"class", "fields"}:
        return {key: _unpacked(item, density) for key, item in value.items()}
    cls: Any = _KINDS[value["class"]]
    given = _unpacked(value["fields"], density)
    return cls(density=density, **given) if issubclass(cls, TaskPosterior) else cls(**given)
