"""The three forms of a task posterior: moments, draws, densities and predictions.

Monte Carlo comparisons are to 5 standard errors; under normality one number in 1.7e6 is a false
alarm, and no test compares more than some 200.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FLOAT, Case, assert_close, case_of, predictive_error, tensor
from linear_gaussian import LinearGaussian
from scipy.stats import multivariate_normal
from torch import Tensor

from varmeta import parts
from varmeta.inference.imaml import adapt_map
from varmeta.inference.newton import NewtonCG
from varmeta.models.density import Density
from varmeta.posterior import Delta, Draws, Gaussian, TaskPosterior
from varmeta.seeds import generator

PROBLEM = LinearGaussian.random(0)
CASE = case_of(PROBLEM, shared_noise=True)
COUNT = 4000


def exact(case: Case = CASE) -> Gaussian:
    """The exact posterior given the support rows."""
    made = adapt_map(case.density, case.prior, case.shared, case.tasks.support, NewtonCG(), True)
    assert isinstance(made, Gaussian)
    return made


def diagonal() -> Gaussian:
    sds = tensor(PROBLEM.best_variances()).sqrt()
    loc = tensor(PROBLEM.theta_stars())
    return Gaussian(CASE.density, CASE.tasks.names, CASE.shared, loc, sds)


def delta() -> Delta:
    return Delta(CASE.density, CASE.tasks.names, CASE.shared, tensor(PROBLEM.theta_stars()))


def draws(count: int = 40, chains: int = 2) -> Draws:
    """θ random; φ the number of the draw over 100, so that a mispaired draw shows."""
    theta = torch.randn(count, 6, 3, dtype=FLOAT, generator=generator(0))
    shared = torch.arange(count, dtype=FLOAT)[:, None, None].expand(-1, 6, 1) / 100
    return Draws(CASE.density, CASE.tasks.names, shared, theta, chains)


POSTERIORS = {"laplace": exact(), "gaussian": diagonal(), "delta": delta(), "draws": draws()}
every_form = pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS.keys())


@every_form
def test_shapes(posterior: TaskPosterior) -> None:
    query = CASE.tasks.query
    assert posterior.mean.shape == posterior.sd.shape == (6, 3)
    for count in (1, 7, 40, 60):
        theta, shared = posterior.sample(count, generator(0))
        assert theta.shape == (count, 6, 3)
        assert shared.shape in ((1,), (count, 6, 1))
        logp = posterior.log_predictive(query, count, generator(0))
        assert logp.shape == query.mask.shape and not logp.requires_grad
        predicted = posterior.predict(query, count, generator(0))
        assert {k: v.shape for k, v in predicted.items()} == {"y": (count, *query.mask.shape)}


def test_covariance_in_closed_form() -> None:
    """Exact against the oracle's inverses, the low-rank sum and NumPy's sample covariance."""
    variances = np.stack([np.diag(v) for v in PROBLEM.best_variances()])
    assert_close(exact().covariance, np.stack([PROBLEM.posterior_cov(i) for i in range(6)]), 1e-9)
    assert_close(diagonal().covariance, variances, 1e-12)
    factor = torch.randn(6, 3, 2, dtype=FLOAT, generator=generator(1))
    low = replace(diagonal(), factor=factor)
    outer = np.einsum("tdr,ter->tde", factor, factor)
    assert_close(low.covariance, variances + outer, 1e-12)
    theta = draws().draws.numpy()
    wanted = np.stack([np.cov(theta[:, i], rowvar=False) for i in range(6)])
    assert_close(draws().covariance, wanted, 1e-12)
    assert draws().select([4, 1]).covariance.shape == (2, 3, 3)


@every_form
def test_covariance_has_the_variances_on_its_diagonal(posterior: TaskPosterior) -> None:
    found = posterior.covariance
    assert found.shape == (6, 3, 3) and torch.equal(found, found.mT)
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), posterior.sd**2)


@every_form
def test_kind(posterior: TaskPosterior, request: pytest.FixtureRequest) -> None:
    assert posterior.kind == request.node.callspec.id


@every_form
def test_padding_predicts_nothing(posterior: TaskPosterior) -> None:
    query = CASE.tasks.query
    logp = posterior.log_predictive(query, 10, generator(0))
    assert bool((~query.mask).any())
    assert bool((logp[~query.mask].abs() < 1e-14).all()) and bool((logp[query.mask] != 0).all())


@every_form
def test_same_generator_same_draws(posterior: TaskPosterior) -> None:
    for count in (5, 100):
        first, again, other = (posterior.sample(count, generator(k))[0] for k in (0, 0, 1))
        assert torch.equal(first, again)
        drawn = posterior.kind in ("gaussian", "laplace")
        drawn |= posterior.kind == "draws" and count > 40
        assert torch.equal(first, other) is not drawn


@every_form
def test_log_predictive_averages_densities_over_the_draws(posterior: TaskPosterior) -> None:
    query = CASE.tasks.query
    theta, shared = posterior.sample(30, generator(3))
    rows = CASE.density.log_likelihood(theta, query, shared)
    ours = posterior.log_predictive(query, 30, generator(3))
    torch.testing.assert_close(ours, rows.exp().mean(0).log(), rtol=1e-10, atol=1e-12)


@every_form
@pytest.mark.parametrize("rows", [7, 100, 350])
def test_a_few_draws_at_once_average_to_the_same(
    posterior: TaskPosterior, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = CASE.tasks.query
    whole = posterior.log_predictive(query, 30, generator(3))
    monkeypatch.setattr(parts, "AT_ONCE", rows)
    seen, call = list[int](), Density.log_likelihood

    def counted(self: Density, theta: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = call(self, theta, *rest, **more)
        seen.append(out.numel())
        return out

    monkeypatch.setattr(Density, "log_likelihood", counted)
    again = posterior.log_predictive(query, 30, generator(3))
    assert max(seen) <= max(1, rows)
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-13)


# -- Gaussian -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [exact, diagonal])
def test_gaussian_draws_have_its_moments(make: object) -> None:
    posterior = make()  # type: ignore[operator]
    tril = posterior.scale
    cov = tril @ tril.mT if tril.dim() == 3 else (tril**2).diag_embed()
    theta, _ = posterior.sample(COUNT, generator(1))
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(cov), (theta - posterior.mean)[..., None], upper=False
    )[..., 0]
    assert float(white.mean(0).abs().max()) < 5 / COUNT**0.5
    products = torch.einsum("stj,stk->tjk", white, white) / COUNT - torch.eye(3)
    assert float(products.diagonal(dim1=1, dim2=2).abs().max()) < 5 * (2 / COUNT) ** 0.5
    assert float(products.tril(-1).abs().max()) < 5 / COUNT**0.5
    assert_close(posterior.sd**2, cov.diagonal(dim1=1, dim2=2), 1e-12)


@pytest.mark.parametrize("make", [exact, diagonal])
def test_gaussian_density_is_normalised(make: object) -> None:
    posterior = make()  # type: ignore[operator]
    tril = posterior.scale
    cov = tril @ tril.mT if tril.dim() == 3 else (tril**2).diag_embed()
    theta, _ = posterior.sample(5, generator(2))
    ours = posterior.log_prob(theta)
    assert ours.shape == (5, 6)
    for i in range(6):
        wanted = multivariate_normal(posterior.mean[i].numpy(), cov[i].numpy()).logpdf(theta[:, i])
        assert_close(ours[:, i], wanted, 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_predictive_of_the_exact_posterior(seed: int) -> None:
    """Against log N(y; xᵀm, s² + xᵀVx) of every query row."""
    problem = LinearGaussian.random(seed)
    case = case_of(problem)
    posterior, query = exact(case), case.tasks.query
    logp = posterior.log_predictive(query, COUNT, generator(0))
    theta, shared = posterior.sample(COUNT, generator(0))
    error = predictive_error(case.density.log_likelihood(theta, query, shared))
    for i in range(problem.num_tasks):
        wanted = tensor(problem.log_predictive(i))
        rows = slice(0, len(wanted))
        # with weights this uneven neither the average nor its error means much
        usable = error[i, rows] < 0.1
        assert bool(((logp[i, rows] - wanted).abs() < 5 * error[i, rows])[usable].all())
        assert float(usable.double().mean()) >= 0.5


def test_predictions_of_the_exact_posterior_have_its_moments() -> None:
    problem = LinearGaussian.random(3)
    case = case_of(problem)
    predicted = exact(case).predict(case.tasks.query, COUNT, generator(0))["y"]
    for i, x in enumerate(problem.query_designs):
        y = predicted[:, i, : len(x)].numpy()
        variance = problem.noise2 + np.sum((x @ problem.posterior_cov(i)) * x, axis=1)
        score = (y.mean(0) - x @ problem.theta_star(i)) / np.sqrt(variance / COUNT)
        assert np.abs(score).max() < 5
        assert np.abs(y.var(0) / variance - 1).max() < 5 * np.sqrt(2 / COUNT)


# -- delta ----------------------------------------------------------------------------------------


def test_delta_predicts_at_its_point() -> None:
    posterior, query = delta(), CASE.tasks.query
    assert float(posterior.sd.abs().max()) == 0
    theta, _ = posterior.sample(3, generator(0))
    assert torch.equal(theta, posterior.mean.expand(3, -1, -1))
    rows = CASE.density.log_likelihood(posterior.mean, query, CASE.shared)
    for count in (1, 8):
        ours = posterior.log_predictive(query, count, generator(0))
        torch.testing.assert_close(ours, rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("posterior", [delta(), draws()], ids=["delta", "draws"])
def test_what_has_no_density_says_so(posterior: TaskPosterior) -> None:
    with pytest.raises(ValueError, match=f"a {posterior.kind} posterior has no density"):
        posterior.log_prob(posterior.mean)


# -- draws ----------------------------------------------------------------------------------------


def test_draws_moments_are_those_of_the_draws() -> None:
    posterior = draws()
    assert_close(posterior.mean, posterior.draws.numpy().mean(0), 1e-12)
    assert_close(posterior.sd, posterior.draws.numpy().std(0, ddof=1), 1e-12)


@pytest.mark.parametrize("count", [1, 7, 20, 39, 40, 41, 500])
def test_draws_are_kept_in_pairs_with_their_shared_values(count: int) -> None:
    """All in their order, an even thinning, or drawn again: θ and φ of one draw stay together."""
    posterior = draws()
    theta, shared = posterior.sample(count, generator(0))
    number = (shared[:, 0, 0] * 100).round().long()
    assert torch.equal(theta, posterior.draws[number])
    if count <= 40:
        assert number.tolist() == sorted(set(number.tolist()))  # no draw twice
        if count > 1:
            assert (
                number[0] == 0 and number[-1] == 39 and int(number.diff().max()) <= 40 / count + 2
            )
    else:
        frequency = number.bincount(minlength=40) / count
        assert float((frequency - 1 / 40).abs().max()) < 5 * (1 / 40 / count) ** 0.5


def test_draws_with_one_shared_value_for_all() -> None:
    theta = torch.zeros(4, 6, 3, dtype=FLOAT)
    posterior = Draws(CASE.density, CASE.tasks.names, CASE.shared, theta)
    _, shared = posterior.sample(2, generator(0))
    assert torch.equal(shared, CASE.shared)
    rows = posterior.log_predictive(CASE.tasks.query, 4, generator(0))
    zero: Tensor = CASE.density.log_likelihood(theta[0], CASE.tasks.query, CASE.shared)
    torch.testing.assert_close(rows, zero, rtol=1e-12, atol=1e-12)
