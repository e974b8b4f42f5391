"""A long task beside many short ones, and equal ones of as many rows: `-m benchmarks.ragged`.

A straight line whose noise is shared is fitted to 1,000 tasks of 3 rows beside one of 4,000, and to
1,000 tasks of 7, by each strategy with a fixed number of steps; then the posteriors are taken, rows
are scored, and the fit is exported. Each case runs in a process of its own on one thread; memory is
the peak of the process above what it had before its tasks were made.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

import varmeta as vm
from benchmarks.machine import commit, processor
from benchmarks.size import line, lines, peak
from varmeta.inference.base import Strategy
from varmeta.seeds import generator

EQUAL = [(1_000, 7)]
RAGGED = [(1_000, 3), (1, 4_000)]
SINGLE = [(100_000, 1)]
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "LaplaceEvidence": lambda: vm.LaplaceEvidence(steps=10),
    "JointVariational": lambda: vm.JointVariational(steps=10),
    "IMAML": lambda: vm.IMAML(steps=10),
    "NoPooling": vm.NoPooling,
    "CompletePooling": vm.CompletePooling,
    "MAML": lambda: vm.MAML(steps=10),
    "ABML": lambda: vm.ABML(steps=10),
    "SigmaMAML": lambda: vm.SigmaMAML(steps=10),
}
STAGES = ("fit", "posterior", "score", "export")


def measure(name: str, groups: list[tuple[int, int]], stages: int) -> list[dict[str, float]]:
    """Seconds and GB of each stage."""
    logging.getLogger("varmeta").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    base = peak()
    tasks = lines([rows for count, rows in groups for _ in range(count)])
    density = vm.Density(line, tasks, shared=["noise"])
    found = []

    def stage(work: Callable[[], Any]) -> Any:
        start = time.process_time()
        out = work()
        found.append({"seconds": time.process_time() - start, "peak": peak() - base})
        return out

    fitted = stage(lambda: vm.fit(STRATEGIES[name](), density, tasks, progress=False))
    if stages > 1:
        posterior = stage(fitted.posterior)
    if stages > 2:
        stage(lambda: posterior.log_predictive(tasks, 100, generator(0)))
    if stages > 3:
        stage(lambda: vm.to_arviz(fitted, posterior=posterior, draws=100))
    return found


def apart(name: str, groups: list[tuple[int, int]], stages: int) -> list[dict[str, float]]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ragged", "--worker"]
    command.append(json.dumps([name, groups, stages]))
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{name} ended with code {done.returncode}: {last}")
    out: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return out


def main() -> None:
    """Run each strategy on both, one after the other, and print seconds, GB and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategies", nargs="*", default=list(STRATEGIES)[:5])
    parser.add_argument(
        "--stages", type=int, default=len(STAGES), help="how many of " + str(STAGES)
    )
    parser.add_argument("--single", action="store_true", help="100,000 tasks of one row, too")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    out = Table(title=f"{processor()}, commit {commit()}", title_justify="left")
    heads = ("equal s", "ragged s", "ratio", "equal GB", "ragged GB", "ratio")
    for head in ("strategy", "stage", *heads, *["100,000 of 1 s", "GB"] * options.single):
        out.add_column(head, justify="left" if head in ("strategy", "stage") else "right")
    for name in options.strategies:
        cases = [apart(name, groups, options.stages) for groups in (EQUAL, RAGGED)]
        single = apart(name, SINGLE, options.stages) if options.single else []
        for k, stage in enumerate(STAGES[: options.stages]):
            cells = []
            for what, form in (("seconds", ".2f"), ("peak", ".3f")):
                a, b = (case[k][what] for case in cases)
                cells += [f"{a:{form}}", f"{b:{form}}", f"{b / max(a, 1e-3):.1f}"]
            if single:
                cells += [f"{single[k]['seconds']:.1f}", f"{single[k]['peak']:.2f}"]
            out.add_row(name, stage, *cells)
        out.add_section()
    Console(width=140).print(out)


if __name__ == "__main__":
    main()
