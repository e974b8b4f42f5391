"""Random algorithms on losses that grow exponentially or level off: finite, and right.

Statistical tests allow 4.5 standard errors: a false-alarm rate of 7e-6 for each number compared, of
which there are about 60, on fixed seeds.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from random_runs import F64, flat
from steep_models import KINDS, start, steep
from torch import Tensor

from varmeta import (
    SGD,
    BasinCorrected,
    BismutElworthyLi,
    CurvatureGated,
    Density,
    EvolutionStrategies,
    GatedPathwise,
    GaussianPrior,
    ImplicitAtParticles,
    Langevin,
    NonFiniteLoss,
    Pathwise,
    PersistentES,
    RandomDescent,
    RandomRestarts,
    Score,
    StationaryCovariance,
    Stochastic,
    Tasks,
    fit,
    meta_gradient,
)
from varmeta.inference.chain import Chain
from varmeta.inference.estimators import Estimator
from varmeta.inference.gated import gate
from varmeta.inference.pilot import curvature_at_rest
from varmeta.inference.point import Point

ERRORS = 4.5
ALGORITHMS = (Langevin(), SGD(batch_rows=2), RandomRestarts())
FAR = {
    torch.float32: [((10.0, 10.0), a) for a in ALGORITHMS] + [((-10.0, -10.0), Langevin())],
    torch.float64: [((10.0, -10.0), Langevin())],
}


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_stay_finite_from_far_away(kind: str, dtype: torch.dtype) -> None:
    """Ends, losses and gradients, from 10 prior standard deviations off in each coordinate."""
    tasks, density = steep(kind, dtype)
    for signs, algorithm in FAR[dtype]:
        got = meta_gradient(density, start(signs, dtype), tasks, algorithm=algorithm, particles=4)
        for name, values in (("ends", got.ends), ("gradients", got.estimate.each)):
            assert bool(values.isfinite().all()), (signs, algorithm, name)


@pytest.mark.parametrize(
    "estimator",
    [
        Pathwise(),
        Score(),
        BismutElworthyLi(),
        CurvatureGated(),
        CurvatureGated(rank=1),
        GatedPathwise(),
        EvolutionStrategies(),
        PersistentES(),
        StationaryCovariance(),
        ImplicitAtParticles(),
        BasinCorrected(),
    ],
    ids=lambda e: f"{e.name} {getattr(e, 'rank', '')}",
)
def test_every_estimator_stays_finite(estimator: Estimator) -> None:
    for kind, algorithm in {
        "Poisson": Langevin(10, step_size=0.05, momentum=0.5),
        "normal with a noise of its own": Langevin(10),
    }.items():
        tasks, density = steep(kind, torch.float32)
        with warnings.catch_warnings():  # of descents that end late
            warnings.simplefilter("ignore", RuntimeWarning)
            got = meta_gradient(
                density,
                start((10.0, -10.0), torch.float32),
                tasks,
                algorithm=algorithm,
                estimator=estimator,
                particles=4,
            )
        assert bool(got.estimate.each.isfinite().all()), kind


# -- where runs arrive -----------------------------------------------------------------------------


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.tensor(1.0, dtype=x.dtype), 2.0))
    with pyro.plate("rows", x.shape[0]):
        return pyro.sample("y", dist.Poisson(a.exp()).expand(x.shape[:1]), obs=y)


def counted(*rows: list[float], dtype: torch.dtype = F64) -> Tasks:
    return Tasks.from_list(
        [(torch.zeros(len(y), 1, dtype=dtype), torch.tensor(y, dtype=dtype)) for y in rows]
    )


def exact(y: list[float], loc: float, scale: float) -> tuple[float, float]:
    """Mean and standard deviation of the posterior of a log rate, by quadrature."""
    a = np.linspace(-25, 15, 400_001)
    log_p = sum(y) * a - len(y) * np.exp(a) - 0.5 * (a - loc) ** 2 / scale**2
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    mean = float(weight @ a)
    return mean, float((weight @ (a - mean) ** 2) ** 0.5)


@pytest.mark.parametrize("away", [-2.0, 0.0, 2.0])
def test_runs_arrive_at_the_posterior(away: float) -> None:
    """From 2 prior standard deviations, which are up to 80 of the posterior's, in 25 steps.

    θ0 is so far from the log of each task's mean count.

    The finite step widens a standard deviation by 1.03 on a quadratic and moves a mean: within 0.12
    standard deviations and a factor of 0.97 to 1.10 here, beside the error of 4,000 runs.
    """
    for y in ([100.0] * 4, [0.0] * 3, [1.0], [3.0, 9.0, 5.0, 2.0, 6.0]):
        tasks, loc = counted(y), math.log(np.mean(y) + 0.2) + 2 * away
        density = Density(counts, tasks)
        prior = GaussianPrior.create(torch.tensor([loc], dtype=F64), 2)
        point = Point.of(density, prior, density.shared_init)
        ends = Chain(Langevin(), density, point, tasks, 4000, 3).run()
        mean, sd = exact(y, loc, 2.0)
        assert abs(float(ends.mean()) - mean) < (0.12 + ERRORS / 4000**0.5) * sd, y
        noise = ERRORS / 8000**0.5
        assert 0.97 - noise < float(ends.std()) / sd < 1.10 + noise, y


def test_a_log_rate_is_learned() -> None:
    """y ~ Poisson(exp(a)), a ~ N(1, 2), four rows y = 100: the posterior at what was learned."""
    y = [100.0] * 4
    tasks = counted(y, dtype=torch.float32)
    strategy = Stochastic(steps=10, folds=None, learn_scale=False, draws=2000)
    result = fit(strategy, Density(counts, tasks), tasks)
    losses = result.history["loss"]  # means of 4, about ½χ²₁ above the least: by chance 2e-7
    least = -float(dist.Poisson(torch.tensor(100.0)).log_prob(torch.tensor(y)).sum())
    assert ((losses > least) & (losses < least + 6)).all()
    mean, sd = exact(y, float(result.prior.loc), 2.0)
    draws = result.posterior().draws
    assert abs(float(draws.mean()) - mean) < (0.12 + ERRORS / 2000**0.5) * sd
    noise = ERRORS / 4000**0.5
    assert 0.97 - noise < float(draws.std()) / sd < 1.10 + noise


def growth(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(17.0, 10.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0)).exp()
    with pyro.plate("rows", x.shape[0]):
        return pyro.sample("y", dist.Normal(a + b * x[:, 0], noise), obs=y)


@pytest.mark.parametrize("estimator", [None, Score()], ids=["default", "score"])
def test_growth_curves_at_raw_ages(estimator: Estimator | None) -> None:
    """Ages 8 to 14, not centred, and a noise of each child's own: the defaults, in float32."""
    source = torch.Generator().manual_seed(0)
    age = torch.arange(8.0, 15.0, 1.0)[:, None]
    rows = [
        17 + 2 * e[0] + (0.7 + 0.2 * e[1]) * age[:, 0] + (0.3 + 0.4 * e[2]).exp() * e[3:]
        for e in torch.randn(5, 10, generator=source)
    ]
    tasks = Tasks.from_list([(age, y) for y in rows])
    density = Density(growth, tasks)
    result = fit(Stochastic(estimator=estimator, steps=3), density, tasks)
    assert result.history["loss"].map(math.isfinite).all()
    # At the truth the runs end at the posterior's line: its height in the middle, noise σ/√7.
    prior = GaussianPrior.create(torch.tensor([17.0, 0.7, 0.3]), [4.0, 0.4, 0.4])
    got = meta_gradient(density, prior, tasks, algorithm=Langevin(), particles=200)
    height = got.ends[..., 0] + 11 * got.ends[..., 1]
    sd = height.std(0)
    middle = torch.stack([y.mean() for y in rows])
    assert ((height.mean(0) - middle).abs() < 0.5 * sd + ERRORS * sd / 200**0.5).all()


# -- derivatives where the bound acts --------------------------------------------------------------


def bent(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Two coordinates that depend on each other, an exponential, and a shared offset."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    with pyro.plate("rows", x.shape[0]):
        return pyro.sample("y", dist.Normal((x @ w).exp() + w[0] + offset, 1.0), obs=y)


BENT = {
    "own pace": Langevin(4, temperature=0.3, clip=0.2),
    "momentum": Langevin(5, 0.02, temperature=0.3, momentum=0.5, clip=0.1),
    "rows": SGD(5, 0.02, temperature=0.3, batch_rows=1, start_scale=0.2, clip=0.1),
}


def bent_problem() -> tuple[Tasks, Density, Point]:
    x = torch.tensor([[1.0, 0.5], [-0.4, 1.0], [0.7, -0.8]], dtype=F64)
    y = torch.tensor([2.0, 0.5, 1.5], dtype=F64)
    tasks = Tasks.from_list([(x, y), (x[:2], -y[:2])])
    density = Density(bent, tasks, shared=["offset"])
    factor = torch.tensor([[0.3], [-0.2]], dtype=F64)
    prior = GaussianPrior.create(torch.tensor([0.6, 0.3], dtype=F64), 0.8, factor=factor)
    return tasks, density, Point.of(density, prior, density.shared_init)


@pytest.mark.parametrize("name", BENT)
def test_a_clipped_run_is_differentiated_run_by_run(name: str) -> None:
    """Pathwise against central differences with the same numbers, in all that is learned.

    P and the bound stay as they are. A run that comes within 1e-6 of a kink would differ: none of
    60 does.
    """
    tasks, density, point = bent_problem()

    def loss(theta: Tensor, phi: Tensor) -> Tensor:
        return density.negative_log_likelihood(theta, tasks, phi)

    chain = Chain(BENT[name], density, point, tasks, 30, 1)
    each = Pathwise().estimate(chain, loss).each
    stopped = 0.0
    for k in range(point.size):
        step = point.zeros()
        step[k] = 1e-6
        up, down = (loss(chain.run(x), point.moved(x)[1]).detach() for x in (step, -step))
        torch.testing.assert_close((up - down) / 2e-6, each[..., k], rtol=1e-5, atol=1e-6)
    theta = before = chain.start()
    for t in range(BENT[name].run_length):
        grad = chain._slope(t, theta, point.zeros())
        _, free = chain._mean(t, theta, before, grad)
        stopped += float((~free).double().mean()) / BENT[name].run_length  # type: ignore[operator]
        theta, before = chain.step(t, theta, before)
    assert 0.1 < stopped < 0.9  # of all moves


@pytest.mark.parametrize("name", ["own pace", "momentum"])
def test_clipped_runs_are_differentiated_through_the_noise(name: str) -> None:
    """The estimators that use probabilities against the one that does not, 10⁴ particles."""
    tasks, density, point = bent_problem()

    def found(estimator: Estimator) -> tuple[Tensor, Tensor]:
        got = meta_gradient(
            density, point.prior, tasks, algorithm=BENT[name], estimator=estimator, particles=10_000
        )
        return flat(got.mean), flat(got.standard_error)

    mean, error = found(Pathwise())
    for estimator in (BismutElworthyLi(), CurvatureGated(), CurvatureGated(1), GatedPathwise(1)):
        other, noise = found(estimator)
        assert ((mean - other).abs() < ERRORS * (error**2 + noise**2).sqrt()).all(), estimator
        assert (noise < 0.3).all()


# -- what is not finite ----------------------------------------------------------------------------


def broken(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.tensor([0.0, 0.0], dtype=F64), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[0]):
        return pyro.sample("y", dist.Normal((a.sum() * x[:, 0]).exp(), 1.0), obs=y)


def test_a_task_that_is_not_finite_is_named_and_alone() -> None:
    x = torch.ones(2, 1, dtype=F64)
    tasks = Tasks.from_list([(x, x[:, 0]), (1e4 * x, x[:, 0])], names=["sound", "broken"])
    density, prior = (
        Density(broken, tasks),
        GaussianPrior.create(torch.tensor([0.3, 0.2], dtype=F64), 1.0),
    )
    for estimator in (CurvatureGated(), GatedPathwise(), Pathwise(), Score()):
        with pytest.raises(NonFiniteLoss, match=r"task 'broken' \(1 of 2 tasks\) is not finite"):
            meta_gradient(density, prior, tasks, algorithm=Langevin(), estimator=estimator)
    strategy = Stochastic(Langevin(3), steps=1, folds=None, learn_scale=False)
    losses, _ = strategy.losses(density, prior, density.shared_init, tasks, torch.Generator())
    assert losses.isfinite().tolist() == [True, False]
    good = fit(strategy, Density(broken, tasks.select([0])), tasks.select([0]))
    with pytest.raises(NonFiniteLoss, match=r"'broken'.*clip"):
        good.adapt(tasks)


def test_a_gate_of_what_is_not_finite() -> None:
    matrix = torch.eye(2).repeat(3, 1, 1, 1) * 5
    matrix[1, 0, 0, 1] = torch.nan
    matrix[2, 0, 1, 1] = torch.inf
    held = gate(matrix, torch.tensor([0.5]))
    torch.testing.assert_close(held[0, 0], 0.5 * torch.eye(2))
    assert bool(held[1:].isnan().all())


def cosh(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Counts of rates exp(θ) and exp(−θ)."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    with pyro.plate("rows", x.shape[0]):
        return pyro.sample("y", dist.Poisson((a * x[:, 0]).exp()), obs=y)


def test_a_law_without_an_expected_loss_is_refused() -> None:
    """Two steps that are not bounded: the loss is exp of exp of a Gaussian, and has no mean."""
    x = torch.tensor([[1.0], [-1.0]], dtype=F64)
    tasks = Tasks.from_list([(x, torch.ones(2, dtype=F64))], names=["both ways"])
    density, prior = Density(cosh, tasks), GaussianPrior.create(torch.zeros(1, dtype=F64), 1.0)

    def losses(clip: float | None, count: int) -> Tensor:
        algorithm = Langevin(2, 0.5, clip=clip)
        return meta_gradient(
            density, prior, tasks, algorithm=algorithm, estimator=Score(), particles=count
        ).losses

    with pytest.raises(NonFiniteLoss, match=r"'both ways' .*no finite expectation .*clip=3\.0"):
        losses(None, 1000)
    assert float(losses(3.0, 1000).max()) < 1e3
    losses(None, 50)  # too few to tell
    with pytest.raises(ValueError, match=r"clip must be positive .* None, got 0"):
        RandomDescent(clip=0.0)


# -- the pace --------------------------------------------------------------------------------------


def test_the_pace_does_not_depend_on_units() -> None:
    """The curvature at the minimum of a quadratic, whatever the start and units of each θ."""
    hessian = torch.tensor([[2e4, 30.0, 0.0], [30.0, 1.0, 0.1], [0.0, 0.1, 0.5]], dtype=F64)
    centre = torch.tensor([3.0, -2.0, 1.0], dtype=F64)
    for unit in (torch.ones(3, dtype=F64), torch.tensor([1e-3, 1.0, 1e4], dtype=F64)):

        def energy(theta: Tensor, unit: Tensor = unit) -> Tensor:
            away = theta / unit - centre
            return 0.5 * torch.einsum("ti,ij,tj->t", away, hessian, away) + away[:, 0].exp()

        found = curvature_at_rest(energy, (unit * torch.tensor([20.0, -30.0, 5.0]))[None], unit)
        expected = hessian.clone()
        expected[0, 0] += 1
        torch.testing.assert_close(
            (found.vectors * found.values[:, None, :]) @ found.vectors.mT,
            expected[None],
            rtol=1e-3,
            atol=1e-3,
        )
        assert found.gradients < 250  # down from e^17, where a Newton step gains 1 in the exponent
