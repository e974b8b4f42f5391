"""What a joint step costs with 100, 10,000 and 1,000,000 tasks: `python -m benchmarks.joint_scale`.

The radon model of one county (intercept and floor adapt, uranium and noise are shared) on synthetic
counties, 100 of them in a step. A step should not notice how many others there are, and the table
should take 3K + 1 numbers a task. Each count runs in a process of its own, so that its memory is
its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import varmeta as vm
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


def measure(count: int) -> dict[str, float]:
    """Milliseconds a step (median of single steps, CPU time), and bytes of the table."""
    tasks = counties(count)
    density = vm.Density(county, tasks.select([0, 1]), shared=["uranium", "noise"])
    strategy = vm.JointVariational(steps=WARM + STEPS)
    times, clock = [], time.process_time()

    def on_step(step: int, info: object) -> None:
        nonlocal clock
        now = time.process_time()
        times.append(now - clock)
        clock = now

    batch = min(VISITED, count)
    fit = vm.fit(strategy, density, tasks, batch_size=batch, on_step=on_step, progress=False)
    table = fit.state.tensors
    return {
        "tasks": count,
        "milliseconds": 1000 * float(np.median(times[WARM:])),
        "with_epochs": 1000 * float(np.mean(times[WARM:])),
        "bytes": sum(table[name].nbytes for name in PARTS),
        "predicted": count * (3 * Family("diagonal", 2).num_columns + 1) * 4,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Measure each count, `--rounds` times in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, help="measure this count alone and print it as JSON")
    options = parser.parse_args()
    if options.count:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.count)))
        return
    found: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for _ in range(options.rounds):
        for count in COUNTS:
            command = [sys.executable, "-m", "benchmarks.joint_scale", "--count", str(count)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[count].append(json.loads(out.splitlines()[-1]))
    table = Table(title=f"JointVariational (diagonal), {VISITED} tasks a step")
    for name in ("tasks", "ms per step", "of 100 tasks'", "mean ms", "table MB", "predicted MB"):
        table.add_column(name, justify="right")
    first = float(np.median([r["milliseconds"] for r in found[COUNTS[0]]]))
    for count, rows in found.items():
        middle = {key: float(np.median([row[key] for row in rows])) for key in rows[0]}
        table.add_row(
            f"{count:,}",
            f"{middle['milliseconds']:.2f}",
            f"{middle['milliseconds'] / first:.2f}",
            f"{middle['with_epochs']:.2f}",
            f"{middle['bytes'] / 1e6:,.2f}",
            f"{middle['predicted'] / 1e6:,.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
