"""One strategy on one case: what came of it, beside the references."""

from __future__ import annotations

import math
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fleet.cases import Case
from benchmarks.fleet.references import load_reference, maximum, rows_digest
from varmeta import (
    Comparison,
    GaussianPrior,
    Strategy,
    compare,
    # Loaded here and not when first used: a time limit in the midst of that would leave half of
    # Matplotlib behind, and all later strategies would fail.
    export,  # noqa: F401
    report_write,  # noqa: F401
)
from varmeta.failures import phrase
from varmeta.posterior import TaskPosterior
from varmeta.problems import Problem
from varmeta.scores import KNOWN, NEW
from varmeta.seeds import generator
from varmeta.tasks import Tasks

Record = dict[str, Any]
DRAWS = 1000
COPIED = (
    "posterior", "elpd", "elpd_se", "rmse", "coverage", "pareto_k", "gap", "adapt_seconds",
    "undetermined",
)  # fmt: skip


class Prepared:
    """A case with its split and its reference, checked to be of the same rows.

    Attributes:
        case: what was asked for.
        problem: density and split tasks.
        reference: None if it has not been computed yet.

    Raises:
        ValueError: the reference was computed on other rows.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.problem, self.reference = case, case.problem(), load_reference(case.name)
        digest = rows_digest(self.problem.train.support)
        if self.reference is not None and self.reference["support_digest"] != digest:
            raise ValueError(
                f"the reference of {case.name!r} was computed on other support rows than the split "
                f"has now; run `python -m benchmarks.fleet.references --cases {case.name}`"
            )


def run_one(prepared: Prepared, name: str, make: Callable[[], Strategy], limit: float) -> Record:
    """A strategy alone, in at most `limit` seconds. Whatever it raises is in the record."""
    done = run_several(prepared, {name: make}, limit)
    return done[name]


def run_several(
    prepared: Prepared,
    strategies: dict[str, Callable[[], Strategy]],
    limit: float,
    folder: Path | None = None,
) -> dict[str, Record]:
    """One `compare` of them all; a strategy that has no outcome is recorded as failed."""
    problem, case = prepared.problem, prepared.case
    begun, said = time.perf_counter(), []
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with _time_limit(limit), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = compare(
                {name: make() for name, make in strategies.items()},
                problem.density,
                problem.train,
                problem.new,
                draws=DRAWS,
                folder=folder,
                progress=False,
            )
    except Exception as error:  # nothing of a comparison should stop it; if it does, all failed
        reason, seconds = phrase(error), time.perf_counter() - begun
        return {name: _failed(case, name, f"compare: {reason}", seconds) for name in strategies}
    heard = sorted({_short(w.message) for w in said})
    seconds = time.perf_counter() - begun
    return {
        name: _finished(prepared, name, found, heard)
        if name in found.outcomes and name not in found.failures
        else _failed(case, name, found.failures[name], seconds)
        for name in strategies
    }


def _failed(case: Case, name: str, reason: str, seconds: float) -> Record:
    return {
        "case": case.name,
        "strategy": name,
        "finished": False,
        "reason": re.sub(r" \(benchmarks/.*\)$", "", " ".join(reason.split())),  # the time limit's
        "seconds": seconds,
    }


def _finished(prepared: Prepared, name: str, found: Comparison, said: Sequence[str]) -> Record:
    outcome, problem = found.outcomes[name], prepared.problem
    fit = outcome.fit
    record: Record = {
        "case": prepared.case.name,
        "strategy": name,
        "finished": True,
        "reason": fit.reason,
        "converged": fit.converged,
        "seconds": fit.seconds,
        "gradients": fit.gradients,
        "steps": len(fit.history),
        "warnings": [text for text in said if _is_of(text, fit.strategy.name, found)],
    }
    if prepared.reference is not None:
        nuts = prepared.reference["nuts"]
        mean, sd = (float64(nuts[f"theta_{what}"]) for what in ("mean", "sd"))
        far = against_references(fit.prior, fit.shared, prepared.reference)
        start = GaussianPrior.from_density(problem.density).log_scale
        now = fit.prior.log_scale
        if torch.allclose(now, start) or not now.isfinite().all():  # stated, and not learned
            far = {key: value for key, value in far.items() if not key.startswith("scale")}
        record["globals"] = far
        record["shift"] = float(((outcome.known.mean - mean).abs() / sd).median())
        record["sd_ratio"] = float((outcome.known.sd / sd).median())
    for which, tasks, posterior in _sets(problem, outcome.known, outcome.new):
        of = found.table[(found.table["strategy"] == name) & (found.table["set"] == which)]
        row = of.iloc[0].to_dict()
        record[which] = {key: row[key] for key in COPIED if key in row}
        record[which] |= {
            "rows": tasks.query.num_rows.tolist(),
            "log_density": _log_density(posterior, tasks.query),
        }
    return record


def _sets(
    problem: Problem, known: TaskPosterior, new: TaskPosterior | None
) -> Iterator[tuple[str, Tasks, TaskPosterior]]:
    yield KNOWN, problem.train, known
    if problem.new is not None and new is not None:
        yield NEW, problem.new, new


def _log_density(posterior: TaskPosterior, held_out: Tasks) -> list[float]:
    """Of each task's held-out rows together, nats."""
    rows = posterior.log_predictive(held_out, DRAWS, generator(0, 0))
    total: list[float] = rows.sum(-1).tolist()
    return total


def against_references(
    prior: GaussianPrior, shared: Tensor, reference: dict[str, Any]
) -> dict[str, float]:
    """The largest distance over coordinates, in posterior sds of NUTS: θ0, log scales and φ.

    `loc_nuts`, `scale_nuts` and `shared_nuts` are to the posterior means, `loc_ml`, `scale_ml` and
    `shared_ml` to the maximum of the marginal likelihood, if it was found; a scale whose maximum is
    0 is left out.
    """
    nuts, best = reference["nuts"], maximum(reference)
    mine = {"loc": prior.loc, "log_scale": prior.log_scale, "shared": shared}
    truths = {"nuts": {key: nuts[key]["mean"] for key in mine if nuts[key]}}
    if best is not None:
        truths["ml"] = best | {"log_scale": [_log(scale) for scale in best["scale"]]}
    out = {}
    for key, values in mine.items():
        if values.numel() == 0:
            continue
        unit = float64(nuts[key]["sd"])
        for label, known in truths.items():
            truth = known[key]
            far = (values.double() - float64(truth)).abs() / unit
            far = far[float64(truth).isfinite()]
            name = f"{key.removeprefix('log_')}_{label}"
            out[name] = float(far.max()) if len(far) else math.nan
    return out


def float64(values: Any) -> Tensor:
    """A tensor of numbers as JSON has them, none of their digits lost."""
    return torch.tensor(values, dtype=torch.float64)


def _log(scale: float) -> float:
    return math.log(scale) if scale > 0 else -math.inf


def paired(record: Record, base: Record, which: str) -> tuple[float, float]:
    """Difference of log density per held-out row, nats, and its standard error over tasks."""
    mine, other = record[which], base[which]
    count = float64(mine["rows"])
    gain = float64(mine["log_density"]) - float64(other["log_density"])
    if not count.sum():
        return math.nan, math.nan
    mean = gain.sum() / count.sum()
    used = int((count > 0).sum())
    if used < 2:
        return float(mean), math.nan
    rest = gain - count * mean
    return float(mean), float((rest.square().sum() * used / (used - 1)).sqrt() / count.sum())


def nuts_record(prepared: Prepared) -> Record | None:
    """The reference's own held-out density, in the shape of a record."""
    if prepared.reference is None:
        return None
    rows = prepared.problem.train.query.num_rows.tolist()
    density = prepared.reference["nuts"]["known_log_density"]
    return {KNOWN: {"rows": rows, "log_density": density}}


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again for the next strategy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _is_of(text: str, name: str, found: Comparison) -> bool:
    """Whether strategy `name` said this: no other of the comparison begins it with its name."""
    speakers = {outcome.fit.strategy.name for outcome in found.outcomes.values()}
    return re.split(r"\W", text, maxsplit=1)[0] not in speakers - {name}


def _short(message: object) -> str:
    return " ".join(str(message).split())[:400]
