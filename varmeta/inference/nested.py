"""Nested Laplace: the posterior of the prior itself, and of every task given all of it.

With every θ_i integrated out by Laplace's approximation (`marginal.py`) what is left is a density
of few dimensions, log p̂(D | ψ) + log p(ψ) for ψ = (θ0, log scales, φ). Its mode is found without
noise; draws come from a t distribution fitted there and are weighed by the density (importance
sampling, Pareto smoothed); each has its tasks' Gaussians around their modes. The nearest relatives
are INLA (Rue, Martino & Chopin, 2009), there with a grid over ψ, and TMB (Kristensen et al., 2016);
Tierney & Kadane (1986) have the error of the approximation.

Where a task is no parabola, Laplace's value is corrected by importance sampling around its mode,
with the same random numbers for every ψ, so that what errors are left hardly depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from varmeta.checked import Count, Positive, Within
from varmeta.importance import good_k, smooth
from varmeta.inference.base import (
    Batch,
    Meta,
    NonFiniteLoss,
    State,
    StepInfo,
    Strategy,
    check_finite,
)
from varmeta.inference.belief import Belief
from varmeta.inference.correction import Correction, enough, needed
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.learned import EXACT, Evaluated, put
from varmeta.inference.marginal import Marginal, Points, Reference
from varmeta.inference.marginal_nuts import CHAIN, Potential
from varmeta.inference.nested_checks import require_proper, rivals, warn_of_modes
from varmeta.inference.nested_posterior import task_draws
from varmeta.inference.nuts_kernel import Sampler
from varmeta.inference.proposal import FIELDS, Proposal, fitted, moments, resampled
from varmeta.inference.quasi_newton import QuasiNewton
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.process import pyro_untouched, validation_off
from varmeta.seeds import global_rng
from varmeta.tasks import Tasks, TaskSource

MAX_SHARED = 100  # numbers in ψ; importance weights of more are hopeless
_CLIMB, _LOOK, _DRAW = range(3)  # what a step does
_STEP = 0.05  # standard errors, of the differences that give the curvature
_WIDEST = 3.0  # standard deviations of the prior, of the proposal along any axis
_REACH = (1.5, 3.0, 6.0, 12.0)  # standard deviations, where the proposal's sides are measured
_NEAR = 2  # of these that are near; the others are for a second component, for what reaches far
_SIDES = (0.5, 4.0)
_FAR_SHARE = 0.3  # of the draws, from the second component
_WANTED_K = 0.5  # further rounds are worth their price above it, though weights are good to 0.7
_MIXED, _JUDGED = 1.05, 100  # R-hat, and draws per chain from which it is worth reading
_STARTS, _RESTARTS = 4, 3  # from which other modes are looked for; climbs from better ones
_JUMPS = 16  # draws of ψ for which it is asked whether the modes of tasks are still the best
_LONG = 200  # transitions
_ENOUGH = 0.25  # effective draws, as a share of the draws that are wanted


@dataclass(frozen=True, kw_only=True)
class NestedLaplace(Strategy):
    """The posterior of θ0, scales and φ as well as of every task, by Laplace within and draws.

    Attributes:
        steps: of the quasi-Newton method on the way to the mode, at most.
        tolerance: how far from the mode it may end, in standard errors.
        draws: of ψ, in a posterior. Half as many are proposed in each round, until a quarter as
            many are effective.
        rounds: of proposals at most. After one whose weights are not to be trusted (Pareto k̂) the
            proposal is fitted anew to what was drawn, as a mixture of more and more components.
        points: around each task's mode, by which Laplace's evidence is corrected where the task is
            no parabola; more, up to 1,024, where these do not settle it. 0 for Laplace alone.
        sampler: of ψ: `"importance"`, weighted draws of proposals; or `"nuts"`, Pyro's NUTS with
            every task marginalised, each transition a step.
        chains: of NUTS.
        warmup: transitions per chain in which the step size adapts.
        target_accept: acceptance probability that the step size aims at.

    Raises:
        ValueError: a number out of range.
    """

    may_stay: ClassVar[bool] = True

    steps: Count = 200
    tolerance: Positive = EXACT
    draws: Annotated[int, Within(20)] = 1000
    rounds: Count = 6
    points: Annotated[int, Within(0)] = 64
    sampler: Literal["importance", "nuts"] = "importance"
    chains: Count = 2
    warmup: Annotated[int, Within(0)] = 100
    target_accept: Annotated[float, Within(0, 1, above=True, below=True)] = 0.8

    @property
    def name(self) -> str:
        """`NestedLaplace`, with the sampler if it is NUTS."""
        return "NestedLaplace" + " (NUTS)" * (self.sampler == "nuts")

    @property
    def num_steps(self) -> int:
        """Steps to the mode, one that looks around there, and rounds of draws (or transitions)."""
        nuts = self.sampler == "nuts"
        return self.steps + 1 + (self.chains * self._transitions if nuts else self.rounds)

    @property
    def _transitions(self) -> int:
        """Of each chain."""
        return self.warmup + -(-self.draws // self.chains)

    @property
    def point_scales(self) -> bool:
        """False: they have a posterior of their own."""
        return False

    def is_tested(self, state: State) -> bool:
        """By the weights of the draws."""
        return True

    def has_converged(self, state: State) -> bool:
        """Whether the mode was found, and the weights are to be trusted."""
        return bool(state.arrived) and not _marks(state)["short"]

    def shortfall(self, state: State) -> str:
        """What is not to be trusted."""
        return state.arrived if _marks(state)["short"] else ""

    def shared_draws(self, state: State) -> dict[str, Tensor] | None:
        """See `Strategy.shared_draws`."""
        self._require_draws(state)
        return {name: state.tensors[name] for name in ("loc", "log_scale", "shared")}

    def worst_k(self, state: State) -> float:
        """Of the weights of ψ, or of the task that is least like its Gaussian."""
        each = state.tensors["task_k"].nan_to_num(nan=-math.inf)
        return max(float(state.tensors["psi_k"]), float(each.max()))

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
        """All rows of the tasks; a stream has no end to condition on."""
        if isinstance(tasks, TaskSource):
            raise ValueError(f"{self.name} needs Tasks, not an endless TaskSource")
        return tasks.unsplit

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior.

        Raises:
            ValueError: a low-rank prior, or one with bounds; too many shared numbers or
                coordinates.
        """
        assert isinstance(tasks, Tasks)
        self._check(density, prior)
        meta = Meta.start(density, prior)
        count = len(Belief(meta).free)
        if count > MAX_SHARED:
            raise ValueError(
                f"θ0, scales and shared parameters are {count} numbers, and {self.name} integrates "
                f"over {MAX_SHARED} at most: name fewer sites in shared=, give fewer scales "
                "(scales='all'), or use LaplaceEvidence (points) or PyroSVI"
            )
        tensors, optimisers = self._quasi_newton.begin(meta)
        like = prior.loc.detach()
        count, dim = len(tasks), density.dim
        tensors["minima"] = like.expand(count, -1).clone()
        tensors["slope"] = like.new_zeros(count, dim)
        tensors["curvature"] = like.new_zeros(count, dim, dim)
        state = State(meta, optimisers, tensors)
        state.counts["nested"] = [_CLIMB, 0, 0, 0, 0, 0]
        return state

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One step to the mode, a look around there, or a round of draws."""
        batch.require_all(self.name)
        belief, marginal = Belief(state.meta), self._marginal(density, state, batch.tasks)
        spent = marginal.evaluations
        with state.unless_it_fails():
            match state.counts["nested"][0]:
                case 0:
                    info = self._climb(belief, marginal, state, batch)
                case 1:
                    self._look(belief, marginal, state, generator)
                    info = self._unmoved(state, batch)
                case _:
                    sample = self._transit if self.sampler == "nuts" else self._draw
                    sample(belief, marginal, state, generator)
                    info = self._unmoved(state, batch)
        info.gradients = marginal.evaluations - spent
        return info

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """Of tasks that were not in the run: each draw of ψ counts by what the task says of it."""
        return self._task_draws(density, state, tasks, generator, fresh=True)

    def posterior(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """Of the training tasks, of which the draws of ψ know already."""
        return self._task_draws(density, state, tasks, generator, fresh=False)

    # -- private ----------------------------------------------------------------------------------

    def _require_draws(self, state: State) -> None:
        if "loc" not in state.tensors:
            raise ValueError(
                f"{self.name} has no draws yet: the run was stopped at step {state.step}; go on "
                "with it, by fit with the same checkpoint"
            )

    @property
    def _quasi_newton(self) -> QuasiNewton:
        return QuasiNewton(self.tolerance, self.steps)

    def _check(self, density: Density, prior: GaussianPrior) -> None:
        if prior.factor is not None:
            raise ValueError(f"{self.name} takes a diagonal prior; build it with rank=0")
        if prior.bounds is not None:
            raise ValueError(
                f"{self.name} knows no bounds of the scales; build the prior without bounds"
            )
        if density.dim > MAX_DIM:
            raise ValueError(
                f"a task has {density.dim} coordinates, and {self.name} takes {MAX_DIM} at most; "
                "use JointVariational"
            )

    def _marginal(self, density: Density, state: State, tasks: Tasks) -> Marginal:
        if "marginal" not in state.cache:
            state.cache["marginal"] = Marginal(density, tasks)
        found: Marginal = state.cache["marginal"]
        return found

    def _climb(self, belief: Belief, marginal: Marginal, state: State, batch: Batch) -> StepInfo:
        """A step of the quasi-Newton method on −log p̂(D | ψ) − log p(ψ)."""
        meta, total = state.meta, batch.total
        if state.step == 0:
            require_proper(belief, marginal, _known(state))

        def evaluate() -> Evaluated:
            raw = belief.raw[None]
            found = marginal.total(belief.points(raw), _known(state), gradient=True)
            check_finite(found.losses, batch.tasks, state.step)
            assert found.gradient is not None
            before, slope = belief.log_prob_and_gradient(raw)
            value = -float(found.log_evidence + before) / total
            slope = -(belief.pulled_back(found.gradient) + slope)[0] / total
            leaves = meta.leaves()
            grads = slope.split([t.numel() for t in leaves])
            stats = {"converged": ~found.unsolved[0]}
            near = found.known
            assert near.slope is not None and near.curvature is not None
            keep = {"minima": near.theta, "slope": near.slope, "curvature": near.curvature}
            return Evaluated(StepInfo(value, 0, stats), list(grads), keep)

        info = self._quasi_newton.step(state, evaluate, total)
        last = state.counts["nested"][1] + 1 >= self.steps
        state.counts["nested"][1] += 1
        if state.arrived or last:
            state.counts["nested"][0] = _LOOK
            state.counts["nested"][3] = int(not state.arrived)
            state.arrived = ""
        return info

    def _unmoved(self, state: State, batch: Batch) -> StepInfo:
        """The mode's loss, of a step that does not move it."""
        return StepInfo(float(state.tensors["outer_loss"]) / batch.total, 0)

    def _look(
        self, belief: Belief, marginal: Marginal, state: State, noise: torch.Generator
    ) -> None:
        """At the mode: the curvature, how far the density reaches, and which tasks bend."""
        tensors, free, marks = state.tensors, belief.free, state.counts["nested"]
        mode = belief.raw
        seen = rivals(marginal, belief.points(mode[None]), _known(state), noise, _STARTS)
        if bool(seen.better.any()) and marks[5] < _RESTARTS:
            # Some tasks have a better mode than the one that was followed here: on from it.
            tensors["minima"] = torch.where(seen.better[:, None], seen.theta, tensors["minima"])
            tensors["slope"].zero_()
            tensors["curvature"].zero_()
            tensors["outer_loss"].fill_(torch.nan)
            marks[0], marks[5] = _CLIMB, marks[5] + 1
            return
        tensors["rivals"] = seen.share
        bent, k = needed(marginal, belief.points(mode[None]), _known(state), self.points)
        tensors |= {"mode": mode, "bent": bent, "task_k": k}
        target = self._target(belief, marginal, state)
        units = tensors["outer_unit"][free]
        moves = torch.diag(_STEP * units)
        ends = torch.cat([mode[free] + moves, mode[free] - moves])
        slopes = target.gradient(ends)
        rows = -(slopes[: len(free)] - slopes[len(free) :]) / (2 * _STEP * units[:, None])
        axes = _axes(0.5 * (rows + rows.T), units, belief.scales)
        left, right = _sides(target, mode[free], axes)
        if bool(bent.any()):
            way = 1.5 * axes[:, : len(belief.scales)].T
            near = torch.cat([mode[free][None], mode[free] + way, mode[free] - way])
            most = enough(marginal, bent, target.points(near), _known(state), self.points)
            tensors["points"] = torch.tensor(most)
        state.cache.pop("target")  # it has too few points
        count = torch.full_like(mode[:2], self.draws // 2)
        count = (count * count.new_tensor([1 - _FAR_SHARE, _FAR_SHARE])).round()
        made = Proposal(mode[free].repeat(2, 1), axes.repeat(2, 1, 1), left, right, count)
        tensors |= {f"proposal_{name}": getattr(made, name) for name in FIELDS}
        tensors["psi"] = mode.new_zeros(0, len(free))
        tensors["log_target"] = mode.new_zeros(0)
        tensors["unsolved"] = torch.zeros(0, len(bent), dtype=torch.bool, device=mode.device)
        if self.sampler == "nuts":
            # The mode's curvature is too narrow a mass where a scale may be 0.
            psi = made.sample(noise)
            value, _ = target(psi)
            weights, _, _ = _weights(value, made.log_prob(psi))
            tensors |= dict(zip(("middle", "mass"), moments(psi, weights), strict=True))
        marks[0] = _DRAW

    def _target(self, belief: Belief, marginal: Marginal, state: State) -> Target:
        tensors = state.tensors
        if "target" not in state.cache:
            bent = tensors["bent"]
            count = int(tensors.get("points", self.points))
            fix = Correction(marginal, bent, count) if bool(bent.any()) else None
            state.cache["target"] = Target(belief, marginal, tensors["mode"], _known(state), fix)
        found: Target = state.cache["target"]
        return found

    def _draw(
        self, belief: Belief, marginal: Marginal, state: State, noise: torch.Generator
    ) -> None:
        """A round of draws; the last one, or one whose weights are good, ends the run."""
        tensors, marks = state.tensors, state.counts["nested"]
        target = self._target(belief, marginal, state)
        proposal = Proposal(*(tensors[f"proposal_{name}"] for name in FIELDS))
        new = proposal
        if marks[2]:
            found = _weights(tensors["log_target"], proposal.log_prob(tensors["psi"]))
            if found[1] > _WANTED_K:
                new = fitted(tensors["psi"], found[0], min(marks[2], 5), self.draws // 2, noise)
                proposal = proposal.joined(new)
            else:
                new = proposal.counting(self.draws // 2)
                proposal = replace(proposal, count=proposal.count + new.count)
        psi = new.sample(noise)
        value, unsolved = target(psi)
        tensors |= {f"proposal_{name}": getattr(proposal, name) for name in FIELDS}
        tensors["psi"] = torch.cat([tensors["psi"], psi])
        tensors["log_target"] = torch.cat([tensors["log_target"], value])
        tensors["unsolved"] = torch.cat([tensors["unsolved"], unsolved])
        marks[2] += 1
        weights, k, ess = _weights(tensors["log_target"], proposal.log_prob(tensors["psi"]))
        trusted = k <= good_k(len(weights)) and ess >= _ENOUGH * self.draws
        if (trusted and k <= _WANTED_K) or marks[2] == self.rounds:
            whose = "one proposal covers" if marks[2] == 1 else f"{marks[2]} rounds of draws cover"
            not_whose = f"{marks[2]} rounds of draws do not cover"
            said = (
                f"{whose if trusted else not_whose} the posterior of θ0, scales and φ: k̂ {k:.2f}, "
                f"{ess:.0f} effective of {len(weights)} draws"
            )
            self._finish(belief, state, weights, noise, said, trusted)
            tensors |= {"psi_k": _scalar(k), "psi_ess": _scalar(ess)}

    def _transit(
        self, belief: Belief, marginal: Marginal, state: State, noise: torch.Generator
    ) -> None:
        """One transition of NUTS; the last one ends the run."""
        tensors, marks = state.tensors, state.counts["nested"]
        target, last = self._target(belief, marginal, state), self.chains * self._transitions
        with pyro_untouched(), validation_off(), global_rng(noise):
            if "sampler" not in state.cache:
                steps = 0  # of a recorded program, which does not pay for a short run
                if last >= _LONG:
                    steps = 2 if bool(tensors["bent"].any()) else 1
                made = Potential.make(belief, marginal, tensors["mode"], target.known, steps)
                mass, middle = tensors["mass"], tensors["middle"]
                kernel = Sampler(made, {"psi": middle.shape})
                kernel.start(middle, mass, warmup=self.warmup, target_accept=self.target_accept)
                state.cache["sampler"] = kernel
            kernel = state.cache["sampler"]
            _, place = divmod(marks[2], self._transitions)
            chain = {name: tensors[f"chain_{name}"] for name in CHAIN * bool(place)}
            after, diverged = kernel.transition(chain or kernel.begin())
        marks[2] += 1
        tensors |= {f"chain_{name}": value for name, value in after.items()}
        if place >= self.warmup:
            tensors["psi"] = torch.cat([tensors["psi"], after["position"][None]])
            marks[4] += diverged
        if marks[2] < last:
            return
        psi = tensors["psi"]
        by_chain = psi.unflatten(0, (self.chains, -1))
        rhat = float(split_gelman_rubin(by_chain, 0, 1).nan_to_num(1.0).max())
        ess = float(effective_sample_size(by_chain, 0, 1).nan_to_num(0.0).min())
        weights, k = torch.full_like(psi[:, 0], 1 / len(psi)), -math.inf
        if target.correction is not None:
            value = target.correction(target.points(psi), target.known)
            weights, k, share = _weights(value, torch.zeros_like(value))
            ess *= share / len(psi)
        judged = self.chains > 1 and len(psi) >= _JUDGED * self.chains
        trusted = (rhat <= _MIXED or not judged) and k <= good_k(len(psi))
        said = f"NUTS: worst R-hat {rhat:.3f}, {ess:.0f} effective of {len(psi)} draws"
        if k > -math.inf:
            said += f", weighed for what is no parabola: k̂ {k:.2f}"
        if marks[4]:
            said += f", {marks[4]} transitions diverged (raise target_accept)"
        self._finish(belief, state, weights, noise, said, trusted)
        tensors |= {"psi_k": _scalar(k), "psi_ess": _scalar(ess), "rhat": _scalar(rhat)}

    def _finish(
        self,
        belief: Belief,
        state: State,
        weights: Tensor,
        noise: torch.Generator,
        said: str,
        trusted: bool,
    ) -> None:
        """Draws of ψ, and θ0, scales and φ of the state: their posterior means."""
        tensors, marks = state.tensors, state.counts["nested"]
        pick = resampled(weights, self.draws, noise)
        # A draw that is there twice is not to stand beside itself.
        pick = pick[torch.randperm(len(pick), generator=noise, device=pick.device)]
        raw = tensors["mode"].repeat(self.draws, 1)
        raw[:, belief.free] = tensors["psi"][pick]
        points = belief.points(raw)
        tensors |= {"loc": points.loc, "log_scale": points.log_scale, "shared": points.shared}
        mean = tensors["mode"].clone()
        mean[belief.free] = weights @ tensors["psi"]
        put(state.meta, mean)
        if belief.params:
            named = ", ".join(map(repr, belief.params))
            said += f"; {named}, which has no prior, is a point"
        if marks[3]:
            said = f"the mode was not found in {self.steps} steps (raise steps); {said}"
        marks[3] = int(bool(marks[3]) or not trusted)
        state.arrived = said
        target: Target = state.cache["target"]
        some = points.select(slice(0, _JUMPS))
        seen = rivals(target.marginal, some, target.known, noise, _STARTS)
        share = torch.maximum(tensors["rivals"], seen.share)
        tensors["rivals"] = share
        unsolved = seen.unsolved
        if len(tensors["unsolved"]):
            unsolved = torch.maximum(unsolved, weights @ tensors["unsolved"].to(weights))
        warn_of_modes(self.name, target.marginal.tasks.names, unsolved, share)

    def _task_draws(
        self,
        density: Density,
        state: State,
        tasks: Tasks,
        noise: torch.Generator,
        *,
        fresh: bool,
    ) -> TaskPosterior:
        self._require_draws(state)
        tensors = state.tensors
        points = Points(
            tensors["loc"], tensors["log_scale"], tensors["shared"], state.meta.origin.groups
        )
        known = None if fresh else _known(state)
        bent = None if fresh else tensors["bent"]
        return task_draws(
            density, tasks, points, self.points, noise, known=known, bent=bent, fresh=fresh
        )


@dataclass(frozen=True, eq=False)
class Target:
    """log p̂(D | ψ) + log p(ψ) of draws of what has a prior, in units of `Meta.raw`."""

    belief: Belief
    marginal: Marginal
    mode: Tensor
    known: Reference
    correction: Correction | None

    def points(self, psi: Tensor) -> Points:
        """`[S, K]` to ψ."""
        raw = self.mode.repeat(len(psi), 1)
        raw[:, self.belief.free] = psi
        return self.belief.points(raw)

    def __call__(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """`[S]` nats, and which tasks' modes were not found, `[S, T]` bool."""
        points = self.points(psi)
        found = self.marginal.total(points, self.known)
        value = found.log_evidence + self.belief.log_prob(points)
        if self.correction is not None:
            value = value + self.correction(points, self.known)
        value = value.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        if not bool((value > -torch.inf).any()):
            raise NonFiniteLoss(
                f"the tasks' evidence is not finite at any of {len(psi)} draws of θ0, scales and φ "
                "around the mode; tighten the model's priors"
            )
        return value, found.unsolved

    def gradient(self, psi: Tensor) -> Tensor:
        """`[S, K]`, without the correction's part."""
        points = self.points(psi)
        found = self.marginal.total(points, self.known, gradient=True)
        assert found.gradient is not None
        raw = self.mode.repeat(len(psi), 1)
        raw[:, self.belief.free] = psi
        _, slope = self.belief.log_prob_and_gradient(raw)
        return (self.belief.pulled_back(found.gradient) + slope)[:, self.belief.free]


def _marks(state: State) -> dict[str, int]:
    phase, climbed, rounds, short, *_ = state.counts["nested"]
    return {"phase": phase, "climbed": climbed, "rounds": rounds, "short": short}


def _known(state: State) -> Reference:
    """Every task at its last minimum; to begin with at θ0."""
    return Reference(*(state.tensors[name] for name in ("minima", "slope", "curvature")))


def _axes(curvature: Tensor, units: Tensor, first: Tensor) -> Tensor:
    """A `[K, K]` with AAᵀ the inverse curvature, no wider than is sensible.

    A Cholesky factor with the coordinates `first` in front: each of its first columns moves one of
    them, and with it what depends on it. What is skew is then skew along an axis.
    """
    size = (curvature.diagonal() * units.square()).abs().clamp(min=1e-4).rsqrt() * units
    values, vectors = torch.linalg.eigh(size[:, None] * curvature * size)
    root = size[:, None] * vectors * values.abs().clamp(min=1e-4).rsqrt()
    length = root.norm(dim=0)
    root = root * (_WIDEST / length).clamp(max=1.0)
    rest = torch.ones(len(units), dtype=torch.bool, device=units.device)
    rest[first] = False
    order = torch.cat([first, rest.nonzero()[:, 0]])
    lower = torch.linalg.cholesky((root @ root.T)[order][:, order])
    return lower[order.argsort()]


def _sides(target: Target, centre: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """How far the density reaches along each axis to the left and right, in its own length.

    `[2, K]` each: near the mode, and further out, which is where a scale that may be 0 has much of
    its mass (a density that is flat near σ = 0 falls over log σ like σ).
    """
    reach = torch.tensor(_REACH, dtype=axes.dtype, device=axes.device)
    moves = (reach[:, None, None] * axes.T).flatten(0, 1)
    psi = torch.cat([centre[None], centre + moves, centre - moves])
    value, _ = target(psi)
    drop = (value[0] - value[1:]).reshape(2, len(reach), -1)
    # A normal's drop at r is ½ (r / side)².
    side = reach[:, None] / (2 * drop.clamp(min=1e-6)).sqrt()
    near = side[:, :_NEAR].amax(1)
    both = torch.stack([near, side.amax(1)], 1).clamp(*_SIDES)
    return both[1], both[0]


def _weights(log_target: Tensor, log_q: Tensor) -> tuple[Tensor, float, float]:
    """Smoothed weights `[S]` whose sum is 1, Pareto's k̂ and the effective sample size."""
    log_w = (log_target.double() - log_q.double()).cpu().numpy()
    smoothed, k = smooth(log_w[None])
    weights = torch.from_numpy(smoothed[0]).to(log_target.device).softmax(0)
    return weights.to(log_target), float(k[0]), float(1 / weights.square().sum())


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
