"""Amortised variational and Laplace evidence: closed forms, differences, the envelope theorem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from adjoint_problems import Tensors, assert_slopes, leaves, slopes
from helpers import Case, assert_close, case_of, leaves_of, tasks_of, tensor
from linear_gaussian import LinearGaussian
from test_logdet import AT, DIM, EXACT, hilly, problem
from torch import Tensor

from benchmarks import envelope
from varmeta import (
    IMAML,
    AmortisedVariational,
    Density,
    GaussianPrior,
    GradientDescent,
    LaplaceEvidence,
    LogDet,
    NewtonCG,
    Tasks,
    fit,
    laplace_evidence,
)
from varmeta.inference.base import Batch
from varmeta.posterior import Delta, Gaussian
from varmeta.seeds import generator

TIGHT = NewtonCG(tolerance=1e-13)
SHAPES = [(0, 6, 3), (1, 6, 3), (2, 9, 4), (3, 5, 1)]  # seed, tasks, dim


def gradient_of(strategy: AmortisedVariational, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Bounds `[T]`, and the gradient of their sum in θ0, the log scales and φ."""
    prior, shared, at = leaves_of(case)
    bounds, _ = strategy.losses(case.density, prior, shared, case.tasks)
    return bounds.detach(), list(torch.autograd.grad(bounds.sum(), at))


@pytest.fixture(params=SHAPES, ids=str)
def linear(request: pytest.FixtureRequest) -> LinearGaussian:
    """Away from the optimum; the oracle's losses are those of its support rows."""
    drawn = LinearGaussian.random(*request.param)
    return drawn.at(theta0=drawn.theta0 + 0.5, log_scale=drawn.log_scale - 0.2)


def support_case(drawn: LinearGaussian) -> Case:
    case = case_of(drawn, shared_noise=True)
    return replace(case, tasks=case.tasks.support)


# -- linear-Gaussian ------------------------------------------------------------------------------


def test_evidence_is_the_exact_marginal_likelihood(linear: LinearGaussian) -> None:
    case = support_case(linear)
    theta = tensor(linear.theta_stars())
    found = laplace_evidence(case.density, case.prior, case.shared, case.tasks, theta)
    each = [linear.subset(i).log_marginal() for i in range(linear.num_tasks)]
    assert_close(found, each, 1e-10)
    bounds, grads = gradient_of(LaplaceEvidence(), case)
    assert_close(bounds.sum(), -linear.log_marginal(), 1e-10)
    exact = linear.log_marginal_grad()
    assert_close(grads[0], -exact.theta0, 1e-8)
    assert_close(grads[1], -exact.log_scale, 1e-8)
    assert_close(grads[2][0], -exact.log_noise, 1e-8)


def test_the_envelope_gradient_is_the_closed_form(linear: LinearGaussian) -> None:
    case = support_case(linear)
    bounds, grads = gradient_of(AmortisedVariational(), case)
    exact = linear.amortised_grad()
    assert_close(bounds.sum(), linear.amortised(), 1e-10)
    assert_close(grads[0], exact.theta0, 1e-8)
    assert_close(grads[1], exact.log_scale, 1e-8)
    assert_close(grads[2][0], exact.log_noise, 1e-8)


def test_laplace_on_query_rows_is_the_exact_expected_bound(linear: LinearGaussian) -> None:
    """KL[q‖N(θ0,Σ)] + E_q g, with q the exact posterior given the support rows."""
    case = case_of(linear)
    strategy = AmortisedVariational(q="laplace", outside="query")
    bounds, _ = strategy.losses(case.density, case.prior, case.shared, case.tasks)
    query = replace(linear, designs=linear.query_designs, targets=linear.query_targets)
    covs = np.stack([linear.posterior_cov(i) for i in range(linear.num_tasks)])
    assert_close(bounds.sum(), query.gaussian_joint(linear.theta_stars(), covs), 1e-9)


def test_optimum_of_the_evidence_is_empirical_bayes() -> None:
    """θ0 and Σ by a run of the strategy, to 1e-5."""
    drawn = LinearGaussian.random(12, num_tasks=20, dim=2)
    best = drawn.gaussian_optimum(full=True)
    assert best.converged and not best.collapsed.any()
    case = case_of(drawn)
    strategy = LaplaceEvidence(steps=250, learning_rate=0.1)
    done = fit(strategy, case.density, case.tasks.support, prior=case.prior)
    assert_close(done.prior.loc, best.theta0, 1e-5)
    assert_close(done.prior.log_scale.exp(), best.scale, 1e-5)
    assert abs(done.history["loss"].iloc[-1] * 20 - best.value) < 1e-8 * abs(best.value)


def test_optimum_of_the_point_bound_is_the_joint_map() -> None:
    """Of Σ ½‖θ_i−θ0‖²_Λ + f_i over θ0 and every θ_i: a ridge regression."""
    drawn = LinearGaussian.random(13, num_tasks=8, dim=3)
    theta0, thetas, value = drawn.delta_optimum()
    case = case_of(drawn.at(theta0=drawn.theta0 + 1.0))
    strategy = AmortisedVariational(steps=300, learning_rate=0.1)
    done = fit(strategy, case.density, case.tasks.support, prior=case.prior)
    assert_close(done.prior.loc, theta0, 1e-5)
    posterior = done.posterior()
    assert isinstance(posterior, Delta)
    assert_close(posterior.mean, thetas, 1e-5)
    assert abs(done.history["loss"].iloc[-1] * 8 - value) < 1e-8 * abs(value)
    assert torch.equal(done.prior.log_scale, case.prior.log_scale)


def test_adapting_gives_the_exact_posterior() -> None:
    drawn = LinearGaussian.random(14)
    case = case_of(drawn)
    strategy = LaplaceEvidence(steps=1, learning_rate=1e-12, optimiser="adam")
    posterior = fit(strategy, case.density, case.tasks, prior=case.prior).adapt(case.tasks.support)
    assert isinstance(posterior, Gaussian) and posterior.kind == "laplace"
    assert_close(posterior.mean, drawn.theta_stars(), 1e-8)
    sd = [np.sqrt(np.diag(drawn.posterior_cov(i))) for i in range(drawn.num_tasks)]
    assert_close(posterior.sd, sd, 1e-8)


# -- a model that bends ---------------------------------------------------------------------------


def bound(strategy: AmortisedVariational, **at: Tensor) -> Tensor:
    """The bound of a logistic problem, summed over tasks, in all that is learned."""
    density, tasks = problem()
    prior = GaussianPrior(at["loc"], at["log_scale"], torch.arange(DIM), at["factor"])
    bounds, _ = strategy.losses(density, prior, at["shared"], tasks)
    return bounds.sum()


def meta_gradient(strategy: AmortisedVariational) -> Tensors:
    at = leaves({n: t for n, t in AT.items() if n != "theta"})
    grads = torch.autograd.grad(bound(strategy, **at), list(at.values()))
    return dict(zip(at, grads, strict=True))


BOUNDS: list[dict[str, Any]] = [
    {"q": q, "outside": outside, "gradient": gradient, "logdet": logdet}
    for q, outside, gradient, logdet in [
        ("delta", "support", "envelope", LogDet()),
        ("delta", "support", "implicit", LogDet()),
        ("delta", "query", "implicit", LogDet()),
        ("laplace", "support", "implicit", LogDet()),
        ("laplace", "query", "implicit", LogDet()),
        ("laplace", "support", "implicit", EXACT),
        ("laplace", "query", "implicit", EXACT),
    ]
]


@pytest.mark.parametrize("fields", BOUNDS, ids=lambda f: " ".join(map(str, list(f.values())[:3])))
def test_gradient_is_that_of_differences(fields: dict[str, Any]) -> None:
    """In θ0, the scales, the low-rank factor and φ, each with its own effect on θ*."""
    strategy = AmortisedVariational(**fields, minimiser=TIGHT)
    at = {n: t for n, t in AT.items() if n != "theta"}
    wanted = slopes(lambda **at: bound(strategy, **at), at, list(at), 2e-3)
    assert_slopes(meta_gradient(strategy), wanted, 1e-7)


def test_envelope_and_implicit_agree_as_the_inner_problem_is_solved() -> None:
    """The gap falls with the gradient left at θ*: to rounding where that is rounding."""
    gaps = []
    for minimiser in (
        GradientDescent(0.1, 5, tolerance=0, reduction="sum", clip=None),
        GradientDescent(0.1, 20, tolerance=0, reduction="sum", clip=None),
        GradientDescent(0.1, 80, tolerance=0, reduction="sum", clip=None),
        TIGHT,
    ):
        a, b = (
            meta_gradient(AmortisedVariational(gradient=gradient, minimiser=minimiser))
            for gradient in ("envelope", "implicit")
        )
        gaps.append(max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 1e-8
    assert gaps[3] < 1e-11


def test_the_envelope_needs_no_solve() -> None:
    """In all, the minimiser's gradients and two more: value and gradient at θ*."""
    case = case_of(LinearGaussian.random(15))
    few = GradientDescent(0.01, 4, tolerance=0, reduction="sum", clip=None)
    batch = Batch(case.tasks, torch.arange(6), 6)
    spent = {}
    for gradient in ("envelope", "implicit"):
        strategy = AmortisedVariational(gradient=gradient, minimiser=few)  # type: ignore[arg-type]
        state = strategy.init(case.density, case.prior, case.tasks, generator(0))
        info = strategy.step(case.density, state, batch, generator(0))
        spent[gradient] = info.gradients / 6
        assert ("residual" in info.stats) == (gradient == "implicit")
    assert spent["envelope"] == 4 + 1 + 2 < spent["implicit"]


def test_large_models_use_probes_and_say_how_sure_they_are() -> None:
    """Above 200 coordinates; the mean of many seeds lies within 4 standard errors of the truth.

    The rows' Gram matrix gives the exact evidence. 2 numbers are compared: one false alarm in
    8,000 choices of the seeds, which are fixed.
    """
    drawn = LinearGaussian.random(16, num_tasks=2, dim=201)
    case = case_of(drawn)
    theta = tensor(drawn.theta_stars())
    found = torch.stack(
        [
            laplace_evidence(
                case.density,
                case.prior,
                case.shared,
                case.tasks.support,
                theta,
                generator=generator(seed),
            )
            for seed in range(40)
        ]
    )
    exact = tensor([drawn.subset(i).log_marginal() for i in range(2)])
    error = found.std(0) / 40**0.5
    assert bool(((found.mean(0) - exact).abs() < 4 * error).all())
    strategy = LaplaceEvidence(steps=1)
    state = strategy.init(case.density, case.prior, case.tasks, generator(0))
    batch = Batch(case.tasks.support, torch.arange(2), 2)
    info = strategy.step(case.density, state, batch, generator(0))
    assert float(info.stats["residual"].max()) < 1e-9
    ratio = info.stats["log_det_se"] / (40**0.5 * error)
    assert bool(((ratio > 0.3) & (ratio < 3)).all())
    assert strategy.adapt(case.density, state, case.tasks, generator(0)).kind == "delta"


def test_negative_curvature_at_the_mode_is_reported() -> None:
    x = torch.zeros(4, 1, dtype=torch.float64)
    tasks = Tasks.from_list([(x, x[:, 0] + 5), (x, x[:, 0] + 5)], names=["a", "b"])
    density = Density(hilly, tasks)
    prior = GaussianPrior(tensor([3.0, 3.0]), tensor([0.0, 0.0]), torch.arange(2))
    stuck = GradientDescent(1e-9, 1, tolerance=0, reduction="sum", clip=None)
    strategy = LaplaceEvidence(minimiser=stuck)
    state = strategy.init(density, prior, tasks, generator(0))
    info = strategy.step(density, state, Batch(tasks, torch.arange(2), 2), generator(0))
    assert info.stats["negative_curvature"].all() and info.worst["negative_curvature"] == 2
    with pytest.warns(
        RuntimeWarning, match=r"not positive definite at theta of 2 task\(s\) \(a, b"
    ):
        laplace_evidence(density, prior, density.shared_init, tasks, tensor([[3.0, 3.0]] * 2))


# -- what is refused, and names -------------------------------------------------------------------


@pytest.mark.parametrize("outside", ["support", "query"])
def test_scales_with_points_are_refused(outside: Any) -> None:
    with pytest.raises(ValueError, match="falls without end as the scales go to 0"):
        AmortisedVariational(learn_scale=True, outside=outside)


@pytest.mark.parametrize(
    "fields", [{"q": "laplace"}, {"outside": "query"}, {"q": "laplace", "outside": "query"}]
)
def test_the_envelope_is_refused_where_it_does_not_hold(fields: Any) -> None:
    with pytest.raises(ValueError, match="gradient='envelope' needs"):
        AmortisedVariational(gradient="envelope", **fields)
    assert AmortisedVariational(**fields).gradient == "implicit"


@pytest.mark.parametrize("field", ["q", "outside", "gradient"])
def test_unknown_choices_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of .* got 'other'"):
        AmortisedVariational(**{field: "other"})


def test_rows_that_each_bound_sees() -> None:
    drawn = LinearGaussian.random(17)
    split = tasks_of(drawn)
    support = AmortisedVariational().prepare(split, 0)
    assert isinstance(support, Tasks) and not support.is_split
    assert support.mask.sum() == split.mask.sum()
    query = AmortisedVariational(outside="query").prepare(split.unsplit, 0)
    assert isinstance(query, Tasks) and query.is_split


def test_defaults_are_what_is_well_posed() -> None:
    assert not AmortisedVariational().learn_scale
    assert AmortisedVariational(q="laplace").learn_scale and LaplaceEvidence().learn_scale
    assert not LaplaceEvidence(learn_scale=False).learn_scale
    assert replace(LaplaceEvidence(), steps=3).q == "laplace"
    names = {s.name for s in (AmortisedVariational(q="laplace", outside="query"), IMAML())}
    assert names == {"AmortisedVariational (laplace, query)", "IMAML"}


# -- the benchmark --------------------------------------------------------------------------------


def test_the_benchmark_times_equal_gradients() -> None:
    """With the inner problem solved, the envelope's and the implicit one are the same."""
    steps = envelope.steps_of(envelope.radon())
    fast, slow = (steps[f"amortised, {name}, Newton"]() for name in ("envelope", "implicit"))
    assert_close(fast, slow, 1e-9)
    assert len(steps) == 6 and envelope.time_of(steps["iMAML, query loss"]) > 0
