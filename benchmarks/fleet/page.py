"""The page: what was wanted and is so, tables over all cases and for each, all that is amiss."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.fleet.cases import CASES
from benchmarks.fleet.references import maximum
from benchmarks.fleet.runner import Prepared
from benchmarks.fleet.verdicts import (
    ALL,
    FAR,
    RATIOS,
    SHIFT,
    TOGETHER,
    UNPOOLED,
    WHOLE,
    WORST_K,
    Records,
    Row,
    agrees,
    judged,
    k_says_no,
    numbers,
)
from benchmarks.machine import commit, processor
from varmeta.settings import DEFAULT, STRATEGIES

_DEFAULT = DEFAULT.split(",")
_ORDER = [ALL, *_DEFAULT, *(name for name in STRATEGIES if name not in _DEFAULT)]
_IMPROVING = re.compile(r"still improving by (\S+) nats per task in the last tenth of them")
_PAIRS = (("loc_nuts", "loc_ml"), ("scale_nuts", "scale_ml"), ("shared_nuts", "shared_ml"))


def write_page(records: Records, path: Path) -> None:
    """Markdown, printed too, and its numbers beside it as JSON.

    Runs whose numbers lie there already and that were not made again keep them, and their commit.
    """
    earlier = _earlier(records, path.with_suffix(".json"))
    cases = [case for case in CASES if case in {*records, *(row["case"] for row in earlier)}]
    prepared = {case: Prepared(CASES[case]) for case in cases}
    rows = numbers(records, prepared) + earlier
    ran = [row for row in rows if row["strategy"] != ALL]
    text = "\n\n".join(
        [
            "# The fleet",
            *_top(rows, ran, prepared),
            "## What was wanted, and is so",
            _wanted(rows, ran, prepared),
            "## Every strategy over all cases",
            *_by_strategy(ran),
            "## What did not finish",
            _grouped([r for r in rows if not r["finished"]]),
            "## What did not converge",
            _grouped([r for r in ran if r["converged"] is False]),
            "In brackets: nats per task by which the objective still improved in the last tenth of "
            "the steps.",
            "## What is worse than no pooling",
            *_worse(ran),
            "## Task posteriors beside NUTS",
            *_beside_nuts(ran),
            "## Case by case",
            _LEGEND,
            *(part for case in cases for part in _of_case(prepared[case], rows)),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


def _earlier(records: Records, path: Path) -> list[Row]:
    """The rows of an earlier page of which `records` have no run."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if row["strategy"] not in records.get(row["case"], {})]


# -- the top ---------------------------------------------------------------------------------------


def _top(rows: Sequence[Row], ran: Sequence[Row], prepared: Mapping[str, Prepared]) -> list[str]:
    commits = sorted({row["commit"] or "unknown" for row in rows})
    done = [row for row in ran if row["finished"]]
    told = [row for row in done if row["converged"] is not None]
    strategies = {row["strategy"] for row in ran}
    out = [
        f"Written {datetime.now(UTC):%Y-%m-%d} at varmeta commit {commit() or 'unknown'}; the runs "
        f"were made at {', '.join(commits) or 'none'}. {processor()}, one thread; Python "
        f"{sys.version.split()[0]}, torch {version('torch')}.",
        f"{len(prepared)} real data sets and {len(strategies)} strategies: {len(ran)} runs of one "
        f"strategy on one data set, of {len(CASES) * len(STRATEGIES)} for all {len(CASES)} data "
        f"sets and {len(STRATEGIES)} strategies. {len(done)} finished. Of the {len(told)} that can "
        f"say whether they converged, {sum(row['converged'] for row in told)} did.",
        "The data, models and references are in `benchmarks/fleet/`, whose README says what the "
        "columns mean. A dash: does not apply, or is not known.",
    ]
    absent = [name for name in STRATEGIES if name not in strategies]
    if absent:
        out.append(f"Not run on any data set: {_and(absent)}.")
    bare = [case for case, found in prepared.items() if found.reference is None]
    if bare:
        out.append(
            f"No reference has been computed for {_and(bare)}, so that the columns of NUTS and "
            "maximum likelihood (ML) are blank there; `make fleet-references` computes what is "
            "missing."
        )
    short = [c for c, p in prepared.items() if p.reference and maximum(p.reference) is None]
    if short:
        out.append(
            f"The search for the maximum of the likelihood did not arrive for {_and(short)}, so "
            "that the columns of ML are blank there."
        )
    return out


def _wanted(rows: Sequence[Row], ran: Sequence[Row], prepared: Mapping[str, Prepared]) -> str:
    """What is asked of the fleet, line by line, and how much of it holds."""
    whole = [row for row in rows if row["strategy"] == ALL]
    held = {
        case: {r["strategy"] for r in ran if r["case"] == case and r["finished"]}
        for case in prepared
    }
    complete = [case for case, names in held.items() if names >= set(STRATEGIES)]
    finished = sum(row["finished"] for row in ran)
    claims = [r for r in ran if r["strategy"] in WHOLE and r["finished"] and r["shift"] is not None]
    fine = [row for row in claims if agrees(row) or k_says_no(row)]
    pooled = [row for row in ran if judged(row)]
    worse = [row for row in pooled if row["worse"]]
    said = [row for row in worse if row["why"]]
    known = [case for case, found in prepared.items() if found.reference]
    best = [case for case in known if maximum(prepared[case].reference or {}) is not None]
    kinds = {found.case.kind.split(",")[0] for found in prepared.values()}
    lines = [
        ("at least 20 real data sets", f"{len(prepared)}", len(prepared) >= 20),
        ("of many kinds", f"{len(kinds)}: {', '.join(sorted(kinds))}", len(kinds) >= 8),
        (
            "`compare` with its default strategies finishes on each",
            f"{sum(row['finished'] for row in whole)} of {len(prepared)}",
            sum(row["finished"] for row in whole) == len(prepared),
        ),
        (
            f"all {len(STRATEGIES)} strategies finish on at least 20 data sets",
            f"{finished} of the {len(ran)} runs made finished; all strategies on "
            f"{len(complete)} data sets",
            finished == len(ran) and len(complete) >= 20,
        ),
        ("long NUTS beside each", f"{len(known)} of {len(prepared)}", len(known) == len(prepared)),
        ("ML beside each", f"{len(best)} of {len(prepared)}", len(best) == len(prepared)),
        (
            f"{_claimants()}, which claim the whole posterior: within {SHIFT} sd and "
            f"{RATIOS[0]} to {RATIOS[1]} of NUTS, or k̂ says no",
            f"{len(fine)} of {len(claims)}" if claims else "not run",
            len(fine) == len(claims) if claims else None,
        ),
        (
            "what pools is no worse than no pooling by more than two paired standard errors, or "
            "the page says why",
            f"{len(pooled) - len(worse)} of {len(pooled)} are not worse, and for {len(said)} of "
            f"the {len(worse)} others the page says why",
            len(said) == len(worse) if pooled else None,
        ),
    ]
    words = {True: "yes", False: "**no**", None: "–"}
    return _table(("wanted", "found", "is so"), [(a, b, words[c]) for a, b, c in lines], left=3)


# -- over all cases --------------------------------------------------------------------------------


def _by_strategy(rows: Sequence[Row]) -> Iterator[str]:
    head = (
        "strategy", "finished", "converged", "seconds", "gradients a task", "worse", "θ0 to NUTS",
        "scales to ML", "shift", "sd ratio", "k̂ > .7",
    )  # fmt: skip
    lines = []
    for name, mine in _per_strategy(rows):
        done = [row for row in mine if row["finished"]]
        told = [row for row in done if row["converged"] is not None]
        against = [row for row in done if judged(row)]
        with_k = [row for row in done if row["known_pareto_k"] is not None]
        pools = name != UNPOOLED
        lines.append(
            (
                name,
                f"{len(done)}/{len(mine)}",
                _of(sum(row["converged"] for row in told), told),
                _median(done, "seconds", ".1f"),
                _median(done, "gradients_per_task", ",.0f"),
                _of(sum(row["worse"] for row in against), against),
                _median(done, "loc_nuts", ".2f") if pools else "–",
                _median(done, "scale_ml", ".2f") if pools else "–",
                _median(done, "shift", ".2f"),
                _median(done, "sd_ratio", ".2f"),
                _of(sum(k_says_no(row) for row in with_k), with_k),
            )
        )
    yield _table(head, lines)
    yield (
        "Seconds, gradients and distances are medians over the data sets on which the strategy "
        "finished. *Worse*: on how many it is worse than no pooling on held-out rows (below). *θ0 "
        "to NUTS*, *scales to ML*: the largest distance over coordinates, in posterior standard "
        "deviations of NUTS. *Shift*, *sd ratio*: of the task posteriors, beside those of NUTS. "
        "*k̂ > .7*: on how many data sets a task's k̂ says that its posterior is not to be "
        "trusted, of those where there is one (point posteriors and draws have none)."
    )


def _worse(rows: Sequence[Row]) -> Iterator[str]:
    pooled = [row for row in rows if judged(row)]
    yield (
        f"On held-out rows of known tasks, or on new tasks, by more than two paired standard "
        f"errors. Chance alone makes about 1 in 44 differences look so, and more where tasks are "
        f"few; {len(pooled)} runs were compared, most of them twice. What the record has that may "
        f"be why is beside each; of θ0, shared values and scales, distances above {FAR:g} sd."
    )
    names = []
    for name, mine in _per_strategy(pooled):
        worse = [row["case"] for row in mine if row["worse"]]
        if worse:
            names.append(f"{name}, {len(worse)} of {len(mine)}: {', '.join(worse)}")
    yield _list(names)
    lines = [
        (
            row["strategy"],
            row["case"],
            _pair(row, "known_gain"),
            _pair(row, "new_gain"),
            "; ".join(row["why"]) or "nothing here says why",
        )
        for _, mine in _per_strategy(pooled)
        for row in mine
        if row["worse"]
    ]
    if lines:
        head = ("strategy", "data", "known tasks, nats a row", "new tasks, nats a row", "why")
        yield _table(head, lines, left=2, last_left=True)


def _beside_nuts(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        f"As NUTS: the median shift is at most {SHIFT} sd and the median sd ratio is from "
        f"{RATIOS[0]} to {RATIOS[1]}. Only {_claimants()} claim the whole posterior. The "
        "others' posteriors are given a point of θ0, scales and shared values, and so are too "
        "narrow where the data do not tell these: k̂ cannot see that, and the strategies name the "
        "scales themselves. Each data set is counted in the first column that it fits."
    )
    lines = []
    for name, mine in _per_strategy(rows):
        known = [row for row in mine if row["finished"] and row["shift"] is not None]
        known = [row for row in known if row["posterior"] != "delta"]
        if not known or name in (UNPOOLED, TOGETHER):
            continue
        bad = [row for row in known if not agrees(row)]
        silent = [row for row in bad if not k_says_no(row)]
        neither = [row for row in silent if not row["undetermined"]]
        lines.append(
            (
                name,
                f"{len(known) - len(bad)} of {len(known)}",
                str(len(bad) - len(silent)),
                str(len(silent) - len(neither)),
                ", ".join(f"{r['case']} ({r['shift']:.2f}, {r['sd_ratio']:.2f})" for r in neither)
                or "–",
            )
        )
    head = ("strategy", "as NUTS", f"k̂ above {WORST_K}", "a scale named", "none of these")
    yield _table(head, lines, last_left=True) if lines else "None."
    yield "In brackets: the median shift and sd ratio."


# -- a case ----------------------------------------------------------------------------------------

_LEGEND = (
    "*θ0*, *scales*, *shared*: the largest distance over coordinates to NUTS / to ML, in posterior "
    "standard deviations of NUTS; scales that a strategy states and does not learn have a dash. "
    "*Known tasks*: mean log density of a held-out row, nats; *gain* and *new tasks, gain*: the "
    "difference to no pooling with its paired standard error. *Exact*: the task posteriors are "
    "exact, given the learned θ0, scales and shared values."
)


def _of_case(prepared: Prepared, rows: Sequence[Row]) -> Iterator[str]:
    case, problem, reference = prepared.case, prepared.problem, prepared.reference
    mine = [row for row in rows if row["case"] == case.name and row["strategy"] != ALL]
    mine = [row for _, some in _per_strategy(mine) for row in some]
    density, support = problem.density, problem.train.support
    about = (
        f"{case.kind[0].upper()}{case.kind[1:]}; {len(problem.train)} tasks with "
        f"{int(support.mask.sum())} support rows in all; coordinates that adapt: {density.dim}, "
        f"that are shared: {density.shared_dim}."
    )
    head = (
        "strategy", "converged", "seconds", "θ0", "scales", "shared", "shift", "sd ratio", "k̂",
        "known tasks", "gain", "new tasks, gain",
    )  # fmt: skip
    lines = []
    if reference is not None:
        nuts = reference["nuts"]
        about += (
            f" Reference: {nuts['how']}, R-hat at most {nuts['worst_rhat']}, effective draws at "
            f"least {nuts['least_ess']:,}, {nuts['divergent']} divergent."
        )
        gain = _pair(mine[0], "nuts_gain") if mine else "–"
        mean = sum(nuts["known_log_density"]) / int(problem.train.query.mask.sum())
        lines.append(("*NUTS, the reference*", *["–"] * 8, f"{mean:.3f}", gain, "–"))
    for row in mine:
        if not row["finished"]:
            lines.append((row["strategy"], "failed", *["–"] * (len(head) - 2)))
            continue
        pools = row["strategy"] != UNPOOLED
        lines.append(
            (
                row["strategy"],
                {None: "–", True: "yes", False: "no"}[row["converged"]],
                _cell(row["seconds"], ".1f"),
                *(_both(row, pair) if pools else "–" for pair in _PAIRS),
                _cell(row["shift"], ".2f"),
                _cell(row["sd_ratio"], ".2f"),
                _cell(row["known_pareto_k"], ".2f", exact=True),
                _cell(row["known_elpd"], ".3f"),
                _pair(row, "known_gain") if pools else "–",
                _pair(row, "new_gain") if pools else "–",
            )
        )
    yield f"### {case.name}"
    yield about
    yield _table(head, lines)
    said = dict.fromkeys(text.split("; ")[0] for row in mine for text in row["warnings"])
    other = [text for text in said if " did not converge" not in text]
    if other:
        yield f"<details><summary>Warnings: {len(other)}</summary>\n\n{_list(other)}\n\n</details>"


# -- words and tables ------------------------------------------------------------------------------


def _per_strategy(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for name in sorted({row["strategy"] for row in rows}, key=_ORDER.index):
        yield name, [row for row in rows if row["strategy"] == name]


def _grouped(rows: Sequence[Row]) -> str:
    """Why, by strategy; cases of which the same is to be said are named together."""
    out = []
    for name, mine in _per_strategy(rows):
        said: dict[str, list[str]] = {}
        for row in mine:
            text = row["reason"].removesuffix("; raise steps")
            found = _IMPROVING.search(text)
            case = f"{row['case']} ({found[1]})" if found else row["case"]
            said.setdefault(_IMPROVING.sub("still improving", text), []).append(case)
        out += [f"{name} on {_and(cases)}: {text}" for text, cases in said.items()]
    return _list(out)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _of(count: int, among: Sequence[Any]) -> str:
    return f"{count}/{len(among)}" if among else "–"


def _both(row: Row, keys: tuple[str, str]) -> str:
    cells = [_cell(row[key], ".2f") for key in keys]
    return "–" if set(cells) == {"–"} else " / ".join(cells)


def _pair(row: Row, key: str) -> str:
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None:
        return "–"
    return _cell(value, ".3f") + ("" if error is None else f" ± {error:.3f}")


def _cell(value: Any, form: str, exact: bool = False) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):  # an infinity; k̂ is minus infinity where q is exact
        return "exact" if exact and value == "-inf" else value.replace("inf", "∞")
    return f"{value:{form}}"


def _median(rows: Sequence[Row], key: str, form: str) -> str:
    found = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return f"{statistics.median(found):{form}}" if found else "–"


def _list(lines: Iterable[str]) -> str:
    found = [f"- {line}" for line in lines]
    return "\n".join(found) if found else "None."


def _table(
    head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1, last_left: bool = False
) -> str:
    """Words to the left, in the first columns and if asked the last; numbers to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    if last_left:
        rule[-1] = "---"
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _claimants() -> str:
    """The strategies that claim the whole posterior, as a list in words."""
    return f"{', '.join(WHOLE[:-1])} and {WHOLE[-1]}"
