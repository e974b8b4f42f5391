"""How the toy pictures look: wide, few words, each curve named where it runs.

A colour means one thing in all of them. They are Okabe and Ito's, as in `varmeta.report_style`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from varmeta.files import NotWritten, why, write
from varmeta.report_style import COLOURS, GRID, INK, MUTED, plain

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = COLOURS[:6]
LOSS, PENALTY, SUM, STAR = INK, ORANGE, GREEN, VERMILION  # f, the anchor's penalty, E, argmin E
GLOBAL, TRACKED = VERMILION, BLUE  # the lowest minimum of E, the one that descent from θ0 finds
LOCATION, PROBABILITY = BLUE, PINK  # the two mechanisms
IMPLICIT, AVERAGED, FULL = SKY, BLUE, VERMILION  # meta-gradients
HALO = (withStroke(linewidth=4, foreground="white"),)
_DPI, _MOVIE_DPI = 100, 72


def stage(
    title: str, note: str, rows: int = 1, columns: int = 1, height: float = 5.0, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of 10 inches, 13 or more for three columns, and its panels `[rows, columns]`."""
    width = 10.0 if columns < 3 else 14.0
    title = textwrap.fill(title, int(width * 6.6))
    note = textwrap.fill(note, int(width * 10.8))
    head = 0.36 + 0.3 * (1 + title.count("\n")) + 0.24 * (note.count("\n") + 1)
    total = height + head
    layout = ConstrainedLayoutEngine(
        rect=(0.0, 0.0, 1.0, height / total), w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.03
    )
    fig = Figure(figsize=(width, total), dpi=_DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(fig)
    bold: dict[str, Any] = {"fontsize": 18, "fontweight": "bold", "color": INK, "va": "top"}
    thin: dict[str, Any] = {"fontsize": 12.5, "color": MUTED, "va": "top", "linespacing": 1.3}
    fig.text(0.17 / width, 1 - 0.17 / total, plain(title), linespacing=1.2, **bold)
    top = 0.27 + 0.3 * (1 + title.count("\n"))
    fig.text(0.17 / width, 1 - top / total, plain(note), **thin)
    axes = fig.subplots(rows, columns, squeeze=False, **grid)
    for ax in axes.flat:
        frame(ax)
    return fig, axes


def frame(ax: Axes) -> None:
    """White ground, a light grid, no frame but the lower edge, sizes for a projector."""
    ax.set(facecolor="white", axisbelow=True)
    ax.grid(True, color=GRID, lw=0.8)
    ax.spines[:].set_visible(False)
    ax.spines["bottom"].set(visible=True, color=MUTED, lw=0.9)
    ax.tick_params(length=0, labelsize=12, labelcolor=INK)
    for part in (ax.xaxis.label, ax.yaxis.label):
        part.set(fontsize=13.5, color=INK)


def say(ax: Axes, x: float, y: float, text: str, colour: str, **look: Any) -> None:
    """A label on the picture, in the colour of what it names."""
    look = {"fontsize": 13, "color": colour, "path_effects": HALO, "zorder": 9, **look}
    ax.text(x, y, plain(text), **look)


def name_ends(
    ax: Axes, ends: Sequence[tuple[str, float, str]], gap: float = 0.07, fontsize: float = 13
) -> None:
    """Names of curves beside the right edge, each near its end's height, none on another.

    Args:
        ax: after its limits are set.
        ends: (name, height in data units, colour).
        gap: the least distance of two names, as a share of the panel's height.
        fontsize: in points.
    """
    low, high = ax.get_ylim()
    order = sorted(ends, key=lambda end: end[1])
    places = [float(np.clip((y - low) / (high - low), 0.02, 0.98)) for _, y, _ in order]
    for _ in range(100):  # push neighbours apart until none overlaps
        for i in range(len(places) - 1):
            lack = gap - (places[i + 1] - places[i])
            if lack > 1e-4:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
    for (name, _, colour), place in zip(order, places, strict=True):
        look: dict[str, Any] = {"transform": ax.transAxes, "va": "center", "fontsize": fontsize}
        ax.text(1.012, place, plain(name), color=colour, **look)


def broken(x: np.ndarray, y: np.ndarray, jumps: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The curve with a gap at each position of `jumps`, so that no line is drawn across it."""
    at = np.searchsorted(x, np.asarray(jumps, dtype=np.float64))
    return np.insert(x, at, np.nan), np.insert(y, at, np.nan)


@dataclass(frozen=True)
class Movie:
    """A picture that moves.

    Args:
        figure: what is drawn.
        frames: how many.
        draw: brings the figure to one frame, given its number.
        rate: frames per second.
    """

    figure: Figure
    frames: int
    draw: Callable[[int], None]
    rate: int = 15

    def write(self, path: Path) -> None:
        """As a GIF, without end."""
        writer = PillowWriter(fps=self.rate)
        with writer.saving(self.figure, str(path), _MOVIE_DPI):
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")  # laid out once, for all frames
            for frame_number in range(self.frames):
                self.draw(frame_number)
                writer.grab_frame()


def save(picture: Figure | Movie, folder: str | PathLike[str], name: str) -> Path:
    """A PNG file, or a GIF of a movie, which appears under its name only when complete."""
    path = Path(folder) / f"{name}.{'gif' if isinstance(picture, Movie) else 'png'}"
    if isinstance(picture, Movie):
        try:
            with TemporaryDirectory() as place:
                picture.write(Path(place) / path.name)
                data = (Path(place) / path.name).read_bytes()
        except OSError as error:
            raise NotWritten(
                error.errno, f"{path} could not be written: {why(error)}, for temporary files"
            ) from error
    else:
        buffer = io.BytesIO()
        picture.savefig(buffer, dpi=_DPI, format="png")
        data = buffer.getvalue()
    write(path, data)
    return path
