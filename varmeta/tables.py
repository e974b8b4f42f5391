"""The table of a comparison, for reading."""

from __future__ import annotations

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 150  # the printed table needs that much
_NAME = 18  # that failed rows and scored ones stand below each other
_HEADINGS = (
    "strategy",
    "posterior",
    "spread\nof",
    "log density\nper row",
    "difference\nto best",
    "RMSE",
    "90%\ncover",
    "k̂\nmax",
    "gap",
    "con-\nverged",
    "seconds",
    "gradients",
    "shift",
    "sd ratio",
)
_SPREAD = {"": "", "nothing": "–", "tasks": "θ|ψ", "tasks, prior": "θ,ψ"}  # by `carries`
_CAPTION = (
    "spread of: θ|ψ, each task's θ given θ0, Σ and φ as points; θ,ψ, these too; "
    "log density in nats; ± a standard error across tasks (difference: of the pairs); "
    "k̂: Pareto k of the worst task, above 0.7 its q is not to be trusted; exact|Σ: q is exact "
    "for the learned prior held fixed, and what is not known of its scales is left out; "
    "gap: nats per task that a fresh adaptation loses to what was kept; "
    "converged: ✓ yes, ✗ the limit of steps came first, – it has no such limit or cannot say; "
    "shift: |mean − NUTS mean| in NUTS sds"
)


def rich_table(table: pd.DataFrame, which: str) -> RenderableType:
    """One set of tasks: scored strategies, best first, then those that failed, with the reason."""
    part = table[table["set"] == which]
    scored = part[part["posterior"] != ""].sort_values("elpd", ascending=False, kind="stable")
    failed = part[part["posterior"] == ""]
    rows = int(part["rows"].max())
    title = Text(f"{which}: {rows or 'no'} held-out rows", style="italic")
    width = max(_NAME, *(min(cell_len(name), 30) for name in part["strategy"]))
    body: list[RenderableType] = [title]
    if len(scored):
        body.append(_scores(scored, width))
    if len(failed):
        body.append(_failed(failed, width))
    sites = [name[5:-1] for name in table.columns if name.startswith("elpd[")]
    if len(scored) and sites:
        body += [Text("each observed site by itself", style="italic"), _apart(scored, sites, width)]
    if len(scored) and which == list(table["set"].unique())[-1]:  # said once, below the last
        body.append(Text("\n" * (len(failed) > 0) + _CAPTION, style="dim italic"))
    return Group(*body, "")


def _scores(part: pd.DataFrame, width: int) -> Table:
    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in _HEADINGS:
        left = heading in ("strategy", "posterior")
        wraps = heading == "strategy"  # a long name, and no number, gives way
        least = width if wraps else None
        justify: JustifyMethod = "left" if left else "right"
        out.add_column(heading, justify=justify, no_wrap=not wraps, min_width=least)
    for row in part.to_dict("records"):
        best, reference = row["elpd_diff"] == 0, row["mean_shift"] == 0
        out.add_row(
            Text(str(row["strategy"])),
            row["posterior"],
            _SPREAD[row["carries"]],
            _number(row["elpd"], ".3f", row["elpd_se"]),
            "best" if best else _number(row["elpd_diff"], ".4f", row["elpd_diff_se"]),
            _number(row["rmse"], ".3g"),
            _number(row["coverage"], ".2f"),
            "exact|Σ" if row["pareto_k"] == -np.inf else _number(row["pareto_k"], ".2f"),
            _number(row["gap"], ".2f"),
            {True: "✓", False: "✗"}.get(row["converged"], "–"),
            _number(row["seconds"], ".1f"),
            _number(row["gradients"], ".2g"),
            "reference" if reference else _number(row["mean_shift"], ".2f"),
            "" if reference else _number(row["sd_ratio"], ".2f"),
        )
    return out


def _apart(part: pd.DataFrame, sites: list[str], width: int) -> Table:
    """Of a model with several observed sites."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("strategy", min_width=width)
    for name in sites:
        for heading in (f"{name}\nlog density", "RMSE", "90%\ncover"):
            out.add_column(Text(heading), justify="right", no_wrap=True)
    for row in part.to_dict("records"):
        numbers = [
            _number(row[f"{what}[{name}]"], form)
            for name in sites
            for what, form in (("elpd", ".3f"), ("rmse", ".3g"), ("coverage", ".2f"))
        ]
        out.add_row(Text(str(row["strategy"])), *numbers)
    return out


def _failed(part: pd.DataFrame, width: int) -> Table:
    out = Table.grid(padding=(0, 1, 0, 1))
    out.add_column(width=width)
    out.add_column()
    for row in part.to_dict("records"):
        out.add_row(Text(str(row["strategy"])), Text(f"failed: {row['failed']}", style="red"))
    return out


def _number(value: float, form: str, error: float | None = None) -> str:
    if np.isnan(value):
        return "–"
    spread = error is not None and not np.isnan(error)
    shown = f"{value:{form}}"
    shown = shown.removeprefix("-") if float(shown) == 0 else shown  # no -0.00
    return shown + (f" ± {error:{form}}" if spread else "")
