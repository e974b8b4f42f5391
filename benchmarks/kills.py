"""Kills: SIGKILL at every kind of file operation and at any time, then the same command again.

    python -m benchmarks.kills               # 240 kills; the table is kept in results/kills.md
    python -m benchmarks.kills --kills 40    # fewer

A process is killed and another goes on, until the run is done. It has survived if its result is
that of a run that nobody disturbed, bit for bit, and its folder holds the same files and no others.
"""

from __future__ import annotations

import argparse
import builtins
import os
import random
import signal
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varmeta import files

RESULTS = Path(__file__).parent / "results"
MEMORY = Path("/dev/shm")  # a kill, unlike a power cut, does not mind where files lie
CALLS = ("mkdir", "replace", "fsync", "unlink", "rmdir")  # of `os`; and each write, at its middle


@contextmanager
def at_operations(act: Callable[[str], None], root: Path) -> Iterator[None]:
    """Call `act` with its name before each operation below `root`, in the middle of each write.

    `fsync` is called for, and not made: a kill, unlike a power cut, does not need it.
    """

    class Halves:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Halves:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            half = len(data) // 2
            self.file.write(data[:half])
            self.file.flush()
            act("write")
            self.file.write(data[half:])

    def opened(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = builtins.open(path, mode, *rest, **named)  # noqa: SIM115
        return Halves(file) if "w" in mode and str(path).startswith(str(root)) else file

    def before(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(target: Any, *given: Any, **named: Any) -> Any:
            if name == "fsync":
                return act(name)
            if str(target).startswith(str(root)):
                act(name)
            return call(target, *given, **named)

        return called

    usual = {name: getattr(os, name) for name in CALLS}
    files.open = opened  # type: ignore[attr-defined]
    try:
        for name, call in usual.items():
            setattr(os, name, before(name, call))
        yield
    finally:
        del files.open  # type: ignore[attr-defined]
        for name, call in usual.items():
            setattr(os, name, call)


# -- what is killed --------------------------------------------------------------------------------


def tasks() -> Any:
    """Six small tasks, split."""
    import torch

    from varmeta import Tasks
    from varmeta.seeds import generator

    rng = generator(0)
    like: dict[str, Any] = {"generator": rng, "dtype": torch.float64}
    pairs = []
    for _ in range(6):
        x = torch.randn(6, 1, **like)
        pairs.append((x, torch.randn((), **like) + x[:, 0] + 0.3 * torch.randn(6, **like)))
    return Tasks.from_list(pairs).split(0.4)


def level(x: Any, y: Any = None) -> Any:
    """A level for each task, known slope and noise."""
    import pyro
    import pyro.distributions as dist

    mean = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean + x[..., 0], 0.3), obs=y)


def short(name: str) -> Any:
    """A strategy of the catalogue with few steps."""
    from dataclasses import fields, replace

    from varmeta.settings import STRATEGIES

    made = STRATEGIES[name]()
    few = {"steps": 6, "adapt_steps": 4, "draws": 20, "warmup": 4, "chains": 1}
    return replace(made, **{f.name: few[f.name] for f in fields(made) if f.name in few})


def work(name: str, folder: Path) -> None:
    """One process: a strategy with a checkpoint at every step, then a comparison of it."""
    import torch

    from varmeta import Density, compare, fit, report_write
    from varmeta.inference import fit as fit_module
    from varmeta.inference import nuts

    fit_module._SECONDS_BETWEEN_CHECKPOINTS = -1.0  # after each step
    nuts._QUICK_STEPS = 10
    report_write._DPI = 20
    warnings.simplefilter("ignore")
    given = tasks()
    density = Density(level, given)
    result = fit(short(name), density, given, checkpoint=folder / "alone.pt")
    strategies = {name: short(name), "pooled": short("complete-pooling")}
    overwrite = (folder / "overwrite").exists()
    table = None
    try:
        if overwrite:  # once; when it is interrupted the same call without it goes on
            (folder / "overwrite").unlink()
        table = compare(
            strategies, density, given, draws=20, folder=folder / "run", overwrite=overwrite
        ).table
    except FileExistsError:
        pass  # it was finished when the kill came
    kept: dict[str, Any] = {"state": result.state.state_dict()}
    if table is not None:
        kept["table"] = table.drop(columns=["seconds", "adapt_seconds"]).to_csv()
    torch.save(kept, folder / "result.pt")


# -- the parent ------------------------------------------------------------------------------------


def started(name: str, folder: Path, at: int = -1) -> int:
    """The number of a process at work, killed at file operation `at` (never if negative).

    It is a copy of this one (`fork`), which has imported all that takes time to import.
    """
    pid = os.fork()
    if pid:
        return pid
    count = -1

    def act(what: str) -> None:
        nonlocal count
        count += 1
        if count == at:
            (folder.parent / "killed_at").write_bytes(what.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with at_operations(act, folder):
            work(name, folder)
        (folder.parent / "operations").write_text(str(count + 1))
    except BaseException as error:
        (folder.parent / "error").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """Its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def content(folder: Path) -> tuple[Any, str]:
    """What a run left: its result, and the table that was written, without times."""
    import pandas as pd
    import torch

    table = pd.read_csv(folder / "run" / "table.csv")
    kept = torch.load(folder / "result.pt", weights_only=True)
    return kept["state"], table.drop(columns=["seconds", "adapt_seconds"]).to_csv()


def same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    return bool(a == b or (a != a and b != b))


def survive(name: str, kills: int, place: Path, rng: random.Random) -> Counter[str]:
    """Kill a strategy's run `kills` times, most of them at a file operation; what became of it."""
    calm = place / "calm"
    (calm / "w").mkdir(parents=True)
    start = time.monotonic()
    if ended(started(name, calm / "w")):
        raise RuntimeError((calm / "error").read_text())
    took = time.monotonic() - start
    operations = int((calm / "operations").read_text())
    wanted, wanted_tree = content(calm / "w"), tree(calm / "w")
    found: Counter[str] = Counter()
    left = kills
    print(f"{name}: {operations} file operations, {took:.1f} s", flush=True)
    while left:
        trial = place / f"trial{left}"
        folder = trial / "w"
        folder.mkdir(parents=True)
        overwrites = rng.random() < 0.3
        if overwrites:  # an old run is there, to be replaced
            ended(started(name, folder))
            (folder / "overwrite").touch()
            (folder / "alone.pt").unlink()
        for _ in range(min(left, rng.choice([1, 1, 2, 3]))):
            left -= 1
            if rng.random() < 0.8:
                status = ended(started(name, folder, rng.randrange(operations)))
                where = trial / "killed_at"
                what = where.read_text() if status == -signal.SIGKILL else "after the end"
            else:
                process, what = started(name, folder), "at any time"
                time.sleep(rng.uniform(0, took))
                os.kill(process, signal.SIGKILL)
                ended(process)
            found[f"kill: {what}"] += 1
        if ended(started(name, folder)):
            found["lost"] += 1
            print(f"{name}: {(trial / 'error').read_text()}")
        elif not same(content(folder), wanted):
            found["different"] += 1
            print(f"{name}: another result")
        elif tree(folder) != wanted_tree:
            found["stray"] += 1
            print(f"{name}: {set(tree(folder)) ^ set(wanted_tree)}")
        else:
            found["survived"] += 1
        found["trials"] += 1
    return found


def full_disk() -> str:
    """A run on a disk of its own that fills up: one sentence, and it goes on where it was."""
    if os.name != "posix" or os.geteuid() != 0:
        return "not tried: it takes root to mount a small disk"
    with tempfile.TemporaryDirectory() as place:
        mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place]
        if subprocess.run(mount, capture_output=True).returncode:
            return "not tried: no disk can be mounted here"
        try:
            status = ended(started("joint", Path(place) / "w"))
            said = (Path(place) / "error").read_text().replace(place, "/disk")
            subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
            again = ended(started("joint", Path(place) / "w"))
            end = "FAILED" if again else "went on"
            return f"exit status {status}, {said}. With more room the same call {end}"
        finally:
            subprocess.run(["umount", place], check=True)


def main() -> None:
    from varmeta.settings import STRATEGIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work("maml", Path(place))  # what is slow the first time is done once, for all processes
    names = list(STRATEGIES)
    share = {n: options.kills // len(names) for n in names}
    for n in names[: options.kills % len(names)]:
        share[n] += 1
    rows, total = [], Counter[str]()
    for name, kills in share.items():
        if not kills:
            continue
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None) as place:
            found = survive(name, kills, Path(place), random.Random(f"{options.seed} {name}"))
        total += found
        rows.append(f"| {name} | {kills} | {found['trials']} | {found['survived']} |")
        print(rows[-1], flush=True)
    where = ", ".join(
        f"{key.removeprefix('kill: ')} {n}" for key, n in sorted(total.items()) if ":" in key
    )
    text = "\n".join(
        [
            "# Kills by SIGKILL",
            "",
            "`python -m benchmarks.kills`: a run is killed once to three times, then left to end.",
            "It survives if its result is that of a run left alone, bit for bit, and its folder",
            "holds the same files.",
            "",
            "| strategy | kills | runs | survived |",
            "|---|---|---|---|",
            *rows,
            f"| **all** | {options.kills} | {total['trials']} | {total['survived']} |",
            "",
            f"Where: {where}. Lost {total['lost']}, another result {total['different']}, stray "
            f"files {total['stray']}.",
            "",
            f"A full disk: {full_disk()}.",
            "",
        ]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kills.md").write_text(text)
    raise SystemExit(total["survived"] != total["trials"])


if __name__ == "__main__":
    main()
