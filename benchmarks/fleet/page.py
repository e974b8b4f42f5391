"""The page: a table over all cases, one for each case, and everything that is not as wanted."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.fleet.cases import CASES
from benchmarks.fleet.runner import Prepared, Record, nuts_record, paired
from varmeta.scores import KNOWN, NEW

Records = dict[str, dict[str, Record]]
SHIFT, RATIOS, WORST_K = 0.1, (0.9, 1.1), 0.7
WHOLE = ("joint", "joint-full", "joint-reset", "svi", "nuts")  # claim the whole posterior
UNPOOLED = "no-pooling"
GLOBALS = ("loc_nuts", "scale_nuts", "shared_nuts", "loc_ml", "scale_ml", "shared_ml")


def numbers(records: Records) -> list[dict[str, Any]]:
    """One flat row for each strategy on each case; what is unknown is None."""
    rows = []
    for case, of in records.items():
        base = of.get(UNPOOLED, {"finished": False})
        truth = nuts_record(Prepared(CASES[case]))
        for record in of.values():
            row: dict[str, Any] = {"case": case, "kind": CASES[case].kind}
            for key in ("strategy", "finished", "reason", "converged", "seconds"):
                row[key] = record.get(key)
            row |= {k: record.get(k) for k in ("gradients", "steps", "shift", "sd_ratio")}
            row |= {k: record.get("globals", {}).get(k) for k in GLOBALS}
            row["warnings"] = len(record.get("warnings", []))
            for which, short in ((KNOWN, "known"), (NEW, "new")):
                found = record.get(which)
                if found is None:
                    continue
                row |= {f"{short}_{k}": found.get(k) for k in ("elpd", "coverage", "pareto_k")}
                if base["finished"]:
                    row[f"{short}_gain"], row[f"{short}_gain_se"] = paired(record, base, which)
            if KNOWN in record:
                row["known_to_nuts"], row["known_to_nuts_se"] = paired(record, truth, KNOWN)
            rows.append({key: _known(value) for key, value in row.items()})
    return rows


def _known(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# -- verdicts --------------------------------------------------------------------------------------


def worse_than_unpooled(row: dict[str, Any]) -> bool:
    """On known or new tasks, by more than two paired standard errors."""
    for which in ("known", "new"):
        gain, error = row.get(f"{which}_gain"), row.get(f"{which}_gain_se")
        if gain == "-inf":  # a held-out row of density 0
            return True
        if gain is not None and error is not None and gain < -2 * error:
            return True
    return False


def agrees(row: dict[str, Any]) -> bool:
    """Task posteriors within .1 sd and 0.9 to 1.1 of NUTS."""
    return row["shift"] <= SHIFT and RATIOS[0] <= row["sd_ratio"] <= RATIOS[1]


def k_says_no(row: dict[str, Any]) -> bool:
    k = row.get("known_pareto_k")
    return k is not None and float(k) > WORST_K


# -- writing ---------------------------------------------------------------------------------------


def write_page(records: Records, path: Path) -> None:
    """Markdown; printed too."""
    rows = numbers(records)
    ran = [row for row in rows if row["strategy"] != "compare"]
    text = "\n\n".join(
        [
            "# The fleet",
            _preamble(records),
            _verdict(rows),
            "## Every strategy over all cases",
            _by_strategy(ran),
            "## What did not finish",
            _list(
                f"`{r['case']}`, {r['strategy']}: {r['reason']}" for r in rows if not r["finished"]
            ),
            "## What did not converge",
            _list(
                f"`{r['case']}`, {r['strategy']}: {r['reason']}"
                for r in ran
                if r["finished"] and r["converged"] is False
            ),
            "## Worse on held-out rows than no pooling",
            "By more than two paired standard errors, in nats a row.",
            _list(_gains(r) for r in ran if r["finished"] and worse_than_unpooled(r)),
            "## Neither as NUTS nor refused by k̂",
            f"Strategies that claim the whole posterior ({', '.join(WHOLE)}): median shift "
            f"above {SHIFT}, or median sd ratio outside {RATIOS[0]} to {RATIOS[1]}, and no k̂ above "
            f"{WORST_K}.",
            _list(
                f"`{r['case']}`, {r['strategy']}: shift {r['shift']:.2f}, sd ratio "
                f"{r['sd_ratio']:.2f}"
                for r in ran
                if r["finished"] and r["strategy"] in WHOLE and not agrees(r) and not k_says_no(r)
            ),
            *(part for case in records for part in _of_case(case, rows)),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(text)


def _preamble(records: Records) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{len(records)} real data sets, {datetime.now(UTC):%Y-%m-%d}, commit {commit}, "
        f"Python {sys.version.split()[0]}, torch {version('torch')}, one thread. The data, the "
        "models and the references are in `benchmarks/fleet/`; how to read this is in "
        "`benchmarks/fleet/README.md`. A dash: does not apply, or is not known."
    )


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What was wanted, and how often it is so."""
    ran = [row for row in rows if row["strategy"] != "compare"]
    whole = [row for row in rows if row["strategy"] == "compare"]
    done = [row for row in ran if row["finished"]]
    claims = [row for row in done if row["strategy"] in WHOLE]
    told = [row for row in done if row["converged"] is not None]
    pooled = [r for r in done if r["strategy"] != UNPOOLED and r.get("known_gain") is not None]
    counts = (
        ("runs of one strategy on one case finished", [r["finished"] for r in ran]),
        ("`compare` of the default strategies finished", [r["finished"] for r in whole]),
        ("of the strategies with a test of it, converged", [r["converged"] for r in told]),
        (
            "claim the whole posterior: as NUTS, or k̂ says no",
            [agrees(r) or k_says_no(r) for r in claims],
        ),
        ("pool, and are not worse than no pooling", [not worse_than_unpooled(r) for r in pooled]),
    )
    lines = [(what, f"{sum(held)} of {len(held)}") for what, held in counts if held]
    return _table(("wanted", "is so"), lines)


def _by_strategy(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "strategy", "finished", "converged", "seconds, median", "seconds, all", "gradients, median",
        "θ0 to ML", "scales to ML", "shift", "sd ratio", "as NUTS, or k̂ says no",
        "not worse than no pooling", "nats a row to NUTS",
    )  # fmt: skip
    lines = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == name]
        done = [row for row in mine if row["finished"]]
        fine = [row for row in done if agrees(row) or k_says_no(row)]
        judged = [row for row in done if row.get("known_gain") is not None]
        held = [row for row in judged if not worse_than_unpooled(row)]
        told = [row for row in done if row["converged"] is not None]
        pools = name != UNPOOLED
        lines.append(
            (
                name,
                f"{len(done)} of {len(mine)}",
                f"{sum(row['converged'] for row in told)} of {len(told)}" if told else "–",
                _median(done, "seconds", ".1f"),
                f"{sum(row['seconds'] for row in done):.0f}",
                _median(done, "gradients", ".1e"),
                _median(done, "loc_ml", ".2f") if pools else "–",
                _median(done, "scale_ml", ".2f") if pools else "–",
                _median(done, "shift", ".2f"),
                _median(done, "sd_ratio", ".2f"),
                f"{len(fine)} of {len(done)}",
                f"{len(held)} of {len(judged)}" if pools else "–",
                _median(done, "known_to_nuts", ".3f"),
            )
        )
    return _table(head, lines) + (
        "\n\nMedians over the cases that finished. θ0 and scales to ML: the largest distance over "
        "coordinates to the maximum of the marginal likelihood, in NUTS's posterior sds."
    )


def _of_case(case: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    mine = [row for row in rows if row["case"] == case]
    prepared = Prepared(CASES[case])
    train, nuts = prepared.problem.train, prepared.reference["nuts"]
    yield f"## {case}"
    yield (
        f"{CASES[case].kind}; {len(train)} tasks of {int(train.support.mask.sum())} support rows; "
        f"{prepared.problem.density.dim} coordinates adapt, {prepared.problem.density.shared_dim} "
        f"are shared. Reference: {nuts['how']}, R-hat {nuts['worst_rhat']}, ESS "
        f"{nuts['least_ess']}."
    )
    head = (
        "strategy", "converged", "seconds", "gradients", "θ0: NUTS", "ML", "scales: NUTS", "ML",
        "shared: NUTS", "ML", "shift", "sd ratio", "k̂", "known tasks: log density",
        "to no pooling", "to NUTS", "new tasks: to no pooling",
    )  # fmt: skip
    lines = []
    for row in mine:
        if row["strategy"] == "compare":
            continue
        if not row["finished"]:
            lines.append((row["strategy"], "failed", *["–"] * (len(head) - 2)))
            continue
        told = {None: "–", True: "yes", False: "no"}[row["converged"]]
        globals_ = GLOBALS if row["strategy"] != UNPOOLED else ()
        order = [(f"{what}_nuts", f"{what}_ml") for what in ("loc", "scale", "shared")]
        far = [_cell(row.get(k) if globals_ else None, ".2f") for pair in order for k in pair]
        lines.append(
            (
                row["strategy"],
                told,
                _cell(row["seconds"], ".1f"),
                _cell(row["gradients"], ".1e"),
                *far,
                _cell(row["shift"], ".2f"),
                _cell(row["sd_ratio"], ".2f"),
                _cell(row.get("known_pareto_k"), ".2f", exact=True),
                _cell(row.get("known_elpd"), ".3f"),
                _pair(row, "known_gain"),
                _pair(row, "known_to_nuts"),
                _pair(row, "new_gain"),
            )
        )
    yield _table(head, lines)


def _gains(row: dict[str, Any]) -> str:
    parts = [
        f"{which} tasks {_pair(row, f'{which}_gain')}"
        for which in ("known", "new")
        if row.get(f"{which}_gain") is not None
    ]
    return f"`{row['case']}`, {row['strategy']}: {', '.join(parts)}"


def _pair(row: dict[str, Any], key: str) -> str:
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


def _median(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    found = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return f"{statistics.median(found):{form}}" if found else "–"


def _list(lines: Iterable[str]) -> str:
    found = [f"- {line}" for line in lines]
    return "\n".join(found) if found else "None."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))
