"""The M-step against the moments themselves, where sums of squares cancel."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from varmeta import Density, GaussianPrior
from varmeta.inference.base import Meta
from varmeta.inference.closed_form import add_moments, maximise, no_moments
from varmeta.inference.families import GaussianQ
from varmeta.tasks import Tasks


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(theta + 0 * x[..., 0], 1.0), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sd", [6e-4, 0.1])
def test_a_small_spread_far_from_zero_is_found(dtype: torch.dtype, sd: float) -> None:
    """Means of 5 with a spread of 6e-4: in float32 their squares differ by less than rounding."""
    zeros = torch.zeros(2, 1, dtype=dtype)
    density = Density(model, Tasks.from_list([(zeros, zeros[:, 0])] * 2))
    prior = GaussianPrior.from_density(density, hyperprior=False)
    meta = Meta.start(density, prior)
    noise = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (5 + sd * noise).to(dtype)
    q = GaussianQ(mean, torch.full_like(mean, 0.1 * sd))
    sums = no_moments(meta)
    add_moments(sums, meta, q, 1.0)
    maximise(sums, meta, 50, True, True)
    found, exact = meta.fixed()[0].scale, mean.double().var(0, correction=0) + (0.1 * sd) ** 2
    assert float(found) == pytest.approx(float(exact.sqrt()), rel=2e-3)


def test_no_spread_at_all_is_as_little_as_can_be_told() -> None:
    zeros = torch.zeros(2, 1, dtype=torch.float32)
    density = Density(model, Tasks.from_list([(zeros, zeros[:, 0])] * 2))
    meta = Meta.start(density, GaussianPrior.from_density(density, hyperprior=False))
    q = GaussianQ(torch.full((9, 1), 5.0), torch.full((9, 1), 1e-12))
    sums = no_moments(meta)
    add_moments(sums, meta, q, 1.0)
    maximise(sums, meta, 9, True, True)
    assert 0 < float(meta.fixed()[0].scale) < 1e-5
