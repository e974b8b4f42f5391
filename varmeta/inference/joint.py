"""Joint variational optimisation of θ0, the scales, φ and every q_i.

Objective: Σ_i KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i, for diagonal Gaussian q_i = N(m_i, diag(s_i²))
(Amit & Meir, 2018, Meta-Learning by Adjusting Priors), or, in its delta limit, which drops the
KL's divergent constant, Σ_i ½‖θ_i−θ0‖²_Λ + f_i(θ_i). Resets θ_i ← θ0 keep the q_i reachable from
θ0 (proposed in Huszár, inference.vc, 2019; compare Shin et al., 2021, Large-Scale Meta-Learning
with Continual Trajectory Shifting).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    objective,
    update,
)
from varmeta.inference.energy import TaskEnergy
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(frozen=True)
class JointVariational(Strategy):
    """Optimise the prior and one q_i per task together.

    Every row of a training task is used, support and query alike. Per-task parameters live in a
    table of which a step touches the rows of its batch only.

    Attributes:
        q: `"gaussian"` (diagonal) or `"delta"`.
        steps: optimiser steps on the training tasks.
        learning_rate: of Adam, for the prior and the q_i, in units of the user's prior; decays to 0
            on a cosine.
        samples: draws of θ per task and step for E_q f; antithetic pairs, so an even number.
        learn_loc: learn θ0; otherwise it stays where it starts.
        learn_scale: learn Σ's scales; None for "where it is well posed", that is with Gaussian q.
        reset_every: every this many steps put every q_i back to the prior, its optimiser state
            included; None for never. Choose a divisor of `steps`.
        adapt_steps: optimiser steps for the q_i of new tasks, the prior held fixed.

    Raises:
        ValueError: scales to be learned with delta q (there is no maximum: the joint density over
            θ, θ0 and σ grows without end as σ → 0; Chen et al., 2019, appendix), or an odd or
            non-positive number of samples.
    """

    q: Literal["gaussian", "delta"] = "gaussian"
    steps: int = 1000
    learning_rate: float = 0.05
    samples: int = 8
    learn_loc: bool = True
    learn_scale: bool | None = None
    reset_every: int | None = None
    adapt_steps: int = 500

    def __post_init__(self) -> None:
        if self.q not in ("gaussian", "delta"):
            raise ValueError(f"q must be 'gaussian' or 'delta', got {self.q!r}")
        if self.q == "delta" and self.learn_scale:
            raise ValueError(
                "learn_scale=True with q='delta' has no solution: with point posteriors the joint "
                "objective falls without end as the scales go to 0 (Chen et al. 2019). Use "
                "q='gaussian', or fix the scales, or learn them from query losses with IMAML"
            )
        if self.samples < 2 or self.samples % 2:
            raise ValueError(
                f"samples must be an even number (antithetic pairs), got {self.samples}"
            )
        if self.reset_every is not None and self.reset_every < 1:
            raise ValueError(f"reset_every must be at least 1, got {self.reset_every}")

    @property
    def name(self) -> str:
        """`JointVariational`, with the delta and the reset period if set."""
        parts = ["delta"] if self.q == "delta" else []
        parts += [f"reset {self.reset_every}"] if self.reset_every else []
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
        learn_scale = self.q == "gaussian" if self.learn_scale is None else self.learn_scale
        meta = Meta.start(density, prior, learn_loc=self.learn_loc, learn_scale=learn_scale)
        assert isinstance(tasks, Tasks)
        state = self._with_table(meta, len(tasks))
        if meta.leaves():
            state.optimisers["meta"] = torch.optim.Adam(meta.leaves(), lr=self.learning_rate)
        return state

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One gradient step on the prior and on the batch's q_i."""
        if self.reset_every and state.step and state.step % self.reset_every == 0:
            self._reset(state)
        return self._descend(density, state, batch, generator, self.steps, learn=True)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """New q_i by the same steps under the learned prior."""
        fresh = self._with_table(state.meta, len(tasks))
        batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
        for _ in range(self.adapt_steps):
            self._descend(density, fresh, batch, generator, self.adapt_steps, learn=False)
            fresh.step += 1
        return self._read(density, fresh, tasks)

    def posterior(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """The q_i of the training tasks, as they were optimised together with the prior."""
        return self._read(density, state, tasks.unsplit)

    # -- private ----------------------------------------------------------------------------------

    def _with_table(self, meta: Meta, count: int) -> State:
        """A state whose q_i all equal the prior as it stands now."""
        prior, _ = meta.fixed()
        table = {"mean": meta.raw["loc"].detach().repeat(count, 1)}
        if self.q == "gaussian":
            spread = prior.scale.log() - meta.origin.scale.log()
            table["log_sd"] = spread.detach().repeat(count, 1)
        rows = [t.requires_grad_() for t in table.values()]
        optimiser = torch.optim.SparseAdam(rows, lr=self.learning_rate)
        return State(meta, {"table": optimiser}, table)

    def _reset(self, state: State) -> None:
        """θ_i ← θ0 (q_i ← the prior), and the rows' optimiser state to nothing."""
        fresh = self._with_table(state.meta, len(state.tensors["mean"]))
        with torch.no_grad():
            for name, tensor in state.tensors.items():
                tensor.copy_(fresh.tensors[name])
        state.optimisers["table"].state.clear()

    def _moments(self, meta: Meta, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Table rows in standard units to mean and sd `[B, D]`; sd is 0 for a delta."""
        unit = meta.origin.scale.detach()
        mean = meta.origin.loc + unit * rows["mean"]
        sd = unit * rows["log_sd"].exp() if "log_sd" in rows else torch.zeros_like(mean)
        return mean, sd

    def _descend(
        self,
        density: Density,
        state: State,
        batch: Batch,
        generator: torch.Generator,
        steps: int,
        learn: bool,
    ) -> StepInfo:
        meta = state.meta
        prior, shared = (meta.prior, meta.shared) if learn else meta.fixed()
        index = batch.index.to(prior.loc.device)
        rows = {name: t.detach()[index].requires_grad_() for name, t in state.tensors.items()}
        mean, sd = self._moments(meta, rows)
        if self.q == "gaussian":
            half = torch.randn(
                self.samples // 2,
                *mean.shape,
                generator=generator,
                dtype=mean.dtype,
                device=mean.device,
            )
            losses = bound(density, prior, shared, batch.tasks, mean, sd, torch.cat([half, -half]))
        else:
            losses = TaskEnergy(density, batch.tasks, shared, prior)(mean)
        rate = decayed(self.learning_rate, state.step, steps)
        leaves = meta.leaves() if learn else []
        if learn:
            total = objective(losses, meta, batch, state.step)
        else:
            check_finite(losses, batch.tasks, state.step)
            total = losses.mean()
        grads = gradients(total, [*leaves, *rows.values()], state.step)
        # A row's own objective is its task's loss, not the mean: undo the 1/B, so that the step
        # does not depend on the batch size through Adam's ε.
        table = [
            torch.sparse_coo_tensor(index[None], g * len(index), t.shape, check_invariants=False)
            for g, t in zip(grads[len(leaves) :], state.tensors.values(), strict=True)
        ]
        update(state.optimisers["table"], list(state.tensors.values()), table, rate)
        if leaves:
            update(state.optimisers["meta"], leaves, grads[: len(leaves)], rate)
        norm = torch.cat(grads[len(leaves) :], -1).norm(dim=-1) * len(index)
        count = len(batch.tasks) * (self.samples if self.q == "gaussian" else 1)
        return StepInfo(float(total.detach()), count, {"grad_norm": norm})

    def _read(self, density: Density, state: State, tasks: Tasks) -> TaskPosterior:
        _, shared = state.meta.fixed()
        rows = {name: t.detach() for name, t in state.tensors.items()}
        mean, sd = self._moments(state.meta, rows)
        if self.q == "delta":
            return Delta(density, tasks.names, shared, mean.detach())
        return Gaussian(density, tasks.names, shared, mean.detach(), sd.detach())


def bound(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    mean: Tensor,
    sd: Tensor,
    noise: Tensor,
) -> Tensor:
    """KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i per task, nats, `[B]`.

    Args:
        density: the model.
        prior: N(θ0, Σ).
        shared: `[P]`.
        tasks: B tasks.
        mean: `[B, D]`.
        sd: `[B, D]`, positive.
        noise: `[S, B, D]`, standardised points at which f is averaged: normal draws, or the points
            of a cubature rule.
    """
    expected = density.negative_log_likelihood(mean + sd * noise, tasks, shared).mean(0)
    return prior.kl(mean, sd) + expected
