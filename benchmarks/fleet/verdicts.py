"""What the records say, as flat rows, and what is to be thought of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.fleet.runner import Prepared, Record, nuts_record, paired
from varmeta.scores import KNOWN, NEW

Records = Mapping[str, Mapping[str, Record]]
Row = dict[str, Any]
SHIFT, RATIOS, WORST_K, FAR = 0.1, (0.9, 1.1), 0.7, 2.0
WHOLE = ("nuts", "svi", "nested-laplace")  # integrate over θ0, scales and φ; the others do not
UNPOOLED, TOGETHER, ALL = "no-pooling", "complete-pooling", "compare"
GLOBALS = ("loc_nuts", "scale_nuts", "shared_nuts", "loc_ml", "scale_ml", "shared_ml")
_SETS = ((KNOWN, "known"), (NEW, "new"))


def numbers(records: Records, prepared: Mapping[str, Prepared]) -> list[Row]:
    """One flat row for each strategy on each case, as JSON takes it; what is unknown is None."""
    rows = []
    for case, of in records.items():
        base = of.get(UNPOOLED)
        truth = nuts_record(prepared[case])
        for record in of.values():
            row: Row = {"case": case, "kind": prepared[case].case.kind}
            for key in ("strategy", "finished", "reason", "converged", "seconds", "commit"):
                row[key] = record.get(key)
            for key in ("gradients", "steps", "shift", "sd_ratio"):
                row[key] = record.get(key)
            row |= {key: record.get("globals", {}).get(key) for key in GLOBALS}
            row["warnings"] = record.get("warnings", [])
            row["posterior"] = record.get(KNOWN, {}).get("posterior")
            row["undetermined"] = record.get(KNOWN, {}).get("undetermined") or ""
            if record.get("gradients") is not None:
                tasks = len(prepared[case].problem.train)
                row["gradients_per_task"] = record["gradients"] / tasks
            for which, short in _SETS:
                found = record.get(which, {})
                row |= {f"{short}_{k}": found.get(k) for k in ("elpd", "coverage", "pareto_k")}
                if found and base and base["finished"]:
                    row |= _difference(f"{short}_gain", record, base, which)
            if truth is not None and base and base["finished"]:
                row |= _difference("nuts_gain", truth, base, KNOWN)
            if truth is not None and KNOWN in record:
                row |= _difference("known_to_nuts", record, truth, KNOWN)
            row = {key: _plain(value) for key, value in row.items()}
            row["worse"] = judged(row) and worse_than_unpooled(row)
            row["why"] = reasons(row) if row["worse"] else []
            rows.append(row)
    return rows


def _difference(key: str, record: Record, base: Record, which: str) -> Row:
    value, error = paired(record, base, which)
    return {key: value, f"{key}_se": error}


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def judged(row: Row) -> bool:
    """Whether it pools and can be held against no pooling."""
    return row["strategy"] not in (UNPOOLED, ALL) and row.get("known_gain") is not None


def worse_than_unpooled(row: Row) -> bool:
    """On known or new tasks, by more than two paired standard errors."""
    return any(_below(row, f"{which}_gain") for _, which in _SETS)


def _below(row: Row, key: str) -> bool:
    gain, error = row.get(key), row.get(f"{key}_se")
    if gain == "-inf":  # a held-out row of density 0
        return True
    return isinstance(gain, float) and isinstance(error, float) and gain < -2 * error


def agrees(row: Row) -> bool:
    """Task posteriors within .1 sd and 0.9 to 1.1 of NUTS."""
    close: bool = row["shift"] <= SHIFT and RATIOS[0] <= row["sd_ratio"] <= RATIOS[1]
    return close


def k_says_no(row: Row) -> bool:
    """Whether some known task's k̂ is above 0.7."""
    k = row.get("known_pareto_k")
    return k is not None and float(k) > WORST_K


def reasons(row: Row) -> list[str]:
    """What the record has that makes held-out rows unlikely; nothing is guessed."""
    out = []
    as_nuts = _below(row, "nuts_gain") and not _below(row, "known_to_nuts")
    if as_nuts and not _below(row, "new_gain"):  # of new tasks NUTS knows nothing
        gain, error = row["nuts_gain"], row["nuts_gain_se"]
        out.append(f"long NUTS is worse too ({gain:.3f} ± {error:.3f}), and this no more than it")
    if row["strategy"] == TOGETHER:
        out.append("takes all tasks for alike")
    if row["posterior"] == "delta":
        out.append("points without spread")
    if row["undetermined"]:
        out.append(f"given a scale hardly told from 0: {row['undetermined']}")
    if k_says_no(row):
        out.append(f"k̂ {float(row['known_pareto_k']):.2f}")
    if row["converged"] is False:
        out.append("not converged")
    for key, what in (("loc", "θ0"), ("shared", "shared values"), ("scale", "scales")):
        to = "NUTS" if row.get(f"{key}_ml") is None else "ML"
        far = row.get(f"{key}_{to.lower()}")
        if isinstance(far, float) and far > FAR and row["strategy"] != TOGETHER:
            out.append(f"{what} {far:.1f} sd from {to}")
    return out
