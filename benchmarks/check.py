"""Is an implementation's meta-gradient right? Asked before anything is timed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.peers import Implementation, Peer
from benchmarks.reference import Reference, relative_error
from benchmarks.workloads import Workload

TASK_LIMIT = 1e-3  # on the median over tasks: a ReLU that flips in float32 spoils single tasks
STEP_LIMIT = 0.1  # on the whole meta-step, which such tasks may spoil too


@dataclass(frozen=True)
class Check:
    """Relative errors against the float64 reference.

    Attributes:
        median: over the tasks that were looked at.
        worst: over them.
        step: of the gradient of the mean loss over all tasks; NaN for the floor.
        loss: of that mean loss; NaN for the floor.
        tasks: how many tasks were looked at.
        passed: None where the implementation does not claim this gradient.
    """

    median: float
    worst: float
    step: float
    loss: float
    tasks: int
    passed: bool | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(
    peer: Peer,
    made: Implementation,
    workload: Workload,
    reference: Reference,
    seconds: float = 4.0,
) -> Check:
    """Whole step, then single tasks: at least one, at most 25, until `seconds` are over."""
    if peer.check == "probe":
        got = made.probe(reference.probe)  # type: ignore[attr-defined]
        pairs = zip(got, reference.probe_gradients, strict=False)
        errors = [relative_error(a, b) for a, b in pairs]
        nan = float("nan")
        return _summary(errors, nan, nan, True)
    count = workload.tasks
    stop = time.perf_counter() + seconds
    even = np.full(count, 1 / count, np.float32)
    loss, gradient = made.step(even)
    step = relative_error(gradient, reference.gradients[:count].mean(0))
    wanted = reference.losses[:count].mean()
    off = abs(loss - wanted) / abs(wanted)
    errors = []
    for index in np.linspace(0, count - 1, min(count, 25)).round().astype(int):
        onehot = np.zeros(count, np.float32)
        onehot[index] = 1.0
        errors.append(relative_error(made.step(onehot)[1], reference.gradients[index]))
        if time.perf_counter() > stop:
            break
    return _summary(errors, step, float(off), peer.check == "gradient")


def _summary(errors: list[float], step: float, loss: float, claimed: bool) -> Check:
    median, worst = float(np.median(errors)), float(np.max(errors))
    good = median < TASK_LIMIT and not step > STEP_LIMIT and not np.isnan(worst)
    return Check(median, worst, step, loss, len(errors), good if claimed else None)
