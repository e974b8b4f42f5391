"""Every strategy, small: the laws in `test_laws.py` hold for each. A new one is a new line."""

from __future__ import annotations

from dataclasses import dataclass

from varmeta import (
    ABML,
    CG,
    FOMAML,
    IMAML,
    MAML,
    SGD,
    Adam,
    AmortisedVariational,
    BasinCorrected,
    BismutElworthyLi,
    BlockDiagonal,
    CompletePooling,
    Diagonal,
    EvolutionStrategies,
    GatedPathwise,
    GradientDescent,
    Implicit,
    ImplicitAtParticles,
    JointVariational,
    Langevin,
    LaplaceEvidence,
    LogDet,
    MetaSGD,
    NestedLaplace,
    NoPooling,
    OneStep,
    Pathwise,
    PersistentES,
    PriorDominated,
    ProximalDescent,
    PyroNUTS,
    PyroSVI,
    RandomRestarts,
    Reptile,
    Reset,
    Score,
    SigmaIMAML,
    SigmaMAML,
    SigmaReptile,
    StationaryCovariance,
    Stochastic,
    Strategy,
    Unrolled,
)

FEW = GradientDescent(0.01, 5, tolerance=0)


@dataclass(frozen=True)
class Entry:
    """A strategy and what it promises.

    `separate`: adapting tasks together gives each the posterior that it gets alone (the others
    draw their noise for all tasks at once).
    """

    strategy: Strategy
    separate: bool = False


CATALOGUE = {
    "imaml": Entry(IMAML(steps=6), separate=True),
    "imaml delta": Entry(IMAML(steps=6, posterior_kind="delta"), separate=True),
    "imaml, gradient descent": Entry(
        IMAML(steps=6, minimiser=GradientDescent(0.01, 100)), separate=True
    ),
    "imaml, the paper's budget": Entry(
        IMAML(
            steps=6,
            minimiser=GradientDescent(0.01, 16, tolerance=0),
            adjoint=Implicit(CG(5, tolerance=0)),
        ),
        separate=True,
    ),
    "imaml, warm start": Entry(IMAML(steps=6, warm_start=True), separate=True),
    "imaml, two at once": Entry(IMAML(steps=6, tasks_at_once=2), separate=True),
    "imaml, one step": Entry(IMAML(steps=6, adjoint=OneStep(0.01)), separate=True),
    "imaml, unrolled Adam": Entry(
        IMAML(steps=4, minimiser=Adam(0.1, 10, tolerance=0), adjoint=Unrolled(checkpoint=3)),
        separate=True,
    ),
    "maml": Entry(MAML(steps=6, minimiser=FEW), separate=True),
    "maml with prior": Entry(
        MAML(steps=6, minimiser=FEW, with_prior=True, learn_scale=True), separate=True
    ),
    "fomaml": Entry(FOMAML(steps=6, minimiser=FEW), separate=True),
    "meta-sgd": Entry(MetaSGD(steps=6, minimiser=FEW), separate=True),
    "reptile": Entry(Reptile(steps=6, minimiser=FEW), separate=True),
    "sigma-imaml": Entry(SigmaIMAML(steps=6), separate=True),
    "sigma-imaml, block-diagonal, joint": Entry(
        SigmaIMAML(steps=6, adjoint=Implicit(BlockDiagonal()), loc_from="joint"), separate=True
    ),
    "sigma-imaml, diagonal": Entry(
        SigmaIMAML(steps=6, adjoint=Implicit(Diagonal()), minimiser=ProximalDescent(0.01, 100)),
        separate=True,
    ),
    "sigma-imaml, prior-dominated": Entry(
        SigmaIMAML(steps=6, adjoint=Implicit(PriorDominated())), separate=True
    ),
    "sigma-maml": Entry(
        SigmaMAML(steps=4, minimiser=ProximalDescent(0.01, 20, tolerance=0)), separate=True
    ),
    "sigma-maml, scales implicit, joint": Entry(
        SigmaMAML(
            steps=4,
            minimiser=ProximalDescent(0.01, 20, tolerance=0),
            scale_adjoint=Implicit(Diagonal(probes=2)),
            loc_from="joint",
        ),
        separate=True,
    ),
    "sigma-reptile": Entry(SigmaReptile(steps=6), separate=True),
    "amortised": Entry(AmortisedVariational(steps=6), separate=True),
    "amortised query": Entry(AmortisedVariational(outside="query", steps=6), separate=True),
    "amortised laplace": Entry(
        AmortisedVariational(q="laplace", outside="query", steps=6), separate=True
    ),
    "laplace evidence": Entry(LaplaceEvidence(steps=6), separate=True),
    "laplace evidence, a probe": Entry(
        LaplaceEvidence(steps=4, logdet=LogDet(probes=1)), separate=True
    ),
    "abml": Entry(ABML(steps=6, minimiser=FEW, samples=4)),
    "joint": Entry(JointVariational(steps=8, adapt_steps=8)),
    "joint reset": Entry(JointVariational(steps=9, resets=Reset(3), adapt_steps=8)),
    "joint full": Entry(JointVariational(q="full", steps=8, adapt_steps=8)),
    "joint low rank, half resets": Entry(
        JointVariational(
            q="low_rank", rank=1, steps=9, adapt_steps=8, resets=Reset(2, fraction=0.5, amount=0.5)
        )
    ),
    "joint whitened": Entry(JointVariational(parametrisation="whitened", steps=8, adapt_steps=8)),
    "joint closed form": Entry(
        JointVariational(prior_update="closed_form", batch_rows=2, steps=8, adapt_steps=8)
    ),
    "joint cubature, shift": Entry(
        JointVariational(expectation="cubature", shift=True, steps=8, adapt_steps=8), separate=True
    ),
    "joint delta": Entry(JointVariational(q="delta", steps=8, adapt_steps=8), separate=True),
    "stochastic": Entry(Stochastic(Langevin(run_length=5), steps=4, draws=20), separate=True),
    "stochastic pathwise": Entry(
        Stochastic(Langevin(run_length=5), Pathwise(), steps=4, draws=20), separate=True
    ),
    "stochastic gated path": Entry(
        Stochastic(Langevin(run_length=5, momentum=0.3), GatedPathwise(), steps=4, draws=20),
        separate=True,
    ),
    "stochastic score, antithetic": Entry(
        Stochastic(Langevin(run_length=5), Score(), antithetic=True, steps=4, draws=20),
        separate=True,
    ),
    "stochastic Bismut": Entry(
        Stochastic(
            Langevin(run_length=5, momentum=0.5), BismutElworthyLi(), steps=4, draws=20, thin=2
        ),
        separate=True,
    ),
    "stochastic, two at once": Entry(
        Stochastic(Langevin(run_length=5), steps=4, draws=20, tasks_at_once=2), separate=True
    ),
    "stochastic stationary": Entry(
        Stochastic(Langevin(run_length=5), StationaryCovariance(), steps=4, draws=20),
        separate=True,
    ),
    "stochastic implicit": Entry(
        Stochastic(Langevin(run_length=5), ImplicitAtParticles(), steps=4, draws=20),
        separate=True,
    ),
    "stochastic basin-corrected": Entry(
        Stochastic(Langevin(run_length=5), BasinCorrected(), antithetic=True, steps=4, draws=20),
        separate=True,
    ),
    "stochastic basin-corrected, laplace": Entry(
        Stochastic(Langevin(run_length=5), BasinCorrected("laplace"), steps=4, draws=20),
        separate=True,
    ),
    "sgd": Entry(
        Stochastic(SGD(run_length=5, step_size=0.01, batch_rows=2), steps=4, draws=20),
        separate=True,
    ),
    "sgd, evolution strategies": Entry(
        Stochastic(
            SGD(run_length=5, step_size=0.01, batch_rows=2, replacement=True),
            EvolutionStrategies(),
            steps=4,
            draws=20,
        ),
        separate=True,
    ),
    "restarts, persistent evolution": Entry(
        Stochastic(
            RandomRestarts(run_length=5, step_size=0.01), PersistentES(windows=2), steps=4, draws=20
        ),
        separate=True,
    ),
    "no pooling": Entry(NoPooling(steps=8, adapt_steps=8)),
    "complete pooling": Entry(CompletePooling(draws=20), separate=True),
    "nested laplace": Entry(NestedLaplace(steps=30, draws=200)),
    "nuts": Entry(PyroNUTS(draws=6, warmup=4, chains=2, proposals=50)),
    "svi": Entry(PyroSVI(steps=6, adapt_steps=4, draws=20)),
    "svi point": Entry(
        PyroSVI(point_globals=True, centred=True, steps=6, samples=2, adapt_steps=4, draws=20)
    ),
}
