"""What failed, in a phrase, and where in the user's own file; a failure stops no other."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from varmeta.files import NotWritten
from varmeta.inference.base import NonFiniteLoss, NonFinitePosterior
from varmeta.own_code import LIBRARIES, OURS
from varmeta.runs import RunFolder

_MEMORY = re.compile("not enough memory|allocate memory|out of memory", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate [\d.,]+ ?\w+", re.IGNORECASE)
_LONGEST = 200  # characters of a phrase


@dataclass
class Attempt:
    """What is being tried.

    Attributes:
        where: the step or the part of the work that is under way; comes first in the reason.
    """

    where: str = ""


@dataclass(eq=False)
class Failures:
    """The strategies of a comparison that failed.

    Attributes:
        run: where tracebacks are written, as `failures/NAME.txt`; None for nowhere.
        reasons: by strategy, why, in a phrase.
        tracebacks: by strategy, in full.
    """

    run: RunFolder | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def catching(self, name: str, where: str = "") -> Iterator[Attempt]:
        """Note any exception in the block as a failure of strategy `name`.

        Ctrl-C goes on, and so do a warning that the user has turned into an error and a full disk,
        on which no other strategy could be kept either.
        """
        attempt = Attempt(where)
        try:
            yield attempt
        except (Warning, NotWritten):
            raise
        except Exception as error:
            self.note(name, attempt.where, error)

    def note(self, name: str, where: str, error: Exception) -> None:
        """Add a failure; a second one of a strategy is added to the first."""
        reason = phrase(_without_name(error))
        if where and not reason.startswith("step "):
            reason = f"{where}: {reason}"
        full = f"{name}: {where or 'failed'}\n\n{''.join(traceback.format_exception(error))}"
        if name in self.reasons:
            reason = f"{self.reasons[name]}; {reason}"
            full = f"{self.tracebacks[name]}\n\n{full}"
        self.reasons[name], self.tracebacks[name] = reason, full
        if self.run is not None:
            self.run.write(self._file(self.run, name), full)

    def forget_earlier(self, names: Iterable[str]) -> None:
        """Remove what an earlier try wrote of those of `names` that did not fail in this one."""
        for name in names:
            if self.run is not None and name not in self.reasons:
                self.run.remove(self._file(self.run, name))

    @staticmethod
    def _file(run: RunFolder, name: str) -> str:
        return f"failures/{run.file_name(name)}.txt"


def _without_name(error: Exception) -> Exception:
    """What `fit` puts the strategy's name before, which its row has already."""
    cause = error.__cause__
    kinds = (NonFiniteLoss, NonFinitePosterior)
    named = isinstance(error, kinds) and isinstance(cause, kinds)
    return cause if named and not str(error).startswith("step ") else error  # type: ignore[return-value]


def phrase(error: BaseException) -> str:
    """Why, in one phrase: the kind of the error, its first sentence, and the user's own line."""
    text, place = _first_sentence(message(error)), own_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _MEMORY.search(message(error)):
        wanted = _WANTED.search(message(error))
        text = "out of memory" + (f" ({wanted[0].lower()})" if wanted else "")
    elif isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        text = f"linear algebra: {text}"
    elif not _said_by_us(error):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{text} ({place})" if place else text


def explain(error: BaseException) -> str:
    """All that the error says, and the user's own line, without our frames."""
    text, place = message(error), own_line(error)
    if not expected(error):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{text.rstrip('. ')} ({place})" if place else text


def message(error: BaseException) -> str:
    """What it says, without the table of shapes that Pyro appends."""
    if isinstance(error, SyntaxError):
        return error.msg
    if isinstance(error, KeyError) and len(error.args) == 1:
        return repr(error.args[0])
    text, cause = str(error), error.__cause__
    if cause is not None and type(cause) is type(error) and text.startswith(str(cause)):
        text = str(cause)
    return text


def expected(error: BaseException) -> bool:
    """Whether the message is all that a user needs: raised on purpose, or by the file system."""
    return isinstance(error, OSError) or _said_by_us(error)


def own_line(error: BaseException) -> str | None:
    """Where in the user's own code, called by ours, it arose: file, line number and the line."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in reversed(chain):
        if isinstance(one, SyntaxError) and one.filename and not _library(one.filename):
            return _place(one.filename, one.lineno, one.text)
        inside, found = one is not error, None  # a cause was caught by a library or by us
        for frame in traceback.extract_tb(one.__traceback__):
            if frame.filename.startswith(OURS):
                inside = True
            elif inside and not _library(frame.filename):
                found = frame
        if found is not None:
            return _place(found.filename, found.lineno, found.line)
    return None


def _place(file: str, line: int | None, code: str | None) -> str:
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    shown = f": {code.strip()}" if code and code.strip() else ""
    return f"{path}, line {line}{shown}"


def _library(file: str) -> bool:
    return file.startswith(("<", *LIBRARIES))


def _said_by_us(error: BaseException) -> bool:
    """Raised by a line of varmeta, in words that are meant to be read."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    meant = isinstance(error, (ValueError, FloatingPointError, OSError))
    return meant and last is not None and last.tb_frame.f_code.co_filename.startswith(OURS)


def _first_sentence(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    sentence = re.split(r"\.\s", lines[0], maxsplit=1)[0].rstrip(". ")
    return sentence if len(sentence) <= _LONGEST else sentence[: _LONGEST - 1] + "…"
