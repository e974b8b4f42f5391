"""Meta-training of θ0 on many tasks, from many starts, by three gradients.

Gradient descent on θ0 with iMAML's gradient (the implicit derivative at the minimum that descent
finds), with the same averaged over the minima that the random algorithm finds, and with the full
gradient of the expected loss. The gradients are exact, read off a table along θ0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from varmeta.figures.objectives import objective
from varmeta.figures.stochastic import RUN_LENGTH, STEP_SIZE, TEMPERATURE, Sweep, sweep
from varmeta.figures.style import AVERAGED, FULL, IMPLICIT, say, stage
from varmeta.figures.toy import SPAN, Array, Toy, draw_tasks
from varmeta.report_style import DASHES, INK, MUTED

METHODS = {
    "iMAML": ("implicit", IMPLICIT),
    "averaged over outcomes": ("averaged", AVERAGED),
    "full gradient": ("full", FULL),
}


@dataclass(frozen=True)
class Runs:
    """Runs of gradient descent on θ0.

    Args:
        paths: by method, θ0 after each step, `[S + 1, R]` for R starts.
        losses: by method, the mean expected loss E f(x_T) where each run ends, `[R]`, nats.
        settled: by method, the mean loss f(θ*) of noiseless descent from there, `[R]`, nats.
        best: the lowest expected loss on the table.
        table: what the gradients were read from.
    """

    paths: dict[str, Array]
    losses: dict[str, Array]
    settled: dict[str, Array]
    best: float
    table: Sweep


def train(
    tasks: Toy,
    table: Sweep,
    starts: Array,
    *,
    precision: float = 1.0,
    rate: float = 0.2,
    steps: int = 4000,
) -> Runs:
    """Gradient descent from each of `starts` by every method.

    Args:
        tasks: f_i = g_i.
        table: their objective and gradients along θ0, from `sweep`, interpolated linearly. iMAML's
            gradient, which jumps, is computed anew at 4001 θ0 between the first and the last.
        precision: λ.
        starts: θ0 at the beginning, `[R]`.
        rate: step size of the descent on θ0.
        steps: S, how many.

    Raises:
        ValueError: a start outside the table.
    """
    starts = np.asarray(starts, dtype=np.float64)
    low, high = table.anchors[[0, -1]]
    if (starts < low).any() or (starts > high).any():
        raise ValueError(f"starts must lie within the table's anchors, [{low:g}, {high:g}]")
    fine = np.linspace(low, high, 4001)
    settled_loss, implicit = (part.mean(0) for part in objective(tasks, fine, precision))
    paths = {}
    for name, (field, _) in METHODS.items():
        at, slope = table.anchors, getattr(table, field)
        if field == "implicit":
            at, slope = fine, implicit
        path = [starts]
        for _ in range(steps):
            here = path[-1]
            path.append(np.clip(here - rate * np.interp(here, at, slope), low, high))
        paths[name] = np.stack(path)
    ends = {name: path[-1] for name, path in paths.items()}
    losses = {name: np.interp(end, table.anchors, table.value) for name, end in ends.items()}
    settled = {name: np.interp(end, fine, settled_loss) for name, end in ends.items()}
    return Runs(paths, losses, settled, float(table.value.min()), table)


def training(
    toy: Toy | None = None,
    *,
    count: int = 30,
    seed: int = 0,
    starts: int = 13,
    rate: float = 0.2,
    steps: int = 4000,
    precision: float = 1.0,
    step_size: float = STEP_SIZE,
    temperature: float | Sequence[float] = TEMPERATURE,
    run_length: int = RUN_LENGTH,
    span: tuple[float, float] = SPAN,
    points: int = 69,
    table: Sweep | None = None,
) -> Figure:
    """Where each of the three gradients takes θ0, from starts along `span`.

    Args:
        toy: the task that the random ones resemble (`draw_tasks`); default `Toy()`.
        count: of tasks.
        seed: of the tasks.
        starts: how many runs of each method.
        rate: step size of the descent on θ0.
        steps: of the descent on θ0.
        precision: λ.
        step_size: η.
        temperature: τ in nats, one number or one per step.
        run_length: steps of the inner algorithm.
        span: of θ0.
        points: of the table that gradients are read from.
        table: that table, if `sweep` has already been run.
    """
    tasks = draw_tasks(count, seed, toy)
    if table is None:
        options: dict[str, Any] = {"step_size": step_size, "temperature": temperature}
        options |= {"run_length": run_length, "precision": precision}
        table = sweep(tasks, np.linspace(*span, points), **options)
    begin = np.linspace(0.96 * span[0] + 0.04 * span[1], 0.04 * span[0] + 0.96 * span[1], starts)
    runs = train(tasks, table, begin, precision=precision, rate=rate, steps=steps)
    fine = np.linspace(*span, 801)
    height = np.interp(fine, table.anchors, table.value)
    reach = float(np.ptp(table.value))
    arrived = {name: loss < runs.best + 0.02 * reach for name, loss in runs.losses.items()}
    counts = ", ".join(f"{name} {int(ok.sum())}" for name, ok in arrived.items())
    heat = f", at τ = {temperature:g}" if isinstance(temperature, float) else ""
    fig, axes = stage(
        "Which gradient gets θ0 to where learning ends well" + heat,
        f"{steps} steps of gradient descent on θ0 from each of {starts} starts. Top: the expected "
        "loss, starts (rings) and ends (dots). Below: θ0 by step. Of the runs, these end within "
        f"2% of the objective's range of its lowest point: {counts}.",
        2,
        3,
        height=7.6,
        sharex=True,
        sharey="row",
        height_ratios=[1, 1.3],
    )
    time = np.arange(steps + 1) + 1
    best = table.anchors[int(np.argmin(table.value))]
    for (name, (_, colour)), top, below in zip(METHODS.items(), *axes, strict=True):
        top.plot(fine, height, color=INK, lw=2.6, gid="objective")
        look: dict[str, Any] = {"ls": "none", "mew": 2, "zorder": 6}
        at = np.interp(begin, table.anchors, table.value)
        top.plot(begin, at, "o", ms=8, mfc="white", mec=colour, gid=f"start:{name}", **look)
        ends = runs.paths[name][-1]
        look |= {"mew": 1}
        top.plot(ends, runs.losses[name], "o", ms=12, mfc=colour, mec="white", gid="end", **look)
        top.set_title(name, fontsize=17, fontweight="bold", color=colour, loc="left")
        text = f"mean loss at the end {runs.losses[name].mean():.2f}".replace("-", "−")
        say(top, 0.97, 0.93, text, colour, transform=top.transAxes, ha="right", va="top")
        for k in range(starts):
            below.plot(runs.paths[name][:, k], time, color=colour, lw=2, alpha=0.85, gid="path")
        below.plot(ends, np.full(starts, time[-1]), "o", ms=10, mfc=colour, mec="white", **look)
        for ax in (top, below):
            ax.axvline(best, color=MUTED, lw=1.2, ls=DASHES, zorder=1)
        below.set(yscale="log", ylim=(1.6 * time[-1], 1), xlim=span, xlabel="θ0")
        below.minorticks_off()
    axes[0, 0].set_ylabel("expected loss, nats")
    axes[1, 0].set_ylabel("step of meta-training")
    return fig
