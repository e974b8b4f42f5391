"""Which modules adapt: two problems with planted scales (Chen et al., 2019).

Are the scales that were planted found again, by each strategy and with each stand-in for the
inverse? And does a prior learned with few rows per task let it adapt for as long as it likes, where
MAML and Reptile overfit? What came out is told in docs/shrinkage.md.

    python examples/shrinkage.py --seeds 5 --problems linear

The recovery takes some 7 minutes a seed for spiral-500 and half an hour for spiral.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from rich.progress import track
from scipy.stats import t as student
from torch import Tensor

import varmeta as vm
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.minimise import Minimiser, Minimum
from varmeta.inference.prox import prox
from varmeta.models import PlantedModules, linear_modules, spiral_modules
from varmeta.seeds import generator

TUNING = 100  # the seed on which step sizes were chosen, which no result uses
NEW = 200  # new tasks of a curve


@dataclass(frozen=True)
class Problem:
    """What was chosen for a problem; `step` is η for a single row."""

    draw: Callable[..., PlantedModules]
    rows: dict[str, int]  # of the recovery
    batch: int
    minimiser: Minimiser | None  # of σ-iMAML and σ-Reptile; None for their default
    step: float


PROBLEMS = {
    "linear": Problem(linear_modules, {"support": 3, "query": 9, "splits": 4}, 1000, None, 1.5),
    "spiral": Problem(
        spiral_modules,
        {"support": 4, "query": 8, "splits": 3},
        1000,
        vm.LBFGS(max_iterations=25),  # of the curves; the recovery has `Lowest`
        0.3,
    ),
}
FEW = {"support": 1, "query": 10}  # rows of the curves
SOLVERS: dict[str, Any] = {
    "BlockDiagonal": vm.BlockDiagonal(),
    "Diagonal": vm.Diagonal(),
    "PriorDominated": vm.PriorDominated(),
}


@dataclass(frozen=True, eq=False)
class Lowest:
    """Newton-CG from the best pair of a grid in each module of the spiral: the global minimum.

    Modules do not interact in E, so that a grid in two dimensions, for one module at a time, does.

    Attributes:
        problem: whose `readings` and noise.
        side: the grid's, on both axes.
        polish: what goes on from there.
    """

    problem: PlantedModules
    side: Tensor = field(default_factory=lambda: torch.arange(-26, 26.1, 0.7, dtype=torch.float64))
    polish: Minimiser = field(
        default_factory=lambda: vm.NewtonCG(
            max_iterations=10, solver=vm.CG(max_iterations=20, preconditioner=vm.PriorDominated())
        )
    )

    def minimise(self, energy: TaskEnergy, start: Tensor) -> Minimum:
        """See `Minimiser.minimise`; the start is not used."""
        assert energy.prior is not None
        grid = torch.cartesian_prod(self.side, self.side)  # [K, 2]
        rest = grid.new_zeros(len(grid), len(self.problem.loc) - 2)
        read = self.problem.readings(torch.cat([grid, rest], -1))[:, :2]
        seen = energy.tasks.mask.to(grid).unsqueeze(-1)
        rows, total = seen.sum(1), (energy.tasks.targets * seen).sum(1)  # [T, 1], [T, 20]
        best = []
        with torch.no_grad():
            for pair in torch.arange(len(self.problem.loc)).split(2):
                variance = self.problem.noise[pair[0]] ** 2
                fit = (rows * (read**2).sum(-1) / 2 - total[:, pair] @ read.T) / variance
                away = (grid - energy.prior.loc[pair]) / energy.prior.scale[pair]
                best.append(grid[(fit + (away**2).sum(-1) / 2).argmin(1)])
        return self.polish.minimise(energy, torch.cat(best, -1))


@dataclass(frozen=True)
class MostLikely:
    """Newton-CG from the most likely θ of a spiral, where a row says enough of each pair.

    Attributes:
        polish: what goes on from there.
    """

    polish: Minimiser = field(default_factory=lambda: vm.SigmaIMAML().minimiser)

    def minimise(self, energy: TaskEnergy, start: Tensor) -> Minimum:
        """See `Minimiser.minimise`; the start is not used."""
        seen = energy.tasks.mask.to(start).unsqueeze(-1)
        pairs = ((energy.tasks.targets * seen).sum(1) / seen.sum(1)).unflatten(-1, (-1, 2))
        angle = -torch.pi / 5 * pairs.norm(dim=-1)  # a reading is as long as the pair: turn it back
        cos, sin = angle.cos(), angle.sin()
        first, second = pairs.unbind(-1)
        back = torch.stack([cos * first - sin * second, sin * first + cos * second], -1)
        return self.polish.minimise(energy, back.flatten(-2))


# As the spiral, each row the mean of 500 readings: for the recovery alone.
PROBLEMS["spiral-500"] = replace(
    PROBLEMS["spiral"],
    draw=partial(spiral_modules, readings_per_row=500),
    rows={"support": 1, "query": 7, "splits": 8},
    minimiser=MostLikely(),
)


def sigma(
    problem: Problem, support: int, steps: int, long: int = 50, rate: float = 0.1
) -> dict[str, vm.SigmaIMAML]:
    """The strategies that learn scales, by name."""
    common: dict[str, Any] = {"steps": steps, "learning_rate": rate, "posterior_kind": "delta"}
    inner = common if problem.minimiser is None else common | {"minimiser": problem.minimiser}
    descent = vm.ProximalDescent(
        problem.step / support, long, tolerance=0, momentum=0.6, reduction="sum", clip=None
    )
    return {
        "SigmaIMAML": vm.SigmaIMAML(**inner),
        **{k: vm.SigmaIMAML(adjoint=vm.Implicit(s), **inner) for k, s in SOLVERS.items()},
        "SigmaMAML": vm.SigmaMAML(minimiser=descent, **common),
        "SigmaReptile": vm.SigmaReptile(**inner),
    }


def plain(problem: Problem, support: int, steps: int, long: int = 50) -> dict[str, vm.Strategy]:
    """MAML and Reptile with a short inner budget and a long one, by name."""
    out: dict[str, vm.Strategy] = {}
    for count in (5, long):
        descent = vm.GradientDescent(
            problem.step / support, count, tolerance=0, reduction="sum", clip=None
        )
        out[f"MAML, {count} steps"] = vm.MAML(
            steps=steps, learning_rate=0.1, minimiser=descent, checkpoint=10
        )
        # Reptile learns from all rows of a task, and f is their sum.
        both = replace(descent, step_size=problem.step / (support + FEW["query"]))
        out[f"Reptile, {count} steps"] = vm.Reptile(steps=steps, minimiser=both)
    return out


@cache
def density_of(name: str, rows: tuple[tuple[str, int], ...]) -> vm.Density:
    """The model, one for all seeds: what it has compiled is used again."""
    planted = PROBLEMS[name].draw(2, **dict(rows))
    return vm.Density(planted.model, planted(generator(0)))


def learn(
    strategy: vm.Strategy, density: vm.Density, tasks: vm.Tasks, batch: int, seed: int
) -> vm.Fit:
    """A fit from the model's own prior, with no belief about θ0 and scales."""
    prior = vm.GaussianPrior.from_density(density, hyperprior=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a spiral's descents end where they end
        size = min(batch, len(tasks))
        return vm.fit(
            strategy, density, tasks, prior=prior, batch_size=size, seed=seed, progress=False
        )


# -- recovery --------------------------------------------------------------------------------------


def slope(
    strategy: vm.SigmaIMAML, density: vm.Density, prior: vm.GaussianPrior, tasks: vm.Tasks
) -> Tensor:
    """Gradient of the mean query loss in the log scales, `[M]`."""
    log_scale = prior.log_scale.detach().clone().requires_grad_()
    at = prior.moved(prior.loc.detach().clone().requires_grad_(), log_scale, None)
    losses, _ = strategy.losses(density, at, density.shared_init, tasks)
    return torch.autograd.grad(losses.mean(), log_scale)[0]


def recovery(name: str, seed: int, steps: int, count: int) -> Iterator[dict[str, Any]]:
    """A row for each strategy: scales against the planted ones, and the error of its gradient."""
    problem = PROBLEMS[name]
    planted = problem.draw(count, **problem.rows)
    tasks = planted(generator(seed))
    density = density_of(name, tuple(problem.rows.items()))
    start = vm.GaussianPrior.from_density(density, hyperprior=False)
    truth = start.moved(planted.loc, planted.scales.log(), None)
    some = tasks.select(range(min(100, count)))
    if name == "spiral":
        problem = replace(problem, minimiser=Lowest(planted))
    arms = sigma(problem, planted.support, 3 * steps // 2, rate=0.15)
    exact = {k: slope(arms["SigmaIMAML"], density, p, some) for k, p in places(start, truth)}
    if name == "spiral":  # whose modules do not interact, and whose unrolled steps do not arrive
        del arms["BlockDiagonal"], arms["SigmaMAML"]
        arms["SigmaIMAML as it is"] = replace(
            arms["SigmaIMAML"], minimiser=vm.SigmaIMAML().minimiser
        )
    if name == "spiral-500":
        arms = {
            "θ0 joint": replace(arms["SigmaIMAML"], loc_from="joint", steps=7 * steps // 2),
        }
    for arm, strategy in arms.items():
        try:
            fit = learn(strategy, density, tasks, problem.batch, seed)
        except vm.NonFiniteLoss:
            continue  # unrolled steps that were too long
        found = fit.prior.log_scale.exp()
        ratio, about = found / planted.scales, found / planted.spread(fit.prior.loc)
        wide = planted.scales == planted.scales.max()
        row: dict[str, Any] = {"problem": name, "support": planted.support, "arm": arm}
        row |= {"seed": seed, "seconds": fit.seconds}
        row |= {"worst": float((ratio - 1).abs().max())}
        row |= {"worst about θ0": float((about - 1).abs().max())}
        row |= {"wide": float(ratio[wide].mean()), "narrow": float(ratio[~wide].mean())}
        row |= {"ranked": bool(found[wide].min() > found[~wide].max())}
        row |= {"theta0": float((fit.prior.loc - planted.loc).abs().max())}
        for key, prior in places(start, truth):
            error = slope(strategy, density, prior, some) - exact[key]
            row[f"gradient, {key}"] = float(error.norm() / exact[key].norm())
        yield row


def places(start: vm.GaussianPrior, truth: vm.GaussianPrior) -> list[tuple[str, vm.GaussianPrior]]:
    """Where gradients are compared: all scales are 0.2 times the planted ones in the last."""
    small = truth.moved(truth.loc, truth.log_scale - np.log(5), None)
    return [("start", start), ("planted", truth), ("small", small)]


# -- curves ----------------------------------------------------------------------------------------


def curve(
    density: vm.Density,
    prior: vm.GaussianPrior,
    tasks: vm.Tasks,
    descent: Callable[[int], Minimiser],
    budgets: list[int],
    shrink: bool,
) -> list[float]:
    """Mean query loss after so many steps from θ0, nats per row."""
    shared = density.shared_init
    energy = TaskEnergy(density, tasks.support, shared, prior if shrink else None)
    query = TaskEnergy(density, tasks.query, shared)
    theta, done, out = prior.loc.expand(len(tasks), -1), 0, []
    rows = float(tasks.query.mask.sum(-1).double().mean())
    with torch.no_grad():
        for budget in budgets:
            if budget > done:
                theta, _ = prox(energy, theta, minimiser=descent(budget - done))
                done = budget
            out.append(float(query.loss(theta).mean()) / rows)
    return out


def curves(
    name: str,
    seed: int,
    steps: int,
    count: int,
    budgets: list[int],
    step: float | None = None,
    only: str = "",
) -> Iterator[dict[str, Any]]:
    """A row for each strategy and number of adaptation steps; loss above that of the true θ."""
    problem = PROBLEMS[name]
    planted, new = problem.draw(count, **FEW), problem.draw(NEW, **FEW)
    tasks, test = planted(generator(seed)), new(generator(seed, 1))
    density = density_of(name, tuple(FEW.items()))
    truth = new.parameters(generator(seed, 1))
    with torch.no_grad():
        best = TaskEnergy(density, test.query, density.shared_init).loss(truth).mean()
    floor = float(best) / FEW["query"]
    problem = replace(problem, step=step or problem.step)
    chosen = sigma(problem, FEW["support"], steps)
    arms: dict[str, vm.Strategy] = plain(problem, FEW["support"], steps)
    arms |= {k: chosen[k] for k in ("SigmaIMAML", "SigmaMAML", "SigmaReptile")}
    size = problem.step / FEW["support"]
    for arm, strategy in arms.items():
        if only not in arm:
            continue
        shrink = isinstance(strategy, vm.SigmaIMAML)
        kind = vm.ProximalDescent if shrink else vm.GradientDescent
        try:
            fit = learn(strategy, density, tasks, 50, seed)
        except vm.NonFiniteLoss:  # unrolled steps that were too long
            yield {"problem": name, "arm": arm, "seed": seed, "steps": 0, "excess": np.inf}
            continue
        losses = curve(
            density,
            fit.prior,
            test,
            lambda n, kind=kind: kind(size, n, tolerance=0),  # type: ignore[misc]
            budgets,
            shrink,
        )
        for budget, loss in zip(budgets, losses, strict=True):
            row = {"problem": name, "arm": arm, "seed": seed, "steps": budget}
            yield row | {"excess": loss - floor, "seconds": fit.seconds}


# -- report ----------------------------------------------------------------------------------------


def reach(values: pd.Series) -> float:
    """Half the width of the mean's 95% interval (Student's t)."""
    if len(values) < 2:
        return float("nan")
    return float(values.sem() * student.ppf(0.975, len(values) - 1))


def draw(found: pd.DataFrame, path: Path) -> None:
    """Excess loss over adaptation steps, mean and interval over seeds; a panel per problem."""
    names = list(found["problem"].unique())
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        part = found[found["problem"] == name]
        for k, (arm, lines) in enumerate(part.groupby("arm", sort=False)):
            groups = lines.groupby("steps")["excess"]
            mean, half = groups.mean(), groups.apply(reach)
            style = "-" if str(arm).startswith("Sigma") else "--"
            axis.plot(mean.index, mean, style, color=f"C{k}", label=arm, lw=1.4)
            axis.fill_between(mean.index, mean - half, mean + half, color=f"C{k}", alpha=0.15, lw=0)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yscale("log")
        axis.set_title(f"{name}, one support row", fontsize=9)
        axis.set_xlabel("adaptation steps", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
    axes[0, 0].set_ylabel("new tasks: loss above the true θ's, nats per row", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def summary(found: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean over seeds of every number, and half of its interval as `…_pm`."""
    groups = found.drop(columns="seed").groupby(by, sort=False)
    mean = groups.mean(numeric_only=True)
    half = groups.agg(reach) if len(found) else mean
    return mean.join(half.add_suffix("_pm"))


def main(
    seeds: Annotated[int, typer.Option(help="Of tasks, noise and order.")] = 5,
    steps: Annotated[int, typer.Option(help="Meta-steps.")] = 40,
    problems: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(PROBLEMS),
    parts: Annotated[str, typer.Option(help="recovery, curves.")] = "recovery,curves",
    small: Annotated[bool, typer.Option(help="Few tasks and short adaptation, for a try.")] = False,
    tune: Annotated[bool, typer.Option(help="Only try step sizes, on a seed of its own.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for tables and the picture.")] = Path(
        "runs/shrinkage"
    ),
) -> None:
    """Run the experiments; print the tables, write them and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    count, longest = (20, 30) if small else (1000, 3000)
    budgets = [b for b in (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 3000) if b <= longest]
    names = problems.split(",")
    if tune:
        for name in names:
            for step in (0.1, 0.3, 1.0, 1.5, 1.8):
                found = pd.DataFrame(curves(name, TUNING, 20, count, budgets[:9], step, ", 5"))
                print(name, step, found.groupby("arm")["excess"].min().round(3).to_dict())
        return
    jobs: list[tuple[str, Iterator[dict[str, Any]]]] = []
    for seed in range(seeds):
        for name in names:
            jobs.append(("recovery", recovery(name, seed, steps, count)))
            if name != "spiral-500":
                jobs.append(("curves", curves(name, seed, steps, count, budgets)))
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts.split(",")}
    for part, job in track([j for j in jobs if j[0] in rows], "seeds, problems and parts"):
        for row in job:
            rows[part].append(row)
            pd.DataFrame(rows[part]).to_csv(out / f"{part}.csv", index=False, float_format="%.5g")
    for part, found in rows.items():
        frame = pd.DataFrame(found)
        if not len(frame):
            continue
        frame["ranked"] = frame["ranked"].astype(float) if "ranked" in frame else np.nan
        by = ["problem", "arm"] + (["steps"] if part == "curves" else ["support"])
        table = summary(frame.dropna(axis=1, how="all"), by)
        table.to_csv(out / f"{part}-table.csv", float_format="%.4g")
        print(table.to_string(float_format="{:.3f}".format))
        if part == "curves":
            draw(frame, out / "shrinkage.png")


if __name__ == "__main__":
    typer.run(main)
