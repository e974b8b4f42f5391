"""`python -m benchmarks.fleet`: every strategy on every case, beside the references.

What is done lies in the output folder, one file for each strategy on each case; the same command
goes on where it was stopped, and tries again what failed with `--again`. At the end the page and
its numbers are written to `benchmarks/results/fleet.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.fleet.cases import CASES
from benchmarks.fleet.page import write_page
from benchmarks.fleet.runner import Prepared, Record, run_one, run_several
from benchmarks.machine import commit
from varmeta.settings import DEFAULT, STRATEGIES

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    every, default = list(STRATEGIES), DEFAULT.split(",")
    args = _arguments(every)
    torch.set_num_threads(1)
    wanted = _chosen(args.strategies, every, "--strategies")
    for case in _chosen(args.cases, list(CASES), "--cases"):
        prepared, folder = Prepared(CASES[case]), args.out / case
        folder.mkdir(parents=True, exist_ok=True)
        open_ = [name for name in wanted if not _is_done(folder / f"{name}.json", args.again)]
        if set(default) <= set(wanted) and not _is_done(folder / "compare.json", args.again):
            makers = {name: STRATEGIES[name] for name in default}
            limit = args.limit * len(default)
            records = run_several(prepared, makers, limit, folder / "compare")
            whole = all(record["finished"] for record in records.values())
            first = next((r for r in records.values() if not r["finished"]), None)
            reason = "" if first is None else first["reason"]
            _note(
                folder, {"case": case, "strategy": "compare", "finished": whole, "reason": reason}
            )
            for record in records.values():
                if record["finished"]:
                    _note(folder, record)
            open_ = [name for name in open_ if not records.get(name, {"finished": 0})["finished"]]
        for name in open_:
            _note(folder, run_one(prepared, name, STRATEGIES[name], args.limit))
    write_page(read_records(args.out), args.page)
    print(f"Written: {args.page}")


def _arguments(every: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--cases", default="", help=f"by commas; default all: {', '.join(CASES)}")
    parser.add_argument("--strategies", default="", help=f"by commas; default: {', '.join(every)}")
    parser.add_argument("--out", type=Path, default=Path("runs/fleet"), help="what is done")
    parser.add_argument("--page", type=Path, default=RESULTS / "fleet.md", help="where it is told")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one strategy")
    parser.add_argument("--again", action="store_true", help="try again what failed")
    return parser.parse_args()


def _chosen(given: str, known: list[str], option: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            raise SystemExit(f"{option}: there is no {name!r}; there are: {', '.join(known)}")
    return names


def _is_done(path: Path, again: bool) -> bool:
    return path.exists() and (not again or json.loads(path.read_text())["finished"])


def _note(folder: Path, record: Record) -> None:
    part = folder / "part.json"
    part.write_text(json.dumps(record | {"commit": commit()}))
    part.replace(folder / f"{record['strategy']}.json")
    how = "finished" if record["finished"] else f"FAILED: {record['reason']}"
    seconds = f"{record['seconds']:.1f} s, " if "seconds" in record else ""
    print(f"{record['case']}, {record['strategy']}: {seconds}{how}", flush=True)


def read_records(folder: Path) -> dict[str, dict[str, Record]]:
    """By case, then by strategy, in the order of both."""
    order = ["compare", *STRATEGIES]
    out: dict[str, dict[str, Record]] = {}
    for case in CASES:
        paths = [folder / case / f"{name}.json" for name in order]
        found = {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}
        if found:
            out[case] = found
    return out


if __name__ == "__main__":
    main()
