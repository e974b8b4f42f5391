"""When the q_i go back to the prior, which of them, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from varmeta.checked import Checked, Count, Within

_FINEST = 10**6  # denominators of a fraction, so that resets are counted without rounding


@dataclass(frozen=True)
class Reset(Checked):
    """Put q_i back to N(θ0, Σ), optimiser state included, so that they stay reachable from θ0.

    From one of its resets to the next a q_i's learning rate falls to 0 on a cosine: every cycle is
    a whole adaptation, as new tasks get one, while the prior moves.

    (Proposed for joint optimisation in Huszár, inference.vc, 2019; as part of continual trajectory
    shifting in Shin et al., 2021.)

    Attributes:
        every: steps to the first reset, and between two. Choose a divisor of the number of steps,
            so that the last cycle is a whole one.
        fraction: share of the tasks at each reset. They take turns in their order: of T tasks the
            first reset takes the first fraction · T, the next one goes on after these, and so on
            round and round. What is not whole is carried over, so that after n resets each task has
            had n · fraction, rounded down or up.
        amount: how far, from 0 to 1; 1 is all the way.
        growth: every wait is so many times as long as the one before; 1 keeps the period.
        until: no reset after this step; None for no end.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> Reset(every=10, growth=2.0).times(100)
        (10, 30, 70)
    """

    every: Count
    fraction: Annotated[float, Within(0, 1, above=True)] = 1.0
    amount: Annotated[float, Within(0, 1, above=True)] = 1.0
    growth: Annotated[float, Within(1)] = 1.0
    until: Annotated[int, Within(0)] | None = None

    def times(self, steps: int) -> tuple[int, ...]:
        """Before which steps there is a reset, in a run of so many."""
        return _times(self, steps)

    def which(self, number: int, tasks: int) -> Tensor:
        """`[T]` bool: whether each of so many tasks is reset at reset `number`, counted from 0."""
        return self._done(number + 1, tasks) > self._done(number, tasks)

    def phases(self, step: int, steps: int, tasks: int) -> Tensor:
        """`[T]` float64: the share of its cycle, in [0, 1), that each task has behind it at a step.

        A cycle goes from one of a task's resets, or the start of the run, to its next one, or the
        end of the run.
        """
        times = self.times(steps)
        began = torch.zeros(tasks, dtype=torch.float64)
        ends = torch.full_like(began, steps)
        for number, time in enumerate(times):
            which = self.which(number, tasks)
            if time <= step:
                began[which] = time
            else:
                ends[which & (ends == steps)] = time
        return (step - began) / (ends - began)

    def _done(self, resets: int, tasks: int) -> Tensor:
        """`[T]` int: how many of the first `resets` resets took each task, in whole numbers."""
        share = max(Fraction(self.fraction).limit_denominator(_FINEST), Fraction(1, _FINEST))
        last = torch.arange(tasks - 1, -1, -1)  # the first task has the shortest wait
        whole = share.denominator * tasks
        return (resets * share.numerator * tasks + last * share.denominator) // whole


@lru_cache
def _times(schedule: Reset, steps: int) -> tuple[int, ...]:
    out, wait, at = [], float(schedule.every), float(schedule.every)
    end = steps if schedule.until is None else min(steps, schedule.until + 1)
    while round(at) < end:
        out.append(round(at))
        wait *= schedule.growth
        at += wait
    return tuple(out)
