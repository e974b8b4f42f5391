"""The verdict on a comparison, in sentences: which strategy predicts best, and which not to trust.

A strategy is called worse where its paired difference to the best is further from 0 than chance
would put the truly best one in one table of twenty: a one-sided t over tasks, with Bonferroni's
bound over the other strategies. It does not matter that the best was picked by the same rows: for
the truly best strategy, all the others are in the bound (multiple comparisons with the best: Hsu,
1984, Constrained simultaneous confidence intervals for multiple comparisons with the best).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from scipy.stats import t as student

LEVEL = 0.95
MEANING = (
    "“Worse” allows for chance: the strategy that is truly best is called so in at most one table "
    "of twenty (paired differences, tasks as the independent units, all strategies allowed for)."
)
_LIMIT = 0.7  # of Pareto's k
_NARROW = 0.8  # of the reference's standard deviations
_WIDE = 1.25


def verdict(table: pd.DataFrame) -> list[str]:
    """What the table of a comparison says, a sentence or a few for each matter.

    Args:
        table: of a `Comparison`.

    Returns:
        for each set of tasks which strategy predicts best, which cannot be told apart from it, and
        which are worse and by how much; what the word worse means; then a sentence for each reason
        not to trust a strategy, with all the strategies that it holds for.
    """
    out = [_ranking(part) for _, part in table.groupby("set", sort=False)]
    said = [sentence for sentence in out if sentence]
    if any(" worse" in sentence for sentence in said):
        said.append(MEANING)
    return said + _doubts(table)


def least_errors(others: int, tasks: int) -> float:
    """How many standard errors a strategy is behind the best to be called worse.

    Args:
        others: strategies beside the best.
        tasks: with held-out rows, two at least.
    """
    return float(student.ppf(1 - (1 - LEVEL) / others, tasks - 1))


def _ranking(part: pd.DataFrame) -> str:
    """Of one set of tasks; '' where fewer than two strategies are scored."""
    finite = part[np.isfinite(part["elpd"])].sort_values("elpd", ascending=False, kind="stable")
    if len(finite) < 2:
        return ""
    best, others = finite.iloc[0], finite.iloc[1:]
    tasks, rows = int(best["tasks"]), int(best["rows"])
    what = f"{rows} held-out row{'s' * (rows > 1)} in {tasks} task{'s' * (tasks > 1)}"
    begin = f"On {best['set']} ({what}) {best['strategy']} predicts best"
    begin += f", {_nats(best['elpd'])} a row"
    if tasks < 2:
        return f"{begin}; one task does not tell strategies apart."
    limit = least_errors(len(others), tasks)
    worse = others["elpd_diff"] < -limit * others["elpd_diff_se"]
    out = f"{begin}."
    if (~worse).any():
        near = _listed(others["strategy"][~worse])
        out += f" {near} cannot be told apart from it."
    if worse.any():
        far = others[worse].to_dict("records")
        by = [f"{r['strategy']} (by {-r['elpd_diff']:.3f} ± {r['elpd_diff_se']:.3f})" for r in far]
        out += f" {_listed(by)} {'is' if len(far) == 1 else 'are'} worse."
    return out


def _doubts(table: pd.DataFrame) -> list[str]:
    """Why not to trust a strategy, or a part of what it says."""
    scored = table[table["posterior"] != ""]
    once = scored.drop_duplicates("strategy")
    out: list[str] = []

    failed = table[(table["posterior"] == "") & (table["failed"] != "")]
    if len(failed):
        names = list(dict.fromkeys(failed["strategy"]))
        out.append(f"{_listed(names)} failed, and {_has(names)} no scores.")
    late = once[once["failed"] != ""]
    for row in late.to_dict("records"):
        out.append(f"{row['strategy']} was scored, and then failed: {row['failed']}.")

    for row in once[once["converged"].eq(False)].to_dict("records"):
        why = f": {row['reason']}" if row["reason"] else ""
        out.append(f"{row['strategy']} did not converge{why}.".replace("..", "."))

    impossible = scored[np.isneginf(scored["elpd"])]
    for which, part in impossible.groupby("set", sort=False):
        names = list(part["strategy"])
        out.append(f"{_listed(names)} {_gives(names)} some held-out row of {which} a density of 0.")

    wrong = _worst(scored, "pareto_k", max)
    wrong = wrong[wrong > _LIMIT]
    if len(wrong):
        names = [f"{name} (k̂ {_short(k)})" for name, k in wrong.items()]
        out.append(
            f"Do not rely on the spread of every task's posterior by {_listed(names)}: a Pareto k "
            "above 0.7 says that the worst task's misses what it should cover."
        )

    narrow: dict[str, list[str]] = {}
    for row in scored.to_dict("records"):
        below = 0.9 - row["coverage"]  # four standard errors, since rows of a task are alike
        if row["rows"] and below > 4 * (0.09 / row["rows"]) ** 0.5:
            narrow.setdefault(row["strategy"], []).append(f"{row['coverage']:.0%} of {row['set']}")
    if narrow:
        names = [f"{name} ({', '.join(where)})" for name, where in narrow.items()]
        out.append(f"90% intervals that hold too few held-out rows: {_listed(names)}.")

    points = list(once["strategy"][once["posterior"] == "delta"])
    if points:
        out.append(
            f"{_listed(points)} {_gives(points)} a point for each task: the intervals leave out "
            "what is not known of it."
        )

    loose: dict[str, list[str]] = {}
    for row in once[once["undetermined"] != ""].to_dict("records"):
        for module in row["undetermined"].split(", "):
            loose.setdefault(module, []).append(row["strategy"])
    if loose:
        by = [f"{module} ({_listed(names)})" for module, names in loose.items()]
        out.append(
            f"The data hardly tell the scale of {_listed(by)} from 0: standard deviations that are "
            "given one value of it are too small if the truth is larger."
        )

    ratio = _worst(scored[scored["mean_shift"] != 0], "sd_ratio", min)
    thin = [f"{name} ({r:.2f})" for name, r in ratio.items() if r < _NARROW]
    if thin:
        out.append(
            f"Standard deviations are smaller than those of NUTS, in the median: {_listed(thin)}."
        )
    wide = _worst(scored[scored["mean_shift"] != 0], "sd_ratio", max)
    fat = [f"{name} ({_short(r)})" for name, r in wide.items() if r > _WIDE]
    if fat:
        out.append(
            f"Standard deviations are larger than those of NUTS, in the median: {_listed(fat)}."
        )
    return out


def _worst(scored: pd.DataFrame, column: str, pick: Callable[[pd.Series], float]) -> pd.Series:
    """Of each strategy over the sets of tasks, without those that have none."""
    return scored.dropna(subset=[column]).groupby("strategy", sort=False)[column].agg(pick)


def _listed(names: Iterable[str]) -> str:
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last


def _gives(names: list[str]) -> str:
    return "gives" if len(names) == 1 else "give"


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _nats(value: float) -> str:
    return f"{value:.3f} nats".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}"
