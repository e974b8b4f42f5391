"""One-dimensional toy tasks with many minima, and what an anchor makes of them.

A task's loss is a parabola plus waves, f(θ) = ½ c (θ − m)² + Σ_j a_j cos(w_j (θ − φ_j)), in nats.
The anchor θ0 adds the penalty ½ λ (θ − θ0)²: E(θ) = f(θ) + ½ λ (θ − θ0)². The setting is that of
Ferenc Huszár, "Notes on iMAML" (inference.vc, 2019), with any λ; his derivative 1 / (1 + f″) is
λ / (λ + f″) at λ = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Numbers = float | Sequence[float] | Array
_SCAN = 0.005  # minima of E closer than this are not told apart


@dataclass(frozen=True, eq=False)
class Toy:
    """The loss of one task, or of T tasks at once; nats against an unconstrained number.

    Anything with the methods `value`, `slope` and `curvature`, the attribute `limits`, and (for
    many tasks) a length and items can take its place in the figures.

    Args:
        bowl: c, the parabola's second derivative, `[]` or `[T]`.
        centre: m, the parabola's minimum, `[]` or `[T]`.
        heights: a_j, amplitudes of the waves in nats, `[J]` or `[T, J]`.
        frequencies: w_j, in radians per unit of θ, `[J]` or `[T, J]`.
        crests: φ_j, where each wave is highest (a_j > 0), `[J]` or `[T, J]`.
        limits: the part of the line that is drawn and searched for minima.

    Raises:
        ValueError: fields whose shapes do not fit, or limits out of order.
    """

    bowl: Numbers = 0.3
    centre: Numbers = 1.1
    heights: Numbers = (0.55, 0.15)
    frequencies: Numbers = (2.9, 4.3)
    crests: Numbers = (0.25, 0.5)
    limits: tuple[float, float] = (-7.0, 7.0)

    def __post_init__(self) -> None:
        waves = np.broadcast_shapes(*map(np.shape, (self.heights, self.frequencies, self.crests)))
        if len(waves) not in (1, 2):
            raise ValueError(f"heights, frequencies, crests must be [J] or [T, J], got {waves}")
        batch = np.broadcast_shapes(np.shape(self.bowl), np.shape(self.centre), waves[:-1])
        if len(batch) > 1:
            raise ValueError(f"bowl and centre must be numbers or [T], got {batch}")
        for name in ("bowl", "centre", "heights", "frequencies", "crests"):
            shape = batch if name in ("bowl", "centre") else (*batch, waves[-1])
            array = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, np.broadcast_to(array, shape))
        if not self.limits[0] < self.limits[1]:
            raise ValueError(f"limits must be (low, high), got {self.limits}")

    def __len__(self) -> int:
        shape = np.shape(self.bowl)
        if not shape:
            raise TypeError("a single task has no length")
        return shape[0]

    def __getitem__(self, which: int | slice) -> Toy:
        names = ("bowl", "centre", "heights", "frequencies", "crests")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def __iter__(self) -> Iterator[Toy]:
        return (self[i] for i in range(len(self)))

    def _waves(self, theta: ArrayLike) -> tuple[Array, Array, Array, Array, Array]:
        """c, θ − m `[(T,) N]`; heights, frequencies and phases `[(T,) N, J]`."""
        x = np.asarray(theta, dtype=np.float64)
        batch = np.shape(self.bowl)
        if x.ndim > 1 + len(batch):
            raise ValueError(f"theta has {x.ndim} dimensions; see Toy.value")
        middle = (1,) * (1 if batch and x.ndim == 2 else x.ndim)
        c, m = (np.reshape(part, (*batch, *middle)) for part in (self.bowl, self.centre))
        a, w, crest = (
            np.reshape(part, (*batch, *middle, -1))
            for part in (self.heights, self.frequencies, self.crests)
        )
        return c, x - m, a, w, w * (x[..., None] - crest)

    def value(self, theta: ArrayLike) -> Array:
        """f at `theta`.

        Args:
            theta: `[]` or `[N]`; or `[T, N]`, for each of T tasks its own points.

        Returns:
            The shape of `theta` for a single task; `[T]` or `[T, N]` for T tasks. Nats.
        """
        c, offset, a, _, phase = self._waves(theta)
        return 0.5 * c * offset**2 + (a * np.cos(phase)).sum(-1)

    def slope(self, theta: ArrayLike) -> Array:
        """f′ at `theta`, in the shapes of `value`."""
        c, offset, a, w, phase = self._waves(theta)
        return c * offset - (a * w * np.sin(phase)).sum(-1)

    def curvature(self, theta: ArrayLike) -> Array:
        """f″ at `theta`, in the shapes of `value`."""
        c, _, a, w, phase = self._waves(theta)
        return c - (a * w**2 * np.cos(phase)).sum(-1)


def draw_tasks(
    count: int,
    seed: int | np.random.Generator = 0,
    like: Toy | None = None,
    spread: float = 0.5,
    shift: float = 0.3,
    scale: float = 0.3,
) -> Toy:
    """`count` random relatives of a task; the first n of them do not depend on `count`.

    Args:
        count: T, how many.
        seed: of the draws, or a NumPy generator to take them from.
        like: the task that they resemble; default `Toy()`.
        spread: standard deviation of the parabolas' centres.
        shift: standard deviation of each wave's crest, in units of θ.
        scale: standard deviation of the logarithm of each wave's height.

    Raises:
        ValueError: `count` below 1, or `like` already many tasks.
    """
    base = Toy() if like is None else like
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if np.ndim(base.bowl):
        raise ValueError(f"like must be a single task, got {len(base)}")
    waves = np.shape(base.heights)[0]
    noise = np.random.default_rng(seed).standard_normal((count, 1 + 2 * waves))
    return Toy(
        bowl=base.bowl,
        centre=np.asarray(base.centre) + spread * noise[:, 0],
        heights=np.asarray(base.heights) * np.exp(scale * noise[:, 1 : 1 + waves]),
        frequencies=base.frequencies,
        crests=np.asarray(base.crests) + shift * noise[:, 1 + waves :],
        limits=base.limits,
    )


def stationary(toy: Toy, anchor: float, precision: float = 1.0) -> tuple[Array, Array]:
    """Minima `[K]` and the maxima `[K − 1]` between them of E at one anchor, ascending.

    Points closer together than 0.005 are not told apart. The search goes from a grid to bisection,
    so that positions are right to 1e-13.

    Raises:
        ValueError: E does not turn up again within the toy's limits on both sides.
    """
    low, high = toy.limits
    points = np.linspace(low, high, int(np.ceil((high - low) / _SCAN)) + 1)

    def uphill(x: Array) -> Array:
        return toy.slope(x) + precision * (x - anchor)

    sign = np.where(uphill(points) >= 0, 1, -1)
    if sign[0] > 0 or sign[-1] < 0:
        raise ValueError(f"a minimum at anchor {anchor} lies outside the limits {toy.limits}")
    at = np.flatnonzero(np.diff(sign))
    rising = sign[at] < 0
    roots = _bisect(uphill, points[at], points[at + 1], rising)
    return roots[rising], roots[~rising]


def descend(toy: Toy, anchors: ArrayLike, precision: float = 1.0) -> Array:
    """The minimum of E that steepest descent from each anchor, in tiny steps, ends in.

    Args:
        toy: one task or T tasks.
        anchors: θ0, `[A]`; descent starts there, and the penalty is centred there.
        precision: λ, of the penalty ½ λ (θ − θ0)².

    Returns:
        θ*(θ0), `[A]` or `[T, A]`, right to 1e-13.

    Raises:
        ValueError: a descent leaves the toy's limits.
    """
    start = np.atleast_1d(np.asarray(anchors, dtype=np.float64))
    low, high = min(toy.limits[0], start.min()), max(toy.limits[1], start.max())
    points = np.linspace(low, high, int(np.ceil((high - low) / _SCAN)) + 1)
    begin, lam = start[:, None], precision * start[:, None]

    def first(slopes: Array, own: Array) -> tuple[Array, Array]:
        """Between which points descent on one task ends, `[A]` both."""
        rises = slopes + precision * points >= lam  # [A, N]: E climbs to the right here
        right = own < 0  # E′ at θ0, where the penalty is flat
        ahead = np.where(right[:, None], rises & (points >= begin), ~rises & (points <= begin))
        if not ahead.any(1).all():
            raise ValueError(f"descent left the limits {toy.limits}; widen them")
        n = len(points) - 1
        stop = points[np.where(right, ahead.argmax(1), n - ahead[:, ::-1].argmax(1))]
        step = points[1] - points[0]
        return (
            np.where(right, np.maximum(stop - step, start), stop),
            np.where(right, stop, np.minimum(stop + step, start)),
        )

    def uphill(x: Array) -> Array:
        return toy.slope(x) + precision * (x - start)

    tables, own = np.atleast_2d(toy.slope(points)), np.atleast_2d(toy.slope(start))
    ends = np.array([first(*rows) for rows in zip(tables, own, strict=True)])  # [T, 2, A]
    near, far = ends.swapaxes(0, 1) if np.ndim(toy.bowl) else ends[0]
    return _bisect(uphill, near, far, np.bool_(True))


def lowest(toy: Toy, anchors: ArrayLike, precision: float = 1.0) -> Array:
    """The global minimum of E at each anchor within the toy's limits; shapes as of `descend`."""
    start = np.atleast_1d(np.asarray(anchors, dtype=np.float64))
    low, high = toy.limits
    points = np.linspace(low, high, int(np.ceil((high - low) / _SCAN)) + 1)
    values = np.atleast_2d(toy.value(points))  # [T, N]
    penalty = 0.5 * precision * (points - start[:, None]) ** 2  # [A, N]
    best = np.stack([points[np.argmin(row + penalty, axis=1)] for row in values])
    best = best if np.ndim(toy.bowl) else best[0]

    def uphill(x: Array) -> Array:
        return toy.slope(x) + precision * (x - start)

    return _bisect(uphill, best - _SCAN, best + _SCAN, np.bool_(True))


def implicit_slope(toy: Toy, minimum: ArrayLike, precision: float = 1.0) -> Array:
    """dθ*/dθ0 = λ / (λ + f″(θ*)) (Rajeswaran et al., 2019), in the shapes of `toy.value`."""
    return precision / (precision + toy.curvature(minimum))


def _bisect(
    uphill: Callable[[Array], Array],
    low: Array,
    high: Array,
    rising: NDArray[np.bool_] | np.bool_,
) -> Array:
    """Roots of `uphill` between `low` and `high`, where it rises or falls."""
    for _ in range(36):  # 0.01 / 2³⁶ is about 1e-13
        middle = 0.5 * (low + high)
        beyond = (uphill(middle) >= 0) == rising
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return 0.5 * (low + high)
