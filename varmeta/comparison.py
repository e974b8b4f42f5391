"""compare: every strategy on the same tasks, scored the same way on rows it never saw."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from varmeta.importance import MIN_DRAWS, evidence
from varmeta.inference.base import Strategy
from varmeta.inference.fit import Fit, fit
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.reachability import reachability_gap
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Gaussian, TaskPosterior
from varmeta.runs import RunFolder
from varmeta.seeds import generator
from varmeta.shrinkage import MOST_MODULES
from varmeta.tasks import Tasks

KNOWN, NEW = "known tasks", "new tasks"
_LEVEL = 0.9
_WIDTH = 140  # the printed table needs that much


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


@dataclass(eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        density: the model.
        train: training tasks; their support rows were seen, their query rows held out.
        new: tasks held out whole; adapted to by their support rows, scored on their query rows.
        outcomes: by strategy name, in the order given.
        reference: name of the NUTS outcome, if there is one.
        table: one row per strategy and set of tasks, with columns `strategy`, `posterior` (what was
            scored: draws, gaussian, laplace, delta), `set`, `rows` held out, `elpd` (log predictive
            density per held-out row, nats) with its standard error across tasks `elpd_se`,
            `elpd_diff` to the best strategy with that of the paired difference `elpd_diff_se`,
            `rmse` of the predictive mean, `coverage` of the central 90% predictive interval,
            `pareto_k` of the worst task, given the rows that its posterior was conditioned on (see
            `evidence`; above 0.7 its q_i is not to be trusted; NaN for draws and deltas),
            `gap`, the mean `reachability_gap` of the training tasks, nats per task: how much worse
            a fresh adaptation is than the posteriors that the strategy kept,
            `seconds` of learning, `adapt_seconds`, `gradients` (evaluations of one task's loss),
            and the distance of the task posteriors to NUTS: `mean_shift`, the median over tasks and
            coordinates of |difference of means| / sd of NUTS, and `sd_ratio`, the median ratio of
            sds. NaN where there is nothing to score.
    """

    density: Density
    train: Tasks
    new: Tasks | None
    outcomes: dict[str, Outcome]
    reference: str | None
    table: pd.DataFrame

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH)
        for table in self.rich_tables():
            console.print(table)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def shrinkage(self, least: float = 0.1) -> pd.DataFrame:
        """`fit.shrinkage(least=least)` of every strategy, with `strategy` as first column.

        Raises:
            ValueError: more than 1,000 modules.
        """
        tables = []
        for name, outcome in self.outcomes.items():
            found = outcome.fit.shrinkage(posterior=outcome.known, least=least).table
            found.insert(0, "strategy", name)
            tables.append(found)
        return pd.concat(tables, ignore_index=True)

    def rich_tables(self) -> list[Table]:
        """The table for reading, one for each set of tasks."""
        return [
            _rich(self.table[self.table["set"] == which], which)
            for which in self.table["set"].unique()
        ]


def compare(
    strategies: Sequence[Strategy] | Mapping[str, Strategy],
    density: Density,
    train: Tasks,
    new: Tasks | None = None,
    *,
    prior: GaussianPrior | None = None,
    seed: int = 0,
    draws: int = 1000,
    folder: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Comparison:
    """Fit every strategy to the same rows and score all of them on the same held-out rows.

    Each strategy learns from the support rows of `train` alone (those that need a query part
    cross-validate within them). Scored are the query rows of `train`, given the task posteriors of
    the fit, and the query rows of `new`, tasks that no strategy has seen, after adapting to their
    support rows.

    Args:
        strategies: as a list, or by name.
        density: the model.
        train: training tasks, split if held-out rows in known tasks are to be scored.
        new: further tasks, split if they are to be scored.
        prior: where every strategy starts; default `GaussianPrior.from_density(density)`.
        seed: of everything random.
        draws: posterior draws per score.
        folder: write checkpoints, table, ArviZ files and pictures there; an interrupted comparison
            called again with the same arguments goes on where it stopped.
        overwrite: replace a finished (or another) comparison in `folder`.
        progress: show progress bars; None for "when the output is a terminal".

    Raises:
        ValueError: no strategies, two of the same name, or something of another shape.
        FileExistsError: `folder` holds a finished run, or files that are not a run.
        KeyboardInterrupt: what is done is kept in `folder`.
    """
    named = _named(strategies)
    if new is not None:
        new.require_rows("new")
        clash = set(new.names) & set(train.names)
        if clash:
            raise ValueError(f"new: task {min(clash)!r} is among the training tasks too")
    run = None
    if folder is not None:
        settings = {
            "strategies": {name: repr(strategy) for name, strategy in named.items()},
            "tasks": repr(train),
            "new": repr(new),
            "sites": density.site_table().astype(str).to_dict("list"),
            "seed": seed,
            "draws": draws,
        }
        run = RunFolder(Path(folder), settings, overwrite=overwrite)
    outcomes: dict[str, Outcome] = {}
    for name, strategy in named.items():
        result = fit(
            strategy,
            density,
            train.support,
            prior=prior,
            seed=seed,
            checkpoint=run.state_file(name) if run else None,
            progress=progress,
        )
        start = time.perf_counter()
        known = result.posterior()
        fresh = None if new is None else result.adapt(new.support)
        seconds = time.perf_counter() - start
        gap = reachability_gap(result) if strategy.keeps_posteriors else None
        outcomes[name] = Outcome(result, known, fresh, seconds, gap)
    reference = next((n for n, o in outcomes.items() if isinstance(o.fit.strategy, PyroNUTS)), None)
    table = _score(outcomes, reference, train, new, draws, seed)
    comparison = Comparison(density, train, new, outcomes, reference, table)
    if run is not None:
        _write(comparison, run)
    return comparison


def _named(strategies: Sequence[Strategy] | Mapping[str, Strategy]) -> dict[str, Strategy]:
    if isinstance(strategies, Mapping):
        named = dict(strategies)
    else:
        names = [s.name for s in strategies]
        twice = [n for n in names if names.count(n) > 1]
        if twice:
            raise ValueError(
                f"strategies: two are called {twice[0]!r}; give them names of their own: "
                "compare({'first': ..., 'second': ...}, ...)"
            )
        named = dict(zip(names, strategies, strict=True))
    if not named:
        raise ValueError("strategies is empty; give at least one")
    return named


def _write(comparison: Comparison, run: RunFolder) -> None:
    from varmeta.export import to_arviz  # ArviZ and Matplotlib only when something is written
    from varmeta.report import write_figures

    # As many draws a chain as NUTS has: common plots of ArviZ 1.x leave out fits that have fewer.
    truth = comparison.outcomes[comparison.reference].fit.strategy if comparison.reference else None
    draws = truth.draws if isinstance(truth, PyroNUTS) else 500
    for name, outcome in comparison.outcomes.items():
        data = to_arviz(outcome.fit, posterior=outcome.known, draws=draws)
        with run.writing(run.file_name(name) + ".nc") as path:
            data.to_netcdf(str(path))
    run.add(write_figures(comparison, run.folder))
    with run.writing("table.csv") as path:
        comparison.table.to_csv(path, index=False)
    if all(len(o.fit.prior.modules) <= MOST_MODULES for o in comparison.outcomes.values()):
        with run.writing("modules.csv") as path:
            comparison.shrinkage().to_csv(path, index=False)
    run.finish()


# -- scores ----------------------------------------------------------------------------------------


def _score(
    outcomes: Mapping[str, Outcome],
    reference: str | None,
    train: Tasks,
    new: Tasks | None,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    rows = []
    sets = {KNOWN: train} if new is None else {KNOWN: train, NEW: new}
    for which, tasks in sets.items():
        held_out = tasks.query if tasks.is_split else None
        posteriors = {n: o.known if which == KNOWN else o.new for n, o in outcomes.items()}
        lpd: dict[str, Tensor] = {}
        for name, posterior in posteriors.items():
            assert posterior is not None
            outcome = outcomes[name]
            row: dict[str, object] = {
                "strategy": name,
                "posterior": posterior.kind,
                "set": which,
                "rows": 0 if held_out is None else int(held_out.mask.sum()),
                **dict.fromkeys(("elpd", "elpd_se", "elpd_diff", "elpd_diff_se"), np.nan),
                "rmse": np.nan,
                "coverage": np.nan,
                "pareto_k": _worst_k(outcome.fit, posterior, tasks.support, draws, seed),
                "gap": np.nan,
                "seconds": outcome.fit.seconds,
                "adapt_seconds": outcome.adapt_seconds,
                "gradients": outcome.fit.gradients,
                "mean_shift": np.nan,
                "sd_ratio": np.nan,
            }
            if which == KNOWN and outcome.gap is not None:
                row["gap"] = float(outcome.gap.mean())
            if held_out is not None:
                lpd[name] = posterior.log_predictive(
                    held_out, draws, generator(seed, 0, device=held_out.mask.device)
                )
                row["elpd"], row["elpd_se"] = _per_row(lpd[name], held_out)
                row["rmse"], row["coverage"] = _accuracy(posterior, held_out, draws, seed)
            if reference is not None:
                truth = posteriors[reference]
                assert truth is not None
                shift = (posterior.mean - truth.mean).abs() / truth.sd
                row["mean_shift"] = float(shift.median())
                row["sd_ratio"] = float((posterior.sd / truth.sd).median())
            rows.append(row)
        if held_out is not None:
            best = max(lpd, key=lambda name: float(lpd[name].sum()))
            for row in rows[-len(posteriors) :]:
                difference = lpd[str(row["strategy"])] - lpd[best]
                row["elpd_diff"], row["elpd_diff_se"] = _per_row(difference, held_out)
    return pd.DataFrame(rows)


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
    """RMSE of the predictive mean and coverage of the central 90% interval; NaN for categories."""
    if not tasks.targets.is_floating_point():
        return float("nan"), float("nan")
    predicted = posterior.predict(tasks, draws, generator(seed, 1, device=tasks.mask.device))
    if len(predicted) > 1:  # several observed sites: which is the target is the model's secret
        return float("nan"), float("nan")
    values = next(iter(predicted.values()))[:, tasks.mask].to(tasks.targets)
    truth = tasks.targets[tasks.mask]
    tail = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]).to(values)
    low, high = values.quantile(tail, dim=0)
    inside = ((truth >= low) & (truth <= high)).double().mean()
    return float((values.mean(0) - truth).square().mean().sqrt()), float(inside)


def _worst_k(result: Fit, posterior: TaskPosterior, tasks: Tasks, draws: int, seed: int) -> float:
    """Pareto k of the worst task; NaN without a density."""
    if not isinstance(posterior, Gaussian):
        return float("nan")
    found = evidence(posterior, result.prior, tasks, draws=max(draws, MIN_DRAWS), seed=seed)
    return float(found.pareto_k.max())


# -- reading ---------------------------------------------------------------------------------------


def _rich(table: pd.DataFrame, which: str) -> Table:
    rows = int(table["rows"].max())
    out = Table(
        title=f"{which}: {rows or 'no'} held-out rows",
        title_justify="left",
        caption="log density in nats; ± a standard error across tasks (difference: of the pairs); "
        "k̂: Pareto k of the worst task, above 0.7 its q is not to be trusted; "
        "gap: nats per task that a fresh adaptation loses to what was kept; "
        "shift: |mean − NUTS mean| in NUTS sds",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in (
        "strategy",
        "posterior",
        "log density\nper row",
        "difference\nto best",
        "RMSE",
        "90%\ncover",
        "k̂\nmax",
        "gap",
        "seconds",
        "gradients",
        "shift",
        "sd ratio",
    ):
        left = heading in ("strategy", "posterior")
        wraps = heading == "strategy"  # a long name, and no number, gives way
        out.add_column(heading, justify="left" if left else "right", no_wrap=not wraps)
    for row in table.sort_values("elpd", ascending=False, kind="stable").to_dict("records"):
        best, reference = row["elpd_diff"] == 0, row["mean_shift"] == 0
        out.add_row(
            row["strategy"],
            row["posterior"],
            _number(row["elpd"], ".3f", row["elpd_se"]),
            "best" if best else _number(row["elpd_diff"], ".4f", row["elpd_diff_se"]),
            _number(row["rmse"], ".3g"),
            _number(row["coverage"], ".2f"),
            "exact" if row["pareto_k"] == -np.inf else _number(row["pareto_k"], ".2f"),
            _number(row["gap"], ".2f"),
            _number(row["seconds"], ".1f"),
            f"{row['gradients']:.2g}",
            "reference" if reference else _number(row["mean_shift"], ".2f"),
            "" if reference else _number(row["sd_ratio"], ".2f"),
        )
    return out


def _number(value: float, form: str, error: float | None = None) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:{form}}" + (f" ± {error:{form}}" if error is not None else "")
