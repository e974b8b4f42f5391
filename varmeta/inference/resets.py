"""When the q_i go back to the prior, which of them, and how far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reset:
    """Put q_i back to N(θ0, Σ), optimiser state included, so that they stay reachable from θ0.

    (Proposed for joint optimisation in Huszár, inference.vc, 2019; as part of continual trajectory
    shifting in Shin et al., 2021.)

    Attributes:
        every: steps to the first reset, and between two. Choose a divisor of the number of steps,
            so that the last q_i have had as many steps as the others.
        fraction: share of the tasks at each reset. They take turns: 1/4 resets every fourth task,
            the next time the three others' first, and so on.
        amount: how far, from 0 to 1; 1 is all the way.
        growth: every wait is so many times as long as the one before; 1 keeps the period.
        until: no reset after this step; None for no end.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> Reset(every=10, growth=2.0).number(30)  # resets before steps 10, 30, 70, …
        1
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

    def number(self, step: int) -> int | None:
        """Which reset, counted from 0, comes before step `step`; None for none."""
        if self.until is not None and step > self.until:
            return None
        if self.growth == 1:
            count, rest = divmod(step, self.every)
            return count - 1 if step and not rest else None
        count, wait, at = 0, float(self.every), float(self.every)
        while round(at) < step:
            count, wait = count + 1, wait * self.growth
            at += wait
        return count if round(at) == step else None

    def which(self, number: int) -> slice:
        """The tasks of that reset."""
        turns = max(round(1 / self.fraction), 1)
        return slice(number % turns, None, turns)
