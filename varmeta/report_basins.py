"""The pictures of `Basins` and `Mechanisms`, each a `matplotlib.figure.Figure` of its own.

As in `varmeta.report`, pyplot and its global state are never touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from varmeta.inference.basins import Basins, coordinate_names
from varmeta.report_style import COLOURS, INK, MUTED, clean_axes, legend_line, plain, titled_figure

if TYPE_CHECKING:
    from varmeta.inference.mechanisms import Mechanisms

_MOST_TASKS, _MOST_BASINS = 8, 10
_POINTS = 400  # of an energy's curve
_LOSSES = {
    "support_loss": ("support loss f at the minimum", "s"),
    "query_loss": ("query loss g at the minimum", "o"),
    "query_loss_mean": ("mean g of the basin's particles", "D"),
}
_PARTS = {"location": 0, "probability": 1, "total": 6, "implicit": 2}


def plot_basins(basins: Basins, task: str | int | None = None) -> Figure:
    """How often each basin is found and what it is worth, a line of panels for each task.

    With one coordinate, the energy and its minima too. Of a task's basins the ten that are found
    most often are shown, of many tasks the first eight.

    Args:
        basins: from `find_basins`.
        task: its name or position; None for all.

    Raises:
        ValueError: no such task.

    Example:
        >>> plot_basins(found).savefig("basins.png")  # doctest: +SKIP
    """
    names = basins.tasks.names
    rows = _chosen(names, task)
    curve = basins.density.dim == 1
    marks = [
        legend_line(label, marker=marker, ls="none", ms=6, mec="white", color=COLOURS[k])
        for k, (label, marker) in enumerate(_LOSSES.values())
    ]
    hidden = len(names) - len(rows) if task is None else 0
    fig = titled_figure(
        12.0 if curve else 8.4,
        0.3 + 2.5 * len(rows),
        "Which minima are found, how often, and what they are worth",
        "Basins by energy, the lowest first. Bars: share of the particles, ± 1 standard error."
        + " Dotted: θ0." * curve
        + f" {hidden} more tasks are not shown." * (hidden > 0),
        marks,
    )
    panels = fig.subplots(len(rows), 3 if curve else 2, squeeze=False)
    for axes, t in zip(panels, rows, strict=True):
        shown = _most_occupied(basins, t)
        name = names[t]
        if curve:
            _energy_curve(axes[0], basins, t, shown)
        shares, errors = (
            v[shown, t].double().cpu().numpy() for v in (basins.occupation, basins.occupation_se)
        )
        ax, place = axes[-2], np.arange(len(shown))
        clean_axes(ax, "y", "" if curve else f"{basins.tasks.task_name} {name}")
        ax.bar(place, shares, width=0.7, color=COLOURS[5], gid=f"occupation:{name}")
        ax.errorbar(place, shares, errors, fmt="none", ecolor=INK, elinewidth=1.2)
        ax.set(ylim=(0, None), ylabel="share of particles")
        ax = axes[-1]
        clean_axes(ax, "y")
        for k, (attribute, (_, marker)) in enumerate(_LOSSES.items()):
            values = getattr(basins, attribute)[shown, t].double().cpu().numpy()
            look: dict[str, Any] = {"color": COLOURS[k], "mec": "white", "ms": 7}
            ax.plot(place + 0.16 * (k - 1), values, marker, gid=f"{attribute}:{name}", **look)
        ax.set(ylabel="nats", xlim=(-0.6, len(shown) - 0.4))
        for ax in axes[-2:]:
            ax.set_xticks(place, [str(k) for k in shown])
            ax.set_xlabel("basin")
    return fig


def plot_mechanisms(found: Mechanisms, coordinate: str | int = 0) -> Figure:
    """What moves the expected loss of each task: places that move, and chances that change.

    Args:
        found: from `mechanisms`.
        coordinate: of θ0, by name or position.

    Raises:
        ValueError: no such coordinate.

    Example:
        >>> plot_mechanisms(found, "slope").savefig("mechanisms.png")  # doctest: +SKIP
    """
    coordinates = coordinate_names(found.density)
    if coordinate not in coordinates and coordinate not in range(len(coordinates)):
        some = ", ".join(coordinates[:5])
        raise ValueError(f"there is no coordinate {coordinate!r}; there are: {some}, ...")
    d = coordinates.index(coordinate) if isinstance(coordinate, str) else coordinate
    names = found.tasks.names[: 5 * _MOST_TASKS]
    hidden = len(found.tasks) - len(names)
    handles = [
        legend_line(_MEANING[part], marker="o", ls="none", ms=6, color=COLOURS[colour])
        for part, colour in _PARTS.items()
    ]
    fig = titled_figure(
        9.0,
        0.8 + 0.55 * len(names),
        f"How the expected query loss follows θ0, “{coordinates[d]}”",
        "Nats per unit of θ0, ± 1 standard error. Location and probability add up to the total"
        + f"; the basins' borders are {found.borders}."
        + f" {hidden} more tasks are not shown." * (hidden > 0),
        handles,
    )
    ax = fig.subplots()
    clean_axes(ax, "x")
    ax.axvline(0, color=MUTED, lw=0.8, zorder=1)
    slots = np.arange(len(names))
    for offset, (part, colour) in zip(np.linspace(-0.27, 0.27, 4), _PARTS.items(), strict=True):
        mean, error = (
            values["loc"][: len(names), d].double().cpu().numpy()
            for values in (getattr(found, part), getattr(found, f"{part}_se"))
        )
        look: dict[str, Any] = {"color": COLOURS[colour], "lw": 1.6}
        ax.hlines(slots + offset, mean - error, mean + error, **look)
        ax.plot(mean, slots + offset, "o", ms=6, mec="white", mew=0.6, gid=part, **look)
    ax.set_yticks(slots, [plain(name) for name in names])
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=f"d E g / d {plain(coordinates[d])}")
    return fig


_MEANING = {
    "location": "location: what is found moves",
    "probability": "probability: how often it is found",
    "total": "total",
    "implicit": "implicit derivative at the minima (iMAML)",
}


def _energy_curve(ax: Axes, basins: Basins, t: int, shown: list[int]) -> None:
    name = basins.tasks.names[t]
    clean_axes(ax, "both", f"{basins.tasks.task_name} {name}")
    minima = basins.minima[shown, t, 0].double().cpu()
    ends = torch.quantile(basins.ends[:, t, 0].double().cpu(), minima.new_tensor([0.005, 0.995]))
    low, high = float(min(minima.min(), ends[0])), float(max(minima.max(), ends[1]))
    pad = 0.08 * (high - low) or float(basins.point.prior.scale[0])
    theta = torch.linspace(low - pad, high + pad, _POINTS).to(basins.minima)
    point, rows = basins.point, basins.tasks.select([t]).support
    with torch.no_grad():
        places = theta[:, None, None]
        loss = basins.density.negative_log_likelihood(places, rows, point.shared)
        energy = (loss + point.prior.penalty(places))[:, 0]
    x, y = theta.double().cpu().numpy(), energy.double().cpu().numpy()
    ax.plot(x, y, color=INK, lw=1.6, gid=f"energy:{name}")
    ax.axvline(float(point.prior.loc[0]), color=MUTED, lw=0.9, ls=":", gid="theta0")
    for k, place in zip(shown, minima.tolist(), strict=True):
        height = float(basins.energy[k, t])
        ax.plot(
            [place], [height], "o", color=COLOURS[1], ms=7, mec="white", gid=f"minimum:{name}:{k}"
        )
        text: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        ax.annotate(str(k), (place, height), fontsize=9, color=COLOURS[1], **text)
    ax.set(xlabel=plain(coordinate_names(basins.density)[0]), ylabel="energy, nats")
    ax.xaxis.set_major_locator(MaxNLocator(6))


def _most_occupied(basins: Basins, t: int) -> list[int]:
    """Basins of a task that are shown, by energy."""
    share = basins.occupation[: int(basins.count[t]), t]
    chosen: list[int] = (
        share.argsort(descending=True, stable=True)[:_MOST_BASINS].sort()[0].tolist()
    )
    return chosen


def _chosen(names: tuple[str, ...], task: str | int | None) -> list[int]:
    if task is None:
        return list(range(min(len(names), _MOST_TASKS)))
    if task in names:
        return [names.index(task)]
    if isinstance(task, int) and 0 <= task < len(names):
        return [task]
    some = ", ".join(repr(name) for name in names[:3])
    raise ValueError(f"there is no task {task!r}; there are {len(names)}: {some}, ...")
