"""What the envelope theorem saves: `python -m benchmarks.envelope`.

One meta-step of `AmortisedVariational` on all rows (its bounds, and their gradient in θ0 and φ) by
the envelope theorem and through the implicit function, beside iMAML's and the Laplace evidence's.
All variants run in one process, in turn, in every round; a ratio is the median over rounds of the
ratio within a round, so that a busy machine slows both. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import varmeta as vm
from varmeta.models import network, sinusoids
from varmeta.problems import PROBLEMS
from varmeta.seeds import generator

WARM = 60  # recordings of the derivatives begin after 20 calls: they are no part of a step
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, its tasks, and an inner step size that suits them."""

    name: str
    density: vm.Density
    tasks: vm.Tasks
    step_size: float


def sinusoid() -> Workload:
    """25 tasks, MLP 1-40-40-1, 10 and 10 rows, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40)]
        mlp = torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Linear(40, 1))
    tasks = sinusoids(num_tasks=25)(generator(0))
    density = vm.Density(network(mlp, lambda out: dist.Normal(out[:, 0], 1.0)), tasks)
    return Workload(f"sinusoid, 25 tasks, D = {density.dim}", density, tasks, 0.001)


def radon() -> Workload:
    """70 counties, intercept and floor adapt."""
    case = PROBLEMS["radon"](0)
    name = f"radon, {len(case.train)} tasks, D = {case.density.dim}"
    return Workload(name, case.density, case.train, 0.001)


def steps_of(workload: Workload) -> dict[str, Step]:
    """One meta-step each: 16 inner gradient steps, 5 of conjugate gradients; or Newton for both."""
    few = vm.GradientDescent(workload.step_size, 16, tolerance=0, reduction="sum", clip=None)
    solver = vm.CG(5, tolerance=0)
    amortised = {
        "amortised, envelope": vm.AmortisedVariational(minimiser=few),
        "amortised, implicit": vm.AmortisedVariational(
            minimiser=few, gradient="implicit", solver=solver
        ),
        "amortised, envelope, Newton": vm.AmortisedVariational(),
        "amortised, implicit, Newton": vm.AmortisedVariational(gradient="implicit"),
        "Laplace evidence, Newton": vm.LaplaceEvidence(),
    }
    density, tasks = workload.density, workload.tasks
    prior = vm.GaussianPrior.from_density(density)
    start = prior.moved(prior.loc, prior.log_scale - 1.5, None)
    iterated = vm.IMAML(minimiser=few, adjoint=vm.Implicit(solver))

    def step(losses: Callable[..., tuple[Tensor, object]]) -> Tensor:
        loc = start.loc.clone().requires_grad_()
        shared = density.shared_init.clone().requires_grad_()
        leaves = [loc, shared] if len(shared) else [loc]
        moved = start.moved(loc, start.log_scale, None)
        total = losses(density, moved, shared, tasks)[0].mean()
        return torch.cat(torch.autograd.grad(total, leaves))

    found: dict[str, Step] = {name: (lambda s=s: step(s.losses)) for name, s in amortised.items()}
    return found | {"iMAML, query loss": lambda: step(iterated.losses)}


def time_of(step: Step) -> float:
    """CPU seconds of one call."""
    before = time.process_time()
    step()
    return time.process_time() - before


def table(workload: Workload, rounds: int) -> Table:
    """Medians over rounds, and ratios to the envelope's within rounds."""
    steps = steps_of(workload)
    slow = {n for n in steps if "Newton" in n}
    for name, step in steps.items():
        for _ in range(3 if name in slow else WARM):
            step()
    times = [{name: time_of(step) for name, step in steps.items()} for _ in range(rounds)]
    first = next(iter(steps))
    out = Table(title=workload.name, box=None)
    for column in ("meta-step", "ms", "ratio"):
        out.add_column(column, justify="left" if column == "meta-step" else "right")
    for name in steps:
        ratio = median(t[name] / t[first] for t in times)
        out.add_row(name, f"{1e3 * median(t[name] for t in times):.2f}", f"{ratio:.2f}")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Both workloads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for workload in (radon(), sinusoid()):
        Console().print(table(workload, given.rounds))


if __name__ == "__main__":
    main()
