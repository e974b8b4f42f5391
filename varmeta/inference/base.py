"""What every strategy shares: the learned parameters, the state, and the protocol."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from varmeta.checked import Checked
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.pickling import require_picklable
from varmeta.posterior import Draws, Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


class NonFiniteLoss(FloatingPointError):
    """A task's loss became NaN or infinite; nothing was updated in that step."""


class NonFinitePosterior(FloatingPointError):
    """A task's posterior is no number; it is not handed out."""


class NotConverged(RuntimeWarning):
    """A run was ended by its limit of steps before it had arrived; its own test says so."""


class UndeterminedScale(RuntimeWarning):
    """The data hardly tell a learned scale from 0, and posteriors are given its value."""


@dataclass(eq=False)
class Meta:
    """What is learned across tasks: θ0, the scales of Σ, and the shared φ.

    The optimiser sees them in units of the prior that the user wrote, so that one learning rate
    fits a reaction time of 250 ms and a slope of 0.1 alike.

    Attributes:
        origin: the prior at the start.
        density: gives φ its start and units.
        raw: leaf tensors `loc` `[D]`, `log_scale` `[M]`, `shared` `[P]` and, for a low-rank prior,
            `factor` `[D, R]`, all zero at the start. Where shared effects are integrated out they
            are `effects`, without a gradient, and `shared` has the other entries of φ.
    """

    origin: GaussianPrior
    density: Density
    raw: dict[str, Tensor]

    @classmethod
    def start(
        cls,
        density: Density,
        prior: GaussianPrior,
        *,
        learn_loc: bool = True,
        learn_scale: bool = True,
        integrate: bool = False,
    ) -> Meta:
        """Everything at its origin; what is not learned needs no gradient.

        With `integrate` the shared effects (`Density.effects`) are none of what is learned.
        """
        apart = len(density.effects) if integrate else 0
        shared = density.shared_init.new_zeros(density.shared_dim - apart)
        raw = {
            "loc": torch.zeros_like(prior.loc).requires_grad_(learn_loc),
            "log_scale": torch.zeros_like(prior.log_scale).requires_grad_(learn_scale),
            "shared": shared.requires_grad_(len(shared) > 0),
        }
        if apart:
            raw["effects"] = density.shared_init.new_zeros(apart)
        if prior.factor is not None:
            raw["factor"] = torch.zeros_like(prior.factor).requires_grad_(learn_scale)
        return cls(prior, density, raw)

    @property
    def prior(self) -> GaussianPrior:
        """N(θ0, Σ) as it stands, differentiable in `raw`."""
        start, raw = self.origin, self.raw
        factor = start.factor
        if factor is not None:
            factor = factor + start.scale.detach()[:, None] * raw["factor"]
        return start.moved(
            start.loc + start.scale.detach() * raw["loc"],
            start.log_scale + raw["log_scale"],
            factor,
        )

    @property
    def shared(self) -> Tensor:
        """φ `[P]`, unconstrained, differentiable in `raw`."""
        raw, density = self.raw["shared"], self.density
        if "effects" in self.raw:
            apart = torch.zeros(density.shared_dim, dtype=torch.bool, device=raw.device)
            apart[density.effects] = True
            places = torch.cat([(~apart).nonzero()[:, 0], density.effects])
            raw = torch.cat([raw, self.raw["effects"]])[places.argsort()]
        return density.shared_init + density.shared_scale * raw

    def keep_bounds(self) -> None:
        """Put scales that a step has moved beyond their bounds back to the nearer one."""
        if self.origin.bounds is not None:
            low, high = self.origin.bounds.log() - self.origin.log_scale
            with torch.no_grad():
                self.raw["log_scale"].clamp_(low, high)

    def leaves(self) -> list[Tensor]:
        """The tensors that are learned."""
        return [t for t in self.raw.values() if t.requires_grad]

    def log_prior(self) -> Tensor:
        """log p(θ0, scales) + log p(φ), nats: what is believed before any task is seen."""
        return self.prior.hyper_log_prob() + self.density.shared_log_prior(self.shared)

    def fixed(self) -> tuple[GaussianPrior, Tensor]:
        """Prior and φ without gradients, for adapting."""
        with torch.no_grad():
            prior, shared = self.prior, self.shared
        return prior, shared.detach()


@dataclass(eq=False)
class State:
    """All that changes while a strategy runs; `state_dict` holds nothing but tensors and numbers.

    Attributes:
        meta: the learned parameters.
        optimisers: by name.
        tensors: what else the strategy keeps (per-task tables, draws).
        step: steps done.
        counts: what the strategy counts, as whole numbers.
        arrived: why no further step is needed, in words; empty while the run goes on.
        cache: what can be made again from the rest; not saved.
    """

    meta: Meta
    optimisers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    counts: dict[str, list[int]] = field(default_factory=dict)
    arrived: str = ""
    cache: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """A copy for `torch.save`; loads with `weights_only=True`."""
        return {
            "step": self.step,
            "arrived": self.arrived,
            "counts": deepcopy(self.counts),
            "raw": {name: t.detach().clone() for name, t in self.meta.raw.items()},
            "tensors": {name: t.detach().clone() for name, t in self.tensors.items()},
            "optimisers": {name: deepcopy(o.state_dict()) for name, o in self.optimisers.items()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Into a state that `init` made for the same strategy, model and tasks."""
        for mine, theirs in ((self.meta.raw, saved["raw"]), (self.tensors, saved["tensors"])):
            for name, tensor in mine.items():
                shape = tuple(theirs[name].shape) if name in theirs else None
                if shape != tuple(tensor.shape):
                    raise ValueError(
                        f"the saved {name} has shape {shape}, wanted {tuple(tensor.shape)}: it "
                        "belongs to another model or to other tasks"
                    )
        with torch.no_grad():
            for name, tensor in self.meta.raw.items():
                tensor.copy_(saved["raw"][name])
            for name, tensor in saved["tensors"].items():
                if name in self.tensors:
                    self.tensors[name].copy_(tensor)  # in place: an optimiser may hold it
                else:
                    self.tensors[name] = tensor.clone()
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(deepcopy(saved["optimisers"][name]))
        self.step, self.arrived = saved["step"], saved["arrived"]
        self.counts = deepcopy(saved["counts"])

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Undo what is done inside if it raises anything, at the price of a copy of the state.

        For a step that has to change something before it evaluates the model for the last time.
        """
        before = self.state_dict()
        tensors, optimisers = dict(self.tensors), dict(self.optimisers)
        try:
            yield
        except BaseException:
            self.tensors, self.optimisers = tensors, optimisers
            self.load_state_dict(before)
            raise


@dataclass(frozen=True, eq=False)
class Batch:
    """The tasks of one step.

    Attributes:
        tasks: B of them.
        index: `[B]` int, their positions among the training tasks.
        total: how many training tasks there are; infinite for a stream.
    """

    tasks: Tasks
    index: Tensor
    total: float

    def take(self, rows: Sequence[int]) -> Batch:
        """The tasks at these positions of the batch."""
        index = torch.as_tensor(rows)
        return Batch(self.tasks.select(index), self.index[index], self.total)

    def split(self, size: int | None) -> list[Batch]:
        """Itself in parts of at most `size` tasks, in order."""
        if size is None or size >= len(self.tasks):
            return [self]
        rows = torch.arange(len(self.tasks)).split(size)
        return [self.take(r.tolist()) for r in rows]

    def require_all(self, name: str) -> None:
        """Raise a ValueError unless these are all training tasks, which strategy `name` needs."""
        if len(self.tasks) != self.total:
            raise ValueError(f"{name} needs all tasks in every step; leave batch_size unset")


@dataclass(eq=False)
class StepInfo:
    """What one step reports.

    Attributes:
        loss: mean over the batch of the strategy's objective, nats per task.
        gradients: gradient evaluations of one task's loss, a Hessian-vector product counted as two.
        stats: per-task diagnostics `[B]`.
        worst: the largest of each diagnostic, or for how many tasks it holds, where known already.
    """

    loss: float
    gradients: int
    stats: dict[str, Tensor] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)


class Strategy(Checked, ABC):
    """A way to learn the prior from training tasks and to adapt to a task never seen.

    A strategy is a frozen dataclass whose fields are its configuration; `fit` is the only loop.
    To write one, subclass this and say `init`, `step` and `adapt`.
    """

    keeps_posteriors: ClassVar[bool] = False  # of training tasks, learned along with the prior
    may_stay: ClassVar[bool] = False  # it learns how far a task moves, which may be nowhere
    loss_falls: ClassVar[bool] = True  # while it learns; a sampler's potential need not
    takes_dropout: ClassVar[bool] = False  # each step may see another likelihood

    def __getstate__(self) -> dict[str, Any]:
        for name, value in vars(self).items():
            require_picklable(f"{self.name}'s {name}", value)
        return vars(self)

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        return type(self).__name__

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """How many steps `fit` takes at most."""

    def settled(self, density: Density, *, whole: bool) -> Strategy:
        """Itself with every choice made that it leaves open; `fit` runs what this returns.

        Args:
            density: the model.
            whole: whether every step sees all training tasks.
        """
        return self

    def is_tested(self, state: State) -> bool:
        """Whether the run ends by a test of its own, so that ending at the limit says something."""
        return False

    def has_converged(self, state: State) -> bool:
        """Whether a run that ended did so because it had arrived, where `is_tested`."""
        return bool(state.arrived)

    def shortfall(self, state: State) -> str:
        """Why a run that has not arrived ended, in words; empty: the limit of steps came first."""
        return ""

    def check_shared(self, density: Density) -> None:
        """Raise a ValueError where shared effects (`Density.effects`) are none of its business.

        As points they have no answer; a strategy that draws them or integrates over them has one.
        """
        if len(density.effects):
            site = next(site for site in density.shared_sites if site.depends == "spread")
            raise ValueError(
                f"{self.name} takes shared latents as points, whose most likely spread is 0 "
                f"whatever the data say, and the spread of the prior of {site.name!r} depends on "
                "another one; use LaplaceEvidence, which integrates over them, or PyroSVI or "
                f"PyroNUTS, or give the prior of {site.name!r} a fixed spread"
            )

    @property
    def point_scales(self) -> bool:
        """Whether posteriors are given the prior's scales as points, and not integrated over."""
        return True

    def shared_draws(self, state: State) -> dict[str, Tensor] | None:
        """Draws of what all tasks share, where the strategy has its posterior; None for points.

        `loc` `[S, D]`, `log_scale` `[S, M]` and `shared` `[S, P]`, in the order of the draws of
        `posterior`.
        """
        return None

    def worst_k(self, state: State) -> float:
        """Pareto k̂ of what is learned across tasks, or of a task that was seen; NaN without any."""
        return math.nan

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks | TaskSource:
        """The tasks as this strategy wants to see them; itself, unless it says otherwise."""
        return tasks

    @abstractmethod
    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One step on one batch of tasks, changing `state` in place.

        A step that fails leaves the state as it was before it, so that the run can go on from
        there: evaluate the model first, and change the state afterwards (or see
        `State.unless_it_fails`).
        """

    @abstractmethod
    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """The posterior of each of these tasks (seen or not) given all of its rows."""

    def posterior(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """The posterior of the training tasks, when the strategy already holds it."""
        return self.adapt(density, state, tasks, generator)

    def unseen(
        self, density: Density, state: State, names: Sequence[str], generator: torch.Generator
    ) -> TaskPosterior:
        """What is known of new tasks before a row of theirs is seen: θ ~ N(θ0, Σ), φ as learned.

        Where there are draws of θ0, Σ and φ, for each of them.
        """
        prior, shared = state.meta.fixed()
        kept = self.shared_draws(state)
        if kept is not None:
            loc, scale = kept["loc"][:, None], kept["log_scale"].exp()[:, None, prior.groups]
            like: Any = {"dtype": loc.dtype, "device": loc.device}
            noise = torch.randn(len(loc), len(names), density.dim, generator=generator, **like)
            phi = kept["shared"][:, None].expand(-1, len(names), -1)
            return Draws(density, tuple(names), phi, loc + scale * noise)
        where = prior.loc.new_zeros(len(names), 1)
        factor = None if prior.factor is None else prior.factor.expand(len(names), -1, -1)
        return Gaussian(
            density, tuple(names), shared, prior.loc + where, prior.scale + where, factor
        )


def with_query(
    tasks: Tasks | TaskSource, folds: int | None, learn_scale: bool, seed: int
) -> Tasks | TaskSource:
    """Tasks with a query part: their own, or that of a cross-validation within each task.

    Raises:
        ValueError: neither, and scales would be learned from the very rows that were adapted to.
    """
    if (tasks.batch(0) if isinstance(tasks, TaskSource) else tasks).is_split:
        return tasks
    if folds and isinstance(tasks, Tasks):
        return tasks.folds(folds, seed=seed)
    if learn_scale:
        raise ValueError(
            "tasks have no query part and learn_scale is True: the loss on the rows adapted to "
            "falls without end as the scales grow. Split the tasks (tasks.split(), or in the "
            "stream's draw), set folds, or set learn_scale=False"
        )
    return tasks


def no_scales_with_points(instead: str) -> str:
    """What to say to learn_scale=True with point posteriors; `instead` is the q to use."""
    return (
        "learn_scale=True with q='delta' has no solution: with point posteriors the joint "
        "objective falls without end as the scales go to 0 (Chen et al. 2019). Use "
        f"{instead}, or fix the scales, or learn them from query losses with IMAML"
    )


def check_finite(losses: Tensor, tasks: Tasks, step: int) -> None:
    """Stop before a bad loss spoils anything.

    Raises:
        NonFiniteLoss: with the name of the first task whose loss is not finite.
    """
    losses = losses.detach()
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        where = int(bad[0, 0])
        raise NonFiniteLoss(
            f"step {step}: the loss of task {tasks.names[where]!r} is {float(losses[where])} "
            f"({len(bad)} of {len(losses)} tasks). Lower the learning rate or step size, tighten "
            "the model's priors, or check this task's data"
        )


def objective(losses: Tensor, meta: Meta, batch: Batch, step: int) -> Tensor:
    """Mean task loss minus the log prior's share, nats per task; checked to be finite.

    `losses` is `[B]`; the prior over θ0, scales and φ counts once for all training tasks.
    """
    check_finite(losses, batch.tasks, step)
    return losses.mean() - meta.log_prior() / batch.total


def gradients(total: Tensor, leaves: Sequence[Tensor], step: int) -> tuple[Tensor, ...]:
    """d total / d leaves.

    Raises:
        NonFiniteLoss: they are not finite, though the loss is.
    """
    grads = torch.autograd.grad(total, leaves)
    if not all(bool(g.isfinite().all()) for g in grads):
        raise NonFiniteLoss(non_finite_gradient(step))
    return grads


def non_finite_gradient(step: int) -> str:
    """What to say where losses are finite and their gradient is not."""
    return (
        f"step {step}: every task's loss is finite but the gradient is not. Look for a square "
        "root or a division at 0 in the model, also in a branch that torch.where discards"
    )


def decayed(rate: float, step: float, steps: float) -> float:
    """Cosine decay of a learning rate from `rate` to 0 over so many steps."""
    return 0.5 * rate * (1 + math.cos(math.pi * min(step, steps) / steps))


def update(
    optimiser: torch.optim.Optimizer,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
) -> None:
    """One optimiser step with these gradients at this learning rate."""
    for leaf, grad in zip(leaves, gradients, strict=True):
        leaf.grad = grad
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    for leaf in leaves:
        leaf.grad = None
