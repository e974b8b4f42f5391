"""compare: every strategy on the same tasks, scored the same way on rows it never saw."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from traceback import walk_tb

import pandas as pd
from rich.console import Console, RenderableType
from rich.text import Text

from varmeta.checked import require_kind
from varmeta.failures import Attempt, Failures
from varmeta.files import load, packed
from varmeta.fingerprint import fingerprint
from varmeta.formula_model import MODEL_FILE, WrittenModel
from varmeta.inference.base import Strategy
from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.reachability import reachability_gap
from varmeta.kept import PARTS, Kept, part_file
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.runs import DATA_FILE, MODEL_PLACE, RunFolder, run_folder
from varmeta.saved import packed_data, packed_strategy
from varmeta.scores import Outcome, Score, left_out, score, score_table, task_sets
from varmeta.seeds import generator
from varmeta.shrinkage import MOST_MODULES
from varmeta.tables import WIDTH, rich_table
from varmeta.tasks import HOW_TASKS, Tasks
from varmeta.verdict import verdict


@dataclass(eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        density: the model.
        train: training tasks; their support rows were seen, their query rows held out.
        new: tasks held out whole; adapted to by their support rows, scored on their query rows.
        outcomes: by strategy name, in the order given; without those that failed.
        reference: name of the NUTS outcome, if there is one.
        failures: by strategy name, why it failed, in a phrase. A strategy that failed when its
            files were written has its outcome and its scores all the same.
        tracebacks: of the failures, by strategy name.
        folder: where the files lie; None if none were wanted. With `overwrite` and not one strategy
            that was scored, this is `replacement/` within the folder that was given.
        table: one row per strategy and set of tasks, with columns `strategy`, `posterior` (what was
            scored: draws, gaussian, laplace, delta), `carries`, which part of what is not known
            its spread stands for ("nothing"; "tasks", θ_i given θ0, Σ and φ as points; "tasks,
            prior", those too), `set`, `rows` held out, `tasks` that have
            some, `elpd` (log predictive density per held-out row, nats) with its standard error
            across tasks `elpd_se`, `elpd_diff` to the best strategy with that of the paired
            difference `elpd_diff_se`,
            `rmse` of the predictive mean, `coverage` of the central 90% predictive interval (both
            of what the model observes, as of log y, and leaves out what it masks; NaN for classes
            without an order, and an `rmse` of several observed sites together; each by itself has
            `elpd[name]`, `rmse[name]` and `coverage[name]`),
            `pareto_k` of the worst task, given the rows that its posterior was conditioned on (see
            `evidence`; above 0.7 its q_i is not to be trusted; −inf where q_i is exact for the
            learned prior held fixed, which leaves out what is not known of its scales; for
            `NestedLaplace` the worst of a task and of the weights of θ0, Σ and φ; NaN for other
            draws and deltas),
            `gap`, the mean `reachability_gap` of the training tasks, nats per task: how much worse
            a fresh adaptation is than the posteriors that the strategy kept,
            `seconds` of learning, `adapt_seconds`, `gradients` (evaluations of one task's loss),
            and the distance of the task posteriors to NUTS: `mean_shift`, the median over tasks and
            coordinates of |difference of means| / sd of NUTS, and `sd_ratio`, the median ratio of
            sds; `converged`, whether learning ended before its limit of steps did (None where it
            has none, or cannot say), and `reason`, in words; `failed`, why the strategy failed, ''
            if it did not; `undetermined`, the modules whose scale the training data hardly tell
            from 0, given which the posteriors are all the same. NaN where there is nothing to
            score; a strategy that failed before it was scored has '' as `posterior`.
    """

    density: Density
    train: Tasks
    new: Tasks | None
    outcomes: dict[str, Outcome]
    reference: str | None
    table: pd.DataFrame
    failures: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        for sentence in self.verdict():
            console.print(Text(sentence))
        console.print()
        for table in self.rich_tables():
            console.print(table)
        for note in left_out(task_sets(self.train, self.new)):
            console.print(Text(note))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def verdict(self) -> list[str]:
        """In sentences: which strategy predicts best, which are worse, and which not to trust."""
        return verdict(self.table)

    def shrinkage(self, least: float = 0.1) -> pd.DataFrame:
        """`fit.shrinkage(least=least)` of every strategy, with `strategy` as first column.

        On the query rows, where the training tasks have some.

        Raises:
            ValueError: more than 1,000 modules.
        """
        tables, query = [], self.train.query if bool(self.train.is_query.any()) else None
        for name, outcome in self.outcomes.items():
            found = outcome.fit.shrinkage(posterior=outcome.known, query=query, least=least).table
            found.insert(0, "strategy", name)
            tables.append(found)
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def rich_tables(self) -> list[RenderableType]:
        """The table for reading, one for each set of tasks."""
        return [rich_table(self.table, which) for which in self.table["set"].unique()]

    def only(self, names: Iterable[str]) -> Comparison:
        """The same comparison with the outcomes of these strategies alone; scores stay as is."""
        wanted = set(names)
        kept = {name: o for name, o in self.outcomes.items() if name in wanted}
        return replace(
            self,
            outcomes=kept,
            reference=self.reference if self.reference in kept else None,
            table=self.table[self.table["strategy"].isin(list(kept))],
        )


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
    model_place: str = "",
    command: str = "",
) -> Comparison:
    """Fit every strategy to the same rows and score all of them on the same held-out rows.

    Each strategy learns from the support rows of `train` alone (those that need a query part
    cross-validate within them). Scored are the query rows of `train`, given the task posteriors of
    the fit, and the query rows of `new`, tasks that no strategy has seen, after adapting to their
    support rows.

    A strategy that fails, whatever the reason, becomes a row that says so, and the others run. Its
    traceback is written to `failures/NAME.txt` in `folder`; called again with the same arguments,
    the comparison fits those that failed from their last checkpoint, and the others not again:
    their states, posteriors and scores are kept there, the latter two until nothing is left to do.

    Args:
        strategies: as a list, or by name.
        density: the model.
        train: training tasks, split if held-out rows in known tasks are to be scored.
        new: further tasks, split if they are to be scored.
        prior: where every strategy starts; default `GaussianPrior.from_density(density)`.
        seed: of everything random.
        draws: posterior draws per score.
        folder: write checkpoints, table, ArviZ files and pictures there; an interrupted comparison,
            or one with failures, called again with the same arguments goes on where it stopped.
            Same are data, splits, model, prior, strategies, seed, draws and versions (see
            `varmeta.fingerprint`).
        overwrite: replace a finished (or another) comparison in `folder`. The new one grows in its
            `replacement/`, and the old one is removed when a strategy of the new one has been
            scored and all is written; to go on with one that was interrupted, call again without
            `overwrite`.
        progress: show progress bars; None for "when the output is a terminal".
        model_place: where `varmeta predict` finds the model, as `FILE.py:NAME` or a shipped
            problem's name; kept in `folder`. Without it that command must be told.
        command: what was typed to make the run; kept in `folder`, and shown by its report.

    Raises:
        TypeError: strategies, a density or tasks that are none.
        ValueError: no strategies, two of the same name, tasks without support rows, or something of
            another shape: what concerns every strategy is found before any of them is fitted.
        FileExistsError: `folder` holds a finished run, one of other arguments (the message says in
            what they differ), or files that are not a run.
        BrokenFile: its `run.json` is damaged, or names files outside of it.
        FileInUse: another process is at work on it.
        NotWritten: nothing can be written there, which is found before any fit, or the disk is full
            by now; what was written is kept, and the same call goes on.
        KeyboardInterrupt, Terminated: what is done is kept in `folder`.
    """
    named = _named(strategies)
    require_kind("density", density, Density, "make one by vm.Density(model, tasks)")
    prior = prior or GaussianPrior.from_density(density)
    _check(density, train, new, prior, draws, seed)
    if folder is None:
        return _compared(named, density, train, new, prior, seed, draws, progress, None)
    from varmeta.export import check_names  # ArviZ only when something is to be written

    check_names(density)
    given = {"train": train, "new": new}
    settings = fingerprint(named, density, given, prior, seed=seed, draws=draws)
    with run_folder(Path(folder), settings, named, overwrite=overwrite) as run:
        if isinstance(density.model, WrittenModel):  # of a formula
            run.write(MODEL_FILE, density.model.source)
            model_place = f"{MODEL_FILE}:{density.model.name}"
        if model_place:
            run.say(MODEL_PLACE, model_place)
        if command:
            run.say("command", command)
        if train.design is not None:
            run.say("design", train.design.to_json())
        _write_data(run, named, density, train.support, prior)
        return _compared(named, density, train, new, prior, seed, draws, progress, run)


def _compared(
    named: Mapping[str, Strategy],
    density: Density,
    train: Tasks,
    new: Tasks | None,
    prior: GaussianPrior,
    seed: int,
    draws: int,
    progress: bool | None,
    run: RunFolder | None,
) -> Comparison:
    """What `compare` does once its arguments are known to be good and the folder is its own."""
    failed, sets = Failures(run), task_sets(train, new)
    outcomes: dict[str, Outcome] = {}
    scores: dict[str, dict[str, Score]] = {}
    for name, strategy in named.items():
        state = run.state_file(name) if run else None
        with failed.catching(name) as attempt:
            result = _learn(strategy, density, train, prior, seed, state, progress, attempt)
            kept = Kept(run, name, result)
            outcome = _adapted(result, new, kept, attempt)
            attempt.where = "scores"
            scores[name] = kept.once(
                "scores",
                lambda of=outcome: {  # type: ignore[misc]
                    which: score(of, which, tasks, draws, seed) for which, tasks in sets.items()
                },
            )
            outcomes[name] = outcome
    reference = next((n for n, o in outcomes.items() if isinstance(o.fit.strategy, PyroNUTS)), None)
    table = score_table(named, sets, scores, outcomes, reference, failed.reasons)
    comparison = Comparison(
        density, train, new, outcomes, reference, table, failed.reasons, failed.tracebacks
    )
    if run is not None:
        _write(comparison, run, failed)
    return comparison


def _learn(
    strategy: Strategy,
    density: Density,
    train: Tasks,
    prior: GaussianPrior,
    seed: int,
    checkpoint: Path | None,
    progress: bool | None,
    attempt: Attempt,
) -> Fit:
    """Fit one strategy, saying in `attempt` how far it has come."""

    def reached(step: int, _: object) -> None:
        attempt.where = f"step {step}"

    if checkpoint is not None and checkpoint.exists():
        reached(load(checkpoint, {"state": dict})["state"]["step"], None)
    try:
        return fit(
            strategy,
            density,
            train.support,
            prior=prior,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
            on_step=reached,
        )
    except Exception as error:
        frames = walk_tb(error.__traceback__)
        if not attempt.where and any(f.f_code is type(strategy).step.__code__ for f, _ in frames):
            reached(0, None)
        raise


def _adapted(result: Fit, new: Tasks | None, kept: Kept, attempt: Attempt) -> Outcome:
    """The posteriors of a fit, saying in `attempt` how far it has come."""

    def posteriors() -> tuple[TaskPosterior, TaskPosterior | None, float]:
        start = time.perf_counter()
        attempt.where = "posterior of the training tasks"
        known = result.posterior()
        fresh = None
        if new is not None:
            attempt.where = "adapting to new tasks"
            fresh = result.adapt(new.support)
        return known, fresh, time.perf_counter() - start

    known, fresh, seconds = kept.once("posteriors", posteriors)
    attempt.where, gap = "reachability gap", None
    if result.strategy.keeps_posteriors:
        gap = kept.once("gap", lambda: reachability_gap(result))
    return Outcome(result, known, fresh, seconds, gap)


def _check(
    density: Density,
    train: Tasks,
    new: Tasks | None,
    prior: GaussianPrior,
    draws: int,
    seed: int,
) -> None:
    """Find before any training what would fail every strategy."""
    for argument, tasks in {"train": train, **({} if new is None else {"new": new})}.items():
        require_kind(argument, tasks, Tasks, HOW_TASKS)
        tasks.require_rows(argument)
        density.check_tasks(tasks)
    clash = set() if new is None else set(new.names) & set(train.names)
    if clash:
        raise ValueError(f"new: task {min(clash)!r} is among the training tasks too")
    if prior.dim != density.dim:
        raise ValueError(f"prior has {prior.dim} coordinates, the density {density.dim}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    generator(seed)  # raises a ValueError if it is negative


def _named(strategies: Sequence[Strategy] | Mapping[str, Strategy]) -> dict[str, Strategy]:
    remedy = "give a list, such as [vm.IMAML(), vm.NoPooling()]"
    require_kind("strategies", strategies, Iterable, remedy)
    given = strategies.values() if isinstance(strategies, Mapping) else strategies
    for strategy in given:
        require_kind("each of strategies", strategy, Strategy, remedy)
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
    unusable = [name for name in named if not isinstance(name, str) or not name.strip()]
    if unusable:
        raise ValueError(
            f"strategies: a name must be a text that is not empty, got {unusable[0]!r}; the names "
            "stand in tables and files"
        )
    return named


def _write(comparison: Comparison, run: RunFolder, failed: Failures) -> None:
    # ArviZ and Matplotlib only when something is written
    from varmeta.export import netcdf, to_arviz
    from varmeta.html_report import html_report
    from varmeta.report_write import write_figures

    # As many draws a chain as NUTS has: common plots of ArviZ 1.x leave out fits that have fewer.
    truth = comparison.outcomes[comparison.reference].fit.strategy if comparison.reference else None
    draws = truth.draws if isinstance(truth, PyroNUTS) else None
    _write_table(comparison, run)  # first: it is what took the time
    modules = []
    for name, outcome in comparison.outcomes.items():
        with failed.catching(name, "ArviZ file"):
            data = to_arviz(outcome.fit, posterior=outcome.known, draws=draws, single=True)
            run.write(f"{run.file_name(name)}.nc", netcdf(data))
        if len(outcome.fit.prior.modules) <= MOST_MODULES:
            with failed.catching(name, "shrinkage"):
                modules.append(comparison.only([name]).shrinkage())
    if modules:
        run.write("modules.csv", pd.concat(modules, ignore_index=True).to_csv(index=False))
    write_figures(comparison, run.folder, failed.note, run.add)
    failed.forget_earlier(comparison.table["strategy"].unique())
    _write_table(comparison, run)
    run.write("report.html", html_report(run.folder, run.home.resolve().name))
    if not comparison.failures:
        for name in comparison.outcomes:
            for part in PARTS:
                run.remove(part_file(run, name, part))
        run.finish()  # last: a finished run is not opened again
    if comparison.outcomes:
        run.take_place()
    comparison.folder = run.folder


def _write_data(
    run: RunFolder,
    named: Mapping[str, Strategy],
    density: Density,
    tasks: Tasks,
    prior: GaussianPrior,
) -> None:
    """What `load` needs beside the strategies' checkpoints."""
    strategies = {}
    for name, strategy in named.items():
        file = run.state_file(name).relative_to(run.folder).as_posix()
        strategies[name] = {"file": file, "settings": packed_strategy(strategy)}
    data = packed_data(density, tasks, prior)
    run.write(DATA_FILE, packed({"strategies": strategies, "data": data}))


def _write_table(comparison: Comparison, run: RunFolder) -> None:
    """With what has failed so far."""
    table = comparison.table
    table["failed"] = [comparison.failures.get(name, "") for name in table["strategy"]]
    run.write("table.csv", table.to_csv(index=False))
