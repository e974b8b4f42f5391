"""The meta-objective of a random algorithm, its gradient, and what of it iMAML sees.

M(θ0) = E g(x_T), x_T from anchored Langevin dynamics, which Huszár (inference.vc, 2019) asks for:
θ0 moves the minima, and it changes how often each is found. Every number comes from the exact law
(`varmeta.figures.grid`); nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from varmeta.figures.grid import Chain
from varmeta.figures.minima import descend, implicit_slope, jumps, stationary
from varmeta.figures.style import (
    AVERAGED,
    FULL,
    IMPLICIT,
    LOCATION,
    PROBABILITY,
    TRACKED,
    broken,
    name_ends,
    say,
    stage,
)
from varmeta.figures.toy import SPAN, Array, Toy, draw_tasks
from varmeta.report_style import INK, MUTED

STEP_SIZE, TEMPERATURE, RUN_LENGTH = 0.05, 0.3, 60


@dataclass(frozen=True)
class Sweep:
    """Means over tasks along a line of anchors, all `[A]`; nats, and nats per unit of θ0.

    Args:
        anchors: θ0.
        value: E g(x_T), the stochastic meta-objective.
        probability: Σ_k ḡ_k ∂p_k/∂θ0, the gradient through how often each basin is found, its
            borders held fixed (moving ones grow without bound where a minimum vanishes).
        location: Σ_k p_k ∂ḡ_k/∂θ0, through where in each basin the algorithm ends, and through what
            its moving borders carry across.
        settled: g(θ*(θ0)), the deterministic meta-objective along descent from θ0.
        implicit: its slope between jumps, g′(θ*) λ / (λ + f″(θ*)): iMAML's gradient.
        averaged: Σ_k p_k g′(θ_k) λ / (λ + f″(θ_k)): the same, averaged over the minima that the
            random algorithm finds.
    """

    anchors: Array
    value: Array
    probability: Array
    location: Array
    settled: Array
    implicit: Array
    averaged: Array

    @property
    def full(self) -> Array:
        """dE g(x_T)/dθ0, both mechanisms."""
        return self.probability + self.location


def sweep(
    tasks: Toy,
    anchors: Array,
    query: Toy | None = None,
    *,
    precision: float = 1.0,
    step_size: float = STEP_SIZE,
    temperature: float | Sequence[float] = TEMPERATURE,
    run_length: int = RUN_LENGTH,
) -> Sweep:
    """The exact objectives and gradients along `anchors`.

    A particle belongs to the minimum that descent on E at θ0 ends in: basins are the intervals
    between the maxima of E.

    Args:
        tasks: f, one task or T.
        anchors: θ0, `[A]`.
        query: g, as many tasks; default f, as in the post.
        precision: λ.
        step_size: η.
        temperature: τ in nats, one number or one per step.
        run_length: steps of the algorithm.
    """
    anchors = np.asarray(anchors, dtype=np.float64)
    query = tasks if query is None else query
    some, ask = (list(toys) if np.ndim(toys.bowl) else [toys] for toys in (tasks, query))
    rows = []
    for f, g in zip(some, ask, strict=True):
        chain = Chain(f.slope, step_size, temperature, run_length, precision, f.curvature)
        settled = descend(f, anchors, precision)
        implicit = g.slope(settled) * implicit_slope(f, settled, precision)
        for k, anchor in enumerate(anchors):
            minima, edges = stationary(f, float(anchor), precision)
            split = chain.law(float(anchor), f.limits, resolution=2.0).mechanisms(g.value, edges)
            slopes = g.slope(minima) * implicit_slope(f, minima, precision)
            parts = (split.p @ split.mean, split.probability.sum(), split.location.sum())
            rows.append([*parts, g.value(settled[k]), implicit[k], split.p @ slopes])
    means = np.array(rows).reshape(len(some), len(anchors), -1).mean(0)
    return Sweep(anchors, *means.T)


def stochastic_objective(
    toy: Toy | None = None,
    *,
    temperatures: Sequence[float] = (0.05, 0.2, 0.6),
    precision: float = 1.0,
    step_size: float = STEP_SIZE,
    run_length: int = RUN_LENGTH,
    span: tuple[float, float] = SPAN,
    points: int = 121,
) -> Figure:
    """E f(x_T) at several temperatures, on top of the deterministic f(θ*(θ0)).

    Args:
        toy: one task; default `Toy()`.
        temperatures: τ, in nats.
        precision: λ.
        step_size: η.
        run_length: steps of the algorithm.
        span: of θ0.
        points: how many θ0.
    """
    toy = Toy() if toy is None else toy
    x, fine = np.linspace(*span, points), np.linspace(*span, 1601)
    at = jumps(toy, "descent", precision, span)
    fig, axes = stage(
        "Noise turns cliffs into slopes",
        f"Expected loss after {run_length} steps of anchored Langevin dynamics from θ0, at "
        "temperature τ, computed exactly; beside it the loss where descent without noise ends.",
        height=5.4,
    )
    ax = axes[0, 0]
    settled = toy.value(descend(toy, fine, precision))
    ax.plot(*broken(fine, settled, at), color=TRACKED, lw=3, gid="settled")
    ends = [("no noise", settled[-1], TRACKED)]
    shades = matplotlib.colormaps["plasma"](np.linspace(0.3, 0.78, len(temperatures)))
    for tau, shade in zip(temperatures, shades, strict=True):
        chain = Chain(toy.slope, step_size, tau, run_length, precision, toy.curvature)
        laws = chain.laws(x, toy.limits, resolution=2.0)
        values = np.array([law.expectation(toy.value) for law in laws])
        colour = matplotlib.colors.to_hex(shade)
        ax.plot(x, values, color=colour, lw=3, gid=f"temperature:{tau:g}")
        ends.append((f"τ = {tau:g}", values[-1], colour))
    ax.set(xlim=span, xlabel="anchor θ0", ylabel="expected loss, nats")
    name_ends(ax, ends, fontsize=14)
    return fig


def mechanisms(
    toy: Toy | None = None,
    query: Toy | None = None,
    *,
    precision: float = 1.0,
    step_size: float = STEP_SIZE,
    temperature: float | Sequence[float] = TEMPERATURE,
    run_length: int = RUN_LENGTH,
    span: tuple[float, float] = SPAN,
    points: int = 161,
) -> Figure:
    """The law of x_T against θ0, and the gradient of E g(x_T) as a stack of its two parts.

    Args:
        toy: f, one task; default `Toy()`.
        query: g; default f.
        precision: λ.
        step_size: η.
        temperature: τ in nats, one number or one per step.
        run_length: steps of the algorithm.
        span: of θ0.
        points: how many θ0.
    """
    toy = Toy() if toy is None else toy
    options: dict[str, Any] = {"step_size": step_size, "temperature": temperature}
    options |= {"run_length": run_length, "precision": precision}
    x, theta = np.linspace(*span, points), np.linspace(span[0] - 0.6, span[1] + 0.6, 241)
    found = sweep(toy, x, query, **options)
    laws = Chain(toy.slope, **options, curvature=toy.curvature).laws(x, toy.limits, 2.0)
    density = np.stack([law.density(theta)[0] for law in laws], axis=1)
    share = np.abs(found.location).mean() / (
        np.abs(found.location).mean() + np.abs(found.probability).mean()
    )
    fig, axes = stage(
        "θ0 moves what is found, and changes how often",
        f"Top: the law of the result against θ0 (darker: likelier), with the minima that it can "
        "end in. Below: the gradient of the expected loss. How often each basin, its borders "
        f"fixed, is found makes up {1 - share:.0%} of it in mean size; iMAML leaves that out.",
        2,
        height=7.0,
        sharex=True,
        height_ratios=[1, 1.2],
    )
    top, below = axes[:, 0]
    top.grid(False)
    top.imshow(
        np.sqrt(density),  # a square root shows wells that are rarely found
        origin="lower",
        extent=(*span, theta[0], theta[-1]),
        aspect="auto",
        cmap="Greys",
        vmax=1.3 * float(np.sqrt(density.max())),
        gid="law",
    )
    for anchor in x:
        minima = stationary(toy, float(anchor), precision)[0]
        at = np.full(len(minima), anchor)
        top.plot(at, minima, ".", color=LOCATION, ms=3.2, gid="minima")
    top.set(ylim=(theta[0], theta[-1]), ylabel="result x_T")
    _stack(below, x, {"location": found.location, "probability": found.probability})
    below.plot(x, found.full, color=INK, lw=3, gid="total")
    below.axhline(0, color=MUTED, lw=1)
    below.set(xlim=span, xlabel="anchor θ0", ylabel="nats per unit of θ0")
    place = 0.0
    for text, colour in (
        ("total", INK),
        ("= where each basin's results lie", LOCATION),
        ("+ how often each is found", PROBABILITY),
    ):
        look = {"transform": below.transAxes, "fontsize": 14, "fontweight": "bold"}
        say(below, place, 1.03, text, colour, **look)
        place += 0.0127 * len(text) + 0.025
    return fig


def gradients(
    toy: Toy | None = None,
    query: Toy | None = None,
    *,
    count: int = 30,
    seed: int = 0,
    precision: float = 1.0,
    step_size: float = STEP_SIZE,
    temperature: float | Sequence[float] = TEMPERATURE,
    run_length: int = RUN_LENGTH,
    span: tuple[float, float] = SPAN,
    points: int = 69,
    many: Sweep | None = None,
) -> Figure:
    """iMAML's gradient, the same averaged over random outcomes, and the full one.

    Args:
        toy: f of one task, which the many resemble; default `Toy()`.
        query: g of that one task; default f. The many tasks have g = f.
        count: how many tasks in the lower panel (`draw_tasks`).
        seed: of the tasks.
        precision: λ.
        step_size: η.
        temperature: τ in nats, one number or one per step.
        run_length: steps of the algorithm.
        span: of θ0.
        points: how many θ0.
        many: the lower panel's numbers, if `sweep` has already been run.
    """
    toy = Toy() if toy is None else toy
    options: dict[str, Any] = {"step_size": step_size, "temperature": temperature}
    options |= {"run_length": run_length, "precision": precision}
    x = np.linspace(*span, points)
    one = sweep(toy, x, query, **options)
    many = sweep(draw_tasks(count, seed, toy), x, **options) if many is None else many
    sizes = [float(np.abs(g).mean()) for g in (many.implicit, many.averaged, many.full)]
    fig, axes = stage(
        "iMAML's gradient beside that of the expected loss",
        f"In mean size, over {len(many.anchors)} θ0, the implicit derivative at the minimum that "
        f"descent finds is {sizes[0] / sizes[2]:.0%} of the full gradient of many tasks; averaged "
        f"over the minima that the random algorithm finds, {sizes[1] / sizes[2]:.0%}.",
        2,
        height=7.0,
        sharex=True,
    )
    fine = np.linspace(*span, 1601)
    cliffs = jumps(toy, "descent", precision, span)
    minima = descend(toy, fine, precision)
    slopes = (toy if query is None else query).slope(minima)
    implicit = slopes * implicit_slope(toy, minima, precision)
    for ax, found, title in zip(axes[:, 0], (one, many), ("one task", "many tasks"), strict=True):
        ax.axhline(0, color=MUTED, lw=1)
        ends = []
        for name, values, colour, wide in (
            ("full", found.full, FULL, 3.4),
            ("averaged", found.averaged, AVERAGED, 2.6),
            ("iMAML", found.implicit, IMPLICIT, 2.6),
        ):
            line = (found.anchors, values)
            if ax is axes[0, 0] and name == "iMAML":
                line = broken(fine, implicit, cliffs)
            ax.plot(*line, color=colour, lw=wide, gid=name)
            ends.append((name, values[-1], colour))
        ax.set(xlim=span, ylabel="nats per unit of θ0")
        ax.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK)
        name_ends(ax, ends, gap=0.1)
    axes[1, 0].set_xlabel("anchor θ0")
    return fig


def _stack(ax: Axes, x: Array, parts: dict[str, Array]) -> None:
    """Areas on one another, those below zero hanging from it."""
    colours = {"location": LOCATION, "probability": PROBABILITY}
    up, down = np.zeros_like(x), np.zeros_like(x)
    for name, part in parts.items():
        for base, piece in ((up, np.maximum(part, 0)), (down, np.minimum(part, 0))):
            look: dict[str, Any] = {"color": colours[name], "alpha": 0.75, "lw": 0}
            ax.fill_between(x, base, base + piece, gid=name, **look)
            base += piece
