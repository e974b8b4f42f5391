"""Where a prior starts on the unconstrained scale, against quadrature of its density there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, tensor
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import biject_to, transforms

from varmeta import Density, Tasks
from varmeta.models.moments import unconstrained_moments, unconstrained_range

AFFINE = transforms.AffineTransform(tensor(1.0), tensor(-3.0))
KNOWN: dict[str, Any] = {
    "normal": dist.Normal(tensor(1.0), tensor(2.0)),
    "log-normal": dist.LogNormal(tensor(math.log(0.5)), tensor(1.0)),
    "half-normal": dist.HalfNormal(tensor(5.0)),
    "half-cauchy": dist.HalfCauchy(tensor(25.0)),
    "exponential": dist.Exponential(tensor(3.0)),
    "gamma": dist.Gamma(tensor(2.5), tensor(0.3)),
    "chi2": dist.Chi2(tensor(3.0)),
    "inverse gamma": dist.InverseGamma(tensor(2.0), tensor(3.0)),
    "F": dist.FisherSnedecor(tensor(3.0), tensor(7.0)),
    "weibull": dist.Weibull(tensor(2.0), tensor(1.5)),
    "pareto": dist.Pareto(tensor(2.0), tensor(3.0)),
    "uniform": dist.Uniform(tensor(0.0), tensor(1.0)),
    "uniform, elsewhere": dist.Uniform(tensor(-3.0), tensor(7.0)),
    "beta": dist.Beta(tensor(2.0), tensor(0.7)),
    "laplace": dist.Laplace(tensor(1.0), tensor(2.0)),
    "logistic": dist.Logistic(tensor(1.0), tensor(2.0)),
    "gumbel": dist.Gumbel(tensor(1.0), tensor(2.0)),
    "student": dist.StudentT(tensor(9.0), tensor(1.0), tensor(2.0)),
    "turned normal": dist.TransformedDistribution(dist.Normal(0, tensor(2.0)), [AFFINE]),
    "logit-normal": dist.TransformedDistribution(
        dist.Normal(tensor(1.0), tensor(2.0)), [AFFINE, transforms.SigmoidTransform()]
    ),
    "root of a gamma": dist.TransformedDistribution(
        dist.Gamma(tensor(2.0), tensor(0.5)), [transforms.PowerTransform(tensor(0.5))]
    ),
    "two of a Dirichlet": dist.Dirichlet(tensor([1.5, 0.7])),
    "two by two": dist.LKJCholesky(2, tensor(1.7)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_moments_are_those_of_the_unconstrained_density(name: str) -> None:
    law = KNOWN[name]
    transform = biject_to(law.support)
    found = unconstrained_moments(law, transform)
    assert found is not None
    mean, sd = (float(v) for v in found)

    def density(u: float) -> float:
        z = torch.full(transform.inv(law.sample()).shape, mean + sd * u, dtype=FLOAT)
        x = transform(z)
        return sd * float((law.log_prob(x) + transform.log_abs_det_jacobian(z, x).sum()).exp())

    moments = [
        sum(quad(lambda u, k=k: density(u) * u**k, *ends)[0] for ends in ((-30, 0), (0, 30)))
        for k in range(3)
    ]
    assert moments == pytest.approx([1, 0, 1], abs=2e-5)  # a Student's tail beyond 30: 1e-5


def test_a_simplex_by_draws() -> None:
    """Of 100,000 draws, to 5 standard errors of a mean and of a standard deviation."""
    law = dist.Dirichlet(tensor([1.0, 2.0, 0.5, 3.0]))
    transform = biject_to(law.support)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = transform.inv(law.sample((100_000,)))
    mean, sd = unconstrained_moments(law, transform)  # type: ignore[misc]
    kurtosis = (((z - mean) / sd) ** 4).mean(0)
    assert bool(((z.mean(0) - mean).abs() < 5 * sd / len(z) ** 0.5).all())
    assert bool(((z.std(0) / sd - 1).abs() < 2.5 * ((kurtosis - 1) / len(z)).sqrt()).all())


def test_a_correlation_matrix_by_its_density() -> None:
    """On a grid: PyTorch's own draws of three correlations and more are not of its density."""
    law = dist.LKJCholesky(3, tensor(1.7))
    transform = biject_to(law.support)
    line = torch.linspace(-7, 7, 57, dtype=FLOAT)
    z = torch.cartesian_prod(line, line, line)
    x = transform(z)
    weight = (law.log_prob(x) + transform.log_abs_det_jacobian(z, x)).exp() * 0.25**3
    mean, sd = unconstrained_moments(law, transform)  # type: ignore[misc]
    assert float(weight.sum()) == pytest.approx(1, abs=1e-6)
    assert (weight[:, None] * z**2).sum(0).sqrt().tolist() == pytest.approx(sd.tolist(), abs=1e-5)
    assert mean.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("law", "median", "half"),
    [
        (dist.Cauchy(tensor(0.5), tensor(2.0)), 0.5, 2 * math.tan(0.68268949 * math.pi / 2)),
        (
            dist.TransformedDistribution(
                dist.Normal(tensor(1.0), tensor(0.5)),
                [transforms.ExpTransform(), transforms.PowerTransform(tensor(2.0))],
            ),
            2.0,
            1.0,
        ),
    ],
)
def test_without_moments_quantiles(law: Any, median: float, half: float) -> None:
    transform = biject_to(law.support)
    assert unconstrained_moments(law, transform) is None
    found = unconstrained_range(law, transform)
    assert [float(v) for v in found] == pytest.approx([median, half], rel=1e-5)  # type: ignore[union-attr]


def test_the_sites_of_a_model_start_there() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.LogNormal(math.log(0.5), 1.0).expand([2]).to_event(1))
        b = pyro.sample("b", dist.HalfCauchy(25.0))
        c = pyro.sample("c", dist.Cauchy(0.5, 2.0))
        d = pyro.sample("d", dist.Dirichlet(x.new_tensor([1.5, 0.7])))
        e = pyro.sample("e", dist.Stable(1.5, x.new_tensor(0.0)))  # by draws
        mean = a.sum() + c + d[0] + e
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(mean + x[..., 0], b), obs=y)

    tasks = Tasks.from_list([(np.ones((3, 1)), np.arange(3.0))])
    sites = {site.name: site for site in Density(model, tasks).sites}
    assert sites["a"].loc.tolist() == pytest.approx([math.log(0.5)] * 2, abs=1e-7)
    assert sites["a"].scale.tolist() == [1.0, 1.0]
    assert float(sites["b"].loc) == pytest.approx(math.log(25), abs=1e-6)
    assert float(sites["b"].scale) == pytest.approx(math.pi / 2, abs=1e-6)
    assert float(sites["c"].scale) == pytest.approx(3.6745, abs=1e-3)  # half the central 68%
    assert sites["d"].loc.shape == (1,) and bool((sites["e"].scale > 0).all())
