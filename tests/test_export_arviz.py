"""Exports in files and under ArviZ's own functions, 0.x and 1.x alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from export_case import (
    ARVIZ1,
    assert_equal_exports,
    group,
    noise,
    stacked,
    unfitted,
)
from torch import Tensor

from varmeta.export import to_arviz
from varmeta.inference.fit import fit
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import CompletePooling
from varmeta.models.density import Density
from varmeta.tasks import Tasks

# -- files, and ArviZ's own functions ----------------------------------------------------------


def easy_tasks() -> Tasks:
    pairs = [(noise(n, 1, seed=n), 1 + 0.3 * n + noise(n, seed=20 + n)) for n in (6, 9, 12)]
    return Tasks.from_list(pairs, names=["x", "ÿ", "z"], input_names=["u"])


def easy(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a + x @ b.to(x), sd), obs=y)


@pytest.fixture(scope="module")
def exports() -> dict[str, Any]:
    """One of each kind of posterior, with and without point estimates of φ.

    120 draws a chain for ArviZ's functions: below 100 some plots warn, and 1.x shows several fits
    in one plot only where they have equally many.
    """
    tasks = easy_tasks()
    density, every = Density(easy, tasks, shared=["sd"]), Density(easy, tasks)
    with warnings.catch_warnings():  # three tasks hardly tell a scale from 0
        warnings.simplefilter("ignore", RuntimeWarning)
        variational = fit(JointVariational(q="diagonal", steps=150), density, tasks, progress=False)
        runs = {
            "laplace": fit(IMAML(steps=3), every, tasks, progress=False),
            "laplace, shared": fit(IMAML(steps=3), density, tasks, progress=False),
            "delta": fit(IMAML(steps=2, posterior_kind="delta"), density, tasks, progress=False),
            "gaussian": variational,
            "pooled": fit(CompletePooling(), density, tasks, progress=False),
            "nuts": unfitted(PyroNUTS(draws=120, chains=2), tasks, density),
        }
    # A long run of NUTS would take minutes: draws much like those it would have made.
    kept, prior = runs["nuts"].state.tensors, variational.prior
    kept["theta"] = variational.posterior().sample(240, torch.Generator().manual_seed(0))[0]
    kept["loc"] = prior.loc + 0.1 * noise(240, 2, seed=1)
    kept["log_scale"] = prior.log_scale + 0.1 * noise(240, 2, seed=2)
    kept["shared"] = variational.shared + 0.1 * noise(240, 1, seed=3)
    kept["diverging"][::7] = True
    return {kind: to_arviz(run, draws=120) for kind, run in runs.items()}


KINDS = ["laplace", "laplace, shared", "delta", "gaussian", "pooled", "nuts"]


def test_a_real_fit_on_folds_says_its_residuals(exports: dict[str, Any]) -> None:
    stats = group(exports["laplace"], "adaptation_data")
    assert stats["residual"].shape == (3,) and stats["task"].values.tolist() == ["x", "ÿ", "z"]
    assert bool((stats["residual"] < 1e-6).all()) and bool(stats["converged"].all())
    assert {"gradient_norm", "iterations", "negative_curvature"} <= set(stats.data_vars)


def test_a_real_nuts_run() -> None:
    def level(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    tasks = easy_tasks()
    with warnings.catch_warnings():
        # so short a run may well diverge
        warnings.filterwarnings("ignore", r"\d+ of 16 NUTS transitions", RuntimeWarning)
        run = fit(PyroNUTS(draws=8, warmup=3), Density(level, tasks), tasks, progress=False)
    data = to_arviz(run, draws=2)
    post = group(data, "posterior")
    assert set(post.data_vars) == {"a", "a_loc", "a_scale"}
    assert (post.sizes["chain"], post.sizes["draw"]) == (2, 8)
    assert len(np.unique(post["a_loc"])) > 1 and bool((post["a_scale"] > 0).all())
    np.testing.assert_array_equal(stacked(post["a"]), run.state.tensors["theta"][..., 0])
    assert group(data, "sample_stats")["diverging"].shape == (2, 8)


@pytest.mark.parametrize("kind", ["laplace", "delta", "nuts"])
def test_round_trip_through_a_file(exports: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "data.nc")
    exports[kind].to_netcdf(path)
    assert_equal_exports(exports[kind], az.from_netcdf(path))


def quietly(call: Callable[[], Any], *messages: str) -> Any:
    """ArviZ's result; only these warnings, which are ArviZ's own affair, pass."""
    with warnings.catch_warnings():
        # ArviZ 0.x with Matplotlib 3.11
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
        # ArviZ 0.x with pandas 3
        warnings.filterwarnings("ignore", "The (inplace|copy) keyword", DeprecationWarning)
        for message in messages:
            warnings.filterwarnings("ignore", message)
        try:
            return call()
        finally:
            plt.close("all")


CONSTANT = (
    "invalid value encountered in scalar divide",
    "Your data appears to have a single value",
)
PARETO = "Estimated shape parameter of Pareto distribution"


@pytest.mark.parametrize("kind", KINDS)
def test_summary(exports: dict[str, Any], kind: str) -> None:
    """No warning unless a site of the model is constant: a shared one estimated as a point."""
    messages = () if kind in ("laplace", "pooled", "nuts") else CONSTANT
    table = quietly(lambda: az.summary(exports[kind]), *messages)
    assert {"a[x]", "a[ÿ]", "b[z, 0]"} <= set(table.index)
    assert ("a_loc" in table.index) == (kind == "nuts")
    mean = group(exports[kind], "posterior")["a"].sel(task="x").mean()
    assert float(table.loc["a[x]", "mean"]) == pytest.approx(float(mean), abs=0.06)  # 1.x rounds


TRACES = ["plot_trace", "plot_trace_dist"] if ARVIZ1 else ["plot_trace"]
OTHERS = (
    ["plot_forest", "plot_ppc_dist", "plot_dist", "plot_prior_posterior", "plot_ess"]
    if ARVIZ1
    else ["plot_forest", "plot_ppc", "plot_posterior", "plot_rank", "plot_ess"]
)


@pytest.mark.parametrize("plot", [*TRACES, *OTHERS])
@pytest.mark.parametrize("kind", ["laplace", "delta", "nuts"])
def test_plots(exports: dict[str, Any], kind: str, plot: str) -> None:
    messages = () if kind in ("laplace", "nuts") else CONSTANT
    assert quietly(lambda: getattr(az, plot)(exports[kind]), *messages) is not None


@pytest.mark.skipif(ARVIZ1, reason="ArviZ 1.x has neither; plot_prior_posterior is there")
@pytest.mark.parametrize("kind", ["laplace", "laplace, shared", "delta", "nuts"])
def test_a_table_of_draws_and_prior_beside_posterior(exports: dict[str, Any], kind: str) -> None:
    data = exports[kind]
    table = quietly(lambda: data.to_dataframe())
    chains, draws = data.posterior.sizes["chain"], data.posterior.sizes["draw"]
    assert len(table) == chains * draws and ("prior", "a[1]", "ÿ") in table.columns
    mine = table["posterior", "a[1]", "ÿ"].to_numpy()
    np.testing.assert_array_equal(mine, stacked(data.posterior["a"])[:, 1])
    assert {group for group, *_ in table.columns[2:]} <= set(data.groups())
    for name in {"a", "b", "sd"} & set(data.posterior.data_vars):
        assert data.prior[name].dims == data.posterior[name].dims
    axes = quietly(lambda: az.plot_dist_comparison(data, coords={"task": ["x"]}), *CONSTANT)
    assert axes.shape[1] == 3  # prior, posterior and both
    assert len(quietly(lambda: az.plot_dist_comparison(data, var_names=["a"]), *CONSTANT)) == 3


def test_forest_of_several_fits(exports: dict[str, Any]) -> None:
    models = {name: exports[name] for name in ("laplace, shared", "gaussian", "nuts")}
    sites = ["a", "sd"]
    if ARVIZ1:  # which joins models with other numbers of chains by xarray's default
        join = "In a future version of xarray the default value for join will change"
        plot = quietly(lambda: az.plot_forest(models, var_names=sites), *CONSTANT, join)
    else:
        data, names = list(models.values()), list(models)
        plot = quietly(lambda: az.plot_forest(data, model_names=names, var_names=sites), *CONSTANT)
    assert plot is not None


@pytest.mark.parametrize("kind", ["laplace", "gaussian", "pooled", "nuts"])
def test_loo(exports: dict[str, Any], kind: str) -> None:
    """Near the mean log-likelihood, below the log predictive density of the same draws."""
    result = quietly(lambda: az.loo(exports[kind], pointwise=True), PARETO)
    rows = stacked(group(exports[kind], "log_likelihood")["y"])
    seen = np.logaddexp.reduce(rows, axis=0).sum() - rows.shape[1] * np.log(len(rows))
    elpd = float(result.elpd if ARVIZ1 else result.elpd_loo)
    assert result.n_data_points == rows.shape[1] == 27
    assert seen - 20 < elpd < seen


def test_loo_of_a_delta(exports: dict[str, Any]) -> None:
    """All draws alike: ArviZ 1.x says so by raising, 0.x by a k above 1 everywhere."""
    if ARVIZ1:
        with pytest.raises(ValueError, match="All tail values are the same"):
            az.loo(exports["delta"])
    else:
        with pytest.warns(UserWarning, match=PARETO):
            az.loo(exports["delta"])


def test_compare(exports: dict[str, Any]) -> None:
    models = {name: exports[name] for name in ("laplace", "gaussian", "pooled", "nuts")}
    table = quietly(lambda: az.compare(models), PARETO)
    assert set(table.index) == set(models) and table["weight"].sum() == pytest.approx(1, abs=0.02)
