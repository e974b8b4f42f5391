"""What scoring many tasks, or one long one, takes: `python -m benchmarks.size --tasks 20000`.

Two strategies are fitted to tasks of five rows (an intercept and a slope adapt, the noise is
shared) and compared on 30% of the rows, held out; then come the evidence of one of them, and its
export as a netCDF file.
Without arguments: 1,000, 20,000 and 100,000 tasks, and 50 tasks of one row beside one of 20,000.
Each case runs in a process of its own, on one thread, and peaks of memory are those of the process,
PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import varmeta as vm
from benchmarks.machine import commit, processor
from varmeta.inference.base import Strategy
from varmeta.seeds import generator

COUNTS = (1_000, 20_000, 100_000)
ROWS, SHORT, LONG = 5, 50, 20_000


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A straight line with noise."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    mean = intercept + slope * x[..., 0]
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def lines(counts: Sequence[int]) -> vm.Tasks:
    """Tasks of these numbers of rows, lines drawn from N(1, ½²) each."""
    noise, float64 = generator(0, len(counts)), torch.float64
    pairs = []
    for count in counts:
        intercept, slope = 1 + 0.5 * torch.randn(2, generator=noise, dtype=float64)
        x, error = torch.randn(2, count, generator=noise, dtype=float64)
        pairs.append((x[:, None], intercept + slope * x + 0.5 * error))
    return vm.Tasks.from_list(pairs)


def measure(
    counts: Sequence[int],
    folder: Path,
    strategies: Sequence[Strategy] = (vm.JointVariational(), vm.LaplaceEvidence()),
    draws: int = 1000,
) -> list[dict[str, Any]]:
    """One row per stage: seconds by the clock, CPU seconds, GB at the peak so far, MB of files."""
    tasks = lines(counts).split(0.3)
    density = vm.Density(line, tasks, shared=["noise"])
    stages: list[dict[str, Any]] = []

    def stage(name: str, work: Callable[[], Any]) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        found = {"stage": name, "seconds": time.perf_counter() - start}
        found |= {"cpu": time.process_time() - cpu, "peak": peak(), "file": 0.0}
        stages.append(found)
        return result

    def export() -> None:
        data = vm.to_arviz(outcome.fit, posterior=outcome.known, single=True)
        data.to_netcdf(str(path))

    path = folder / "export.nc"
    stage("start", lambda: None)
    compared = stage("compare", lambda: vm.compare(strategies, density, tasks, draws=draws))
    if compared.failures:
        raise RuntimeError(str(compared.failures))
    outcome = next(iter(compared.outcomes.values()))
    given = outcome.known, outcome.fit.prior, tasks.support
    stage("evidence", lambda: vm.evidence(*given, draws=draws))
    stage("export", export)
    stages[-1]["file"] = path.stat().st_size / 1e6
    return stages


def peak() -> float:
    """GB, of this process since it began."""
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def apart(groups: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """`measure` in a process of its own; groups are (number of tasks, rows of each)."""
    command = [sys.executable, "-m", "benchmarks.size", "--worker", json.dumps(groups)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process ended with code {done.returncode}: {last}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """One row per case and stage."""
    out = Table(title=f"{processor()}, commit {commit()}", title_justify="left")
    out.add_column("tasks")
    out.add_column("stage")
    for name in ("seconds", "CPU seconds", "peak GB", "file MB"):
        out.add_column(name, justify="right")
    for case, stages in results.items():
        for row in stages:
            size = f"{row['file']:.0f}" if row["file"] else ""
            numbers = (f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", f"{row['peak']:.2f}", size)
            out.add_row(case, row["stage"], *numbers)
        out.add_section()
    return out


def main() -> None:
    """Run the cases one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", help="so many tasks of five rows")
    parser.add_argument("--long", action="store_true", help="short tasks beside a long one")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        counts = [rows for tasks, rows in options.worker for _ in range(tasks)]
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(counts, Path(folder))))
        return
    both = options.tasks is None and not options.long
    counts = COUNTS if both else options.tasks or ()
    cases = {f"{count:,} of {ROWS} rows": [(count, ROWS)] for count in counts}
    if options.long or both:
        cases[f"{SHORT} of 1 row, 1 of {LONG:,}"] = [(SHORT, 1), (1, LONG)]
    Console().print(table({name: apart(groups) for name, groups in cases.items()}))


if __name__ == "__main__":
    main()
