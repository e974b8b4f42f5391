"""How what is learned across tasks moves, and when it has arrived.

Two ways, for objectives without noise and with it:

- `QuasiNewton`: PyTorch's L-BFGS with a strong-Wolfe line search (Nocedal & Wright, 2006, Numerical
  Optimization, chapters 3 and 7) on the total objective in units in which its curvature is about 1.
  Where it slows down, a Newton step from differences of gradients says how far the optimum still
  is, in nats and in standard errors of each learned quantity.
- `IterateTest`: steps of one size until the iterates are stationary (split R-hat of their block
  means, Monte Carlo error of their average), then steps of half the size until the average moves
  no more, and that average is the answer (Dhaka, Catalina, Andersen, Magnusson, Huggins & Vehtari,
  2020, Robust, Accurate Stochastic Optimization for Variational Inference; Welandawe, Andersen,
  Vehtari & Huggins, 2022, Robust, Automated, and Accurate Black-box Variational Inference).

An objective that turns out to have jumps (an inner minimum that moves to another basin) is left by
the first way and gone on with by the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from varmeta.inference.base import Meta, NonFiniteLoss, State, StepInfo, decayed, update

EXACT, NOISY = 0.01, 0.2  # standard errors: default tolerances without noise and with it
_VERIFIED = 40  # learned numbers up to which a Newton step is made from differences of gradients
_DIFFERENCE = 0.02  # of a unit, the step of these differences
_FLAT = 1e-4  # nats per unit²: curvature below which the data say nothing of a direction
_MOST_EVALUATIONS = 25  # of one line search
_FIRST = 0.5  # standard errors, the first size of first-order steps where there are jumps
_PROBED = 10  # scales up to which a wider value is tried before a run has arrived
_BLOCKS = 10  # block means in each half of the window that is tested
_FIRST_BLOCK = 2  # steps in the first block
_GROWTH = 1.5  # of a half of the window, from one test to the next
_WATCHED = 1000  # learned numbers, at most, that are tested
_WORST_RHAT, _MEAN_RHAT = 1.3, 1.1
_STREAM = 100  # tasks whose information sets the units where there is no end of them

Evaluate = Callable[[], "Evaluated"]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The objective and its gradient at the learned values as they stand.

    Attributes:
        info: loss (nats per task), gradient evaluations and diagnostics, as of a step.
        grads: d loss / d each leaf of `Meta`.
        keep: what a state's tensors of these names become if the point is kept.
    """

    info: StepInfo
    grads: list[Tensor]
    keep: dict[str, Tensor] = field(default_factory=dict)


def learned(meta: Meta) -> dict[str, Tensor]:
    """What of `meta.raw` is learned by gradients."""
    return {name: tensor for name, tensor in meta.raw.items() if tensor.requires_grad}


def units(meta: Meta, total: float, raw: Mapping[str, Tensor] | None = None) -> Tensor:
    """About one standard error of each learned number, in units of `meta.raw`, `[n]`.

    σ/√T for θ0 (and the low-rank factor), 1/√(2 T n_m) for the log scale of n_m coordinates, 1/√T
    units of its prior for φ: what T tasks would leave open if each showed its θ_i. `raw`: of which
    parts of `meta.raw`; those with a gradient if None.
    """
    tasks = total if math.isfinite(total) else _STREAM
    with torch.no_grad():
        prior, origin = meta.prior, meta.origin
        width = prior.scale / origin.scale
        if prior.factor is not None:
            width = (prior.scale**2 + prior.factor.square().sum(-1)).sqrt() / origin.scale
        width = width.clamp(min=1e-12)
        sizes = prior.groups.bincount(minlength=len(prior.log_scale))
        own = {
            "loc": width,
            "log_scale": (2.0 * sizes.clamp(min=1)).to(width).rsqrt(),
            "factor": None if prior.factor is None else width[:, None].expand_as(prior.factor),
        }
        parts = []
        for name, tensor in (learned(meta) if raw is None else raw).items():
            unit = own.get(name)
            unit = torch.ones_like(tensor) if unit is None else unit
            parts.append(unit.reshape(-1).detach())
        return torch.cat(parts) / math.sqrt(tasks)


def names(meta: Meta) -> list[str]:
    """What each learned number is: `loc[slope]`, `log_scale[slope]`, `shared[noise]`, …."""
    density, out = meta.density, list[str]()
    sites = [
        s.name if s.size == 1 else f"{s.name}.{k}" for s in density.sites for k in range(s.size)
    ]
    shared = [
        s.name if s.size == 1 else f"{s.name}.{k}"
        for s in density.shared_sites
        for k in range(s.size)
    ]
    known = {"loc": sites, "log_scale": list(meta.origin.modules.names), "shared": shared}
    for name, tensor in learned(meta).items():
        labels = known.get(name)
        if labels is None or len(labels) != tensor.numel():
            labels = [str(k) for k in range(tensor.numel())]
        out += [f"{name}[{label}]" for label in labels]
    return out


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector, `[n]`."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def put(meta: Meta, values: Tensor) -> None:
    """Set what is learned to `values` `[n]`."""
    leaves = meta.leaves()
    with torch.no_grad():
        for leaf, part in zip(leaves, values.split([t.numel() for t in leaves]), strict=True):
            leaf.copy_(part.reshape(leaf.shape))


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


# -- without noise ---------------------------------------------------------------------------------


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
        if math.isnan(float(state.tensors["outer_loss"])):
            run.restart()
        return run.first_order() if self.has_jumps(state) else run.iterate()

    @staticmethod
    def has_jumps(state: State) -> bool:
        """Whether the objective was found not to be smooth."""
        return bool(_outer_count(state)[0])


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

    def first_order(self) -> StepInfo:
        """A step of Adam, in standard errors."""
        tensors, rule = self.tensors, self.rule
        u, test = tensors["outer"], rule.iterate_test
        optimiser, slope = self.state.optimisers["first"], tensors["outer_slope"].clone()
        update(optimiser, [u], [slope], test.rate(self.state, _FIRST))
        self.choose()
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
                count[0] = 1
            else:
                self.restart()

    def end_or_go_on(self, rounding: float) -> None:
        """No line search gains anything: at an optimum up to rounding, or at a jump."""
        slope = self.tensors["outer_slope"]
        if float(slope.abs().max()) ** 2 <= max(2 * self.nats, rounding):
            self.state.arrived = "the objective changes by rounding alone"
        else:
            _outer_count(self.state)[0] = 1

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


# -- with noise ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IterateTest:
    """Whether the iterates of noisy steps are stationary, and their average known well enough.

    The last iterates are cut in two segments of ten blocks. Where R-hat of the block means says
    that both have the same law, and the second one's average has a Monte Carlo error within the
    tolerance, the steps of this size have done what they can: their size is halved, and when the
    average then stays where it was the run has arrived. In the last quarter of the limit the size
    falls to 0 on a cosine, so that a run which the limit ends is as good as it can be.

    Attributes:
        tolerance: standard errors, see `units`.
        steps: the limit.
    """

    tolerance: float
    steps: int

    def begin(self, like: Tensor) -> dict[str, Tensor]:
        """Tensors for a state that has taken no step; `like` `[n]` is what is tested."""
        watched = min(len(like), _WATCHED)
        zeros = like.new_zeros(2, _BLOCKS, watched)
        return {
            "trail": zeros,
            "trail_sum": like.new_zeros(2, len(like)),
            "trail_average": torch.full_like(like, torch.nan),
        }

    def rate(self, state: State, base: float) -> float:
        """The step size now, from its first value."""
        tail = max(self.steps // 4, 1)
        end = decayed(1.0, max(state.step - (self.steps - tail), 0), tail)
        return float(base * 0.5 ** _trail_count(state)[4] * end)

    def add(self, state: State, values: Tensor, unit: Tensor | float) -> tuple[Tensor | None, bool]:
        """Count an iterate `[n]` in.

        Returns:
            The average of the last segment where steps of this size have done what they can, else
            None; and whether the run has arrived there.
        """
        tensors, count = state.tensors, _trail_count(state)
        inside, block, size, before, halvings = count
        tensors["trail"][1, block] += _watched(values, tensors["trail"].shape[-1]) / size
        tensors["trail_sum"][1] += values
        inside += 1
        if inside < size or block + 1 < _BLOCKS:
            block, inside = (block + 1, 0) if inside == size else (block, inside)
            count[:2] = inside, block
            return None, False
        average, arrived = None, False
        if before and self._settled(tensors, unit):
            average = tensors["trail_sum"][1] / (_BLOCKS * size)
            gone = (average - tensors["trail_average"]).abs() / unit
            arrived = bool(gone.max() <= 2 * self.tolerance)  # each has an error of its own
            tensors["trail_average"].copy_(average)
            count[:] = 0, 0, size, 0, halvings + 1
        else:
            for name in ("trail", "trail_sum"):
                tensors[name][0] = tensors[name][1]
            longer = max(size + 1, round(size * _GROWTH)) if before else size
            count[:] = 0, 0, longer, size, halvings
        for name in ("trail", "trail_sum"):
            tensors[name][1] = 0.0
        return average, arrived

    def _settled(self, tensors: dict[str, Tensor], unit: Tensor | float) -> bool:
        """Whether both segments have the same law, and the second's average a small error."""
        trail = tensors["trail"]  # [2, blocks, watched]
        within = trail.var(1)
        between = (trail[0].mean(0) - trail[1].mean(0)).square() / 2
        ratio = torch.where(between > 0, between / within.mean(0), 0.0)
        rhat = ((_BLOCKS - 1) / _BLOCKS + ratio).sqrt()
        scale = _watched(unit, trail.shape[-1]) if isinstance(unit, Tensor) else unit
        error = (within[1] / _BLOCKS).sqrt() / scale
        same = (rhat.max() <= _WORST_RHAT) & (rhat.square().mean() <= _MEAN_RHAT**2)
        return bool(same & (error.max() <= self.tolerance))


def _trail_count(state: State) -> list[int]:
    """Steps in this block, blocks in this segment, steps a block (now, before), halvings."""
    return state.counts.setdefault("trail", [0, 0, _FIRST_BLOCK, 0, 0])


def _watched(values: Tensor, count: int) -> Tensor:
    """The numbers that are tested: all, or so many evenly spread ones."""
    if count == len(values):
        return values
    return values[torch.linspace(0, len(values) - 1, count, device=values.device).long()]
