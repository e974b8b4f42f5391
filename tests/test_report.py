"""report: what the figures show is what the comparison holds; nothing global is touched."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from varmeta import (
    IMAML,
    CompletePooling,
    Density,
    Fit,
    GaussianPrior,
    JointVariational,
    NoPooling,
    PyroNUTS,
    Strategy,
    Tasks,
)
from varmeta.comparison import Comparison
from varmeta.posterior import Delta, Draws, Gaussian, TaskPosterior
from varmeta.report import forest, scores, shrinkage, training_curves
from varmeta.report_write import write_figures
from varmeta.scores import Outcome
from varmeta.seeds import generator

F64 = torch.float64
STRATEGIES = [
    IMAML(),
    JointVariational(q="delta"),
    NoPooling(),
    CompletePooling(),
    PyroNUTS(draws=30, warmup=10, chains=2),
]


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2, dtype=F64), 3.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    big = pyro.sample("big", dist.Normal(torch.zeros(5, dtype=F64), 1.0).to_event(1))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + x @ slope + big.sum(), noise), obs=y)


def tasks(count: int, prefix: str) -> Tasks:
    rng = generator(0)
    pairs = []
    for i in range(count):
        n = 2 + i % 7
        x = torch.randn(n, 2, generator=rng, dtype=F64)
        pairs.append((x, torch.randn(n, generator=rng, dtype=F64)))
    names = [f"{prefix}{i}" for i in range(count)]
    return Tasks.from_list(pairs, names=names, task_name="group").split(0.3)


def posterior(density: Density, of: Tasks, strategy: Strategy, seed: int) -> TaskPosterior:
    rng, shape = generator(seed, len(of)), (len(of), density.dim)
    loc = torch.randn(shape, generator=rng, dtype=F64)
    sd = 0.1 + 0.2 * torch.rand(shape, generator=rng, dtype=F64)
    args = (density, of.names, density.shared_init)
    if isinstance(strategy, JointVariational) and strategy.q == "delta":
        return Delta(*args, loc)
    if isinstance(strategy, PyroNUTS):
        noise = torch.randn(60, *shape, generator=rng, dtype=F64)
        return Draws(*args, loc + sd * noise, 2)
    return Gaussian(*args, loc, sd)


def make(count: int = 12, new: int = 3, strategies: list[Strategy] | None = None) -> Comparison:
    """A comparison whose every number is made up: nothing is fitted."""
    train, fresh = tasks(count, "known"), tasks(new, "fresh") if new else None
    density = Density(model, train)
    outcomes, rows = {}, []
    for k, given in enumerate(strategies or STRATEGIES):
        strategy, prior = given.settled(density, whole=True), GaussianPrior.from_density(density)
        state = strategy.init(density, prior, train, generator(k))
        if not isinstance(strategy, NoPooling):
            with torch.no_grad():
                state.meta.raw["loc"] += 0.1 * (k + 1)
        step = np.arange(1, 2 if isinstance(strategy, CompletePooling) else 81)
        loss = 5 + 1000 * np.exp(-step) + 0.2 * np.sin(step)
        history = pd.DataFrame({"step": step, "loss": loss, "gradients": step, "seconds": step})
        fit = Fit(strategy, density, train, state, 0, history)
        known = posterior(density, train, strategy, k)
        adapted = None if fresh is None else posterior(density, fresh, strategy, k)
        outcomes[strategy.name] = Outcome(fit, known, adapted, 0.0)
        for which in ("known tasks", "new tasks")[: 1 + bool(new)]:
            value = {"elpd": -1 - 0.1 * k, "elpd_se": 0.2, "elpd_diff": -0.1 * k}
            rows.append(
                {"strategy": strategy.name, "set": which, **value, "elpd_diff_se": 0.01 * k}
            )
    reference = "PyroNUTS" if "PyroNUTS" in outcomes else None
    return Comparison(density, train, fresh, outcomes, reference, pd.DataFrame(rows))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return make()


def settings() -> dict[str, object]:
    """Matplotlib's global settings, but for the backend, which is chosen by looking at it."""
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}


def found(fig: Figure, gid: str) -> list[tuple[Axes, object]]:
    """Every artist of the figure's axes with this gid."""
    return [(ax, a) for ax in fig.axes for a in ax.get_children() if a.get_gid() == gid]


def points(fig: Figure, strategy: str) -> dict[str, float]:
    """Where a forest shows each task, by the label of the line nearest to the point."""
    out = {}
    for ax, dots in found(fig, f"mean:{strategy}"):
        labels = [tick.get_text() for tick in ax.get_yticklabels()]
        for x, y in zip(*dots.get_data(), strict=True):  # type: ignore[attr-defined]
            assert abs(y - round(y)) < 0.45
            assert labels[round(y)] not in out
            out[labels[round(y)]] = x
    return out


@pytest.mark.parametrize("component", [None, 0, 1])
def test_forest_shows_every_posterior_mean(comparison: Comparison, component: int | None) -> None:
    site, column = ("level", 0) if component is None else ("slope", 1 + component)
    fig = forest(comparison, site, component)
    for name, outcome in comparison.outcomes.items():
        assert outcome.new is not None
        shown = points(fig, name)
        names = (*outcome.known.names, *outcome.new.names)
        means = torch.cat([outcome.known.mean, outcome.new.mean])[:, column]
        assert shown == pytest.approx(dict(zip(names, means.tolist(), strict=True)))


def test_forest_intervals_on_the_models_own_scale(comparison: Comparison) -> None:
    fig = forest(comparison, "noise")
    known = comparison.outcomes["IMAML"].known
    column = 3
    by_name = {n: (float(known.mean[i, column]), float(known.sd[i, column]))
               for i, n in enumerate(known.names)}  # fmt: skip
    [(ax, bars)] = found(fig, "interval:IMAML")
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    shown = points(fig, "IMAML")
    for (left, y), (right, _) in bars.get_segments():  # type: ignore[attr-defined]
        if (name := labels[round(y)]) in by_name:
            mean, sd = by_name[name]
            assert left == pytest.approx(np.exp(mean - 1.645 * sd), rel=0.1)
            assert right == pytest.approx(np.exp(mean + 1.645 * sd), rel=0.1)
            assert shown[name] == pytest.approx(np.exp(mean + sd**2 / 2), rel=0.02)
    [(_, points_only)] = found(fig, "interval:JointVariational (delta)")
    for (left, _), (right, _) in points_only.get_segments():  # type: ignore[attr-defined]
        assert left == pytest.approx(right)


def test_forest_blocks_order_and_rows(comparison: Comparison) -> None:
    [ax] = forest(comparison, "level").axes
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert comparison.new is not None
    split = labels.index("new group")
    assert labels[0] == "group" and set(labels[1:split]) == set(comparison.train.names)
    assert set(labels[split + 1 :]) == set(comparison.new.names)
    beside = {round(t.get_position()[1]): t.get_text() for t in ax.texts}
    shown = [int(beside[y]) for y in range(1, split)]
    assert shown == sorted(comparison.train.support.num_rows.tolist(), reverse=True)
    assert beside[0] == beside[split] == "rows"
    counts = dict(zip(comparison.train.names, comparison.train.support.num_rows, strict=True))
    assert shown == [counts[name] for name in labels[1:split]]


def test_forest_marks_only_learned_population_means(comparison: Comparison) -> None:
    [ax] = forest(comparison, "level").axes
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    wanted = [float(o.fit.prior.loc[0]) for n, o in comparison.outcomes.items() if n != "NoPooling"]
    assert [line.get_xdata()[0] for line in dashed] == pytest.approx(wanted)  # type: ignore[index]


def test_forest_of_many_tasks() -> None:
    few = [IMAML(), NoPooling()]
    fig = forest(make(count=50, new=4, strategies=few), "level")
    left, right = ([t.get_text() for t in ax.get_yticklabels()] for ax in fig.axes)
    assert left[0] == right[0] == "group" and "new group" in right
    assert len(points(fig, "IMAML")) == 54
    fig = forest(make(count=200, new=0, strategies=few[1:]), "level")
    assert len(points(fig, "NoPooling")) == 160
    assert "160 of 200 shown" in fig.texts[0].get_text()


def test_a_few_wide_intervals_do_not_squeeze_the_rest() -> None:
    result = make(new=0, strategies=[IMAML(), NoPooling()])
    wide = result.outcomes["NoPooling"].known
    assert isinstance(wide, Gaussian)
    wide.scale[3] = 1e3
    wide.loc[5] = 1e3
    [ax] = (fig := forest(result, "level")).axes
    low, high = ax.get_xlim()
    assert -10 < low < high < 10
    [(_, arrow)] = found(fig, "beyond:NoPooling")
    assert arrow.get_xdata() == pytest.approx([high])  # type: ignore[attr-defined]
    assert points(fig, "NoPooling")["known5"] == pytest.approx(1e3)
    assert not found(fig, "beyond:IMAML")


def test_shrinkage_is_against_no_pooling(comparison: Comparison) -> None:
    fig = shrinkage(comparison, "level")
    assert fig is not None
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        name for name in comparison.outcomes if name != "NoPooling"
    ]
    alone = comparison.outcomes["NoPooling"]
    for ax in fig.axes:
        assert ax.get_xlim() == ax.get_ylim()
        name = ax.get_title(loc="left")
        for which, part in (("known", "known"), ("new", "new")):
            [(_, dots)] = found(fig, f"{which}:{name}")
            x = getattr(alone, part).mean[:, 0]
            y = getattr(comparison.outcomes[name], part).mean[:, 0]
            assert np.allclose(dots.get_offsets(), torch.stack([x, y], 1))  # type: ignore[attr-defined]
    assert shrinkage(make(strategies=[IMAML(), CompletePooling()]), "level") is None
    assert shrinkage(make(strategies=[NoPooling()]), "level") is None


def test_training_curves(comparison: Comparison) -> None:
    fig = training_curves(comparison)
    assert fig is not None
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles == [name for name in comparison.outcomes if name != "CompletePooling"]
    assert "objective of its own" in fig.texts[1].get_text()
    for ax in fig.axes:
        name = ax.get_title(loc="left")
        [(_, curve)] = found(fig, f"loss:{name}")
        history = comparison.outcomes[name].fit.history
        assert np.array_equal(curve.get_ydata(), history["loss"])  # type: ignore[attr-defined]
        low, high = ax.get_ylim()
        assert 4 < low < 4.9 and 5.1 < high < 7  # not the 370 of the first step
        warm = [a for _, a in found(fig, "warm-up") if a.axes is ax]  # type: ignore[attr-defined]
        spans = [(w.get_x(), w.get_x() + w.get_width()) for w in warm]
        assert spans == ([(0.5, 10.5), (40.5, 50.5)] if name == "PyroNUTS" else [])
    assert training_curves(make(strategies=[CompletePooling()])) is None


def test_scores(comparison: Comparison) -> None:
    fig = scores(comparison)
    assert fig is not None and len(fig.axes) == 4
    for row in comparison.table.to_dict("records"):
        for column in ("elpd", "elpd_diff"):
            gid = f"{column}:{row['set']}:{row['strategy']}"
            [(_, dot)] = found(fig, gid)
            assert dot.get_xdata()[0] == row[column]  # type: ignore[attr-defined]
    labels = [tick.get_text() for tick in fig.axes[0].get_yticklabels()]
    assert labels == list(comparison.outcomes)  # made up to be worse one after the other
    texts = [text.get_text() for text in fig.axes[1].texts]
    assert texts[:2] == ["best", "−0.100 ± 0.010"]
    unscored = make(new=0)
    unscored.table["elpd"] = np.nan
    assert scores(unscored) is None
    one_task = make(new=0)
    one_task.table[["elpd_se", "elpd_diff_se"]] = np.nan
    fig = scores(one_task)
    assert fig is not None and fig.axes[0].texts[0].get_text() == "−1.000"


def test_write_figures(tmp_path: Path) -> None:
    comparison = make(count=3, new=1, strategies=[IMAML(), NoPooling()])
    before, open_figures = settings(), plt.get_fignums()
    folder = tmp_path / "new" / "folder"
    written = write_figures(comparison, folder)
    sites = ["level", "slope_0", "slope_1", "noise"]  # big has too many components
    stems = [f"{kind}_{site}" for site in sites for kind in ("forest", "shrinkage")]
    assert [p.name for p in written] == [f"{s}.png" for s in [*stems, "training_curves", "scores"]]
    assert sorted(folder.iterdir()) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert settings() == before and plt.get_fignums() == open_figures


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Figure, buffer: io.BytesIO, **_: object) -> None:
        buffer.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(OSError, match="disk full"):
        write_figures(make(count=3, new=0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_awkward_names() -> None:
    """Dollar signs are no formulas, and names of any length can be laid out."""
    result = make(count=3, new=0, strategies=[IMAML(), NoPooling()])
    result.outcomes = {f"a $x$ strategy called {n} " * 3: o for n, o in result.outcomes.items()}
    result.table["strategy"] = list(result.outcomes)
    for fig in (forest(result, "level"), training_curves(result), scores(result)):
        assert fig is not None
        fig.draw_without_rendering()


def test_refusals(comparison: Comparison) -> None:
    with pytest.raises(ValueError, match="no adapted site 'nope'; there are: level, slope"):
        forest(comparison, "nope")
    with pytest.raises(ValueError, match="'slope' has 2 of them"):
        shrinkage(comparison, "slope")
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        forest(comparison, "slope", 2)
