"""Where the basins of one coordinate meet, and how much mass their borders carry as they move.

In one dimension basins are the intervals between the maxima b of E_i, and θ0, scales and φ move
these: db/dx = −(∂E′/∂x)/E″(b). With ρ the density of the particles' ends, the basin between two
borders gains ρ(b) db/dx at its right one and loses as much at its left one, which comes on top of
the derivative of its probability as a region that stays where it is. ρ(b) is the mean over
particles of N(b; m, σ²), m being the mean of the last step and σ its noise: it has no bias.

In more dimensions a border is a surface, whose movement is not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.inference.at_ends import alike
from varmeta.inference.chain import Chain
from varmeta.inference.partition import Partition

MOVING, FIXED = "moving", "fixed"  # what a derivative makes of the borders
_KINK = 0.01  # of the largest slope that was met: no smooth maximum has so much of it left


@dataclass(frozen=True, eq=False)
class Borders:
    """B = K − 1 borders of each task; where a task has fewer, the rest carry nothing.

    Attributes:
        left: `[B, T]` int, the basin to the left of each, as in `Partition.labels`.
        right: `[B, T]` int, the one to its right.
        place: `[B, T]`, where it lies.
        velocity: `[B, T, n]`, its movement per unit of the `Point`'s x; NaN at a kink of E.
        density: `[S, B, T]`, each particle's part in ρ at it, per unit of θ.
    """

    left: Tensor
    right: Tensor
    place: Tensor
    velocity: Tensor
    density: Tensor

    def carried(self, values: Tensor) -> Tensor:
        """d/dx of Σ_k values_k p_k by what the borders carry, each particle's part, `[S, T, n]`.

        `values` of the basins are `[K]`, or `[K, S, T]` where each particle has its own.
        """
        count, _, tasks = self.density.shape
        each = values if values.dim() == 3 else values[:, None, None].expand(-1, 1, tasks)
        own = torch.arange(tasks, device=each.device)
        total = each.new_zeros(count, tasks, self.velocity.shape[-1])
        for b in range(len(self.left)):
            gain = (each[self.left[b], :, own] - each[self.right[b], :, own]).T
            total += (gain * self.density[:, b])[..., None] * self.velocity[b]
        return total


def find_borders(chain: Chain, ends: Tensor, parts: Partition, minima: Tensor) -> Borders | None:
    """The maxima of E between neighbouring minima `[K, T, D]`; None with more than one coordinate.

    Args:
        chain: with noise in its last step; where the search evaluates E is counted with it.
        ends: `[S, T, D]`, where its particles ended.
        parts: their basins.
        minima: of the basins that were found. Between two of these lies one border: a basin that
            no particle ended in is left out.
    """
    if ends.shape[-1] > 1:
        return None
    place = minima[..., 0].masked_fill(parts.first < 0, math.inf)
    place, order = place.sort(dim=0)
    real = place[1:].isfinite()
    low, high = place[:-1], torch.where(real, place[1:], place[:-1])
    at = alike(chain, len(low))
    if len(low):
        middle, velocity = _maxima(at, low, high, real)
    else:
        middle, velocity = low, low.new_zeros(*low.shape, chain.point.size)
    chain.gradients += at.gradients
    last = chain.algorithm.run_length - 1
    mean = (ends - chain.shock(last))[..., 0]
    width = (chain.sigma(last) * chain.root(torch.ones_like(ends))[..., 0]).abs()
    away = (middle - mean[:, None]) / width[:, None]
    density = torch.exp(-0.5 * away**2) / (math.sqrt(2 * math.pi) * width[:, None])
    return Borders(order[:-1], order[1:], middle, velocity, density)


def _maxima(at: Chain, low: Tensor, high: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Between minima `[B, T]`, by bisection to rounding, and their movement `[B, T, n]`."""
    steepest = torch.zeros_like(low)
    for _ in range(2 - int(math.log2(torch.finfo(low.dtype).eps))):
        middle = 0.5 * (low + high)
        slope = at.slope(middle[..., None], curved=False).value[..., 0]
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
        steepest = torch.maximum(steepest, slope.abs())
    middle = 0.5 * (low + high)
    found = at.slope(middle[..., None])
    bend, by_x = found.pull(torch.ones_like(middle)[..., None])
    smooth = (bend[..., 0] < 0) & (found.value[..., 0].abs() <= _KINK * steepest)
    velocity = torch.where(smooth[..., None], -by_x / bend, math.nan)
    return middle, velocity.masked_fill(~real[..., None], 0.0)
