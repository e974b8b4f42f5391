"""Joint variational optimisation of θ0, the scales, φ and every q_i.

Objective: Σ_i KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i, for Gaussian q_i (Amit & Meir, 2018, Meta-Learning
by Adjusting Priors; with full covariances and a linear-Gaussian model this is empirical Bayes), or,
in its delta limit, which drops the KL's divergent constant, Σ_i ½‖θ_i−θ0‖²_Λ + f_i(θ_i). Resets
θ_i ← θ0 keep the q_i reachable from θ0 (proposed in Huszár, inference.vc, 2019; compare Shin et
al., 2021, Large-Scale Meta-Learning with Continual Trajectory Shifting).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from varmeta.inference.base import (
    Batch,
    Meta,
    State,
    StepInfo,
    Strategy,
    check_finite,
    decayed,
    gradients,
    no_scales_with_points,
    objective,
    update,
)
from varmeta.inference.closed_form import add_moments, maximise, no_moments
from varmeta.inference.families import Family, GaussianQ, Kind
from varmeta.inference.free_energy import cubature, free_energy
from varmeta.inference.resets import Reset
from varmeta.inference.table import descend, new_table, reset
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(frozen=True)
class JointVariational(Strategy):
    """Optimise the prior and one q_i per task together.

    Every row of a training task is used, support and query alike. Per-task parameters live in a
    table of which a step touches the rows of its batch only.

    Attributes:
        q: `"delta"`, `"diagonal"`, `"low_rank"` (diagonal plus `rank` columns) or `"full"`.
        rank: of a low-rank q.
        steps: optimiser steps on the training tasks.
        learning_rate: of Adam, for the prior and the q_i, in units of the user's prior; decays to 0
            on a cosine (for q_i, between two resets).
        expectation: E_q f by `"draws"`, or by `"cubature"`: 2K points (K = D, or D + rank) that
            average every polynomial of degree 3 in θ exactly, so a linear-Gaussian f; others
            approximately, but without noise.
        samples: draws of θ per task and step; antithetic pairs, so an even number.
        batch_rows: rows of each task used in a step, drawn anew without replacement and weighted up
            to all of them; None for all.
        parametrisation: what the table holds. `"plain"`: θ_i in units of the user's prior.
            `"whitened"`: (θ_i − θ0)/σ, so that θ_i moves with θ0 and σ, whose gradients then pass
            through the likelihood: faster where the data say little about each task.
        shift: every θ_i is moved by each change of θ0 (Shin et al.), whose gradient stays that of
            the plain parametrisation.
        prior_update: θ0 and Σ by `"gradient"`, or, given the q_i, in `"closed_form"`.
        learn_loc: learn θ0; otherwise it stays where it starts.
        learn_scale: learn Σ's scales; None for "where it is well posed", that is with Gaussian q.
        resets: when every q_i is put back to the prior; None for never.
        adapt_steps: optimiser steps for the q_i of new tasks, the prior held fixed.

    Raises:
        ValueError: scales to be learned with delta q (there is no maximum: the joint density over
            θ, θ0 and σ grows without end as σ → 0; Chen et al., 2019, appendix); a closed form
            where there is none; a number out of range.
    """

    keeps_posteriors: ClassVar[bool] = True

    q: Kind = "diagonal"
    rank: int = 2
    steps: int = 1000
    learning_rate: float = 0.05
    expectation: Literal["draws", "cubature"] = "draws"
    samples: int = 8
    batch_rows: int | None = None
    parametrisation: Literal["plain", "whitened"] = "plain"
    shift: bool = False
    prior_update: Literal["gradient", "closed_form"] = "gradient"
    learn_loc: bool = True
    learn_scale: bool | None = None
    resets: Reset | None = None
    adapt_steps: int = 500

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise ValueError(f"{field} must be one of {known}, got {getattr(self, field)!r}")
        if self.q == "delta" and self.learn_scale:
            raise ValueError(no_scales_with_points("q='diagonal'"))
        if self.samples < 2 or self.samples % 2:
            raise ValueError(
                f"samples must be an even number (antithetic pairs), got {self.samples}"
            )
        for field in ("rank", "batch_rows"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        moving = self.shift or self.parametrisation == "whitened"
        if moving and self.prior_update == "closed_form":
            raise ValueError(
                "prior_update='closed_form' is the best θ0 for q_i that stay where they are, and "
                "with shift or parametrisation='whitened' they move with it; use 'gradient'"
            )
        if self.shift and self.parametrisation == "whitened":
            raise ValueError("a whitened θ_i moves with θ0 already; leave shift False")

    @property
    def name(self) -> str:
        """`JointVariational`, with the family, if not diagonal, and the reset period, if set."""
        parts = [self.q.replace("_", " ")] if self.q != "diagonal" else []
        parts += ["whitened"] if self.parametrisation == "whitened" else []
        parts += ["shift"] if self.shift else []
        parts += ["closed form"] if self.prior_update == "closed_form" else []
        parts += [f"reset {self.resets.every}"] if self.resets else []
        return "JointVariational" + (f" ({', '.join(parts)})" if parts else "")

    @property
    def num_steps(self) -> int:
        """`steps`."""
        return self.steps

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
        """All rows of the tasks.

        Raises:
            ValueError: a stream, whose tasks never come back and so cannot have a q_i of their own.
        """
        if isinstance(tasks, TaskSource):
            raise ValueError(
                "JointVariational keeps a posterior for every training task, and a TaskSource has "
                "no end of them: give it Tasks (for example source.batch(0) with many tasks)"
            )
        return tasks.unsplit

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior; every q_i at N(θ0, Σ)."""
        closed = self.prior_update == "closed_form"
        if closed and prior.factor is not None:
            raise ValueError(
                "prior_update='closed_form' needs a diagonal Σ, and the prior has a low-rank part; "
                "use 'gradient', or a prior with rank=0"
            )
        law = "flat" if prior.hyperprior is None else prior.hyperprior.scale_law
        if closed and self._learns_scale and law not in ("flat", "half-normal"):
            raise ValueError(
                f"prior_update='closed_form' has none for {law} scales; use 'gradient', or a "
                "prior with scale_law='half-normal'"
            )
        meta = Meta.start(
            density,
            prior,
            learn_loc=self.learn_loc and not closed,
            learn_scale=self._learns_scale and not closed,
        )
        assert isinstance(tasks, Tasks)
        state = State(meta, tensors=new_table(self._start(meta), len(tasks)))
        if closed:
            state.tensors |= no_moments(meta)
        if meta.leaves():
            state.optimisers["meta"] = torch.optim.Adam(meta.leaves(), lr=self.learning_rate)
        return state

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One gradient step on the prior and on the batch's q_i."""
        if self.resets and state.step in self.resets.times(self.steps):
            which = self.resets.which(self.resets.times(self.steps).index(state.step))
            reset(state.tensors, which, self._start(state.meta), self.resets.amount)
            if self.prior_update == "closed_form":
                self._count_again(state)
        return self._descend(density, state, batch, generator, self._rates(state, batch), True)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """New q_i by the same steps under the learned prior."""
        fresh = State(state.meta, tensors=new_table(self._start(state.meta), len(tasks)))
        batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
        for step in range(self.adapt_steps):
            rate = decayed(self.learning_rate, step, self.adapt_steps)
            rates = fresh.tensors["visits"].new_full((len(tasks),), rate)
            self._descend(density, fresh, batch, generator, rates, learn=False)
        return self._read(density, fresh, tasks)

    def posterior(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """The q_i of the training tasks, as they were optimised together with the prior."""
        return self._read(density, state, tasks)

    # -- private ----------------------------------------------------------------------------------

    @property
    def _learns_scale(self) -> bool:
        return self.q != "delta" if self.learn_scale is None else self.learn_scale

    def _family(self, meta: Meta) -> Family:
        return Family(self.q, meta.origin.dim, self.rank if self.q == "low_rank" else 0)

    def _frame(self, meta: Meta, prior: GaussianPrior) -> tuple[Tensor, Tensor]:
        """Where the table's numbers are measured from `[D]`, and in what units `[D]`."""
        if self.parametrisation == "whitened":
            return prior.loc, prior.scale
        unit = meta.origin.scale.detach()
        return (prior.loc.detach() if self.shift else meta.origin.loc), unit

    def _start(self, meta: Meta) -> Tensor:
        """`[K]`, the row of a q_i at the prior as it stands."""
        prior, _ = meta.fixed()
        return self._family(meta).row_of(prior, *self._frame(meta, prior))

    def _q(self, meta: Meta, prior: GaussianPrior, rows: Tensor) -> GaussianQ:
        return self._family(meta).q(rows, *self._frame(meta, prior))

    def _descend(
        self,
        density: Density,
        state: State,
        batch: Batch,
        generator: torch.Generator,
        rates: Tensor,
        learn: bool,
    ) -> StepInfo:
        meta, table = state.meta, state.tensors
        prior, shared = (meta.prior, meta.shared) if learn else meta.fixed()
        index = batch.index.to(prior.loc.device)
        rows = table["rows"][index].requires_grad_()
        q = self._q(meta, prior, rows)
        tasks, weight = batch.tasks, None
        if self.batch_rows is not None:
            tasks, weight = tasks.minibatch(self.batch_rows, generator)
        points = self._points(q, generator)
        losses = free_energy(density, prior, shared, tasks, q, points, weight)
        leaves = meta.leaves() if learn else []
        if learn:
            total = objective(losses, meta, batch, state.step)
        else:
            check_finite(losses, batch.tasks, state.step)
            total = losses.mean()
        grads = gradients(total, [*leaves, rows], state.step)
        # A row's own objective is its task's loss, not the mean: undo the 1/B, so that the step
        # does not depend on the batch size through Adam's ε.
        own = grads[-1] * len(index)
        closed = learn and self.prior_update == "closed_form"
        if closed:
            add_moments(table, meta, q, -(table["visits"][index] > 0).double())
        descend(table, index, own, rates)
        if leaves:
            rate = decayed(self.learning_rate, state.step, self.steps)
            update(state.optimisers["meta"], leaves, grads[:-1], rate)
        if closed:
            add_moments(table, meta, self._q(meta, prior, table["rows"][index]), 1.0)
            maximise(table, meta, batch.total, self.learn_loc, self._learns_scale)
        count = len(batch.tasks) * (1 if points is None else len(points))
        return StepInfo(float(total.detach()), count, {"grad_norm": own.norm(dim=-1)})

    def _rates(self, state: State, batch: Batch) -> Tensor:
        """The learning rate of each task's q_i, `[B]`: its cosine begins again at its resets."""
        rows, step = state.tensors["rows"], state.step
        if self.resets is None:
            return rows.new_full((len(batch.index),), decayed(self.learning_rate, step, self.steps))
        turns = range(self.resets.turns)
        phases = [self.resets.phase(step, self.steps, task) for task in turns]
        each = rows.new_tensor([decayed(self.learning_rate, phase, 1) for phase in phases])
        return each[batch.index.to(rows.device) % len(turns)]

    def _points(self, q: GaussianQ, generator: torch.Generator) -> Tensor | None:
        """Standardised points `[S, B, K]` at which f is averaged; None for a delta."""
        if not q.noise_dim:
            return None
        like: Any = {"dtype": q.mean.dtype, "device": q.mean.device}
        if self.expectation == "cubature":
            return cubature(q.noise_dim, **like)[:, None].expand(-1, len(q.mean), -1)
        shape = (self.samples // 2, len(q.mean), q.noise_dim)
        half = torch.randn(shape, generator=generator, **like)
        return torch.cat([half, -half])

    def _count_again(self, state: State) -> None:
        """The moments of every row that was ever visited, from the table itself."""
        table, meta = state.tensors, state.meta
        for name, zero in no_moments(meta).items():
            table[name].copy_(zero)
        prior, _ = meta.fixed()
        seen = (table["visits"] > 0).double()
        add_moments(table, meta, self._q(meta, prior, table["rows"]), seen)

    def _read(self, density: Density, state: State, tasks: Tasks) -> TaskPosterior:
        prior, shared = state.meta.fixed()
        q = self._q(state.meta, prior, state.tensors["rows"])
        return q.posterior(density, tasks.names, shared)


_CHOICES = {
    "q": ("delta", "diagonal", "low_rank", "full"),
    "expectation": ("draws", "cubature"),
    "parametrisation": ("plain", "whitened"),
    "prior_update": ("gradient", "closed_form"),
}
