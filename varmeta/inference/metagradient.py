"""Strategies that learn the prior by gradients of query losses: what they have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from varmeta.checked import Count, Positive, Within
from varmeta.inference.base import (
    Batch,
    Meta,
    NonFiniteLoss,
    State,
    StepInfo,
    Strategy,
    check_finite,
    non_finite_gradient,
    update,
    with_query,
)
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.iterate_test import IterateTest
from varmeta.inference.learned import EXACT, NOISY, Evaluated, flat, put, units
from varmeta.inference.memory import bytes_per_task
from varmeta.inference.quasi_newton import QuasiNewton
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks, TaskSource


class Report(Protocol):
    """What the adaptation of some tasks says of itself, complete once backward has run."""

    @property
    def gradients(self) -> int:
        """Gradient evaluations of each task's loss, a Hessian-vector product counted as two."""
        ...

    def stats(self) -> dict[str, Tensor]:
        """Diagnostics per task, `[B]` each."""
        ...


@dataclass(frozen=True, kw_only=True)
class MetaGradient(Strategy):
    """Learn θ0, the scales and φ along the gradient of Σ_i g_i(θ_i), θ_i adapted to f_i.

    Attributes:
        steps: meta-steps at most; the run ends before where it has arrived.
        optimiser: `"quasi-newton"` where the gradient is exactly that of a loss without noise, of
            all tasks in every step: an iteration with its line search is a step, and the run ends
            at the optimum. `"adam"` elsewhere: the run ends where the iterates have come to rest,
            at their average. `"auto"` takes the first where it can.
        tolerance: how far what is learned may still be from where the run leads, in standard errors
            of it that so many tasks leave; None for 0.01 with `"quasi-newton"`, 0.2 with `"adam"`.
        learning_rate: of Adam on θ0, log scales and φ, in units of the user's prior; halved
            whenever the iterates are stationary, and in the last quarter of `steps` it falls to 0
            on a cosine.
        clip: largest norm of the gradient per step with `"adam"`, nats per task and unit of the
            user's prior; a longer one is shortened to it. None for no limit.
        skip: share of a stream's tasks that may be left out because their loss or its gradient is
            not finite; they are counted and named at the end. Tasks that are given must be finite.
        learn_scale: learn the prior's scales from the query loss. Needs a query part.
        folds: training tasks without a query part are cross-validated: each of this many folds of
            a task's rows is the query part once. None: f and g are both all rows, which is only
            sensible with fixed scales.
        tasks_at_once: adapt so many tasks of a batch together, to bound the memory of a step; the
            gradient is the same. None for all of them.
        memory: or, as many as fit so many GiB, measured on the longest task of the first batch;
            None for no limit.

    Raises:
        ValueError: a number that is not positive; both of the last two; another optimiser.
    """

    takes_dropout: ClassVar[bool] = True

    steps: Count = 200
    optimiser: Literal["auto", "quasi-newton", "adam"] = "auto"
    tolerance: Positive | None = None
    learning_rate: Positive = 0.05
    clip: Positive | None = None
    skip: Annotated[float, Within(0, 1, below=True)] = 0.05
    learn_scale: bool = True
    folds: Annotated[int, Within(2)] | None = 5
    tasks_at_once: Count | None = None
    memory: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks_at_once is not None and self.memory is not None:
            raise ValueError("give tasks_at_once or memory, not both")

    @property
    def num_steps(self) -> int:
        """`steps`."""
        return self.steps

    @property
    def is_smooth(self) -> bool:
        """Whether a step's gradient is exactly that of its loss, and the loss has no noise."""
        return False

    def settled(self, density: Density, *, whole: bool) -> Self:
        """With the optimiser chosen.

        Raises:
            ValueError: a quasi-Newton method is asked for where the loss has noise, or its gradient
                is another one's.
        """
        can = whole and self.is_smooth
        if self.optimiser == "quasi-newton" and not can:
            sees = "dropout" if density.noisy else "tasks"
            reason = "its gradient is not exact" if whole else f"every step sees other {sees}"
            raise ValueError(
                f"optimiser='quasi-newton' needs a loss without noise, and in {self.name} "
                f"{reason}; use 'adam' or 'auto'"
            )
        if self.optimiser != "auto":
            return self
        chosen = replace(self, optimiser="quasi-newton" if can else "adam")
        return chosen

    def is_tested(self, state: State) -> bool:
        """Always: see `quasi_newton` and `iterate_test`."""
        return True

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks | TaskSource:
        """Cross-validate tasks that have no query part."""
        return with_query(tasks, self.folds, self.learn_scale, seed)

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior."""
        meta = Meta.start(density, prior, learn_scale=self.learn_scale)
        return self.with_optimisers(State(meta))

    def with_optimisers(self, state: State) -> State:
        """The same state with all that moves what is learned."""
        leaves = state.meta.leaves()
        if self.optimiser == "quasi-newton":
            tensors, optimisers = self.quasi_newton.begin(state.meta)
            state.tensors |= tensors
            state.optimisers |= optimisers
        else:
            state.optimisers["meta"] = torch.optim.Adam(leaves, lr=self.learning_rate)
            state.tensors |= self.iterate_test.begin(flat(leaves))
        return state

    @property
    def quasi_newton(self) -> QuasiNewton:
        """How a loss without noise is minimised."""
        return QuasiNewton(self.tolerance or EXACT, self.steps)

    @property
    def iterate_test(self) -> IterateTest:
        """How a run with noise is ended."""
        return IterateTest(self.tolerance or NOISY, self.steps)

    @abstractmethod
    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Report]:
        """g_i per task, nats, `[B]`, differentiable in what `state.meta` holds."""

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One meta-gradient step."""
        if self.optimiser == "quasi-newton":
            seed = generator.get_state()

            def evaluate() -> Evaluated:
                return self.evaluate(density, state, batch, generator.set_state(seed))

            return self.quasi_newton.step(state, evaluate, batch.total)
        if math.isinf(batch.total):
            found = self._evaluate_finite(density, state, batch, generator)
        else:
            found = self.evaluate(density, state, batch, generator)
        leaves = state.meta.leaves()
        self.apply(state, leaves, _clipped(found.grads, self.clip))
        if leaves:
            unit = units(state.meta, batch.total)
            average, arrived = self.iterate_test.add(state, flat(leaves), unit)
            if average is not None:
                put(state.meta, average)
            if arrived:
                state.arrived = "the average of the iterates stays where it is"
        state.tensors.update(found.keep)
        return found.info

    def evaluate(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> Evaluated:
        """The loss and its gradient at what is learned as it stands.

        Raises:
            NonFiniteLoss: with the task's name.
        """
        leaves = state.meta.leaves()
        before = state.meta.log_prior() / -batch.total
        parts, count = batch.split(self._part_size(density, state, batch)), len(batch.tasks)
        grads, all_losses, reports = list[Tensor](), list[Tensor](), list[Report]()
        for part in parts:
            losses, report = self.task_losses(density, state, part, generator)
            total = losses.sum() / count + (0.0 if reports else before)
            more = _grad(total, leaves)
            grads = [a + b for a, b in zip(grads, more, strict=True)] if reports else more
            all_losses.append(losses.detach())
            reports.append(report)
        losses = _joined(all_losses)
        each = [report.stats() for report in reports]
        stats = {name: _joined([s[name] for s in each]) for name in each[0]}
        loss, sums, worst = _read(losses, before.detach(), grads, stats)
        if not math.isfinite(sum(sums, start=loss)):  # or a sum of finite numbers is too large
            check_finite(losses, batch.tasks, state.step)
            if not all(bool(g.isfinite().all()) for g in grads):
                raise NonFiniteLoss(non_finite_gradient(state.step))
        spent = sum(len(p.tasks) * r.gradients for p, r in zip(parts, reports, strict=True))
        return Evaluated(
            StepInfo(loss, spent, stats, worst), grads, self._kept(state, batch, reports)
        )

    def _kept(self, state: State, batch: Batch, reports: list[Report]) -> dict[str, Tensor]:
        """What of this evaluation the state keeps where the step is taken: see `Evaluated.keep`."""
        table = state.tensors.get("minima")
        if table is None:
            return {}
        table = table.clone()
        found = torch.cat([report.minimum for report in reports])  # type: ignore[attr-defined]
        table[batch.index.to(table.device)] = found
        return {"minima": table}

    def start_of(self, state: State, batch: Batch) -> Tensor | None:
        """`[B, D]`, where the inner algorithm begins: each task's last minimum; None for θ0."""
        table = state.tensors.get("minima")
        if table is None:
            return None
        known = table[batch.index.to(table.device)]
        return torch.where(known.isnan(), state.meta.fixed()[0].loc, known)

    def _evaluate_finite(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> Evaluated:
        """`evaluate` without those tasks of a stream's batch for which it is not finite."""
        seed = generator.get_state()

        def evaluate(index: list[int]) -> Evaluated:
            part = batch if len(index) == count else batch.take(index)
            return self.evaluate(density, state, part, generator.set_state(seed))

        count = len(batch.tasks)
        skipped = state.counts.get("skipped", [0, 0])
        try:
            found, bad = evaluate(list(range(count))), list[int]()
        except NonFiniteLoss as error:
            bad = [i for i in range(count) if not _is_finite(evaluate, i)]
            gone, seen = skipped[0] + len(bad), skipped[1] + count
            allowed = max(self.skip * seen, 1.0 if self.skip > 0 else 0.0)
            if not bad or len(bad) == count or gone > allowed:
                raise NonFiniteLoss(
                    f"{error}. {gone} of the stream's first {seen} tasks are not finite; skip "
                    f"allows {self.skip:.0%}"
                ) from error
            found = evaluate([i for i in range(count) if i not in bad])
            state.cache.setdefault("skipped", []).extend(batch.tasks.names[i] for i in bad)
        state.counts["skipped"] = [skipped[0] + len(bad), skipped[1] + count]
        return found

    def rows_inside(self, tasks: Tasks) -> Tasks:
        """The rows that a task is adapted to while the prior is learned: its support part."""
        return tasks.support

    def loss_at(
        self, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
    ) -> Tensor:
        """What the prior is learned from, at a point θ `[T, D]`, nats: `[T]`; g_i, unless said."""
        return TaskEnergy(density, tasks.query, shared).loss(theta)

    @property
    def kept_vectors(self) -> int:
        """Tensors of θ's size that adapting a task once keeps, beside the model's activations."""
        return 12  # of the solver, the minimiser and their way back

    @property
    def runs_per_task(self) -> int:
        """How many times a step adapts to each task, all at once."""
        return 1

    def _part_size(self, density: Density, state: State, batch: Batch) -> int | None:
        if self.memory is None:
            return self.tasks_at_once
        if "part" not in state.cache:
            prior, shared = state.meta.fixed()
            each = bytes_per_task(density, prior, shared, batch.tasks, self.kept_vectors)
            each *= self.runs_per_task
            state.cache["part"] = max(int(self.memory * 2**30 / each), 1)
        return int(state.cache["part"])

    def apply(self, state: State, leaves: list[Tensor], grads: list[Tensor]) -> None:
        """Move what is learned along its gradient."""
        if leaves:
            update(state.optimisers["meta"], leaves, grads, self.rate(state, self.learning_rate))

    def rate(self, state: State, base: float) -> float:
        """A learning rate as it is now, from its first value."""
        return self.iterate_test.rate(state, base)


def _grad(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """d total / d leaves; 0 where there is no way to one (fixed scales without a prior)."""
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def _is_finite(evaluate: Callable[[list[int]], Evaluated], task: int) -> bool:
    """Whether this task alone has a finite loss and gradient."""
    try:
        evaluate([task])
    except NonFiniteLoss:
        return False
    return True


def _clipped(grads: list[Tensor], most: float | None) -> list[Tensor]:
    """The gradient, shortened to this norm if it is longer."""
    if most is None or not grads:
        return grads
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    share = (most / norm).clamp(max=1.0)
    return [share * g for g in grads]


def _joined(parts: list[Tensor]) -> Tensor:
    """The tasks of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read(
    losses: Tensor, before: Tensor, grads: list[Tensor], stats: dict[str, Tensor]
) -> tuple[float, list[float], dict[str, float]]:
    """Objective, the sum of each gradient, and `StepInfo.worst`.

    All in one reading, the only time that a step waits for its device.
    """
    table = torch.stack([losses, *(s.to(losses.dtype) for s in stats.values())])
    single = torch.stack([before, *(g.sum() for g in grads)])
    values = torch.cat([single, table.amax(1), table.sum(1)]).tolist()
    start, *sums = values[: len(single)]
    most, total = values[len(single) : -len(table)], values[-len(table) :]
    worst = {
        name: total[k] if s.dtype == torch.bool else most[k]
        for k, (name, s) in enumerate(stats.items(), start=1)
    }
    return total[0] / len(losses) + start, sums, worst
