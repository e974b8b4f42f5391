"""All the toy pictures, written to a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from varmeta.figures.meta_training import training
from varmeta.figures.objectives import many_tasks, meta_objective, smooth_but
from varmeta.figures.one_task import anchor, derivative, minimum, moving_anchor
from varmeta.figures.stochastic import Sweep, gradients, mechanisms, stochastic_objective, sweep
from varmeta.figures.style import Movie, save
from varmeta.figures.toy import SPAN, Toy, draw_tasks
from varmeta.files import locked, make_folder, require_writable

FIGURES: dict[str, Callable[..., Figure | Movie]] = {  # in the order of the story
    "anchor": anchor,
    "moving_anchor": moving_anchor,
    "minimum": minimum,
    "derivative": derivative,
    "meta_objective": meta_objective,
    "many_tasks": many_tasks,
    "smooth_but": smooth_but,
    "stochastic_objective": stochastic_objective,
    "mechanisms": mechanisms,
    "gradients": gradients,
    "training": training,
    "training_cold": partial(training, count=20, temperature=0.05, points=49),
}
_QUICK: dict[str, dict[str, Any]] = {
    "moving_anchor": {"frames": 6},
    "many_tasks": {"counts": (1, 5, 20), "points": 200},
    "smooth_but": {"count": 40, "points": 300},
    "stochastic_objective": {"points": 31, "run_length": 30},
    "mechanisms": {"points": 41, "run_length": 30},
    "gradients": {"run_length": 30, "points": 25},
    "training": {"run_length": 30, "steps": 500},
    "training_cold": {"run_length": 20, "steps": 500, "count": 2, "points": 25},
}
_SHARED, _TASKS, _POINTS = ("gradients", "training"), 30, 69  # these two read one table


def draw_each(
    folder: str | PathLike[str],
    toy: Toy | None = None,
    *,
    only: str | None = None,
    quick: bool = False,
) -> Iterator[Path]:
    """`draw_all`, one file at a time, as each is written.

    Raises:
        ValueError: no picture called `only`.
        NotWritten: nothing can be written there, which is found before the first picture is drawn.
        FileInUse: another process is drawing there.
    """
    if only is not None and only not in FIGURES:
        raise ValueError(f"only: no picture {only!r}; there are: {', '.join(FIGURES)}")
    make_folder(Path(folder), "folder")
    require_writable(Path(folder) / "figures", "folder")
    with locked(Path(folder) / "figures", f"folder {str(folder)!r}"):
        yield from _drawn(folder, toy, only, quick)


def _drawn(
    folder: str | PathLike[str], toy: Toy | None, only: str | None, quick: bool
) -> Iterator[Path]:
    table: Sweep | None = None
    for name, figure in FIGURES.items():
        if only not in (None, name):
            continue
        options = dict(_QUICK.get(name, {})) if quick else {}
        if name in _SHARED:
            count, points = (3, 25) if quick else (_TASKS, _POINTS)
            if table is None:
                tasks, at = draw_tasks(count, 0, toy), np.linspace(*SPAN, points)
                chain = {"run_length": options["run_length"]} if quick else {}
                table = sweep(tasks, at, **chain)
            options |= {"count": count, "many" if name == "gradients" else "table": table}
        yield save(figure(toy, **options), folder, f"{_number(name)}_{name}")


def draw_all(
    folder: str | PathLike[str],
    toy: Toy | None = None,
    *,
    only: str | None = None,
    quick: bool = False,
) -> list[Path]:
    """Every picture of the story as a PNG or GIF file, numbered in its order.

    Args:
        folder: made if need be; files of the same name are replaced, each when it is complete.
        toy: one task, which the families of random tasks resemble; default `Toy()`.
        only: the name of a single picture, of `FIGURES`.
        quick: fewer tasks, points and steps, for a look in seconds.

    Returns:
        The files' paths.

    Raises:
        ValueError, NotWritten, FileInUse: see `draw_each`.
    """
    return list(draw_each(folder, toy, only=only, quick=quick))


def _number(name: str) -> str:
    width = math.ceil(math.log10(len(FIGURES) + 1))
    return str(list(FIGURES).index(name) + 1).zfill(width)
