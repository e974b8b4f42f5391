"""When the q_i go back to the prior, which of them, and how far."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Reset:
    """Put q_i back to N(θ0, Σ), optimiser state included, so that they stay reachable from θ0.

    From one of its resets to the next a q_i's learning rate falls to 0 on a cosine: every cycle is
    a whole adaptation, as new tasks get one, while the prior moves.

    (Proposed for joint optimisation in Huszár, inference.vc, 2019; as part of continual trajectory
    shifting in Shin et al., 2021.)

    Attributes:
        every: steps to the first reset, and between two. Choose a divisor of the number of steps,
            so that the last cycle is a whole one.
        fraction: share of the tasks at each reset. They take turns: 1/4 resets every fourth task,
            the next time the three others' first, and so on.
        amount: how far, from 0 to 1; 1 is all the way.
        growth: every wait is so many times as long as the one before; 1 keeps the period.
        until: no reset after this step; None for no end.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> Reset(every=10, growth=2.0).times(100)
        (10, 30, 70)
    """

    every: int
    fraction: float = 1.0
    amount: float = 1.0
    growth: float = 1.0
    until: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        for name in ("fraction", "amount"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, got {self.growth}")

    def times(self, steps: int) -> tuple[int, ...]:
        """Before which steps there is a reset, in a run of so many."""
        return _times(self, steps)

    def which(self, number: int) -> slice:
        """The tasks of reset `number`, counted from 0."""
        return slice(number % self.turns, None, self.turns)

    @property
    def turns(self) -> int:
        """How many resets it takes until every task has had one."""
        return max(round(1 / self.fraction), 1)

    def phase(self, step: int, steps: int, task: int) -> float:
        """The share of its present cycle, in [0, 1), that a task has behind it at a step."""
        times, turn = self.times(steps), task % self.turns
        own = (0, *times[turn :: self.turns], steps)
        cycle = bisect_right(own, step) - 1
        return (step - own[cycle]) / (own[cycle + 1] - own[cycle])


@lru_cache
def _times(schedule: Reset, steps: int) -> tuple[int, ...]:
    out, wait, at = [], float(schedule.every), float(schedule.every)
    end = steps if schedule.until is None else min(steps, schedule.until + 1)
    while round(at) < end:
        out.append(round(at))
        wait *= schedule.growth
        at += wait
    return tuple(out)
