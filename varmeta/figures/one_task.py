"""What the anchor does to one task: the pictures of Huszár's post, redrawn.

Ferenc Huszár, "Notes on iMAML: Meta-Learning with Implicit Gradients", inference.vc, 2019. Here
the penalty is ½ λ (θ − θ0)², and two readings of "the minimum" are told apart that the post draws
as one: the lowest minimum of E = f + penalty, and the one that descent from θ0 ends in.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from varmeta.figures.minima import descend, implicit_slope, jumps, lowest, stationary
from varmeta.figures.style import (
    GLOBAL,
    LOSS,
    PENALTY,
    STAR,
    SUM,
    TRACKED,
    Movie,
    broken,
    say,
    stage,
)
from varmeta.figures.toy import SPAN, Toy
from varmeta.report_style import DASHES, INK, MUTED

_SAME = 1e-6  # the two readings of the minimum agree


def anchor(
    toy: Toy | None = None,
    *,
    at: float = 0.1,
    precision: float = 1.0,
    span: tuple[float, float] = SPAN,
) -> Figure:
    """The loss, the anchor's penalty, their sum, and its lowest minimum as a star.

    Args:
        toy: one task; default `Toy()`.
        at: θ0.
        precision: λ, of the penalty ½ λ (θ − θ0)².
        span: of θ.
    """
    toy = Toy() if toy is None else toy
    fig, axes = stage(
        "An anchor picks a minimum",
        "The task's loss f has many minima. The penalty ½ λ (θ − θ0)² is added to it, and the "
        "star is the lowest point of the sum: what is learned from θ0, at best.",
    )
    ax = axes[0, 0]
    _scene(ax, toy, precision, span)
    x = np.linspace(*span, 801)
    f, penalty = toy.value(x), 0.5 * precision * (x - at) ** 2
    ax.plot(x, penalty, color=PENALTY, lw=2.4, gid="penalty")
    ax.plot(x, f + penalty, color=SUM, lw=3, gid="sum")
    star = lowest(toy, [at], precision)[0]
    height = toy.value(star) + 0.5 * precision * (star - at) ** 2
    low, high = ax.get_ylim()
    ax.plot([star, star], [low, height], color=STAR, lw=1.4, ls=DASHES)
    ax.plot(star, height, "*", color=STAR, ms=24, mec="white", mew=1.2, gid="star", zorder=8)
    ax.plot(at, low, "^", color=PENALTY, ms=16, clip_on=False, gid="anchor", zorder=8)
    room = 0.045 * (high - low)
    away = "right" if at < star else "left"
    other = "left" if at < star else "right"
    nudge = 0.1 if at < star else -0.1
    say(ax, at - nudge, low + room, "anchor θ0", PENALTY, ha=away, fontweight="bold")
    say(ax, star + nudge, low + room, "learned θ*", STAR, ha=other, fontweight="bold")
    top = high - 0.08 * (high - low)
    crests = stationary(toy, at, precision)[1]
    if len(crests):  # the name rests on a crest of E, or else leans on its left branch
        place = float(crests[np.argmin(np.abs(crests - at))])
        over = float(toy.value(place)) + 0.5 * precision * (place - at) ** 2
        say(ax, place, over + 0.04 * (high - low), "sum E", SUM, ha="center", fontsize=15)
    else:
        left = x[np.flatnonzero(f + penalty < top)[0]]
        say(ax, left - 0.1, top, "sum E", SUM, ha="right", va="top", fontsize=15)
    inside = np.flatnonzero(penalty < top)
    say(ax, x[inside[-1]] + 0.1, top, "penalty", PENALTY, va="top", fontsize=15)
    clear = min(float(f[-120:].max()), top) + 0.03 * (high - low)
    say(ax, x[-8], clear, "loss f", LOSS, ha="right", va="bottom", fontsize=15)
    return fig


def moving_anchor(
    toy: Toy | None = None,
    *,
    precision: float = 1.0,
    frames: int = 48,
    span: tuple[float, float] = SPAN,
) -> Movie:
    """The same while θ0 goes from one end of `span` to the other, with θ*(θ0) drawn below.

    Args:
        toy: one task; default `Toy()`.
        precision: λ.
        frames: how many positions of θ0.
        span: of θ and of θ0.
    """
    toy = Toy() if toy is None else toy
    anchors = np.linspace(0.94 * span[0] + 0.06 * span[1], 0.06 * span[0] + 0.94 * span[1], frames)
    stars = lowest(toy, anchors, precision)
    fine = np.linspace(anchors[0], anchors[-1], 1501)
    trail, ties = lowest(toy, fine, precision), jumps(toy, "lowest", precision, span)
    fig, axes = stage(
        "The anchor moves, and what is learned jumps",
        "Star: the lowest point of loss + penalty. Below: where it lies, against θ0.",
        2,
        height=5.8,
        sharex=True,
        height_ratios=[1.25, 1],
    )
    top, below = axes[:, 0]
    _scene(top, toy, precision, span)
    top.set_xlabel("")
    x = np.linspace(*span, 401)
    f = toy.value(x)
    (penalty,) = top.plot([], [], color=PENALTY, lw=2.4, gid="penalty")
    (total,) = top.plot([], [], color=SUM, lw=3, gid="sum")
    (foot,) = top.plot([], [], "^", color=PENALTY, ms=15, clip_on=False, gid="anchor", zorder=8)
    (star,) = top.plot([], [], "*", color=STAR, ms=22, mec="white", mew=1, gid="star", zorder=8)
    say(top, 0.985, 0.93, "loss f", LOSS, transform=top.transAxes, ha="right")
    say(top, 0.985, 0.83, "penalty", PENALTY, transform=top.transAxes, ha="right")
    say(top, 0.985, 0.73, "sum E", SUM, transform=top.transAxes, ha="right")
    below.set(xlim=span, ylim=(trail.min() - 0.5, trail.max() + 0.5))
    below.set(xlabel="anchor θ0", ylabel="learned θ*")
    (path,) = below.plot([], [], color=GLOBAL, lw=3, gid="trail")
    (now,) = below.plot([], [], "*", color=STAR, ms=20, mec="white", mew=1, zorder=8)
    low = top.get_ylim()[0]

    def draw(k: int) -> None:
        pull = 0.5 * precision * (x - anchors[k]) ** 2
        penalty.set_data(x, pull)
        total.set_data(x, f + pull)
        foot.set_data([anchors[k]], [low])
        height = toy.value(stars[k]) + 0.5 * precision * (stars[k] - anchors[k]) ** 2
        star.set_data([stars[k]], [height])
        seen = fine <= anchors[k]
        path.set_data(*broken(fine[seen], trail[seen], ties[ties < anchors[k]]))
        now.set_data([anchors[k]], [stars[k]])

    draw(0)
    return Movie(fig, frames, draw)


def minimum(
    toy: Toy | None = None, *, precision: float = 1.0, span: tuple[float, float] = SPAN
) -> Figure:
    """θ*(θ0) twice: the lowest minimum of E, and the one that descent from θ0 ends in.

    Args:
        toy: one task; default `Toy()`.
        precision: λ.
        span: of θ0.
    """
    toy = Toy() if toy is None else toy
    x = np.linspace(*span, 1601)
    best, found = lowest(toy, x, precision), descend(toy, x, precision)
    ties = jumps(toy, "lowest", precision, span)
    breaks = jumps(toy, "descent", precision, span)
    worse = float((np.abs(best - found) > _SAME).mean())
    fig, axes = stage(
        "θ*(θ0) is flat between jumps, and there are two of it",
        f"The lowest minimum of E jumps where two minima tie ({len(ties)} times here). Descent "
        "from θ0 ends in the basin it starts in, which changes where θ0 crosses a crest of E or a "
        f"minimum vanishes ({len(breaks)} times). They differ for {worse:.0%} of these θ0.",
        height=5.4,
    )
    ax = axes[0, 0]
    ax.plot(x, x, color=MUTED, lw=1.2, ls=DASHES)
    ax.plot(*broken(x, best, ties), color=GLOBAL, lw=8, alpha=0.45, gid="lowest")
    ax.plot(*broken(x, found, breaks), color=TRACKED, lw=2.8, gid="descent")
    e = 1e-7
    for positions, find, colour, gid in (
        (ties, lowest, GLOBAL, "ties"),
        (breaks, descend, TRACKED, "breaks"),
    ):
        if len(positions):
            ends = [find(toy, positions + d, precision) for d in (-e, e)]
            ax.vlines(positions, *ends, color=colour, lw=1.1, ls=(0, (2, 3)), gid=gid)
    ax.set(xlim=span, xlabel="anchor θ0", ylabel="learned θ*")
    apart = np.flatnonzero(np.abs(best - found) > _SAME)
    if len(apart):
        groups = np.split(apart, np.flatnonzero(np.diff(apart) > 1) + 1)
        longest = max(groups, key=len)
        k = longest[len(longest) // 2]
        for value, other, name, colour in (
            (found[k], best[k], "descent from θ0", TRACKED),
            (best[k], found[k], "lowest minimum", GLOBAL),
        ):
            over = value > other
            place = {"ha": "center", "va": "bottom" if over else "top"}
            say(ax, x[k], value + (0.2 if over else -0.2), name, colour, **place)
    k = 0.86 * span[1] + 0.14 * span[0]
    say(ax, k + 0.06, k - 0.06, "θ* = θ0", MUTED, ha="left", va="top", fontsize=12)
    return fig


def derivative(
    toy: Toy | None = None,
    *,
    precision: float = 1.0,
    span: tuple[float, float] = SPAN,
    points: int = 60,
    step: float = 1e-4,
) -> Figure:
    """The closed form λ / (λ + f″(θ*)) on top of differences of θ*(θ0), along descent from θ0.

    Args:
        toy: one task; default `Toy()`.
        precision: λ.
        span: of θ0.
        points: how many central differences.
        step: their half width; those that straddle a jump are left out.
    """
    toy = Toy() if toy is None else toy
    x = np.linspace(*span, 2401)
    breaks = jumps(toy, "descent", precision, span)
    formula = implicit_slope(toy, descend(toy, x, precision), precision)
    at = np.linspace(*span, points + 2)[1:-1]
    at = at[~(np.abs(at[:, None] - breaks) <= 2 * step).any(1)]
    up, down = (descend(toy, at + d, precision) for d in (step, -step))
    measured = (up - down) / (2 * step)
    error = np.abs(measured - implicit_slope(toy, descend(toy, at, precision), precision))
    fig, axes = stage(
        "Between the jumps the slope of θ* is known in closed form",
        "Line: λ / (λ + f″(θ*)), which is 1 / (1 + f″(θ*)) at λ = 1. Dots: differences of θ* over "
        f"±{step:g}. They agree to {float(f'{error.max():.1g}'):g}. At the jumps (dashed) "
        "there is no slope, and the formula does not see them.",
    )
    ax = axes[0, 0]
    for b in breaks:
        ax.axvline(b, color=MUTED, lw=1.1, ls=(0, (2, 3)))
    ax.axhline(1, color=MUTED, lw=1)
    ax.plot(*broken(x, formula, breaks), color=TRACKED, lw=3, gid="formula")
    ax.plot(at, measured, "o", color=INK, ms=5.5, mec="white", mew=0.8, gid="differences")
    top = float(np.clip(1.1 * formula.max(), 1.1, 2.2))
    ax.set(xlim=span, ylim=(0, top), xlabel="anchor θ0", ylabel="dθ*/dθ0")
    say(ax, span[1] - 0.05, 1.0, "θ* would follow θ0", MUTED, ha="right", va="bottom", fontsize=12)
    return fig


def _scene(ax: Axes, toy: Toy, precision: float, span: tuple[float, float]) -> None:
    """The loss, with room for the sum wherever the anchor is."""
    x = np.linspace(*span, 801)
    f = toy.value(x)
    best = lowest(toy, x, precision)
    sums = toy.value(best) + 0.5 * precision * (best - x) ** 2
    low, high = float(f.min()), float(max(np.quantile(f, 0.97), sums.max() + 0.5))
    ax.set(xlim=span, ylim=(low - 0.16 * (high - low), high))
    ax.set(xlabel="parameter θ", ylabel="nats")
    ax.plot(x, f, color=LOSS, lw=2.4, gid="loss")
