"""The families of q_i: what a row means, and the closed forms of a Gaussian that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from density_cases import FLOAT, numbers
from test_prior import everywhere, make, oracle
from torch import Tensor

from varmeta.inference.families import Family, GaussianQ
from varmeta.inference.free_energy import cubature
from varmeta.seeds import generator

D, B = 4, 3
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
FAMILIES = [Family("diagonal", D), Family("low_rank", D, 2), Family("full", D)]
LOC, UNIT = numbers(D, seed=6), numbers(D, seed=7).exp()
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)


def q_of(family: Family) -> GaussianQ:
    return family.q(0.5 * numbers(B, family.num_columns, seed=8), LOC, UNIT)


def covariance(q: GaussianQ) -> Tensor:
    out = torch.zeros(B, D, D, dtype=FLOAT)
    if q.sd is not None:
        out = out + (q.sd**2).diag_embed()
    return out if q.factor is None else out + q.factor @ q.factor.mT


def normal(q: GaussianQ) -> td.MultivariateNormal:
    return td.MultivariateNormal(q.mean, covariance(q))


@everywhere
@every_family
def test_kl_is_that_of_the_multivariate_normal(family: Family, groups: str, rank: int) -> None:
    prior, q = make(groups, rank), q_of(family)
    torch.testing.assert_close(q.kl(prior), td.kl_divergence(normal(q), oracle(prior)), **CLOSE)


@everywhere
def test_a_point_has_the_penalty_of_the_prior(groups: str, rank: int) -> None:
    prior, theta = make(groups, rank), numbers(B, D)
    q = Family("delta", D).q(theta, torch.zeros(D, dtype=FLOAT), torch.ones(D, dtype=FLOAT))
    torch.testing.assert_close(q.kl(prior), prior.penalty(theta), **CLOSE)
    assert not q.variance.any() and q.noise_dim == 0


@every_family
def test_draws_have_the_mean_and_covariance(family: Family) -> None:
    """The cubature points have exactly those of a standard normal, so q's come out exactly."""
    q = q_of(family)
    noise = cubature(q.noise_dim, FLOAT, torch.device("cpu"))[:, None].expand(-1, B, -1)
    draws = q.draws(noise)
    centred = draws - q.mean
    torch.testing.assert_close(draws.mean(0), q.mean, **CLOSE)
    second = torch.einsum("sbi,sbj->bij", centred, centred) / len(draws)
    torch.testing.assert_close(second, covariance(q), **CLOSE)
    torch.testing.assert_close(q.variance, covariance(q).diagonal(dim1=1, dim2=2), **CLOSE)


@every_family
def test_as_a_posterior_it_is_the_same_gaussian(family: Family) -> None:
    """Moments of 200,000 draws: five standard errors, 3 · (4 + 10) moments, false alarm 2e-5."""
    q = q_of(family)
    posterior = q.posterior(None, tuple("abc"), torch.zeros(0))  # type: ignore[arg-type]
    theta = numbers(5, B, D)
    torch.testing.assert_close(posterior.log_prob(theta), normal(q).log_prob(theta), **CLOSE)
    torch.testing.assert_close(posterior.mean, q.mean)
    torch.testing.assert_close(posterior.sd, q.variance.sqrt(), **CLOSE)
    draws, _ = posterior.sample(200_000, generator(0))
    standard = torch.linalg.solve_triangular(
        normal(q).scale_tril, (draws - q.mean)[..., None], upper=False
    )[..., 0]
    assert (standard.mean(0).abs() < 5 / len(draws) ** 0.5).all()
    second = torch.einsum("sbi,sbj->bij", standard, standard) / len(draws)
    assert ((second - torch.eye(D)).abs() < 5 * (2 / len(draws)) ** 0.5).all()


@everywhere
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_row_of_the_prior_is_the_prior(kind: str, groups: str, rank: int) -> None:
    """With correlations a full q is it exactly; a diagonal one has its own scales."""
    prior, family = make(groups, rank), Family(kind, D)  # type: ignore[arg-type]
    q = family.q(family.row_of(prior, LOC, UNIT)[None], LOC, UNIT)
    torch.testing.assert_close(q.mean[0], prior.loc, **CLOSE)
    if kind == "full":
        assert q.kl(prior).abs() < 1e-11
        torch.testing.assert_close(q.factor @ q.factor.mT, prior.covariance()[None], **CLOSE)  # type: ignore[operator,union-attr]
    else:
        torch.testing.assert_close(q.sd, prior.scale[None], **CLOSE)


@every_family
def test_every_column_has_a_gradient_at_the_start(family: Family) -> None:
    """Else a part of q could never leave it."""
    prior = make("coordinate", 0)
    row = family.row_of(prior, LOC, UNIT)[None].requires_grad_()
    q = family.q(row, LOC, UNIT)
    hessian = numbers(D, D, seed=9)
    noise = cubature(q.noise_dim, FLOAT, torch.device("cpu"))[:, None]
    theta = q.draws(noise)
    expected = (theta @ (hessian @ hessian.T) * theta).sum(-1).mean()
    (grad,) = torch.autograd.grad(q.kl(prior).sum() + expected, row)
    assert (grad.abs() > 1e-6).all()


@everywhere
@every_family
def test_gradients_of_the_kl_are_those_of_finite_differences(
    family: Family, groups: str, rank: int
) -> None:
    prior = make(groups, rank)
    rows = (0.5 * numbers(B, family.num_columns, seed=8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: family.q(r, LOC, UNIT).kl(prior), rows)
