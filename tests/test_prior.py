"""GaussianPrior: every formula against torch.distributions, in every form of Σ."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from density_cases import FLOAT, numbers, reals

from varmeta.models import GaussianPrior, Hyperprior
from varmeta.models.density import Density
from varmeta.seeds import generator

D = 4
GROUPS = {
    "coordinate": torch.arange(D),
    "site": torch.tensor([0, 0, 1, 2]),
    "all": torch.zeros(D, dtype=torch.long),
}
FORMS = [(g, r) for g in GROUPS for r in (0, 2)]
everywhere = pytest.mark.parametrize(("groups", "rank"), FORMS)


def make(groups: str, rank: int) -> GaussianPrior:
    index = GROUPS[groups]
    return GaussianPrior(
        numbers(D, seed=1),
        0.5 * numbers(int(index.max()) + 1, seed=2),
        index,
        numbers(D, rank, seed=3) if rank else None,
    )


def covariance(prior: GaussianPrior) -> torch.Tensor:
    sd = torch.stack([prior.log_scale[g].exp() for g in prior.groups])
    factor = torch.zeros(D, 1, dtype=FLOAT) if prior.factor is None else prior.factor
    return torch.diag(sd**2) + factor @ factor.T


def oracle(prior: GaussianPrior) -> td.MultivariateNormal:
    return td.MultivariateNormal(prior.loc, covariance(prior))


@everywhere
def test_densities_are_those_of_the_multivariate_normal(groups, rank):
    prior, theta = make(groups, rank), numbers(3, 2, D)
    normal = oracle(prior)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(prior.log_prob(theta), normal.log_prob(theta), **close)
    torch.testing.assert_close(prior.precision_mv(theta), theta @ normal.precision_matrix, **close)
    torch.testing.assert_close(prior.precision(), normal.precision_matrix, **close)
    torch.testing.assert_close(prior.log_det(), torch.logdet(covariance(prior)), **close)
    constant = normal.log_prob(prior.loc)
    torch.testing.assert_close(prior.penalty(theta), constant - normal.log_prob(theta), **close)
    assert prior.dim == D


@everywhere
def test_kl_is_that_of_the_multivariate_normal(groups, rank):
    prior, mean, sd = make(groups, rank), numbers(3, D, seed=4), numbers(3, D, seed=5).exp()
    q = td.MultivariateNormal(mean, torch.diag_embed(sd**2))
    torch.testing.assert_close(
        prior.kl(mean, sd), td.kl_divergence(q, oracle(prior)), rtol=1e-11, atol=1e-11
    )
    own = GaussianPrior.create(prior.loc, prior.scale)
    assert own.kl(prior.loc, prior.scale).abs() < 1e-14, "0 from itself"


@everywhere
def test_gradients_of_the_kl_are_those_of_finite_differences(groups, rank):
    prior, mean, sd = make(groups, rank), numbers(D, seed=4), numbers(D, seed=5).exp()
    names = ["loc", "log_scale", *(["factor"] if rank else [])]

    def kl(*leaves):
        return replace(prior, **dict(zip(names, leaves, strict=True))).kl(mean, sd)

    leaves = tuple(getattr(prior, n).clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(kl, leaves, eps=1e-6, atol=1e-6, rtol=1e-6)
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(kl(*leaves), leaves))


@everywhere
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of forward derivatives
def test_derivatives_of_the_penalty_are_those_of_finite_differences(groups, rank):
    """The first two, in everything; under `torch.func` it is the function that it is."""
    prior, theta, along = make(groups, rank), numbers(2, D, seed=4), numbers(2, D, seed=5)
    names = ["loc", "log_scale", *(["factor"] if rank else [])]

    def penalty(theta, *leaves):
        return replace(prior, **dict(zip(names, leaves, strict=True))).penalty(theta)

    leaves = [t.clone().requires_grad_() for t in (theta, *(getattr(prior, n) for n in names))]
    assert torch.autograd.gradcheck(penalty, leaves)
    assert torch.autograd.gradgradcheck(penalty, leaves)
    matrix, close = prior.precision(), {"rtol": 1e-11, "atol": 1e-11}
    rows = torch.vmap(torch.func.hessian(prior.penalty))(theta)  # forward over reverse
    torch.testing.assert_close(rows, matrix.expand(2, D, D), **close)
    _, slope = torch.func.jvp(prior.penalty, (theta,), (along,))
    torch.testing.assert_close(
        slope, (along * prior.precision_mv(theta - prior.loc)).sum(-1), **close
    )


@everywhere
def test_samples_have_the_mean_and_covariance(groups, rank):
    prior, count = make(groups, rank), 40_000
    draws = prior.sample((count // 2, 2), generator(0))
    assert draws.shape == (count // 2, 2, D)
    assert torch.equal(draws, prior.sample((count // 2, 2), generator(0)))
    assert not torch.equal(draws, prior.sample((count // 2, 2), generator(1)))
    offset, sigma = draws.reshape(count, D) - prior.loc, covariance(prior)
    # 5 standard errors in 14 numbers: false alarm 1e-5; Var(z_i z_j) = Σ_ii Σ_jj + Σ_ij²
    se = (sigma.diagonal() / count).sqrt()
    assert (offset.mean(0).abs() < 5 * se).all()
    se = ((sigma.diagonal()[:, None] * sigma.diagonal() + sigma**2) / count).sqrt()
    assert ((offset.T @ offset / count - sigma).abs() < 5 * se).all()


@everywhere
def test_samples_are_differentiable(groups, rank):
    prior = make(groups, rank)
    names = ["loc", "log_scale", *(["factor"] if rank else [])]
    leaves = [getattr(prior, n).clone().requires_grad_() for n in names]
    moving = replace(prior, **dict(zip(names, leaves, strict=True)))
    draws = moving.sample((3,), generator(0))
    loc, *others = torch.autograd.grad(draws.sum(), leaves)
    assert torch.equal(loc, torch.full((D,), 3.0, dtype=FLOAT)) and all(o.any() for o in others)


def test_hyperprior_is_a_normal_and_a_half_normal():
    belief = Hyperprior(numbers(3), numbers(3, seed=1).exp(), numbers(2, seed=2).exp())
    loc, scale = numbers(3, seed=3), numbers(2, seed=4).exp()
    normal = td.Normal(belief.loc, belief.width).log_prob(loc).sum()
    half = td.HalfNormal(belief.scale_width).log_prob(scale).sum()
    torch.testing.assert_close(belief.log_prob(loc, scale), normal + half)
    prior = GaussianPrior(loc, scale.log(), torch.tensor([0, 0, 1]), None, belief)
    torch.testing.assert_close(prior.hyper_log_prob(), normal + half)
    assert float(replace(prior, hyperprior=None).hyper_log_prob()) == 0.0


def test_create_takes_standard_deviations():
    loc = torch.zeros(3, dtype=FLOAT)
    assert GaussianPrior.create(loc, 0.5).scale.tolist() == pytest.approx([0.5] * 3)
    one = GaussianPrior.create(loc, 0.5)
    assert one.log_scale.shape == (1,) and one.log_scale.dtype == FLOAT
    assert GaussianPrior.create(loc, [1.0, 2.0, 3.0]).scale.tolist() == pytest.approx([1, 2, 3])
    grouped = GaussianPrior.create(loc, [1.0, 2.0], groups=torch.tensor([1, 0, 1]))
    assert grouped.scale.tolist() == pytest.approx([2.0, 1.0, 2.0])


# -- from the user's model ------------------------------------------------------------------------


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.1, 3.0])))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    c = pyro.sample("c", dist.Cauchy(0.5, 2.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ w.to(x) + c, s), obs=y)


def start(**kwargs) -> GaussianPrior:
    return GaussianPrior.from_density(Density(model, reals(2)), **kwargs)


def test_it_starts_at_the_users_prior():
    prior = start(scales="coordinate")
    assert prior.loc[:2].tolist() == [1.0, -2.0], "exactly: a normal prior has its own moments"
    assert prior.scale[:2].tolist() == pytest.approx([0.1, 3.0], rel=1e-7)  # float32 literals
    # log |z|: −(γ + log 2)/2 and π/√8
    assert prior.loc[2].item() == pytest.approx(math.log(2.0) - 0.635181422730739, abs=1e-6)
    assert prior.scale[2].item() == pytest.approx(math.pi / 8**0.5, abs=1e-6)
    # Cauchy: no moments, so its median and the half width of its central 68%: 2 tan(0.6827 π/2)
    assert prior.loc[3].item() == pytest.approx(0.5, abs=1e-6)
    assert prior.scale[3].item() == pytest.approx(2 * math.tan(0.6826895 * math.pi / 2), rel=1e-5)


def test_one_scale_per_coordinate_site_or_all():
    each = start(scales="coordinate")
    site, everything = start(), start(scales="all")
    assert each.groups.tolist() == [0, 1, 2, 3] and site.groups.tolist() == [0, 0, 1, 2]
    assert everything.groups.tolist() == [0] * 4
    geometric = each.log_scale[:2].mean(), each.log_scale[2], each.log_scale[3]
    torch.testing.assert_close(site.log_scale, torch.stack(geometric))
    torch.testing.assert_close(everything.log_scale[0], each.log_scale.mean())
    for prior in (each, site, everything):
        assert torch.equal(prior.hyperprior.loc, each.loc)
        assert torch.equal(prior.hyperprior.width, each.hyperprior.width)
        torch.testing.assert_close(prior.hyperprior.scale_width, prior.log_scale.exp())
    assert start(hyperprior=False).hyperprior is None


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_the_low_rank_part_starts_small_and_of_full_rank(dim):
    """A column of zeros would stay so, and equal columns equal."""
    width = numbers(dim).exp()
    density = SimpleNamespace(
        dim=dim,
        prior_loc=numbers(dim),
        prior_scale=width,
    )
    for rank in range(1, dim + 1):
        factor = (
            GaussianPrior.from_density(density, scales="all", rank=rank).factor / width[:, None]
        )
        assert factor.shape == (dim, rank) and factor.abs().max() <= 0.1
        assert torch.linalg.svdvals(factor).min() > 0.05
