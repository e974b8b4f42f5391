"""Kept: a strategy's posteriors and scores on disk, which no kill makes a comparison repeat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from varmeta.digest import digest
from varmeta.files import BrokenFile, load
from varmeta.files import packed as as_file
from varmeta.inference.fitted import Fit
from varmeta.models.density import Density
from varmeta.packing import packed, unpacked
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
            plain = _packed(value)
        except TypeError:
            return value
        self._run.write(file, as_file({"state": self._state, "value": plain}))
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
    """As plain containers; a posterior without its density."""
    return packed(value, _KINDS, "density")


def _unpacked(value: Any, density: Density) -> Any:
    def make(kind: Any, given: dict[str, Any]) -> Any:
        return kind(density=density, **given) if issubclass(kind, TaskPosterior) else kind(**given)

    return unpacked(value, _KINDS, make)
