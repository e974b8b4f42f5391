"""Fit: what a run of a strategy has learned, asked in the user's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from varmeta.checked import require_kind
from varmeta.files import packed, write
from varmeta.fingerprint import Fingerprint, fingerprint
from varmeta.inference.base import State, Strategy
from varmeta.inference.diagnostics import still_improving, warn_of
from varmeta.inference.quasi_newton import moving
from varmeta.inference.soundness import check_posterior, diverged, warn_of_posterior
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import DRAWS, TaskPosterior
from varmeta.prediction import QUANTILES, Predictions, predict
from varmeta.saved import packed_data, packed_strategy
from varmeta.seeds import generator
from varmeta.shrinkage import Shrinkage, find_shrinkage, scales_path
from varmeta.tasks import HOW_TASKS, Tasks, TaskSource

BATCH, STEP, ADAPT, INIT, DROPOUT = range(5)  # streams of a fit's seed


@dataclass(eq=False, repr=False)
class Fit:
    """A finished (or interrupted) run of one strategy.

    Attributes:
        strategy: what ran, as it was given.
        density: the model.
        tasks: the training tasks as given.
        state: the learned state.
        seed: the seed it ran with.
        history: one row per step: `step`, `loss` (nats per task), `gradients` (evaluations so far),
            `seconds`, and the worst `grad_norm` and `residual` over tasks where there are any.
        stats: per-task diagnostics `[T]` of the last visit to each training task, or to each of its
            folds where the strategy cross-validates; with `batch_size` also whether it was visited.
        path: `[M]` each, how far the log scales had moved after each step, for `scales`.
        settled: the strategy with every choice made that it left open.
        batch_size: tasks per step; None for all.
        fingerprint: what identifies the run, taken at its start; None where nothing was kept.
    """

    strategy: Strategy
    density: Density
    tasks: Tasks | TaskSource
    state: State
    seed: int
    history: pd.DataFrame
    stats: dict[str, Tensor] = field(default_factory=dict)
    path: list[Tensor] = field(default_factory=list)
    settled: Strategy | None = None
    batch_size: int | None = None
    fingerprint: Fingerprint | None = None

    def __repr__(self) -> str:
        how = {True: "converged", False: "not converged", None: "ended"}[self.converged]
        return (
            f"Fit({self.strategy.name} on {self.tasks!r}: {how} after {self.state.step} steps, "
            f"{self.seconds:.1f} s, {self.density.dim} adapted and {self.density.shared_dim} "
            "shared coordinates; see prior, predict, adapt, posterior, shrinkage)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """With what the run has learned, as a checkpoint holds it, and without its caches."""
        return vars(self) | {"state": (self.state.meta.origin, self.state.state_dict())}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        origin, learned = saved["state"]
        vars(self).update(saved)
        training = self.strategy.prepare(self.tasks, self.seed)
        noise = noise_of(self.density, self.seed, INIT)
        self.state = self._ran.init(self.density, origin, training, noise)
        self.state.load_state_dict(learned)

    @property
    def _ran(self) -> Strategy:
        return self.settled or self.strategy

    @property
    def prior(self) -> GaussianPrior:
        """The learned N(θ0, Σ), without gradients (NUTS: posterior means of loc and log scale)."""
        return self.state.meta.fixed()[0]

    @property
    def shared(self) -> Tensor:
        """The learned φ `[P]`, unconstrained."""
        return self.state.meta.fixed()[1]

    @property
    def scales(self) -> Tensor | None:
        """`[steps, M]`, each module's standard deviation after each step.

        None with more than 1,000 modules, and where no step but the last moved a scale: it is not
        learned, or set once (`CompletePooling`, `PyroNUTS`). NaN where an old checkpoint had none.
        """
        return scales_path(self.path, self.state.meta.origin, len(self.history))

    @property
    def finished(self) -> bool:
        """Whether no step is left: the run has arrived, or taken as many as it may."""
        return bool(self.state.arrived) or self.state.step >= self.strategy.num_steps

    @property
    def converged(self) -> bool | None:
        """Whether the run ended because it had arrived; None for a strategy without such a test.

        False for any strategy where its objective ended far above its start.
        """
        if diverged(self):
            return False
        return self._ran.has_converged(self.state) if self._ran.is_tested(self.state) else None

    @property
    def reason(self) -> str:
        """Why the run ended, in words; empty where the strategy has no test of it."""
        if self.converged is None:
            return ""
        if apart := diverged(self):
            return apart
        if self.converged:
            return f"{self.state.arrived} (step {self.state.step})"
        shortfall = self._ran.shortfall(self.state)
        return shortfall or (
            f"the limit of {self.strategy.num_steps} steps came first"
            f"{still_improving(self.history)}; raise steps"
        )

    def moving(self) -> pd.DataFrame:
        """How far each learned quantity still moves, one row each.

        Columns: `quantity`; `value`, as in `state.meta.raw` (in units of the user's prior, from its
        start); `error`, its standard error from the curvature of the objective where the run
        measured that, else NaN; `moves`, how far a Newton step or the last tenth of the iterates
        moved it, in standard errors (NaN where neither is known).
        """
        return moving(self.state)

    @property
    def seconds(self) -> float:
        """Wall time of the steps."""
        return float(self.history["seconds"].iloc[-1]) if len(self.history) else 0.0

    @property
    def gradients(self) -> int:
        """Gradient evaluations of one task's loss, a Hessian-vector product counted as two."""
        return int(self.history["gradients"].iloc[-1]) if len(self.history) else 0

    def adapt(self, tasks: Tasks) -> TaskPosterior:
        """The posterior of each task given its rows, all of which are seen.

        Of split tasks say which rows those are: `tasks.support`, so that the query rows stay unseen
        and can be scored, or `tasks.unsplit`.

        Raises:
            TypeError: tasks that are no `Tasks`.
            ValueError: tasks with query rows, a task without rows, or whose data do not fit the
                model, see `Density.check_tasks`.
            NonFinitePosterior: naming the task.
        """
        require_kind("tasks", tasks, Tasks, HOW_TASKS)
        tasks.require_no_query("tasks", "to adapt to them too")
        tasks.require_rows("tasks")
        self.density.check_tasks(tasks)
        posterior = self._ran.adapt(
            self.density, self.state, tasks.unsplit, noise_of(self.density, self.seed, ADAPT)
        )
        check_posterior(self.strategy.name, posterior)
        warn_of(self.strategy.name, posterior.stats)
        warn_of_posterior(self.strategy, posterior, tasks.unsplit, self.state.meta)
        return posterior

    def posterior(self) -> TaskPosterior:
        """The posterior of the training tasks given all of their rows.

        Raises:
            ValueError: the run was on a stream, whose tasks are not kept.
            NonFinitePosterior: naming the task.
        """
        if isinstance(self.tasks, TaskSource):
            raise ValueError("a stream's tasks are not kept; use fit.adapt(tasks) with your tasks")
        tasks = self.tasks.unsplit
        posterior = self._ran.posterior(
            self.density, self.state, tasks, noise_of(self.density, self.seed, ADAPT)
        )
        check_posterior(self.strategy.name, posterior)
        warn_of_posterior(self.strategy, posterior, tasks, self.state.meta)
        return posterior

    def unseen(self, names: Sequence[str]) -> TaskPosterior:
        """What is known of new tasks before a row of theirs is seen: θ ~ N(θ0, Σ) for each.

        With `PyroNUTS` and `NestedLaplace` for each draw of θ0, Σ and φ; with `CompletePooling`
        what holds for all tasks.

        Args:
            names: of the tasks.

        Raises:
            ValueError: no names, one that is no text, or one twice.
        """
        texts = () if isinstance(names, str) else tuple(names)
        if not texts or len(set(texts)) < len(texts) or not all(isinstance(n, str) for n in texts):
            raise ValueError(f"names must be different texts in a list, got {names!r}")
        return self._ran.unseen(
            self.density, self.state, texts, noise_of(self.density, self.seed, ADAPT)
        )

    def predict(
        self,
        data: pd.DataFrame | Tasks,
        *,
        draws: int = DRAWS,
        quantiles: Sequence[float] = QUANTILES,
        keep: int = 0,
        seed: int = 0,
    ) -> Predictions:
        """What the rows of `data` that have no target will be, in known tasks and in new ones.

        Rows with a target say more of their task. A known task is taken as it was learned; if it
        has rows here that were not learned from, it is adapted to both. A new task is adapted to
        its rows; without any it is only known to come from N(θ0, Σ). A row that equals one learned
        from (all inputs and the target) is taken for that one, so that a table may hold both: where
        equal rows are further ones, adapt to all rows by `fit.adapt`.

        Args:
            data: a frame with the columns that the training tasks were made from, the target's
                cells empty where it is to be predicted, or its column left out. Or `Tasks`: of
                split ones the query rows are predicted given the support rows; of others the rows
                whose targets are NaN, or, if all tasks are known, all rows.
            draws: of each task.
            quantiles: of the predictions.
            keep: how many draws of each row to keep in `Predictions.draws`.
            seed: of the draws.

        Returns:
            `Predictions`, with its `table`.

        Raises:
            TypeError: data that are neither.
            ValueError: no row to predict, a column that is missing, a value that is no number, a
                new task with the name of a known one in another spelling, numbers out of range.
            NotImplementedError: the model's law cannot be drawn from.
            NonFinitePosterior: naming the task.
        """
        return predict(self, data, draws, quantiles, keep, seed)

    def shrinkage(
        self,
        tasks: Tasks | None = None,
        *,
        posterior: TaskPosterior | None = None,
        query: Tasks | None = None,
        least: float = 0.1,
    ) -> Shrinkage:
        """Which modules adapt to a task and which are shared, and the scales that say so.

        Judged on the query rows of tasks that are split, given their support rows; else on all
        rows, less the optimism that is to be expected there (see `Shrinkage`).

        Args:
            tasks: tasks to look at; the training tasks if None.
            posterior: of these tasks given all of their rows, if you have it already.
            query: further rows of the same tasks, which `posterior` has not seen: judge on them.
            least: nats per task from which a module counts as adapted, see `Shrinkage`.

        Raises:
            ValueError: no tasks for a run on a stream, a posterior or query of other tasks, more
                than 1,000 modules, `least` not positive; without query rows, a model that is not
                twice differentiable.
        """
        return find_shrinkage(self, tasks, posterior, query, least)

    def save(self, path: str | PathLike[str]) -> None:
        """Write all of it but the model's code to one file, which `vm.load` reads.

        The file holds tensors, numbers and texts only: what was learned, the training tasks, the
        strategy's settings and the model's sites. It loads with `weights_only`, and nothing in it
        is run. Not in it are the model, a stream's tasks, and settings that are functions of your
        own: `vm.load` is given these again.

        Raises:
            NotWritten: a full disk, say; what the path held before is kept.
        """
        given = self.density, self.tasks, self.state.meta.origin, self.batch_size
        also = {"settings": packed_strategy(self.strategy), "data": packed_data(*given)}
        write(Path(path), packed(self._learned() | also))

    def save_state(self, path: str | PathLike[str]) -> None:
        """Write what was learned alone, as a checkpoint for `fit(checkpoint=path)`.

        Raises:
            NotWritten: a full disk, say; what the path held before is kept.
        """
        write(Path(path), packed(self._learned()))

    def _learned(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint or identify(self),
            "state": self.state.state_dict(),
            "seed": self.seed,
            "strategy": repr(self.strategy),
            "history": {str(k): v.tolist() for k, v in self.history.items()},
            "stats": self.stats,
            "moved": torch.stack(self.path) if self.path else [],
        }


def identify(run: Fit) -> Fingerprint:
    """What the run is, as it stands at its start."""
    return fingerprint(
        {"": run.strategy},
        run.density,
        {"": run.tasks},
        run.state.meta.origin,
        batch_size=run.batch_size,
        seed=run.seed,
    )


def noise_of(density: Density, seed: int, *stream: int) -> torch.Generator:
    """A stream of the seed on the model's device; another kind of device gives other numbers."""
    return generator(seed, *stream, device=device_of(density))


def device_of(density: Density) -> torch.device:
    """Where the model is."""
    return density.sites[0].loc.device
