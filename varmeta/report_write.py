"""The pictures of a comparison as files; one that cannot be drawn does not cost the others."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path

from matplotlib.figure import Figure

from varmeta.comparison import Comparison
from varmeta.files import NotWritten, make_folder, write
from varmeta.report import forest, scores, shrinkage, training_curves
from varmeta.report_modules import module_comparison

_MOST_COMPONENTS = 4
_DPI = 150


def write_figures(
    comparison: Comparison,
    folder: str | PathLike[str],
    blame: Callable[[str, str, Exception], None] | None = None,
    announce: Callable[[Iterable[Path]], None] | None = None,
) -> list[Path]:
    """All figures as PNG files (150 dpi) in `folder`, and their paths.

    `forest_<site>` and `shrinkage_<site>` for every adapted site of one value, with the component's
    number appended for those of two to four; `modules`, `training_curves` and `scores`. A file
    appears under its name only when it is complete. There are none without outcomes.

    Args:
        comparison: from `compare`.
        folder: made if it does not exist.
        blame: called with a strategy, what was drawn, and the error, for each strategy that cannot
            be drawn; the picture is then drawn without it. None raises the error instead.
        announce: called with the path of each file before it is written.

    Raises:
        NotWritten: a file cannot be written.
    """
    make_folder(Path(folder), "folder")
    written: list[Path] = []

    def save(name: str, fig: Figure | None) -> None:
        path = Path(folder) / (re.sub(r"[^\w.-]+", "_", name) + ".png")
        while path in written:  # two names may differ only in what a file name cannot hold
            path = path.with_stem(path.stem + "_")
        if fig is not None:
            if announce is not None:
                announce([path])
            write(path, png(fig))
            written.append(path)

    def draw(name: str, make: Callable[[Comparison], Figure | None]) -> None:
        try:
            save(name, make(comparison))
        except NotWritten:
            raise
        except Exception as error:
            if blame is None:
                raise
            at_fault = _at_fault(comparison, make, error)
            for strategy, reason in at_fault.items():
                blame(strategy, f"picture {name}", reason)
            others = comparison.only(n for n in comparison.outcomes if n not in at_fault)
            if others.outcomes:
                save(name, make(others))

    for site in comparison.density.sites if comparison.outcomes else ():
        count = site.shape.numel()
        for k in range(count) if count <= _MOST_COMPONENTS else ():
            name, which = (site.name, None) if count == 1 else (f"{site.name}_{k}", k)
            draw(f"forest_{name}", partial(forest, site=site.name, component=which))
            draw(f"shrinkage_{name}", partial(shrinkage, site=site.name, component=which))
    if comparison.outcomes:
        draw("modules", module_comparison)
        draw("training_curves", training_curves)
        draw("scores", scores)
    return written


def png(fig: Figure) -> memoryview:
    """The bytes of a PNG file (150 dpi)."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=_DPI, format="png")
    return buffer.getbuffer()


def _at_fault(
    comparison: Comparison, make: Callable[[Comparison], Figure | None], error: Exception
) -> dict[str, Exception]:
    """The strategies without which a picture can be drawn, and why not with them."""

    def tried(names: Iterable[str]) -> Exception | None:
        try:
            fig = make(comparison.only(names))
            if fig is not None:
                png(fig)
        except Exception as found:
            return found
        return None

    every = list(comparison.outcomes)
    alone = {name: found for name in every if (found := tried([name])) is not None}
    if alone and tried(n for n in every if n not in alone) is None:
        return alone
    for name in every:  # it takes another strategy beside it to fail
        if tried(n for n in every if n != name) is None:
            return {name: error}
    return dict.fromkeys(every, error)
