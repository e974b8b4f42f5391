"""The toy pictures draw what they say: the artists' data against the functions behind them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from varmeta import figures as vf
from varmeta.cli import app

ROOT = Path(__file__).parents[1]
OTHER = vf.Toy(bowl=0.25, centre=-0.4, heights=(0.5, 0.12), frequencies=(2.4, 5.1), crests=(0.6, 0))
TOYS = [vf.Toy(), OTHER]
SMALL = {"run_length": 15, "points": 9}


def artists(figure: Figure, gid: str) -> list[Artist]:
    found = figure.findobj(lambda artist: artist.get_gid() == gid)
    assert found, f"nothing drawn under {gid!r}"
    return found


def data(figure: Figure, gid: str) -> tuple[np.ndarray, np.ndarray]:
    """A curve without its gaps."""
    x, y = (np.asarray(part, float) for part in artists(figure, gid)[0].get_data())
    return x[~np.isnan(y)], y[~np.isnan(y)]


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("at", [-2.5, -0.45, 2.0])
def test_the_star_lies_at_the_lowest_point_of_the_sum(toy: vf.Toy, at: float) -> None:
    figure = vf.anchor(toy, at=at, precision=0.7)
    x, total = data(figure, "sum")
    star, height = data(figure, "star")
    assert star[0] == pytest.approx(x[np.argmin(total)], abs=x[1] - x[0])
    assert height[0] == pytest.approx(total.min(), abs=1e-4) and height[0] <= total.min()
    parts = data(figure, "loss")[1] + data(figure, "penalty")[1]
    assert total == pytest.approx(parts)
    assert data(figure, "anchor")[0][0] == at


def test_the_moving_anchor_moves_and_its_star_with_it(tmp_path: Path) -> None:
    movie = vf.moving_anchor(frames=4)
    for frame in range(4):
        movie.draw(frame)
        anchor, star = data(movie.figure, "anchor")[0], data(movie.figure, "star")[0]
        assert star == pytest.approx(vf.lowest(vf.Toy(), anchor), abs=1e-9)
    x, y = data(movie.figure, "trail")
    assert y == pytest.approx(vf.lowest(vf.Toy(), x), abs=1e-9)
    with Image.open(vf.save(movie, tmp_path, "film")) as film:
        assert film.format == "GIF" and film.n_frames == 4
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


@pytest.mark.parametrize("toy", TOYS)
def test_the_lowest_minimum_jumps_where_two_minima_tie(toy: vf.Toy) -> None:
    ties = vf.jumps(toy, "lowest", precision=0.8)
    assert len(ties) >= 2
    for at in ties:
        energies, places = [], []
        for side in (-1e-6, 1e-6):
            there = vf.lowest(toy, [at + side], 0.8)[0]
            places.append(there)
            energies.append(toy.value(there) + 0.4 * (there - at) ** 2)
        assert abs(places[1] - places[0]) > 0.1
        assert energies[0] == pytest.approx(energies[1], abs=1e-5)


@pytest.mark.parametrize("toy", TOYS)
def test_descent_jumps_at_crests_of_the_loss_or_where_a_minimum_vanishes(toy: vf.Toy) -> None:
    breaks = vf.jumps(toy, "descent")
    assert len(breaks) >= 2
    for at in breaks:
        sides = vf.descend(toy, [at - 1e-6, at + 1e-6])
        assert abs(sides[1] - sides[0]) > 0.05
        crest = abs(toy.slope(at)) < 1e-4 and toy.curvature(at) < 0
        fold = min(abs(1 + toy.curvature(sides))) < 0.05
        assert crest or fold


def test_both_minima_are_drawn_with_their_jumps() -> None:
    toy = vf.Toy()
    figure = vf.minimum(toy)
    for gid, find, lines in (
        ("lowest", vf.lowest, "ties"),
        ("descent", vf.descend, "breaks"),
    ):
        x, y = data(figure, gid)
        assert y == pytest.approx(find(toy, x), abs=1e-9)
        at = [segment[0, 0] for segment in artists(figure, lines)[0].get_segments()]
        assert at == pytest.approx(vf.jumps(toy, gid), abs=1e-9)
        raw = artists(figure, gid)[0].get_ydata()
        assert np.isnan(raw).sum() == len(at)  # no line is drawn across a jump


@pytest.mark.parametrize("precision", [1.0, 2.5])
def test_the_closed_form_lies_on_the_differences(precision: float) -> None:
    figure = vf.derivative(precision=precision, points=40)
    x, y = data(figure, "differences")
    assert len(x) > 30
    formula = vf.implicit_slope(vf.Toy(), vf.descend(vf.Toy(), x, precision), precision)
    assert y == pytest.approx(formula, rel=1e-5)
    x, y = data(figure, "formula")
    there = vf.descend(vf.Toy(), x, precision)
    assert y == pytest.approx(precision / (precision + vf.Toy().curvature(there)))


def test_the_meta_objective_is_the_loss_at_the_minimum() -> None:
    toy = vf.Toy()
    figure = vf.meta_objective(toy)
    for gid, find in (("lowest", vf.lowest), ("descent", vf.descend)):
        x, y = data(figure, gid)
        assert y == pytest.approx(toy.value(find(toy, x)), abs=1e-9)
    x, best = data(figure, "lowest")
    assert (best <= data(figure, "before")[1] + 1e-9).all()  # E* ≤ E(θ0) = f(θ0)


def test_the_mean_over_more_tasks_is_smoother() -> None:
    figure = vf.many_tasks(counts=(1, 10, 100), points=1001)
    cliffs = []
    for count in (1, 10, 100):
        x, y = data(figure, f"mean:{count}")
        tasks = vf.draw_tasks(100)[:count]
        assert y == pytest.approx(vf.objective(tasks, x)[0].mean(0))
        cliffs.append(np.abs(np.diff(y)).max())
    assert cliffs[0] > 2 * cliffs[1] > 4 * cliffs[2]


def test_slope_is_what_imaml_sees_plus_the_jumps() -> None:
    options = {"count": 8, "points": 3001, "window": 0.2}
    figure = vf.smooth_but(**options)
    x, slope = data(figure, "slope")
    seen, jumped = data(figure, "implicit")[1], data(figure, "jumps")[1]
    assert slope == pytest.approx(seen + jumped)
    sizes = np.zeros_like(x)  # the jumps in each window, one by one
    half = 0.1 + 1e-9
    for task in vf.draw_tasks(8):
        for at in vf.jumps(task, "descent"):
            ends = task.value(vf.descend(task, [at - 1e-6, at + 1e-6]))
            sizes += (ends[1] - ends[0]) / 8 * (np.abs(x - at) < half) / 0.2
    close = np.abs(sizes - jumped) < 0.03 + 0.02 * np.abs(sizes)
    assert close.mean() > 0.97  # save where a jump lies at the edge of a window
    assert np.abs(jumped).max() > 0.5


def test_the_expected_loss_is_that_of_the_exact_law() -> None:
    toy = vf.Toy()
    figure = vf.stochastic_objective(toy, temperatures=(0.1, 0.4), **SMALL)
    for tau in (0.1, 0.4):
        x, y = data(figure, f"temperature:{tau:g}")
        chain = vf.Chain(toy.slope, 0.05, tau, 15)
        exact = [chain.law(at, toy.limits).expectation(toy.value) for at in x]
        assert y == pytest.approx(exact, abs=1e-8)
    x, y = data(figure, "settled")
    assert y == pytest.approx(toy.value(vf.descend(toy, x)), abs=1e-9)


def test_a_sweep_is_the_mean_over_tasks_and_its_full_gradient_the_slope() -> None:
    tasks, h = vf.draw_tasks(2), 1e-4
    x = np.array([-2.0, 0.1, 0.1 + h, 0.1 - h, 1.7])
    found = vf.sweep(tasks, x, run_length=15)
    each = [vf.sweep(task, x, run_length=15) for task in tasks]
    for field in ("value", "probability", "location", "settled", "implicit", "averaged"):
        mean = np.mean([getattr(one, field) for one in each], axis=0)
        assert getattr(found, field) == pytest.approx(mean)
    assert found.full[1] == pytest.approx((found.value[2] - found.value[3]) / (2 * h), rel=1e-6)
    value, slope = vf.objective(tasks, x)
    assert found.settled == pytest.approx(value.mean(0))
    assert found.implicit == pytest.approx(slope.mean(0))


def test_averaged_over_outcomes_is_imaml_where_there_is_one_minimum() -> None:
    single = vf.Toy(heights=(0.1, 0.0))
    query = vf.Toy(heights=(0.3, 0.0), centre=0.0)
    found = vf.sweep(single, np.array([-1.0, 0.5]), query, run_length=15)
    assert found.averaged == pytest.approx(found.implicit, abs=1e-9)
    assert found.probability == pytest.approx([0, 0], abs=1e-9)
    minima = vf.descend(single, [-1.0, 0.5])
    assert found.settled == pytest.approx(query.value(minima))


def test_the_areas_of_the_mechanisms_stack_up_to_the_total() -> None:
    figure = vf.mechanisms(**SMALL)
    x, total = data(figure, "total")
    found = vf.sweep(vf.Toy(), x, run_length=15)
    assert total == pytest.approx(found.full)
    for name in ("location", "probability"):
        heights = np.zeros(len(x))
        for area in artists(figure, name):
            path = area.get_paths()[0].vertices
            for k, at in enumerate(x):
                here = path[np.isclose(path[:, 0], at), 1]
                # Those below zero hang: their far edge lies lower than their near one.
                heights[k] += np.ptp(here)
        assert heights == pytest.approx(np.abs(getattr(found, name)), abs=1e-9)
    areas = artists(figure, "location") + artists(figure, "probability")
    edges = np.concatenate([area.get_paths()[0].vertices for area in areas])
    parts = np.stack([found.location, found.probability])
    for k, at in enumerate(x):
        here = edges[np.isclose(edges[:, 0], at), 1]
        assert here.max() == pytest.approx(np.maximum(parts[:, k], 0).sum(), abs=1e-9)
        assert here.min() == pytest.approx(np.minimum(parts[:, k], 0).sum(), abs=1e-9)
    assert np.abs(found.probability).max() > 0.1 and np.abs(found.location).max() > 0.1


def test_three_gradients_are_drawn_for_one_task_and_for_many() -> None:
    figure = vf.gradients(count=2, **SMALL)
    many = vf.sweep(vf.draw_tasks(2), np.linspace(-3.4, 3.4, 9), run_length=15)
    for name, field in (("full", "full"), ("averaged", "averaged"), ("iMAML", "implicit")):
        one, lower = artists(figure, name)
        assert lower.get_ydata() == pytest.approx(getattr(many, field))
        assert len(one.get_xdata()) > 8


def test_meta_training_ends_where_its_own_gradient_is_zero() -> None:
    """Each method stops at a zero of its gradient; only the full one's are those of the loss."""
    tasks = vf.draw_tasks(4)
    table = vf.sweep(tasks, np.linspace(-3.4, 3.4, 45), run_length=20)
    starts = np.linspace(-3.0, 3.0, 7)
    runs = vf.train(tasks, table, starts, rate=0.1, steps=3000)
    for name, field in (("full gradient", "full"), ("averaged over outcomes", "averaged")):
        path = runs.paths[name]
        assert path.shape == (3001, 7) and np.array_equal(path[0], starts)
        first = starts - 0.1 * np.interp(starts, table.anchors, getattr(table, field))
        assert path[1] == pytest.approx(first)
        inside = np.abs(path[-1]) < 3.39
        left = np.interp(path[-1], table.anchors, getattr(table, field))[inside]
        assert np.abs(left).max() < 1e-3
    losses = np.interp(runs.paths["full gradient"], table.anchors, table.value)
    assert (np.diff(losses, axis=0) < 1e-3).all()  # up to the table's interpolation
    assert runs.losses["full gradient"] == pytest.approx(losses[-1])
    ends = runs.paths["iMAML"][-1]
    assert runs.settled["iMAML"] == pytest.approx(vf.objective(tasks, ends)[0].mean(0), abs=0.02)
    with pytest.raises(ValueError, match="starts must lie within"):
        vf.train(tasks, table, np.array([4.0]))


def test_training_draws_every_start_and_end() -> None:
    figure = vf.training(count=2, starts=4, steps=30, **SMALL)
    for name in ("iMAML", "averaged over outcomes", "full gradient"):
        assert len(data(figure, f"start:{name}")[0]) == 4
    assert len(artists(figure, "path")) == 12
    assert {len(path.get_xdata()) for path in artists(figure, "path")} == {31}


def test_the_command_draws_one_picture_and_names_what_there_is(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["figures", "--only", "anchor", "--folder", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "01_anchor.png" in run.output
    with Image.open(tmp_path / "01_anchor.png") as picture:
        assert picture.width == 1000
    run = CliRunner().invoke(app, ["figures", "--only", "star", "--folder", str(tmp_path)])
    assert run.exit_code == 2 and "moving_anchor" in run.output


def test_every_picture_is_drawn_quickly_on_request(tmp_path: Path) -> None:
    paths = vf.draw_all(tmp_path, OTHER, quick=True)
    assert [path.stem.partition("_")[2] for path in paths] == list(vf.FIGURES)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == ("GIF" if "moving" in path.name else "PNG")


def test_the_example_runs_at_small_size(tmp_path: Path) -> None:
    script = ROOT / "examples" / "toy" / "figures.py"
    options = ["--points", "9", "--frames", "2", "--run-length", "8"]
    done = subprocess.run(
        [sys.executable, str(script), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 4
