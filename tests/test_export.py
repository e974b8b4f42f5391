"""to_arviz: values, coordinates, files and ArviZ's own functions, under ArviZ 0.x and 1.x alike."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy.stats import norm
from torch import Tensor

from varmeta.export import to_arviz
from varmeta.inference.base import Strategy
from varmeta.inference.fit import Fit, fit
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import CompletePooling
from varmeta.inference.resets import Reset
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Draws, Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource

ARVIZ1 = int(az.__version__.split(".")[0]) >= 1
GROUPS = [
    "posterior",
    "prior",
    "posterior_predictive",
    "log_likelihood",
    "observed_data",
    "constant_data",
    "sample_stats",
]
SITES = ["a", "b", "width"]
COUNTS = {"north": 5, "süd": 1, "w/e [2]": 8}  # ragged, a single row, awkward names


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.5, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    width = pyro.sample("width", dist.LogNormal(-0.5, 0.3))
    curve = pyro.sample("curve", dist.LogNormal(-1.0, 0.5))
    mean = a + x @ b.to(x) + curve * x[:, 0] ** 2
    with pyro.plate("rows", len(x)):
        return pyro.sample("score", dist.Normal(mean, width), obs=y)


def frame() -> pd.DataFrame:
    """Rows of the groups all mixed up, so that the tasks' order is not the file's."""
    rng = np.random.default_rng(3)
    labels = rng.permutation([name for name, count in COUNTS.items() for _ in range(count)])
    data = pd.DataFrame(rng.normal(size=(len(labels), 3)), columns=["u", "v", "w"])
    data["school"] = labels
    data["mark"] = 1 + data["u"] - data["w"] + rng.normal(size=len(labels))
    return data


FRAME = frame()
TASKS = Tasks.from_frame(FRAME, task="school", inputs=["u", "v", "w"], target="mark")
T = len(TASKS)
DENSITY = Density(model, TASKS, shared=["curve"])
SHARED = torch.tensor([-0.7], dtype=torch.float64)


def unfitted(
    strategy: Strategy | None = None,
    tasks: Tasks | TaskSource = TASKS,
    density: Density = DENSITY,
    prior: GaussianPrior | None = None,
    **stats: Tensor,
) -> Fit:
    """A `Fit` at its first state: what the export does needs no training."""
    strategy = strategy or JointVariational()
    prior = prior or GaussianPrior.from_density(density)
    training = tasks if isinstance(tasks, TaskSource) else strategy.prepare(tasks, 0)
    state = strategy.init(density, prior, training, torch.Generator())
    return Fit(strategy, density, tasks, state, 0, pd.DataFrame(), stats)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(tasks: Tasks = TASKS, density: Density = DENSITY) -> Gaussian:
    count, dim = len(tasks), density.dim
    tril = 0.3 * torch.eye(dim) + 0.1 * torch.ones(dim, dim).tril(-1)
    shared = SHARED if density.shared_dim else torch.zeros(0, dtype=torch.float64)
    return Gaussian(
        density, tasks.names, shared, noise(count, dim), tril.double().expand(count, -1, -1)
    )


def hand_draws(total: int = 12, chains: int = 2) -> Draws:
    """φ differs from draw to draw, not from task to task."""
    shared = 0.3 * noise(total, 1, 1, seed=1).expand(-1, T, -1)
    return Draws(DENSITY, TASKS.names, shared, noise(total, T, DENSITY.dim), chains)


def hand_nuts() -> Fit:
    """A PyroNUTS run of 2 chains of 6 draws whose draws are made up."""
    run = unfitted(PyroNUTS(draws=6, warmup=1, chains=2))
    kept = run.state.tensors
    kept["theta"] = noise(12, T, DENSITY.dim, seed=5)
    kept["loc"] = noise(12, DENSITY.dim, seed=6)
    kept["log_scale"] = noise(12, 3, seed=7)
    kept["shared"] = noise(12, 1, seed=8)
    kept["diverging"] = torch.arange(12) % 5 == 4
    return run


def group(data: Any, name: str) -> xr.Dataset:
    found = data[name]
    return found.to_dataset() if ARVIZ1 else found


def groups_of(data: Any) -> set[str]:
    return set(data.children) if ARVIZ1 else set(data.groups())


def stacked(values: xr.DataArray) -> np.ndarray:
    """Chains one after the other again."""
    assert values.dims[:2] == ("chain", "draw")
    return values.values.reshape(-1, *values.shape[2:])


def assert_equal_exports(one: Any, other: Any) -> None:
    assert groups_of(one) == groups_of(other)
    assert dict(one.attrs) == dict(other.attrs)
    for name in groups_of(one):
        xr.testing.assert_identical(group(one, name), group(other, name))
        for key, variable in group(one, name).variables.items():
            assert variable.dtype == group(other, name)[key].dtype, (name, key)


# -- the parameters ----------------------------------------------------------------------------


def test_it_is_arvizs_own_type_and_has_all_groups() -> None:
    data = to_arviz(unfitted(grad_norm=torch.ones(T)), posterior=gaussian(), draws=3)
    assert type(data).__name__ == ("DataTree" if ARVIZ1 else "InferenceData")
    assert groups_of(data) == set(GROUPS)


def test_posterior_dims_coords_and_moments() -> None:
    q = gaussian()
    post = group(to_arviz(unfitted(), posterior=q, draws=8000), "posterior")
    assert set(post.data_vars) == {*SITES, "curve"}
    assert post["a"].dims == ("chain", "draw", "task")
    assert post["b"].dims == ("chain", "draw", "task", "b_dim_0")
    assert post["curve"].dims == ("chain", "draw")
    assert dict(post.sizes) == {"chain": 1, "draw": 8000, "task": T, "b_dim_0": 3}
    assert post["task"].values.tolist() == list(TASKS.names)
    assert set(post.indexes) == {"chain", "draw", "task", "b_dim_0"}
    free = np.concatenate(
        [
            stacked(post["a"])[..., None],
            stacked(post["b"]),
            np.log(stacked(post["width"]))[..., None],
        ],
        axis=-1,
    )
    assert bool((post["width"] > 0).all()) and bool((post["curve"] > 0).all())
    assert np.abs(free.mean(0) - q.mean.numpy()).max() < 5 * 0.51 / np.sqrt(8000)
    assert np.abs(free.std(0) / q.sd.numpy() - 1).max() < 5 / np.sqrt(2 * 8000)
    assert np.allclose(post["curve"], np.exp(-0.7))


def test_draws_keep_their_order_chain_after_chain() -> None:
    q = hand_draws()
    data = to_arviz(unfitted(), posterior=q, draws=5)
    post = group(data, "posterior")
    assert (post.sizes["chain"], post.sizes["draw"]) == (2, 6)
    for chain in range(2):
        for draw in range(6):
            here, theta = post.isel(chain=chain, draw=draw), q.draws[6 * chain + draw].numpy()
            np.testing.assert_array_equal(here["a"], theta[:, 0])
            np.testing.assert_array_equal(here["b"], theta[:, 1:4])
            np.testing.assert_allclose(here["width"], np.exp(theta[:, 4]), rtol=1e-12)
            np.testing.assert_allclose(
                here["curve"], np.exp(float(q.shared[6 * chain + draw, 0, 0])), rtol=1e-12
            )


@pytest.mark.parametrize(("asked", "got"), [(5, 5), (12, 12), (40, 12)])
def test_draws_of_one_chain_are_never_repeated(asked: int, got: int) -> None:
    q = hand_draws(chains=1)
    post = group(to_arviz(unfitted(), posterior=q, draws=asked), "posterior")
    assert (post.sizes["chain"], post.sizes["draw"]) == (1, got)
    assert len(np.unique(post["a"].values[0, :, 0])) == got
    if got == 12:
        np.testing.assert_array_equal(post["a"].values[0], q.draws[..., 0])


def test_shared_that_differs_between_tasks_has_a_task_dimension() -> None:
    q = replace(hand_draws(chains=1), shared=noise(12, T, 1, seed=2))
    data = to_arviz(unfitted(), posterior=q)
    curve = group(data, "posterior")["curve"]
    assert curve.dims == ("chain", "draw", "task")
    np.testing.assert_allclose(curve.values[0], q.shared[..., 0].exp(), rtol=1e-12)
    assert group(data, "prior")["curve"].dims == ("chain", "draw")


def test_prior_is_the_learned_gaussian_with_its_low_rank_part() -> None:
    start = GaussianPrior.from_density(DENSITY, scales="coordinate", rank=2)
    assert start.factor is not None
    start = replace(start, loc=noise(5), factor=noise(5, 2, seed=4))
    run = unfitted(IMAML(), prior=start)
    data = to_arviz(run, posterior=gaussian(), draws=20_000)
    prior, constant = group(data, "prior"), group(data, "constant_data")
    assert "task" not in prior.sizes and set(prior.data_vars) == {*SITES, "curve"}
    assert prior["b"].dims == ("chain", "draw", "b_dim_0")
    free = np.column_stack(
        [stacked(prior["a"]), stacked(prior["b"]), np.log(stacked(prior["width"]))]
    )
    covariance = (start.scale**2).diag() + start.factor @ start.factor.T
    sd = covariance.diagonal().sqrt().numpy()
    assert np.abs((free.mean(0) - start.loc.numpy()) / sd).max() < 5 / np.sqrt(20_000)
    assert np.abs((np.cov(free.T) - covariance.numpy()) / np.outer(sd, sd)).max() < 0.05
    for column, (site, index) in enumerate(
        [("a", ()), ("b", 0), ("b", 1), ("b", 2), ("width", ())]
    ):
        assert float(constant[f"{site}_loc"][index]) == pytest.approx(float(start.loc[column]))
        assert float(constant[f"{site}_scale"][index]) == pytest.approx(sd[column])
    assert constant["b_loc"].dims == constant["b_scale"].dims == ("b_dim_0",)
    np.testing.assert_allclose(prior["curve"], np.exp(float(run.shared)))


def test_point_estimates_are_not_in_the_posterior() -> None:
    """Where they would be constants, of which `az.summary` and the plots warn."""
    data = to_arviz(unfitted(), posterior=gaussian(), draws=4)
    named = {f"{site}_{kind}" for site in SITES for kind in ("loc", "scale")}
    assert named <= set(group(data, "constant_data").data_vars)
    assert not named & set(group(data, "posterior").data_vars)


def test_nuts_has_theta0_scales_and_divergences_per_draw() -> None:
    run = hand_nuts()
    data = to_arviz(run, draws=3)
    post, kept = group(data, "posterior"), run.state.tensors
    assert (post.sizes["chain"], post.sizes["draw"]) == (2, 6)
    np.testing.assert_array_equal(stacked(post["a"]), kept["theta"][..., 0])
    np.testing.assert_allclose(stacked(post["curve"]), kept["shared"][:, 0].exp(), rtol=1e-12)
    for name in ("posterior", "prior"):
        here = group(data, name)
        np.testing.assert_array_equal(stacked(here["a_loc"]), kept["loc"][:, 0])
        np.testing.assert_array_equal(stacked(here["b_loc"]), kept["loc"][:, 1:4])
        np.testing.assert_array_equal(stacked(here["width_loc"]), kept["loc"][:, 4])
        np.testing.assert_allclose(stacked(here["a_scale"]), kept["log_scale"][:, 0].exp())
        wide = kept["log_scale"][:, 1:2].exp().expand(-1, 3)  # one scale for all of b
        np.testing.assert_allclose(stacked(here["b_scale"]), wide)
    diverging = group(data, "sample_stats")["diverging"]
    assert diverging.dtype == bool
    np.testing.assert_array_equal(stacked(diverging), kept["diverging"])
    assert not any("_loc" in str(name) for name in group(data, "constant_data"))


def test_prior_of_nuts_goes_with_each_draw_of_theta0() -> None:
    run = hand_nuts()
    run.state.tensors["log_scale"] = torch.full((12, 3), -25.0, dtype=torch.float64)
    prior, kept = group(to_arviz(run), "prior"), run.state.tensors
    np.testing.assert_allclose(stacked(prior["a"]), kept["loc"][:, 0], atol=1e-9)
    np.testing.assert_allclose(stacked(prior["width"]), kept["loc"][:, 4].exp(), atol=1e-9)
    np.testing.assert_allclose(stacked(prior["curve"]), kept["shared"][:, 0].exp(), rtol=1e-12)
    run.state.tensors["log_scale"] = noise(12, 3, seed=7) + 3
    assert np.abs(stacked(group(to_arviz(run), "prior")["a"]) - kept["loc"][:, 0].numpy()).min() > 0


def test_new_tasks_of_nuts_have_no_theta0_of_their_own_draws() -> None:
    """Their draws were resampled task by task; all are kept, and φ is a task's own."""
    q = Draws(DENSITY, TASKS.names, noise(12, T, 1, seed=3), noise(12, T, DENSITY.dim))
    data = to_arviz(hand_nuts(), posterior=q, draws=4)
    post = group(data, "posterior")
    assert set(post.data_vars) == {*SITES, "curve"}
    assert (post.sizes["chain"], post.sizes["draw"]) == (1, 12)
    assert post["curve"].dims == ("chain", "draw", "task")
    assert group(data, "prior")["a_loc"].shape == (2, 6)
    assert "sample_stats" not in groups_of(data)


# -- the rows ----------------------------------------------------------------------------------


def test_every_row_of_the_data_is_there_once_under_its_task() -> None:
    data = to_arviz(unfitted(), posterior=gaussian(), draws=2)
    observed, constant = group(data, "observed_data"), group(data, "constant_data")
    ids = observed["row_id"].values
    assert sorted(ids) == list(range(len(FRAME)))
    np.testing.assert_array_equal(observed["score"], FRAME["mark"].to_numpy()[ids])
    np.testing.assert_array_equal(observed["task_of_row"], FRAME["school"].to_numpy()[ids])
    assert constant["inputs"].dims == ("row", "input")
    assert constant["input"].values.tolist() == ["u", "v", "w"]
    np.testing.assert_array_equal(constant["inputs"], FRAME[["u", "v", "w"]].to_numpy()[ids])
    np.testing.assert_array_equal(constant["row_id"], ids)
    assert {n: int(constant["num_rows"].sel(task=n)) for n in COUNTS} == COUNTS


def test_log_likelihood_by_hand() -> None:
    """From the exported values alone, by SciPy: sites, rows and draws must all belong together."""
    data = to_arviz(unfitted(), posterior=hand_draws())
    post, rows = group(data, "posterior"), group(data, "log_likelihood")
    x, y = group(data, "constant_data")["inputs"], group(data, "observed_data")["score"]
    assert rows["score"].dims == ("chain", "draw", "row") and rows.sizes["row"] == len(FRAME)
    for k in range(rows.sizes["row"]):
        own = post.sel(task=str(rows["task_of_row"].values[k]))
        assert int(rows["row_id"][k]) == int(y["row_id"][k])
        mean = (
            own["a"] + (own["b"] * x.values[k]).sum("b_dim_0") + own["curve"] * x.values[k, 0] ** 2
        )
        by_hand = norm.logpdf(float(y[k]), mean.values, own["width"].values)
        np.testing.assert_allclose(rows["score"].values[..., k], by_hand, rtol=1e-10)


def test_posterior_predictive_is_drawn_from_the_same_parameters() -> None:
    q = Delta(DENSITY, TASKS.names, SHARED, noise(T, DENSITY.dim))
    data = to_arviz(unfitted(), posterior=q, draws=4000)
    predicted, post = group(data, "posterior_predictive")["score"], group(data, "posterior")
    assert predicted.dims == ("chain", "draw", "row") and predicted.shape == (1, 4000, len(FRAME))
    x = group(data, "constant_data")["inputs"].values
    own = post.isel(chain=0, draw=0).sel(task=predicted["task_of_row"])
    mean = own["a"].values + (own["b"].values * x).sum(-1) + np.exp(-0.7) * x[:, 0] ** 2
    z = (predicted.values[0] - mean) / own["width"].values
    assert np.abs(z.mean(0)).max() < 5 / np.sqrt(4000)
    assert np.abs(z.std(0) - 1).max() < 5 / np.sqrt(8000)
    assert np.abs(np.corrcoef(z.T) - np.eye(len(FRAME))).max() < 5 / np.sqrt(4000)


def test_rows_are_those_adapted_to() -> None:
    split = TASKS.split(0.4, seed=1)
    run = unfitted(IMAML(steps=1), tasks=split)
    everything = to_arviz(run, draws=3)
    assert group(everything, "observed_data").sizes["row"] == len(FRAME)
    data = to_arviz(run, split, draws=3)
    observed = group(data, "observed_data")
    kept = split.mask & ~split.is_query
    assert split.row_ids is not None and int(split.is_query.sum()) > 0
    assert sorted(observed["row_id"].values) == sorted(split.row_ids[kept].tolist())
    np.testing.assert_array_equal(
        observed["score"], FRAME["mark"].to_numpy()[observed["row_id"].values]
    )
    assert_equal_exports(data, to_arviz(run, split, posterior=run.adapt(split.support), draws=3))
    assert not np.allclose(
        group(data, "posterior")["a"].isel(draw=0), group(everything, "posterior")["a"].isel(draw=0)
    )


def test_new_tasks_bring_their_own_names() -> None:
    known, new = TASKS.hold_out(1, seed=2)
    data = to_arviz(unfitted(IMAML(), known, residual=torch.ones(2)), new, draws=3)
    assert group(data, "posterior")["task"].values.tolist() == list(new.names)
    assert set(group(data, "observed_data")["task_of_row"].values.tolist()) == set(new.names)
    assert "residual" not in group(data, "sample_stats")  # of the training tasks
    assert "gradient_norm" in group(data, "sample_stats")


def test_several_observed_sites() -> None:
    def twice(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("first", dist.Normal(a, 1.0), obs=None if y is None else y[:, 0])
            pyro.sample("second", dist.Normal(-a, 2.0), obs=None if y is None else y[:, 1])

    tasks = Tasks.from_list([(noise(2, 1), noise(2, 2)), (noise(4, 1), noise(4, 2, seed=1))])
    density = Density(twice, tasks)
    data = to_arviz(unfitted(tasks=tasks, density=density), draws=3)
    assert set(group(data, "posterior_predictive").data_vars) == {"first", "second"}
    assert group(data, "observed_data")["target"].dims == ("row", "target_dim_0")
    rows, a = group(data, "log_likelihood")["target"], group(data, "posterior")["a"]
    first, second = group(data, "observed_data")["target"].values.T
    own = a.sel(task=rows["task_of_row"]).values
    by_hand = norm.logpdf(first, own, 1) + norm.logpdf(second, -own, 2)
    np.testing.assert_allclose(rows.values, by_hand, rtol=1e-10)


def test_targets_inputs_and_sites_of_other_shapes(tmp_path: Path) -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> Tensor:
        share = pyro.sample("net/share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", len(x)):
            mean = x.mean(-1) + share[:2]
            return pyro.sample("pair", dist.Normal(mean, 1.0).to_event(1), obs=y)

    tasks = Tasks.from_list([(noise(2, 2, 4), noise(2, 2)), (noise(3, 2, 4), noise(3, 2))])
    density = Density(wide, tasks)
    data = to_arviz(unfitted(tasks=tasks, density=density), draws=5)
    post, constant = group(data, "posterior"), group(data, "constant_data")
    assert post["net.share"].dims == ("chain", "draw", "task", "net.share_dim_0")
    np.testing.assert_allclose(post["net.share"].sum("net.share_dim_0"), 1.0)
    assert constant["net.share_loc"].dims == ("net.share_unconstrained_dim_0",)
    assert constant["net.share_loc"].shape == (2,)
    assert constant["inputs"].dims == ("row", "inputs_dim_0", "inputs_dim_1")
    assert group(data, "observed_data")["pair"].dims == ("row", "pair_dim_0")
    assert group(data, "posterior_predictive")["pair"].shape == (1, 5, 5, 2)
    assert group(data, "log_likelihood")["pair"].shape == (1, 5, 5)
    data.to_netcdf(str(tmp_path / "wide.nc"))


def test_no_inputs_and_one_task(tmp_path: Path) -> None:
    def level(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    tasks = Tasks.from_list([(torch.zeros(3, 0), noise(3).float())])
    data = to_arviz(unfitted(tasks=tasks, density=Density(level, tasks)), draws=4)
    assert "inputs" not in group(data, "constant_data")
    assert group(data, "posterior")["a"].dtype == np.float32
    data.to_netcdf(str(tmp_path / "level.nc"))


# -- diagnostics -------------------------------------------------------------------------------


def test_folds_report_their_worst() -> None:
    tasks = TASKS.select([0, 1, 2])
    virtual = IMAML(folds=3).prepare(tasks, 0)
    assert isinstance(virtual, Tasks) and len(virtual) > T
    owner = [name.rsplit(" [", 1)[0] for name in virtual.names]
    residual, flags = noise(len(owner)).abs(), torch.ones(len(owner), dtype=torch.bool)
    residual[owner.index("w/e [2]")] = float("nan")  # a fold not yet visited
    flags[owner.index("north")] = False
    run = unfitted(
        IMAML(folds=3),
        tasks,
        residual=residual,
        converged=flags,
        negative_curvature=~flags,
        iterations=torch.arange(len(owner)),
    )
    stats = group(to_arviz(run, posterior=gaussian(), draws=2), "sample_stats")
    assert all(v.dims == ("task",) for k, v in stats.items() if k not in ("log_p", "log_q"))
    for name in COUNTS:
        own = [k for k, other in enumerate(owner) if other == name]
        here = stats.sel(task=name)
        assert float(here["residual"]) == np.nanmax(residual.numpy()[own])
        assert int(here["iterations"]) == max(own)
        assert bool(here["converged"]) == (name != "north")
        assert bool(here["negative_curvature"]) == (name == "north")
    assert stats["converged"].dtype == bool and stats["iterations"].dtype == np.int64


def test_adaptation_goes_before_training() -> None:
    run = unfitted(grad_norm=torch.full((T,), 7.0), residual=torch.arange(float(T)))
    q = replace(gaussian(), stats={"grad_norm": torch.tensor([1.0, 2.0, 3.0])})
    stats = group(to_arviz(run, posterior=q, draws=2), "sample_stats")
    assert stats["gradient_norm"].values.tolist() == [1, 2, 3]
    assert stats["residual"].values.tolist() == [0, 1, 2]


def test_diagnostics_of_a_strategys_own_tasks_are_left_out() -> None:
    class Renaming(JointVariational):
        def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
            assert isinstance(tasks, Tasks)
            return replace(tasks, names=("x", "y", "z"))

    run = unfitted(Renaming(), residual=torch.ones(T))
    assert "sample_stats" not in groups_of(to_arviz(run, posterior=hand_draws(), draws=2))


# -- what can go wrong -------------------------------------------------------------------------


def test_posterior_of_other_tasks() -> None:
    q = replace(gaussian(), names=("north", "east", "west"))
    with pytest.raises(ValueError, match=r"posterior is of 'north', 'east', 'west', the tasks are"):
        to_arviz(unfitted(), posterior=q)


def test_a_posterior_given_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> TaskPosterior:
        raise AssertionError("adapted twice")

    monkeypatch.setattr(JointVariational, "adapt", never)
    monkeypatch.setattr(JointVariational, "posterior", never)
    to_arviz(unfitted(), posterior=gaussian(), draws=2)
    to_arviz(unfitted(), TASKS, posterior=gaussian(), draws=2)


def test_a_stream_needs_tasks() -> None:
    run = unfitted(IMAML(), tasks=TaskSource(lambda g: TASKS.split(0.3)))
    with pytest.raises(ValueError, match="a stream's tasks are not kept"):
        to_arviz(run)
    with pytest.raises(ValueError, match="a stream's tasks are not kept"):
        to_arviz(run, posterior=gaussian())
    assert group(to_arviz(run, TASKS, draws=2), "observed_data").sizes["row"] == len(FRAME)


def test_no_draws() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        to_arviz(unfitted(), draws=0)


@pytest.mark.parametrize("name", ["task", "row_id", "a_loc"])
def test_names_that_clash(name: str) -> None:
    def clash(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = pyro.sample("a", dist.Normal(0.0, 1.0)) + pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    run = unfitted(density=Density(clash, TASKS))
    with pytest.raises(ValueError, match=f"site '{name}' has the name of something else"):
        to_arviz(run)


# -- seeds and side effects --------------------------------------------------------------------


def test_the_seed_decides() -> None:
    run = unfitted()
    one, same, other = (to_arviz(run, posterior=gaussian(), draws=9, seed=s) for s in (4, 4, 5))
    assert_equal_exports(one, same)
    for name, key in (("posterior", "a"), ("prior", "a")):
        assert not np.isclose(group(one, name)[key], group(other, name)[key]).any()
    point = Delta(DENSITY, TASKS.names, SHARED, noise(T, DENSITY.dim))
    drawn = [to_arviz(run, posterior=point, draws=9, seed=s) for s in (4, 5)]
    first, second = (group(data, "posterior_predictive")["score"] for data in drawn)
    assert not np.isclose(first, second).any()


def test_attributes() -> None:
    data = to_arviz(
        unfitted(JointVariational(resets=Reset(30))), posterior=gaussian(), draws=2, seed=8
    )
    assert data.attrs["strategy"] == "JointVariational (reset 30)"
    assert "Reset(every=30" in data.attrs["strategy_repr"]
    assert data.attrs["posterior_kind"] == "gaussian"
    assert (data.attrs["seed"], data.attrs["draws_seed"]) == (0, 8)
    assert data.attrs["inference_library"] == data.attrs["creation_library"] == "varmeta"
    assert data.attrs["inference_library_version"][0].isdigit()
    assert data.attrs["task_name"] == "school"


def test_nothing_global_changes() -> None:
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(3.0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run = unfitted()
    raw = {name: value.clone() for name, value in run.state.meta.raw.items()}
    to_arviz(run, draws=3)
    to_arviz(run, TASKS, posterior=hand_draws())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.is_grad_enabled() and pyro.settings.get("validate_distributions_pyro")
    assert all(torch.equal(value, raw[name]) for name, value in run.state.meta.raw.items())
    pyro.clear_param_store()


def test_importing_it_does_not_import_arviz() -> None:
    code = "import sys, varmeta.export; sys.exit('arviz' in sys.modules or 'xarray' in sys.modules)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


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
    variational = fit(JointVariational(steps=150), density, tasks, progress=False)
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
    stats = group(exports["laplace"], "sample_stats")
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
