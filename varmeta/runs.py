"""RunFolder: the output folder of a comparison, never half-written, never lost by accident."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varmeta.file_names import file_names
from varmeta.fingerprint import differences, in_words

_MANIFEST = "run.json"


class RunFolder:
    """A folder that one comparison writes into.

    `run.json` in it says what the run is, which files it wrote and whether it is finished. A run
    in which a strategy failed is not: under the same settings it goes on with those that failed.

    Args:
        folder: made if it does not exist.
        settings: what identifies the run, by topic (see `varmeta.fingerprint`); a run resumes only
            under the same ones.
        names: of the strategies, each of which has files of its own.
        overwrite: remove the files of the run that is there, finished or not. Files that no run
            wrote are never touched.

    Raises:
        FileExistsError: the folder holds a finished run, an unfinished run of other settings, or
            files but no run.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        names: Iterable[str] = (),
        *,
        overwrite: bool = False,
    ) -> None:
        self.folder = folder
        self._stems = file_names(names)
        self._manifest = {
            "finished": False,
            "settings": json.loads(json.dumps(settings)),
            "files": [],
        }
        found = folder / _MANIFEST
        if found.exists():
            there = json.loads(found.read_text())
            if overwrite:
                for name in there["files"]:
                    _unlink(folder, name)
            elif there["finished"]:
                raise FileExistsError(
                    f"folder {str(folder)!r} holds a finished run; give overwrite=True "
                    "(--overwrite) to replace it, or another folder"
                )
            elif there["settings"] != self._manifest["settings"]:
                raise FileExistsError(
                    f"folder {str(folder)!r} holds an unfinished run with other settings: "
                    f"{_other(there['settings'], settings)}; repeat them to resume it, give "
                    "overwrite=True (--overwrite) to drop it, or another folder"
                )
            else:
                self._manifest["files"] = there["files"]
        elif folder.exists() and any(folder.iterdir()):
            raise FileExistsError(
                f"folder {str(folder)!r} holds files that are no run of varmeta; give an empty or "
                "a new folder"
            )
        (folder / "states").mkdir(parents=True, exist_ok=True)
        self._save()

    def file_name(self, name: str) -> str:
        """A strategy's name as the stem of a file name, which no other has."""
        return self._stems[name]

    def state_file(self, name: str) -> Path:
        """Where the named strategy's checkpoint lies."""
        path = self.folder / "states" / f"{self.file_name(name)}.pt"
        self.add([path])
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; it gets its name only when the block ends well."""
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(f"part_{target.name}")  # a suffix would change the format
        try:
            yield part
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        self.add([target])

    def remove(self, name: str) -> None:
        """Remove a file of this run, if it is there, and its folder once that is empty."""
        if name in self._manifest["files"]:
            _unlink(self.folder, name)
            self._manifest["files"].remove(name)
            self._save()

    def add(self, paths: Iterable[Path]) -> None:
        """Note files as this run's."""
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        self._manifest["files"] = list(dict.fromkeys([*self._manifest["files"], *names]))
        self._save()

    def finish(self) -> None:
        """Mark the run as finished."""
        self._manifest["finished"] = True
        self._save()

    def _save(self) -> None:
        part = self.folder / f"part_{_MANIFEST}"
        part.write_text(json.dumps(self._manifest, indent=2))
        part.replace(self.folder / _MANIFEST)


def _other(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what an unfinished run is another one."""
    if any(isinstance(value, dict) for value in there.values()):
        return "an earlier version of varmeta wrote it, without its data and model"
    return f"it differs in {in_words(differences(there, here))}"


def _unlink(folder: Path, name: str) -> None:
    """Remove a file, and the folder within `folder` that it leaves empty."""
    target = folder / name
    target.unlink(missing_ok=True)
    if target.parent != folder and target.parent.is_dir() and not any(target.parent.iterdir()):
        target.parent.rmdir()
