"""What the data determine: degrees of freedom, optimism, and evidence over a decade of a scale."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, tensor, widened
from linear_gaussian import LinearGaussian
from scipy.stats import multivariate_normal
from torch import Tensor

from varmeta import (
    Density,
    GaussianPrior,
    JointVariational,
    LaplaceEvidence,
    NoPooling,
    Tasks,
    TaskSource,
    compare,
    evidence,
    fit,
    parts,
)
from varmeta.inference import determined
from varmeta.inference.determined import degrees_of_freedom, over_a_decade, undetermined
from varmeta.inference.diagnostics import undetermined_of, warn_of_collapse
from varmeta.models.modules import Modules
from varmeta.problems import eight_schools
from varmeta.seeds import generator

PROBLEM = LinearGaussian.random(0)
CASE = case_of(PROBLEM)
ROWS = CASE.tasks.support
FACTOR = tensor([[0.3], [0.4], [1.2]])
PRIORS = pytest.mark.parametrize("factor", [None, FACTOR], ids=["diagonal", "low-rank"])


def shares(covariance: np.ndarray) -> np.ndarray:
    """diag((H + Λ)⁻¹H) of each task, `[T, D]`, by numpy."""
    out = []
    for x in PROBLEM.designs:
        curvature = x.T @ x / PROBLEM.noise2
        out.append(np.diag(np.linalg.solve(curvature + np.linalg.inv(covariance), curvature)))
    return np.array(out)


# -- degrees of freedom ----------------------------------------------------------------------------


@PRIORS
def test_degrees_of_freedom_are_those_of_the_hat_matrix(factor: Tensor | None) -> None:
    """Wherever they are taken, as f is a parabola; rows of padding change nothing."""
    prior = replace(CASE.prior, factor=factor)
    expected = shares(prior.covariance().numpy())
    for rows, shift in ((ROWS, 0.0), (widened(ROWS, 3), 1.0)):
        theta = tensor(PROBLEM.theta_stars()) + shift
        found = degrees_of_freedom(CASE.density, prior, CASE.shared, rows, theta)
        assert_close(found, expected, 1e-10)


def test_a_module_has_those_of_its_coordinates_and_parts_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = torch.tensor([0, 1, 0])
    scale = CASE.prior.scale[:2]
    prior = GaussianPrior.create(CASE.prior.loc, scale, groups=Modules(("a", "b"), groups))
    each = shares(prior.covariance().numpy())
    theta = tensor(PROBLEM.theta_stars())
    whole = degrees_of_freedom(CASE.density, prior, CASE.shared, ROWS, theta)
    assert_close(whole, np.stack([each[:, 0] + each[:, 2], each[:, 1]], -1), 1e-10)
    numbers = max(CASE.density.dim**2, CASE.tasks.mask.shape[1])
    monkeypatch.setattr(parts, "LARGEST", 4 * numbers)  # two tasks at a time
    assert_close(degrees_of_freedom(CASE.density, prior, CASE.shared, ROWS, theta), whole, 1e-12)


def test_between_held_by_the_prior_and_held_by_the_data() -> None:
    """0 at a scale of 0; at a huge one as many as the rows determine, up to 1 in 10,000."""
    theta = tensor(PROBLEM.theta_stars())
    for scale, expected in ((0.0, [0] * 6), (1e4, [min(len(y), 3) for y in PROBLEM.targets])):
        prior = replace(CASE.prior, log_scale=torch.full((3,), scale, dtype=FLOAT).log())
        found = degrees_of_freedom(CASE.density, prior, CASE.shared, ROWS, theta).sum(-1)
        assert_close(found + 1, np.array(expected) + 1.0, 1e-4)


@PRIORS
def test_many_coordinates_by_random_directions(
    factor: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many orthogonal directions as coordinates leave no error of the whole trace."""
    prior = replace(CASE.prior, factor=factor)
    monkeypatch.setattr(determined, "MAX_DIM", 2)
    theta = tensor(PROBLEM.theta_stars())
    found = degrees_of_freedom(CASE.density, prior, CASE.shared, ROWS, theta)
    assert_close(found.sum(-1), shares(prior.covariance().numpy()).sum(-1), 1e-8)


def test_where_f_bends_down_none_are_negative() -> None:
    """y ~ N(θ², 1) with y = 4 has f'' = 2(3θ² − 4) < 0 at 0: no degree of freedom there."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=FLOAT), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(theta**2, 1.0), obs=y)

    tasks = Tasks.from_list([(torch.zeros(1, 1, dtype=FLOAT), tensor([4.0]))])
    density = Density(model, tasks)
    prior = GaussianPrior.create(torch.zeros(1, dtype=FLOAT), 1.0)
    for at, bend in ((0.0, 0.0), (2.0, 16.0)):
        found = degrees_of_freedom(density, prior, density.shared_init, tasks, tensor([[at]]))
        assert float(found) == pytest.approx(bend / (1 + bend), abs=1e-12)


def test_they_are_the_optimism_of_the_cost() -> None:
    """Of 20,000 pairs of data sets at one θ, which the prior need not have drawn, to 4 errors.

    What putting a coordinate back to θ0 costs on other rows with the same inputs is less than on
    the rows fitted to by its degrees of freedom, on average. Three numbers: one seed in 5,000
    would fail. A pair has opposite noise, and other rows count by their means (their noise cancels
    in a difference of squares, on average): neither changes what is expected.
    """
    rng = np.random.default_rng(0)
    count, x, noise = 20_000, max(PROBLEM.designs, key=len), PROBLEM.noise2**0.5
    truth = PROBLEM.theta0 + np.array([0.1, 2.0, -0.7])
    scale = np.array([0.3, 0.2, 1.0])
    prior = GaussianPrior.create(tensor(PROBLEM.theta0), tensor(scale))
    tasks = Tasks.from_list([(tensor(x), tensor(x @ truth))])
    theta0 = tensor(PROBLEM.theta0[None])
    dof = degrees_of_freedom(CASE.density, prior, CASE.shared, tasks, theta0)[0]
    gain = np.linalg.solve(x.T @ x / noise**2 + np.diag(scale**-2.0), x.T / noise**2)
    error = noise * rng.normal(size=(count, len(x)))
    optimism = np.zeros((count, 3))
    for sign in (1, -1):
        old = x @ truth + sign * error
        theta = PROBLEM.theta0 + (old - x @ PROBLEM.theta0) @ gain.T
        for j in range(3):
            back = np.where(np.arange(3) == j, PROBLEM.theta0, theta)
            for weight, y in ((0.5, old), (-0.5, x @ truth)):
                cost = ((y - back @ x.T) ** 2).sum(1) - ((y - theta @ x.T) ** 2).sum(1)
                optimism[:, j] += weight * 0.5 * cost / noise**2
    for j in range(3):
        spread = 4 * optimism[:, j].std() / count**0.5
        assert abs(optimism[:, j].mean() - float(dof[j])) < spread < 0.1 * float(dof[j])


# -- the evidence over a decade --------------------------------------------------------------------


@PRIORS
def test_a_decade_is_worth_what_the_evidence_says(factor: Tensor | None) -> None:
    """By log N(y_i; X_iθ0, s²I + X_iΣX_iᵀ) at each scale; also from a point that is no mode."""

    def total(prior: GaussianPrior) -> float:
        covariance = prior.covariance().numpy()
        return sum(
            multivariate_normal(
                x @ PROBLEM.theta0, PROBLEM.noise2 * np.eye(len(y)) + x @ covariance @ x.T
            ).logpdf(y)
            for x, y in zip(PROBLEM.designs, PROBLEM.targets, strict=True)
        )

    prior = replace(CASE.prior, factor=factor)
    expected = np.zeros((2, 3))
    for k, ratio in enumerate((0.1, 10.0)):
        for j in range(3):
            by = torch.ones(3, dtype=FLOAT)
            by[j] = ratio
            other = None if factor is None else by[:, None] * factor
            moved = prior.moved(prior.loc, prior.log_scale + by.log(), other)
            expected[k, j] = total(moved) - total(prior)
    for theta in (tensor(PROBLEM.theta_stars()), torch.zeros(6, 3, dtype=FLOAT)):
        found = over_a_decade(CASE.density, prior, CASE.shared, ROWS, theta)
        assert_close(found, expected, 1e-9)


def schools(scale: float) -> list[str]:
    """The modules of eight schools that the data do not determine at this scale around θ0 = 8."""
    problem = eight_schools()
    prior = GaussianPrior.create(tensor([8.0]), scale)
    none = torch.zeros(0, dtype=FLOAT)
    found = undetermined(problem.density, prior, none, problem.train)
    assert found is not None
    return [s.module for s in found]


def test_eight_schools_hardly_tell_their_scale_from_zero() -> None:
    """Their likelihood is flat below τ of some 5, and falls above."""
    assert [schools(scale) for scale in (1e-9, 0.1, 1.0, 2.0)] == [["0"]] * 4
    assert [schools(scale) for scale in (30.0, 300.0)] == [[]] * 2


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e4])
def test_a_scale_that_is_needed_is_not_collapsed_whatever_its_units(unit: float) -> None:
    """Ten tasks of five readings with an error of a tenth of their spread."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=FLOAT), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(level, 0.1 * unit), obs=y)

    noise = torch.randn(10, 6, generator=generator(0), dtype=FLOAT)
    rows = unit * (noise[:, :1] + 0.1 * noise[:, 1:])
    tasks = Tasks.from_list([(torch.zeros(5, 1, dtype=FLOAT), y) for y in rows])
    density = Density(model, tasks)
    for scale, said in ((unit, []), (1e-5 * unit, ["0"])):
        prior = GaussianPrior.create(torch.zeros(1, dtype=FLOAT), scale)
        found = undetermined(density, prior, density.shared_init, tasks)
        assert found is not None and [s.module for s in found] == said
        assert all(s.up > 0 for s in found)  # more is wanted


def test_of_many_tasks_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same tasks are worth twice the nats, seen whole or by every second one."""
    twice = replace(
        ROWS._map(lambda t: t.repeat_interleave(2, 0), names=tuple(map(str, range(12)))),
    )
    loose = CASE.prior.moved(CASE.prior.loc, CASE.prior.log_scale - 12, None)
    args = (CASE.density, loose, CASE.shared)
    whole, half = undetermined(*args, twice), undetermined(*args, ROWS)
    monkeypatch.setattr(determined, "MAX_TASKS", 6)
    monkeypatch.setattr(torch, "linspace", lambda *_: torch.arange(0, 12, 2).double())
    some = undetermined(*args, twice)
    assert whole and half and some and len(whole) == len(half) == 3
    for all_of, one, every in zip(whole, half, some, strict=True):
        assert_close([all_of.down, all_of.up], [2 * one.down, 2 * one.up], 1e-6)
        assert_close([every.down, every.up], [all_of.down, all_of.up], 1e-6)


def test_what_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (CASE.density, CASE.prior, CASE.shared, ROWS)
    assert undetermined(*args) == []
    for name in ("MAX_DIM", "MAX_MODULES"):
        with monkeypatch.context() as patch:
            patch.setattr(determined, name, 2)
            assert undetermined(*args) is None


# -- where it is said ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [LaplaceEvidence(steps=100), JointVariational(steps=300)])
@pytest.mark.parametrize("law", ["half-normal", "half-cauchy"])
def test_a_fit_of_eight_schools_says_that_its_scale_has_collapsed(
    strategy: LaplaceEvidence | JointVariational, law: str
) -> None:
    problem = eight_schools()
    prior = GaussianPrior.from_density(problem.density, scale_law=law)  # type: ignore[arg-type]
    said = "hardly tell the scale of 'effect' .* from 0; .* too small .*PyroNUTS.* shared="
    with pytest.warns(RuntimeWarning, match=f"{strategy.name}: .*{said}"):
        done = fit(strategy, problem.density, problem.train, prior=prior, progress=False)
    found = evidence(done.posterior(), done.prior, problem.train, draws=100)
    assert found.undetermined == ("effect",)
    assert "given θ0, Σ and φ" in str(found) and "hardly tell the scale of 'effect'" in str(found)


def test_a_comparison_says_it_and_calls_no_posterior_simply_exact() -> None:
    problem = eight_schools()
    with pytest.warns(RuntimeWarning, match="hardly tell the scale of 'effect'"):
        result = compare([LaplaceEvidence(steps=100)], problem.density, problem.train, draws=50)
    assert result.table["undetermined"].tolist() == ["effect"]
    assert result.table["pareto_k"].tolist() == [-np.inf]
    text = " ".join(str(result).split())
    assert "exact|Σ: q is exact for the learned prior held fixed" in text
    assert text.count("exact|Σ") == 2 and text.count("exact") == 3
    assert "hardly tell the scale of effect (LaplaceEvidence) from 0" in text


def test_scales_that_are_not_learned_are_not_asked_for() -> None:
    problem = eight_schools()
    done = fit(NoPooling(steps=20), problem.density, problem.train, progress=False)
    assert undetermined_of(done) == []
    source = TaskSource(lambda g: problem.train)
    assert undetermined_of(replace(done, tasks=source)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_collapse(done)
