"""Every estimator of the stochastic meta-gradient, against exact expectations.

A statistical test here allows 4.5 standard errors: a false-alarm rate of 7e-6 for each number
compared (about 200 in this file, on fixed seeds).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from random_runs import (
    F64,
    LINEAR,
    exact_gradient,
    exact_slopes,
    flat,
    linear_prior,
    lines,
    moments,
    prior_at,
    two_wells,
    waves,
    wells,
    z_scores,
)
from torch import Tensor

from varmeta import (
    SGD,
    BismutElworthyLi,
    CurvatureGated,
    Density,
    EvolutionStrategies,
    GatedPathwise,
    GaussianPrior,
    Langevin,
    Pathwise,
    RandomDescent,
    Score,
    Tasks,
    meta_gradient,
)
from varmeta.inference.chain import Chain
from varmeta.inference.estimators import Estimator
from varmeta.inference.point import Point

ERRORS = 4.5
BY_NOISE = {
    "score": Score(),
    "Bismut": BismutElworthyLi(),
    "Bismut, short": BismutElworthyLi(horizon=8),
    "gated": CurvatureGated(),
    "gated path": GatedPathwise(),
}
UNBIASED = {"pathwise": Pathwise(), **BY_NOISE}


@pytest.mark.parametrize(
    "algorithm",
    [
        Langevin(run_length=20, step_size=0.03, temperature=0.3, clip=0.04),
        Langevin(run_length=60, step_size=0.03, temperature=0.15),
        Langevin(run_length=30, step_size=0.02, temperature=np.geomspace(2.0, 0.2, 30)),
    ],
    ids=["short and clipped", "long and cold", "cooling"],
)
@pytest.mark.parametrize(
    ("model", "loc"), [(wells, -0.6), (wells, 0.02), (wells, 0.8), (waves, 0.02)]
)
def test_unbiased_among_several_wells(
    model: Callable[..., Tensor], loc: float, algorithm: RandomDescent
) -> None:
    """Both mechanisms at once, also next to the ridge (θ0 = 0.02): 25,000 particles each.

    Of the short runs' steps the bound stops between a quarter and all.
    """
    tasks, scale = two_wells(), 0.9
    density = Density(model, tasks)
    _, truth = exact_gradient(model, loc, algorithm, scale, 20 if algorithm.clip == 0.04 else 4)
    for name, estimator in BY_NOISE.items():
        got = meta_gradient(
            density,
            prior_at(loc, scale),
            tasks,
            algorithm=algorithm,
            estimator=estimator,
            particles=25_000,
            seed=1,
        )
        z = z_scores(got, torch.from_numpy(truth))
        assert (z.abs() < ERRORS).all(), (name, z)
        assert (flat(got.standard_error) < 0.3).all(), name  # sharp enough to fail


def test_pathwise_is_unbiased_while_it_contracts_and_lost_beyond() -> None:
    """Next to the ridge: right after 15 steps; after 300 the sample misses the tail that counts."""
    tasks = two_wells()
    density = Density(wells, tasks)

    def pathwise(length: int) -> tuple[Tensor, Tensor, float]:
        algorithm = Langevin(run_length=length, step_size=0.03, temperature=0.05)
        got = meta_gradient(
            density,
            prior_at(0.02),
            tasks,
            algorithm=algorithm,
            estimator=Pathwise(),
            particles=20_000,
            seed=2,
        )
        truth = exact_gradient(wells, 0.02, algorithm)[1]
        return got.mean["loc"], got.standard_error["loc"], float(truth[0])

    mean, error, truth = pathwise(15)
    assert abs(float(mean) - truth) < ERRORS * float(error) < 0.05 * abs(truth)
    mean, error, truth = pathwise(300)
    assert abs(float(mean) - truth) > 0.5 * abs(truth) or float(error) > abs(truth)


@pytest.mark.parametrize(
    ("algorithm", "estimator", "rank"),
    [
        *itertools.product(["plain"], UNBIASED, [0, 1]),
        *itertools.product(["momentum", "random start"], UNBIASED, [1]),
        ("plain", "gated in a plane", 1),
        ("momentum", "gated in a plane", 0),
        ("noiseless", "pathwise", 1),
    ],
)
def test_unbiased_on_a_quadratic(algorithm: str, estimator: str, rank: int) -> None:
    """In θ0, both scales, the low-rank factor and a shared parameter, by the moments' recursion."""
    tasks, density = lines()
    prior, chosen = linear_prior(rank), LINEAR[algorithm]
    truth = exact_slopes(lambda p, offset: moments(tasks, chosen, p, offset), prior)
    known: dict[str, Estimator] = {**UNBIASED, "gated in a plane": CurvatureGated(rank=2)}
    got = meta_gradient(
        density,
        prior,
        tasks,
        algorithm=chosen,
        estimator=known[estimator],
        particles=10_000,
        seed=3,
    )
    z = z_scores(got, truth)
    assert (z.abs() < ERRORS).all(), z
    assert (flat(got.standard_error) < 1.5).all()


def test_gradient_descent_is_differentiated_exactly() -> None:
    """Without any noise a run is a number: Pathwise against the recursion, to rounding."""
    tasks, density = lines()
    chosen = RandomDescent(run_length=12, step_size=0.05, momentum=0.4)
    prior = linear_prior(1)
    truth = exact_slopes(lambda p, offset: moments(tasks, chosen, p, offset), prior)
    got = meta_gradient(density, prior, tasks, algorithm=chosen, particles=1)
    assert isinstance(got.estimator, Pathwise)
    torch.testing.assert_close(flat(got.mean), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", [Pathwise(), GatedPathwise()], ids=lambda e: e.name)
def test_marks_change_nothing(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run is gone back through from √K marks, with the same numbers drawn again."""
    tasks, density = lines()
    algorithm = SGD(23, 0.02, temperature=0.4, momentum=0.5, batch_rows=1, start_scale=0.3)

    def each() -> Tensor:
        got = meta_gradient(
            density,
            linear_prior(1),
            tasks,
            algorithm=algorithm,
            estimator=estimator,
            particles=6,
        )
        return got.estimate.each

    kept = each()
    monkeypatch.setattr("varmeta.inference.estimators._SHORT", 1)
    torch.testing.assert_close(each(), kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("replacement", [True, False])
def test_minibatches_against_every_sequence(replacement: bool) -> None:
    """One of two support rows a step: every sequence enumerated, each a Gaussian recursion."""
    tasks, density = lines()
    tasks = tasks.select([0])  # two support rows, one row a step
    prior = linear_prior(0)
    for temperature, estimators in (
        (0.0, (Pathwise(),)),
        (0.3, (Pathwise(), Score(), BismutElworthyLi(), CurvatureGated())),
    ):
        chosen = SGD(
            run_length=4,
            step_size=0.04,
            batch_rows=1,
            replacement=replacement,
            momentum=0.5,
            temperature=temperature,
        )
        if replacement:
            runs = list(itertools.product([0, 1], repeat=4))
        else:  # two epochs, each in one of two orders
            runs = [(*a, *b) for a in [(0, 1), (1, 0)] for b in [(0, 1), (1, 0)]]

        def expected(
            p: GaussianPrior,
            offset: Tensor,
            runs: list[tuple[int, ...]] = runs,
            chosen: SGD = chosen,
        ) -> Tensor:
            each = [moments(tasks, chosen, p, offset, [{n: 2.0} for n in run]) for run in runs]
            return torch.stack(each).mean(0)

        truth = exact_slopes(expected, prior)
        for estimator in estimators:
            got = meta_gradient(
                density,
                prior,
                tasks,
                algorithm=chosen,
                estimator=estimator,
                particles=20_000,
                seed=4,
            )
            assert (z_scores(got, truth).abs() < ERRORS).all(), estimator
            mean, error = got.losses.mean(), got.losses.std() / 20_000**0.5
            exact = expected(prior, torch.zeros(1, dtype=F64)).sum()
            assert (mean - exact).abs() < ERRORS * error


def embedded(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A double well in the first of 12 coordinates, stiff and slack parabolas in the others."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(12, dtype=F64), 1.0).to_event(1))
    flag = x[..., :1]
    mean = torch.cat([flag * theta[:1] ** 2 + (1 - flag) * theta[:1], x[..., 1:] * theta[1:]], -1)
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_gate_in_a_subspace(momentum: float) -> None:
    """Four of 12 directions are watched; the well's derivative is that of one dimension."""
    stiff = torch.linspace(-2.5, 2.5, 11, dtype=F64)
    x = torch.stack([torch.cat([torch.ones(1, dtype=F64), stiff]), torch.zeros(12, dtype=F64)])
    y = torch.zeros(2, 12, dtype=F64)
    y[:, 0] = 1
    tasks = Tasks.from_list([(x, y)])
    tasks = Tasks(
        tasks.inputs, tasks.targets, tasks.mask, torch.tensor([[False, True]]), tasks.names
    )
    density = Density(embedded, tasks)
    algorithm = Langevin(run_length=40, step_size=0.03, temperature=0.3, momentum=momentum)
    prior = GaussianPrior.create(torch.full((12,), 0.1, dtype=F64), 1.0)
    got = {
        name: meta_gradient(
            density,
            prior,
            tasks,
            algorithm=algorithm,
            estimator=estimator,
            particles=2_000,
            seed=5,
        )
        for name, estimator in {
            "gated": CurvatureGated(),
            "gated path": GatedPathwise(),
            "Bismut": BismutElworthyLi(),
        }.items()
    }
    gated, path, bismut = got.values()
    for mine in (gated, path):
        difference = flat(mine.mean) - flat(bismut.mean)
        error = (flat(mine.standard_error) ** 2 + flat(bismut.standard_error) ** 2).sqrt()
        assert (difference.abs() < ERRORS * error).all()
    if not momentum:
        truth = exact_gradient(wells, 0.1, algorithm)[1][0]
        for mine in (gated, path):
            mean, error = (float(v["loc"][0, 0]) for v in (mine.mean, mine.standard_error))
            assert abs(mean - truth) < ERRORS * error
    size = {name: float(v.standard_error["loc"].norm()) for name, v in got.items()}
    assert size["gated path"] < size["gated"] < 0.6 * size["Bismut"]


@pytest.mark.parametrize(
    ("name", "antithetic"),
    [*((name, False) for name in (*UNBIASED, "evolution")), ("pathwise", True), ("gated", True)],
)
def test_intervals_cover(name: str, antithetic: bool) -> None:
    """95% intervals of 500 repetitions cover 92% to 98%: by chance 0.4% of runs would not.

    The repetitions are tasks, alike but for their names. 2,000 particles: the standard error is
    right with fewer, but the contributions are skewed, and an interval needs their mean to be
    normal too (with 400 in a harder place it covered 82% for the scale).
    """
    estimator = EvolutionStrategies(width=1e-3) if name == "evolution" else UNBIASED[name]
    tasks = two_wells(500)
    algorithm = Langevin(run_length=8, step_size=0.03, temperature=0.5)
    got = meta_gradient(
        Density(wells, tasks),
        prior_at(0.0),
        tasks,
        algorithm=algorithm,
        estimator=estimator,
        particles=2000,
        antithetic=antithetic,
        seed=6,
    )
    truth = torch.from_numpy(exact_gradient(wells, 0.0, algorithm)[1])
    covered = (z_scores(got, truth).abs() < 1.96).double().mean(0)
    assert ((covered > 0.92) & (covered < 0.98)).all(), covered
    # What is stated is also the spread that the 500 show (relative error of an sd: 3.2%).
    spread = flat(got.mean).std(0) / (flat(got.standard_error) ** 2).mean(0).sqrt()
    assert ((spread - 1).abs() < 0.12).all(), spread


def test_antithetic_noise_cancels_what_is_odd() -> None:
    """On a quadratic the pathwise gradient is linear in the noise: a pair is exact."""
    tasks, density = lines()
    prior, chosen = linear_prior(1), LINEAR["plain"]
    truth = exact_slopes(lambda p, offset: moments(tasks, chosen, p, offset), prior)
    got = meta_gradient(
        density,
        prior,
        tasks,
        algorithm=chosen,
        estimator=Pathwise(),
        particles=4,
        antithetic=True,
    )
    for name in ("loc", "shared"):
        assert (got.standard_error[name] < 1e-12).all()
    torch.testing.assert_close(got.mean["loc"], truth[:, :3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("estimator", BY_NOISE.values(), ids=BY_NOISE)
def test_a_constant_in_the_loss_changes_nothing(estimator: Estimator, antithetic: bool) -> None:
    """The baseline takes it away from each particle, exactly."""
    tasks, density = lines()
    point = Point.of(density, linear_prior(0), density.shared_init)

    def each(constant: float) -> Tensor:
        chain = Chain(LINEAR["plain"], density, point, tasks.support, 4, 0, antithetic)
        return estimator.estimate(
            chain, lambda x, phi: density.negative_log_likelihood(x, tasks.query, phi) + constant
        ).each

    torch.testing.assert_close(each(0.0), each(1000.0), rtol=1e-8, atol=1e-8)
