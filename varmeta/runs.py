"""RunFolder: the output folder of a comparison, never half-written, never lost by accident."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from varmeta.file_names import file_names
from varmeta.files import (
    BrokenFile,
    lock_of,
    locked,
    make_folder,
    part_of,
    read_json,
    require_writable,
    sync_folder,
    write,
)
from varmeta.fingerprint import differences, in_words

DATA_FILE = "data.pt"  # what all strategies of a run have in common, and the settings of each
MODEL_PLACE = "model"  # the key of `RunFolder.say` for where the model is
_MANIFEST = "run.json"
_ASIDE = "replacement"  # the folder within a run's in which the run that is to replace it grows
_KINDS = {"finished": bool, "settings": dict, "files": list}


class RunFolder:
    """A folder that one comparison writes into.

    `run.json` in it says what the run is, which files it wrote, whether it is finished, and as
    `design` how its table was coded (`varmeta.design.Design.from_json`). A run
    in which a strategy failed is not: under the same settings it goes on with those that failed.
    `run_folder` opens one, and keeps other processes out.

    Args:
        folder: it exists.
        settings: what identifies the run, by topic (see `varmeta.fingerprint`); a run resumes only
            under the same ones.
        names: of the strategies, each of which has files of its own.
        overwrite: begin a new run that replaces the one that is there, finished or not. It grows in
            `replacement/` and takes the other's place when it is there (`take_place`); if it is
            interrupted, the same settings without `overwrite` go on with it. Files that no run
            wrote are never touched.

    Attributes:
        folder: where the run's files lie.
        home: where they lie once the run has taken its place.

    Raises:
        FileExistsError: the folder holds a finished run, an unfinished run of other settings, or
            files but no run.
        BrokenFile: `run.json` is none, or names files outside of its folder.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        names: Iterable[str] = (),
        *,
        overwrite: bool = False,
    ) -> None:
        self.home, aside = folder, folder / _ASIDE
        self._stems = file_names(names)
        mine = json.loads(json.dumps(settings))
        if aside.is_symlink():
            raise BrokenFile(f"{aside} is a link; remove it, or give another folder")
        begun = _read(aside)
        if begun is not None and (begun["finished"] or begun.get("complete")):
            _move(aside, folder, begun)
            begun = None
        there = _read(folder)
        if there is None:
            self._start(folder, mine)
        elif overwrite:
            _remove(aside, [] if begun is None else [*begun["files"], _MANIFEST])
            self._start(aside, mine)
        elif begun is not None and begun["settings"] == mine:
            self.folder, self._manifest = aside, begun
        elif there["finished"]:
            raise FileExistsError(
                f"folder {str(folder)!r} holds a finished run; give overwrite=True "
                "(--overwrite) to replace it, or another folder"
            )
        elif there["settings"] != mine:
            raise FileExistsError(
                f"folder {str(folder)!r} holds an unfinished run with other settings: "
                f"{_other(there['settings'], settings)}; repeat them to resume it, give "
                "overwrite=True (--overwrite) to drop it, or another folder"
            )
        else:
            self.folder, self._manifest = folder, there

    def _start(self, folder: Path, settings: dict[str, Any]) -> None:
        ours = {lock_of(folder / _MANIFEST), part_of(folder / _MANIFEST)}
        if any(path not in ours and _is_file(path) for path in folder.rglob("*")):
            raise FileExistsError(
                f"folder {str(folder)!r} holds files that are no run of varmeta; give an empty or "
                "a new folder"
            )
        self.folder = folder
        self._manifest = {"finished": False, "settings": settings, "files": []}
        self._save()

    def file_name(self, name: str) -> str:
        """A strategy's name as the stem of a file name, which no other has."""
        return self._stems[name]

    def state_file(self, name: str) -> Path:
        """Where the named strategy's checkpoint lies."""
        path = self.folder / "states" / f"{self.file_name(name)}.pt"
        self.add([path])
        make_folder(path.parent, "folder")
        return path

    def write(self, name: str, data: bytes | memoryview | str) -> None:
        """Write a file of this run: it is there as a whole or not at all."""
        self.add([self.folder / name])
        write(self.folder / name, data)

    def remove(self, name: str) -> None:
        """Remove a file of this run, if it is there, and its folder once that is empty."""
        if name in self._manifest["files"]:
            _remove(self.folder, [name])
            self._manifest["files"].remove(name)
            self._save()

    def add(self, paths: Iterable[Path]) -> None:
        """Note files as this run's, before they are written: then a kill leaves no stray one."""
        before = self._manifest["files"]
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        self._manifest["files"] = list(dict.fromkeys([*before, *names]))
        if self._manifest["files"] != before:
            self._save()

    def say(self, key: str, said: Any) -> None:
        """Note plain values about the run, which do not identify it, in `run.json`."""
        if self._manifest.get(key) != said:
            self._manifest[key] = said
            self._save()

    def finish(self) -> None:
        """Mark the run as finished: the same call is refused from now on."""
        self._manifest["finished"] = True
        self._save()

    def take_place(self) -> None:
        """Put the run where it belongs: the one that it replaces, if there is one, is removed."""
        if self.folder != self.home:
            self._manifest["complete"] = True  # from here on a kill does not undo it
            self._save()
            self._manifest = _move(self.folder, self.home, self._manifest)
            self.folder = self.home

    def _save(self) -> None:
        write(self.folder / _MANIFEST, json.dumps(self._manifest, indent=2))


def _other(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what an unfinished run is another one."""
    if any(isinstance(value, dict) for value in there.values()):
        return "an earlier version of varmeta wrote it, without its data and model"
    return f"it differs in {in_words(differences(there, here))}"


@contextmanager
def run_folder(
    folder: Path,
    settings: Mapping[str, Any],
    names: Iterable[str] = (),
    *,
    overwrite: bool = False,
) -> Iterator[RunFolder]:
    """A `RunFolder`, made if need be, that no other process can use within the block.

    Raises:
        NotWritten: nothing can be written there.
        FileInUse: another process has it.
        FileExistsError, BrokenFile: see `RunFolder`.
    """
    make_folder(folder, "folder")
    require_writable(folder / _MANIFEST, "folder")
    with locked(folder / _MANIFEST, f"folder {str(folder)!r}"):
        yield RunFolder(folder, settings, names, overwrite=overwrite)


def said(folder: Path, key: str) -> str:
    """What `RunFolder.say` noted of the run in a folder; '' for nothing.

    Raises:
        BrokenFile: the folder holds no run.
    """
    found = _read(folder)
    if found is None:
        raise BrokenFile(f"{folder} holds no run of varmeta; give a folder that compare wrote")
    return str(found.get(key, ""))


def _read(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says, None without one; a file that it names lies within its folder."""
    path = folder / _MANIFEST
    if not path.exists():
        return None
    remedy = "remove it and the run's files, or give another folder"
    found = read_json(path, remedy)
    for key, kind in _KINDS.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise BrokenFile(
                f"{path} is no run of varmeta: its {key!r} is missing or odd; {remedy}"
            )
    for name in found["files"]:
        if not isinstance(name, str) or not _within(folder, name):
            raise BrokenFile(
                f"{path} names {name!r}, which is no file within its folder: nothing was removed; "
                f"{remedy}"
            )
    return found


def _within(folder: Path, name: str) -> bool:
    """Whether a run can have written it: a file, or none yet, in this folder, links followed."""
    try:
        path, root = (folder / name).resolve(), folder.resolve()
        return path.is_relative_to(root) and path != root and not path.is_dir()
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        return False


def _is_file(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _move(aside: Path, home: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Put a complete run into the place of another; done again after a kill, it is the same."""
    manifest = {key: value for key, value in manifest.items() if key != "complete"}
    there = _read(home)
    old = set() if there is None else set(there["files"])
    _remove(home, old - set(manifest["files"]))
    for name in manifest["files"]:
        _clear(home / name)
        if (aside / name).exists():
            make_folder((home / name).parent, "folder")
            (aside / name).replace(home / name)
            sync_folder((home / name).parent)
    write(home / _MANIFEST, json.dumps(manifest, indent=2))
    _remove(aside, [*manifest["files"], _MANIFEST])
    return manifest


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, what kills left beside them, and the folders that they leave empty."""
    emptied = {folder} if folder.name == _ASIDE else set()
    for name in names:
        target = folder / name
        target.unlink(missing_ok=True)
        _clear(target)
        if target.parent != folder:
            emptied.add(target.parent)
    for path in sorted(emptied, key=lambda p: -len(p.parts)):
        with suppress(OSError):  # not empty, or not there
            path.rmdir()


def _clear(target: Path) -> None:
    """Remove what a kill may have left beside a file."""
    part_of(target).unlink(missing_ok=True)
    lock_of(target).unlink(missing_ok=True)
