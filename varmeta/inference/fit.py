"""fit: the only outer loop, with its progress bar, checkpoints and exact resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from varmeta.checked import require_kind
from varmeta.files import BrokenFile, load, locked, not_usable, require_writable
from varmeta.fingerprint import Fingerprint, check_same
from varmeta.inference.base import Batch, NonFiniteLoss, State, StepInfo, Strategy
from varmeta.inference.diagnostics import (
    by_task,
    note,
    say_of_stream,
    warn_of,
    warn_of_collapse,
    warn_of_limit,
    warn_of_skipped,
)
from varmeta.inference.fitted import (
    BATCH,
    DROPOUT,
    INIT,
    STEP,
    Fit,
    device_of,
    identify,
    noise_of,
)
from varmeta.inference.soundness import (
    check_learned,
)
from varmeta.inference.stopping import Terminated, whole_steps
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.models.support import finite_tasks
from varmeta.seeds import generator, generators
from varmeta.shrinkage import MOST_MODULES
from varmeta.tasks import HOW_TASKS, Tasks, TaskSource

_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_log = logging.getLogger("varmeta")
_SAVED = {"state": dict, "seed": int, "strategy": str, "history": dict, "stats": dict}


def fit(
    strategy: Strategy,
    density: Density,
    tasks: Tasks | TaskSource,
    *,
    prior: GaussianPrior | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool | None = None,
    on_step: Callable[[int, StepInfo], None] | None = None,
) -> Fit:
    """Learn the prior from `tasks` with `strategy`.

    Strategies that need a query part use the tasks' own split, or cross-validate; the others use
    all rows. The belief about θ0, scales and φ (`prior.hyperprior`, and the priors of shared sites)
    counts once for all tasks: on a stream, which has no end, it counts 0, and a line of the logger
    "varmeta" (a warning, if a law of the scales was chosen) says so.
    The same seed gives the same result, interrupted or not. It runs where the tasks are:
    `tasks.to(device="cuda")` before the density is built moves all of it to a GPU.

    Args:
        strategy: its `num_steps` says how long at most; a run that has arrived before ends there
            (`Fit.converged`, `Fit.reason`), and one that has not is warned of.
        density: the model.
        tasks: training tasks, or a stream of them.
        prior: default `GaussianPrior.from_density(density)`.
        batch_size: tasks per step, in a new random order every epoch; all if None.
        seed: of everything random.
        checkpoint: a file, in a folder that exists, that is written about once a minute, at the
            end, and when Ctrl-C, SIGTERM or an error stops the run. If it exists the run goes on
            from there, provided that it is of the same run: same data, split, order of tasks,
            model, prior, strategy, batch size, seed and versions (see `varmeta.fingerprint`). A
            finished one is read, and no step taken.
        progress: show a progress bar; None for "when the output is a terminal".
        on_step: called after each step.

    Raises:
        TypeError: a strategy, density or tasks that are none.
        ValueError: a task without support rows, or whose data do not fit the model (see
            `Density.check_tasks`; of a stream the first batch is looked at), a batch size out of
            range, a strategy that cannot have a shared latent whose prior has a learned spread, a
            checkpoint of another run: the message says in what it differs.
        NotWritten: the checkpoint cannot be written; found before the first step, save for a disk
            that fills up.
        BrokenFile: the checkpoint is none, or damaged.
        FileInUse: another run is at work on the checkpoint.
        NonFiniteLoss: with the task's name; the checkpoint holds the step before.
        KeyboardInterrupt: after the step is done and the checkpoint written, with how to resume.
        Terminated: the same for SIGTERM; a `SystemExit` of status 143. Without a checkpoint SIGTERM
            ends the program as always.
    """
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None:
        require_writable(path, "checkpoint")
    require_kind("strategy", strategy, Strategy, "vm.JointVariational() is one")
    require_kind("density", density, Density, "make one by vm.Density(model, tasks)")
    require_kind("tasks", tasks, (Tasks, TaskSource), HOW_TASKS)
    seen = tasks.batch(0) if isinstance(tasks, TaskSource) else tasks
    seen.require_rows("tasks")
    strategy.check_shared(density)
    density.check_tasks(finite_tasks(seen) if isinstance(tasks, TaskSource) else seen)
    training = strategy.prepare(tasks, seed)
    if batch_size is not None:
        if isinstance(training, TaskSource):
            raise ValueError("batch_size is for Tasks; a TaskSource draws its own batches")
        if not 0 < batch_size <= len(training):
            raise ValueError(f"batch_size must lie between 1 and {len(training)}, got {batch_size}")
    prior = prior or GaussianPrior.from_density(density)
    if prior.dim != density.dim:
        raise ValueError(f"prior has {prior.dim} coordinates, the density {density.dim}")
    if density.noisy and not strategy.takes_dropout:
        raise ValueError(
            f"the network has dropout='train', other masks in each step, and {strategy.name} needs "
            "a likelihood that stays the same; use network(..., dropout='off'), or a strategy "
            "that learns from query losses, such as IMAML or MAML"
        )
    whole = isinstance(training, Tasks) and batch_size in (None, len(training))
    settled = strategy.settled(density, whole=whole and not density.noisy)
    say_of_stream(tasks, prior)
    state = settled.init(density, prior, training, noise_of(density, seed, INIT))
    size = None if whole else batch_size
    run = _Run(strategy, settled, density, tasks, training, state, seed, size)
    if path is not None:
        run.fingerprint = identify(run.result())
    with locked(path) if path is not None else nullcontext():
        result = _ran(run, path, progress, on_step)
    warn_of(strategy.name, run.stats_by_task())
    skipped = state.counts.get("skipped", [0])
    if skipped[0]:
        warn_of_skipped(strategy.name, skipped, state.cache.get("skipped", []))
    if result.converged is False:
        warn_of_limit(strategy.name, result.reason)
    warn_of_collapse(result)
    return result


def _ran(
    run: _Run,
    path: Path | None,
    progress: bool | None,
    on_step: Callable[[int, StepInfo], None] | None,
) -> Fit:
    """The run taken to its end, from the checkpoint on if there is one; saved however it ends."""
    if path is not None and path.exists():
        run.load(path)
    try:
        run.loop(path, progress, on_step)
    except BaseException as error:
        said = ""
        # A step that fails has changed nothing; one that a second Ctrl-C has cut may have.
        if path is not None and (run.whole or isinstance(error, Exception)):
            run.result().save_state(path)
            said = (
                f"stopped after step {run.state.step} of {run.strategy.num_steps}; everything done "
                f"is in {path}. Call fit again with the same arguments to resume"
            )
        if isinstance(error, NonFiniteLoss):
            raise NonFiniteLoss(f"{run.strategy.name}: {error}") from error
        if isinstance(error, Terminated):
            _log.warning(f"SIGTERM: {said}")  # a program says nothing of its own when it exits
        if said and type(error) in (KeyboardInterrupt, Terminated):
            raise type(error)(said) from None
        if said:
            error.add_note(said)
        raise
    result = run.result()
    check_learned(run.strategy.name, run.state.meta)
    if path is not None:
        result.save_state(path)
    return result


class _Run:
    """One run of the loop: what it needs and what it gathers."""

    def __init__(
        self,
        strategy: Strategy,
        settled: Strategy,
        density: Density,
        tasks: Tasks | TaskSource,
        training: Tasks | TaskSource,
        state: State,
        seed: int,
        batch_size: int | None,
    ) -> None:
        self.strategy, self.settled, self.density = strategy, settled, density
        self.tasks, self.training = tasks, training
        self.state, self.seed, self.batch_size = state, seed, batch_size
        self.rows: list[dict[str, float]] = []
        self.stats: dict[str, Tensor] = {}
        self.path: list[Tensor] = []  # of the log scales, after each step
        self.all: Batch | None = None  # of all tasks, when they come in one
        self.order: tuple[int, Tensor] | None = None  # an epoch, and its order of the tasks
        self.whole = True  # not within a step, which may have changed half of the state
        self.fingerprint: Fingerprint | None = None

    def loop(
        self,
        path: Path | None,
        progress: bool | None,
        on_step: Callable[[int, StepInfo], None] | None,
    ) -> None:
        total, state = self.strategy.num_steps, self.state
        last = self.rows[-1] if self.rows else {"seconds": 0.0, "gradients": 0.0}
        seconds, gradients = last["seconds"], last["gradients"]
        saved = time.monotonic()
        noise = generators(self.seed, STEP, first=state.step, device=device_of(self.density))
        with whole_steps(saves=path is not None) as pause, _bar(progress) as bar:
            line = bar.add_task(self.strategy.name, total=total, completed=state.step, note="")
            while state.step < total and not state.arrived:
                start = time.perf_counter()
                batch = self._batch(state.step)
                self.whole = False
                density = self.density
                if density.noisy:
                    density = density.in_step(generator(self.seed, DROPOUT, state.step))
                info = self.settled.step(density, state, batch, next(noise))
                state.meta.keep_bounds()
                state.step += 1
                seconds += time.perf_counter() - start
                gradients += info.gradients
                self._record(info, batch, seconds, gradients)
                self.whole = True
                bar.update(line, completed=state.step, note=note(self.rows[-1], len(batch.tasks)))
                if on_step is not None:
                    on_step(state.step, info)
                pause()
                if path is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                    self.result().save_state(path)
                    saved = time.monotonic()

    def result(self) -> Fit:
        history, given = pd.DataFrame(self.rows), (self.strategy, self.density, self.tasks)
        stats = {name: value.detach() for name, value in self.stats.items()}
        return Fit(
            *given,
            self.state,
            self.seed,
            history,
            stats,
            self.path,
            self.settled,
            self.batch_size,
            self.fingerprint,
        )

    def stats_by_task(self) -> dict[str, Tensor]:
        """The diagnostics of each task that was given, whatever the strategy made of it."""
        if isinstance(self.tasks, TaskSource) or isinstance(self.training, TaskSource):
            return self.stats
        return by_task(self.stats, self.training.names, self.tasks.names)

    def load(self, path: Path) -> None:
        saved = load(path, _SAVED)
        state = saved["state"]
        done = bool(state.get("arrived")) or state.get("step", 0) >= self.strategy.num_steps
        assert self.fingerprint is not None
        check_same(saved.get("fingerprint"), self.fingerprint, path, done)
        try:
            self._restore(saved)
        except ValueError as error:
            raise BrokenFile(not_usable(path, str(error))) from None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
            raise BrokenFile(not_usable(path, "a part of its state is missing or odd")) from None

    def _restore(self, saved: dict[str, Any]) -> None:
        self.state.load_state_dict(saved["state"])
        self.rows = pd.DataFrame(saved["history"]).to_dict("records")  # type: ignore[assignment]
        self.stats = saved["stats"]
        self.path = list(saved.get("moved", []))

    def _batch(self, step: int) -> Batch:
        if isinstance(self.training, TaskSource):
            tasks = self.training.batch(step)
            return Batch(tasks, torch.arange(len(tasks)), float("inf"))
        count = len(self.training)
        if self.batch_size is None or self.batch_size == count:
            self.all = self.all or Batch(self.training, torch.arange(count), count)
            return self.all
        # Without replacement through each epoch; the few tasks left at its end wait for the next.
        epoch, place = divmod(step, count // self.batch_size)
        if self.order is None or self.order[0] != epoch:
            shuffle = generator(self.seed, BATCH, epoch)
            self.order = epoch, torch.randperm(count, generator=shuffle)
        start = place * self.batch_size
        index = self.order[1][start : start + self.batch_size].sort().values
        return Batch(self.training.select(index), index, count)

    def _record(self, info: StepInfo, batch: Batch, seconds: float, gradients: float) -> None:
        row: dict[str, float] = {"step": self.state.step, "loss": info.loss}
        row |= {"gradients": gradients, "seconds": seconds}
        for name in ("grad_norm", "residual", "converged", "negative_curvature"):
            if name not in info.stats:
                continue
            worst = info.worst.get(name)
            if worst is None:
                value = info.stats[name]
                worst = float(value.sum() if value.dtype == torch.bool else value.max())
            row[name] = worst
        self.rows.append(row)
        meta = self.state.meta
        if len(meta.raw["log_scale"]) <= MOST_MODULES:  # on the device, which nothing waits for
            self.path.append(meta.raw["log_scale"].detach().clone())
        if isinstance(self.training, TaskSource) or len(batch.tasks) == len(self.training):
            self.stats = info.stats
            return
        visited = torch.ones(len(batch.tasks), dtype=torch.bool)
        for name, value in (info.stats | {"visited": visited}).items():
            if name not in self.stats:
                fill = float("nan") if value.is_floating_point() else 0
                self.stats[name] = value.new_full((len(self.training),), fill)
            self.stats[name][batch.index] = value.detach()


def _bar(progress: bool | None) -> Progress:
    console = Console(stderr=True)
    hidden = not console.is_terminal if progress is None else not progress
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=hidden,
    )
