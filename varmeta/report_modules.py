"""The pictures of modules and their scales, each a `matplotlib.figure.Figure` of its own.

As in `varmeta.report`, pyplot and its global state are never touched.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from varmeta.comparison import Comparison
from varmeta.inference.fitted import Fit
from varmeta.report_style import (
    BAND,
    COLOURS,
    DASHES,
    INK,
    MUTED,
    clean_axes,
    legend_line,
    plain,
    strategy_styles,
    titled_figure,
)
from varmeta.shrinkage import Shrinkage, module_scales

_MOST_ROWS = 60
_DECADES = 4.0  # that an axis shows below its largest value
_LOOKS: dict[str, dict[str, Any]] = {
    "adapted": {"color": COLOURS[1], "marker": "o", "ls": "none"},
    "shared": {"color": COLOURS[0], "marker": "s", "ls": "none"},
}
_HOLLOW: dict[str, Any] = {"marker": "o", "ls": "none", "mfc": "white", "mec": MUTED, "mew": 1}


def plot_shrinkage(found: Shrinkage | Fit) -> Figure:
    """Each module's learned scale, how far tasks move in it, and what that is worth to them.

    Modules are rows in the model's order; of more than 60 those of the highest cost are shown.

    Args:
        found: from `fit.shrinkage()`, or a fit on `Tasks`.

    Example:
        >>> plot_shrinkage(fit).savefig("shrinkage.png")  # doctest: +SKIP
    """
    found = found.shrinkage() if isinstance(found, Fit) else found
    table = found.table
    if len(table) > _MOST_ROWS:
        table = table.nlargest(_MOST_ROWS, "cost").sort_index()
    some = f" The {len(table)} costliest of {len(found.table)} modules are shown."
    fig = titled_figure(
        12.0,
        1.0 + 0.27 * len(table),
        f"Which modules adapt to a task, and which tasks share ({found.strategy})",
        "Cost: by how much the tasks' negative log-likelihood rises when this module alone is put "
        f"back to θ0, {found.where}, with one standard error; adapted from {found.least:g} nats "
        "per task (dashed) and above that error. Triangles at an edge lie beyond it."
        + some
        * (len(table) < len(found.table)),
        [
            *(legend_line(verdict, ms=7, **look) for verdict, look in _LOOKS.items()),
            legend_line("where the scale began", ms=6, **_HOLLOW),
        ],
    )
    headings = {
        "scale": "learned scale: sd of tasks around θ0",
        "relative": "movement of tasks, relative to θ0",
        "cost": "cost of putting it back, nats per task",
    }
    axes = fig.subplots(1, 3)
    for ax, (column, heading) in zip(axes, headings.items(), strict=True):
        _rows(ax, table, heading, labels=column == "scale")
        every = table[["scale", "start"]] if column == "scale" else table[[column]]
        low, high = _span(every.to_numpy(), found.least if column == "cost" else None)
        ax.set_xlim(low, high)
        if column == "scale":
            ends = np.clip(table[["start", "scale"]].to_numpy(), low, high)
            ax.hlines(range(len(table)), *ends.T, color=MUTED, lw=1, zorder=1)
            _dots(ax, "start", table["start"].to_numpy(), np.arange(len(table)), _HOLLOW)
        for verdict, look in _LOOKS.items():
            y = np.flatnonzero(table["verdict"] == verdict)
            _dots(ax, f"{column}:{verdict}", table[column].to_numpy()[y], y, look)
    low, high = axes[2].get_xlim()
    reach = table["cost"].to_numpy() + [[-1], [1]] * table["cost_se"].fillna(0).to_numpy()
    shown = (reach[1] > low) & (table["cost"].to_numpy() > 0)
    ends = np.clip(reach[:, shown], low, high)
    axes[2].hlines(np.flatnonzero(shown), *ends, color=MUTED, lw=1, zorder=1)
    axes[2].axvline(found.least, color=INK, lw=1, ls=DASHES, gid="least")
    at = axes[2].get_yaxis_transform()
    for row, verdict in enumerate(table["verdict"]):
        words = {"color": _LOOKS[verdict]["color"], "fontsize": 8.5, "va": "center"}
        axes[2].text(1.02, row, verdict, transform=at, gid="verdict", **words)
    return fig


def plot_scales(found: Shrinkage | Fit) -> Figure | None:
    """Each module's scale over the steps of training, with its name at the end of its line.

    None where the run recorded no path of its scales (`Fit.scales`). Of more than 60 modules those
    of the highest cost are shown.

    Args:
        found: from `fit.shrinkage()`, or a fit on `Tasks`.
    """
    found = found.shrinkage() if isinstance(found, Fit) else found
    if found.scales_path is None:
        return None
    table = found.table
    if len(table) > _MOST_ROWS:
        table = table.nlargest(_MOST_ROWS, "cost")
    path = found.scales_path.double().cpu().numpy()[:, table.index]
    height = max(3.2, 0.8 + 0.17 * len(table))
    fig = titled_figure(
        9.6,
        height,
        f"Scales of the modules, step by step ({found.strategy})",
        "Standard deviation of tasks around θ0 in each module, after each step; coloured by what "
        "the tasks do at the end.",
        [legend_line(v, lw=1.6, color=look["color"]) for v, look in _LOOKS.items()],
    )
    ax = fig.subplots()
    clean_axes(ax, "y")
    low, high = _span(path)
    ax.set(xlim=(0, len(path)), ylim=(low, high), yscale="log", xlabel="step", ylabel="scale")
    _log_ticks(ax.yaxis, low, high)
    steps = np.arange(1, len(path) + 1)
    last = np.log(np.clip(path[-1], low, high) / low) / np.log(high / low)
    places = _apart(last, 0.15 / (height - 0.7))
    at = ax.get_yaxis_transform()
    for line, end, place, row in zip(path.T, last, places, table.to_dict("records"), strict=True):
        colour, name = _LOOKS[row["verdict"]]["color"], str(row["module"])
        ax.plot(steps, line, color=colour, lw=1.4, alpha=0.8, gid=f"scales:{name}")
        lead = low * (high / low) ** np.array([end, place])
        ax.plot([1.0, 1.025], lead, transform=at, color=colour, lw=0.7, clip_on=False)
        text = plain(textwrap.shorten(name, 36))
        look = {"fontsize": 8.5, "va": "center", "color": colour}
        ax.text(1.03, lead[1], text, transform=at, gid=f"label:{name}", **look)
    return fig


def module_comparison(comparison: Comparison) -> Figure | None:
    """The scale of each module that every strategy of a comparison learned, and where it began.

    None if no strategy learned any; those that learned none are left out. Of more than 60 modules
    those whose scales differ most between strategies, or from their start, are shown.
    """
    scales: dict[str, np.ndarray] = {}
    for name, outcome in comparison.outcomes.items():
        prior, origin = outcome.fit.prior, outcome.fit.state.meta.origin
        start, end = (module_scales(p).double().cpu().numpy() for p in (origin, prior))
        if bool(((start != end) & (end > 0)).any()):  # 0 throughout is stated, not learned
            scales[name] = end
    if not scales:
        return None
    modules = prior.modules
    every = np.stack([start, *scales.values()])
    spread = np.ptp(np.log(np.maximum(every, 1e-300)), axis=0)
    shown = np.sort(np.argsort(-spread, kind="stable")[:_MOST_ROWS])
    table = modules.table().iloc[shown]
    styles = strategy_styles(comparison)
    some = f" {len(shown)} of {len(modules)} modules are shown."
    fig = titled_figure(
        8.6,
        0.9 + len(table) * max(0.27, 0.07 * len(scales) + 0.08),
        "How far tasks differ in each module, by strategy",
        "Learned standard deviation of tasks around θ0. Triangles at an edge lie beyond it."
        + some * (len(shown) < len(modules)),
        [
            *(legend_line(name, ms=6, **styles[name]) for name in scales),
            legend_line("where it began", ms=6, **_HOLLOW),
        ],
    )
    ax = fig.subplots()
    _rows(ax, table, "")
    ax.set(xlim=_span(every[:, shown]), xlabel="learned scale")
    rows = np.arange(len(table))
    _dots(ax, "start", start[shown], rows, _HOLLOW)
    reach = min(0.32, 0.09 * (len(scales) - 1))
    dodge = np.linspace(-reach, reach, len(scales))
    for (name, scale), offset in zip(scales.items(), dodge, strict=True):
        _dots(ax, f"scale:{name}", scale[shown], rows + offset, styles[name])
    return fig


def _rows(ax: Axes, table: pd.DataFrame, heading: str, *, labels: bool = True) -> None:
    """A row for each module on a logarithmic axis, with its number of coordinates."""
    clean_axes(ax, "x", heading)
    ax.set(xscale="log", ylim=(len(table) - 0.5, -0.5))
    for y in range(0, len(table), 2):
        ax.axhspan(y - 0.5, y + 0.5, color=BAND, lw=0, zorder=0)
    names = [
        plain(f"{textwrap.shorten(str(name), 36)} ({size})")
        for name, size in zip(table["module"], table["size"], strict=True)
    ]
    ax.set_yticks(range(len(table)), names if labels else [])
    ax.tick_params(axis="y", pad=9)  # room for a triangle


def _dots(ax: Axes, gid: str, x: np.ndarray, y: np.ndarray, look: dict[str, Any]) -> None:
    """Points; those beyond an end of the axis as triangles there."""
    usual: dict[str, Any] = {"ms": 6.5, "mec": "white", "mew": 0.6}
    low, high = ax.get_xlim()
    _log_ticks(ax.xaxis, low, high)
    ax.plot(x, y, gid=gid, **usual | look)
    for out, edge, marker in ((x < low, low, "<"), (x > high, high, ">")):
        if out.any():
            edged = look | {"marker": marker, "ms": 6, "clip_on": False, "zorder": 3}
            ax.plot(np.full(out.sum(), edge), y[out], gid=f"beyond:{gid}", **edged)


def _span(values: np.ndarray, also: float | None = None) -> tuple[float, float]:
    """Ends of a logarithmic axis for the positive values, one to four decades apart."""
    kept = values[(values > 0) & np.isfinite(values)]
    kept = np.append(kept, [] if also is None else [also / 3, also * 3])
    if not len(kept):
        return 0.1, 10.0
    high = float(kept.max())
    low = min(max(float(kept.min()), high * 10.0**-_DECADES), high / 5)
    return low / 1.4, high * 1.4


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Labels at 1, 2 and 5 where the axis is short, else at powers of ten."""
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """Heights in [0, 1] near these, in their order, `gap` apart where there is room for it."""
    order = np.argsort(places, kind="stable")
    gap = min(gap, 1 / max(len(places) - 1, 1))
    least = gap * np.arange(len(places))
    free = places[order] - least
    rising = np.maximum.accumulate(free) + np.minimum.accumulate(free[::-1])[::-1]
    out = np.empty_like(places)
    out[order] = np.clip(rising / 2, 0, 1 - gap * (len(places) - 1)) + least
    return out
