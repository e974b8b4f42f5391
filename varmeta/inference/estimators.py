"""Estimators of ∇E_{θ∼Alg(f_i,θ0)} g_i(θ), the gradient of what a random algorithm achieves.

θ0 acts on the outcome in two ways: it moves each minimum, and it changes how often each is found
(Huszár, inference.vc, 2019). Here is one family that is unbiased for both. Of the chain
x_{t+1} = m_t(x_t) + σ_t R ξ_t take any δ_t that depends on the past alone, with δ_0 = dx_0/dx, and
u_t = (∂m_t/∂x_t) δ_t + ∂m_t/∂x − δ_{t+1}. Then the gradient is the expectation of

    (g(x_K) − b) Σ_t u_tᵀ R⁻ᵀξ_t/σ_t + δ_Kᵀ∇g(x_K),

b being the mean loss of the task's other particles. What is attached to the path by δ is
differentiated along it, the rest u through the probability of the noise. `Pathwise` has u = 0,
`Score` δ = 0 after the start, `BismutElworthyLi` lets δ fall linearly to 0; `CurvatureGated`
(`gated.py`) and `GatedPathwise` (`gated_path.py`) follow the path where it contracts. `at_ends.py`
has the estimators that look at the ends alone, `evolution.py` those that only evaluate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from varmeta.checked import Checked, Count
from varmeta.inference.chain import Chain, Loss, Slope
from varmeta.inference.descent import RandomDescent

Attached = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
_SHORT = 64  # steps of a run up to which all of its states are kept


@dataclass(frozen=True, eq=False)
class Estimate:
    """Losses and gradient of S particles for each of T tasks.

    Attributes:
        losses: `[S, T]`, g_i at the ends, nats.
        each: `[S, T, n]`, each particle's contribution; their mean estimates the gradient in the
            `Point`'s x, nats.
        ends: `[S, T, D]`.
        pairs: particles s and s + S/2 are not independent: only their means are.
    """

    losses: Tensor
    each: Tensor
    ends: Tensor
    pairs: bool = False

    @property
    def mean(self) -> Tensor:
        """`[T, n]`."""
        return self.each.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """`[T, n]`, of `mean`."""
        return standard_error(self.each, self.pairs)


def standard_error(each: Tensor, pairs: bool = False) -> Tensor:
    """Of a mean over the first dimension; of pairs s and s + S/2 if they depend on each other."""
    if pairs:
        each = each.unflatten(0, (2, -1)).mean(0)
    return each.std(0) / math.sqrt(len(each))


class Estimator(Checked, ABC):
    """A way to estimate the gradient of the expected loss where a random algorithm ends."""

    needs_noise: ClassVar[bool] = False  # in every step
    unbiased: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """For tables."""
        return type(self).__name__

    @abstractmethod
    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """Run the chain, and differentiate the expectation of `loss(θ, φ)`, `[S, T]` nats."""

    def check(self, algorithm: RandomDescent, particles: int, antithetic: bool) -> None:
        """Raise a ValueError if this cannot estimate the gradient of that algorithm."""
        if self.needs_noise and not algorithm.always_noisy:
            raise ValueError(
                f"{self.name} differentiates the probability of injected noise, and the "
                f"algorithm's temperature is 0 in some step: raise it, or use Pathwise() or "
                "EvolutionStrategies()"
            )
        least = (4 if antithetic else 2) if self.needs_noise else 1
        if particles < least:
            raise ValueError(
                f"particles must be at least {least} for the leave-one-out baseline of "
                f"{self.name}{' with antithetic pairs' if antithetic else ''}, got {particles}"
            )

    def kept_vectors(self, run_length: int) -> int:
        """Tensors of θ's size that one particle keeps; flat in the length of the run."""
        return 12


@dataclass(frozen=True)
class Pathwise(Estimator):
    """Differentiate the run itself (backpropagation through it): u = 0.

    Works without injected noise too, the law of the rows and of a random start being independent of
    θ0, given the start's shape. Low variance while runs are short and the flow contracts. Where it
    expands (next to the ridge between two minima) its tail outgrows any number of samples: unbiased
    on paper, far off in practice, and its standard error does not show it, since the paths that
    count are not among those drawn. Hold long runs against `GatedPathwise`.

    Cost: 2 gradient evaluations and a Hessian-vector product a step, a third evaluation in runs of
    more than 64 steps. Keeps the states of a run, not its graph, and of long ones about 2√K.
    """

    remembers: ClassVar[bool] = False  # the way back needs to know more of a step than its state

    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """See `Estimator.estimate`."""
        length, momentum = chain.algorithm.run_length, chain.algorithm.momentum
        every = 1 if length <= _SHORT else math.isqrt(length - 1) + 1
        state, marks = self.begin(chain), []
        for t in range(length):
            if t % every == 0:
                marks.append(state)
            state, _ = self.step(chain, t, state)
        losses, v, each = chain.outside(loss, state[0])
        carried = torch.zeros_like(v)  # dL/dx_t through x_{t+2}, by the momentum
        for first in reversed(range(0, length, every)):
            states, seen, now = [], [], marks.pop()
            last = min(first + every, length) - 1
            for t in range(first, last + 1):
                states.append(now)
                if t < last or self.remembers:
                    now, what = self.step(chain, t, now)
                    seen.append(what)
            for t in reversed(range(first, first + len(states))):
                theta, before, *_ = states.pop()
                linear = chain.linear(t, theta, before, curved=True)
                what = seen.pop() if self.remembers else None
                along, rest = self.back(chain, linear, v, losses, what)
                each = each + rest
                v, carried = along + carried, -momentum * v
        return Estimate(losses, each + chain.start_pull(v + carried), state[0], chain.antithetic)

    def begin(self, chain: Chain) -> State:
        """x_0, x_{−1} = x_0, and what else the way forward carries."""
        start = chain.start().detach()
        return start, start

    def step(self, chain: Chain, t: int, state: State) -> tuple[State, Any]:
        """The next state, and what the way back needs to know of this step."""
        return chain.step(t, state[0], state[1]), None

    def back(
        self, chain: Chain, linear: Slope, v: Tensor, losses: Tensor, seen: Any
    ) -> tuple[Tensor, Tensor]:
        """From dL/dx_{t+1} to dL/dx_t and this step's share of dL/dx."""
        return linear.pull(v)

    def kept_vectors(self, run_length: int) -> int:
        """Two states at each mark, and at each step between two of them."""
        marks = run_length if run_length <= _SHORT else 2 * math.isqrt(run_length)
        return super().kept_vectors(run_length) + 2 * marks


class Weighted(Estimator):
    """The family of this file: what every choice of δ_t has in common."""

    needs_noise: ClassVar[bool] = True

    @abstractmethod
    def path(self, chain: Chain) -> Path:
        """The choice of δ_t."""

    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """See `Estimator.estimate`."""
        ends, weights, attached = self.weights(chain)
        losses, along, rest = chain.outside(loss, ends)
        centred = losses - others_mean(losses, chain.antithetic)
        each = centred[..., None] * weights + attached(along) + rest
        return Estimate(losses, each, ends, chain.antithetic)

    def weights(self, chain: Chain) -> tuple[Tensor, Tensor, Attached]:
        """Ends `[S, T, D]`, Σ_t u_tᵀR⁻ᵀξ_t/σ_t `[S, T, n]`, and a ↦ δ_Kᵀa."""
        path, momentum = self.path(chain), chain.algorithm.momentum
        theta = before = chain.start().detach()
        delta: Attached = chain.start_pull
        delta_before = delta  # of x_t and x_{t−1}; the start has no velocity
        weights = theta.new_zeros(*theta.shape[:2], chain.point.size)
        for t in range(chain.algorithm.run_length):
            linear = chain.linear(t, theta, before, curved=t == 0 or path.curved(t))
            noise = chain.noise.normal(t)
            score = chain.root.inverse_T(noise) / chain.sigma(t)
            along, rest = path.pull(linear, score)
            weights += rest + delta(along)
            if momentum:
                weights -= momentum * delta_before(score)
            after = path.advance(t, linear, along)
            weights -= after(score)
            delta, delta_before = after, delta
            theta, before = linear.value + chain.sigma(t) * chain.root(noise), theta
        return theta, weights, delta


class Path(ABC):
    """δ_t, step by step."""

    @abstractmethod
    def curved(self, t: int) -> bool:
        """Whether δ_t is other than 0, so that ∂m_t/∂x_t is wanted."""

    def pull(self, linear: Slope, score: Tensor) -> tuple[Tensor, Tensor]:
        """`linear.pull(score)`, or the same by other means."""
        return linear.pull(score)

    @abstractmethod
    def advance(self, t: int, linear: Slope, along: Tensor) -> Attached:
        """a ↦ δ_{t+1}ᵀa, `[S, T, D]` to `[S, T, n]`.

        `linear` is m_t at x_t. δ_{t+1} may not depend on ξ_t, nor on `along`, which is made of it;
        δ_{t+2} may.
        """


@dataclass(frozen=True)
class Score(Weighted):
    """The score function, or REINFORCE (Williams 1992): δ = 0 after the start.

    Needs injected noise in every step. No second derivatives, unless parameters are shared; the
    loss need not be differentiable in θ. Its variance grows with the length of the run, and
    diverges as the step size goes to 0.

    Cost: a gradient evaluation a step.
    """

    def path(self, chain: Chain) -> Path:
        """See `Weighted.path`."""
        return Linearly(chain, 0)


@dataclass(frozen=True)
class BismutElworthyLi(Weighted):
    """δ_t = max(0, 1 − t/S) on θ0: the noise of the first S steps takes the derivative over.

    A discrete Bismut–Elworthy–Li formula (Elworthy & Li 1994, Formulae for the Derivatives of Heat
    Semigroups). Needs injected noise in every step. Its variance does not diverge as the step size
    goes to 0, and does not care whether the flow expands. Scales and φ, which act in every step,
    are treated as by `Score`. With S ≤ K the loss need not be differentiable in θ, so that it also
    differentiates the probability of a basin, as a region that stays where it is.

    Cost: a gradient evaluation a step, and a Hessian-vector product in the first S.

    Attributes:
        horizon: S; None for the length of the run.
    """

    horizon: Count | None = None

    def path(self, chain: Chain) -> Path:
        """See `Weighted.path`."""
        return Linearly(chain, self.horizon or chain.algorithm.run_length)


@dataclass(frozen=True, eq=False)
class Linearly(Path):
    """δ_t = max(0, 1 − t/horizon) on θ0, 0 on all else; horizon 0: δ = 0."""

    chain: Chain
    horizon: int

    def curved(self, t: int) -> bool:
        """See `Path.curved`."""
        return t < self.horizon

    def advance(self, t: int, linear: Slope, along: Tensor) -> Attached:
        """See `Path.advance`."""
        left = max(0.0, 1 - (t + 1) / self.horizon) if self.horizon else 0.0
        return lambda a: left * on_loc(self.chain, a)


def on_loc(chain: Chain, a: Tensor) -> Tensor:
    """aᵀ dθ0/dx: `[S, T, D]` to `[S, T, n]`."""
    return torch.nn.functional.pad(
        a * chain.point.units["loc"], (0, chain.point.size - a.shape[-1])
    )


def others_mean(values: Tensor, pairs: bool = False) -> Tensor:
    """The mean over the other particles `[S, ...]`; of the other pairs, if they come in pairs.

    A baseline must not depend on a particle's own noise, which its antithetic partner shares.
    """
    own = values
    if pairs:
        own = values.unflatten(0, (2, -1)).mean(0).repeat(2, *[1] * (values.dim() - 1))
    count = len(values) // 2 if pairs else len(values)
    return (values.mean(0) * count - own) / (count - 1)
