"""What an anchor makes of a toy task: the minima of E(θ) = f(θ) + ½ λ (θ − θ0)², and their jumps.

Between two places where E″ = f″ + λ is 0, E′ is monotone, and these places do not depend on the
anchor. So each piece between two of them has at most one minimum or maximum, which bisection finds
to rounding, however close two minima lie or tie.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from varmeta.figures.toy import SPAN, Array, Toy

_SCAN = 0.005  # f″ + λ is searched for changes of sign at this spacing
_SIDE, _APART = 1e-9, 1e-3  # two anchors on either side of a jump, whose minima lie so far apart


def stationary(toy: Toy, anchor: float, precision: float = 1.0) -> tuple[Array, Array]:
    """Minima `[K]` and the maxima `[K − 1]` between them of E at one anchor, ascending.

    To rounding: to 1e-13, and where a minimum is about to vanish to the square root of 1e-16.

    Raises:
        ValueError: E does not turn up again within the toy's limits on both sides.
    """
    start = np.array([float(anchor)])
    edges, slopes = _pieces(toy, start, precision, toy.limits)
    _check_inside(toy, start, slopes)
    up = slopes[0] >= 0
    at = np.flatnonzero(up[1:] != up[:-1])
    roots = _bisect(_uphill(toy, start, precision), edges[at], edges[at + 1], up[at + 1])
    return roots[up[at + 1]], roots[~up[at + 1]]


def descend(toy: Toy, anchors: ArrayLike, precision: float = 1.0) -> Array:
    """The minimum of E that steepest descent from each anchor, in tiny steps, ends in.

    Args:
        toy: one task or T tasks.
        anchors: θ0, `[A]`; descent starts there, and the penalty is centred there.
        precision: λ, of the penalty ½ λ (θ − θ0)².

    Returns:
        θ*(θ0), `[A]` or `[T, A]`, to rounding.

    Raises:
        ValueError: a descent leaves the toy's limits.
    """
    start = np.atleast_1d(np.asarray(anchors, dtype=np.float64))
    limits = min(toy.limits[0], start.min()), max(toy.limits[1], start.max())

    def one(task: Toy) -> Array:
        edges, slopes = _pieces(task, start, precision, limits)
        begin, own = start[:, None], np.asarray(task.slope(start))[:, None]
        right = own < 0  # E′ at θ0, where the penalty is flat; the pieces behind θ0 shrink to it
        ends = np.where(right, np.maximum(edges, begin), np.minimum(edges, begin))
        slopes = np.where(ends == begin, own, slopes)
        minimum = (slopes[:, :-1] < 0) & (slopes[:, 1:] >= 0)
        if not minimum.any(1).all():
            raise ValueError(f"descent left the limits {toy.limits}; widen them")
        last = minimum.shape[1] - 1 - minimum[:, ::-1].argmax(1)
        first = np.where(right[:, 0], minimum.argmax(1), last)
        low, high = (ends[np.arange(len(start)), first + k] for k in (0, 1))
        return _bisect(_uphill(task, start, precision), low, high, np.bool_(True))

    return _for_each(toy, one)


def lowest(toy: Toy, anchors: ArrayLike, precision: float = 1.0) -> Array:
    """The global minimum of E at each anchor within the toy's limits; shapes as of `descend`.

    Raises:
        ValueError: E does not turn up again within the toy's limits on both sides.
    """
    start = np.atleast_1d(np.asarray(anchors, dtype=np.float64))

    def one(task: Toy) -> Array:
        edges, slopes = _pieces(task, start, precision, toy.limits)
        _check_inside(toy, start, slopes)
        which, piece = np.nonzero((slopes[:, :-1] < 0) & (slopes[:, 1:] >= 0))
        own, sides = start[which], (edges[piece], edges[piece + 1])
        minima = _bisect(_uphill(task, own, precision), *sides, np.bool_(True))
        energy = task.value(minima) + 0.5 * precision * (minima - own) ** 2
        order = np.lexsort((energy, which))
        leads: Array = minima[order][np.searchsorted(which, np.arange(len(start)))]
        return leads

    return _for_each(toy, one)


def implicit_slope(toy: Toy, minimum: ArrayLike, precision: float = 1.0) -> Array:
    """dθ*/dθ0 = λ / (λ + f″(θ*)) (Rajeswaran et al., 2019), in the shapes of `toy.value`."""
    return precision / (precision + toy.curvature(minimum))


def jumps(
    toy: Toy, minima: str = "lowest", precision: float = 1.0, span: tuple[float, float] = SPAN
) -> Array:
    """Where θ*(θ0) jumps, ascending; to 1e-12.

    The lowest minimum jumps where two minima tie. That which descent finds jumps where θ0 crosses a
    crest of f, and where the minimum vanishes, f″(θ) = −λ at θ0 = θ + f′(θ)/λ.

    Args:
        toy: one task.
        minima: "lowest", the global minimum of E, or "descent", the one that descent finds.
        precision: λ.
        span: of the anchors that are searched.

    Raises:
        ValueError: other `minima`; what `lowest` and `descend` raise.
    """
    if minima == "lowest":
        low, high = map(float, span)
        return np.array(_ties(_Branches(toy, precision), low, high))
    if minima != "descent":
        raise ValueError(f"minima must be 'lowest' or 'descent', got {minima!r}")
    wide = min(toy.limits[0], span[0]), max(toy.limits[1], span[1])
    crests = _roots(toy.slope, wide)
    folds = _turns(toy, precision, wide)
    at = np.sort(np.concatenate([crests, folds + np.asarray(toy.slope(folds)) / precision]))
    at = at[(at > span[0]) & (at < span[1])]
    if not len(at):
        return at
    before, after = (descend(toy, at + side, precision) for side in (-_SIDE, _SIDE))
    return at[np.abs(after - before) > _APART]


# -- parts -----------------------------------------------------------------------------------------


class _Branches:
    """The lowest E on each piece of the line, at any anchor."""

    def __init__(self, toy: Toy, precision: float) -> None:
        self.toy, self.precision = toy, precision
        self.edges = np.array([toy.limits[0], *_turns(toy, precision, toy.limits), toy.limits[1]])

    def energy(self, piece: int, anchor: float) -> float:
        """On one piece, where it has no minimum at one of its ends."""
        low, high = self.edges[piece], self.edges[piece + 1]

        def uphill(x: float) -> float:
            return float(self.toy.slope(x)) + self.precision * (x - anchor)

        inside = uphill(low) < 0 < uphill(high)
        places = [brentq(uphill, low, high, xtol=1e-15)] if inside else [low, high]
        return min(
            float(self.toy.value(x)) + self.precision * (x - anchor) ** 2 / 2 for x in places
        )

    def lowest(self, anchor: float) -> int:
        """The piece where the lowest minimum lies."""
        place = lowest(self.toy, [anchor], self.precision)[0]
        return int(np.searchsorted(self.edges, place)) - 1


def _ties(branches: _Branches, low: float, high: float) -> list[float]:
    """θ*(θ0) rises with θ0, so that a piece is left for good: where, between two anchors."""
    first, last = branches.lowest(low), branches.lowest(high)
    if first == last:
        return []

    def ahead(anchor: float) -> float:
        return branches.energy(first, anchor) - branches.energy(last, anchor)

    middle = float(brentq(ahead, low, high, xtol=1e-14))
    best = branches.lowest(middle)
    if best in (first, last) or not low < middle < high:
        return [middle]
    return _ties(branches, low, middle) + _ties(branches, middle, high)


def _roots(function: Callable[[Array], Array], limits: tuple[float, float]) -> Array:
    """Where a function changes its sign, ascending; not where it does so twice within 0.005."""
    low, high = limits
    points = np.linspace(low, high, int(np.ceil((high - low) / _SCAN)) + 1)
    up = np.asarray(function(points)) >= 0
    at = np.flatnonzero(up[1:] != up[:-1])
    return _bisect(function, points[at], points[at + 1], up[at + 1])


def _turns(toy: Toy, precision: float, limits: tuple[float, float]) -> Array:
    """Where E″ changes its sign, whatever the anchor."""
    return _roots(lambda x: toy.curvature(x) + precision, limits)


def _pieces(
    toy: Toy, anchors: Array, precision: float, limits: tuple[float, float]
) -> tuple[Array, Array]:
    """The ends `[M + 1]` of pieces on which E′ is monotone, and E′ there, `[A, M + 1]`."""
    edges = np.array([limits[0], *_turns(toy, precision, limits), limits[1]])
    slopes = np.asarray(toy.slope(edges)) + precision * (edges - anchors[:, None])
    return edges, slopes


def _uphill(toy: Toy, anchors: Array, precision: float) -> Callable[[Array], Array]:
    return lambda x: np.asarray(toy.slope(x)) + precision * (x - anchors)


def _check_inside(toy: Toy, anchors: Array, slopes: Array) -> None:
    outside = (slopes[:, 0] >= 0) | (slopes[:, -1] < 0)
    if outside.any():
        at = anchors[outside.argmax()]
        raise ValueError(f"a minimum at anchor {at} lies outside the limits {toy.limits}")


def _for_each(toy: Toy, one: Callable[[Toy], Array]) -> Array:
    """`one` of a single task, or of each of T, stacked."""
    try:
        count = len(toy)
    except TypeError:  # a single task has no length
        return one(toy)
    return np.stack([one(toy[k]) for k in range(count)])


def _bisect(
    uphill: Callable[[Array], Array],
    low: Array,
    high: Array,
    rising: NDArray[np.bool_] | np.bool_,
) -> Array:
    """Roots of `uphill` between `low` and `high`, where it rises or falls."""
    widest = float(np.max(high - low, initial=1e-9))
    for _ in range(int(np.ceil(np.log2(widest / 1e-15)))):
        middle = 0.5 * (low + high)
        beyond = (uphill(middle) >= 0) == rising
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return 0.5 * (low + high)
