"""Are two solutions of a task connected? Paths of low loss between networks trained by SGD.

Each task's network is trained twice by SGD, from other weights and with other minibatches. Between
the two solutions: the loss on the straight line, on a parabola and on a polyline with one bend
(Garipov et al., 2018), and on two parabolas, the first one cut in its middle and both halves bent
again, which says whether one bend is enough. Two families of tasks, sinusoids with 20 points and
three spirals of 40 points each, for networks of several widths. What came out is told in
docs/mode-connectivity.md.

    python examples/mode_connectivity.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import varmeta as vm
from varmeta.inference.connectivity import ModePath, mode_path
from varmeta.inference.energy import TaskEnergy
from varmeta.models import network, sinusoids
from varmeta.report_paths import plot_mode_path, plot_mode_plane
from varmeta.report_style import COLOURS
from varmeta.seeds import generator

F64 = torch.float64
Setting = tuple[vm.Density, vm.Tasks, nn.Module]
KINDS = ("bezier", "polyline", "two parabolas")


def waves(count: int, width: int) -> Setting:
    """Sinusoids of any phase and amplitude, 20 points to learn from, noise 0.3."""
    draw = sinusoids(count, support=20, query=100, noise=0.3, dtype=F64)
    return setting(draw(generator(0, 1)), 1, width, 1, lambda out: dist.Normal(out[:, 0], 0.3))


def spirals(count: int, width: int, rows: int = 120, arms: int = 3) -> Setting:
    """Three arms of a spiral, turned and wound differently in each task: which is a point on?"""
    noise = generator(0, 2)
    like: Any = {"generator": noise, "dtype": F64}
    pairs = []
    for _ in range(count):
        turn, winding = (torch.rand(2, **like) * torch.tensor([2 * math.pi, 2.0])).tolist()
        arm = torch.arange(2 * rows) % arms
        radius = 0.2 + 1.8 * torch.rand(2 * rows, **like)
        angle = turn + 2 * math.pi * arm / arms + (1.5 + winding) * radius
        x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
        pairs.append((x + 0.1 * torch.randn(x.shape, **like), arm))
    tasks = vm.Tasks.from_list(pairs, task_name="spiral").split(0.5)
    return setting(tasks, 2, width, arms, lambda out: dist.Categorical(logits=out))


def setting(
    tasks: vm.Tasks, inputs: int, width: int, outputs: int, law: Callable[[Tensor], Any]
) -> Setting:
    """A tanh network with two hidden layers of this width for each of these tasks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(
            nn.Linear(inputs, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, outputs),
        ).double()
    return vm.Density(network(mlp, law), tasks), tasks, mlp


PROBLEMS: dict[str, Callable[[int, int], Setting]] = {"sinusoids": waves, "spirals": spirals}


def trained(
    density: vm.Density,
    prior: vm.GaussianPrior,
    tasks: vm.Tasks,
    module: nn.Module,
    steps: int,
    seed: int,
) -> Tensor:
    """SGD with momentum on minibatches of 10 rows of every task, `[T, D]`; weights of its own each.

    The learning rate is per row of a task and falls to 0 on a cosine.
    """
    noise = generator(seed, 3)
    spread = [
        torch.full((p.numel(),), p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5, dtype=F64)
        for p in module.parameters()
    ]
    theta = torch.cat(spread) * torch.randn(len(tasks), density.dim, generator=noise, dtype=F64)
    optimiser = torch.optim.SGD([theta.requires_grad_()], lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rows = tasks.num_rows[:, None]
    for _ in range(steps):
        part, each = tasks.minibatch(10, noise)
        at = theta.detach()
        grad = each[:, None] * TaskEnergy(density, part, density.shared_init).gradient(at)
        grad = (grad + prior.precision_mv(at - prior.loc)) / rows
        theta.grad = grad * (5 / grad.norm(dim=-1, keepdim=True)).clamp(max=1)
        optimiser.step()
        schedule.step()
    return theta.detach()


def two_parabolas(first: ModePath, steps: int) -> dict[str, Tensor]:
    """The losses along both halves, each bent again, `[2P − 1, T]`, by name."""
    given = (first.density, first.prior)
    middle = first.point(0.5)
    left = mode_path(*given, first.a, middle, first.tasks, steps=steps)
    right = mode_path(*given, middle, first.b, first.tasks, steps=steps)
    return {name: torch.cat([left.path[name], right.path[name][1:]]) for name in left.path}


def rise(losses: Tensor) -> np.ndarray:
    """By how much the highest loss exceeds that of the worse end, `[T]`."""
    return (losses.amax(0) - torch.maximum(losses[0], losses[-1])).numpy()


def study(
    names: list[str], widths: list[int], count: int, train: int, steps: int
) -> tuple[pd.DataFrame, dict[tuple[str, int], ModePath]]:
    """One row for each problem, width, kind of path and task, nats; and the parabolas."""
    rows, kept = [], {}
    runs = [(name, width) for name in names for width in widths]
    for name, width in track(runs, "problems and widths"):
        density, tasks, module = PROBLEMS[name](count, width)
        prior = vm.GaussianPrior.create(torch.zeros_like(density.prior_loc), 1.0)
        a, b = (trained(density, prior, tasks.support, module, train, seed) for seed in (1, 2))
        paths = {k: mode_path(density, prior, a, b, tasks, kind=k, steps=steps) for k in KINDS[:2]}
        kept[name, width] = paths["bezier"]
        found = {kind: path.path for kind, path in paths.items()}
        found["line"] = paths["bezier"].line
        found["two parabolas"] = two_parabolas(paths["bezier"], steps)
        for kind, losses in found.items():
            part = pd.DataFrame({"task": tasks.names, "start": losses["energy"][0].numpy()})
            part["end"] = losses["energy"][-1].numpy()
            for loss, values in losses.items():
                part[f"{loss}_barrier"] = rise(values)
            part["rows"] = tasks.support.num_rows.numpy()
            part["query_rows"] = tasks.query.num_rows.numpy()
            here = {"problem": name, "width": width, "weights": density.dim, "kind": kind}
            rows.append(part.assign(**here))
    table = pd.concat(rows, ignore_index=True)
    first = ["problem", "width", "weights", "kind", "task"]
    return table[first + [c for c in table if c not in first]], kept


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Barriers over tasks: median, least and largest of the energy's; median of the query rows'."""
    groups = found.groupby(["problem", "width", "weights", "kind"], sort=False)
    energy = groups["energy_barrier"].agg(["median", "min", "max"])
    return energy.join(groups["query_barrier"].median().rename("query median")).reset_index()


def draw(found: pd.DataFrame, kept: dict[tuple[str, int], ModePath], path: Path) -> None:
    """For each problem the plane of one task, the loss along all paths, and barriers over width."""
    names = list(found["problem"].unique())
    width = sorted(found["width"].unique())[found["width"].nunique() // 2]
    figure, axes = plt.subplots(
        len(names),
        3,
        figsize=(15.5, 4.6 * len(names)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [1.05, 1, 1]},
    )
    looks = {
        "line": (COLOURS[0], "o--"),
        "polyline": (COLOURS[2], "s-"),
        "bezier": (COLOURS[1], "D-"),
        "two parabolas": (COLOURS[3], "^-"),
    }
    for row, name in zip(axes, names, strict=True):
        plot_mode_plane(kept[name, width], 0, resolution=81, ax=row[0])
        row[0].set_title(f"{name}: the plane of one task's path, nats", loc="left", fontsize=11)
        plot_mode_path(kept[name, width], ax=row[1])
        row[1].set_title(f"all tasks, {width} hidden units a layer", loc="left", fontsize=11)
        for kind, (colour, look) in looks.items():
            groups = found[(found["problem"] == name) & (found["kind"] == kind)].groupby("width")
            middle = groups["energy_barrier"].quantile([0.25, 0.5, 0.75]).unstack()
            row[2].plot(middle.index, middle[0.5], look, color=colour, label=kind, lw=2, ms=7)
            row[2].fill_between(middle.index, middle[0.25], middle[0.75], color=colour, alpha=0.15)
        row[2].set(xscale="log", xlabel="hidden units a layer", ylabel="barrier, nats")
        row[2].set_yscale("symlog", linthresh=1)
        row[2].set_ylim(-0.1, None)
        row[2].set_xticks(sorted(found["width"].unique()), sorted(found["width"].unique()))
        row[2].minorticks_off()
        row[2].set_title("barriers: median and quartiles of tasks", loc="left", fontsize=11)
        row[2].grid(axis="y", color="#e4e4e4")
        row[2].spines[["top", "right", "left"]].set_visible(False)
        row[2].legend(frameon=False)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def main(
    problems: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(PROBLEMS),
    widths: Annotated[str, typer.Option(help="Hidden units a layer, by commas.")] = "4,8,16,32",
    tasks: Annotated[int, typer.Option(help="Tasks of each problem.")] = 6,
    train: Annotated[int, typer.Option(help="Steps of SGD.")] = 3000,
    steps: Annotated[int, typer.Option(help="Optimiser steps for the bend.")] = 1000,
    out: Annotated[Path, typer.Option(help="Folder for results.csv and the picture.")] = Path(
        "runs/mode_connectivity"
    ),
) -> None:
    """Train, connect, print the barriers; write them and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    found, kept = study(
        problems.split(","), [int(width) for width in widths.split(",")], tasks, train, steps
    )
    found.to_csv(out / "results.csv", index=False, float_format="%.6g")
    print(summary(found).to_string(index=False, float_format="{:.3f}".format))
    draw(found, kept, out / "mode-connectivity.png")


if __name__ == "__main__":
    typer.run(main)
