"""The page of what can be trusted: `python -m benchmarks.trust` writes results/trust.md.

Stale resumes, bad inputs and threads are run at full size (about six minutes); kills and memory are
taken from the pages that `make kills` and `python -m benchmarks.size` leave; `--totals` takes them
anew and leaves the rest of the page as it is.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from benchmarks import bad_inputs, stale, threads
from benchmarks.machine import commit, processor
from varmeta.settings import STRATEGIES

RESULTS = Path(__file__).parent / "results"
SIZES = ("20,000", "100,000")  # tasks


def main() -> bool:
    """Measure, write the page and print it; whether nothing in it is a defect."""
    path = RESULTS / "trust.md"
    if "--totals" in sys.argv:
        path.write_text(renewed(path.read_text()))
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused, resumed = stale.table(), stale.new_process()
        inputs, pairs = bad_inputs.main(), threads.table(list(STRATEGIES))
    text, good = page(refused, resumed, inputs, pairs)
    path.write_text(text)
    print(text)
    return good


def page(
    refused: pd.DataFrame, resumed: dict[str, str], inputs: pd.DataFrame, pairs: pd.DataFrame
) -> tuple[str, bool]:
    """The text, and whether all that was wanted is so (kills and memory aside)."""
    cells = refused[list(stale.KEPT)].to_numpy().ravel()
    stale_good = bool(refused["wanted"].all())
    back = sum(end == "goes on" for end in resumed.values())
    total = inputs.loc["all"]
    pair_good = pairs[["as alone", "randn", "state"]].all(axis=1)
    goods = [
        stale_good,
        back == len(resumed),
        not total[["vague", "raw", "silent"]].any(),
        bool(pair_good.all()),
    ]
    asked = sum(cell != "–" for cell in cells)
    told, read = (sum(cell == which for cell in cells) for which in ("refused", "read"))
    names, totals = len(set(pairs["first"])), elsewhere()
    rows = [
        totals[0],
        (
            "stale resumes refused, with what differs",
            f"{told} of {asked}, of {len(refused)} kinds; {read} read with a warning, finished",
            "`python -m benchmarks.stale`",
        ),
        (
            "the same arguments in a new process go on, bit for bit",
            f"{back} of {len(resumed)}",
            "`python -m benchmarks.stale`",
        ),
        (
            "bad inputs that get an error of ours, which names what is wrong",
            f"{total['ours']} of {total.sum()}; {total['raw']} raw, {total['silent']} silent",
            "`python -m benchmarks.bad_inputs`",
        ),
        *totals[1:],
        (
            f"pairs of {names} strategies in two threads, as alone",
            f"{pair_good.sum()} of {len(pairs)}",
            "`python -m benchmarks.threads`",
        ),
    ]
    parts = [
        "# Nothing stale, nothing wrong in silence, nothing lost",
        f"Written by `make trust` on {datetime.now(UTC):%Y-%m-%d} at commit "
        f"{commit() or 'unknown'}. {processor()}. Kills and memory are from pages of their own, of "
        "other runs. Tests run each command at small size.",
        table(("what", "found", "how"), rows),
        "## Stale resumes",
        "A run is begun, one thing is changed, and the call is made again: `fit` on the checkpoint "
        "of a run that was stopped or is finished, `compare` on an unfinished folder. (A finished "
        "folder is never taken up.) *Refused*: one sentence names what is listed and nothing else, "
        "no step is run, no file is touched. *Read*: a finished run under other versions, with a "
        "warning. A dash: there is no such argument.",
        table(
            ("changed", *stale.KEPT, "what the sentence names"),
            [
                (name, *(row[kept] for kept in stale.KEPT), stale.STALE[str(name)].wanted)
                for name, row in refused.iterrows()
            ],
        ),
        "Such a sentence, of a checkpoint and of a folder:",
        *(f"> {refused.loc[name, 'said']}" for name in ("batch_size", "seed")),
        f"The same arguments in a new process went on in {back} of {len(resumed)} cases: "
        f"{counted(resumed)}. {failed(resumed)}".strip(),
        "## Bad inputs",
        "*Ours*: an error raised on purpose, that names what is wrong. "
        "*Vague*: raised on purpose, without the name. *Raw*: of another library. *Silent*: none.",
        table(
            ("area", *map(str, inputs.columns)),
            [(str(name).replace("_", " "), *row) for name, row in inputs.iterrows()],
        ),
        "## Threads",
        "Two fits at once, of each strategy of the command line with each and with itself, half of "
        "the pairs on one density; a third thread calls `torch.randn` meanwhile.",
        table(
            ("wanted", "pairs"),
            [
                (wanted, f"{pairs[column].sum()} of {len(pairs)}")
                for wanted, column in (
                    ("fit, adapted posteriors and predictions as alone, bit for bit", "as alone"),
                    ("`torch.randn` elsewhere is undisturbed", "randn"),
                    ("flags, parameter store and filters of warnings as found", "state"),
                )
            ],
        ),
        *(
            f"Not so: {row['first']} with {row['second']}. {row['raised']}".strip()
            for _, row in pairs[~pair_good].iterrows()
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n", all(goods)


def elsewhere() -> list[tuple[str, str, str]]:
    """The lines that other pages decide."""
    how = "`python -m benchmarks.size`, [table](size.md)"
    return [
        ("kills by SIGKILL survived", kills(), "`make kills`, [table](kills.md)"),
        *((f"peak of memory, {n} tasks", memory(n), how) for n in SIZES),
    ]


def renewed(text: str) -> str:
    """The page with these lines anew."""
    for what, found, how in elsewhere():
        line = re.compile(rf"^\| {re.escape(what)} \|.*$", re.MULTILINE)
        text = line.sub(lambda _, now=f"| {what} | {found} | {how} |": now, text)  # type: ignore[misc]
    return text


def kills() -> str:
    """From its page: how many kills, and how many of the runs that they hit survived."""
    path = RESULTS / "kills.md"
    found = re.search(r"\| \*\*all\*\* \| (\d+) \| (\d+) \| (\d+) \|", text_of(path))
    if found is None:
        return "not measured"
    killed, runs, survived = found.groups()
    return f"{survived} of {runs} runs, after {killed} kills"


def memory(tasks: str) -> str:
    """From the page of sizes: the largest peak of a case, in the last column called so."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text_of(RESULTS / "size.md").splitlines()
        if line.startswith("|")
    ]
    column, case, peaks = None, "", []
    for cells in lines:
        if "tasks" in cells:
            headings = enumerate(cells)
            found = [k for k, cell in headings if "peak" in cell or cell == "after"]
            column = next((k for k in found if "peak" in cells[k]), None)
            if column is not None and "before" in cells[column]:
                column = next((k for k in found if k > column), None)
            continue
        case = cells[0] or case
        if column is not None and case.startswith(f"{tasks} ") and len(cells) > column:
            peaks += re.findall(r"^\d+\.?\d*$", cells[column])
    return f"{max(map(float, peaks)):.2f} GB" if peaks else "not measured"


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def counted(resumed: dict[str, str]) -> str:
    kinds = Counter(name.split(":")[0] for name in resumed)
    return ", ".join(f"{number} × {kind}" for kind, number in kinds.items())


def failed(resumed: dict[str, str]) -> str:
    bad = [f"{name} ({end})" for name, end in resumed.items() if end != "goes on"]
    return f"Not: {', '.join(bad)}." if bad else ""


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(not main())
