"""Random algorithms: where a task's parameters go from θ0, as a law rather than a point.

All are one chain on E_i = f_i + ½(θ−θ0)ᵀΛ(θ−θ0): noisy gradient descent
x_{t+1} = x_t + μ(x_t − x_{t−1}) − clip(P_t∇E_i(x_t)) + √(2τ_t P_t) ξ_t, with a random start, random
rows and injected noise each optional. `varmeta.inference.chain` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from varmeta.checked import Checked, Count, NotNegative, Positive, Within

_FIRST, _LAST = 0.8, 0.1  # paces of a run without a step size


@dataclass(frozen=True)
class RandomDescent(Checked):
    """Noisy gradient descent anchored at θ0; `Langevin`, `SGD`, `RandomRestarts` are cases of it.

    Attributes:
        run_length: steps of a run, K.
        step_size: one number for all coordinates, units of θ² per nat (P = step_size · I); None for
            P_t = η_t |∇²E_i(θ̂_i)|⁻¹, so that every task moves at its own pace (up to 200
            coordinates). θ̂_i is where a descent from θ0 by Newton steps comes to rest, and η_t
            falls from 0.8 to 0.1, from step to step by the same factor; beyond the run it stays
            there. On a quadratic a run of 25 steps keeps 5e-6 of the distance at which it began.
            P belongs to the algorithm: no gradient is taken of it. Finite steps widen the
            stationary law: by a factor 1/(1 − step·curvature/2) in variance on a quadratic, and
            by 1.07 where a default run ends.
        temperature: τ of the injected noise; 1 samples the posterior, 0 injects none. Several
            numbers are a schedule, one for each step: `numpy.geomspace(4, 1, 25)`.
        momentum: μ of the heavy ball, in [0, 1).
        batch_rows: rows of each task used in a step, rescaled to the whole sum; None for all.
        replacement: draw these rows with replacement; else go through all rows of a task in a
            random order, then in another one. An epoch's last step takes what is left.
        start_scale: begin at θ0 + start_scale · s ∘ N(0, I), s the prior's scales; 0 begins at θ0.
        clip: the gradient moves no coordinate by more than so many prior standard deviations in a
            step, so that runs stay finite where the loss grows exponentially (a log link, a log
            scale, a start far off) and the expectation of such a loss exists. On a quadratic, the
            default never acts on a run that begins within 3 of the minimum, up to noise. No
            gradient is taken of the bound. None: no bound, and no promise.

    Raises:
        ValueError: a number out of range, a schedule of another length.
    """

    run_length: Count = 25
    step_size: Positive | None = None
    temperature: NotNegative | Sequence[NotNegative] = 0.0
    momentum: Annotated[float, Within(0, 1, below=True)] = 0.0
    batch_rows: Count | None = None
    replacement: bool = False
    start_scale: NotNegative = 0.0
    clip: Positive | None = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self.temperature, "__len__"):
            schedule = tuple(float(t) for t in self.temperature)  # type: ignore[union-attr]
            if len(schedule) != self.run_length:
                raise ValueError(
                    f"temperature must be one number, or one for each of the {self.run_length} "
                    f"steps, got {len(schedule)} numbers"
                )
            object.__setattr__(self, "temperature", schedule)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """τ_t of each step."""
        if isinstance(self.temperature, tuple):
            return self.temperature
        return (float(self.temperature),) * self.run_length  # type: ignore[arg-type]

    @property
    def paces(self) -> tuple[float, ...]:
        """η_t of each step: 1 with a step size, else as `step_size` says."""
        if self.step_size is not None:
            return (1.0,) * self.run_length
        last = self.run_length - 1
        fall = _LAST / _FIRST
        return tuple(_FIRST * fall ** (t / last if last else 1.0) for t in range(self.run_length))

    @property
    def always_noisy(self) -> bool:
        """Whether every step injects noise, so that every transition has a density."""
        return min(self.temperatures) > 0


@dataclass(frozen=True)
class Langevin(RandomDescent):
    """Anchored Langevin dynamics (unadjusted): `RandomDescent` with a temperature of 1.

    Source: Welling & Teh (2011) for the minibatch version; the anchor is Huszár's (2019).
    """

    temperature: NotNegative | Sequence[NotNegative] = 1.0


@dataclass(frozen=True)
class SGD(RandomDescent):
    """Anchored minibatch SGD: `RandomDescent` on 8 random rows of a task at a time.

    Its randomness is that of the rows, whose law does not depend on θ0; inject noise
    (`temperature`) if an estimator needs transition densities.
    """

    batch_rows: Count | None = 8


@dataclass(frozen=True)
class RandomRestarts(RandomDescent):
    """Plain gradient descent from a random start: `RandomDescent` from N(θ0, Σ)."""

    start_scale: NotNegative = 1.0
