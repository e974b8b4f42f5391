"""fit.shrinkage: its numbers, the path of the scales, the pictures and the ArviZ group."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from export_case import DENSITY, TASKS, assert_equal_exports, group, groups_of, unfitted
from helpers import FLOAT, assert_close, assert_same, case_of, tasks_of, tensor
from linear_gaussian import LinearGaussian
from matplotlib.figure import Figure
from planted import PLANTED, Planted
from torch import Tensor

from varmeta import (
    IMAML,
    CompletePooling,
    Density,
    Fit,
    GaussianPrior,
    JointVariational,
    NoPooling,
    Shrinkage,
    Strategy,
    Tasks,
    TaskSource,
    compare,
    fit,
    to_arviz,
)
from varmeta import export as export_module
from varmeta import shrinkage as shrinkage_module
from varmeta.inference import fit as fit_module
from varmeta.models.derivatives import NotTwiceDifferentiable
from varmeta.models.modules import Modules
from varmeta.posterior import Delta, Draws, Gaussian
from varmeta.report_modules import module_comparison, plot_scales, plot_shrinkage
from varmeta.report_write import write_figures

PROBLEM = LinearGaussian.random(0)  # three coordinates: two of them are one module
CASE = case_of(PROBLEM)
TRAIN = CASE.tasks.support
GROUPS = np.array([0, 0, 1])
START = GaussianPrior.create(
    CASE.prior.loc, [0.7, 2.0], groups=Modules(("left", "right"), torch.tensor(GROUPS))
)
SCALE = np.array([0.2, 3.0])
MEANS = PROBLEM.theta_stars()
NUMBERS = [
    "size",
    "scale",
    "start",
    "movement",
    "relative",
    "cost",
    "cost_se",
    "optimism",
]
STEPS = JointVariational(steps=8, adapt_steps=5)


def made(strategy: Strategy | None = None, prior: GaussianPrior = START) -> Fit:
    """A run whose learned scales are put there by hand; θ0 stays at its start."""
    run = unfitted(strategy, TRAIN, CASE.density, prior)
    with torch.no_grad():
        run.state.meta.raw["log_scale"] += tensor(SCALE).log() - prior.log_scale
    return run


def points(means: Any = MEANS) -> Delta:
    return Delta(CASE.density, TRAIN.names, CASE.shared, tensor(means))


def losses(means: np.ndarray, query: bool = False) -> np.ndarray:
    """By the oracle: what each task loses with one module at θ0, `[T, 2]`."""
    loss = PROBLEM.query_loss if query else PROBLEM.support_loss
    out = np.zeros((len(means), 2))
    for i, theta in enumerate(means):
        for m in range(2):
            out[i, m] = loss(i, np.where(m == GROUPS, PROBLEM.theta0, theta)) - loss(i, theta)
    return out


def optimism(scale: np.ndarray = SCALE) -> np.ndarray:
    """By the oracle: Σ_j 1 − C_jj/σ_j² of each task and module, `[T, 2]`."""
    at = PROBLEM.at(log_scale=np.log(scale[GROUPS]))
    each = [1 - np.diag(at.posterior_cov(i)) * at.precision for i in range(at.num_tasks)]
    return np.stack([np.array(each)[:, m == GROUPS].sum(1) for m in range(2)], -1)


def costs(means: np.ndarray) -> np.ndarray:
    """On the rows fitted to, less the optimism; mean over tasks."""
    return (losses(means) - optimism()).mean(0)


# -- the table -------------------------------------------------------------------------------------


def test_the_table_by_hand() -> None:
    found = made().shrinkage(posterior=points())
    table = found.table
    assert list(table["module"]) == ["left", "right"] and list(table["size"]) == [2, 1]
    moved, loc = MEANS - PROBLEM.theta0, PROBLEM.theta0
    movement = [np.sqrt(np.mean(moved[:, m == GROUPS] ** 2)) for m in range(2)]
    typical = [np.sqrt(np.mean(loc[m == GROUPS] ** 2)) for m in range(2)]
    assert_close(table["scale"], SCALE, 1e-12)
    assert_close(table["start"], [0.7, 2.0], 1e-12)
    assert_close(table["movement"], movement, 1e-12)
    assert_close(table["relative"], np.divide(movement, typical), 1e-12)
    assert_close(table["cost"], costs(MEANS), 1e-10)
    assert_close(table["optimism"], optimism().mean(0), 1e-10)
    error = (losses(MEANS) - optimism()).std(0, ddof=1) / len(MEANS) ** 0.5
    assert_close(table["cost_se"], error, 1e-10)
    assert found.scales_path is None and found.strategy == "JointVariational"
    assert not found.held_out


def test_on_query_rows_nothing_is_taken_off() -> None:
    """The rise of their loss, given to a posterior of one's own or to tasks that are split."""
    found = made().shrinkage(posterior=points(), query=CASE.tasks.query)
    expected = losses(MEANS, query=True)
    assert found.held_out and "on query rows" in str(found).replace("\n", " ")
    assert_close(found.table["cost"], expected.mean(0), 1e-10)
    assert_close(found.table["cost_se"], expected.std(0, ddof=1) / len(MEANS) ** 0.5, 1e-10)
    assert (found.table["optimism"] == 0).all()
    done = fit(STEPS, CASE.density, CASE.tasks, progress=False)
    told = done.shrinkage(
        CASE.tasks.support, posterior=done.adapt(CASE.tasks.support), query=CASE.tasks.query
    )
    for same in (done.shrinkage(), done.shrinkage(CASE.tasks)):
        assert same.held_out and same.table.equals(told.table)
    whole = done.shrinkage(posterior=done.posterior())  # which has seen the query rows
    assert not whole.held_out and (whole.table["optimism"] > 0).all()


def test_tasks_without_query_rows_are_left_out() -> None:
    few = torch.zeros_like(CASE.tasks.is_query)
    few[:2] = CASE.tasks.is_query[:2]
    query = replace(CASE.tasks, is_query=few, is_split=True).query
    table = made().shrinkage(posterior=points(), query=query).table
    expected = losses(MEANS, query=True)[:2]
    assert_close(table["cost"], expected.mean(0), 1e-10)
    one = TRAIN.select([0])
    alone = Delta(CASE.density, one.names, CASE.shared, tensor(MEANS[:1]))
    single = made().shrinkage(one, posterior=alone).table
    assert single["cost_se"].isna().all()
    said = ["adapted" if cost >= 0.1 else "shared" for cost in single["cost"]]
    assert list(single["verdict"]) == said


def test_the_verdict_is_right_on_planted_scales() -> None:
    """(0, 1, 0, 0.4) at the planted scales and where two criteria end, on each of 20 seeds.

    100 tasks of 10 rows, with and without as many query rows. None of 100 other seeds was wrong at
    the evidence's optimum; by the cost on the rows fitted to a third were, and so it is here.
    """
    right = ["adapted" if scale > 0 else "shared" for scale in PLANTED]
    in_sample = 0
    for seed in range(20):
        drawn = Planted.draw(seed, tasks=100, rows=10)
        ends = [drawn.optimum(drawn.negative_evidence), drawn.optimum(drawn.validation)]
        for loc, scale in (drawn.truth(), *ends):
            held_out = drawn.fit_at(loc, scale, drawn.tasks).shrinkage()
            assert held_out.held_out and list(held_out.table["verdict"]) == right, (seed, scale)
            found = drawn.fit_at(loc, scale, drawn.tasks.support).shrinkage()
            assert not found.held_out and list(found.table["verdict"]) == right, (seed, scale)
            raw = found.table["cost"] + found.table["optimism"]
            in_sample += list(raw >= found.least) != [scale > 0 for scale in PLANTED]
    assert in_sample > 10


def test_without_second_derivatives_the_posterior_says_what_is_taken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 − variance/prior variance in each coordinate: the same number from an exact posterior."""

    def none(*_: Any) -> Tensor:
        raise NotTwiceDifferentiable("the model is not twice differentiable")

    at = PROBLEM.at(log_scale=np.log(SCALE[GROUPS]))
    roots = np.linalg.cholesky([at.posterior_cov(i) for i in range(at.num_tasks)])
    exact = Gaussian(CASE.density, TRAIN.names, CASE.shared, tensor(MEANS), tensor(roots))
    table = made().shrinkage(posterior=exact).table
    monkeypatch.setattr(shrinkage_module, "degrees_of_freedom", none)
    same = made().shrinkage(posterior=exact).table
    assert_close(same["optimism"], table["optimism"], 1e-10)
    bound = made().shrinkage(posterior=points()).table["optimism"]  # a point: all that can be
    assert_close(bound, [2.0, 1.0], 1e-12)


def test_draws_count_by_their_means() -> None:
    """θ̄_i of each task, whatever the spread of its draws; φ at its mean as well."""
    shift = torch.linspace(-1, 1, 5, dtype=FLOAT)[:, None, None]
    case = case_of(PROBLEM, shared_noise=True)
    phi = case.shared + 0.3 * shift.expand(-1, len(TRAIN), 1)
    draws = Draws(case.density, TRAIN.names, phi, tensor(MEANS) + shift)
    table = unfitted(None, TRAIN, case.density, START).shrinkage(posterior=draws).table
    assert_close(table["cost"] + table["optimism"], losses(MEANS).mean(0), 1e-10)
    assert_close(table["optimism"], optimism(np.array([0.7, 2.0])).mean(0), 1e-10)


def test_the_whole_of_a_low_rank_prior_counts() -> None:
    factor = torch.tensor([[0.3], [0.4], [1.2]], dtype=FLOAT)
    start = replace(START, log_scale=tensor([0.5, 0.5]).log(), factor=factor)
    run = unfitted(None, TRAIN, CASE.density, start)
    expected = [np.sqrt(0.25 + 0.25 / 2), 1.3]
    table = run.shrinkage(posterior=points()).table
    assert_close(table["scale"], expected, 1e-12)
    assert_close(table["start"], expected, 1e-12)
    with torch.no_grad():  # in units of the start's sds
        run.state.meta.raw["factor"] += (0.5 - factor) / 0.5
    assert_close(run.shrinkage(posterior=points()).table["scale"], [0.5**0.5] * 2, 1e-12)


def test_relative_to_a_theta0_of_zero() -> None:
    loc = CASE.prior.loc.clone()
    loc[2] = 0
    run = made(prior=replace(START, loc=loc))
    relative = run.shrinkage(posterior=points()).table["relative"]
    assert np.isfinite(relative[0]) and relative[1] == np.inf
    still = np.array(MEANS)
    still[:, 2] = 0
    assert run.shrinkage(posterior=points(still)).table["relative"][1] == 0


def test_the_verdict_is_of_the_cost() -> None:
    """From `least` on and above its standard error; a module that stays at θ0 costs nothing."""
    run = made()
    found = run.shrinkage(posterior=points()).table
    assert (found["cost"] > found["cost_se"]).all()
    low, high = sorted(found["cost"])
    split = run.shrinkage(posterior=points(), least=(low + high) / 2)
    said = ["adapted" if cost == high else "shared" for cost in found["cost"]]
    assert list(split.table["verdict"]) == said
    assert set(run.shrinkage(posterior=points(), least=low).table["verdict"]) == {"adapted"}
    still = np.array(MEANS)
    still[:, GROUPS == 1] = PROBLEM.theta0[GROUPS == 1]
    table = run.shrinkage(posterior=points(still), query=CASE.tasks.query).table
    assert table["verdict"][1] == "shared"
    assert table["cost"][1] == table["movement"][1] == 0


def test_a_cost_within_its_error_is_no_verdict() -> None:
    """One task of six moves, another the wrong way: the mean is less than the error of it."""
    moved = np.tile(PROBLEM.theta0, (6, 1))
    moved[0] = MEANS[0]
    moved[1] -= 0.01 * (MEANS[1] - PROBLEM.theta0)
    found = made().shrinkage(posterior=points(moved), query=TRAIN)
    cost, error = found.table["cost"], found.table["cost_se"]
    assert (cost > found.least).all() and (cost < error).all()
    assert set(found.table["verdict"]) == {"shared"}


def test_other_tasks_and_a_posterior_of_ones_own() -> None:
    done = fit(STEPS, CASE.density, TRAIN, progress=False)
    known = done.shrinkage().table["cost"].tolist()
    assert known == done.shrinkage(posterior=done.posterior()).table["cost"].tolist()
    few = TRAIN.select([0, 1])
    other = done.shrinkage(few).table
    mine = done.shrinkage(few, posterior=done.adapt(few.unsplit)).table
    assert other["cost"].tolist() == mine["cost"].tolist() != known


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made()
    with pytest.raises(ValueError, match="least must be positive, got 0"):
        run.shrinkage(posterior=points(), least=0)
    with pytest.raises(ValueError, match="posterior is of 6 tasks"):
        run.shrinkage(TRAIN.select([0, 1]), posterior=points())
    with pytest.raises(ValueError, match="query is of 2 tasks"):
        run.shrinkage(posterior=points(), query=TRAIN.select([0, 1]))
    with pytest.raises(ValueError, match="query has no rows"):
        run.shrinkage(posterior=points(), query=TRAIN._part(TRAIN.mask & False))
    source = TaskSource(lambda g: tasks_of(PROBLEM))
    stream = fit(IMAML(steps=2), CASE.density, source, progress=False)
    with pytest.raises(ValueError, match="a stream's tasks are not kept"):
        stream.shrinkage()
    assert len(stream.shrinkage(TRAIN).table) == 1  # one site
    monkeypatch.setattr(shrinkage_module, "MOST_MODULES", 1)
    with pytest.raises(ValueError, match="2 modules, and shrinkage looks at no more than 1"):
        run.shrinkage(posterior=points())


def test_it_prints_a_table() -> None:
    found = made().shrinkage(posterior=points())
    text = str(found)
    assert "JointVariational: 2 of 2 modules adapt to a task" in text
    for row in found.table.to_dict("records"):
        line = next(line for line in text.splitlines() if line.strip().startswith(row["module"]))
        assert line.split() == [row["module"], str(row["size"])] + [
            f"{row[c]:.3g}" for c in NUMBERS[1:]
        ] + [row["verdict"]]
    assert "adapted from 0.1" in text and "\x1b" not in text


# -- the path of the scales ------------------------------------------------------------------------


def interrupted(path: Path, when: int) -> None:
    def stop(step: int, _: object) -> None:
        if step == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(STEPS, CASE.density, TRAIN, prior=START, checkpoint=path, progress=False, on_step=stop)


def whole(path: Path | None = None, strategy: Strategy = STEPS) -> Fit:
    return fit(strategy, CASE.density, TRAIN, prior=START, checkpoint=path, progress=False)


def test_the_path_is_that_of_the_prior_and_survives_a_resume(tmp_path: Path) -> None:
    done = whole()
    assert done.scales is not None and done.scales.shape == (8, 2)
    assert torch.equal(done.scales[-1], done.prior.log_scale.exp())
    assert not done.scales.requires_grad
    found = done.shrinkage()
    assert found.scales_path is not None and torch.equal(found.scales_path, done.scales)
    path = tmp_path / "run.pt"
    interrupted(path, 3)
    raw = torch.load(path, weights_only=True)["state"]["raw"]["log_scale"]
    assert torch.equal(done.scales[2], (START.log_scale + raw).exp())
    assert_same(whole(path).scales, done.scales)


def test_an_old_checkpoint_has_no_path(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    interrupted(path, 3)
    saved = torch.load(path, weights_only=True)
    del saved["moved"]
    torch.save(saved, path)
    done, full = whole(path), whole()
    assert done.scales is not None and full.scales is not None
    assert done.scales[:3].isnan().all()
    assert_same(done.scales[3:], full.scales[3:])
    assert_same(done.state.state_dict(), full.state.state_dict())


def test_no_path_where_none_is_learned_or_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert whole(strategy=NoPooling(steps=3)).scales is None
    closed = whole(strategy=replace(STEPS, prior_update="closed_form"))  # no leaf to learn
    assert closed.scales is not None and torch.equal(closed.scales[-1], closed.prior.scale[1:])
    monkeypatch.setattr(fit_module, "MOST_MODULES", 1)
    done = whole(tmp_path / "run.pt")
    assert done.scales is None and not done.path
    assert whole(tmp_path / "run.pt").scales is None


# -- pictures --------------------------------------------------------------------------------------


def artists(fig: Figure, gid: str) -> list[Any]:
    return [a for ax in fig.axes for a in ax.get_children() if a.get_gid() == gid]


def data(fig: Figure, gid: str) -> np.ndarray:
    [line] = artists(fig, gid)
    return np.array(line.get_data())


def test_the_picture_shows_the_table() -> None:
    still = np.array(MEANS)
    still[:, GROUPS == 1] = PROBLEM.theta0[GROUPS == 1]
    found = made().shrinkage(posterior=points(still), query=TRAIN)
    fig = plot_shrinkage(found)
    table = found.table
    for y, verdict in enumerate(("adapted", "shared")):
        for column in ("scale", "relative", "cost"):
            assert_same(data(fig, f"{column}:{verdict}").tolist(), [[table[column][y]], [y]])
    assert_same(data(fig, "start").tolist(), [table["start"].tolist(), [0, 1]])
    assert data(fig, "least")[0, 0] == found.least
    assert [t.get_text() for t in artists(fig, "verdict")] == ["adapted", "shared"]
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["left (2)", "right (1)"]
    for column in ("relative", "cost"):  # 0 has no place on a logarithmic axis
        assert data(fig, f"beyond:{column}:shared")[1] == [1]
    assert not artists(fig, "beyond:scale:shared")
    fig.draw_without_rendering()


def test_of_many_modules_the_costliest_are_shown() -> None:
    many = made().shrinkage(posterior=points()).table.loc[[0] * 70].reset_index(drop=True)
    many["module"] = [f"m${k}" for k in range(70)]
    many["cost"] = np.arange(70.0)
    many["scale"] = 10.0 ** (many.index % 7 - 3)
    path = torch.tensor(many["scale"].to_numpy()).expand(5, -1)
    found = Shrinkage("X", 0.1, many, path)
    fig = plot_shrinkage(found)
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == [rf"m\${k} (2)" for k in range(10, 70)]
    assert "60 costliest of 70" in fig.texts[1].get_text().replace("\n", " ")
    lines = plot_scales(found)
    assert lines is not None and len(lines.axes[0].texts) == 60
    assert artists(lines, "scales:m$10") and not artists(lines, "scales:m$9")
    lines.draw_without_rendering()
    heights = np.sort([t.get_window_extent().y0 for t in lines.axes[0].texts])
    assert np.diff(heights).min() > 8.5 * lines.dpi / 72  # the font's size: none lies on another


def test_the_path_is_drawn_with_names_at_its_ends() -> None:
    done = whole()
    fig = plot_scales(done)
    assert fig is not None and done.scales is not None
    for m, name in enumerate(("left", "right")):
        shown = data(fig, f"scales:{name}")
        assert_same(shown[0].tolist(), list(range(1, 9)))
        assert_same(shown[1].tolist(), done.scales[:, m].tolist())
        [label] = artists(fig, f"label:{name}")
        assert label.get_text() == name
    assert plot_scales(made().shrinkage(posterior=points())) is None


def test_a_comparison_shows_what_each_strategy_learned(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    strategies = [STEPS, IMAML(steps=3), NoPooling(steps=3), CompletePooling(draws=20)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = compare(strategies, CASE.density, TRAIN, prior=START, progress=False)
    fig = module_comparison(result)
    assert fig is not None
    for name in ("JointVariational", "IMAML"):
        x, y = data(fig, f"scale:{name}")
        assert_close(x, result.outcomes[name].fit.prior.log_scale.exp(), 1e-12)
        assert_same(np.round(y).tolist(), [0.0, 1.0])
    assert_close(data(fig, "start")[0], [0.7, 2.0], 1e-12)
    assert not artists(fig, "scale:NoPooling") and not artists(fig, "scale:CompletePooling")
    assert "modules.png" in [p.name for p in write_figures(result, tmp_path)]
    few = {n: o for n, o in result.outcomes.items() if "Pooling" in n}
    assert module_comparison(replace(result, outcomes=few)) is None
    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()


# -- ArviZ -----------------------------------------------------------------------------------------


def test_the_group_is_the_table_and_survives_a_file(tmp_path: Path) -> None:
    run = made()
    exported = to_arviz(run, posterior=points(), draws=3)
    found, table = group(exported, "shrinkage_data"), run.shrinkage(posterior=points()).table
    assert set(found.data_vars) == {*NUMBERS, "adapted"}
    assert found["module"].values.tolist() == ["left", "right"]
    assert all(v.dims == ("module",) for v in found.data_vars.values())
    for column in NUMBERS:
        assert_same(found[column].values.tolist(), table[column].tolist())
    assert found["adapted"].dtype == bool
    assert_same(found["adapted"].values.tolist(), (table["verdict"] == "adapted").tolist())
    exported.to_netcdf(str(tmp_path / "data.nc"))
    assert_equal_exports(exported, az.from_netcdf(str(tmp_path / "data.nc")))


def test_the_group_is_of_the_tasks_exported() -> None:
    """Those given, by the rows of their support, with the posterior that is passed."""
    few = CASE.tasks.select([1, 2])
    passed = Delta(CASE.density, few.names, CASE.shared, tensor(MEANS[1:3]))
    for rows, query in ((few, few.query), (few.support, None)):
        found = group(to_arviz(made(), rows, posterior=passed, draws=3), "shrinkage_data")["cost"]
        table = made().shrinkage(few.support, posterior=passed, query=query).table
        assert_close(found, table["cost"], 1e-9)


def test_no_group_of_too_many_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MOST_MODULES", 1)
    assert "shrinkage_data" not in groups_of(to_arviz(made(), posterior=points(), draws=3))


def test_names_in_the_group() -> None:
    names = tuple(f"net/{site.name}" for site in DENSITY.sites)
    modules = Modules(names, DENSITY.site_index)
    run = unfitted(prior=GaussianPrior.from_density(DENSITY, scales=modules))
    q = Delta(DENSITY, TASKS.names, DENSITY.shared_init, run.prior.loc.expand(len(TASKS), -1))
    found = group(to_arviz(run, posterior=q, draws=2), "shrinkage_data")
    assert found["module"].values.tolist() == ["net.a", "net.b", "net.width"]


def test_a_site_called_module_is_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = pyro.sample("module", dist.Normal(torch.zeros((), dtype=FLOAT), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    tasks = Tasks.from_list([(torch.zeros(3, 1, dtype=FLOAT), torch.zeros(3, dtype=FLOAT))] * 2)
    run = unfitted(None, tasks, Density(model, tasks))
    with pytest.raises(ValueError, match="site 'module' has the name of something else"):
        to_arviz(run, draws=2)
