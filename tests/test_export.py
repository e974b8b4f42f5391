"""to_arviz: what is in each group, under ArviZ 0.x and 1.x alike."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from export_case import (
    ARVIZ1,
    COUNTS,
    DENSITY,
    FRAME,
    GROUPS,
    SHARED,
    SITES,
    TASKS,
    T,
    assert_equal_exports,
    gaussian,
    group,
    groups_of,
    hand_draws,
    hand_nuts,
    noise,
    stacked,
    unfitted,
)
from scipy.stats import norm
from torch import Tensor

from varmeta.export import to_arviz
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Draws
from varmeta.tasks import Tasks, TaskSource

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
    assert group(data, "prior")["curve"].dims == ("chain", "draw", "task")  # as in the posterior
    assert len(np.unique(group(data, "prior")["curve"])) == 1


def test_prior_is_the_learned_gaussian_with_its_low_rank_part() -> None:
    start = GaussianPrior.from_density(DENSITY, scales="coordinate", rank=2)
    assert start.factor is not None
    start = replace(start, loc=noise(5), factor=noise(5, 2, seed=4))
    run = unfitted(IMAML(), prior=start)
    data = to_arviz(run, posterior=gaussian(), draws=20_000)
    every, constant = group(data, "prior"), group(data, "constant_data")
    assert set(every.data_vars) == {*SITES, "curve"}
    assert every["b"].dims == ("chain", "draw", "task", "b_dim_0")
    # Tasks are independent given θ0 and Σ.
    between = np.corrcoef(stacked(every["a"]).T)[np.triu_indices(T, 1)]
    assert np.abs(between).max() < 5 / np.sqrt(20_000)
    prior = every.isel(task=1)
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
    np.testing.assert_allclose(stacked(prior["a"]), kept["loc"][:, [0] * T], atol=1e-9)
    np.testing.assert_allclose(stacked(prior["width"]), kept["loc"][:, [4] * T].exp(), atol=1e-9)
    np.testing.assert_allclose(stacked(prior["curve"]), kept["shared"][:, 0].exp(), rtol=1e-12)
    run.state.tensors["log_scale"] = noise(12, 3, seed=7) + 3
    moved = stacked(group(to_arviz(run), "prior")["a"]) - kept["loc"][:, [0]].numpy()
    assert np.abs(moved).min() > 0


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
        own = post.sel(task=str(y["task_of_row"].values[k]))
        assert int(rows["row"][k]) == int(y["row"][k]) and int(x["row_id"][k]) == int(
            y["row_id"][k]
        )
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
    own = post.isel(chain=0, draw=0).sel(task=group(data, "observed_data")["task_of_row"])
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
    assert "residual" not in group(data, "adaptation_data")  # of the training tasks
    assert "gradient_norm" in group(data, "adaptation_data")


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
    assert group(data, "observed_data")["first"].dims == ("row",)
    rows, a = group(data, "log_likelihood")["target"], group(data, "posterior")["a"]
    first, second = (group(data, "observed_data")[n].values for n in ("first", "second"))
    np.testing.assert_array_equal(first, tasks.targets[tasks.mask][:, 0])
    own = a.sel(task=group(data, "observed_data")["task_of_row"]).values
    by_hand = norm.logpdf(first, own, 1) + norm.logpdf(second, -own, 2)
    np.testing.assert_allclose(rows.values, by_hand, rtol=1e-10)
    if not ARVIZ1:
        with warnings.catch_warnings():  # ArviZ 0.x with pandas 3
            warnings.filterwarnings("ignore", "The (inplace|copy) keyword")
            table = data.to_dataframe(groups=["posterior_predictive"])
        assert len(table) == 3 and len(table.columns) == 2 + 2 * 6  # chain, draw and the rows


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
    stats = group(to_arviz(run, posterior=gaussian(), draws=2), "adaptation_data")
    assert all(v.dims == ("task",) for v in stats.values())
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
    stats = group(to_arviz(run, posterior=q, draws=2), "adaptation_data")
    assert stats["gradient_norm"].values.tolist() == [1, 2, 3]
    assert stats["residual"].values.tolist() == [0, 1, 2]


def test_diagnostics_of_a_strategys_own_tasks_are_left_out() -> None:
    class Renaming(JointVariational):
        def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
            assert isinstance(tasks, Tasks)
            return replace(tasks, names=("x", "y", "z"))

    run = unfitted(Renaming(), residual=torch.ones(T))
    data = to_arviz(run, posterior=hand_draws(), draws=2)
    assert not {"sample_stats", "adaptation_data"} & groups_of(data)
