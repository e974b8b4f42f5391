"""Every law of Pyro that can be what a task's rows are drawn from, as a function of the predictor.

`LAWS` has one entry for each: the predictor m `[N]` to the law of N rows. `NOT_ROWS` says of each
other class of `pyro.distributions` why it is not here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.seeds import generator, global_rng
from varmeta.tasks import Tasks

Model = Callable[..., Any]


def model(name: str) -> Model:
    """A task's model: m = 0.1 + a x with one latent a, and N rows with the law of that name."""
    law = LAWS[name]

    def rows(x: Tensor, y: Tensor | None = None) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
        with nullcontext() if name in NO_PLATE else pyro.plate("rows", len(x)):
            return pyro.sample("y", law(0.1 + slope * x[:, 0]), obs=y)

    return rows


def tasks(name: str, num_tasks: int = 3) -> Tasks:
    """A few small tasks with this law, of 3 and 4 rows."""
    noise, pairs = generator(0), []
    with global_rng(generator(1)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample")  # of Wishart, drawn again
        for i in range(num_tasks):
            x = torch.randn(3 + i % 2, 1, generator=noise, dtype=torch.float64)
            m = 0.1 + 0.3 * x[:, 0]
            law = STAND_INS[name](m) if name in STAND_INS else LAWS[name](m)
            pairs.append((x, law.sample().detach()))
    return Tasks.from_list(pairs)


def _columns(m: Tensor, *factors: float) -> Tensor:
    """`[N]` to `[N, K]`."""
    return torch.stack([factor * m for factor in factors], -1)


def _triangle(m: Tensor) -> Tensor:
    """The same lower triangle for all rows."""
    return m.new_tensor([[1.0, 0.0], [0.4, 0.8]])


def _mixture(m: Tensor) -> Any:
    weights = dist.Categorical(probs=m.new_tensor([0.3, 0.7]).expand(len(m), 2))
    return dist.MixtureSameFamily(weights, dist.Normal(_columns(m, 1.0, -1.0), 0.6))


def _skewed(m: Tensor) -> Any:
    base = dist.VonMises(_columns(m, 1.0, 0.5), 1.5).to_event(1)
    return dist.SineSkewed(base, m.new_tensor([0.3, -0.2]))


def _transformed(m: Tensor) -> Any:
    return dist.TransformedDistribution(
        dist.Normal(m, 0.5),
        [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.ExpTransform()],
    )


def _hmm(m: Tensor) -> Any:
    """A row is a series of 4 numbers with two hidden states."""
    observation = dist.Normal(_columns(m, 1.0, -1.0)[:, None], 0.7)
    return dist.DiscreteHMM(
        m.new_zeros(2), m.new_tensor([[0.8, 0.2], [0.3, 0.7]]).log(), observation, duration=4
    )


def _gaussian_hmm(m: Tensor) -> Any:
    """A row is a series of 4 numbers with one hidden state."""
    one = torch.ones(len(m), 1, dtype=m.dtype)
    eye = torch.eye(1, dtype=m.dtype)
    return dist.GaussianHMM(
        dist.Normal(m[:, None], one).to_event(1),
        0.8 * eye,
        dist.Normal(0 * one[:, None], 0.5 * one[:, None]).to_event(1),
        eye,
        dist.Normal(0 * one[:, None], 0.4 * one[:, None]).to_event(1),
        duration=4,
    )


NO_PLATE = {"LKJ", "SoftAsymmetricLaplace"}  # Pyro cannot expand these in a plate


def _independent_hmm(m: Tensor) -> Any:
    """One hidden state for each of the (here one) columns of a series."""
    one, eye = torch.ones(len(m), 1, 1, dtype=m.dtype), torch.eye(1, dtype=m.dtype)
    noise = dist.Normal(0 * one[:, None], one[:, None]).to_event(1)
    start = dist.Normal(m[:, None, None], one).to_event(1)
    return dist.IndependentHMM(dist.GaussianHMM(start, 0.8 * eye, noise, eye, noise, duration=4))


def _gamma_gaussian_hmm(m: Tensor) -> Any:
    eye, two = torch.eye(1, dtype=m.dtype), m.new_full((len(m),), 2.0)
    noise = dist.MultivariateNormal(m.new_zeros(len(m), 1, 1), eye)
    start = dist.MultivariateNormal(m[:, None], eye)
    return dist.GammaGaussianHMM(
        dist.Gamma(two, two), start, 0.8 * eye, noise, eye, noise, duration=4
    )


def _gaussian_mrf(m: Tensor) -> Any:
    eye, zeros = torch.eye(1, dtype=m.dtype), m.new_zeros(len(m), 3, 2)
    pair = dist.MultivariateNormal(zeros, torch.eye(2, dtype=m.dtype) + 0.3)
    return dist.GaussianMRF(dist.MultivariateNormal(m[:, None], eye), pair, pair)


# The other classes of `pyro.distributions`, and why a row cannot have them as its law.
NOT_ROWS = {
    "AVFMultivariateNormal": "one vector, without a batch of rows",
    "CoalescentTimesWithRate": "one tree for a whole task",
    "Delta": "no density that moves with a parameter",
    "Empirical": "no density that moves with a parameter",
    "ExpandedDistribution": "what Pyro makes of another law in a plate",
    "ExponentialFamily": "abstract",
    "GaussianScaleMixture": "without a batch of rows",
    "GroupedNormalNormal": "one draw for a whole task",
    "ImproperUniform": "no density",
    "LKJCorrCholesky": "LKJCholesky under its old name",
    "LinearHMM": "no density without samples of its own",
    "OMTMultivariateNormal": "one vector, without a batch of rows",
    "OneOneMatching": "one matching for a whole task",
    "OneTwoMatching": "one matching for a whole task",
    "Rejector": "made of a user's own functions",
    "SpanningTree": "one tree for a whole task",
    "TorchDistribution": "abstract",
    "TruncatedPolyaGamma": "no parameter that moves",
    "Unit": "no value",
}

LAWS: dict[str, Callable[[Tensor], Any]] = {
    "AffineBeta": lambda m: dist.AffineBeta(m.exp(), 1.5, -1.0, 3.0),
    "AsymmetricLaplace": lambda m: dist.AsymmetricLaplace(m, 0.5, 1.3),
    "Bernoulli": lambda m: dist.Bernoulli(logits=m),
    "Beta": lambda m: dist.Beta(m.exp(), 1.5),
    "BetaBinomial": lambda m: dist.BetaBinomial(m.exp(), 1.5, 6),
    "Binomial": lambda m: dist.Binomial(6, logits=m),
    "Categorical": lambda m: dist.Categorical(logits=_columns(m, 1.0, -1.0, 0.0)),
    "Cauchy": lambda m: dist.Cauchy(m, 0.5),
    "Chi2": lambda m: dist.Chi2(1 + m.exp()),
    "CoalescentTimes": lambda m: dist.CoalescentTimes(m.new_zeros(4), m.exp()),
    "ContinuousBernoulli": lambda m: dist.ContinuousBernoulli(logits=m),
    "Dirichlet": lambda m: dist.Dirichlet(_columns(m, 0.5, -0.5, 0.0).exp()),
    "DirichletMultinomial": lambda m: dist.DirichletMultinomial(_columns(m, 0.5, -0.5).exp(), 6),
    "DiscreteHMM": _hmm,
    "Exponential": lambda m: dist.Exponential(m.exp()),
    "ExtendedBetaBinomial": lambda m: dist.ExtendedBetaBinomial(m.exp(), 1.5, 6),
    "ExtendedBinomial": lambda m: dist.ExtendedBinomial(6, logits=m),
    "FisherSnedecor": lambda m: dist.FisherSnedecor(2 + m.exp(), 6.0),
    "FoldedDistribution": lambda m: dist.FoldedDistribution(dist.Normal(m, 0.7)),
    "Gamma": lambda m: dist.Gamma(m.exp(), 2.0),
    "GammaGaussianHMM": _gamma_gaussian_hmm,
    "GammaPoisson": lambda m: dist.GammaPoisson(m.exp(), 0.5),
    "GaussianHMM": _gaussian_hmm,
    "GaussianMRF": _gaussian_mrf,
    "GeneralizedPareto": lambda m: dist.GeneralizedPareto(0.0, m.exp(), 0.2),
    "Geometric": lambda m: dist.Geometric(logits=m),
    "Gumbel": lambda m: dist.Gumbel(m, 0.5),
    "HalfCauchy": lambda m: dist.HalfCauchy(m.exp()),
    "HalfNormal": lambda m: dist.HalfNormal(m.exp()),
    "Independent": lambda m: dist.Normal(_columns(m, 1.0, 2.0), 0.5).to_event(1),
    "IndependentHMM": _independent_hmm,
    "InverseGamma": lambda m: dist.InverseGamma(3.0, m.exp()),
    "Kumaraswamy": lambda m: dist.Kumaraswamy(m.exp(), 2.0),
    "Laplace": lambda m: dist.Laplace(m, 0.5),
    "LKJ": lambda m: dist.LKJ(3, m.exp()),
    "LKJCholesky": lambda m: dist.LKJCholesky(3, m.exp()),
    "Logistic": lambda m: dist.Logistic(m, 0.5),
    "LogisticNormal": lambda m: dist.LogisticNormal(
        _columns(m, 1.0, -1.0), m.new_ones(2).expand(len(m), 2)
    ),
    "LogNormal": lambda m: dist.LogNormal(m, 0.5),
    "LogNormalNegativeBinomial": lambda m: dist.LogNormalNegativeBinomial(4.0, m, 0.5),
    "LowRankMultivariateNormal": lambda m: dist.LowRankMultivariateNormal(
        _columns(m, 1.0, -1.0), m.new_tensor([[0.7], [0.4]]), m.new_tensor([0.5, 0.3])
    ),
    "MaskedDistribution": lambda m: dist.Normal(m, 0.5).mask(m == m),
    "MaskedMixture": lambda m: dist.MaskedMixture(
        torch.arange(len(m)) % 2 == 0, dist.Normal(m, 0.5), dist.Laplace(m, 0.5)
    ),
    "MixtureOfDiagNormals": lambda m: dist.MixtureOfDiagNormals(
        torch.stack([_columns(m, 1.0, 0.5), _columns(m, -1.0, 0.0)], -2),
        m.new_ones(len(m), 2, 2),
        m.new_zeros(len(m), 2),
    ),
    "MixtureOfDiagNormalsSharedCovariance": lambda m: dist.MixtureOfDiagNormalsSharedCovariance(
        torch.stack([_columns(m, 1.0, 0.5), _columns(m, -1.0, 0.0)], -2),
        m.new_ones(len(m), 2),
        m.new_zeros(len(m), 2),
    ),
    "MixtureSameFamily": _mixture,
    "Multinomial": lambda m: dist.Multinomial(6, logits=_columns(m, 1.0, -1.0, 0.0)),
    "MultivariateNormal": lambda m: dist.MultivariateNormal(
        _columns(m, 1.0, -1.0), scale_tril=_triangle(m)
    ),
    "MultivariateStudentT": lambda m: dist.MultivariateStudentT(
        5.0, _columns(m, 1.0, -1.0), _triangle(m)
    ),
    "NanMaskedMultivariateNormal": lambda m: dist.NanMaskedMultivariateNormal(
        _columns(m, 1.0, -1.0), scale_tril=_triangle(m)
    ),
    "NanMaskedNormal": lambda m: dist.NanMaskedNormal(m, 0.5),
    "NegativeBinomial": lambda m: dist.NegativeBinomial(4.0, logits=m),
    "Normal": lambda m: dist.Normal(m, 0.5),
    "OneHotCategorical": lambda m: dist.OneHotCategorical(logits=_columns(m, 1.0, -1.0, 0.0)),
    "OneHotCategoricalStraightThrough": lambda m: dist.OneHotCategoricalStraightThrough(
        logits=_columns(m, 1.0, -1.0, 0.0)
    ),
    "OrderedLogistic": lambda m: dist.OrderedLogistic(m, m.new_tensor([-0.5, 0.5, 1.0])),
    "Pareto": lambda m: dist.Pareto(1.0, 1 + m.exp()),
    "Poisson": lambda m: dist.Poisson(m.exp()),
    "ProjectedNormal": lambda m: dist.ProjectedNormal(_columns(m, 1.0, -1.0, 0.5)),
    "RelaxedBernoulli": lambda m: dist.RelaxedBernoulli(m.new_tensor(0.7), logits=m),
    "RelaxedBernoulliStraightThrough": lambda m: dist.RelaxedBernoulliStraightThrough(
        m.new_tensor(0.7), logits=m
    ),
    "RelaxedOneHotCategorical": lambda m: dist.RelaxedOneHotCategorical(
        m.new_tensor(0.7), logits=_columns(m, 1.0, -1.0, 0.0)
    ),
    "RelaxedOneHotCategoricalStraightThrough": lambda m: (
        dist.RelaxedOneHotCategoricalStraightThrough(
            m.new_tensor(0.7), logits=_columns(m, 1.0, -1.0, 0.0)
        )
    ),
    "SineBivariateVonMises": lambda m: dist.SineBivariateVonMises(
        m, 0.5 * m, 0 * m + 2.0, 0 * m + 1.5, 0 * m + 0.4
    ),
    "SineSkewed": _skewed,
    "SkewLogistic": lambda m: dist.SkewLogistic(m, 0.5, 1.3),
    "SoftAsymmetricLaplace": lambda m: dist.SoftAsymmetricLaplace(m, 0.5, 1.3),
    "SoftLaplace": lambda m: dist.SoftLaplace(m, 0.5),
    "StableWithLogProb": lambda m: dist.StableWithLogProb(1.6, 0.1, 0.5, m),
    "Stable": lambda m: dist.Stable(1.6, 0.1, 0.5, m),
    "StudentT": lambda m: dist.StudentT(5.0, m, 0.5),
    "TransformedDistribution": _transformed,
    "Uniform": lambda m: dist.Uniform(m - 40.0, m.exp() + 40.0),
    "VonMises": lambda m: dist.VonMises(m, 3.0),
    "VonMises3D": lambda m: dist.VonMises3D(_columns(m, 1.0, -1.0, 0.5)),
    "Weibull": lambda m: dist.Weibull(m.exp(), 1.5),
    "Wishart": lambda m: dist.Wishart(
        m.exp() + 3.0, m.new_tensor([[1.0, 0.4], [0.4, 0.8]]).expand(len(m), 2, 2)
    ),
    "ZeroInflatedDistribution": lambda m: dist.ZeroInflatedDistribution(
        dist.Poisson(m.exp()), gate=m.new_tensor(0.3)
    ),
    "ZeroInflatedNegativeBinomial": lambda m: dist.ZeroInflatedNegativeBinomial(
        4.0, logits=m, gate=m.new_tensor(0.3)
    ),
    "ZeroInflatedPoisson": lambda m: dist.ZeroInflatedPoisson(m.exp(), gate=m.new_tensor(0.3)),
}

# Where Pyro has no sampler: a law that takes the same values.
STAND_INS: dict[str, Callable[[Tensor], Any]] = {
    "GammaGaussianHMM": LAWS["GaussianHMM"],
    "GaussianMRF": lambda m: dist.Normal(m[:, None, None].expand(-1, 3, 1), 1.0).to_event(2),
    "LogNormalNegativeBinomial": lambda m: dist.NegativeBinomial(4.0, logits=m),
    "VonMises3D": LAWS["ProjectedNormal"],
}
