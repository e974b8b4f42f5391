"""The pictures of a `ModePath`: the loss along the path, and the plane that it lies in.

As in `varmeta.report`, pyplot and its global state are never touched.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from torch import Tensor

from varmeta.inference.connectivity import ModePath, losses
from varmeta.report_style import (
    COLOURS,
    DASHES,
    INK,
    clean_axes,
    legend_line,
    plain,
    titled_figure,
)

PATH, LINE = COLOURS[1], COLOURS[0]
_STEEP = 20.0  # a straight line so many times as high as the path is drawn on an asinh scale
_AT_ONCE = 64  # points of the plane that are evaluated together
_NAMES = {
    "energy": "energy",
    "support": "negative log-likelihood",
    "query": "negative log-likelihood of query rows",
}


def plot_mode_path(
    path: ModePath,
    task: int | str | None = None,
    *,
    loss: str = "energy",
    ax: Axes | None = None,
) -> Axes:
    """The loss along the path found and along the straight line, nats above the better end.

    Where the straight line is more than 20 times as high as the path, the axis is linear up to the
    path's height and logarithmic far above it.

    Args:
        path: from `mode_path`.
        task: its name or position; None for all tasks, thin, and their median.
        loss: `"energy"`, `"support"` or `"query"`.
        ax: where to draw; None for a figure of its own, `ax.figure`.

    Raises:
        ValueError: no such task or loss.

    Example:
        >>> plot_mode_path(found, loss="query").figure.savefig("path.png")  # doctest: +SKIP
    """
    _check_loss(path, loss)
    which = slice(None) if task is None else [_position(path, task)]
    t = path.t.double().cpu().numpy()
    curves = {
        name: _above(path, loss, values[loss])[:, which]
        for name, values in (("line", path.line), ("path", path.path))
    }
    looks: dict[str, dict[str, Any]] = {
        "line": {"color": LINE, "ls": DASHES},
        "path": {"color": PATH, "ls": "-"},
    }
    labels = {"line": "straight line", "path": f"path found ({_shape(path)})"}
    if ax is None:
        many = task is None and len(path.tasks) > 1
        note = "Nats above the better end." + " Thin: each task. Thick: their median." * many
        handles = [legend_line(labels[name], lw=2.4, **look) for name, look in looks.items()]
        title = "The loss between two solutions" + ("" if many else f": {_name(path, task)}")
        fig = titled_figure(7.6, 4.2, title, note, handles)
        ax = fig.add_subplot()
    clean_axes(ax, "y")
    for name, values in curves.items():
        thin: dict[str, Any] = {"lw": 0.9, "alpha": 0.45} if values.shape[1] > 1 else {"lw": 2.6}
        ax.plot(t, values, gid=f"each:{name}", zorder=2, **looks[name], **thin)
        middle = np.median(values, axis=1)
        if values.shape[1] > 1:
            ax.plot(t, middle, lw=2.8, gid=f"median:{name}", zorder=3, **looks[name])
        peak = int(middle.argmax())
        text = f"{middle[peak]:,.0f}" if middle[peak] >= 100 else f"{middle[peak]:.2g}"
        at: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
        bold: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "zorder": 5}
        ax.annotate(text, (t[peak], middle[peak]), color=looks[name]["color"], **at, **bold)
        for end in (0, -1):
            y = values[end]
            ax.plot(np.full(len(y), t[end]), y, "o", ms=6, mew=1, mec="white", color=INK, zorder=4)
    high, low = (float(curves[name].max()) for name in ("line", "path"))
    if high > _STEEP * max(low, 1.0):
        linear = max(low, 1.0)
        ax.set_yscale("asinh", linear_width=linear)
        ax.set_ylim(min(-0.1 * linear, 1.3 * min(v.min() for v in curves.values())), 2 * high)
        powers = 10.0 ** np.arange(math.ceil(math.log10(linear)), math.ceil(math.log10(high)) + 1)
        ticks = [0.0, *powers.tolist(), *(-powers).tolist()]
        bottom, top = ax.get_ylim()
        inside = [tick for tick in ticks if bottom <= tick <= top]
        ax.set_yticks(inside, [f"{tick:,g}".replace("-", "−") for tick in inside])
        ax.minorticks_off()
    else:
        ax.margins(y=0.12)
    ax.set(xlim=(-0.02, 1.02), xlabel="t, from one solution to the other")
    ax.set_ylabel(f"{_NAMES[loss]}, nats above the better end")
    return ax


def plot_mode_plane(
    path: ModePath,
    task: int | str = 0,
    *,
    loss: str = "energy",
    resolution: int = 61,
    ax: Axes | None = None,
) -> Axes:
    """The loss on the plane through both solutions and the bend, as Garipov et al. draw it.

    Axes are in prior standard deviations (the user's prior, if the path was found without one),
    along b − a and at a right angle to it, towards the bend. The path lies in this plane, the
    parabola too.

    Args:
        path: from `mode_path`.
        task: its name or position.
        loss: `"energy"`, `"support"` or `"query"`.
        resolution: points along each axis, where the loss is evaluated.
        ax: where to draw; None for a figure of its own, `ax.figure`.

    Raises:
        ValueError: no such task or loss; a bend on the straight line, which makes no plane;
            a resolution below 2.
    """
    _check_loss(path, loss)
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, got {resolution}")
    i = _position(path, task)
    scale = path.density.prior_scale if path.prior is None else path.prior.scale.detach()
    a, b, bend = (end[i] / scale for end in (path.a, path.b, path.bend))
    length, along, across = _frame(a, b, bend, path.tasks.names[i])

    def flat(theta: Tensor) -> np.ndarray:
        """`[..., D]` to `[..., 2]`, in the plane's axes."""
        offset = theta / scale - a
        return torch.stack([offset @ along, offset @ across], -1).double().cpu().numpy()

    curve, corner = flat(path.point(path.t)[:, i]), flat(path.bend[i])
    drawn = np.concatenate([curve, corner[None]])
    low, high = drawn.min(0), drawn.max(0)
    room = 0.18 * float((high - low).max())
    x, y = (np.linspace(low[k] - room, high[k] + room, resolution) for k in range(2))
    grid = torch.as_tensor(np.stack(np.meshgrid(x, y), -1)).to(a)
    theta = (a + grid[..., :1] * along + grid[..., 1:] * across) * scale
    one = path.tasks.select([i])
    parts = theta.flatten(0, 1)[:, None].split(_AT_ONCE)
    values = [losses(path.density, path.prior, part, one, path.shared)[loss] for part in parts]
    base = float(torch.minimum(path.path[loss][0, i], path.path[loss][-1, i]))
    height = (torch.cat(values).reshape(resolution, -1) - base).double().cpu().numpy()

    if ax is None:
        title = f"The plane of the path: {_name(path, task)}"
        note = f"{_NAMES[loss].capitalize()}, nats above the better end."
        handles = [
            legend_line("straight line", lw=2.2, color=INK, ls=DASHES),
            legend_line(f"path found ({_shape(path)})", lw=3, color=PATH),
            legend_line("bend φ", marker="D", ls="none", mfc="white", mec=PATH, mew=1.5, ms=6),
        ]
        ax = titled_figure(7.6, 5.6, title, note, handles).add_subplot()
    clean_axes(ax, "both")
    ax.grid(False)
    levels = _levels(height)
    norm = BoundaryNorm(levels, 256, extend="both")
    look: dict[str, Any] = {"levels": levels, "norm": norm, "extend": "both"}
    shown = np.ma.masked_invalid(height)
    ax.contourf(x, y, shown, cmap="YlGnBu_r", gid="loss", **look)
    ax.contour(x, y, shown, colors="white", linewidths=0.5, alpha=0.6, levels=levels)
    bar = ax.figure.colorbar(ScalarMappable(norm, "YlGnBu_r"), ax=ax, shrink=0.85, pad=0.02)
    bar.set_ticks(levels.tolist(), labels=[f"{level:g}" for level in levels])
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=INK)
    bar.outline.set_visible(False)
    ax.plot([0, length], [0, 0], color=INK, lw=2.2, ls=DASHES, gid="line")
    ax.plot(*curve.T, color="white", lw=5)
    ax.plot(*curve.T, color=PATH, lw=3, gid="path")
    ax.plot(*corner, "D", mfc="white", mec=PATH, mew=1.5, ms=6, gid="bend")
    ends = np.array([[0.0, 0.0], [length, 0.0]])
    ax.plot(*ends.T, "o", color=INK, mec="white", mew=1.4, ms=9, gid="ends")
    for name, at in zip("ab", ends, strict=True):
        ax.annotate(
            name,
            at,
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=11,
            fontweight="bold",
            color=INK,
            bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
        )
    ax.set(aspect="equal", xlabel="along b − a, prior sds", ylabel="towards the bend, prior sds")
    return ax


# -- numbers ---------------------------------------------------------------------------------------


def _position(path: ModePath, task: int | str) -> int:
    names = path.tasks.names
    if isinstance(task, str):
        if task not in names:
            raise ValueError(f"task: no task {task!r}; there are: {', '.join(names[:8])}")
        return names.index(task)
    if not 0 <= task < len(names):
        raise ValueError(f"task must lie between 0 and {len(names) - 1}, or be a name, got {task}")
    return task


def _name(path: ModePath, task: int | str | None) -> str:
    return plain(f"{path.tasks.task_name} {path.tasks.names[_position(path, task or 0)]}")


def _shape(path: ModePath) -> str:
    return {"bezier": "Bezier", "polyline": "polyline"}[path.kind]


def _check_loss(path: ModePath, loss: str) -> None:
    path.barrier(loss)


def _above(path: ModePath, loss: str, values: Tensor) -> np.ndarray:
    """`[P, T]`, nats above the better end."""
    ends = path.path[loss][[0, -1]].amin(0)
    return (values - ends).double().cpu().numpy()


def _frame(a: Tensor, b: Tensor, bend: Tensor, name: str) -> tuple[float, Tensor, Tensor]:
    """The distance of the ends, and two axes `[D]` at a right angle."""
    length = (b - a).norm()
    along = (b - a) / length
    offset = bend - a
    across = offset - (offset @ along) * along
    if not bool(across.norm() > 1e-6 * length):  # NaN where a is b
        raise ValueError(
            f"task {name!r}: the bend lies on the straight line from a to b, so that there is no "
            "plane through them; plot_mode_path shows the loss along it"
        )
    return float(length), along, across / across.norm()


def _levels(height: np.ndarray) -> np.ndarray:
    """Contours at 1, 2, 5, 10, …, from what is near the ends to nearly the highest, 4 to 13."""
    finite = height[np.isfinite(height)]
    high = max(float(np.quantile(finite, 0.97)), 1e-12)
    low = max(float(np.quantile(finite, 0.02)), high / 300)
    decades = np.arange(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = np.array([m * 10.0**k for k in decades for m in (1, 2, 5)])
    first, last = (int(steps.searchsorted(value)) for value in (low, high))
    first = min(first, max(last - 4, 0))
    return steps[first : last + 1]
