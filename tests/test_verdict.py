"""The verdict in words: what it says of a table, and how often it wrongs the best strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from varmeta.scores import KNOWN, NEW
from varmeta.verdict import MEANING, least_errors, verdict

GOOD: dict[str, Any] = {
    "posterior": "gaussian", "set": KNOWN, "rows": 400, "tasks": 40, "elpd": -1.0, "elpd_diff": 0.0,
    "elpd_diff_se": 0.0, "coverage": 0.9, "pareto_k": 0.2, "mean_shift": np.nan, "sd_ratio": np.nan,
    "converged": True, "reason": "", "undetermined": "", "failed": "",
}  # fmt: skip


def table(**strategies: dict[str, Any]) -> pd.DataFrame:
    """A row for each strategy, good where nothing else is said."""
    out = pd.DataFrame([{"strategy": name, **GOOD, **row} for name, row in strategies.items()])
    out["converged"] = out["converged"].astype(object)
    return out


def near(by: float, error: float = 0.01, **more: Any) -> dict[str, Any]:
    return {"elpd": -1.0 - by, "elpd_diff": -by, "elpd_diff_se": error, **more}


def test_the_ranking_names_the_best_those_near_and_those_worse() -> None:
    said = verdict(table(A=near(0.0, 0.0), B=near(0.02), C=near(0.03), D=near(0.2)))
    assert said == [
        "On known tasks (400 held-out rows in 40 tasks) A predicts best, −1.000 nats a row. B "
        "cannot be told apart from it. C (by 0.030 ± 0.010) and D (by 0.200 ± 0.010) are worse.",
        MEANING,
    ]


def test_the_limit_is_that_of_students_t_with_bonferroni() -> None:
    """One-sided, 40 tasks and three others: 2.2061 standard errors, of t(39) at 1/60."""
    assert "B cannot" in verdict(table(A=near(0, 0), B=near(0.02205), C=near(0), D=near(0)))[0]
    assert "B (by" in verdict(table(A=near(0, 0), B=near(0.02207), C=near(0), D=near(0)))[0]


def test_each_set_of_tasks_has_a_ranking() -> None:
    both = pd.concat([
        table(A=near(0, 0), B=near(0.5)),
        table(A=near(0.01, set=NEW, tasks=1), B=near(0, 0, set=NEW, tasks=1)),
    ])  # fmt: skip
    said = verdict(both)
    assert said[0].startswith("On known tasks") and "B (by 0.500 ± 0.010) is worse" in said[0]
    assert "B predicts best" in said[1] and "one task does not tell strategies apart" in said[1]


def test_what_worse_means_is_said_where_the_word_is() -> None:
    assert MEANING not in verdict(table(A=near(0, 0, tasks=1), B=near(0.5, tasks=1)))
    assert MEANING not in verdict(table(A=near(0, 0), B=near(0.001)))
    assert MEANING in verdict(table(A=near(0, 0), B=near(0.5)))


@pytest.mark.parametrize("noise", ["alike", "one far noisier"])
def test_the_truly_best_is_seldom_called_worse(noise: str) -> None:
    """Six equally good strategies: each is the best, and in at most 1 table of 20 called worse.

    Of 20,000 tables at the worst case's .05, a share above .056 comes once in 20,000.
    """
    rng = np.random.default_rng(0)
    scale = np.ones(6) if noise == "alike" else np.array([5.0, 1, 1, 1, 1, 1])
    values = rng.standard_normal((20_000, 20, 6)) * scale + rng.standard_normal((20_000, 20, 1))
    best = values.mean(1).argmax(-1)
    gap = values[:, :, 0] - np.take_along_axis(values, best[:, None, None], 2)[:, :, 0]
    error = gap.std(1, ddof=1) / 20**0.5
    share = (gap.mean(1) < -least_errors(5, 20) * error).mean()
    assert 0.002 < share < 0.056


DOUBTS: dict[str, tuple[dict[str, Any], str]] = {
    "failed": ({"posterior": "", "failed": "no"}, "B failed, and has no scores."),
    "failed late": ({"failed": "disk full"}, "B was scored, and then failed: disk full."),
    "unconverged": (
        {"converged": False, "reason": "the limit came first."},
        "B did not converge: the limit came first.",
    ),
    "impossible": ({"elpd": -np.inf}, "B gives some held-out row of known tasks a density of 0."),
    "pareto k": ({"pareto_k": 1.234}, "posterior by B (k̂ 1.23): a Pareto k"),
    "coverage": ({"coverage": 0.7}, "hold too few held-out rows: B (70% of known tasks)."),
    "points": ({"posterior": "delta"}, "B gives a point for each task"),
    "scales": ({"undetermined": "a, b"}, "the scale of a (B) and b (B) from 0"),
    "narrower": ({"mean_shift": 0.1, "sd_ratio": 0.5}, "smaller than those of NUTS"),
    "wider": ({"mean_shift": 0.1, "sd_ratio": 1.9}, "larger than those of NUTS"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_each_reason_for_doubt_is_a_sentence_and_no_other(doubt: str) -> None:
    changed, sentence = DOUBTS[doubt]
    said = verdict(table(A=near(0, 0), C=near(0), B={**near(0), **changed}))
    assert len(said) == 2 and sentence in said[1]
    assert len(verdict(table(A=near(0, 0), B=near(0)))) == 1


def test_what_chance_does_to_coverage_is_no_reason_for_doubt() -> None:
    """Four standard errors of 400 rows are .06."""
    assert len(verdict(table(A=near(0, 0), B=near(0, coverage=0.845)))) == 1
