"""Ctrl-C and SIGTERM: a run is stopped between two steps, and what is done is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, getsignal, signal
from threading import current_thread, main_thread
from typing import NoReturn


class Terminated(SystemExit):
    """SIGTERM has come, and what was done is saved; ends a program with the usual status, 143."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.code = 128 + SIGTERM


def terminate(*_: object) -> NoReturn:
    """A handler of SIGTERM that raises `Terminated`, as Python's of Ctrl-C raises its error."""
    raise Terminated


@contextmanager
def whole_steps(*, saves: bool) -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of the step, where the function given is called; a second does not.

    A step that is left half done could not be resumed exactly.

    Args:
        saves: whether there is somebody to save what is done: then SIGTERM waits too. It raises
            `Terminated`; where nothing can be saved it ends the program at once, as always.
    """
    # Elsewhere signals do not arrive, or the user has a handler of his own.
    replaced = {}
    if current_thread() is main_thread():
        for number, usual in ((SIGINT, (default_int_handler,)), (SIGTERM, (SIG_DFL, terminate))):
            if getsignal(number) in usual and (saves or number == SIGINT):
                replaced[number] = getsignal(number)
    came: list[int] = []

    def stop() -> None:
        if came:
            raise Terminated if came[-1] == SIGTERM else KeyboardInterrupt

    def remember(number: int, _: object) -> None:
        stop()
        came.append(number)

    try:
        for number in replaced:
            signal(number, remember)
        yield stop
    finally:
        for number, handler in replaced.items():
            signal(number, handler)
    stop()  # what came after the last step is not lost


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises `Terminated` within the block, unless the user has a handler of his own."""
    ours = current_thread() is main_thread() and getsignal(SIGTERM) == SIG_DFL
    if ours:
        signal(SIGTERM, terminate)
    try:
        yield
    finally:
        if ours:
            signal(SIGTERM, SIG_DFL)
