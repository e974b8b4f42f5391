"""How the pictures of `varmeta.report` look: colours, frames, legends, rows of names.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ too.
"""

from __future__ import annotations

import math
import textwrap
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from varmeta.comparison import Comparison

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
MARKERS = ("o", "s", "^", "v", "P", "X", "h", "p", "d")
INK, MUTED, GRID, BAND, TINT = "#222222", "#6b6b6b", "#e4e4e4", "#f6f6f6", "#e6f0f9"
DASHES = (0, (5, 3))
ONE_COLUMN = 45  # tasks; a longer page is split


def strategy_styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each strategy; black for the reference."""
    styles, taken = {}, 0
    for name in comparison.outcomes:
        look = (COLOURS[taken % len(COLOURS)], MARKERS[taken % len(MARKERS)])
        taken += name != comparison.reference
        colour, marker = ("#000000", "D") if name == comparison.reference else look
        styles[name] = {"color": colour, "marker": marker, "ls": "none"}
    return styles


def plain(text: str) -> str:
    """Text in which no dollar sign starts a formula."""
    return text.replace("$", r"\$")


def legend_line(label: str, **look: Any) -> Any:
    """A legend entry of its own, grey unless `look` says otherwise."""
    return Line2D([], [], **{"color": MUTED, "label": plain(label), **look})


def titled_figure(width: float, height: float, title: str, note: str, handles: list[Any]) -> Figure:
    """A figure whose panels take `height` inches below a title, a note and a legend."""
    title, note = (textwrap.fill(t, int(width / w)) for t, w in ((title, 0.125), (note, 0.079)))
    widest = max((len(handle.get_label()) for handle in handles), default=0)
    across = min(max(int(width / (0.085 * widest + 0.6)), 1), len(handles)) or 1
    below_title = 0.42 + 0.25 * title.count("\n")
    below_note = below_title + 0.24 + 0.19 * note.count("\n")
    total = height + below_note + 0.22 * math.ceil(len(handles) / across) + 0.1
    panels = (0.0, 0.0, 1.0, height / total)
    layout = ConstrainedLayoutEngine(rect=panels, w_pad=0.12, h_pad=0.1, wspace=0.02)
    fig = Figure(figsize=(width, total), facecolor="white", layout=layout)
    x, top = 0.14 / width, {"va": "top", "linespacing": 1.25}
    bold: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "color": INK, **top}
    thin: dict[str, Any] = {"fontsize": 9.5, "color": MUTED, **top}
    fig.text(x, 1 - 0.15 / total, plain(title), **bold)
    fig.text(x, 1 - below_title / total, plain(note), **thin)
    if handles:
        look: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "labelcolor": INK}
        look |= {"borderpad": 0, "borderaxespad": 0, "handletextpad": 0.6, "columnspacing": 1.6}
        look |= {"bbox_to_anchor": (x, 1 - below_note / total), "ncols": across}
        fig.legend(handles=handles, loc="upper left", **look)
    return fig


def panel_grid(
    styles: dict[str, dict[str, Any]], height: float, title: str, note: str, handles: list[Any]
) -> tuple[Figure, dict[str, tuple[Axes, str]]]:
    """Small multiples, up to three in a line: a panel and a colour for each strategy."""
    wide = min(len(styles), 3)
    deep = math.ceil(len(styles) / wide)
    fig = titled_figure(max(0.4 + 3.7 * wide, 7.5), 0.2 + height * deep, title, note, handles)
    panels = {}
    for position, (name, style) in enumerate(styles.items(), 1):
        panels[name] = (fig.add_subplot(deep, wide, position), style["color"])
        clean_axes(panels[name][0], "both", name, style["color"])
    return fig, panels


def clean_axes(ax: Axes, grid: Any, title: str = "", colour: str = INK) -> None:
    """White ground, a light grid, no frame but the lower edge."""
    title = plain(textwrap.fill(title, 40))
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=colour)
    ax.set(facecolor="white", axisbelow=True)
    ax.grid(True, axis=grid, color=GRID, lw=0.7, ls="-")
    ax.spines[:].set_visible(False)
    ax.spines["bottom"].set(visible=True, color=MUTED, lw=0.8)
    ax.tick_params(length=0, labelsize=9, labelcolor=INK)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=9.5, color=INK)


def page_columns(kind: str, order: np.ndarray, known: int) -> list[list[str | int]]:
    """Tasks under headings, in one or two columns; the heading is repeated in the second."""
    entries: list[str | int] = []
    for heading, part in ((kind, order[order < known]), (f"new {kind}", order[order >= known])):
        entries += [heading, *part.tolist()] if len(part) else []
    size = len(entries) if len(order) <= ONE_COLUMN else math.ceil(len(entries) / 2)
    columns = [entries[start : start + size] for start in range(0, len(entries), size)]
    for left, right in pairwise(columns):
        if isinstance(left[-1], str):
            right.insert(0, left.pop())
        if isinstance(right[0], int):
            right.insert(0, next(e for e in reversed(left) if isinstance(e, str)))
    return columns


def name_rows(ax: Axes, column: list[str | int], names: list[str], rows: np.ndarray) -> None:
    """Names as tick labels, with the number of seen rows in a column of its own beside them."""
    texts = [e if isinstance(e, str) else textwrap.shorten(names[e], 40) for e in column]
    ax.set_yticks(range(len(column)), [plain(text) for text in texts])
    ax.tick_params(axis="y", pad=38)
    ax.tick_params(axis="x", top=len(column) > 25, labeltop=len(column) > 25)
    for y, (entry, tick) in enumerate(zip(column, ax.get_yticklabels(), strict=True)):
        text, weight = ("rows", "bold") if isinstance(entry, str) else (str(rows[entry]), "normal")
        tick.set_fontweight(weight)
        look: dict[str, Any] = {"fontsize": 8, "fontweight": weight, "color": MUTED}
        at = ax.get_yaxis_transform()
        ax.text(-0.012, y, text, ha="right", va="center", transform=at, **look)
