"""One-dimensional toy tasks with many minima.

A task's loss is a parabola plus waves, f(θ) = ½ c (θ − m)² + Σ_j a_j cos(w_j (θ − φ_j)), in nats.
The anchor θ0 adds the penalty ½ λ (θ − θ0)²: E(θ) = f(θ) + ½ λ (θ − θ0)². The setting is that of
Ferenc Huszár, "Notes on iMAML" (inference.vc, 2019), with any λ; his derivative 1 / (1 + f″) is
λ / (λ + f″) at λ = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SPAN = (-3.4, 3.4)  # of θ0, and of θ, in the pictures
Numbers = float | Sequence[float] | Array


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
