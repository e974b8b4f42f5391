"""The estimators of `Stochastic`, one against another: `python -m benchmarks.estimators [part]`.

`variance`: per particle and per second of each estimator, where the truth is known (a double well,
by the transition matrix), on the radon counties and on a network; and where pathwise breaks.
`cost`: a particle's step over the bare gradient evaluation, and how it grows with tasks times
particles. `memory`: the peak of a process over the length of a run. CPU time on one thread, the
estimators in turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import varmeta as vm
from benchmarks.figure2 import peak_bytes
from varmeta.figures import grid
from varmeta.inference.chain import Chain
from varmeta.inference.estimators import Estimator
from varmeta.inference.point import Point
from varmeta.models import network, sinusoids
from varmeta.problems import radon

LENGTHS = (25, 100, 400, 1600)  # of a run, for memory
LONG = (10, 20, 40, 80, 160, 320, 640)  # and for where pathwise breaks
NOISES = (1.0, 0.7, 0.5)
NEEDS_MIXING = {
    "stationary covariance": vm.StationaryCovariance(),
    "implicit at particles": vm.ImplicitAtParticles(),
    "basin-corrected": vm.BasinCorrected(),
}
ESTIMATORS: dict[str, Estimator] = {
    "pathwise": vm.Pathwise(),
    "score": vm.Score(),
    "Bismut–Elworthy–Li": vm.BismutElworthyLi(),
    "curvature-gated": vm.CurvatureGated(),
    "gated pathwise": vm.GatedPathwise(),
    "evolution": vm.EvolutionStrategies(),
    "persistent evolution": vm.PersistentES(),
    **NEEDS_MIXING,
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem, an algorithm, and the truth where there is one.

    Attributes:
        name: for the tables.
        density: the model.
        tasks: T of them.
        prior: where θ0 is.
        algorithm: that runs.
        truth: of d E g/dθ0, if it is known.
    """

    name: str
    density: vm.Density
    tasks: vm.Tasks
    prior: vm.GaussianPrior
    algorithm: vm.Langevin
    truth: float | None = None

    def estimate(self, estimator: Estimator, particles: int, seed: int = 0) -> tuple[Tensor, float]:
        """Each particle's contribution by θ0, `[S, T, D]`, nats; and CPU seconds."""
        start = time.process_time()
        got = vm.meta_gradient(
            self.density,
            self.prior,
            self.tasks,
            algorithm=self.algorithm,
            estimator=estimator,
            particles=particles,
            seed=seed,
        )
        seconds = time.process_time() - start
        each = got.estimate.each[..., : self.density.dim]
        return (each.unflatten(0, (2, -1)).mean(0) if got.estimate.pairs else each), seconds


def well(noise: float) -> Callable[..., Tensor]:
    """Rows with x = 1 see θ² (two wells at ±1), rows with x = 0 see θ."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        mean = x[..., 0] * theta**2 + (1 - x[..., 0]) * theta
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


def double_well(
    length: int, temperature: float = 0.25, noise: float = 0.7, anchor: float = 0.1
) -> Setting:
    """Near the ridge between two wells, where f″ = −2/noise², with the exact derivative."""
    x, y = torch.tensor([[[1.0], [0.0]]]).double(), torch.ones(1, 2).double()
    is_query = torch.tensor([[False, True]])
    tasks = vm.Tasks(x, y, torch.ones_like(is_query), is_query, ("well",))
    algorithm = vm.Langevin(length, step_size=0.03, temperature=temperature)
    exact = grid.Chain(lambda t: -2 * t * (1 - t**2) / noise**2, 0.03, temperature, length)
    law = exact.law(anchor, (-4.0, 4.0), resolution=6)
    truth = law.gradient(lambda t: 0.5 * (1 - t) ** 2 / noise**2)[0]
    prior = vm.GaussianPrior.create(torch.tensor([anchor]).double(), 1.0)
    density = vm.Density(well(noise), tasks)
    return Setting(f"double well, {length} steps", density, tasks, prior, algorithm, float(truth))


def counties() -> Setting:
    """Radon: two coefficients, 70 counties, f convex."""
    problem = radon()
    prior = vm.GaussianPrior.from_density(problem.density)
    split = problem.train.support.split(0.3)
    return Setting("radon, 25 steps", problem.density, split, prior, vm.Langevin())


def net(length: int = 25, tasks: int = 4) -> Setting:
    """Sinusoids, a network of 1,761 weights; a step of 1/2 of the curvature's largest."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    source = vm.TaskSource(sinusoids(num_tasks=tasks, support=10, query=10))
    density = vm.Density(network(mlp, lambda out: dist.Normal(out[:, 0], 0.3)), source)
    prior = vm.GaussianPrior.create(density.prior_loc, 0.3)
    algorithm = vm.Langevin(length, step_size=3e-5, temperature=1.0)
    return Setting(f"network, {length} steps", density, source.batch(0), prior, algorithm)


def variance(particles: int, repeats: int) -> list[Table]:
    """Spread and cost of each estimator in each setting."""
    tables = []
    settings: list[tuple[Callable[[], Setting], int]] = [
        (partial(double_well, 25), particles),
        (partial(double_well, 200), particles),
        (partial(double_well, 1000), particles),
        (counties, max(particles // 100, 50)),
        (net, max(particles // 1000, 20)),
    ]
    for make, count in settings:
        setting = make()
        exact = "" if setting.truth is None else f", truth {setting.truth:.3f}"
        table = Table(title=f"{setting.name}: {count} particles × {repeats}{exact}")
        for column in ("estimator", "mean ± se", "sd", "µs/particle", "variance × µs, of the best"):
            table.add_column(column, justify="right")
        rows = []
        for name, estimator in ESTIMATORS.items():
            if name in NEEDS_MIXING and setting.density.dim > 200:
                continue  # each particle its own minimum: no basins
            setting.estimate(estimator, 4)  # warm
            runs = [setting.estimate(estimator, count, seed) for seed in range(repeats)]
            each = torch.cat([r[0] for r in runs])
            micro = 1e6 * float(np.median([r[1] for r in runs])) / count / len(setting.tasks)
            pairs = count * repeats / len(each)
            spread = float((pairs * each.var(0)).sum(-1).mean().sqrt())
            mean = float(each.mean(0).sum(-1).mean())
            error = spread / (count * repeats) ** 0.5
            rows.append((name, mean, error, spread, micro))
        best = min(s**2 * m for n, _, _, s, m in rows if n not in NEEDS_MIXING)
        for name, mean, error, spread, micro in rows:
            shown = f"{mean:.3f} ± {error:.3f}" if setting.density.dim == 1 else ""
            table.add_row(
                name, shown, f"{spread:.3g}", f"{micro:.1f}", f"{spread**2 * micro / best:.2g}"
            )
        tables.append(table)
    return tables


def breaking(particles: int, folder: Path | None) -> list[Table]:
    """Pathwise and gated over the length of a run and the curvature at the ridge, τ = 0.1."""
    tables, curves = [], {}
    for noise in NOISES:
        bend = -2 / noise**2
        table = Table(title=f"double well, f″ = {bend:.1f} at the ridge: {particles} particles")
        for column in ("steps", "truth", "pathwise", "sd", "gated", "sd"):
            table.add_column(column, justify="right")
        rows = []
        for length in LONG:
            setting = double_well(length, 0.1, noise)
            row = [setting.truth or 0.0]
            for estimator in (vm.Pathwise(), vm.CurvatureGated()):
                each, _ = setting.estimate(estimator, particles)
                row += [float(each.mean()), float(each.std())]
            rows.append(row)
            root = particles**0.5
            cells = [f"{m:.3f} ± {s / root:.3f}" for m, s in (row[1:3], row[3:5])]
            table.add_row(
                f"{length}", f"{row[0]:.3f}", cells[0], f"{row[2]:.3g}", cells[1], f"{row[4]:.3g}"
            )
        tables.append(table)
        curves[bend] = np.array(rows)
    if folder is not None:
        draw(curves, particles, folder / "pathwise-breaks.png")
    return tables


def draw(curves: dict[float, np.ndarray], particles: int, path: Path) -> None:
    """Truth and both estimates, with 2 standard errors, over the length of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=110)
    for ax, (bend, rows) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for column, name, colour in ((1, "pathwise", "#D55E00"), (3, "gated", "#0072B2")):
            error = 2 * rows[:, column + 1] / particles**0.5
            ax.errorbar(LONG, rows[:, column], error, color=colour, label=name, marker="o", ms=4)
        ax.plot(LONG, rows[:, 0], color="black", lw=6, alpha=0.25, label="exact")
        ax.set(xscale="log", title=f"f″ = {bend:.0f} at the ridge", xlabel="steps of a run")
        low = 1.6 * rows[:, 0].min()
        ax.set_ylim(low, -0.25 * low)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("d E g / dθ0, nats")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def cost(repeats: int) -> list[Table]:
    """CPU µs of a particle's step over the bare gradient evaluation, and growth with T × S."""
    setting, particles = net(25), 16
    table = Table(title=f"network, {particles} particles of {len(setting.tasks)} tasks")
    for column in ("estimator", "µs a step and particle", "over the bare gradient"):
        table.add_column(column, justify="right")
    point = Point.of(setting.density, setting.prior, setting.density.shared_init)
    theta = setting.prior.loc.expand(particles, len(setting.tasks), -1).contiguous()

    def bare() -> None:
        leaf = theta.detach().requires_grad_()
        loss = setting.density.negative_log_likelihood(leaf, setting.tasks.support)
        torch.autograd.grad(loss.sum(), leaf)

    def plain() -> None:
        Chain(setting.algorithm, setting.density, point, setting.tasks.support, particles, 0).run()

    chosen = {n: e for n, e in ESTIMATORS.items() if n not in NEEDS_MIXING}
    length = setting.algorithm.run_length
    calls: dict[str, Callable[[], object]] = {
        "bare gradient": lambda: [bare() for _ in range(length)],
        "the run alone": plain,
        **{n: partial(setting.estimate, e, particles) for n, e in chosen.items()},
    }
    times = in_turn(calls, repeats)
    for name, seconds in times.items():
        each = 1e6 * seconds / (length * particles * len(setting.tasks))
        table.add_row(name, f"{each:.1f}", f"{seconds / times['bare gradient']:.2f}")
    growth = Table(title="network, curvature-gated: growth with tasks × particles")
    for column in ("tasks", "particles", "µs a step and particle"):
        growth.add_column(column, justify="right")
    shapes = [(1, 4), (1, 16), (1, 64), (4, 16), (16, 4), (16, 16)]
    many = {
        str(shape): partial(net(10, shape[0]).estimate, vm.CurvatureGated(), shape[1])
        for shape in shapes
    }
    for (t, s), seconds in zip(shapes, in_turn(many, repeats).values(), strict=True):
        growth.add_row(f"{t}", f"{s}", f"{1e6 * seconds / (10 * t * s):.1f}")
    return [table, growth]


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, after two warm rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: float(np.median(t[2:])) for name, t in times.items()}


def memory() -> Table:
    """Megabytes by which the peak of a process rises above its start during a run."""
    table = Table(title="network, 32 particles of 4 tasks: MB at the peak, above the start")
    for column in ("estimator", *(f"{n} steps" for n in LENGTHS)):
        table.add_column(column, justify="right")
    for name in ESTIMATORS:
        if name not in NEEDS_MIXING:
            command = [sys.executable, "-m", "benchmarks.estimators", "grow", name]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            table.add_row(name, *found.stdout.split())
    return table


def grow(name: str) -> None:
    """Print it for each length, in a process of its own (Linux)."""
    for _ in range(2):  # until its derivatives are recorded
        net(25).estimate(ESTIMATORS[name], 32)
    for length in LENGTHS:
        setting = net(length)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
        before = peak_bytes()
        setting.estimate(ESTIMATORS[name], 32)
        print(round((peak_bytes() - before) / 2**20))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", default=["variance", "breaking", "cost", "memory"])
    parser.add_argument("--particles", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where `breaking` draws its picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.part[0] == "grow":
        grow(options.part[1])
        return
    console = Console(width=120)
    parts: dict[str, Callable[[], list[Table]]] = {
        "variance": lambda: variance(options.particles, options.repeats),
        "breaking": lambda: breaking(options.particles, options.folder),
        "cost": lambda: cost(options.repeats),
        "memory": lambda: [memory()],
    }
    for part in options.part:
        for table in parts[part]():
            console.print(table)


if __name__ == "__main__":
    main()
