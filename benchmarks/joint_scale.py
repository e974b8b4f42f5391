"""What a joint step costs with 100, 10,000 and 1,000,000 tasks: `python -m benchmarks.joint_scale`.

The radon model of one county (intercept and floor adapt, uranium and noise are shared) on synthetic
counties, 100 of them in a step. A step should not notice how many others there are, and the table
should take 3K + 1 numbers a task. The runs take their steps in turn, so that the machine's moods
are the same for all.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import varmeta as vm
from varmeta.inference.base import Batch
from varmeta.inference.families import Family
from varmeta.problems import county
from varmeta.seeds import generator

COUNTS = (100, 10_000, 1_000_000)
VISITED, ROWS, WARM, STEPS = 100, 10, 60, 200
PARTS = ("rows", "momentum", "square", "visits")


def counties(count: int) -> vm.Tasks:
    """Float32 tasks of 10 homes each, straight from tensors."""
    noise = generator(0, count)
    floor = (torch.rand(count, ROWS, generator=noise) < 0.2).float()
    uranium = torch.randn(count, 1, generator=noise).expand(-1, ROWS)
    theta = torch.randn(count, 2, generator=noise) * torch.tensor([0.3, 0.2])
    mean = 1.5 + theta[:, :1] + (theta[:, 1:] - 0.6) * floor + 0.7 * uranium
    y = mean + 0.7 * torch.randn(count, ROWS, generator=noise)
    mask = torch.ones(count, ROWS, dtype=torch.bool)
    names = tuple(map(str, range(count)))
    return vm.Tasks(torch.stack([floor, uranium], -1), y, mask, torch.zeros_like(mask), names)


class Steps:
    """A run of so many tasks, one step at a time."""

    def __init__(self, count: int) -> None:
        self.tasks = counties(count)
        few = self.tasks.select([0, 1])
        self.density = vm.Density(county, few, shared=["uranium", "noise"])
        strategy = vm.JointVariational(q="diagonal", steps=WARM + STEPS)
        self.strategy = strategy.settled(self.density, whole=False)
        prior = vm.GaussianPrior.from_density(self.density)
        self.state = self.strategy.init(self.density, prior, self.tasks, generator(0))
        # Drawn before the clock starts: shuffling a million numbers empties the cache.
        self.visits = [
            torch.randperm(count, generator=generator(1, k))[:VISITED].sort().values
            for k in range(WARM + STEPS)
        ]
        self.times: list[float] = []

    def step(self) -> None:
        """Take the tasks of a batch and step on it, on the clock (CPU time)."""
        count, noise = len(self.tasks), generator(2, self.state.step)
        index = self.visits[self.state.step]
        start = time.process_time()
        batch = Batch(self.tasks.select(index), index, count)
        self.strategy.step(self.density, self.state, batch, noise)
        self.times.append((time.process_time() - start) / len(index))
        self.state.step += 1

    @property
    def microseconds(self) -> float:
        """Per visited task, the median step after the warm-up."""
        return 1e6 * float(np.median(self.times[WARM:]))

    @property
    def megabytes(self) -> tuple[float, float]:
        """Of the table, and as predicted from 3K + 1 numbers a task."""
        table = self.state.tensors
        columns = Family("diagonal", 2).num_columns
        predicted = len(self.tasks) * (3 * columns + 1) * table["rows"].element_size()
        return sum(table[name].nbytes for name in PARTS) / 1e6, predicted / 1e6


def main() -> None:
    """Step through all of them in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [Steps(count) for count in options.counts]
    for _ in range(WARM + STEPS):
        for run in runs:
            run.step()
    table = Table(title=f"JointVariational (diagonal), {VISITED} tasks a step")
    for name in ("tasks", "µs per visited task", "ratio", "table MB", "predicted MB"):
        table.add_column(name, justify="right")
    for run in runs:
        held, predicted = run.megabytes
        table.add_row(
            f"{len(run.tasks):,}",
            f"{run.microseconds:.1f}",
            f"{run.microseconds / runs[0].microseconds:.2f}",
            f"{held:,.2f}",
            f"{predicted:,.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
