"""CPU seconds per meta-step of every implementation: `python -m benchmarks.speed`, `make bench`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import commit, processor
from benchmarks.peers import PEERS
from benchmarks.reference import solve
from benchmarks.worker import MARK, environment
from benchmarks.workloads import NAMES, Workload, make

RESULTS = Path(__file__).parent / "results"
SUITE: list[dict[str, Any]] = [
    *({"name": "sinusoid", "tasks": tasks} for tasks in (4, 25, 200)),
    *({"name": "linear", "tasks": 25, "dim": dim} for dim in (100, 300, 1000)),
    *({"name": "radon", "tasks": tasks} for tasks in (85, 10_000)),
    *({"name": "omniglot", "tasks": tasks} for tasks in (8, 32)),
]
# Compiling takes minutes: the suite does so for one size of each small model.
COMPILED = ("sinusoid T=25", "linear D=300 T=25", "radon T=85")
PART = {"omniglot": 4, "radon": 85}  # tasks that an implementation with `part` times; else 25
ROUND_SECONDS = 0.25
TIMEOUT = 400.0
console = Console(width=None if sys.stdout.isatty() else 120)


class Worker:
    """A process with one implementation; see worker.py."""

    def __init__(self, name: str, folder: Path, workload: Workload, core: int) -> None:
        count = workload.tasks
        if PEERS[name].part:
            count = min(count, PART.get(workload.name, 25))
        self.name, self.scale = name, workload.tasks / count
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, str(folder), str(count), str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment(), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
            cwd=RESULTS.parents[1],
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.log: deque[str] = deque(maxlen=4)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer; a RuntimeError if it ends or takes too long."""
        assert self.process.stdin
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            stop = time.monotonic() + TIMEOUT
            while (line := self.lines.get(timeout=max(stop - time.monotonic(), 0.1))) is not None:
                if line.startswith(MARK):
                    answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    return answer
                self.log.append(line.strip())
        except queue.Empty:
            raise RuntimeError(f"no answer within {TIMEOUT:.0f} s") from None
        except BrokenPipeError:
            pass
        said = re.sub(r'File "[^"]*/', 'File "', " | ".join(self.log))  # paths of this machine
        raise RuntimeError(f"ended: {said}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(workload: Workload, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row per implementation, of those that are here."""
    cores = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload.save(folder / "workload.npz")
        np.savez(folder / "reference.npz", **asdict(solve(workload)))

        def start(job: tuple[int, str]) -> dict[str, Any]:
            index, name = job
            row: dict[str, Any] = {"workload": workload.label, "implementation": name}
            worker = Worker(name, folder, workload, cores[index % len(cores)])
            try:
                row |= worker.ask("start") | {"scaled": worker.scale, "rounds": [], "walls": []}
            except RuntimeError as error:
                worker.close()
                return row | {"failed": str(error)}
            if row["check"]["passed"] is False:
                worker.close()
                return row | {"failed": "wrong gradient, not timed"}
            workers[name] = worker
            return row

        try:
            with ThreadPoolExecutor(len(cores)) as pool:
                for row in pool.map(start, enumerate(names)):
                    rows.append(row)
                    state = row.get("failed") or f"ready in {row['start_seconds']:.1f} s"
                    console.print(f"  {row['implementation']}: {state}", markup=False)
            for turn in range(rounds):
                for row in [r for r in rows if "failed" not in r]:
                    worker = workers[row["implementation"]]
                    took = worker.ask(f"time {cores[-1]} {ROUND_SECONDS}")
                    row["rounds"].append(took["seconds"] * worker.scale)
                    row["walls"].append(took["wall"] * worker.scale)
                console.print(f"  round {turn + 1} of {rounds}")
        finally:
            for worker in workers.values():
                worker.close()
    for row in rows:
        if row.get("rounds"):
            row["seconds"] = statistics.median(row["rounds"])
    return rows


# -- tables ----------------------------------------------------------------------------------------

HEADER = ["implementation", "CPU ms per step", "/ varmeta", "start s", "error", "worst", "of step"]


def cells(row: dict[str, Any], base: float | None) -> list[str]:
    """A row of the table; `base` is what varmeta (eager) takes."""
    if "check" not in row:
        return [row["implementation"], row["failed"][:60], "", "", "", "", ""]
    check = row["check"]
    errors = [f"{check[key]:.0e}" for key in ("median", "worst", "step")]
    if "failed" in row:
        return [row["implementation"], row["failed"], "", f"{row['start_seconds']:.1f}", *errors]
    mark = "~" if row["scaled"] > 1 else ""
    ratio = f"{row['seconds'] / base:.2f}" if base else ""
    milliseconds = 1e3 * row["seconds"]
    time_text = mark + (f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}")
    return [row["implementation"], time_text, ratio, f"{row['start_seconds']:.1f}", *errors]


def groups(rows: list[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Table rows by workload."""
    out: dict[str, list[list[str]]] = {}
    base = {r["workload"]: r.get("seconds") for r in rows if r["implementation"] == "varmeta"}
    for row in rows:
        out.setdefault(row["workload"], []).append(cells(row, base.get(row["workload"])))
    return out


def show(rows: list[dict[str, Any]]) -> None:
    """On the console."""
    for title, lines in groups(rows).items():
        table = Table(*HEADER, title=title, title_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line per workload, a column per implementation, CPU milliseconds per step."""
    out = ["| workload | " + " | ".join(PEERS) + " |", "| --- |" + " ---: |" * len(PEERS)]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        line = {row["implementation"]: row for row in rows if row["workload"] == workload}
        texts = ["" if name not in line else "failed" for name in PEERS]
        for k, name in enumerate(PEERS):
            if "seconds" in line.get(name, {}):
                texts[k] = cells(line[name], None)[1]
        out.append(f"| {workload} | " + " | ".join(texts) + " |")
    return [*out, ""]


def markdown(report: dict[str, Any]) -> str:
    """As a file."""
    out = [f"{report['date']}, {report['machine']}; {report['versions']}.", ""]
    out += ["CPU milliseconds per meta-step:", "", *summary(report["rows"])]
    for title, lines in groups(report["rows"]).items():
        out += [f"**{title}**", "", "| " + " | ".join(HEADER) + " |"]
        out += ["| --- |" + " ---: |" * (len(HEADER) - 1)]
        out += ["| " + " | ".join(line) + " |" for line in lines] + [""]
    return "\n".join(out)


def describe() -> dict[str, str]:
    """Date, machine and versions."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("varmeta-ppl", "torch", "pyro-ppl", "jax", "torchopt"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"one core of {processor()}",
        "versions": f"Python {platform.python_version()}, commit {commit()}, " + ", ".join(found),
    }


def write(report: dict[str, Any], path: Path) -> None:
    """JSON and markdown; workloads measured earlier the same day, and not again now, stay."""
    RESULTS.mkdir(exist_ok=True)
    measured = {row["workload"] for row in report["rows"]}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in old if row["workload"] not in measured] + report["rows"]
    full = {**report, "rows": sorted(rows, key=_position)}
    path.write_text(json.dumps(full, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(full))


def _position(row: dict[str, Any]) -> tuple[int, str]:
    """Workloads in the order of the suite, others behind them."""
    name, *sizes = row["workload"].replace("=", " ").split()
    numbers = [int(size) for size in sizes if size.isdigit()]
    return list(NAMES).index(name), "".join(f"{n:9d}" for n in numbers)


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--workload", choices=["all", *NAMES], default="all")
    parser.add_argument("--tasks", type=int, help="only with one workload (default 25)")
    parser.add_argument("--dim", type=int, default=100, help="of linear (default 100)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="implementations, separated by commas")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULTS}; implied by all")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(PEERS)
    if unknown := [name for name in wanted if name not in PEERS]:
        parser.error(f"--only: unknown {unknown[0]!r}; there are: {', '.join(PEERS)}")
    names = []
    for name in wanted:
        if why := PEERS[name].why_absent():
            console.print(f"skipped: {name}: {why}", markup=False)
        else:
            names.append(name)
    suite = SUITE
    if options.workload != "all":
        suite = [{"name": options.workload, "tasks": options.tasks or 25, "dim": options.dim}]
    report: dict[str, Any] = {**describe(), "rows": []}
    save = options.save or options.workload == "all"
    path = RESULTS / f"cpu-{report['date']}.json"
    begin = time.monotonic()
    for number, arguments in enumerate(suite):
        workload = make(**arguments)
        minutes = (time.monotonic() - begin) / 60
        console.print(f"{number + 1} of {len(suite)}: {workload.label} ({minutes:.1f} min so far)")
        rounds = min(options.rounds, 3) if workload.name == "omniglot" else options.rounds
        here = names
        if suite is SUITE and "varmeta compiled" in names and workload.label not in COMPILED:
            here = [name for name in names if name != "varmeta compiled"]
            console.print("  skipped: varmeta compiled: compiling takes minutes, the suite does so")
            console.print(f"  for {', '.join(COMPILED)}; give --workload to have it for another")
        rows = measure(workload, here, rounds)
        report["rows"] += rows
        show(rows)
        report["minutes"] = round((time.monotonic() - begin) / 60, 1)
        if save:  # after every workload: a long run that is stopped leaves what it has
            write(report, path)
    if save:
        console.print(f"written: {path}, {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
