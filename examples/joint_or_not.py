"""Is joint optimisation a good idea for meta-learning? An experiment on resets.

Joint optimisation moves θ0 and every task's q_i together, so that a q_i may end where a new task,
which starts at θ0, never gets. Putting the q_i back to θ0 every R steps should mend that. For three
families of tasks (frequencies of a sine, with many minima in one dimension; sinusoids with a
network; the radon counties), point and Gaussian q, and R from every step to never, at the same
number of optimiser steps: the reachability gap of the training tasks, and the log density of
held-out rows of new tasks. Beside them the same with shifting (Shin et al., 2021), and the
amortised bounds, where every q_i is a function of θ0: by the envelope theorem for points, ABML for
Gaussians. What came out is told in docs/joint-or-not.md.

    python examples/joint_or_not.py --seeds 5
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from rich.progress import track
from scipy.stats import t as student
from torch import Tensor, nn

import varmeta as vm
from varmeta.models import network, sinusoids
from varmeta.problems import Problem, radon
from varmeta.seeds import generator

ADAPT = 100  # steps that a new task gets
PERIODS = (1, 10, 30, 100, 300)
FAMILIES = {"delta": "points", "diagonal": "Gaussians"}


def wave(x: Tensor, y: Tensor | None = None) -> Tensor:
    """y ~ N(sin(ω x), 0.3²): the likelihood of ω has many minima."""
    omega = pyro.sample("omega", dist.Normal(torch.tensor(2.0, dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(torch.sin(omega * x[:, 0]), 0.3), obs=y)


def frequencies(seed: int, tasks: int = 60, rows: int = 20) -> Problem:
    """ω_i ~ N(4, 0.5²), twice the frequency that the prior starts at; x uniform on [0, 5]."""
    noise = generator(seed, 1)
    x = 5 * torch.rand(tasks, rows, 1, generator=noise, dtype=torch.float64)
    omega = 4 + 0.5 * torch.randn(tasks, 1, generator=noise, dtype=torch.float64)
    y = torch.sin(omega * x[..., 0])
    y = y + 0.3 * torch.randn(y.shape, generator=noise, dtype=torch.float64)
    pairs = list(zip(x, y, strict=True))
    return Problem.make(wave, vm.Tasks.from_list(pairs), query=0.5, hold_out=tasks // 2, seed=seed)


def networks(seed: int, tasks: int = 60) -> Problem:
    """Sinusoids of any phase and amplitude, a network of 481 weights, 10 points to learn from."""
    drawn = sinusoids(tasks, support=10, query=10, noise=0.1)(generator(seed, 2))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = nn.Sequential(
            nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)
        )
    density = vm.Density(network(mlp, lambda out: dist.Normal(out[:, 0], 0.3)), drawn)
    train, new = drawn.hold_out(tasks // 2, seed=seed)
    return Problem(density, train, new)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "frequencies": frequencies,
    "sinusoids": networks,
    "radon": radon,
}


def strategies(problem: Problem, steps: int, adapt: int) -> dict[tuple[str, str, float], Any]:
    """By kind, family and reset period (infinite for never)."""
    out: dict[tuple[str, str, float], vm.Strategy] = {}
    for q in FAMILIES:
        plain = vm.JointVariational(q=q, steps=steps, adapt_steps=adapt, samples=4)  # type: ignore[arg-type]
        out["joint", q, np.inf] = plain
        for every in PERIODS:
            if every < steps:
                out["joint", q, every] = replace(plain, resets=vm.Reset(every))
        out["shift", q, np.inf] = replace(plain, shift=True)
        if adapt < steps:
            out["shift", q, adapt] = replace(plain, shift=True, resets=vm.Reset(adapt))
    outer = max(steps // 10, 1)
    # Newton's method would take the network minutes; this is what the joint q_i take, too.
    inner = (
        vm.NewtonCG()
        if problem.density.dim < 10
        else vm.Adam(0.02, adapt // 2, tolerance=0, clip=None)
    )
    out["amortised", "delta", np.nan] = vm.AmortisedVariational(
        q="delta", steps=outer, minimiser=inner
    )
    out["amortised", "diagonal", np.nan] = vm.ABML(
        steps=outer, natural=False, minimiser=vm.Adam(0.1, adapt // 5, tolerance=0, clip=None)
    )
    return out


def held_out(fit: vm.Fit, new: vm.Tasks, seed: int) -> float:
    """Log density per held-out row of new tasks after adapting to their support, nats."""
    rows = fit.adapt(new.support).log_predictive(new.query, 200, generator(seed, 3))
    return float(rows.sum() / new.query.mask.sum())


def study(names: Sequence[str], seeds: int, steps: int, adapt: int, results: Path) -> pd.DataFrame:
    """One row for each problem, strategy and seed; those that `results` has are not run again."""
    rows = pd.read_csv(results).to_dict("records") if results.exists() else []
    done = {(row["problem"], row["seed"]) for row in rows}
    runs = [(name, seed) for seed in range(seeds) for name in names if (name, seed) not in done]
    for name, seed in track(runs, "problems and seeds"):
        problem = PROBLEMS[name](seed)
        assert problem.new is not None
        for (kind, q, period), strategy in strategies(problem, steps, adapt).items():
            fit = vm.fit(strategy, problem.density, problem.train.support, seed=seed)
            row = {"problem": name, "kind": kind, "q": q, "period": period, "seed": seed}
            row["gap"] = np.nan
            if strategy.keeps_posteriors:
                row["gap"] = float(vm.reachability_gap(fit).mean())
            row["held_out"] = held_out(fit, problem.new, seed)
            row |= {"gradients": fit.gradients, "seconds": fit.seconds}
            rows.append(row)
        pd.DataFrame(rows).to_csv(results, index=False)
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, with half the width of their 95% intervals (Student's t).

    `gain` is the held-out density less that of the joint run without resets on the same data.
    """
    never = found[(found["kind"] == "joint") & np.isinf(found["period"])]
    base = never.set_index(["problem", "q", "seed"])["held_out"]
    found = found.join(base.rename("never"), on=["problem", "q", "seed"])
    found["gain"] = found["held_out"] - found["never"]
    groups = found.groupby(["problem", "kind", "q", "period"], sort=False, dropna=False)
    columns = ["gap", "held_out", "gain"]
    out, error = groups[columns].mean(), groups[columns].sem()
    reach = student.ppf(0.975, np.maximum(groups.size() - 1, 1))
    for column in columns:
        out[f"{column}_pm"] = error[column] * reach
    return out[[c for name in columns for c in (name, f"{name}_pm")]].reset_index()


def draw(table: pd.DataFrame, path: Path) -> None:
    """The gap, and what is gained on new tasks, over the reset period; a column per problem."""
    names = list(table["problem"].unique())
    figure, axes = plt.subplots(
        2, len(names), figsize=(4.2 * len(names), 6.4), sharex=True, squeeze=False
    )
    never, amortised = 4 * max(PERIODS), 20 * max(PERIODS)
    for column, name in enumerate(names):
        for k, (q, colour) in enumerate(zip(FAMILIES, ("C0", "C3"), strict=True)):
            part = table[(table["problem"] == name) & (table["q"] == q)]
            for row, what in enumerate(("gap", "gain")):
                for kind, marker in (("joint", "o"), ("shift", "^"), ("amortised", "s")):
                    line = part[part["kind"] == kind].sort_values("period")
                    if line[what].isna().all():
                        continue
                    at = line["period"].replace(np.inf, never).fillna(amortised)
                    axes[row, column].errorbar(
                        at * 1.12 ** (k + 0.5 * (kind == "shift")),
                        line[what],
                        yerr=line[f"{what}_pm"],
                        color=colour,
                        marker=marker,
                        linestyle="-" if kind == "joint" else "",
                        capsize=3,
                        label=f"{FAMILIES[q]}, {kind}",
                    )
        for axis in axes[:, column]:
            axis.set_xscale("log")
            ticks = [*map(str, PERIODS), "never", "amort."]
            axis.set_xticks([*PERIODS, never, amortised], ticks, fontsize=8)
            axis.minorticks_off()
            axis.set_yscale("symlog", linthresh=0.1)
            axis.axhline(0, color="grey", lw=0.8)
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("steps between two resets")
    axes[0, 0].set_ylabel("reachability gap, nats per task")
    axes[1, 0].set_ylabel("new tasks: gain over never, nats per row")
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    problems: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(PROBLEMS),
    seeds: Annotated[int, typer.Option(help="Of data, start and noise together.")] = 5,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a joint run.")] = 600,
    adapt: Annotated[int, typer.Option(help="Steps that a new task gets.")] = ADAPT,
    out: Annotated[Path, typer.Option(help="Folder for results.csv and the picture.")] = Path(
        "runs/joint_or_not"
    ),
) -> None:
    """Run the experiment, or go on with it; print the table, write it and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    table = summary(study(problems.split(","), seeds, steps, adapt, out / "results.csv"))
    print(table.to_string(float_format="{:.3f}".format))
    draw(table, out / "joint-or-not.png")


if __name__ == "__main__":
    typer.run(main)
