"""A run's folder as one HTML page that needs nothing else: verdict, tables, pictures, settings."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from varmeta import __version__
from varmeta.files import BrokenFile, read_json
from varmeta.verdict import verdict

TABLE, MODULES, RUN = "table.csv", "modules.csv", "run.json"
_WORDS = ("strategy", "posterior", "carries", "reason", "undetermined", "failed")
_SCORES = (  # name in the file, heading, form, name of its standard error, what it means
    ("strategy", "strategy", "", "", "Name of the strategy"),
    ("posterior", "posterior", "", "", "The form of a task's posterior"),
    ("carries", "spread of", "", "", "Which part of what is not known its spread stands for"),
    (
        "elpd",
        "log density",
        ".3f",
        "elpd_se",
        "Log predictive density of a held-out row, nats, ± a standard error across tasks",
    ),
    (
        "elpd_diff",
        "difference to best",
        ".4f",
        "elpd_diff_se",
        "Paired difference to the best strategy on the same rows, nats a row",
    ),
    ("rmse", "RMSE", ".3g", "", "Root mean squared error of the predictive mean"),
    (
        "coverage",
        "90% cover",
        ".2f",
        "",
        "Share of held-out rows in the central 90% predictive interval",
    ),
    (
        "pareto_k",
        "k̂ max",
        ".2f",
        "",
        "Pareto k of the worst task: above 0.7 its posterior is not to be trusted",
    ),
    (
        "gap",
        "gap",
        ".2f",
        "",
        "Nats per task that a fresh adaptation loses to the posteriors that were kept",
    ),
    ("converged", "converged", "", "", "Whether the run ended before its limit of steps did"),
    ("seconds", "seconds", ".1f", "", "Wall time of learning"),
    (
        "gradients",
        "gradients",
        ".2g",
        "",
        "Evaluations of one task's loss, a Hessian-vector product counted as two",
    ),
    (
        "mean_shift",
        "shift",
        ".2f",
        "",
        "Median distance of means to those of NUTS, in standard deviations of NUTS",
    ),
    ("sd_ratio", "sd ratio", ".2f", "", "Median ratio of standard deviations to those of NUTS"),
    ("failed", "failed", "", "", "Why the strategy failed"),
)
_PICTURES = (
    ("scores", "How well each strategy predicts rows that it has not seen"),
    ("shrinkage", "How far each strategy pulls each task's {site} towards the population"),
    ("forest", "Each task's posterior mean and 90% interval of {site}, by strategy"),
    ("modules", "Which modules of the model adapt to a task, and which are shared"),
    ("training_curves", "The objective of each strategy, step by step"),
)


def html_report(folder: Path, title: str = "") -> str:
    """The page of a run, from the files that `varmeta.compare` or `varmeta compare` has written.

    It holds its pictures and its script and asks no network for anything.

    Args:
        folder: the run's.
        title: of the page; the folder's name if empty.

    Raises:
        FileNotFoundError: the folder holds no run with a table.
        BrokenFile: the table or `run.json` is damaged.
    """
    path = folder / TABLE
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {TABLE}; give the output folder of `varmeta compare` or of "
            "vm.compare(folder=...)"
        )
    table = read_table(path)
    manifest: dict[str, Any] = {}
    if (folder / RUN).is_file():
        found = read_json(folder / RUN, "compare again")
        manifest = found if isinstance(found, dict) else {}
    settings = manifest.get("settings", {})
    names = list(dict.fromkeys(table["strategy"]))
    tables = [_scores(part, str(which)) for which, part in table.groupby("set", sort=False)]
    if (folder / MODULES).is_file():
        tables.append(_modules(_read_csv(folder / MODULES)))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("varmeta"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=title or folder.resolve().name,
        summary=f"{len(names)} strategies, compared by varmeta {__version__} on the same tasks.",
        verdict=verdict(table),
        tables=tables,
        pictures=list(_pictures(folder)),
        command=manifest.get("command", ""),
        facts=[(name, _fact(value)) for name, value in settings.items()],
    )


def read_table(path: Path) -> pd.DataFrame:
    """A comparison's `table.csv`, with the types that it had.

    Raises:
        BrokenFile: it is no such table.
    """
    table = _read_csv(path)
    wanted = {name for name, *_ in _SCORES} | {"set", "rows", "tasks", "undetermined"}
    missing = sorted(wanted - set(table.columns))
    if missing:
        raise BrokenFile(
            f"{path} has no column {missing[0]!r}: another version of varmeta wrote it, or another "
            "program; compare again"
        )
    for name in _WORDS:
        table[name] = ["" if _nothing(v) else str(v) for v in table[name]]
    for name in set(table.columns) - {*_WORDS, "set", "converged"}:
        table[name] = pd.to_numeric(table[name], errors="coerce")
    truth = {"True": True, "False": False, True: True, False: False}
    table["converged"] = pd.Series([truth.get(c) for c in table["converged"]], dtype=object)
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise BrokenFile(f"{path} is no table: {error}; compare again") from None


def _scores(part: pd.DataFrame, which: str) -> dict[str, Any]:
    shown = part.sort_values("elpd", ascending=False, kind="stable", na_position="last")
    used = [
        entry
        for entry in _SCORES
        if entry[0] == "strategy" or not shown[entry[0]].map(_nothing).all()
    ]
    rows = [
        [
            _exact()
            if column == "pareto_k" and row[column] == -np.inf
            else _cell(row[column], form, row.get(error))
            for column, _, form, error, _ in used
        ]
        for row in shown.to_dict("records")
    ]
    count = int(part["rows"].max())
    return {
        "title": which[:1].upper() + which[1:],
        "caption": f"{count} held-out rows in {int(part['tasks'].max())} tasks. A click on a "
        "heading sorts by it.",
        "headings": [{"name": heading, "meaning": meaning} for _, heading, _, _, meaning in used],
        "rows": rows,
    }


def _modules(table: pd.DataFrame) -> dict[str, Any]:
    return {
        "title": "What adapts, and what is shared",
        "caption": "Each module's learned scale, and what a task loses, in nats, if it does not "
        "adapt the module.",
        "headings": [{"name": name.replace("_", " "), "meaning": name} for name in table.columns],
        "rows": [[_cell(value) for value in row] for row in table.to_numpy(dtype=object).tolist()],
    }


def _cell(value: Any, form: str = ".3g", error: Any = None) -> dict[str, Any]:
    """What a cell shows, and what it is sorted by."""
    if _nothing(value):
        return {"text": "–", "value": "", "words": False}
    if isinstance(value, bool | np.bool_):
        return {"text": "yes" if value else "no", "value": int(value), "words": False}
    if isinstance(value, str):
        return {"text": value, "value": value, "words": len(value) > 30}
    number = float(value)
    text = f"{number:{form or '.3g'}}"
    if error is not None and not _nothing(error):
        text += f" ± {error:{form}}"
    sorted_by = number if np.isfinite(number) else f"{'-' * (number < 0)}Infinity"
    return {"text": text.replace("-", "−"), "value": sorted_by, "words": False}


def _exact() -> dict[str, Any]:
    """A Pareto k of minus infinity."""
    return {"text": "exact given Σ", "value": "-Infinity", "words": False}


def _nothing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value))


def _pictures(folder: Path) -> Iterable[dict[str, str]]:
    """In the order of `_PICTURES`, then by name."""
    for kind, words in _PICTURES:
        for path in sorted(folder.glob(f"{kind}*.png")):
            site = path.stem.removeprefix(kind).removeprefix("_")
            if ("{site}" in words) == bool(site):
                data = base64.b64encode(path.read_bytes()).decode()
                yield {"data": data, "alt": words.format(site=site)}


def _fact(value: Any) -> str:
    """A setting without the hash that only a program reads."""
    return re.sub(r" ?#[0-9a-f]{12}$", "", str(value)) or "as recorded"
