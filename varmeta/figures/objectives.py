"""The deterministic meta-objective g(θ*(θ0)): of one task, and the mean over many.

Huszár (inference.vc, 2019) draws it for one task, with g = f, and expects the sum over tasks to be
smoother. It is. What iMAML follows, though, is the mean of the tasks' slopes, and the slope of one
task does not see its jumps, which are what the smooth mean is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from varmeta.figures.minima import descend, implicit_slope, jumps, lowest
from varmeta.figures.style import (
    GLOBAL,
    IMPLICIT,
    PROBABILITY,
    TRACKED,
    broken,
    name_ends,
    say,
    stage,
)
from varmeta.figures.toy import SPAN, Array, Toy, draw_tasks
from varmeta.report_style import DASHES, INK, MUTED


def objective(tasks: Toy, anchors: Array, precision: float = 1.0) -> tuple[Array, Array]:
    """f(θ*(θ0)) along descent from θ0, and iMAML's gradient f′(θ*) λ / (λ + f″(θ*)).

    Args:
        tasks: one task or T tasks.
        anchors: θ0, `[A]`.
        precision: λ.

    Returns:
        `[A]` or `[T, A]` both; nats, and nats per unit of θ0.
    """
    minima = descend(tasks, anchors, precision)
    return tasks.value(minima), tasks.slope(minima) * implicit_slope(tasks, minima, precision)


def meta_objective(
    toy: Toy | None = None, *, precision: float = 1.0, span: tuple[float, float] = SPAN
) -> Figure:
    """f(θ*(θ0)) of one task, with its kinks and jumps, for both readings of the minimum.

    Args:
        toy: one task; default `Toy()`.
        precision: λ.
        span: of θ0.
    """
    toy = Toy() if toy is None else toy
    x = np.linspace(*span, 1601)
    fig, axes = stage(
        "One task's meta-objective is basins, joined by cliffs",
        "Loss where learning ends, f(θ*(θ0)); grey: f at θ0 itself, before learning. A slope "
        "within a basin leads to that basin's bottom, whatever lies beyond.",
    )
    ax = axes[0, 0]
    ax.plot(x, toy.value(x), color=MUTED, lw=1.4, ls=DASHES, gid="before")
    heights = []
    for find, which, colour, wide in (
        (lowest, "lowest", GLOBAL, 8.0),
        (descend, "descent", TRACKED, 3.0),
    ):
        at = jumps(toy, which, precision, span)
        after = toy.value(find(toy, x, precision))
        look = {"alpha": 0.45} if which == "lowest" else {}
        ax.plot(*broken(x, after, at), color=colour, lw=wide, gid=which, **look)
        if len(at):
            sides = [toy.value(find(toy, at + d, precision)) for d in (-1e-7, 1e-7)]
            ax.vlines(at, *sides, color=colour, lw=1.1, ls=(0, (2, 3)))
        heights.append(after)
    apart = np.flatnonzero(np.abs(heights[0] - heights[1]) > 0.05)
    low, high = min(h.min() for h in heights), max(h.max() for h in heights)
    room = high - low
    ax.set(xlim=span, ylim=(low - 0.15 * room, high + 0.35 * room))
    ax.set(xlabel="anchor θ0", ylabel="f(θ*), nats")
    if len(apart):
        groups = np.split(apart, np.flatnonzero(np.diff(apart) > 1) + 1)
        longest = max(groups, key=len)
        k = longest[len(longest) // 2]
        names = (("lowest minimum", GLOBAL), ("descent from θ0", TRACKED))
        for (name, colour), mine, other in zip(names, heights, heights[::-1], strict=True):
            over = mine[k] > other[k]
            place = {"ha": "center", "va": "bottom" if over else "top"}
            say(ax, x[k], mine[k] + (0.05 if over else -0.06) * room, name, colour, **place)
    return fig


def many_tasks(
    toy: Toy | None = None,
    *,
    counts: Sequence[int] = (1, 5, 50, 500),
    precision: float = 1.0,
    seed: int = 0,
    span: tuple[float, float] = SPAN,
    points: int = 500,
) -> Figure:
    """The mean of f_i(θ_i*(θ0)) over more and more random tasks.

    Args:
        toy: the task that the random ones resemble (`draw_tasks`); default `Toy()`.
        counts: numbers of tasks, one panel each; a smaller set is the beginning of a larger.
        precision: λ.
        seed: of the tasks.
        span: of θ0.
        points: how many θ0.
    """
    tasks, x = draw_tasks(max(counts), seed, toy), np.linspace(*span, points)
    each = objective(tasks, x, precision)[0]
    means = [each[:count].mean(0) for count in counts]
    fig, axes = stage(
        "Sum enough ugly functions, and the sum is smooth",
        "Mean over random tasks of the loss where descent from θ0 ends. The largest cliff, between "
        f"θ0 that lie {x[1] - x[0]:.2f} apart, is written in each panel.",
        1,
        len(counts),
        height=4.0,
        sharey=True,
    )
    for ax, count, mean in zip(axes[0], counts, means, strict=True):
        ax.plot(x, mean, color=TRACKED, lw=2.8, gid=f"mean:{count}")
        ax.set_title(f"{count} task{'s' if count > 1 else ''}", fontsize=15, color=INK, loc="left")
        ax.set(xlim=span, xlabel="anchor θ0")
        text = f"cliff {np.abs(np.diff(mean)).max():.2f}"
        say(ax, 0.96, 0.94, text, MUTED, transform=ax.transAxes, ha="right", va="top", fontsize=12)
    axes[0, 0].set_ylabel("mean f_i(θ*_i), nats")
    return fig


def smooth_but(
    toy: Toy | None = None,
    *,
    count: int = 500,
    precision: float = 1.0,
    seed: int = 0,
    window: float = 0.25,
    span: tuple[float, float] = SPAN,
    points: int = 1000,
) -> Figure:
    """The slope of the mean over many tasks, split into what iMAML sees and the jumps.

    Over a window of θ0 the mean rises by the integral of the tasks' slopes, plus the jumps in it.
    The first, divided by the window, is iMAML's gradient; the second is what it lacks.

    Args:
        toy: the task that the random ones resemble (`draw_tasks`); default `Toy()`.
        count: of tasks.
        precision: λ.
        seed: of the tasks.
        window: of θ0, over which slopes are averaged.
        span: of θ0.
        points: how many θ0.
    """
    tasks, x = draw_tasks(count, seed, toy), np.linspace(*span, points)
    each, implicit = objective(tasks, x, precision)
    mean, slope = each.mean(0), implicit.mean(0)
    wide = max(round(window / (x[1] - x[0]) / 2), 1)
    integral = np.concatenate([[0.0], np.cumsum(0.5 * (slope[1:] + slope[:-1]))]) * (x[1] - x[0])
    middle, across = x[wide:-wide], x[2 * wide :] - x[: -2 * wide]
    rise = (mean[2 * wide :] - mean[: -2 * wide]) / across
    seen = (integral[2 * wide :] - integral[: -2 * wide]) / across
    share = np.abs(seen).mean() / np.abs(rise).mean()
    fig, axes = stage(
        "Smooth at last, but its slope is not the mean of the slopes",
        f"Top: the mean over {count} tasks. Below: its slope over windows of {window:g}, what "
        "iMAML averages over the same window, and the difference, the tasks' jumps. In mean size "
        f"iMAML's gradient is {share:.0%} of the slope.",
        2,
        height=6.6,
        sharex=True,
        height_ratios=[1, 1.35],
    )
    top, below = axes[:, 0]
    top.plot(x, mean, color=INK, lw=2.8, gid="mean")
    top.set(xlim=span, ylabel="mean f_i(θ*_i), nats")
    below.axhline(0, color=MUTED, lw=1)
    below.plot(middle, rise - seen, color=PROBABILITY, lw=2.2, gid="jumps")
    below.plot(middle, seen, color=IMPLICIT, lw=2.8, gid="implicit")
    below.plot(middle, rise, color=INK, lw=2.8, gid="slope")
    below.set(xlabel="anchor θ0", ylabel="nats per unit of θ0")
    ends = [("slope", rise[-1], INK), ("jumps", (rise - seen)[-1], PROBABILITY)]
    name_ends(below, [*ends, ("iMAML", seen[-1], IMPLICIT)])
    bottom = x[np.argmin(mean)]
    for ax in (top, below):
        ax.axvline(bottom, color=MUTED, lw=1.1, ls=DASHES)
    signs = np.flatnonzero((seen[:-1] < 0) & (seen[1:] >= 0))
    stuck = middle[signs][np.abs(middle[signs] - bottom) > 2 * window]
    below.plot(stuck, np.zeros(len(stuck)), "o", ms=9, mfc="white", mec=IMPLICIT, mew=2.5)
    top.plot(stuck, np.interp(stuck, x, mean), "o", ms=10, mfc="white", mec=IMPLICIT, mew=2.5)
    for place in stuck:
        height = float(np.interp(place, x, mean)) + 0.1 * np.ptp(mean)
        say(top, place, height, "iMAML stops here", IMPLICIT, va="bottom", fontweight="bold")
    return fig
