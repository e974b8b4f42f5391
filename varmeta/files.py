"""Files: one is wholly there or not at all, a broken one is named, and two processes share none."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # what some file systems answer
_ZIP = b"PK\x03\x04"


class BrokenFile(ValueError):
    """A file that is there but not what it should be: empty, cut, damaged or another program's."""


class NotWritten(OSError):
    """A file could not be written; what its path held before is as it was."""

    def __str__(self) -> str:
        return str(self.strerror)  # the sentence, without the number that `errno` has


class FileInUse(OSError):
    """Another process, or another thread of this one, is at work on the same file or folder."""


# -- writing ---------------------------------------------------------------------------------------


def write(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file: whatever ends the process, its path holds the old content or the new one.

    The content is made in memory by the caller, so that no library meets a full disk: PyTorch
    forgets the reason, and HDF5 ends the process. On return it is on the disk itself and not in a
    cache.

    Args:
        path: a link is followed. Missing folders are made.
        data: text is written as UTF-8.

    Raises:
        NotWritten: a full disk, say, in one sentence.
    """
    target = Path(os.path.realpath(path))
    part = part_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise NotWritten(
            error.errno,
            f"{path} could not be written: {why(error)}; what was written before is kept, so mend "
            "that and call again with the same arguments",
        ) from error


def part_of(path: Path) -> Path:
    """Where a file's new content is gathered, beside it: only within a folder is a move atomic."""
    return path.with_name(f"part_{path.name}")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: without that a power cut may take back a move."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(number)


def require_writable(path: Path, argument: str) -> None:
    """Find before any work is done that a file could not be written at its end.

    Args:
        path: the file, whose folder must be there; it need not be.
        argument: what to call it in the error.

    Raises:
        NotWritten: there is no such folder, it is read-only or full, or the path is a folder or no
            ordinary file.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it")
        if not target.parent.exists():
            raise FileNotFoundError(
                errno.ENOENT, f"there is no folder {str(target.parent)!r}; make it"
            )
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "it is no ordinary file; name another")
        probe = part_of(target)
        try:
            with open(probe, "wb") as file:
                file.write(b"?")
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = why(error)
        raise NotWritten(
            getattr(error, "errno", None) or errno.EINVAL,
            f"{argument}: {str(path)!r} cannot be written: {reason}"
            + ("" if ";" in reason else "; name another path"),
        ) from None


def make_folder(folder: Path, argument: str) -> None:
    """Make a folder, with those above it.

    Raises:
        NotWritten: it cannot be made, in one sentence.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = why(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "a file has its name, or that of a folder above it"
        raise NotWritten(
            getattr(error, "errno", None) or errno.EINVAL,
            f"{argument}: the folder {str(folder)!r} cannot be made: {reason}; name another",
        ) from None


def why(error: BaseException) -> str:
    """The reason that an error of the file system gives, without its number and path."""
    return getattr(error, "strerror", None) or str(error)


# -- one process at a time -------------------------------------------------------------------------


def lock_of(path: Path) -> Path:
    """The file beside `path` whose lock says that somebody is at work on it."""
    return path.with_name(f"{path.name}.lock")


@contextmanager
def locked(path: Path, called: str = "") -> Iterator[None]:
    """Keep a file to ourselves: another process, or thread, that asks for it is refused.

    The lock is the operating system's and dies with its process, so that none is ever stale.

    Args:
        path: the file; its folder is there.
        called: what the error calls it; its path if empty.

    Raises:
        FileInUse: it is taken; with the number of the process that has it.
        NotWritten: the lock's own file cannot be made beside it.
    """
    held = lock_of(Path(os.path.realpath(path)))
    lock = FileLock(held, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        owner = ""
        with suppress(OSError):
            owner = held.read_text().strip()
        raise FileInUse(
            f"{called or path} is in use by another run{owner and f' (process {owner})'}; wait for "
            "its end, or name another"
        ) from None
    except OSError as error:
        raise NotWritten(error.errno, f"{held} cannot be made: {why(error)}") from None
    try:
        with suppress(OSError):  # a full disk may keep our number from whoever is refused
            held.write_text(f"{os.getpid()}\n")
        yield
    finally:
        try:
            with suppress(OSError):  # while we have it: whoever comes next locks a file of its own
                held.unlink()
        finally:
            lock.release()


# -- reading ---------------------------------------------------------------------------------------


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        remedy: what a user can do if it is broken, for the error.

    Raises:
        BrokenFile: it cannot be read, is empty, or is no JSON.
    """
    try:
        text = path.read_bytes().decode()
        if not text.strip():
            raise ValueError("it is empty")
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = why(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"it is no JSON (line {error.lineno}, column {error.colno})"
        elif isinstance(error, (UnicodeDecodeError, RecursionError)):
            reason = "it is no JSON"
        raise BrokenFile(f"{path} cannot be read: {reason}; {remedy}") from None


def packed(content: Mapping[str, Any]) -> memoryview:
    """Tensors and numbers as the bytes of a file that `load` reads."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


def load(
    path: Path, kinds: Mapping[str, type], device: torch.device | str | None = None
) -> dict[str, Any]:
    """What a file of `packed` bytes holds: tensors and numbers, never code.

    Args:
        path: the file.
        kinds: the keys that it must have, and of which type each is.
        device: where its tensors go; None for where they were.

    Raises:
        BrokenFile: it cannot be read, or is empty, cut short, damaged or another program's.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_ZIP))
            if not start:
                reason = "it is empty"
            elif start != _ZIP:
                reason = "it is of another program"
            elif _damaged(file):
                reason = "it is cut short or damaged"
            else:
                file.seek(0)
                saved: dict[str, Any] = torch.load(file, device, weights_only=True)
                wrong = [k for k, kind in kinds.items() if not isinstance(saved[k], kind)]
                if not wrong:
                    return saved
                reason = f"its {wrong[0]!r} is not what a run saves"
    except OSError as error:
        reason = why(error)
    except Exception as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        if "map_location" in str(error):
            reason = "it was written on a device that is not here (a fit: vm.load(map_location=))"
        else:
            reason = "it holds something else than a run's state"
    raise BrokenFile(not_usable(path, reason))


def _damaged(file: BinaryIO) -> bool:
    """Whether a zip file is cut, or a bit of it wrong: PyTorch does not look at the check sums."""
    try:
        return zipfile.ZipFile(file).testzip() is not None
    except OSError:
        raise
    except Exception:
        return True


def not_usable(path: Path, reason: str) -> str:
    """The sentence about a checkpoint from which no run can go on."""
    return f"checkpoint {path} cannot be used: {reason}; remove it to begin anew, or name another"
