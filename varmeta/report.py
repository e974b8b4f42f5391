"""The pictures of a comparison, each a `matplotlib.figure.Figure` of its own.

pyplot and its global state are never touched.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from varmeta.comparison import Comparison
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import NoPooling
from varmeta.posterior import TaskPosterior
from varmeta.report_style import (
    BAND,
    DASHES,
    GRID,
    INK,
    MUTED,
    TINT,
    clean_axes,
    legend_line,
    name_rows,
    page_columns,
    panel_grid,
    plain,
    strategy_styles,
    titled_figure,
)
from varmeta.seeds import generator

_DRAWS, _NUMBERS = 1000, 40_000_000  # draws of a posterior, and how many numbers they may be
_MOST_TASKS = 160
_END: dict[str, Any] = {"marker": "o", "ms": 7, "mew": 1.5}  # of a training curve
_SMALL_CHANGE = 0.2  # nats per task that a loss panel shows at least


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
    k, label = _component(comparison, site, component)
    estimates, styles = _estimates(comparison, site, k), strategy_styles(comparison)
    names, rows, known = _tasks(comparison)
    order = np.lexsort((-estimates[comparison.reference or next(iter(estimates))][0], -rows))
    if len(order) > _MOST_TASKS:
        order = order[np.linspace(0, len(order) - 1, _MOST_TASKS).round().astype(int)]
    kind, some = comparison.train.task_name, f" ({len(order)} of {len(names)} shown)"
    columns = page_columns(kind, order, known)
    deep = max(map(len, columns))
    everything = np.stack([*estimates.values()])
    low, high = _limits(everything)
    cut = bool((everything < low).any() or (everything > high).any())
    fig = titled_figure(
        8.6 if len(columns) == 1 else 14.0,
        0.75 + deep * max(0.26, 0.062 * len(estimates) + 0.05),
        f"{label} of each {kind}, by strategy" + some * (len(order) < len(names)),
        "Point: posterior mean. Bar: 90% interval. Dashed line: the population mean that the "
        "strategy learned." + " Bars and hollow triangles at the edge go on beyond it." * cut,
        [legend_line(name, **style | {"ls": "-", "lw": 1.4}) for name, style in styles.items()],
    )
    for ax, column in zip(fig.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        clean_axes(ax, "x")
        ax.set(xlim=(low, high), ylim=(deep - 0.4, -0.6), xlabel=plain(label))
        shown = [(y, entry) for y, entry in enumerate(column) if isinstance(entry, int)]
        for y, i in shown:
            tint, shade = TINT if i >= known else BAND, 1 if y % 2 else 0.5 * (i >= known)
            ax.axhspan(y - 0.5, y + 0.5, color=tint, alpha=shade, lw=0, zorder=0)
        slots, index = np.array(shown).T
        dodge = np.linspace(-0.38, 0.38, len(estimates)) if len(estimates) > 1 else np.zeros(1)
        for (name, estimate), offset in zip(estimates.items(), dodge, strict=True):
            style, y, (mean, left, right) = styles[name], slots + offset, estimate[:, index]
            colour, centre = style["color"], _centre(comparison, name, site, k)
            if centre is not None:
                ax.axvline(centre, color=colour, lw=0.9, ls=DASHES, alpha=0.6, zorder=1)
            ax.hlines(y, left, right, color=colour, lw=1.3, gid=f"interval:{name}")
            ax.plot(mean, y, ms=4.4, mew=0, gid=f"mean:{name}", **style)
            for out, edge, marker in ((mean < low, low, "<"), (mean > high, high, ">")):
                if out.any():
                    look = style | {"marker": marker, "ms": 5, "mfc": "white", "clip_on": False}
                    ax.plot(np.full(out.sum(), edge), y[out], gid=f"beyond:{name}", **look)
        name_rows(ax, column, names, rows)
    return fig


def shrinkage(comparison: Comparison, site: str, component: int | None = None) -> Figure | None:
    """Every strategy's posterior means against those of no pooling, one panel each.

    None without an outcome of `NoPooling`, or with no other. Arguments and errors as of `forest`.
    """
    k, label = _component(comparison, site, component)
    means = {name: e[0] for name, e in _estimates(comparison, site, k).items()}
    strategies = {name: o.fit.strategy for name, o in comparison.outcomes.items()}
    alone = next((n for n, s in strategies.items() if isinstance(s, NoPooling)), None)
    if alone is None or len(means) == 1:
        return None
    x = means.pop(alone)
    _, rows, known = _tasks(comparison)
    kind, dot = comparison.train.task_name, {"marker": "o", "ls": "none"}
    unit = min(50.0, 170 / math.sqrt(rows.max()))  # a dot's area is this × √rows, in points²
    handles = [
        legend_line(f"no pooling, each {kind} by itself", lw=1),
        legend_line("learned population mean", lw=1.1, ls=DASHES, color=INK),
    ]
    sizes = sorted({rows.min(), round(math.sqrt(rows.min() * rows.max())), rows.max()})
    for n in sizes if len(sizes) > 1 else ():
        size = math.sqrt(unit * math.sqrt(n))
        handles.append(legend_line(f"{n} row{'s' if n > 1 else ''} seen", ms=size, **dot))
    if comparison.new is not None:
        handles.append(legend_line(f"new {kind}", ms=6, mfc="none", **dot))
    fig, panels = panel_grid(
        {name: style for name, style in strategy_styles(comparison).items() if name != alone},
        3.1,
        f"How far each strategy pulls “{label}” towards the population",
        f"Each dot is a {kind}. Solid line: not pulled at all. Dashed line: pulled all the way.",
        handles,
    )
    limits = _padded(np.stack([x, *means.values()]))
    for name, (ax, colour) in panels.items():
        ax.set(xlim=limits, ylim=limits)
        ax.axline((0, 0), slope=1, color=MUTED, lw=1)
        centre = _centre(comparison, name, site, k)
        if centre is not None:
            ax.axhline(centre, color=INK, lw=1.1, ls=DASHES)
        solid: dict[str, Any] = {"color": colour, "alpha": 0.7, "ec": "white", "lw": 0.5}
        hollow: dict[str, Any] = {"fc": "none", "ec": colour, "lw": 1.2}
        points = (x, means[name], unit * np.sqrt(rows))
        ax.scatter(*(v[:known] for v in points), gid=f"known:{name}", zorder=3, **solid)
        ax.scatter(*(v[known:] for v in points), gid=f"new:{name}", zorder=3, **hollow)
        ax.set(xlabel=plain(f"{label}, no pooling"), ylabel=plain(f"{label}, this strategy"))
        ax.label_outer()
    return fig


def training_curves(comparison: Comparison) -> Figure | None:
    """The loss of every step, one panel per strategy; of NUTS the trace of the potential energy.

    A dot at the end says how it ended: filled where learning converged, open where the limit of
    steps came first, none where the strategy cannot say. None if none takes more than one step.
    """
    fits = {n: o.fit for n, o in comparison.outcomes.items() if len(o.fit.history) > 1}
    if not fits:
        return None
    handles = [legend_line("each step", lw=0.8, alpha=0.5), legend_line("running median", lw=1.8)]
    ends = {name: fit.converged for name, fit in fits.items()}
    for converged, label in ((True, "converged"), (False, "stopped at its limit of steps")):
        if converged in ends.values():
            face = MUTED if converged else "white"
            handles.append(legend_line(label, ls="none", mfc=face, mec=MUTED, **_END))
    if any(isinstance(fit.strategy, PyroNUTS) for fit in fits.values()):
        handles.append(Patch(color=GRID, label="warm-up, chain after chain"))
    fig, panels = panel_grid(
        {name: style for name, style in strategy_styles(comparison).items() if name in fits},
        2.7,
        "Training, step by step",
        "Each strategy minimises an objective of its own: compare shapes, not heights. "
        "The first steps may lie outside a panel.",
        handles,
    )
    for name, (ax, colour) in panels.items():
        history, strategy = fits[name].history, fits[name].strategy
        step, loss = history["step"].to_numpy(), history["loss"].to_numpy(dtype=float)
        settled, unit, what = step > step[-1] / 4, "step", "loss"
        if isinstance(strategy, PyroNUTS):
            unit, what, period = "transition", "potential energy", strategy.warmup + strategy.draws
            settled = (step - 1) % period >= strategy.warmup
            for start in range(0, int(step[-1]), period) if strategy.warmup else ():
                end = start + strategy.warmup + 0.5
                ax.axvspan(start + 0.5, end, color=GRID, lw=0, zorder=0, gid="warm-up")
        smooth = history["loss"].rolling(len(loss) // 50 * 2 + 1, center=True, min_periods=1)
        ax.plot(step, loss, color=colour, lw=0.8, alpha=0.5, gid=f"loss:{name}")
        median = smooth.median().to_numpy()
        ax.plot(step, median, color=colour, lw=1.8)
        low, high = np.quantile(loss[settled] if settled.any() else loss, [0.005, 0.995])
        extra = max(_SMALL_CHANGE - (high - low), 0) / 2
        ax.set(xlim=(0, step[-1] + 1), ylim=_padded(np.array([low - extra, high + extra]), 0.25))
        ax.set(xlabel=unit, ylabel=f"{what}, nats per task")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if ends[name] is not None:
            end, face = np.clip(median[-1], *ax.get_ylim()), colour if ends[name] else "white"
            look = {"mfc": face, "mec": colour, "clip_on": False, "zorder": 4, **_END}
            ax.plot(step[-1], end, ls="none", gid=f"end:{name}:{ends[name]}", **look)
    return fig


def scores(comparison: Comparison) -> Figure | None:
    """Held-out log predictive density per row, and the paired difference to the best strategy.

    A pair of panels per set of tasks, the best strategy on top; None if nothing was held out.
    """
    table, styles = comparison.table.dropna(subset=["elpd"]), strategy_styles(comparison)
    endless = table[np.isneginf(table["elpd"])]["strategy"].unique()
    table = table[np.isfinite(table["elpd"])]
    sets = {which: table[table["set"] == which] for which in table["set"].unique()}
    if not sets:
        return None
    heights = [0.9 + 0.33 * len(part) for part in sets.values()]
    fig = titled_figure(
        12.0,
        sum(heights),
        "How well each strategy predicts rows that it has not seen",
        "Log predictive density: more is better. Bars: ± 1 standard error across tasks; on the "
        "right, of the difference on the same rows, which decides."
        + f" Left out, with a density of 0 on some row: {', '.join(endless)}."
        * (len(endless) > 0),
        [],
    )
    axes = fig.subplots(len(sets), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for pair, (which, part) in zip(axes, sets.items(), strict=True):
        part = part.sort_values("elpd", ascending=False, kind="stable")
        headings = (f"{which}: log density", "difference to the best")
        for ax, column, heading in zip(pair, ("elpd", "elpd_diff"), headings, strict=True):
            clean_axes(ax, "x", f"{heading}, nats per row")
            for y, row in enumerate(part.to_dict("records")):
                style, x, error = styles[row["strategy"]], row[column], row[f"{column}_se"]
                reach = np.nan_to_num(error)
                ax.hlines(y, x - reach, x + reach, color=style["color"], lw=1.8)
                gid = f"{column}:{which}:{row['strategy']}"
                ax.plot(x, y, ms=7.5, mew=0.7, mec="white", gid=gid, **style)
                text = f"{x:.3f} ± {error:.3f}".replace("-", "−").removesuffix(" ± nan")
                text = "best" if column == "elpd_diff" and x == 0 else text
                at = ax.get_yaxis_transform()
                ax.text(1.015, y, text, transform=at, va="center", fontsize=8.5, color=MUTED)
            ax.set_yticks(range(len(part)), [plain(textwrap.fill(n, 40)) for n in part["strategy"]])
            ax.set(ylim=(len(part) - 0.5, -0.5))
            ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        pair[1].axvline(0, color=MUTED, lw=0.8, zorder=1)
        pair[1].tick_params(labelleft=False)
    return fig


# -- numbers ---------------------------------------------------------------------------------------


def _component(comparison: Comparison, site: str, component: int | None) -> tuple[int, str]:
    """Position in the flattened value, and what to call it."""
    sizes = {s.name: s.shape.numel() for s in comparison.density.sites}
    if site not in sizes:
        raise ValueError(f"site: no adapted site {site!r}; there are: {', '.join(sizes)}")
    if component is None and sizes[site] > 1:
        raise ValueError(f"component: site {site!r} has {sizes[site]} of them; say which")
    if not 0 <= (component or 0) < sizes[site]:
        raise ValueError(f"component must lie between 0 and {sizes[site] - 1}, got {component}")
    return component or 0, site if component is None else f"{site}[{component}]"


def _estimates(comparison: Comparison, site: str, k: int) -> dict[str, np.ndarray]:
    """By strategy `[3, T]` (mean, 5%, 95%) over known, then new tasks; NaN where it has none."""
    none = np.full((3, 0 if comparison.new is None else len(comparison.new)), np.nan)
    out = {}
    for name, o in comparison.outcomes.items():
        new = none if o.new is None else _summary(o.new, site, k)
        out[name] = np.concatenate([_summary(o.known, site, k), new], axis=1)
    return out


def _summary(posterior: TaskPosterior, site: str, k: int) -> np.ndarray:
    middle = posterior.mean
    count = int(np.clip(_NUMBERS // middle.numel(), 100, _DRAWS))
    found = []
    with torch.no_grad():
        for block in posterior.blocks(count, generator(0, device=middle.device)):
            theta, mean = block.theta, block.posterior.mean
            theta = theta + (mean - theta.mean(0))  # the unconstrained mean is known: keep it
            value = posterior.density.constrain(theta)[site].reshape(*theta.shape[:2], -1)
            draws = value[..., k].double().cpu().numpy()
            found.append(np.stack([draws.mean(0), *np.quantile(draws, [0.05, 0.95], axis=0)]))
    return np.concatenate(found, axis=1)


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


def _limits(estimates: np.ndarray) -> tuple[float, float]:
    """Room for nearly all intervals; a few very wide ones must not squeeze the rest."""
    low, high = np.nanquantile(estimates[:, 1], 0.1), np.nanquantile(estimates[:, 2], 0.9)
    ends = np.array([low, high]) + 0.5 * (high - low) * np.array([-1, 1])
    return _padded(np.clip(ends, np.nanmin(estimates), np.nanmax(estimates)), 0.03)


def _padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = share * (high - low) or 0.5
    return low - pad, high + pad
