"""Meta-learning through a random algorithm: E over where it lands, not one point.

Objective: Σ_i E_{θ ∼ Alg(f_i, θ0)} g_i(θ), with Alg a `RandomDescent`. θ0 acts on it in two ways:
it moves each minimum, and it changes how often each is found (Huszár, inference.vc, 2019). The
estimators of its gradient are in `estimators.py`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from varmeta.checked import Count, Positive
from varmeta.importance import smooth
from varmeta.inference.base import Batch, NonFiniteLoss, State
from varmeta.inference.chain import Chain
from varmeta.inference.descent import Langevin, RandomDescent
from varmeta.inference.estimators import Estimate, Estimator, Pathwise
from varmeta.inference.gated import FULL, CurvatureGated
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.point import Point
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Draws, TaskPosterior
from varmeta.tasks import Tasks, TaskSource

_log = logging.getLogger("varmeta")
_ENOUGH = 100  # runs from which the tail of their losses can be told


def default_estimator(algorithm: RandomDescent, dim: int) -> Estimator:
    """What suits an algorithm on θ of `dim` coordinates.

    `CurvatureGated` where every step injects noise and θ has up to 8 coordinates: its gate sees all
    of the curvature then. It is as good as `Pathwise` where runs contract and goes on working where
    they do not. Else `Pathwise`: without noise no transition has a density, but the law of rows and
    starts does not depend on θ0; and in many dimensions a score term multiplies the whole loss by
    noise, which a few particles do not average out. Runs should then be short, or take
    `GatedPathwise` and many particles (measured in docs/estimators.md and docs/does-it-pay.md).
    """
    if algorithm.always_noisy and dim <= FULL:
        return CurvatureGated()
    return Pathwise()


def meta_gradient(
    density: Density,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    algorithm: RandomDescent,
    estimator: Estimator | None = None,
    shared: Tensor | None = None,
    particles: int = 100,
    antithetic: bool = False,
    seed: int = 0,
) -> MetaGradientEstimate:
    """∇E_{θ∼Alg(f_i, θ0)} g_i(θ) for each task, with standard errors.

    Args:
        density: the model.
        prior: the anchor N(θ0, Σ).
        tasks: f_i is the support part's, g_i the query part's negative log-likelihood; both are all
            rows where the tasks are not split.
        algorithm: the random algorithm.
        estimator: of the gradient; None for what suits the algorithm (`default_estimator`).
        shared: φ `[P]`; where it starts if None.
        particles: S, runs for each task.
        antithetic: run s + S/2 has the opposite normal numbers of run s.
        seed: of the runs.

    Raises:
        ValueError: an estimator that does not work with this algorithm or so many particles.
        NonFiniteLoss: naming the task, where runs end at a loss that is not finite, or (with
            `clip=None` and at least 100 particles) where the tail of their losses says that they
            have no finite expectation.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def wells(x, y=None):  # two minima, at θ = ±√y
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal(theta**2, 0.5), obs=y)
        >>> tasks = Tasks.from_list([(torch.zeros(1, 1), torch.tensor([1.0]))])
        >>> prior = GaussianPrior.create(torch.tensor([0.3]), 1.0)
        >>> algorithm = Langevin(run_length=50, step_size=0.03)
        >>> g = meta_gradient(Density(wells, tasks), prior, tasks, algorithm=algorithm)
        >>> g.estimator.name, tuple(g.mean["loc"].shape)
        ('CurvatureGated', (1, 1))
    """
    estimator = estimator or default_estimator(algorithm, density.dim)
    estimator.check(algorithm, particles, antithetic)
    shared = density.shared_init if shared is None else shared
    point = Point.of(density, prior, shared)
    chain = Chain(algorithm, density, point, tasks.support, particles, seed, antithetic)
    found = _estimated(chain, tasks.query, estimator)
    require_expectation(found.losses, tasks, algorithm)
    return found


def _estimated(chain: Chain, query: Tasks, estimator: Estimator) -> MetaGradientEstimate:
    """`meta_gradient` as it comes, finite or not."""

    def loss(theta: Tensor, phi: Tensor) -> Tensor:
        return chain.density.negative_log_likelihood(theta, query, phi)

    found = estimator.estimate(chain, loss)
    return MetaGradientEstimate(found, chain.point, estimator, chain.gradients)


def require_expectation(losses: Tensor, tasks: Tasks, algorithm: RandomDescent) -> None:
    """See that losses `[S, T]` where runs end, in nats, can have an expectation.

    With a bound on the steps all increments are bounded or Gaussian, so that any loss which grows
    slower than exp(c‖θ‖²) for every c has one. Without it the tail of 100 or more losses is fitted
    (Pareto k, see `varmeta.evidence`): above order 1/k there are no moments. Fewer say nothing.

    Raises:
        NonFiniteLoss: a loss is not finite; k − 2 standard errors is above 1.
    """
    bad = ~losses.isfinite()
    if bool(bad.any()):
        raise NonFiniteLoss(
            f"{_first(bad.any(0), tasks)} is not finite where {int(bad.sum())} of {bad.numel()} "
            "runs end. Lower the algorithm's step_size or give it a clip, tighten the model's "
            "priors, or check this task's data"
        )
    if algorithm.clip is not None or len(losses) < _ENOUGH:
        return
    values = losses.detach().double().cpu().numpy()
    away = np.abs(values - np.median(values, axis=0))
    with np.errstate(divide="ignore"):
        _, k = smooth(np.log(away).T)
    tail = int(min(len(losses) / 5, 3 * len(losses) ** 0.5))  # what k is fitted to
    heavy = torch.from_numpy(np.isfinite(k) & (k - 2 * (1 + k) / math.sqrt(tail) > 1))
    if bool(heavy.any()):
        raise NonFiniteLoss(
            f"{_first(heavy, tasks)} has no finite expectation where runs end: the tail of "
            f"{len(losses)} of them has a Pareto k of {float(k[heavy.numpy()].max()):.1f}, wanted "
            "below 1. Bound the algorithm's steps (clip=3.0), or lower its step_size or temperature"
        )


def _first(which: Tensor, tasks: Tasks) -> str:
    """Of `[T]` bool the first task's name, and how many there are."""
    name = tasks.names[int(which.nonzero()[0])]
    return f"the loss of task {name!r} ({int(which.sum())} of {len(tasks)} tasks)"


@dataclass(frozen=True, eq=False)
class MetaGradientEstimate:
    """What `meta_gradient` found.

    Attributes:
        estimate: particle by particle, in units of the prior.
        point: where.
        estimator: that was used.
        gradients: gradient evaluations of each task's loss.
    """

    estimate: Estimate
    point: Point
    estimator: Estimator
    gradients: int

    @property
    def losses(self) -> Tensor:
        """`[S, T]`, g_i where each run ended, nats."""
        return self.estimate.losses

    @property
    def ends(self) -> Tensor:
        """`[S, T, D]`, where each run ended."""
        return self.estimate.ends

    @property
    def mean(self) -> dict[str, Tensor]:
        """In `loc` `[T, D]`, `log_scale` `[T, M]`, `shared` `[T, P]`; nats per unit of each."""
        return self.point.natural(self.estimate.mean)

    @property
    def standard_error(self) -> dict[str, Tensor]:
        """Of `mean`."""
        return self.point.natural(self.estimate.standard_error)


@dataclass(frozen=True)
class Stochastic(MetaGradient):
    """Learn the prior from the expected query loss of a random algorithm.

    Attributes:
        algorithm: where a task's particles go.
        estimator: of the gradient; None for what suits the algorithm and the model
            (`default_estimator`), which a message of the logger `varmeta` names at the start.
        particles: S, runs per task and meta-step.
        antithetic: runs come in pairs with opposite noise.
        draws: of each task's posterior when adapting.
        chains: how the draws are grouped for ArviZ; divides them.
        thin: None: draws are where independent runs end, so that their R-hat is 1 and their ESS
            their number. A number: each chain is one run that goes on after its end, a draw every
            so many steps, and R-hat says whether runs with different seeds find the same minima.

    The other attributes are those of `MetaGradient`.

    Raises:
        ValueError: an estimator that does not work with this algorithm or so many particles; chains
            that do not divide the draws.
    """

    steps: Count = field(default=100, kw_only=True)
    learning_rate: Positive = field(default=0.1, kw_only=True)
    algorithm: RandomDescent = field(default_factory=Langevin)
    estimator: Estimator | None = None
    particles: Count = 4
    antithetic: bool = False
    draws: Count = 500
    chains: Count = 4
    thin: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.estimator_for(1).check(self.algorithm, self.particles, self.antithetic)
        if self.draws % self.chains:
            raise ValueError(
                f"chains must divide draws, got {self.chains} chains for {self.draws} draws"
            )

    def estimator_for(self, dim: int) -> Estimator:
        """The one that is used on θ of so many coordinates."""
        return self.estimator or default_estimator(self.algorithm, dim)

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """θ0, scales and φ at the user's prior; says which estimator was chosen."""
        if self.estimator is None:
            chosen = self.estimator_for(density.dim)
            _log.info("%s: the estimator for %r is %r", self.name, self.algorithm, chosen)
        return super().init(density, prior, tasks, generator)

    @property
    def kept_vectors(self) -> int:
        """See `MetaGradient.kept_vectors`."""
        return self.estimator_for(FULL + 1).kept_vectors(self.algorithm.run_length)

    @property
    def runs_per_task(self) -> int:
        """`particles`."""
        return self.particles

    @property
    def name(self) -> str:
        """`Stochastic`, with the estimator unless it is the default."""
        return "Stochastic" if self.estimator is None else f"Stochastic ({self.estimator.name})"

    def losses(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        generator: torch.Generator,
    ) -> tuple[Tensor, MetaGradientEstimate]:
        """E_{θ∼Alg} g_i(θ) per task, nats, `[T]`, with the estimated derivative; and all of it."""
        return self._losses(density, prior, shared, tasks, _seed(generator))

    def _losses(
        self, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, seed: int
    ) -> tuple[Tensor, MetaGradientEstimate]:
        point, runs = Point.of(density, prior, shared), self.particles
        chain = Chain(self.algorithm, density, point, tasks.support, runs, seed, self.antithetic)
        result = _estimated(chain, tasks.query, self.estimator_for(density.dim))
        x = result.point.at(prior, shared)  # 0, with the way back to prior and φ
        return result.losses.mean(0) + result.estimate.mean @ x, result

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, _Runs]:
        """See `losses`."""
        prior, shared = state.meta.prior, state.meta.shared
        # Not a draw: all parts of a batch have this seed, and each task its own stream of it.
        seed = generator.initial_seed()
        try:
            losses, result = self._losses(density, prior, shared, batch.tasks, seed)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"step {state.step}: {error}") from error
        return losses, _Runs(result.gradients, result.losses.std(0, correction=0))

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """Where runs of the algorithm end, or pass after their end (`thin`).

        Raises:
            NonFiniteLoss: as `meta_gradient`.
        """
        prior, shared = state.meta.fixed()
        point = Point.of(density, prior, shared)
        runs = self.draws if self.thin is None else self.chains
        chain = Chain(self.algorithm, density, point, tasks, runs, _seed(generator))
        if self.thin is None:
            draws = chain.run()
        else:
            draws = chain.path(self.draws // self.chains, self.thin).flatten(0, 1)
        with torch.no_grad():
            losses = density.negative_log_likelihood(draws, tasks, shared)
        require_expectation(losses, tasks, self.algorithm)
        return Draws(density, tasks.names, shared, draws, num_chains=self.chains)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@dataclass(frozen=True, eq=False)
class _Runs:
    """`metagradient.Report` of some runs: the particles' standard deviation of g_i, `[T]` nats."""

    gradients: int
    spread: Tensor

    def stats(self) -> dict[str, Tensor]:
        return {"query_loss_sd": self.spread}
