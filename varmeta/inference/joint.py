"""Joint variational optimisation of θ0, the scales, φ and every q_i.

Objective: Σ_i KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i, for Gaussian q_i (Amit & Meir, 2018, Meta-Learning
by Adjusting Priors; with full covariances and a linear-Gaussian model this is empirical Bayes), or,
in its delta limit, which drops the KL's divergent constant, Σ_i ½‖θ_i−θ0‖²_Λ + f_i(θ_i). Resets
θ_i ← θ0 keep the q_i reachable from θ0 (proposed in Huszár, inference.vc, 2019; compare Shin et
al., 2021, Large-Scale Meta-Learning with Continual Trajectory Shifting).

Full Gaussians are by default solved for in every step (`natural`), so that what is left is a smooth
function of θ0, the scales and φ alone, min_q Σ_i F_i, whose gradient is that at fixed q_i (the
envelope theorem). A quasi-Newton method takes it to its minimum in some 20 steps. EM (the closed
form) is as slow as the missing information is large, and Adam on everything at once as slow as the
worst conditioned q_i.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from varmeta import parts
from varmeta.checked import Count, Positive, Within
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
from varmeta.inference.iterate_test import IterateTest
from varmeta.inference.learned import EXACT, NOISY, Evaluated, flat, learned, put, units
from varmeta.inference.natural import MAX_DIM, Rule, Solved, laplace_start, quadrature, solve
from varmeta.inference.quasi_newton import QuasiNewton
from varmeta.inference.resets import Reset
from varmeta.inference.table import descend, new_table, reset
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


@dataclass(frozen=True)
class JointVariational(Strategy):
    """Optimise the prior and one q_i per task together.

    Every row of a training task is used, support and query alike. Per-task parameters live in a
    table of which a step touches the rows of its batch only.

    Attributes:
        q: `"delta"`, `"diagonal"`, `"low_rank"` (diagonal plus `rank` columns) or `"full"`;
            `"auto"` is full up to 40 coordinates and diagonal beyond.
        rank: of a low-rank q.
        steps: steps on the training tasks at most; a run ends before where it has arrived. Resets
            are a schedule of the whole run, which is then not ended before.
        tolerance: how far what is learned may be from where the run leads, in its standard errors;
            None for 0.01 where there is no noise, 0.2 elsewhere.
        q_update: `"solve"`, each visited q_i to its best in every step, by natural gradients (full
            q), or `"gradient"`, a step of Adam. `"auto"` is the first wherever it can be: not with
            `batch_rows`, draws, resets, or rows that move with θ0.
        learning_rate: of Adam, for the prior and the q_i, in units of the user's prior; halved
            where the iterates are stationary, and in the last quarter of `steps` it falls to 0 on a
            cosine (with resets: on one of each cycle).
        expectation: E_q f by `"quadrature"`, a fixed rule (see `natural.quadrature`); by
            `"draws"`; or by `"cubature"`: 2K points (K = D, or D + rank) that average every
            polynomial of degree 3 in θ exactly, so a linear-Gaussian f; others approximately, but
            without noise. `"auto"` is quadrature for `q_update="solve"`, else draws.
        samples: draws of θ per task and step; antithetic pairs, so an even number.
        batch_rows: rows of each task used in a step, drawn anew without replacement and weighted up
            to all of them; None for all.
        parametrisation: what the table holds. `"plain"`: θ_i in units of the user's prior.
            `"whitened"`: (θ_i − θ0)/σ, so that θ_i moves with θ0 and σ, whose gradients then pass
            through the likelihood: faster where the data say little about each task.
        shift: every θ_i is moved by each change of θ0 (Shin et al.), whose gradient stays that of
            the plain parametrisation.
        prior_update: θ0, Σ and φ by `"quasi-newton"` steps, where the q_i are solved and every step
            sees all tasks; by Adam, `"gradient"`; or θ0 and Σ, given the q_i, in `"closed_form"`.
            `"auto"` is the first of these that can be.
        learn_loc: learn θ0; otherwise it stays where it starts.
        learn_scale: learn Σ's scales; None for "where it is well posed", that is with Gaussian q.
        resets: when every q_i is put back to the prior; None for never.
        adapt_steps: Adam's steps for the q_i of new tasks, the prior held fixed
            (`q_update="gradient"`).

    Raises:
        ValueError: scales to be learned with delta q (there is no maximum: the joint density over
            θ, θ0 and σ grows without end as σ → 0; Chen et al., 2019, appendix); a closed form
            where there is none; a number out of range.
    """

    keeps_posteriors: ClassVar[bool] = True

    q: Kind | Literal["auto"] = "auto"
    rank: Count = 2
    steps: Count = 1000
    tolerance: Positive | None = None
    q_update: Literal["auto", "solve", "gradient"] = "auto"
    learning_rate: Positive = 0.05
    expectation: Literal["auto", "quadrature", "draws", "cubature"] = "auto"
    samples: Annotated[int, Within(2)] = 8
    batch_rows: Count | None = None
    parametrisation: Literal["plain", "whitened"] = "plain"
    shift: bool = False
    prior_update: Literal["auto", "quasi-newton", "gradient", "closed_form"] = "auto"
    learn_loc: bool = True
    learn_scale: bool | None = None
    resets: Reset | None = None
    adapt_steps: Annotated[int, Within(0)] = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q == "delta" and self.learn_scale:
            raise ValueError(no_scales_with_points("q='diagonal'"))
        if self.samples % 2:
            raise ValueError(
                f"samples must be an even number (antithetic pairs), got {self.samples}"
            )
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
        """`JointVariational`, with the family and the reset period, if they are set."""
        parts = [self.q.replace("_", " ")] if self.q != "auto" else []
        parts += ["whitened"] if self.parametrisation == "whitened" else []
        parts += ["shift"] if self.shift else []
        parts += ["closed form"] if self.prior_update == "closed_form" else []
        parts += [f"reset {self.resets.every}"] if self.resets else []
        return "JointVariational" + (f" ({', '.join(parts)})" if parts else "")

    @property
    def num_steps(self) -> int:
        """`steps`."""
        return self.steps

    def settled(self, density: Density, *, whole: bool) -> Self:
        """With family, way of the q_i, rule and way of the prior chosen.

        Raises:
            ValueError: something is asked for that the rest rules out.
        """
        q = ("full" if density.dim <= MAX_DIM else "diagonal") if self.q == "auto" else self.q
        against = {
            f"q={q!r}": q != "full",
            "batch_rows": self.batch_rows is not None,
            "shift": self.shift,
            "parametrisation='whitened'": self.parametrisation == "whitened",
            "resets": self.resets is not None,
            "expectation='draws'": self.expectation == "draws",
        }
        found = next((name for name, holds in against.items() if holds), None)
        if self.q_update == "solve" and found:
            raise ValueError(f"q_update='solve' does not go with {found}; use 'gradient'")
        solve = self.q_update != "gradient" and found is None
        if self.prior_update == "quasi-newton" and not (solve and whole):
            wanted = "all tasks in every step" if solve else "q_update='solve'"
            raise ValueError(f"prior_update='quasi-newton' needs {wanted}; use 'gradient'")
        update, rule = self.prior_update, self.expectation
        if update == "auto":
            update = "quasi-newton" if solve and whole else "gradient"
        if rule == "auto":
            rule = "quadrature" if solve else "draws"
        chosen = {"q": q, "prior_update": update, "expectation": rule}
        return replace(self, q_update="solve" if solve else "gradient", **chosen)  # type: ignore[arg-type]

    def is_tested(self, state: State) -> bool:
        """Unless there are resets, or Adam's steps on the q_i alone."""
        tested = self.q_update == "solve" or bool(self._tested(state.meta))
        return self.resets is None and tested

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
        if "auto" in (self.q, self.q_update, self.expectation, self.prior_update):
            raise ValueError(
                "this strategy leaves choices open; call fit, or init of "
                "strategy.settled(density, whole=True)"
            )
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
        if self._tested(meta):
            state.tensors |= self._test.begin(flat([*self._tested(meta).values()]))
        if meta.leaves() and self.prior_update == "quasi-newton":
            tensors, optimisers = self._quasi_newton.begin(meta)
            state.tensors |= tensors
            state.optimisers |= optimisers
        return state

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One step on the prior and on the batch's q_i."""
        if self.q_update == "solve":
            return self._solve_step(density, state, batch)
        times = self.resets.times(self.steps) if self.resets else ()
        whole = len(batch.tasks) == batch.total
        ends = self.resets is None and whole and self._test.judges_next(state)
        # Elsewhere the model has been evaluated for the last time when the state is changed.
        with state.unless_it_fails() if ends or state.step in times else nullcontext():
            if self.resets and state.step in times:
                self._reset(state, self.resets, times.index(state.step))
            info = self._descend(density, state, batch, generator, self._rates(state, batch), True)
            if self.resets is None:
                self._look_at_iterates(state, batch)
                if state.arrived and whole:
                    info.gradients += self._come_to_rest(density, state, batch, generator)
        return info

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """New q_i in the same way under the learned prior."""
        if self.q_update == "solve":
            prior, shared = state.meta.fixed()
            mean, tril, _ = laplace_start(density, prior, shared, tasks)
            return self._best(density, prior, shared, tasks, mean, tril)
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
        if self.q_update == "solve":
            prior, shared = state.meta.fixed()
            q = self._q(state.meta, prior, state.tensors["rows"])
            assert q.factor is not None
            return self._best(density, prior, shared, tasks, q.mean, q.factor)
        return self._read(density, state, tasks)

    # -- the q_i solved ---------------------------------------------------------------------------

    def _solve_step(self, density: Density, state: State, batch: Batch) -> StepInfo:
        meta = state.meta
        closed = self.prior_update == "closed_form"
        if closed or not meta.leaves() or self._begins(state, batch):
            found, moments = self._evaluate_moments(density, state, batch)
            if closed or self._begins(state, batch):
                maximise(moments, meta, batch.total, self.learn_loc, self._learns_scale)
            if closed and not meta.leaves() and len(batch.tasks) == batch.total:
                self._has_slowed(state, found.info.loss * batch.total)
            elif closed and not meta.leaves():
                self._look_at_iterates(state, batch)
            elif not meta.leaves() and bool((state.tensors["visits"] > 0).all()):
                state.arrived = "nothing is learned across tasks, and each has its best q"
            if not (closed and meta.leaves()):
                return found.info
        elif self.prior_update == "quasi-newton":

            def evaluate() -> Evaluated:
                return self._evaluate(density, state, batch)[0]

            return self._quasi_newton.step(state, evaluate, batch.total)
        else:
            found, _ = self._evaluate(density, state, batch)
            state.tensors.update(found.keep)
        rate = self._test.rate(state, self.learning_rate)
        update(state.optimisers["meta"], meta.leaves(), found.grads, rate)
        self._look_at_iterates(state, batch)
        return found.info

    def _evaluate_moments(
        self, density: Density, state: State, batch: Batch
    ) -> tuple[Evaluated, dict[str, Tensor]]:
        """The batch's best q_i, kept; and moments: of all visited so far, if these are summed."""
        meta, table = state.meta, state.tensors
        index = batch.index.to(table["rows"].device)
        before, seen = table["rows"][index], (table["visits"][index] > 0).double()
        found, q = self._evaluate(density, state, batch)
        table.update(found.keep)
        if self.prior_update != "closed_form":
            return found, _moments(meta, q)
        add_moments(table, meta, self._q(meta, meta.fixed()[0], before), -seen)
        add_moments(table, meta, q, 1.0)
        return found, table

    def _evaluate(
        self, density: Density, state: State, batch: Batch
    ) -> tuple[Evaluated, GaussianQ]:
        """Σ_i F_i at the best q_i of the prior as it stands, and its gradient; and these q_i."""
        meta, leaves, table = state.meta, state.meta.leaves(), state.tensors
        rule, (prior, shared) = self._rule(meta), meta.fixed()
        count = len(batch.tasks)
        before = meta.log_prior() / -batch.total
        grads = [torch.zeros_like(t) for t in leaves]
        losses, solutions, spent = list[Tensor](), list[Solved](), 0
        keep = {name: table[name].clone() for name in ("rows", "visits")}
        size = parts.tasks_at_once(batch.tasks, len(rule.points))
        for number, part in enumerate(batch.split(size)):
            index = part.index.to(prior.loc.device)
            q = self._q(meta, prior, table["rows"][index])
            assert q.factor is not None
            mean, tril = q.mean, q.factor
            fresh = (table["visits"][index] == 0).nonzero()[:, 0]
            if len(fresh):
                some = part.tasks.select(fresh.cpu())
                mean, tril = mean.clone(), tril.clone()
                mean[fresh], tril[fresh], more = laplace_start(
                    density, prior, shared, some, state.step
                )
                spent += len(fresh) * more
            found = solve(density, prior, shared, part.tasks, mean, tril, rule)
            spent += len(part.tasks) * (found.gradients + len(rule.points))
            frame = self._frame(meta, prior)
            keep["rows"][index] = self._family(meta).rows_of(found.mean, found.tril, *frame)
            keep["visits"][index] += 1
            points = rule.points[:, None].expand(-1, len(part.tasks), -1)
            each = free_energy(
                density,
                meta.prior,
                meta.shared,
                part.tasks,
                found.q,
                points,
                rule_weights=rule.weights,
            )
            check_finite(each, part.tasks, state.step)
            total = each.sum() / count + (before if number == 0 else 0.0)
            if leaves:
                part_grads = gradients(total, leaves, state.step)
                grads = [a + b for a, b in zip(grads, part_grads, strict=True)]
            losses.append(each.detach())
            solutions.append(found)
        loss = float(torch.cat(losses).mean() + before.detach())
        stats = {
            name: torch.cat([s.stats()[name] for s in solutions]) for name in solutions[0].stats()
        }
        every = GaussianQ(
            torch.cat([s.mean for s in solutions]), factor=torch.cat([s.tril for s in solutions])
        )
        return Evaluated(StepInfo(loss, spent, stats), grads, keep), every

    def _best(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        mean: Tensor,
        tril: Tensor,
    ) -> TaskPosterior:
        rule = quadrature(prior.dim, prior.loc)
        size = parts.tasks_at_once(tasks, len(rule.points))
        found = [
            solve(density, prior, shared, part, mean[rows], tril[rows], rule)
            for rows in torch.arange(len(tasks)).split(size)
            for part in [tasks if size >= len(tasks) else tasks.select(rows)]
        ]
        stats = {name: torch.cat([f.stats()[name] for f in found]) for name in found[0].stats()}
        mean, tril = torch.cat([f.mean for f in found]), torch.cat([f.tril for f in found])
        return Gaussian(density, tasks.names, shared, mean, tril, stats=stats)

    def _rule(self, meta: Meta) -> Rule:
        like = meta.origin.loc
        if self.expectation == "quadrature":
            return quadrature(meta.origin.dim, like)
        points = cubature(meta.origin.dim, like.dtype, like.device)
        return Rule(points, torch.full_like(points[:, 0], 1 / len(points)))

    def _begins(self, state: State, batch: Batch) -> bool:
        """Whether a closed form takes this step: from wide priors it goes a long way at once."""
        origin, belief = state.meta.origin, state.meta.origin.hyperprior
        law = "flat" if belief is None else belief.scale_law
        free = origin.factor is None and law in ("flat", "half-normal")
        many = len(batch.tasks) == batch.total or len(batch.tasks) >= _ENOUGH
        return state.step < _BEGIN and many and free and self.learn_loc and self._learns_scale

    def _has_slowed(self, state: State, nats: float) -> None:
        """Whether EM has arrived: what is left to gain if its gains go on falling as they do."""
        last = state.tensors.setdefault("em", torch.full((2,), torch.nan, dtype=torch.float64))
        gain = float(last[0]) - nats
        rate = min(max(gain / float(last[1]), 0.0), 0.9999) if float(last[1]) > 0 else math.nan
        last.copy_(torch.tensor([nats, gain], dtype=torch.float64))
        rounding = 8 * torch.finfo(state.meta.origin.loc.dtype).eps * (1 + abs(nats))
        small = gain * rate / (1 - rate) < 0.5 * self._quasi_newton.tolerance**2
        if small or gain < rounding:
            state.arrived = "the closed form has less than the tolerance left to gain"

    # -- private ----------------------------------------------------------------------------------

    @property
    def _quasi_newton(self) -> QuasiNewton:
        return QuasiNewton(self.tolerance or EXACT, self.steps)

    @property
    def _test(self) -> IterateTest:
        return IterateTest(self.tolerance or NOISY, self.steps)

    def _tested(self, meta: Meta) -> dict[str, Tensor]:
        """What is learned, by gradients or in closed form."""
        out = learned(meta)
        if self.prior_update == "closed_form":
            more = {"loc": self.learn_loc, "log_scale": self._learns_scale}
            out = {name: meta.raw[name] for name, yes in more.items() if yes} | out
        return out

    def _look_at_iterates(self, state: State, batch: Batch) -> None:
        tested = self._tested(state.meta)
        if not tested:
            return
        unit = units(state.meta, batch.total, tested)
        average, arrived = self._test.add(state, flat([*tested.values()]), unit)
        if average is not None and self.prior_update != "closed_form":
            put(state.meta, average)
        if arrived:
            state.arrived = "the average of the iterates stays where it is"

    @property
    def _learns_scale(self) -> bool:
        return self.q != "delta" if self.learn_scale is None else self.learn_scale

    def _family(self, meta: Meta) -> Family:
        assert self.q != "auto"
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
        weights = None
        if self.expectation == "quadrature" and q.noise_dim:
            weights = quadrature(q.noise_dim, q.mean).weights
        losses = free_energy(density, prior, shared, tasks, q, points, weight, weights)
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
            rate = self._rate(state)
            update(state.optimisers["meta"], leaves, grads[:-1], rate)
        if closed:
            add_moments(table, meta, self._q(meta, prior, table["rows"][index]), 1.0)
            maximise(table, meta, batch.total, self.learn_loc, self._learns_scale)
        count = len(batch.tasks) * (1 if points is None else len(points))
        return StepInfo(float(total.detach()), count, {"grad_norm": own.norm(dim=-1)})

    def _reset(self, state: State, resets: Reset, number: int) -> None:
        rows = state.tensors["rows"]
        which = resets.which(number, len(rows)).to(rows.device)
        reset(state.tensors, which, self._start(state.meta), resets.amount)
        if self.prior_update == "closed_form":
            self._count_again(state)

    def _come_to_rest(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> int:
        """Steps of the q_i alone: the prior is at an average, they where their last noise led.

        Returned are the gradients that this took.
        """
        spent = 0
        for step in range(_REST):
            rate = decayed(self.learning_rate, step, _REST)
            rates = state.tensors["visits"].new_full((len(batch.tasks),), rate)
            spent += self._descend(density, state, batch, generator, rates, False).gradients
        return spent

    def _rates(self, state: State, batch: Batch) -> Tensor:
        """The learning rate of each task's q_i, `[B]`: its cosine begins again at its resets."""
        rows, step = state.tensors["rows"], state.step
        if self.resets is None:
            return rows.new_full((len(batch.index),), self._rate(state))
        phases = self.resets.phases(step, self.steps, len(rows))[batch.index.cpu()]
        return (0.5 * self.learning_rate * (1 + torch.cos(math.pi * phases))).to(rows)

    def _rate(self, state: State) -> float:
        """The prior's learning rate now."""
        if self.resets is None:
            return self._test.rate(state, self.learning_rate)
        return decayed(self.learning_rate, state.step, self.steps)

    def _points(self, q: GaussianQ, generator: torch.Generator) -> Tensor | None:
        """Standardised points `[S, B, K]` at which f is averaged; None for a delta."""
        if not q.noise_dim:
            return None
        like: Any = {"dtype": q.mean.dtype, "device": q.mean.device}
        if self.expectation in ("cubature", "quadrature"):
            fixed = cubature(q.noise_dim, **like)
            if self.expectation == "quadrature":
                fixed = quadrature(q.noise_dim, q.mean).points
            return fixed[:, None].expand(-1, len(q.mean), -1)
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


def _moments(meta: Meta, q: GaussianQ) -> dict[str, Tensor]:
    sums = no_moments(meta)
    add_moments(sums, meta, q, 1.0)
    return sums


_REST = 200  # steps of the q_i alone once θ0 and Σ have arrived by noisy steps
_ENOUGH = 30  # tasks in a batch from which a closed form may take the first steps
_BEGIN = 3  # steps in closed form before the quasi-Newton method
