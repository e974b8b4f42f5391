"""The scores of strategies on held-out rows, on the same rows in the same way, as one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.importance import MIN_DRAWS, evidence
from varmeta.inference.diagnostics import undetermined_of
from varmeta.inference.fitted import Fit
from varmeta.models.observed import observed_data, predicted_sites
from varmeta.posterior import Gaussian, TaskPosterior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

KNOWN, NEW = "known tasks", "new tasks"
_LEVEL = 0.9


@dataclass(eq=False)
class Outcome:
    """One strategy: its fit, and its posteriors of the tasks that are scored.

    Attributes:
        fit: the run.
        known: posterior of the training tasks given the rows that were seen.
        new: posterior of the new tasks given their support rows; None without new tasks.
        adapt_seconds: wall time that the two posteriors took.
        gap: `reachability_gap` of each training task, nats, `[T]`; None where nothing was kept.
    """

    fit: Fit
    known: TaskPosterior
    new: TaskPosterior | None
    adapt_seconds: float
    gap: Tensor | None = None

    def posterior(self, which: str) -> TaskPosterior:
        """That of the known or of the new tasks."""
        found = self.known if which == KNOWN else self.new
        assert found is not None
        return found


@dataclass(eq=False)
class Score:
    """One strategy on one set of tasks.

    Attributes:
        row: of the table, as far as it needs no other strategy.
        lpd: log predictive densities of the held-out rows, nats, `[T, N]`; None without any.
    """

    row: dict[str, object]
    lpd: Tensor | None


def task_sets(train: Tasks, new: Tasks | None) -> dict[str, Tasks]:
    """What is scored, by name."""
    return {KNOWN: train} if new is None else {KNOWN: train, NEW: new}


def left_out(sets: Mapping[str, Tasks]) -> list[str]:
    """A sentence for each set of tasks in which some have no row to be scored on."""
    out = []
    for which, tasks in sets.items():
        empty = int((tasks.query.num_rows == 0).sum())
        if not tasks.is_split:
            out.append(
                f"{which}: the tasks are not split, so that nothing is scored here. Pass "
                "tasks.split(0.3) to hold out rows, if tasks have rows to spare."
            )
        elif empty == len(tasks):
            out.append(
                f"{which}: no task has a held-out row, so that nothing is scored here. Hold out a "
                "larger share, or give tasks with more rows."
            )
        elif empty:
            out.append(
                f"{which}: {empty} of {len(tasks)} tasks have no held-out row (too few rows to "
                "split) and are left out of the scores."
            )
    return out


def score(outcome: Outcome, which: str, tasks: Tasks, draws: int, seed: int) -> Score:
    """Score one strategy's posterior of one set of tasks on the rows held out there.

    Raises:
        FloatingPointError: the density of a row is not a number, or infinite.
    """
    posterior, fit = outcome.posterior(which), outcome.fit
    held_out = tasks.query if bool(tasks.is_query.any()) else None
    row = _empty(tasks) | {
        "posterior": posterior.kind,
        "carries": _carries(fit, posterior),
        "pareto_k": _worst_k(fit, posterior, tasks.support, draws, seed),
        "seconds": fit.seconds,
        "adapt_seconds": outcome.adapt_seconds,
        "gradients": fit.gradients,
        "converged": fit.converged,
        "reason": fit.reason,
        "undetermined": ", ".join(scale.module for scale in undetermined_of(fit) or []),
    }
    if which == KNOWN and outcome.gap is not None:
        row["gap"] = float(outcome.gap.mean())
    lpd = None
    if held_out is not None:
        source = generator(seed, 0, device=held_out.mask.device)
        lpd = posterior.log_predictive(held_out, draws, source)
        # A density of 0, -inf nats, is an answer, if a bad one; NaN and +inf are none.
        real = lpd.where(lpd != -torch.inf, 0)
        _check_finite(real, tasks.names, "the log density of held-out rows")
        row["elpd"], row["elpd_se"] = _per_row(lpd, held_out)
        row["rmse"], row["coverage"] = _accuracy(posterior, held_out, draws, seed)
        if len(fit.density.observed) > 1:
            row |= _by_site(posterior, held_out, draws, seed)
    return Score(row, lpd)


def score_table(
    names: Iterable[str],
    sets: Mapping[str, Tasks],
    scores: Mapping[str, Mapping[str, Score]],
    outcomes: Mapping[str, Outcome],
    reference: str | None,
    failures: Mapping[str, str],
) -> pd.DataFrame:
    """One row for each strategy and set: its score beside the best and the reference.

    Args:
        names: of all strategies, in the table's order.
        sets: the tasks that are scored.
        scores: by strategy, then by set; those that failed have none.
        outcomes: of all that have scores.
        reference: the NUTS outcome's name, if there is one.
        failures: by strategy, why it failed.
    """
    rows = []
    for which, tasks in sets.items():
        lpd = {n: s[which].lpd for n, s in scores.items() if s[which].lpd is not None}
        sums = {n: float(v.sum()) for n, v in lpd.items() if v is not None}
        finite = {n: v for n, v in sums.items() if np.isfinite(v)}
        best = max(finite, key=finite.__getitem__) if finite else None
        for name in names:
            row = {"strategy": name, "set": which, **_empty(tasks)}
            if name in scores:
                row |= scores[name][which].row
                mine = lpd.get(name)
                if mine is not None and best is not None:
                    difference = mine - lpd[best]  # type: ignore[operator]
                    row["elpd_diff"], row["elpd_diff_se"] = _per_row(difference, tasks.query)
                if reference is not None:
                    posterior = outcomes[name].posterior(which)
                    truth = outcomes[reference].posterior(which)
                    shift = (posterior.mean - truth.mean).abs() / truth.sd
                    row["mean_shift"] = float(shift.median())
                    row["sd_ratio"] = float((posterior.sd / truth.sd).median())
            rows.append(row | {"failed": failures.get(name, "")})
    first = ["strategy", "posterior", "carries", "set"]
    table = pd.DataFrame(rows)
    table["converged"] = table["converged"].astype(object)  # True, False, or None: it cannot say
    return table[first + [c for c in table.columns if c not in first]]


def _carries(fit: Fit, posterior: TaskPosterior) -> str:
    """Which part of what is not known a posterior's spread stands for."""
    if posterior.kind == "delta":
        return "nothing"
    return "tasks" if fit.strategy.point_scales else "tasks, prior"


def _empty(tasks: Tasks) -> dict[str, object]:
    """A row's columns where there is nothing to say."""
    numbers = ["elpd", "elpd_se", "elpd_diff", "elpd_diff_se", "rmse", "coverage", "pareto_k"]
    numbers += ["gap", "seconds", "adapt_seconds", "gradients", "mean_shift", "sd_ratio"]
    return {
        "posterior": "",
        "carries": "",
        "rows": int(tasks.query.mask.sum()) if tasks.is_split else 0,
        "tasks": int((tasks.query.num_rows > 0).sum()) if tasks.is_split else 0,
        **dict.fromkeys(numbers, np.nan),
        "converged": None,
        "reason": "",
        "undetermined": "",
    }


def _check_finite(values: Tensor, names: tuple[str, ...], what: str) -> None:
    """`[T, ...]` values of these tasks."""
    bad = (~values.isfinite()).flatten(1).any(-1).nonzero()[:, 0].tolist()
    if bad:
        raise FloatingPointError(
            f"{what} of task {names[bad[0]]!r} is not finite ({len(bad)} of {len(names)} tasks)"
        )


def _per_row(values: Tensor, tasks: Tasks) -> tuple[float, float]:
    """Mean over existing rows, and its standard error with tasks as the independent units.

    Rows of a task share its posterior and are not independent: the error is that of a ratio of two
    sums over tasks.
    """
    count = tasks.num_rows.to(values)
    mean = values.sum() / count.sum()
    residual = values.sum(-1) - count * mean
    used = int((count > 0).sum())
    if used < 2:
        return float(mean), float("nan")
    return float(mean), float((residual.square().sum() * used / (used - 1)).sqrt() / count.sum())


def _accuracy(posterior: TaskPosterior, tasks: Tasks, draws: int, seed: int) -> tuple[float, float]:
    """RMSE of the predictive mean and coverage of the central 90% interval, as the model sees y.

    NaN for classes without an order, and for a model that cannot predict, which was said when its
    density was made. Of several observed sites the coverage is that of all their entries together,
    and the RMSE NaN, as units may differ.
    """
    found = _tallies(posterior, tasks, draws, seed)
    rmse = next(iter(found.values())).rmse if len(found) == 1 else float("nan")
    inside, count = (sum(getattr(t, n) for t in found.values()) for n in ("inside", "count"))
    return rmse, inside / count if count else float("nan")


def _by_site(posterior: TaskPosterior, tasks: Tasks, draws: int, seed: int) -> dict[str, object]:
    """Of several observed sites, each by itself: log density per row, RMSE and coverage."""
    density, found = posterior.density, _tallies(posterior, tasks, draws, seed)
    out: dict[str, object] = {}
    for name in density.observed:
        source = generator(seed, 0, device=tasks.mask.device)
        lpd = posterior.log_predictive(tasks, draws, source, site=name)
        tally = found.get(name, _Tally())
        out[f"elpd[{name}]"] = _per_row(lpd, tasks)[0]
        out[f"rmse[{name}]"], out[f"coverage[{name}]"] = tally.rmse, tally.coverage
    return out


@dataclass
class _Tally:
    """Sums over the entries of an observed site that its law is asked about."""

    squares: float = 0.0
    inside: int = 0
    count: int = 0

    @property
    def rmse(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else float("nan")

    @property
    def coverage(self) -> float:
        return self.inside / self.count if self.count else float("nan")

    def add(self, values: np.ndarray, truth: np.ndarray) -> None:
        """Draws `[S, n]` and what was observed, `[n]`."""
        if not truth.size:
            return
        low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
        with np.errstate(over="ignore"):  # infinitely far off is far off
            self.squares += float(np.square(values.mean(0) - truth).sum())
        self.inside += int(((truth >= low) & (truth <= high)).sum())
        self.count += truth.size


def _tallies(posterior: TaskPosterior, tasks: Tasks, draws: int, seed: int) -> dict[str, _Tally]:
    """By observed site, of those whose values have distances."""
    source, found = generator(seed, 1, device=tasks.mask.device), dict[str, _Tally]()
    density = posterior.density
    if density.cannot_predict is not None:  # which was said when it was made
        return {}
    names = set(predicted_sites(density, tasks))
    for part, predicted in posterior.predictions(tasks, draws, source):
        for name, site in observed_data(density, part).items():
            if name not in names:
                continue
            values = predicted[name][:, part.mask].double().cpu().numpy()
            truth = site.value[part.mask].double().cpu().numpy()
            if site.nominal or values.shape[1:] != truth.shape:
                continue
            seen = site.seen[part.mask].cpu().numpy()
            found.setdefault(name, _Tally()).add(values[:, seen], truth[seen])
    return found


def _worst_k(result: Fit, posterior: TaskPosterior, tasks: Tasks, draws: int, seed: int) -> float:
    """Pareto k of the worst task; what the strategy says of itself where there is no density."""
    if not isinstance(posterior, Gaussian):
        return (result.settled or result.strategy).worst_k(result.state)
    found = evidence(posterior, result.prior, tasks, draws=max(draws, MIN_DRAWS), seed=seed)
    return float(found.pareto_k.max())
