"""Evolution strategies: the gradient from runs at perturbed θ0, scales and φ alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varmeta.checked import Count, Positive
from varmeta.inference.chain import Chain, Loss
from varmeta.inference.descent import RandomDescent
from varmeta.inference.estimators import Estimate, Estimator


@dataclass(frozen=True)
class EvolutionStrategies(Estimator):
    """Antithetic evolution strategies with common random numbers: ε (L⁺ − L⁻)/(2s).

    Each pair of particles runs with the same noise, rows and start from x + sε and x − sε. Nothing
    is differentiated, and the algorithm may be as random or as rough as it likes. The estimate is
    that of the loss smoothed by N(0, s²) in x, whose gradient differs by O(s²); its variance grows
    with the number of learned values (Nesterov & Spokoiny 2017; Salimans et al. 2017).

    Cost: a gradient evaluation a step and particle.

    Attributes:
        width: s, in units of the prior: θ0 moves by s prior standard deviations.
    """

    width: Positive = 0.1

    unbiased: ClassVar[bool] = False

    @property
    def parts(self) -> int:
        """Windows of a run with a perturbation of their own."""
        return 1

    def check(self, algorithm: RandomDescent, particles: int, antithetic: bool) -> None:
        """Raise a ValueError for particles that are not pairs."""
        if particles % 2 or antithetic:
            raise ValueError(
                f"{self.name} runs pairs of particles with the same noise: particles must be even, "
                f"got {particles}, and antithetic False, got {antithetic}"
            )

    def estimate(self, chain: Chain, loss: Loss) -> Estimate:
        """See `Estimator.estimate`."""
        half, length = chain.particles // 2, chain.algorithm.run_length
        pair = Chain(chain.algorithm, chain.density, chain.point, chain.tasks, half, chain.seed)
        noise = pair.noise.other(self.parts, half, chain.point.size)
        bounds = [length * k // self.parts for k in range(self.parts + 1)]
        total = torch.zeros_like(noise[0])
        each = torch.zeros_like(total)
        states: list[tuple[Tensor, Tensor]] = []
        value = total.new_zeros(2, half, len(chain.tasks))
        for k, eps in enumerate(noise):
            total = total + eps
            moves = [self.width * eps, -self.width * eps]
            if k == 0:
                states = [(x, x) for x in (pair.start(move).detach() for move in moves)]
            for t in range(bounds[k], bounds[k + 1]):
                states = [
                    pair.step(t, *state, move) for state, move in zip(states, moves, strict=True)
                ]
            with torch.no_grad():
                now = torch.stack([loss(x, chain.shared) for x, _ in states])
            gain = now - value  # each window answers for what it adds to the loss
            each = each + ((gain[0] - gain[1]) / (2 * self.width))[..., None] * total
            value = now
        ends = torch.cat([x for x, _ in states])
        chain.gradients += pair.gradients + chain.particles * self.parts
        losses, _, direct = chain.outside(loss, ends)
        return Estimate(losses, each.repeat(2, 1, 1) + direct, ends, pairs=True)


@dataclass(frozen=True)
class PersistentES(EvolutionStrategies):
    """Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021, ICML, algorithm 2).

    A run is cut into windows with a perturbation each; what a window adds to the loss is weighted
    by the sum of the perturbations so far. So the estimate stays unbiased (of the smoothed loss)
    over windows, an early gain is not charged for later perturbations, and the smoothing at any
    time is that of one window.

    Attributes:
        windows: how many.
    """

    windows: Count = 5

    @property
    def parts(self) -> int:
        """`windows`."""
        return self.windows

    def check(self, algorithm: RandomDescent, particles: int, antithetic: bool) -> None:
        """Raise a ValueError too for more windows than steps."""
        super().check(algorithm, particles, antithetic)
        if self.windows > algorithm.run_length:
            raise ValueError(
                f"windows is {self.windows}, and a run has {algorithm.run_length} steps; take fewer"
            )
