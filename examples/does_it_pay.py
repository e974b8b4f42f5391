"""Does the full meta-gradient of a random algorithm pay? An experiment.

θ0 acts on the outcome of a random algorithm in two ways: it moves each minimum, and it changes how
often each is found (Huszár, inference.vc, 2019). iMAML knows of the first alone. Here is
meta-training with estimators of the full gradient against the location alone (iMAML averaged over
the outcome), on the same tasks, with the same runs, optimiser and number of meta-steps: frequencies
and signs in 64 dimensions, where tasks have many minima, and sinusoids with a network. Measured is
the expected query loss on new tasks, as training goes on. What came out is told in
docs/does-it-pay.md.

    python examples/does_it_pay.py --seeds 5
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

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
from varmeta.inference.base import Batch, State, StepInfo
from varmeta.inference.estimators import Estimator
from varmeta.models import network, sinusoids
from varmeta.seeds import generator

DIM, LENGTH = 64, 20
TASKS, PARTICLES = 8, 4  # of a meta-step
NEW, OUTCOMES = 40, 16  # new tasks, and runs on each, for the held-out loss
READINGS = 6  # of the held-out loss in a run
TARGETS = torch.linspace(2.0, 4.0, DIM)  # mean frequency of each channel
LOCATION = "location"


# -- problems --------------------------------------------------------------------------------------


def channels(x: Tensor, y: Tensor | None = None) -> Tensor:
    """y_d ~ N(sin(ω_d x), 0.3²) in 64 channels: the likelihood of each ω_d has many minima."""
    omega = pyro.sample("omega", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(torch.sin(x * omega), 0.3).to_event(1), obs=y)


def draw_channels(tasks: int) -> Callable[[torch.Generator], vm.Tasks]:
    """ω_d ~ N(target_d, 0.3²), x uniform on [0, 3], 8 + 8 rows of all channels."""

    def draw(source: torch.Generator) -> vm.Tasks:
        omega = TARGETS + 0.3 * torch.randn(tasks, 1, DIM, generator=source)
        x = 3 * torch.rand(tasks, 16, 1, generator=source)
        y = torch.sin(x * omega) + 0.3 * torch.randn(tasks, 16, DIM, generator=source)
        return halves(x, y, 8)

    return draw


def phases(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Real phase retrieval: rows see (x·θ)², those with a flag in the last column x·θ itself."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    seen = (x[..., :-1] * theta).sum(-1)
    mean = torch.where(x[..., -1] > 0, seen, seen**2)
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def draw_phases(tasks: int) -> Callable[[torch.Generator], vm.Tasks]:
    """θ_d ~ N(1, 0.3²), x ~ N(0, I/64); 48 rows without sign to learn from, 16 with it to score."""

    def draw(source: torch.Generator) -> vm.Tasks:
        theta = 1 + 0.3 * torch.randn(tasks, 1, DIM, generator=source)
        x = torch.randn(tasks, 64, DIM, generator=source) / DIM**0.5
        signed = (torch.arange(64) >= 48).expand(tasks, 64)
        seen = (x * theta).sum(-1)
        y = torch.where(signed, seen, seen**2)
        y = y + 0.5 * torch.randn(y.shape, generator=source)
        return halves(torch.cat([x, signed[..., None].float()], -1), y, 48)

    return draw


def halves(x: Tensor, y: Tensor, support: int) -> vm.Tasks:
    """Tasks whose first rows are the support part."""
    tasks, rows = x.shape[:2]
    is_query = (torch.arange(rows) >= support).expand(tasks, rows)
    names = tuple(str(k) for k in range(tasks))
    return vm.Tasks(x, y, torch.ones_like(is_query), is_query, names)


def small_network(seed: int) -> Callable[..., Tensor]:
    """A tanh network of 481 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = nn.Sequential(
            nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)
        )
    return network(mlp, lambda out: dist.Normal(out[:, 0], 0.3))


@dataclass(frozen=True)
class Setting:
    """Tasks, where θ0 starts, and the random algorithm; `unit` values are scored in a row."""

    draw: Callable[[int], Callable[[torch.Generator], vm.Tasks]]
    model: Callable[[int], Callable[..., Tensor]]
    start: Callable[[torch.Generator], Tensor] | None  # None: at the model's own
    scale: float
    algorithm: vm.Langevin
    rate: float
    unit: int = 1


def sines(tasks: int) -> Callable[[torch.Generator], vm.Tasks]:
    """10 rows to learn from, 10 to score, noise 0.3 as in the likelihood."""
    return sinusoids(tasks, support=10, query=10, noise=0.3)


def below(_: torch.Generator) -> Tensor:
    """Every frequency below every target."""
    return torch.full((DIM,), 1.5)


def beside(source: torch.Generator) -> Tensor:
    """A standard deviation of 0.7 from the targets: some channels in the right basin."""
    return TARGETS + 0.7 * torch.randn(DIM, generator=source)


def around_zero(source: torch.Generator) -> Tensor:
    """Next to the saddle between θ and −θ."""
    return 0.1 * torch.randn(DIM, generator=source)


COLD = vm.Langevin(LENGTH, 0.004, 1.0)
TEMPERED = vm.Langevin(LENGTH, 0.004, tuple(np.geomspace(30, 1, LENGTH)))
SETTINGS: dict[str, Setting] = {
    "channels, near, cold": Setting(draw_channels, lambda _: channels, beside, 1.0, COLD, 0.1, DIM),
    "channels, far, cold": Setting(draw_channels, lambda _: channels, below, 1.0, COLD, 0.1, DIM),
    "channels, far, tempered": Setting(
        draw_channels, lambda _: channels, below, 1.0, TEMPERED, 0.1, DIM
    ),
    "phases": Setting(
        draw_phases, lambda _: phases, around_zero, 1.0, vm.Langevin(LENGTH, 0.004), 0.1
    ),
    "sinusoids, cold": Setting(
        sines, small_network, None, 0.7, vm.Langevin(LENGTH, 5e-4, 0.01), 0.03
    ),
    "sinusoids, warm": Setting(
        sines, small_network, None, 0.7, vm.Langevin(LENGTH, 5e-4, 1.0), 0.03
    ),
}


# -- strategies ------------------------------------------------------------------------------------


def strategies(setting: Setting, steps: int) -> dict[str, vm.Strategy]:
    """The arms, by name.

    The learning rate goes through the first quarter of its cosine, and so hardly decays: a curve
    can be read at any budget.
    """
    wide = setting.model is small_network
    common = {"steps": 4 * steps, "learning_rate": setting.rate, "learn_scale": False}
    size = setting.algorithm.step_size
    assert size is not None
    # On channels and phases runs end next to minima, and a line search stays in their basins. A
    # network has none within reach: the further the descent, the worse the gradient of the runs.
    down = (
        vm.GradientDescent(size, 32, tolerance=0, reduction="sum", clip=None)
        if wide
        else vm.LBFGS()
    )
    solver = vm.CG(10) if wide else vm.CG()

    def stochastic(estimator: Estimator) -> vm.Strategy:
        return vm.Stochastic(
            algorithm=setting.algorithm,
            estimator=estimator,
            particles=PARTICLES,
            **common,  # type: ignore[arg-type]
        )

    return {
        LOCATION: stochastic(vm.ImplicitAtParticles(down, solver)),
        "Pathwise": stochastic(vm.Pathwise()),
        "GatedPathwise": stochastic(vm.GatedPathwise()),
        "BismutElworthyLi": stochastic(vm.BismutElworthyLi()),
        "IMAML": vm.IMAML(
            minimiser=down,
            adjoint=vm.Implicit(solver),
            posterior_kind="delta",
            **common,  # type: ignore[arg-type]
        ),
    }


@dataclass(frozen=True)
class Watched(vm.Strategy):
    """The first steps of another strategy, with the prior every few of them."""

    inner: vm.Strategy
    steps: int
    every: int
    seen: list[tuple[int, vm.GaussianPrior]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """`steps`."""
        return self.steps

    def init(
        self,
        density: vm.Density,
        prior: vm.GaussianPrior,
        tasks: vm.Tasks | vm.TaskSource,
        generator: torch.Generator,
    ) -> State:
        """See `Strategy.init`."""
        self.seen.append((0, prior))
        return self.inner.init(density, prior, tasks, generator)

    def step(
        self, density: vm.Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """See `Strategy.step`."""
        info = self.inner.step(density, state, batch, generator)
        if (state.step + 1) % self.every == 0:
            self.seen.append((state.step + 1, state.meta.fixed()[0]))
        return info

    def adapt(
        self, density: vm.Density, state: State, tasks: vm.Tasks, generator: torch.Generator
    ) -> vm.TaskPosterior:
        """See `Strategy.adapt`."""
        return self.inner.adapt(density, state, tasks, generator)


# -- measurement -----------------------------------------------------------------------------------


def outcomes(
    setting: Setting,
    density: vm.Density,
    prior: vm.GaussianPrior,
    tasks: vm.Tasks,
    seed: int,
    count: int = OUTCOMES,
) -> Tensor:
    """Query loss where each of `count` runs on new tasks ends, mean over tasks, nats per value."""
    random = vm.Stochastic(algorithm=setting.algorithm, draws=count)
    state = random.init(density, prior, tasks, generator(seed, 4))
    ends, _ = random.adapt(density, state, tasks.support, generator(seed, 4)).sample(
        count, generator(seed, 5)
    )
    with torch.no_grad():
        loss = density.negative_log_likelihood(ends, tasks.query, density.shared_init)
    return loss.mean(-1) / (tasks.query.mask.sum(-1).float().mean() * setting.unit)


def study(
    names: Sequence[str], arms: Sequence[str], seeds: int, steps: int, results: Path
) -> pd.DataFrame:
    """One row for each setting, arm, seed and reading; what `results` has is not run again."""
    rows = pd.read_csv(results).to_dict("records") if results.exists() else []
    done = {(row["setting"], row["arm"], row["seed"]) for row in rows}
    runs = [
        (name, arm, seed)
        for seed in range(seeds)
        for name in names
        for arm in arms
        if (name, arm, seed) not in done
    ]
    for name, arm, seed in track(runs, "settings, arms and seeds"):
        setting = SETTINGS[name]
        source = vm.TaskSource(setting.draw(TASKS), seed=seed)
        new = setting.draw(NEW)(generator(seed, 1))
        density = vm.Density(setting.model(seed), source)
        loc = density.prior_loc if setting.start is None else setting.start(generator(seed, 2))
        prior = vm.GaussianPrior.create(loc, setting.scale)
        watched = Watched(strategies(setting, steps)[arm], steps, max(steps // READINGS, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # descents of a network do not end
            fit = vm.fit(watched, density, source, prior=prior, seed=seed)
        spent = {0: 0.0, **dict(zip(fit.history["step"], fit.history["gradients"], strict=True))}
        for step, at in watched.seen:
            row = {"setting": name, "arm": arm, "seed": seed, "step": step}
            row |= {"gradients": spent[step] / TASKS, "seconds": fit.seconds * step / steps}
            row["held_out"] = float(outcomes(setting, density, at, new, seed).mean())
            rows.append(row)
        pd.DataFrame(rows).to_csv(results, index=False, float_format="%.5g")
    return pd.DataFrame(rows)


def slopes(names: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """At the start: how the expected loss falls towards the targets, and what estimators say of it.

    `true` is from runs with the same noise at θ0 ± d/2, d the unit vector from θ0 to the targets,
    `sd` the standard deviation of one meta-gradient's slope; nats per task and unit of length.
    `basins` counts the minima that 32 runs of a task found.
    """
    rows = []
    for name in names:
        setting = SETTINGS[name]
        tasks = setting.draw(TASKS)(generator(seed, 1))
        density = vm.Density(setting.model(seed), tasks)
        assert setting.start is not None, "the targets of a network are not known"
        loc = setting.start(generator(seed, 2))
        towards = (TARGETS if setting.unit > 1 else torch.ones(DIM)) - loc
        towards = towards / towards.norm()
        prior = vm.GaussianPrior.create(loc, setting.scale)
        unit = setting.unit * float(tasks.query.mask.sum(-1).float().mean())
        below, above = (
            outcomes(
                setting, density, vm.GaussianPrior.create(at, setting.scale), tasks, seed, count=64
            )
            for at in (loc - 0.5 * towards, loc + 0.5 * towards)
        )
        true = unit * (above - below)
        basins = vm.find_basins(
            density, prior, tasks.select([0]), algorithm=setting.algorithm, particles=32
        )
        for arm, strategy in strategies(setting, 1).items():
            if not isinstance(strategy, vm.Stochastic):
                continue
            many = 16 if arm == LOCATION else 64
            found = vm.meta_gradient(
                density,
                prior,
                tasks,
                algorithm=setting.algorithm,
                estimator=strategy.estimator,
                particles=many,
                seed=seed,
            )
            each = found.estimate.each[..., :DIM].mean(1) @ towards
            row = {"setting": name, "basins": len(basins.energy), "arm": arm}
            row |= {"true": float(true.mean()), "true_se": float(true.std()) / len(true) ** 0.5}
            row |= {"slope": float(each.mean()), "se": float(each.std()) / many**0.5}
            rows.append(row | {"sd": float(each.std()) / PARTICLES**0.5})
    return pd.DataFrame(rows)


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t)."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(values.sem() * student.ppf(0.975, len(values) - 1))


def reading(curve: pd.DataFrame, gradients: float) -> float:
    """Held-out loss after so many gradients, between two readings by a straight line."""
    return float(np.interp(gradients, curve["gradients"], curve["held_out"]))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Per setting and arm: the loss at the end, and how it differs from the location's alone.

    `steps` is the difference after the same number of meta-steps, `budget` after the gradients that
    the cheaper of the two took; negative where the arm is better.
    """
    rows = []
    for name, part in found.groupby("setting", sort=False):
        curves = {key: c.sort_values("step") for key, c in part.groupby(["arm", "seed"])}
        seeds = sorted(part["seed"].unique())
        for arm in part["arm"].unique():
            end, at_steps, at_budget, cost = [], [], [], []
            for seed in seeds:
                mine, base = curves[arm, seed], curves.get((LOCATION, seed))
                end.append(mine["held_out"].iloc[-1])
                cost.append(mine["gradients"].iloc[-1] / mine["step"].iloc[-1])
                if base is None:
                    continue
                least = min(mine["gradients"].iloc[-1], base["gradients"].iloc[-1])
                at_steps.append(end[-1] - base["held_out"].iloc[-1])
                at_budget.append(reading(mine, least) - reading(base, least))
            row = {"setting": name, "arm": arm, "cost": np.mean(cost)}
            row["start"] = np.mean([curves[arm, s]["held_out"].iloc[0] for s in seeds])
            pairs = {"held_out": end, "steps": at_steps, "budget": at_budget}
            for key, values in pairs.items():
                row[key], row[f"{key}_pm"] = interval(pd.Series(values, dtype=float))
            rows.append(row)
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame, path: Path) -> None:
    """Held-out loss over meta-steps, and over gradients; a column per setting."""
    names, arms = list(found["setting"].unique()), list(found["arm"].unique())
    figure, axes = plt.subplots(
        2, len(names), figsize=(2.9 * len(names), 5.6), sharey="col", squeeze=False
    )
    for column, name in enumerate(names):
        for k, arm in enumerate(arms):
            part = found[(found["setting"] == name) & (found["arm"] == arm)]
            groups = part.groupby("step")
            mean, count = groups["held_out"].mean(), groups.size()
            reach = groups["held_out"].sem() * student.ppf(0.975, np.maximum(count - 1, 1))
            for row, x in enumerate((mean.index, groups["gradients"].mean())):
                axes[row, column].plot(x, mean, color=f"C{k}", label=arm, lw=1.3)
                axes[row, column].fill_between(
                    x, mean - reach, mean + reach, color=f"C{k}", alpha=0.15, lw=0
                )
        axes[0, column].set_title(name, fontsize=9)
        axes[0, column].set_xlabel("meta-steps", fontsize=8)
        axes[1, column].set_xlabel("gradients per task", fontsize=8)
        axes[1, column].set_xscale("log")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out loss, nats per value", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=84)
    plt.close(figure)


def main(
    settings: Annotated[str, typer.Option(help="Which, separated by semicolons.")] = ";".join(
        SETTINGS
    ),
    arms: Annotated[str, typer.Option(help="Which, separated by semicolons; all if empty.")] = "",
    seeds: Annotated[int, typer.Option(help="Of tasks, start and noise together.")] = 5,
    steps: Annotated[int, typer.Option(help="Meta-steps.")] = 24,
    slope: Annotated[bool, typer.Option(help="Only look at the slope at the start.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.csv and the picture.")] = Path(
        "runs/does_it_pay"
    ),
) -> None:
    """Run the experiment, or go on with it; print the table, write it and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    names = settings.split(";")
    if slope:
        known = [name for name in names if SETTINGS[name].start is not None]
        print(slopes(known).to_string(float_format="{:.2f}".format))
        return
    chosen = arms.split(";") if arms else list(strategies(SETTINGS[names[0]], steps))
    found = study(names, chosen, seeds, steps, out / "results.csv")
    table = summary(found)
    table.to_csv(out / "table.csv", index=False, float_format="%.4g")
    print(table.to_string(float_format="{:.3f}".format))
    draw(found, out / "does-it-pay.png")


if __name__ == "__main__":
    typer.run(main)
