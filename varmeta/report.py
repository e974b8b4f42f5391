"""The pictures of a comparison, each a `matplotlib.figure.Figure` of its own.

pyplot and its global state are never touched. The colours are Okabe and Ito's, which colour-blind
readers can tell apart; markers differ too.
"""

from __future__ import annotations

import math
import re
import textwrap
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from varmeta.comparison import Comparison
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import NoPooling
from varmeta.posterior import TaskPosterior
from varmeta.seeds import generator

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
_MARKERS = ("o", "s", "^", "v", "P", "X", "h", "p", "d")
_INK, _MUTED, _GRID, _BAND, _TINT = "#222222", "#6b6b6b", "#e4e4e4", "#f6f6f6", "#e6f0f9"
_DRAWS, _NUMBERS = (
    1000,
    40_000_000,
)  # draws of a posterior, fewer if they are more numbers than that
_ONE_COLUMN, _MOST_TASKS, _MOST_COMPONENTS = 45, 160, 4
_DASHES = (0, (5, 3))


def forest(comparison: Comparison, site: str, component: int | None = None) -> Figure:
    """Every task's posterior mean and 90% interval by every strategy, most rows first.

    Training tasks come first, then new tasks on a tinted ground; a dashed line is a strategy's
    learned population mean. Of more than 160 tasks, evenly chosen ones are shown.

    Args:
        comparison: from `compare`.
        site: an adapted site.
        component: which entry of the site's flattened value; may be left out if it has only one.

    Raises:
        ValueError: no such site or component.
    """
    k = _component(comparison, site, component)
    estimates, styles = _estimates(comparison, site, k), _styles(comparison)
    names, rows, known = _tasks(comparison)
    order = np.lexsort((-estimates[comparison.reference or next(iter(estimates))][0], -rows))
    if len(order) > _MOST_TASKS:
        order = order[np.linspace(0, len(order) - 1, _MOST_TASKS).round().astype(int)]
    kind, label = comparison.train.task_name, _label(site, component)
    columns = _columns(kind, order, known, 1 if len(order) <= _ONE_COLUMN else 2)
    deep = max(len(column) for column in columns)
    low, high = _limits(estimates)
    everything = np.stack([*estimates.values()])
    cut = bool((everything < low).any() or (everything > high).any())
    some = "" if len(order) == len(names) else f" ({len(order)} of {len(names)} shown)"
    fig = _figure(
        8.6 if len(columns) == 1 else 14.0,
        0.75 + deep * max(0.26, 0.062 * len(estimates) + 0.05),
        f"{label} of each {kind}, by strategy{some}",
        "Point: posterior mean. Bar: 90% interval. Dashed line: the population mean that the "
        "strategy learned." + " Bars and hollow triangles at the edge go on beyond it." * cut,
        [
            _line(name, marker=s.get("marker"), color=s["color"], lw=1.4)
            for name, s in styles.items()
        ],
    )
    for ax, column in zip(fig.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        _clean(ax, "x")
        ax.set(xlim=(low, high), ylim=(deep - 0.4, -0.6), xlabel=label)
        for y, entry in enumerate(column):
            colour = _TINT if isinstance(entry, int) and entry >= known else _BAND
            if isinstance(entry, int) and (y % 2 or colour == _TINT):
                ax.axhspan(
                    y - 0.5, y + 0.5, color=colour, alpha=1 if y % 2 else 0.5, lw=0, zorder=0
                )
        slots = np.array([y for y, entry in enumerate(column) if isinstance(entry, int)])
        index = [entry for entry in column if isinstance(entry, int)]
        dodge = np.linspace(-0.38, 0.38, len(estimates)) if len(estimates) > 1 else np.zeros(1)
        for (name, estimate), offset in zip(estimates.items(), dodge, strict=True):
            style, y, (mean, left, right) = styles[name], slots + offset, estimate[:, index]
            centre = _centre(comparison, name, site, k)
            if centre is not None:
                ax.axvline(centre, color=style["color"], lw=0.9, ls=_DASHES, alpha=0.6, zorder=1)
            ax.hlines(y, left, right, color=style["color"], lw=1.3, gid=f"interval:{name}")
            ax.plot(mean, y, ms=4.4, mew=0, gid=f"mean:{name}", **style)
            look = style | {"ms": 5, "mfc": "white", "clip_on": False}
            for out, edge, marker in ((mean < low, low, "<"), (mean > high, high, ">")):
                if out.any():
                    ax.plot(np.full(out.sum(), edge), y[out], **look | {"marker": marker})
        _name_rows(ax, column, names, rows)
    return fig


def shrinkage(comparison: Comparison, site: str, component: int | None = None) -> Figure | None:
    """Every strategy's posterior means against those of no pooling, one panel each.

    None without an outcome of `NoPooling`, or with no other. Arguments and errors as of `forest`.
    """
    k, styles = _component(comparison, site, component), _styles(comparison)
    means = {name: e[0] for name, e in _estimates(comparison, site, k).items()}
    strategies = {name: o.fit.strategy for name, o in comparison.outcomes.items()}
    alone = next((n for n, s in strategies.items() if isinstance(s, NoPooling)), None)
    if alone is None or len(means) == 1:
        return None
    x = means.pop(alone)
    _, rows, known = _tasks(comparison)
    kind, label = comparison.train.task_name, _label(site, component)
    area = 18 * np.sqrt(rows)
    handles = [
        _line(f"no pooling: each {kind} by itself", lw=1),
        _line("learned population mean", lw=1.1, ls=_DASHES, color=_INK),
    ]
    dot = {"marker": "o", "ls": "none"}
    sizes = np.unique(np.quantile(rows, [0, 0.5, 1], method="nearest"))
    for n in sizes if len(sizes) > 1 else ():
        handles.append(_line(f"{n} row{'s' if n > 1 else ''} seen", ms=math.sqrt(18 * n**0.5), **dot))
    if comparison.new is not None:
        handles.append(_line(f"new {kind}", ms=6, mfc="none", **dot))
    fig, axes = _panels(
        len(means),
        3.1,
        f"How far each strategy pulls {label} towards the population",
        f"Each dot is a {kind}. On the solid line nothing is pulled, on the dashed line everything.",
        handles,
    )
    for ax, (name, mean) in zip(axes, means.items(), strict=True):
        colour = _title(ax, name, styles)
        ax.set(xlim=_padded(x), ylim=_padded(np.concatenate([*means.values()])))
        ax.axline((0, 0), slope=1, color=_MUTED, lw=1)
        centre = _centre(comparison, name, site, k)
        if centre is not None:
            ax.axhline(centre, color=_INK, lw=1.1, ls=_DASHES)
        solid = {"color": colour, "alpha": 0.7, "ec": "white", "lw": 0.5}
        hollow = {"fc": "none", "ec": colour, "lw": 1.2}
        for gid, part, look in (
            ("known", slice(0, known), solid),
            ("new", slice(known, None), hollow),
        ):
            ax.scatter(x[part], mean[part], area[part], gid=f"{gid}:{name}", zorder=3, **look)
        ax.set_xlabel(f"{label}, no pooling", fontsize=9)
        ax.set_ylabel(f"{label}, this strategy", fontsize=9)
        ax.label_outer()
    return fig


def training_curves(comparison: Comparison) -> Figure | None:
    """The loss of every step, one panel per strategy; of NUTS the trace of the potential energy.

    None if no strategy takes more than one step.
    """
    styles = _styles(comparison)
    fits = {n: o.fit for n, o in comparison.outcomes.items() if len(o.fit.history) > 1}
    if not fits:
        return None
    handles: list[Line2D | Patch] = [
        _line("each step", lw=0.8, alpha=0.5),
        _line("running median", lw=1.8),
    ]
    if any(isinstance(fit.strategy, PyroNUTS) for fit in fits.values()):
        handles.append(Patch(color=_GRID, label="warm-up, chain after chain"))
    fig, axes = _panels(
        len(fits),
        2.6,
        "Training, step by step",
        "Each strategy minimises an objective of its own: compare shapes, not heights. "
        "The first steps may lie outside a panel.",
        handles,
    )
    for ax, (name, fit) in zip(axes, fits.items(), strict=True):
        colour, strategy = _title(ax, name, styles), fit.strategy
        step, loss = fit.history["step"].to_numpy(), fit.history["loss"].to_numpy(dtype=float)
        settled, unit, what = step > step[-1] / 4, "step", "loss"
        if isinstance(strategy, PyroNUTS):
            unit, what = "transition", "potential energy"
            chain, position = np.divmod(step - 1, strategy.warmup + strategy.draws)
            settled = position >= strategy.warmup
            for c in np.unique(chain):
                warm = step[(chain == c) & ~settled]
                if len(warm):
                    ax.axvspan(warm[0] - 0.5, warm[-1] + 0.5, color=_GRID, lw=0, gid="warm-up")
        smooth = fit.history["loss"].rolling(max(len(loss) // 25, 1), center=True, min_periods=1)
        ax.plot(step, loss, color=colour, lw=0.8, alpha=0.5, gid=f"loss:{name}")
        ax.plot(step, smooth.median(), color=colour, lw=1.8)
        ylim = _padded(np.quantile(loss[settled] if settled.any() else loss, [0.005, 0.995]), 0.25)
        ax.set(xlim=(0, step[-1] + 1), ylim=ylim)
        ax.set_xlabel(unit, fontsize=9)
        ax.set_ylabel(f"{what}, nats per task", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return fig


def scores(comparison: Comparison) -> Figure | None:
    """Held-out log predictive density per row, and the paired difference to the best strategy.

    A pair of panels per set of tasks, the best strategy on top; None if nothing was held out.
    """
    table, styles = comparison.table.dropna(subset=["elpd"]), _styles(comparison)
    sets = [table[table["set"] == which] for which in table["set"].unique()]
    if not sets:
        return None
    heights = [0.9 + 0.33 * len(part) for part in sets]
    fig = _figure(
        12.0,
        sum(heights),
        "How well each strategy predicts rows that it has not seen",
        "Further right is better. Bars: ± 1 standard error across tasks. The differences are taken "
        "row by row, so that their own, smaller errors are what tells strategies apart.",
        [],
    )
    axes = fig.subplots(len(sets), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, part in zip(axes, sets, strict=True):
        part = part.sort_values("elpd", ascending=False, kind="stable")
        which = part["set"].iloc[0]
        for ax, column, heading in (
            (line[0], "elpd", f"{which}: log predictive density, nats per row"),
            (line[1], "elpd_diff", "difference to the best, nats per row"),
        ):
            _clean(ax, "x")
            ax.set_title(_plain(heading), loc="left", fontsize=10.5, color=_INK, fontweight="bold")
            ax.set(ylim=(len(part) - 0.5, -0.5))
            for y, row in enumerate(part.to_dict("records")):
                style, x, error = styles[row["strategy"]], row[column], row[f"{column}_se"]
                reach = np.nan_to_num(error)
                ax.hlines(y, x - reach, x + reach, color=style["color"], lw=1.8)
                gid = f"{column}:{which}:{row['strategy']}"
                ax.plot(x, y, ms=7.5, mew=0.7, mec="white", gid=gid, **style)
                text = "best" if column == "elpd_diff" and x == 0 else f"{x:.3f} ± {error:.3f}"
                ax.annotate(
                    text.replace("-", "−").replace("± nan", ""),
                    (1.015, y),
                    xycoords=ax.get_yaxis_transform(),
                    va="center",
                    fontsize=8.5,
                    color=_MUTED,
                    annotation_clip=False,
                )
            ax.set_yticks(range(len(part)), [_plain(n) for n in part["strategy"]], fontsize=9)
            ax.xaxis.set_major_locator(MaxNLocator(5))
        line[1].axvline(0, color=_MUTED, lw=0.8, zorder=1)
        line[1].tick_params(labelleft=False)
    return fig


def write_figures(comparison: Comparison, folder: str | PathLike[str]) -> list[Path]:
    """All figures as PNG files (150 dpi) in `folder`, and their paths.

    `forest_<site>` and `shrinkage_<site>` for every adapted site of one value, with the component's
    number appended for those of two to four; `training_curves` and `scores`. A file appears under
    its name only when it is complete.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(name: str, fig: Figure | None) -> None:
        path = target / (re.sub(r"[^\w.-]+", "_", name) + ".png")
        while path in written:  # two names may differ only in what a file name cannot hold
            path = path.with_stem(path.stem + "_")
        part = path.with_name(f"part_{path.name}")
        if fig is not None:
            try:
                fig.savefig(part, dpi=150, format="png")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            written.append(path)

    for site in comparison.density.sites:
        count = site.shape.numel()
        for k in range(count) if count <= _MOST_COMPONENTS else ():
            name, which = (site.name, None) if count == 1 else (f"{site.name}_{k}", k)
            write(f"forest_{name}", forest(comparison, site.name, which))
            write(f"shrinkage_{name}", shrinkage(comparison, site.name, which))
    write("training_curves", training_curves(comparison))
    write("scores", scores(comparison))
    return written


# -- numbers ----------------------------------------------------------------------------------------


def _component(comparison: Comparison, site: str, component: int | None) -> int:
    sizes = {s.name: s.shape.numel() for s in comparison.density.sites}
    if site not in sizes:
        raise ValueError(f"site: no adapted site {site!r}; there are: {', '.join(sizes)}")
    if component is None and sizes[site] > 1:
        raise ValueError(f"component: site {site!r} has {sizes[site]} of them; say which")
    if not 0 <= (component or 0) < sizes[site]:
        raise ValueError(f"component must lie between 0 and {sizes[site] - 1}, got {component}")
    return component or 0


def _estimates(comparison: Comparison, site: str, k: int) -> dict[str, np.ndarray]:
    """By strategy `[3, T]` (mean, 5%, 95%) over known, then new tasks; NaN where it has none."""
    none = np.full((3, len(comparison.new) if comparison.new is not None else 0), np.nan)
    return {
        name: np.concatenate(
            [_summary(o.known, site, k), none if o.new is None else _summary(o.new, site, k)],
            axis=1,
        )
        for name, o in comparison.outcomes.items()
    }


def _summary(posterior: TaskPosterior, site: str, k: int) -> np.ndarray:
    middle = posterior.mean
    count = int(np.clip(_NUMBERS // middle.numel(), 100, _DRAWS))
    with torch.no_grad():
        theta, _ = posterior.sample(count, generator(0, device=middle.device))
        theta = theta + (middle - theta.mean(0))  # the unconstrained mean is known: keep it exactly
        value = posterior.density.constrain(theta)[site].reshape(*theta.shape[:2], -1)[..., k]
    draws = value.double().cpu().numpy()
    return np.stack([draws.mean(0), *np.quantile(draws, [0.05, 0.95], axis=0)])


def _centre(comparison: Comparison, name: str, site: str, k: int) -> float | None:
    """The learned θ0 on the model's own scale; None where nothing was learned."""
    fit = comparison.outcomes[name].fit
    if torch.equal(fit.prior.loc, fit.state.meta.origin.loc.detach()):
        return None
    return float(comparison.density.constrain(fit.prior.loc)[site].flatten()[k])


def _tasks(comparison: Comparison) -> tuple[list[str], np.ndarray, int]:
    """Names and numbers of seen rows, known tasks first; and how many those are."""
    sets = [t for t in (comparison.train, comparison.new) if t is not None]
    rows = np.concatenate([t.support.num_rows.cpu().numpy() for t in sets])
    return [name for t in sets for name in t.names], rows, len(comparison.train)


def _limits(estimates: dict[str, np.ndarray]) -> tuple[float, float]:
    """Room for nearly all intervals; a few very wide ones must not squeeze the rest."""
    ends = np.stack([*estimates.values()])
    low, high = np.nanquantile(ends[:, 1], 0.1), np.nanquantile(ends[:, 2], 0.9)
    reach = 0.5 * (high - low)
    inside = np.array([max(np.nanmin(ends), low - reach), min(np.nanmax(ends), high + reach)])
    return _padded(inside, 0.03)


def _padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = share * (high - low) or 0.5
    return low - pad, high + pad


# -- looks ------------------------------------------------------------------------------------------


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each strategy; black for the reference."""
    others = [name for name in comparison.outcomes if name != comparison.reference]
    look = {n: (_COLOURS[i % 8], _MARKERS[i % 9]) for i, n in enumerate(others)}
    if comparison.reference is not None:
        look[comparison.reference] = ("#000000", "D")
    return {
        n: {"color": look[n][0], "marker": look[n][1], "ls": "none"} for n in comparison.outcomes
    }


def _plain(text: str) -> str:
    """Text in which no dollar sign starts a formula."""
    return text.replace("$", r"\$")


def _label(site: str, component: int | None) -> str:
    return site if component is None else f"{site}[{component}]"


def _line(label: str, **look: Any) -> Line2D:
    return Line2D([], [], **{"color": _MUTED, "label": _plain(label), **look})


def _figure(width: float, height: float, title: str, note: str, handles: list[Any]) -> Figure:
    """A figure whose panels take `height` inches below a title, a note and a legend."""
    head = textwrap.wrap(title, int(width / 0.125))
    small = textwrap.wrap(note, int(width / 0.079))
    widest = max((len(h.get_label()) for h in handles), default=0)
    across = max(int(width / (0.085 * widest + 0.6)), 1)
    below_title = 0.17 + 0.25 * len(head)
    below_note = below_title + 0.19 * len(small) + 0.05
    top = below_note + 0.22 * math.ceil(len(handles) / across) + 0.1
    total = height + top
    fig = Figure(
        figsize=(width, total),
        facecolor="white",
        layout=ConstrainedLayoutEngine(
            rect=(0, 0, 1, height / total), w_pad=0.12, h_pad=0.1, wspace=0.02
        ),
    )
    x = 0.14 / width
    for lines, y, look in (
        (head, 0.15, {"fontsize": 14, "fontweight": "bold", "color": _INK}),
        (small, below_title, {"fontsize": 9.5, "color": _MUTED}),
    ):
        fig.text(x, 1 - y / total, _plain("\n".join(lines)), va="top", linespacing=1.25, **look)
    if handles:
        fig.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(x, 1 - below_note / total),
            ncols=min(across, len(handles)),
            frameon=False,
            fontsize=9.5,
            labelcolor=_INK,
            borderpad=0,
            borderaxespad=0,
            handletextpad=0.6,
            columnspacing=1.6,
        )
    return fig


def _panels(
    count: int, height: float, title: str, note: str, handles: list[Any]
) -> tuple[Figure, list[Axes]]:
    """Small multiples, up to three in a line."""
    wide = min(count, 3)
    deep = math.ceil(count / wide)
    fig = _figure(max(0.4 + 3.7 * wide, 7.5), 0.2 + height * deep, title, note, handles)
    grid = fig.add_gridspec(deep, wide)
    return fig, [fig.add_subplot(grid[divmod(k, wide)]) for k in range(count)]


def _title(ax: Axes, name: str, styles: dict[str, dict[str, Any]]) -> str:
    """A panel named for its strategy, in the strategy's colour, which is returned."""
    _clean(ax, "both")
    colour: str = styles[name]["color"]
    ax.set_title(_plain(name), loc="left", fontsize=10.5, fontweight="bold", color=colour)
    return colour


def _clean(ax: Axes, grid: str) -> None:
    ax.set_facecolor("white")
    ax.set_axisbelow(True)
    ax.grid(True, axis=grid, color=_GRID, lw=0.7, ls="-")  # type: ignore[arg-type]
    ax.spines[:].set_visible(False)
    ax.spines["bottom"].set(visible=True, color=_MUTED, lw=0.8)
    ax.tick_params(length=0, labelsize=9, labelcolor=_INK, colors=_MUTED)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=10, color=_INK)


def _columns(kind: str, order: np.ndarray, known: int, count: int) -> list[list[str | int]]:
    """Tasks under headings, in `count` columns; a heading is repeated where a column goes on."""
    entries: list[str | int] = []
    for heading, part in ((kind, order[order < known]), (f"new {kind}", order[order >= known])):
        entries += [heading, *part.tolist()] if len(part) else []
    size = math.ceil(len(entries) / count)
    columns = [entries[start : start + size] for start in range(0, len(entries), size)]
    for left, right in pairwise(columns):
        if isinstance(left[-1], str):
            right.insert(0, left.pop())
        if isinstance(right[0], int):
            right.insert(0, next(e for e in reversed(left) if isinstance(e, str)))
    return columns


def _name_rows(ax: Axes, column: list[str | int], names: list[str], rows: np.ndarray) -> None:
    """Names as tick labels, with the number of seen rows in a column of its own beside them."""
    texts = [e if isinstance(e, str) else textwrap.shorten(names[e], 40) for e in column]
    ax.set_yticks(range(len(column)), [_plain(t) for t in texts])
    ax.tick_params(axis="y", pad=36)
    if len(column) > 25:
        ax.tick_params(axis="x", top=True, labeltop=True)
    for y, (entry, tick) in enumerate(zip(column, ax.get_yticklabels(), strict=True)):
        heading = isinstance(entry, str)
        tick.set_fontweight("bold" if heading else "normal")
        ax.annotate(
            "rows" if isinstance(entry, str) else str(rows[entry]),
            (0, y),
            xytext=(-6, 0),
            xycoords=ax.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            fontweight="bold" if heading else "normal",
            color=_MUTED,
            annotation_clip=False,
        )
