"""Every strategy, small: the laws in `test_laws.py` hold for each. A new one is a new line."""

from __future__ import annotations

from dataclasses import dataclass

from varmeta import (
    IMAML,
    CompletePooling,
    GradientDescent,
    JointVariational,
    Langevin,
    NoPooling,
    PyroNUTS,
    Stochastic,
    Strategy,
)


@dataclass(frozen=True)
class Entry:
    """A strategy and what it promises.

    `separate`: adapting tasks together gives each the posterior that it gets alone (the others
    draw their noise for all tasks at once). `exact_resume`: a resumed run is the uninterrupted one.
    """

    strategy: Strategy
    separate: bool = False
    exact_resume: bool = True


CATALOGUE = {
    "imaml": Entry(IMAML(steps=6), separate=True),
    "imaml delta": Entry(IMAML(steps=6, posterior_kind="delta"), separate=True),
    "imaml, gradient descent": Entry(
        IMAML(steps=6, minimiser=GradientDescent(0.01, 100)), separate=True
    ),
    "joint": Entry(JointVariational(steps=8, adapt_steps=8)),
    "joint reset": Entry(JointVariational(steps=9, reset_every=3, adapt_steps=8)),
    "joint delta": Entry(JointVariational(q="delta", steps=8, adapt_steps=8), separate=True),
    "stochastic": Entry(Stochastic(Langevin(run_length=5), steps=4, draws=20)),
    "stochastic score": Entry(
        Stochastic(Langevin(run_length=5), estimator="score", steps=4, draws=20)
    ),
    "sgd": Entry(
        Stochastic(
            Langevin(run_length=5, step_size=0.01, temperature=0.0, batch_rows=2), steps=4, draws=20
        )
    ),
    "no pooling": Entry(NoPooling(steps=8, adapt_steps=8)),
    "complete pooling": Entry(CompletePooling(draws=20), separate=True),
    "nuts": Entry(PyroNUTS(draws=6, warmup=4, chains=2, proposals=50), exact_resume=False),
}
