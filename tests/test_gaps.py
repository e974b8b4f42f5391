"""Targets of several columns that are known in part count by that part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

import varmeta as vm

FLOAT = torch.float64
T, N = 4, 5
SOURCE = torch.Generator().manual_seed(0)
X = torch.randn(T, N, 1, generator=SOURCE, dtype=FLOAT)
Y = torch.randn(T, N, 2, generator=SOURCE, dtype=FLOAT) + X
GONE = torch.rand(T, N, generator=SOURCE) < 0.5
GONE = torch.stack([GONE, ~GONE & (torch.rand(T, N, generator=SOURCE) < 0.5)], -1)
SEEN = ~GONE


def tasks(values: Tensor) -> vm.Tasks:
    return vm.Tasks.from_list(list(zip(X, values, strict=True)))


def columns(law: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", law(a + 0 * x).to_event(1), obs=y)

    return model


def apart(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    one, two = (None, None) if y is None else (y[:, 0], y[:, 1])
    with pyro.plate("rows", len(x)):
        pyro.sample("one", dist.Normal(a[0] + 0 * x[:, 0], 0.7), obs=one)
        pyro.sample("two", dist.Normal(a[1] + 0 * x[:, 0], 0.7), obs=two)


LAWS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "normal": (lambda m: dist.Normal(m, 0.7), Y),
    "gamma": (lambda m: dist.Gamma(m.exp(), 1.0), Y.exp()),
    "poisson": (lambda m: dist.Poisson(m.exp()), Y.exp().round()),
    "cauchy": (lambda m: dist.Cauchy(m, 1.0), Y),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_row_counts_by_what_is_known_of_it(name: str) -> None:
    law, values = LAWS[name]
    data = tasks(values.where(SEEN, torch.nan))
    density = vm.Density(columns(law), data)
    theta = torch.full((T, 2), 0.3, dtype=FLOAT, requires_grad=True)
    found = density.log_likelihood(theta, data)
    wanted = law(theta[:, None].expand(T, N, 2)).log_prob(values).where(SEEN, 0.0).sum(-1)
    torch.testing.assert_close(found, wanted)
    (ours,), (theirs,) = (
        torch.autograd.grad(r.sum(), theta, retain_graph=True) for r in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs)
    assert bool(density.predict(theta.detach(), data, torch.Generator())["y"].isfinite().all())


@pytest.mark.parametrize("model", [columns(LAWS["normal"][0]), apart], ids=["one site", "two"])
def test_posteriors_are_those_of_the_known_entries(model: Callable[..., Any]) -> None:
    """a_k | y is normal with precision 1/σ² + n_k/0.49, n_k the number of entries known."""
    data = tasks(Y.where(SEEN, torch.nan))
    fit = vm.fit(vm.NoPooling(), vm.Density(model, data), data)
    posterior, prior = fit.posterior(), fit.prior
    precision = prior.scale**-2 + SEEN.sum(1) / 0.49
    mean = (prior.loc * prior.scale**-2 + Y.where(SEEN, 0.0).sum(1) / 0.49) / precision
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.sd, precision**-0.5, rtol=1e-5, atol=1e-6)
    table = vm.compare([vm.CompletePooling()], fit.density, data.split(0.4)).table
    assert np.isfinite(table["elpd"]).all() and np.isfinite(table["coverage"]).all()


def test_pyros_own_law_for_gaps_in_dependent_columns() -> None:
    cov = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=FLOAT)

    def model(law: Any) -> Callable[..., Any]:
        def one(x: Tensor, y: Tensor | None = None) -> Tensor:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x)):
                return pyro.sample("y", law((a + 0 * x).expand(-1, 2), cov), obs=y)

        return one

    data = tasks(Y.where(SEEN, torch.nan))
    with pytest.raises(ValueError, match="NanMaskedMultivariateNormal"):
        vm.Density(model(dist.MultivariateNormal), data)
    density = vm.Density(model(dist.NanMaskedMultivariateNormal), data)
    found = density.log_likelihood(torch.zeros(T, 1, dtype=FLOAT), data)
    for t in range(T):
        for n in range(N):
            at = SEEN[t, n].numpy()
            if at.any():
                law = stats.multivariate_normal(np.zeros(at.sum()), cov.numpy()[np.ix_(at, at)])
                assert float(found[t, n]) == pytest.approx(law.logpdf(Y[t, n].numpy()[at]))


def test_a_mask_of_the_models_own_covers_gaps() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
        seen = True if y is None else ~y.isnan()
        with pyro.plate("rows", len(x)):
            law = dist.Normal(a + 0 * x, 0.7).mask(seen).to_event(1)
            return pyro.sample("y", law, obs=None if y is None else y.nan_to_num())

    data = tasks(Y.where(SEEN, torch.nan))
    theta = torch.full((T, 2), 0.3, dtype=FLOAT)
    one, other = (vm.Density(m, data) for m in (model, columns(LAWS["normal"][0])))
    torch.testing.assert_close(one.log_likelihood(theta, data), other.log_likelihood(theta, data))


def test_what_is_not_known_at_all_is_refused() -> None:
    whole = columns(LAWS["normal"][0])
    nothing = Y.clone()
    nothing[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"y holds NaN or infinity.*fit\.predict"):
        vm.Density(whole, tasks(nothing))
    with pytest.raises(ValueError, match="some targets are NaN in a part of their entries"):
        vm.Density(whole, tasks(Y)).check_tasks(tasks(Y.where(SEEN, torch.nan)))
