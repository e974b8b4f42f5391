"""The exact law of anchored Langevin dynamics, against closed forms, differences and draws.

Statistical tests allow 4.5 standard errors of a mean over 200,000 draws: a false-alarm rate of
7e-6 each, with a fixed seed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.optimize import brentq

from varmeta.figures import (
    Chain,
    Toy,
    descend,
    draw_tasks,
    implicit_slope,
    jumps,
    lowest,
    stationary,
)

LIMITS = (-6.0, 6.0)
ERRORS = 4.5


def query(x: np.ndarray) -> np.ndarray:
    return 0.5 * (x - 1) ** 2 + np.sin(2 * x)


def chain(log_scale: float = 0.0, toy: Toy | None = None, **changes: object) -> Chain:
    toy = Toy() if toy is None else toy
    options: dict = {"step_size": 0.05, "temperature": 0.3, "run_length": 20} | changes
    return Chain(toy.slope, precision=math.exp(-2 * log_scale), **options)


@pytest.mark.parametrize("run_length", [1, 2, 3, 40])
def test_a_quadratic_loss_gives_the_gaussian_recursion(run_length: int) -> None:
    c, m, loc, eta, scale = 2.0, -0.7, 0.6, 0.05, -0.3
    heat = np.linspace(0.5, 0.2, run_length)
    lam = math.exp(-2 * scale)
    mean, mean_by_loc, mean_by_scale, variance, variance_by_scale = loc, 1.0, 0.0, 0.0, 0.0
    keep, keep_by_scale = 1 - eta * (c + lam), 2 * eta * lam
    for tau in heat:
        mean_by_scale = keep * mean_by_scale + keep_by_scale * mean - 2 * eta * lam * loc
        mean_by_loc = keep * mean_by_loc + eta * lam
        mean = keep * mean + eta * (c * m + lam * loc)
        variance_by_scale = keep**2 * variance_by_scale + 2 * keep * keep_by_scale * variance
        variance = keep**2 * variance + 2 * eta * tau
    law = Chain(lambda x: c * (x - m), eta, heat, run_length, lam).law(loc, LIMITS)
    assert law.expectation(lambda x: x) == pytest.approx(mean, abs=1e-11)
    assert law.expectation(lambda x: (x - mean) ** 2) == pytest.approx(variance, abs=1e-11)
    assert law.gradient(lambda x: x) == pytest.approx([mean_by_loc, mean_by_scale], abs=1e-9)
    by_second = 2 * mean * mean_by_scale + variance_by_scale
    assert law.gradient(lambda x: x**2)[1] == pytest.approx(by_second, abs=1e-9)


@pytest.mark.parametrize("run_length", [1, 2, 20])
@pytest.mark.parametrize("loc", [-1.6, 0.25, 1.1])
def test_the_derivatives_are_those_of_the_law(loc: float, run_length: int) -> None:
    h = 1e-4
    heat = np.linspace(0.4, 0.2, run_length)
    options = {"temperature": heat, "run_length": run_length}
    law = chain(**options).law(loc, LIMITS)
    up, down = (chain(**options).law(loc + d, LIMITS).expectation(query) for d in (h, -h))
    wide, narrow = (chain(d, **options).law(loc, LIMITS).expectation(query) for d in (h, -h))
    differences = [(up - down) / (2 * h), (wide - narrow) / (2 * h)]
    assert law.gradient(query) == pytest.approx(differences, rel=1e-6)


def test_occupations_sum_to_one_and_so_do_their_derivatives_to_zero() -> None:
    for anchor in (-1.0, 0.2, 2.0):
        law = chain().law(anchor, LIMITS)
        edges = stationary(Toy(), anchor)[1]
        p, slopes = law.occupations(edges)
        assert len(p) == len(edges) + 1
        assert p.sum() == pytest.approx(1, abs=1e-11) and (p >= 0).all()
        assert slopes.sum(1) == pytest.approx([0, 0], abs=1e-10)
        h = 1e-4
        up, down = (chain().law(anchor + d, LIMITS).occupations(edges)[0] for d in (h, -h))
        assert slopes[0] == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9)
        assert np.abs(slopes[0]).max() > 1e-3


@pytest.mark.parametrize("anchor", [-1.0, 0.2, 2.0])
def test_the_two_mechanisms_sum_to_the_gradient(anchor: float) -> None:
    law = chain().law(anchor, LIMITS)
    edges = stationary(Toy(), anchor)[1]
    split = law.mechanisms(query, edges)
    assert (split.p * split.mean).sum() == pytest.approx(law.expectation(query), abs=1e-10)
    total = split.location.sum() + split.probability.sum()
    assert total == pytest.approx(law.gradient(query)[0], abs=1e-9)
    h = 1e-4
    up, down = (chain().law(anchor + d, LIMITS).mechanisms(query, edges) for d in (h, -h))
    location = split.p * (up.mean - down.mean) / (2 * h)
    assert split.location == pytest.approx(location, rel=1e-5, abs=1e-8)
    probability = split.mean * (up.p - down.p) / (2 * h)
    assert split.probability == pytest.approx(probability, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("anchor", [-1.0, 0.2, 2.0])
def test_regions_whose_edges_move_with_the_anchor_and_the_scale(anchor: float) -> None:
    toy, scale, h = Toy(), 0.1, 1e-4

    def split(loc: float, s: float):  # type: ignore[no-untyped-def]
        edges = stationary(toy, loc, math.exp(-2 * s))[1]
        return chain(s).law(loc, LIMITS).mechanisms(query, edges)

    lam = math.exp(-2 * scale)
    edges = stationary(toy, anchor, lam)[1]
    moves = implicit_slope(toy, edges, lam) * np.stack([np.ones_like(edges), 2 * (edges - anchor)])
    law = chain(scale).law(anchor, LIMITS)
    p, slopes = law.occupations(edges, moves)
    up, down = split(anchor + h, scale), split(anchor - h, scale)
    wide, narrow = split(anchor, scale + h), split(anchor, scale - h)
    assert slopes[0] == pytest.approx((up.p - down.p) / (2 * h), rel=1e-5, abs=1e-8)
    assert slopes[1] == pytest.approx((wide.p - narrow.p) / (2 * h), rel=1e-5, abs=1e-8)
    found = law.mechanisms(query, edges, moves)
    location = p * (up.mean - down.mean) / (2 * h)
    assert found.location == pytest.approx(location, rel=1e-4, abs=1e-7)
    assert found.probability == pytest.approx(found.mean * slopes[0])
    still = law.mechanisms(query, edges)
    assert found.location.sum() + found.probability.sum() == pytest.approx(
        still.location.sum() + still.probability.sum(), abs=1e-9
    )
    assert np.abs(slopes[0] - law.occupations(edges)[1][0]).max() > 5e-4  # and it matters


def test_a_region_that_is_never_found_has_no_part() -> None:
    split = chain(temperature=0.2, run_length=3).law(-1.0, LIMITS).mechanisms(query, [0.0, 60.0])
    parts = [split.p[2], split.location[2], split.probability[2]]
    assert parts == pytest.approx([0, 0, 0], abs=1e-13)  # to rounding
    assert np.isfinite(split.mean).all()


def test_at_low_temperature_one_basin_gives_the_minimum_and_its_implicit_derivative() -> None:
    toy, anchor = Toy(heights=(0.2, 0.0)), 0.4
    minimum = descend(toy, [anchor])[0]
    ends = []
    for tau in (0.01, 0.005):
        law = chain(toy=toy, temperature=tau, run_length=400).law(anchor, (-1.0, 2.0))
        ends.append([law.expectation(lambda x: x), law.gradient(lambda x: x)[0]])
    limit = 2 * np.array(ends[1]) - np.array(ends[0])  # which leaves an error of order τ²
    assert limit == pytest.approx([minimum, implicit_slope(toy, minimum)], abs=1e-3)


def test_a_simulation_agrees() -> None:
    toy, anchor = Toy(), 0.25
    rng = np.random.default_rng(0)
    x = np.full(200_000, anchor)
    for _ in range(20):
        push = toy.slope(x) + (x - anchor)
        x = x - 0.05 * push + math.sqrt(2 * 0.05 * 0.3) * rng.standard_normal(x.shape)
    law = chain().law(anchor, LIMITS)
    edges = stationary(toy, anchor)[1]
    found = np.stack([np.searchsorted(edges, x) == k for k in range(len(edges) + 1)])
    for draws, exact in (
        (query(x), law.expectation(query)),
        *zip(found, law.occupations(edges)[0], strict=True),
    ):
        error = max(draws.std() / math.sqrt(len(x)), 1 / len(x))  # a basin may be found never
        assert abs(draws.mean() - exact) < ERRORS * error
    assert query(x).std() / math.sqrt(len(x)) < 0.01  # sharp enough to fail


def test_a_density_integrates_to_the_occupations() -> None:
    law = chain().law(0.25, LIMITS)
    x = np.linspace(-5, 5, 20_001)
    density, slopes = law.density(x)
    left = x <= 0.5
    assert trapezoid(density[left], x[left]) == pytest.approx(law.occupations([0.5])[0][0])
    by_anchor = trapezoid(slopes[:, left], x[left])
    assert by_anchor == pytest.approx(law.occupations([0.5])[1][:, 0], rel=1e-4)


def test_a_finer_grid_changes_nothing() -> None:
    coarse, fine = (chain().law(0.25, LIMITS, resolution=r) for r in (2.5, 6.0))
    assert coarse.expectation(query) == pytest.approx(fine.expectation(query), abs=1e-10)
    assert coarse.gradient(query) == pytest.approx(fine.gradient(query), abs=1e-9)


def test_a_given_curvature_is_the_differenced_one() -> None:
    toy = Toy()
    given = Chain(toy.slope, 0.05, 0.3, 5, curvature=toy.curvature).law(0.3, LIMITS)
    assert given.gradient(query) == pytest.approx(
        chain(run_length=5).law(0.3, LIMITS).gradient(query), abs=1e-8
    )
    wrong = Chain(toy.slope, 0.05, 0.3, 5, curvature=lambda x: x + 9).law(0.3, LIMITS)
    assert abs(wrong.gradient(query) - given.gradient(query)).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "law", "words"),
    [
        ({"temperature": 0.0}, {}, "temperature must be positive"),
        ({"temperature": [0.1, 0.2]}, {}, "one per step"),
        ({"run_length": 0}, {}, "run_length must be at least 1"),
        ({"step_size": -1.0}, {}, "step_size must be positive"),
        ({}, {"limits": (-0.5, 0.5)}, "widen them"),
        ({}, {"limits": (1.0, -1.0)}, r"limits must be \(low, high\)"),
        ({}, {"resolution": 0.5}, "resolution must be at least 1"),
        ({"temperature": 1e-9}, {}, "grid points, more than"),
        ({"step_size": 0.6, "temperature": 0.05}, {"resolution": 1.0}, "noise sds apart"),
    ],
)
def test_what_the_grid_cannot_do_is_refused(changes: dict, law: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chain(**changes).law(0.3, **({"limits": LIMITS} | law))


# -- the toy tasks ---------------------------------------------------------------------------------


def test_slope_and_curvature_are_derivatives() -> None:
    x, h = np.linspace(-3, 3, 41), 1e-5
    for toy in (Toy(), draw_tasks(5)):
        for f, derivative in ((toy.value, toy.slope), (toy.slope, toy.curvature)):
            assert derivative(x) == pytest.approx((f(x + h) - f(x - h)) / (2 * h), abs=1e-7)


def test_many_tasks_are_one_by_one_the_same() -> None:
    tasks, x = draw_tasks(4, seed=3), np.linspace(-2, 2, 7)
    own = np.stack([x + k for k in range(4)])
    for k, task in enumerate(tasks):
        assert np.array_equal(tasks.value(x)[k], task.value(x))
        assert np.array_equal(tasks.slope(own)[k], task.slope(own[k]))
        assert np.array_equal(descend(tasks, x)[k], descend(task, x))
        assert np.array_equal(lowest(tasks, x)[k], lowest(task, x))
    assert np.array_equal(draw_tasks(9, seed=3)[:4].crests, tasks.crests)
    assert not np.array_equal(draw_tasks(4, seed=4).crests, tasks.crests)


def test_minima_are_stationary_and_the_lowest_is_the_lowest() -> None:
    toy, anchors = Toy(), np.linspace(-3, 3, 61)
    dense = np.linspace(-5, 5, 100_001)
    for anchor, found, low in zip(
        anchors, descend(toy, anchors), lowest(toy, anchors), strict=True
    ):
        minima, maxima = stationary(toy, anchor)
        for x in (*minima, *maxima):
            assert toy.slope(x) + x - anchor == pytest.approx(0, abs=1e-11)
        assert (toy.curvature(minima) > -1).all() and (toy.curvature(maxima) < -1).all()
        assert low == pytest.approx(
            dense[np.argmin(toy.value(dense) + (dense - anchor) ** 2 / 2)], abs=1e-4
        )
        # Descent cannot cross a maximum of E: it ends in the basin that it starts in.
        assert found == pytest.approx(minima[np.searchsorted(maxima, anchor)], abs=1e-11)


def test_descent_is_where_gradient_descent_ends() -> None:
    toy, anchors = Toy(), np.linspace(-3, 3, 31)
    x = anchors.copy()
    for _ in range(20_000):
        x = x - 0.02 * (toy.slope(x) + 2 * (x - anchors))
    assert descend(toy, anchors, precision=2.0) == pytest.approx(x, abs=1e-8)


def test_of_two_minima_that_nearly_tie_the_lower_one_is_found() -> None:
    """A toy that is the same on both sides of a place: its minima tie for an anchor there."""
    place = 0.00137
    toy = Toy(centre=place, heights=(0.9,), frequencies=(2.9,), crests=(place,))
    sides = np.array([1e-3, 1e-6, 1e-9, 1e-12])
    for precision in (0.3, 1.0, 2.0):
        right = lowest(toy, place + sides, precision) - place
        left = lowest(toy, place - sides, precision) - place
        assert (right > 0.1).all() and left == pytest.approx(-right, abs=1e-12)
        assert np.abs(jumps(toy, "lowest", precision) - place).min() < 1e-12


@pytest.mark.parametrize("precision", [0.5, 1.0, 2.0])
def test_jumps_are_where_minima_tie_vanish_or_part(precision: float) -> None:
    """To rounding, for six tasks; folds and crests by SciPy's root finder."""
    seen = {"ties": 0, "crests": 0, "folds": 0}
    for toy in draw_tasks(6, seed=1):
        for at in jumps(toy, "lowest", precision):
            low, high = (lowest(toy, [at + side], precision)[0] for side in (-1e-9, 1e-9))
            gap = np.diff([toy.value(x) + precision / 2 * (x - at) ** 2 for x in (low, high)])
            assert abs(gap[0] / (precision * (high - low))) < 1e-13 and high - low > 0.1
            seen["ties"] += 1
        line = np.linspace(*toy.limits, 20_001)
        truth = {}
        for name, function in (
            ("crests", lambda x: toy.slope(x)),  # noqa: B023
            ("folds", lambda x: toy.curvature(x) + precision),  # noqa: B023
        ):
            at = np.flatnonzero(np.diff(np.sign(function(line))))
            roots = np.array([brentq(function, line[k], line[k + 1], xtol=1e-15) for k in at])
            truth[name] = roots if name == "crests" else roots + toy.slope(roots) / precision
        for at in jumps(toy, "descent", precision):
            gaps = {name: np.abs(places - at).min() for name, places in truth.items()}
            assert min(gaps.values()) < 1e-12
            seen[min(gaps, key=lambda name: gaps[name])] += 1
    assert seen["ties"] > 6 and seen["crests"] > 6
    assert seen["folds"] > 0 or precision != 0.5


def test_a_loss_that_is_no_toy_can_take_its_place() -> None:
    class Well:
        limits = (-3.0, 3.0)

        def value(self, x):  # type: ignore[no-untyped-def]
            return (np.asarray(x) ** 2 - 1) ** 2

        def slope(self, x):  # type: ignore[no-untyped-def]
            return 4 * np.asarray(x) * (np.asarray(x) ** 2 - 1)

        def curvature(self, x):  # type: ignore[no-untyped-def]
            return 12 * np.asarray(x) ** 2 - 4

    well: Any = Well()
    assert jumps(well, "descent", span=(-2.0, 2.0)).tolist() == pytest.approx([0.0], abs=1e-14)
    assert jumps(well, "lowest", span=(-2.0, 2.0)).tolist() == pytest.approx([0.0], abs=1e-14)
    assert descend(well, [0.3]) == lowest(well, [0.3])
    with pytest.raises(ValueError, match="minima must be 'lowest' or 'descent', got 'first'"):
        jumps(well, "first")


def test_the_implicit_derivative_is_that_of_the_minimum() -> None:
    toy, h = Toy(), 1e-5
    anchors = np.array([-2.2, -1.0, 0.1, 0.7, 1.6])
    for find in (descend, lowest):
        minimum = find(toy, anchors)
        rise = (find(toy, anchors + h) - find(toy, anchors - h)) / (2 * h)
        assert implicit_slope(toy, minimum) == pytest.approx(rise, rel=1e-5)


def test_a_toy_out_of_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="limits must be"):
        Toy(limits=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"must be \[J\] or \[T, J\]"):
        Toy(heights=1.0, frequencies=1.0, crests=1.0)
    with pytest.raises(ValueError, match="outside the limits"):
        stationary(Toy(limits=(2.0, 3.0)), 0.0)
    with pytest.raises(ValueError, match="descent left the limits"):
        descend(Toy(centre=9.0, heights=(0.0, 0.0)), [2.0], precision=0.01)
    with pytest.raises(ValueError, match="like must be a single task"):
        draw_tasks(2, like=draw_tasks(2))


def test_a_bound_on_the_steps_against_draws_and_differences() -> None:
    """The bound acts on most of the steps; it stays where it is while θ0 and s move."""
    chosen = {"bound": 0.04, "run_length": 15}
    toy, loc, scale = Toy(), 0.6, 0.1
    law = chain(scale, **chosen).law(loc, LIMITS, resolution=25)
    source, x, count = np.random.default_rng(0), np.full(200_000, loc), 0.0
    for _ in range(15):
        move = 0.05 * (toy.slope(x) + math.exp(-2 * scale) * (x - loc))
        count += (np.abs(move) > 0.04).mean() / 15
        x = x - np.clip(move, -0.04, 0.04) + np.sqrt(2 * 0.05 * 0.3) * source.normal(size=x.shape)
    assert 0.5 < count < 0.9
    error = query(x).std() / len(x) ** 0.5
    assert abs(law.expectation(query) - query(x).mean()) < ERRORS * error

    def value(loc: float, scale: float) -> float:
        return chain(scale, **chosen).law(loc, (-3.5, 4.5), resolution=60).expectation(query)

    h = 3e-3
    by_loc = (value(loc + h, scale) - value(loc - h, scale)) / (2 * h)
    by_scale = (value(loc, scale + h) - value(loc, scale - h)) / (2 * h)
    # Sums are right to the square of the spacing; as kinks move through cells, differences to it.
    assert law.gradient(query) == pytest.approx([by_loc, by_scale], rel=0.01)
    coarse = chain(scale, **chosen).law(loc, LIMITS, resolution=12)
    assert law.gradient(query) == pytest.approx(coarse.gradient(query), rel=2e-3)
    far = chain(scale, run_length=15, bound=50.0).law(loc, LIMITS).gradient(query)
    assert far == pytest.approx(chain(scale, run_length=15).law(loc, LIMITS).gradient(query))
    with pytest.raises(ValueError, match="bound must be positive or None, got 0"):
        chain(bound=0.0)
