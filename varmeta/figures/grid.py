"""The exact law of anchored Langevin dynamics in one dimension, and its derivatives.

    x_{t+1} = x_t − η (f′(x_t) + λ (x_t − θ0)) + √(2 η τ_t) ξ_t,    ξ_t ~ N(0, 1),    x_0 = θ0

where the second term can be bounded. After one step x_1 is Gaussian. After each further one it is a
mixture of Gaussians, whose integral over the previous place is a sum over a grid: a transition
matrix. Without a bound the integrands are smooth and vanish at both ends, where the trapezoidal sum
converges faster than any power of the spacing; at the default of 2.5 points per standard deviation
of a step's noise it is right to rounding, nearly.
The derivatives in θ0 and in the log scale s (λ = exp(−2 s)) are carried along with the law, by the
same sums: nothing is differenced and nothing is drawn. Nothing here depends on the rest of
varmeta, so that it can check the gradient estimators of `varmeta.Stochastic`.

    >>> import numpy as np
    >>> chain = Chain(lambda x: 4 * x * (x**2 - 1), step_size=0.02, temperature=0.3, run_length=50)
    >>> law = chain.law(anchor=0.2, limits=(-4.0, 4.0))
    >>> round(law.expectation(lambda x: (x - 1) ** 2), 4)
    0.7147
    >>> by_anchor, by_log_scale = law.gradient(lambda x: (x - 1) ** 2)
    >>> split = law.mechanisms(lambda x: (x - 1) ** 2, edges=[0.0])
    >>> bool(np.isclose(split.location.sum() + split.probability.sum(), by_anchor))
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
Function = Callable[[Array], Any]
_MOST_POINTS = 6000  # of a grid: a transition matrix of 0.3 GB
_PANEL, _NODES = 2.0, 10  # Gauss-Legendre within a region: panels of 2 noise sds, 10 nodes each
_LEGENDRE = np.polynomial.legendre.leggauss(_NODES)
_ROOT = math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Chain:
    """Anchored Langevin dynamics on one loss.

    Args:
        slope: f′, from `[N]` points to `[N]` numbers, nats per unit of θ.
        step_size: η > 0.
        temperature: τ > 0 in nats, one number or one per step, `[run_length]`.
        run_length: steps from θ0 to the result, at least 1.
        precision: λ > 0, of the penalty ½ λ (θ − θ0)². With a scale s as in
            `varmeta.GaussianPrior` it is exp(−2 s).
        curvature: f″, needed at θ0 alone (x_0 = θ0, so that x_1 moves by 1 − η f″(θ0)). Default: a
            difference of `slope` of order six, right to about 1e-11.
        bound: the gradient moves x by no more than this in a step, in units of θ; it stays where it
            is while θ0 and s move. None for no bound. Where it begins to act the mean of a step has
            a kink, and a sum over the grid is right to the square of the spacing: raise the
            resolution.

    Raises:
        ValueError: a number out of range, or temperatures that are not one per step.
    """

    slope: Function
    step_size: float
    temperature: float | Sequence[float] | Array
    run_length: int
    precision: float = 1.0
    curvature: Function | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.run_length < 1:
            raise ValueError(f"run_length must be at least 1, got {self.run_length}")
        for name in ("step_size", "precision"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"bound must be positive or None, got {self.bound}")
        shape = np.shape(self.temperature)
        if shape not in ((), (self.run_length,)):
            raise ValueError(
                f"temperature must be a number or one per step, [{self.run_length}], got {shape}"
            )
        if not (np.asarray(self.temperature) > 0).all():
            raise ValueError(
                "temperature must be positive: at zero the law is a point, which `descend` finds"
            )

    def law(self, anchor: float, limits: tuple[float, float], resolution: float = 2.5) -> Law:
        """The law of x_T from one anchor.

        Args:
            anchor: θ0.
            limits: where the grid ends; no mass may get there before the last step.
            resolution: grid points per standard deviation of the smallest step's noise.

        Raises:
            ValueError: limits out of order, a resolution below 1, a grid that is too coarse for
                how fast f′ changes, one of more than 6000 points, or mass that leaves the limits.
        """
        noise = np.sqrt(2 * self.step_size * np.asarray(self.temperature, dtype=np.float64))
        sds = np.broadcast_to(noise, (self.run_length,))
        points = self._grid(limits, float(sds.min()), resolution)
        width = float(points[1] - points[0])
        pull = self.step_size * self.precision
        move, free = self._move(points, anchor, cells=True)
        centres = points - move
        stretch = np.abs(np.gradient(centres, width))
        moves = free * np.stack([np.full_like(points, pull), 2 * pull * (points - anchor)])
        start = np.array([float(anchor)])
        first, follows = self._move(start, anchor)
        law = Law(
            points,
            np.ones(1),
            start - first,
            float(sds[0]),
            np.zeros((2, 1)),
            np.array([1 - follows * self.step_size * self._curvature(start), [0.0]]),
        )
        kernel, tilted, kernel_sd = points, points, 0.0
        for step in range(1, self.run_length):
            if step <= 2 or sds[step - 1] != kernel_sd:
                kernel, tilted = law.kernel(points)
                kernel_sd = float(sds[step - 1])
            density, changes = law.through(kernel, tilted)
            _check_mass(density, width, anchor, limits)
            _check_spacing(density, width * stretch, float(sds[step]))
            law = Law(points, width * density, centres, float(sds[step]), width * changes, moves)
        return law

    def laws(
        self, anchors: ArrayLike, limits: tuple[float, float], resolution: float = 2.5
    ) -> list[Law]:
        """`law` at each of `anchors`, `[A]`."""
        return [self.law(float(a), limits, resolution) for a in np.ravel(anchors)]

    def _move(self, x: Array, anchor: float, cells: bool = False) -> tuple[Array, Array]:
        """By how much the gradient moves x, `[N]`; the share of the cell around it not bounded."""
        move = self.step_size * (
            np.asarray(self.slope(x), dtype=np.float64) + self.precision * (x - anchor)
        )
        if self.bound is None:
            return move, np.ones_like(move)
        beyond = self.bound - np.abs(move)
        free = (beyond >= 0).astype(np.float64)
        if cells:  # of a cell in which the bound begins to act, by a line through the move
            across = np.abs(np.gradient(move))
            free = np.clip(beyond / np.where(across > 0, across, 1.0) + 0.5, 0.0, 1.0)
            free = np.where(across > 0, free, beyond >= 0)
        return np.clip(move, -self.bound, self.bound), free

    def _grid(self, limits: tuple[float, float], noise: float, resolution: float) -> Array:
        low, high = limits
        if not low < high:
            raise ValueError(f"limits must be (low, high), got {limits}")
        if not resolution >= 1:
            raise ValueError(f"resolution must be at least 1 point per noise sd, got {resolution}")
        count = math.ceil((high - low) * resolution / noise) + 1
        if count > _MOST_POINTS:
            raise ValueError(
                f"the noise of a step, sd {noise:.2g}, needs {count} grid points, more than "
                f"{_MOST_POINTS}: raise temperature or step_size, or narrow the limits"
            )
        return np.linspace(low, high, count)

    def _curvature(self, at: Array) -> float:
        if self.curvature is not None:
            return float(np.asarray(self.curvature(at)).reshape(()))
        weights, h = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60, 2e-3
        return float(weights @ np.asarray(self.slope(at + h * np.arange(-3, 4)))) / h


@dataclass(frozen=True)
class Law:
    """The law of x_T, a mixture of C Gaussians, with its derivatives in θ0 and in the log scale.

    Args:
        points: the grid, `[N]`.
        weights: of the components, `[C]`; their sum is one.
        centres: their means, `[C]`.
        noise: their common standard deviation.
        weight_slopes: derivatives of the weights, `[2, C]`: by θ0, by the log scale s.
        centre_slopes: derivatives of the means, `[2, C]`.
    """

    points: Array
    weights: Array
    centres: Array
    noise: float
    weight_slopes: Array
    centre_slopes: Array

    def kernel(self, x: Array) -> tuple[Array, Array]:
        """Each component's density at `x`, and its derivative by the mean, `[N, C]` both."""
        away = (x[:, None] - self.centres) / self.noise
        kernel = np.exp(-0.5 * away**2) / (_ROOT * self.noise)
        return kernel, kernel * away / self.noise

    def through(self, kernel: Array, tilted: Array) -> tuple[Array, Array]:
        """The density and its two derivatives, `[N]` and `[2, N]`, where `kernel` was taken."""
        changes = self.weight_slopes @ kernel.T + (self.weights * self.centre_slopes) @ tilted.T
        return kernel @ self.weights, changes

    def density(self, x: ArrayLike) -> tuple[Array, Array]:
        """The density of x_T at `x` `[N]`, and its derivatives by θ0 and by s, `[2, N]`."""
        return self.through(*self.kernel(np.asarray(x, dtype=np.float64)))

    def expectation(self, query: Function) -> float:
        """E g(x_T), for g from `[N]` points to `[N]` numbers, smooth on the scale of the noise."""
        return float(self._sums(query, [])[0].sum())

    def gradient(self, query: Function) -> Array:
        """dE g(x_T) by θ0 and by the log scale s, `[2]`."""
        return self._sums(query, [])[1].sum(1)

    def occupations(
        self, edges: ArrayLike, edge_slopes: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The probability of each region, `[R]`, and its derivatives, `[2, R]`.

        Args:
            edges: where the regions meet, `[R − 1]` ascending; the outer two have no end.
            edge_slopes: their derivatives by θ0 and by s, `[2, R − 1]`: for the maxima of E
                (λ, 2 λ (x − θ0)) / E″(x). None: they are held fixed while θ0 and s move, and what
                moving ones carry from region to region is left out.
        """
        away = (np.asarray(edges, dtype=np.float64)[:, None] - self.centres) / self.noise
        below = ndtr(away)
        falls = np.exp(-0.5 * away**2) / (_ROOT * self.noise)
        mass = below @ self.weights
        change = self.weight_slopes @ below.T - (self.weights * self.centre_slopes) @ falls.T
        if edge_slopes is not None:
            change = change + np.asarray(edge_slopes, dtype=np.float64) * (falls @ self.weights)
        ends = np.array([[0.0], [0.0]])
        total = self.weights.sum(keepdims=True)
        return (
            np.diff(mass, prepend=0.0, append=total),
            np.diff(np.hstack([ends, change, self.weight_slopes.sum(1, keepdims=True)])),
        )

    def mechanisms(
        self, query: Function, edges: ArrayLike, edge_slopes: ArrayLike | None = None
    ) -> Mechanisms:
        """The two ways in which θ0 acts on E g(x_T), region by region.

        Args:
            query: g, as of `expectation`.
            edges: where the regions meet, as of `occupations`: for the basins of E at θ0 its
                maxima, which `varmeta.figures.stationary` finds.
            edge_slopes: as of `occupations`. None: the regions are held fixed, and what moving
                edges carry across counts as location.
        """
        inner = np.asarray(edges, dtype=np.float64).reshape(-1)
        p, changes = self.occupations(inner, edge_slopes)
        sums, slopes = self._sums(query, inner)
        if edge_slopes is not None:
            at = np.asarray(query(inner)) * self.density(inner)[0] * np.asarray(edge_slopes)[0]
            slopes[0] += np.diff(at, prepend=0.0, append=0.0)
        occupied = p > 1e-290
        mean = np.where(occupied, sums / np.where(occupied, p, 1.0), 0.0)
        return Mechanisms(p, mean, mean * changes[0], slopes[0] - mean * changes[0])

    def _sums(self, query: Function, edges: ArrayLike) -> tuple[Array, Array]:
        """∫ g over each region, `[R]`, and its derivatives, `[2, R]`, by Gauss-Legendre.

        A region's edge cuts the density, so that a sum over the grid would be off by a spacing.
        """
        reach = 9 * self.noise
        alive = self.centres[self.weights > 1e-20]
        low, high = alive.min() - reach, alive.max() + reach
        low, high = max(low, self.points[0] - reach), min(high, self.points[-1] + reach)
        inner = np.clip(np.asarray(edges, dtype=np.float64), low, high)
        bounds = np.concatenate([[low], inner, [high]])
        nodes, weights = _LEGENDRE
        xs, ws, first = [], [], [0]
        for left, right in pairwise(bounds):
            count = max(math.ceil((right - left) / (_PANEL * self.noise)), 1)
            half = (right - left) / (2 * count)
            middles = left + half * (2 * np.arange(count) + 1)
            xs.append((middles[:, None] + half * nodes).ravel())
            ws.append(np.tile(half * weights, count))
            first.append(first[-1] + count * _NODES)
        x = np.concatenate(xs)
        weighted = np.concatenate(ws) * np.asarray(query(x))
        density, changes = self.density(x)
        return (
            np.add.reduceat(weighted * density, first[:-1]),
            np.add.reduceat(weighted * changes, first[:-1], axis=1),
        )


@dataclass(frozen=True)
class Mechanisms:
    """E g = Σ_k p_k ḡ_k over R regions, and its derivative in θ0 as a sum of two parts.

    Args:
        p: p_k, the probability that x_T lies in a region, `[R]`.
        mean: ḡ_k, the mean of g there, in nats, `[R]`; zero where p_k is.
        probability: ḡ_k ∂p_k/∂θ0, `[R]`: what is found more often, and less. Only its sum has a
            meaning: adding a constant to g moves the parts. Without `edge_slopes` p_k is the
            probability of a region that stays where it is.
        location: p_k ∂ḡ_k/∂θ0, `[R]`: what is found moves.
    """

    p: Array
    mean: Array
    probability: Array
    location: Array


def _check_mass(density: Array, width: float, anchor: float, limits: tuple[float, float]) -> None:
    mass = float(density.sum()) * width
    if not abs(mass - 1) < 1e-6:
        raise ValueError(
            f"the law from anchor {anchor} has mass {mass:.7f} within the limits {limits}: widen "
            "them"
        )


def _check_spacing(density: Array, reach: Array, noise: float) -> None:
    """The next step's integrand must not be narrower than the spacing, where there is mass."""
    widest = float(reach[density > 1e-10 * density.max()].max())
    if widest > noise:
        raise ValueError(
            f"a step takes neighbouring grid points {widest / noise:.1f} noise sds apart: "
            "step_size × f″ is large where the law has mass; raise resolution, or lower step_size"
        )
