"""One objective, two programs: `JointVariational` beside Pyro's SVI with the guide that matches it.

    python -m benchmarks.joint_against_svi [--steps 1000] [--tasks 1000]

Both minimise Σ_i KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i − log p(θ0, Σ, φ) over diagonal Gaussian q_i and
points θ0, Σ, φ, with Adam at the same learning rate, decay and number of steps, on one thread.
Between steps, off the clock, the objective of both is evaluated by the same exact rule: the models
are linear with Gaussian noise, so that a cubature rule of 2D points gives E_q f without an error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import varmeta as vm
from varmeta.data import load
from varmeta.inference.base import Batch, State
from varmeta.inference.families import GaussianQ
from varmeta.inference.free_energy import cubature, free_energy
from varmeta.problems import county
from varmeta.seeds import generator

LEARNING_RATE = 0.05
EVERY = 20  # steps between evaluations
CLOSE = 0.01  # nats per task
WARM_UP = 30  # steps of another run first: programs are recorded after 20 calls


@dataclass(frozen=True)
class Trace:
    """Seconds and objective (nats per task) at every `EVERY`th step, and the time of each step."""

    seconds: list[float]
    bounds: list[float]
    steps: list[float]

    def until(self, target: float) -> float | None:
        """Seconds until the objective is below `target` for good."""
        late = [t for t, b in zip(self.seconds, self.bounds, strict=True) if b > target]
        after = [t for t in self.seconds if not late or t > late[-1]]
        return after[0] if after else None


def radon() -> tuple[vm.Density, vm.Tasks]:
    """85 counties: intercept and floor effect by county, uranium and noise shared."""
    tasks = vm.Tasks.from_frame(
        load("radon"), task="county", inputs=["floor", "log_uranium"], target="log_radon"
    )
    return vm.Density(county, tasks, shared=["uranium", "noise"]), tasks


def synthetic(count: int) -> tuple[vm.Density, vm.Tasks]:
    """`count` linear regressions with 4 coefficients and 8 rows each."""
    source = generator(0)
    x = torch.randn(count, 8, 4, generator=source)
    theta = 1 + 0.5 * torch.randn(count, 4, 1, generator=source)
    y = (x @ theta)[..., 0] + 0.5 * torch.randn(count, 8, generator=source)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(x @ theta, 0.5), obs=y)

    tasks = vm.Tasks.from_list(list(zip(x, y, strict=True)))
    return vm.Density(model, tasks), tasks


def moments(
    strategy: vm.Strategy, density: vm.Density, tasks: vm.Tasks, state: State
) -> tuple[vm.GaussianPrior, Tensor, Tensor, Tensor]:
    """N(θ0, Σ), φ, and mean and sd of every q_i as they stand after a step."""
    if isinstance(strategy, vm.JointVariational):
        posterior = strategy.posterior(density, state, tasks, generator(0))
        return *state.meta.fixed(), posterior.mean, posterior.sd
    _, raw = strategy._draw(state, 1, generator(0))  # type: ignore[attr-defined]
    for name, value in raw.items():  # points, which a run writes down at its end
        state.meta.raw[name].detach().copy_(value[0])
    loc, spread = (
        next(t for n, t in state.tensors.items() if part in n).detach()
        for part in (".locs.", ".scales.")
    )
    start, sd = state.meta.origin, torch.nn.functional.softplus(spread)
    return *state.meta.fixed(), start.loc + start.scale * loc, start.scale * sd


def run(strategy: vm.Strategy, density: vm.Density, tasks: vm.Tasks, steps: int) -> Trace:
    """`steps` steps, with the clock stopped while the objective is evaluated."""
    prior = vm.GaussianPrior.from_density(density)
    strategy = strategy.settled(density, whole=True)
    state = strategy.init(density, prior, tasks, generator(0))
    batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
    points = cubature(density.dim, prior.loc.dtype, prior.loc.device)
    points = points[:, None].expand(-1, len(tasks), -1)
    seconds, bounds, times = [], [], []
    for step in range(steps):
        start = time.perf_counter()
        strategy.step(density, state, batch, generator(0, step))
        state.step += 1
        times.append(time.perf_counter() - start)
        if state.step % EVERY == 0:
            now, shared, mean, sd = moments(strategy, density, tasks, state)
            with torch.no_grad():
                q = GaussianQ(mean, sd)
                value = free_energy(density, now, shared, tasks, q, points).mean()
                value = value - state.meta.log_prior() / len(tasks)
            seconds.append(sum(times))
            bounds.append(float(value))
    return Trace(seconds, bounds, times)


def table(title: str, density: vm.Density, tasks: vm.Tasks, steps: int) -> Table:
    """One row a program; the first is what the others' ratios refer to."""
    options = {"steps": steps, "learning_rate": LEARNING_RATE}
    svi = {"point_globals": True, "centred": True}
    programs: dict[str, vm.Strategy] = {
        "JointVariational, 8 draws": vm.JointVariational(q="diagonal", **options),  # type: ignore[arg-type]
        "PyroSVI, 8 draws": vm.PyroSVI(samples=8, **svi, **options),  # type: ignore[arg-type]
        "PyroSVI, 1 draw": vm.PyroSVI(samples=1, **svi, **options),  # type: ignore[arg-type]
    }
    traces = {}
    for name, strategy in programs.items():
        run(strategy, density, tasks, WARM_UP)
        traces[name] = run(strategy, density, tasks, steps)
    best = min(min(trace.bounds) for trace in traces.values())
    first = statistics.median(next(iter(traces.values())).steps)
    out = Table("", "ms per step", "ratio", "last bound", f"s to within {CLOSE}", title=title)
    for name, trace in traces.items():
        step, until = statistics.median(trace.steps), trace.until(best + CLOSE)
        reached = "never" if until is None else f"{until:.2f}"
        cells = f"{1000 * step:.2f}", f"{step / first:.1f}", f"{trace.bounds[-1]:.4f}", reached
        out.add_row(name, *cells)
    out.caption = f"best bound {best:.4f} nats per task, {steps} steps, lower is better"
    return out


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1000, help="of the synthetic problem")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    console.print(table("radon, 85 counties", *radon(), options.steps))
    synthetic_tasks = synthetic(options.tasks)
    console.print(table(f"linear, {options.tasks} tasks", *synthetic_tasks, options.steps))


if __name__ == "__main__":
    main()
