"""Without noise: a quasi-Newton method to the optimum of what is learned across tasks.

PyTorch's L-BFGS with a strong-Wolfe line search (Nocedal & Wright, 2006, Numerical Optimization,
chapters 3 and 7) on the total objective in units in which its curvature is about 1. Where it slows
down, a Newton step from differences of gradients says how far the optimum still is, in nats and in
standard errors of each learned quantity. An objective that turns out to have jumps (an inner
minimum that moves to another basin) is gone on with by first-order steps and an `IterateTest`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from varmeta.inference.base import Meta, NonFiniteLoss, State, StepInfo, update
from varmeta.inference.iterate_test import IterateTest
from varmeta.inference.learned import NOISY, Evaluate, flat, learned, names, put, units

_VERIFIED = 40  # learned numbers up to which a Newton step is made from differences of gradients
_DIFFERENCE = 0.02  # of a unit, the step of these differences
_FLAT = 1e-4  # nats per unit²: curvature below which the data say nothing of a direction
_MOST_EVALUATIONS = 25  # of one line search
_FIRST = 0.5  # standard errors, the first size of first-order steps where there are jumps
_PROBED = 10  # scales up to which a wider value is tried before a run has arrived


@dataclass(frozen=True)
class QuasiNewton:
    """L-BFGS steps on T times the loss, one iteration with its line search a step.

    Where no line search gains what the gradient promises the objective has jumps: from there on
    Adam's steps (Kingma & Ba, 2015) of half a standard error, ended by an `IterateTest`.

    Attributes:
        tolerance: standard errors; a run has arrived where a Newton step would gain less than
            ½ tolerance² nats in all.
        steps: the limit.
    """

    tolerance: float
    steps: int

    @property
    def iterate_test(self) -> IterateTest:
        """How first-order steps are ended."""
        return IterateTest(max(self.tolerance, NOISY), self.steps)

    def begin(self, meta: Meta) -> tuple[dict[str, Tensor], dict[str, torch.optim.Optimizer]]:
        """Tensors and optimisers for a state that has taken no step."""
        like = flat(meta.leaves())
        moved = torch.zeros_like(like).requires_grad_()
        tensors = {
            "outer": moved,
            "outer_centre": like,
            "outer_unit": torch.ones_like(like),
            "outer_loss": like.new_full((), torch.nan, dtype=torch.float64),
            "outer_slope": torch.zeros_like(like),
            "outer_error": torch.full_like(like, torch.nan),
            "outer_best": torch.full_like(like, torch.nan),
            "outer_least": like.new_full((), torch.inf, dtype=torch.float64),
        }
        tensors |= self.iterate_test.begin(like)
        return tensors, {"quasi": _lbfgs(moved), "first": torch.optim.Adam([moved], lr=_FIRST)}

    def step(self, state: State, evaluate: Evaluate, total: float) -> StepInfo:
        """One iteration; sets `state.arrived` where it was the last one that is needed.

        Raises:
            NonFiniteLoss: the objective is not finite where it stands.
        """
        run = _Descent(self, state, evaluate, total)
        with state.unless_it_fails():
            if math.isnan(float(state.tensors["outer_loss"])):
                run.restart()
            return run.first_order() if self.has_jumps(state) else run.iterate()

    @staticmethod
    def has_jumps(state: State) -> bool:
        """Whether the objective was found not to be smooth."""
        return bool(state.counts.get("outer", [0])[0])


def _outer_count(state: State) -> list[int]:
    """Whether it goes on by first-order steps; small steps in a row; restarts without gain."""
    return state.counts.setdefault("outer", [0, 0, 0])


def _lbfgs(leaf: Tensor) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        [leaf],
        lr=1.0,
        max_iter=1,
        max_eval=_MOST_EVALUATIONS,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=max(10, min(2 * leaf.numel(), 100)),
        line_search_fn="strong_wolfe",
    )


class _Descent:
    """One step of `QuasiNewton`, with what it evaluates on the way."""

    def __init__(self, rule: QuasiNewton, state: State, evaluate: Evaluate, total: float) -> None:
        self.rule, self.state, self.evaluate, self.total = rule, state, evaluate, total
        self.tensors, self.meta = state.tensors, state.meta
        self.nats = 0.5 * rule.tolerance**2
        self.spent, self.info, self.found = 0, StepInfo(math.nan, 0), dict[str, Tensor]()
        self.last: Tensor | None = None  # where the objective was evaluated last

    # The vector that L-BFGS moves is u; the learned numbers are centre + unit · u.

    def iterate(self) -> StepInfo:
        tensors, state = self.tensors, self.state
        u, before = tensors["outer"], tensors["outer"].detach().clone()
        known = {_key(before): (float(tensors["outer_loss"]), tensors["outer_slope"].clone())}
        start = float(tensors["outer_loss"])
        worst = start + 1e3 * (1 + abs(start))

        def closure() -> Tensor:
            key = _key(u)
            if key not in known:
                try:
                    known[key] = self.at(u)
                except NonFiniteLoss:  # a trial beyond what the model can compute: too far
                    known[key] = worst, torch.zeros_like(u)
            value, slope = known[key]
            u.grad = slope.clone()
            return u.new_tensor(value, dtype=torch.float64)

        optimiser = state.optimisers["quasi"]
        optimiser.step(closure)  # type: ignore[arg-type]
        u.grad = None
        end, slope = known.get(_key(u), (math.nan, before))
        rounding = 8 * torch.finfo(u.dtype).eps * (1 + abs(start))
        stuck = not end < start or torch.equal(u.detach(), before)
        if stuck:
            with torch.no_grad():
                u.copy_(before)
            end, slope = known[_key(before)]
        self.keep(end, slope)
        self.settle()
        count = _outer_count(state)
        small = start - end < max(self.nats, rounding)
        count[1] = count[1] + 1 if small else 0
        if not small:
            count[2] = 0
        if stuck or count[1] >= 2:
            self.judge(stuck, rounding)
        return self.report()

    def go_on_by_first_order(self) -> None:
        """From here, which is the best point so far."""
        _outer_count(self.state)[0] = 1
        self.tensors["outer_best"].copy_(self.tensors["outer"].detach())
        self.tensors["outer_least"].copy_(self.tensors["outer_loss"])

    def first_order(self) -> StepInfo:
        """A step of Adam, in standard errors."""
        tensors, rule = self.tensors, self.rule
        u, test = tensors["outer"], rule.iterate_test
        optimiser, slope = self.state.optimisers["first"], tensors["outer_slope"].clone()
        update(optimiser, [u], [slope], test.rate(self.state, _FIRST))
        try:
            self.choose()
        except NonFiniteLoss:  # too far: back to the best point, and on by shorter steps
            self.move(tensors["outer_best"])
            test.shorten(self.state)
        if float(tensors["outer_loss"]) < float(tensors["outer_least"]):
            tensors["outer_least"].copy_(tensors["outer_loss"])
            tensors["outer_best"].copy_(u.detach())
        average, arrived = test.add(self.state, u.detach().clone(), 1.0)
        last = self.state.step + 1 >= rule.steps
        if average is not None:
            self.move(average)
        if (arrived or last) and not float(tensors["outer_loss"]) <= float(tensors["outer_least"]):
            self.move(tensors["outer_best"])
        if arrived:
            self.state.arrived = "the average of the iterates stays where it is"
        return self.report()

    def move(self, to: Tensor) -> None:
        with torch.no_grad():
            self.tensors["outer"].copy_(to)
        self.choose()

    def choose(self) -> None:
        """Evaluate where u is, and keep it."""
        self.keep(*self.at(self.tensors["outer"]))
        self.state.tensors.update(self.found)

    def report(self) -> StepInfo:
        loss = float(self.tensors["outer_loss"]) / self.total
        return StepInfo(loss, self.spent, self.info.stats, self.info.worst)

    def at(self, u: Tensor) -> tuple[float, Tensor]:
        """T · loss and its gradient in u."""
        tensors = self.tensors
        values = tensors["outer_centre"] + tensors["outer_unit"] * u.detach()
        put(self.meta, values)
        self.meta.keep_bounds()
        outside = flat(self.meta.leaves()) != values  # beyond a bound nothing changes
        found = self.evaluate()
        self.spent += found.info.gradients
        self.info, self.last, self.found = found.info, u.detach().clone(), found.keep
        slope = self.total * flat(found.grads) * tensors["outer_unit"]
        return self.total * found.info.loss, slope.masked_fill(outside, 0.0)

    def keep(self, value: float, slope: Tensor) -> None:
        self.tensors["outer_loss"].fill_(value)
        self.tensors["outer_slope"].copy_(slope)

    def settle(self) -> None:
        """Leave `meta`, and what evaluating keeps, at the point that was chosen."""
        u = self.tensors["outer"].detach()
        if self.last is None or not torch.equal(self.last, u):
            self.keep(*self.at(u))
        self.state.tensors.update(self.found)

    def restart(self, values: Tensor | None = None) -> None:
        """Begin anew at these learned values, or where they stand, in units that fit there."""
        tensors = self.tensors
        if values is not None:
            put(self.meta, values)
            self.meta.keep_bounds()
        tensors["outer_centre"].copy_(flat(self.meta.leaves()))
        tensors["outer_unit"].copy_(units(self.meta, self.total))
        with torch.no_grad():
            tensors["outer"].zero_()
        self.state.optimisers["quasi"] = _lbfgs(tensors["outer"])
        self.choose()
        _outer_count(self.state)[1] = 0

    def judge(self, stuck: bool, rounding: float) -> None:
        """Has it arrived? Else go on from a better place, or say that there are jumps."""
        tensors, count = self.tensors, _outer_count(self.state)
        slope = tensors["outer_slope"]
        here, value = tensors["outer"].detach().clone(), float(tensors["outer_loss"])
        if len(slope) > _VERIFIED or slope.dtype != torch.float64:
            if not stuck and count[1] >= 3:
                self.state.arrived = "the objective fell by less than the tolerance, three times"
            elif stuck and count[2] >= 1:
                self.end_or_go_on(rounding)
            elif stuck:
                self.restart()
                count[2] += 1
            return
        curvature = self.curvature(here, slope)
        values, vectors = torch.linalg.eigh(curvature)
        along = vectors.T @ slope
        gain = float((along**2 / values.clamp(min=_FLAT)).sum() / 2)
        tensors["outer_error"].copy_(self.errors(values, vectors))
        trials = []
        if float(values[0]) < -max(_FLAT, 1e-3 * float(values[-1])):
            way = vectors[:, 0] * (-1.0 if along[0] > 0 else 1.0)
            trials = [here + length * way for length in (1.0, -1.0, 0.1, -0.1)]
        elif gain > max(self.nats, rounding):
            newton = -vectors @ (along / values.clamp(min=_FLAT))
            trials = [here + length * newton for length in (1.0, 0.25, 0.05)]
        else:
            trials = self.wider(here)
        best = self.best(trials, value - max(self.nats, rounding))
        if best is not None:
            self.restart(tensors["outer_centre"] + tensors["outer_unit"] * best)
            count[2] = 0
        elif gain <= max(self.nats, rounding) or not trials:
            self.choose()
            self.state.arrived = "a Newton step would gain less than the tolerance"
        else:
            self.choose()
            count[2] += 1
            if count[2] >= 2:
                self.go_on_by_first_order()
            else:
                self.restart()

    def end_or_go_on(self, rounding: float) -> None:
        """No line search gains anything: at an optimum up to rounding, or at a jump."""
        slope = self.tensors["outer_slope"]
        if float(slope.abs().max()) ** 2 <= max(2 * self.nats, rounding):
            self.state.arrived = "the objective changes by rounding alone"
        else:
            self.go_on_by_first_order()

    def curvature(self, here: Tensor, slope: Tensor) -> Tensor:
        """Second derivatives of T · loss in u, by differences of gradients, `[n, n]`."""
        rows = []
        for k in range(len(here)):
            there = here.clone()
            there[k] += _DIFFERENCE
            try:
                rows.append((self.at(there)[1] - slope) / _DIFFERENCE)
            except NonFiniteLoss:
                rows.append(torch.zeros_like(slope))
        dense = torch.stack(rows)
        return 0.5 * (dense + dense.T)

    def errors(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Standard error of each learned number from the curvature, in units of `meta.raw`."""
        each = (vectors**2 / values.clamp(min=_FLAT)).sum(-1).sqrt()
        return each * self.tensors["outer_unit"]

    def wider(self, here: Tensor) -> list[Tensor]:
        """With one of the scales ten times as large: near 0 an objective is flat and not best."""
        trials, first = [], 0
        for name, tensor in learned(self.meta).items():
            if name == "log_scale" and tensor.numel() <= _PROBED:
                for k in range(first, first + tensor.numel()):
                    there = here.clone()
                    there[k] += math.log(10.0) / float(self.tensors["outer_unit"][k])
                    trials.append(there)
            first += tensor.numel()
        return trials

    def best(self, trials: list[Tensor], below: float) -> Tensor | None:
        """The first of these points whose objective is lower than that."""
        for trial in trials:
            try:
                value, _ = self.at(trial)
            except NonFiniteLoss:
                continue
            if value < below:
                return trial
        return None


def _key(u: Tensor) -> bytes:
    return u.detach().cpu().numpy().tobytes()


def moving(state: State) -> pd.DataFrame:
    """See `Fit.moving`."""
    meta, tensors = state.meta, state.tensors
    values = flat(meta.leaves()) if meta.leaves() else torch.zeros(0)
    error = moves = torch.full_like(values, torch.nan)
    if "outer_error" in tensors and not QuasiNewton.has_jumps(state):
        error = tensors["outer_error"]
        own = error / tensors["outer_unit"]
        moves = own * tensors["outer_slope"].abs()  # up to correlations
    elif "trail" in tensors and len(values) == tensors["trail"].shape[-1]:
        first, second = tensors["trail_average"], values
        moves = (second - first).abs()
    columns = {"value": values, "error": error, "moves": moves}
    table = pd.DataFrame({k: v.detach().cpu().double().numpy() for k, v in columns.items()})
    table.insert(0, "quantity", names(meta) if len(values) else [])
    return table
