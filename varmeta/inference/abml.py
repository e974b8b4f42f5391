"""Amortised Bayesian meta-learning: a diagonal Gaussian q_i by a few steps from the prior.

(Ravi & Beatson, 2019, Amortized Bayesian Meta-Learning.) From q = N(θ0, diag(σ0²)), the prior
itself, K gradient steps on KL[q ‖ N(θ0, Σ)] + E_q f_i lead to q_i, f_i the loss of the support
rows. θ0, the scales and φ minimise Σ_i KL[q_i ‖ N(θ0, Σ)] + E_{q_i}[f_i + g_i], the same bound with
all rows of the task, through the steps. Within one adaptation E_q is an average over the same
standardised draws in every step; the outer bound has draws of its own, so that a q_i that fitted
its draws gains nothing. Where the paper steps in θ and log σ, here the mean moves in units of the
prior's standard deviations, (m−θ0)/σ0, and the spread as log(s/σ0), and both follow the natural
gradient: s² times the mean's, a half of log s's (Khan & Rue, 2023, The Bayesian Learning Rule), so
that a step follows the curvature of the bound, as s² falls to its inverse, and its size is a pure
number whatever the data, the link and the number of rows. A step of more than one prior sd, or one
unit of log s, is shortened to that (`FirstOrder.clip`): q starts as wide as the prior, where an
exponential link averages e^30. The steps' draws have a mean square of exactly 1 in each coordinate.
`natural=False` steps along the plain gradient by the mean over rows, as in the paper. The
hyperprior is that of every strategy here; theirs is normal on the mean, gamma on the precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from varmeta.checked import Within
from varmeta.inference.base import Batch, State
from varmeta.inference.energy import FunctionEnergy
from varmeta.inference.families import GaussianQ
from varmeta.inference.free_energy import free_energy
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import FirstOrder, GradientDescent
from varmeta.inference.prox import ProxInfo, Unrolled, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.models.programs import Linearised
from varmeta.posterior import Gaussian, TaskPosterior
from varmeta.tasks import Tasks, TaskSource


def _steps() -> FirstOrder:
    return GradientDescent(step_size=0.25, max_iterations=15, tolerance=0)


@dataclass(frozen=True, eq=False)
class _Natural(FunctionEnergy):
    """A function of (mean, log sd) of Gaussians in units given, its gradient the natural one."""

    def gradient(self, theta: Tensor) -> Tensor:
        """∇E through the inverse Fisher matrix of N(mean, sd²): sd² for the mean, ½ for log sd."""
        return _inverse_fisher(theta) * super().gradient(theta)

    def linearise(self, theta: Tensor, *, gauss_newton: bool = False) -> Linearised:
        """See `Energy`; the gradient is the natural one."""
        at = super().linearise(theta, gauss_newton=gauss_newton)
        return replace(at, grad=_inverse_fisher(theta) * at.grad)


def _standardised(noise: Tensor) -> Tensor:
    """Draws `[S, T, D]` with a mean square of exactly 1 in each task and coordinate.

    That of 4 pairs is below an eighth in one of 40 coordinates; a spread fitted to such draws is
    three times too wide, and the steps by it are too long to come to rest.
    """
    return noise / noise.square().mean(0).sqrt()


def _inverse_fisher(theta: Tensor) -> Tensor:
    log_sd = theta[..., theta.shape[-1] // 2 :]
    return torch.cat([(2 * log_sd).exp(), torch.full_like(log_sd, 0.5)], -1)


@dataclass(frozen=True, kw_only=True)
class ABML(MetaGradient):
    """Amortised Bayesian meta-learning: q_i by a few unrolled steps on the bound, from the prior.

    Tasks with a query part are adapted to their support rows; without one all rows are in both
    places (nothing is cross-validated: the bound itself holds the scales in check).

    Attributes:
        minimiser: the steps, on the mean in units of the prior's standard deviations and on the
            log of the spread in these units. Along the natural gradient a step size of 1 is
            Newton's in one coordinate, and one below 2/D is stable in D of them, however
            correlated; in wide networks `natural=False` with `Adam` may hold better.
        samples: draws of θ for E_q, in the steps and again outside; antithetic pairs, so an even
            number.
        natural: step along the natural gradient; else along the plain one.

    The other attributes are those of `MetaGradient`.

    Raises:
        ValueError: an odd or non-positive number of samples.
    """

    minimiser: FirstOrder = field(default_factory=_steps)
    samples: Annotated[int, Within(2)] = 8
    natural: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples % 2:
            raise ValueError(
                f"samples must be an even number (antithetic pairs), got {self.samples}"
            )

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks | TaskSource:
        """The tasks as they are."""
        return tasks

    def adapted(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, ProxInfo]:
        """Mean and sd of q_i, `[T, D]` each, differentiable in the prior and φ; and how it went.

        Args:
            density: the model.
            prior: N(θ0, Σ), where q starts (with the diagonal of a low-rank Σ).
            shared: φ `[P]`.
            tasks: T tasks; all of their rows count.
            noise: `[S, T, D]`, the standardised points at which f is averaged in every step.
        """

        def moments(moved: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_sd = moved.split(prior.dim, -1)
            return prior.loc + prior.scale * mean, prior.scale * log_sd.exp()

        def inner(moved: Tensor) -> Tensor:
            return free_energy(density, prior, shared, tasks, GaussianQ(*moments(moved)), noise)

        start = prior.loc.new_zeros(len(tasks), 2 * prior.dim)
        unit = torch.ones_like(start[0])  # (mean, log sd) is in units of the prior's sd
        if self.natural:
            energy: FunctionEnergy = _Natural(inner, unit=unit)
        else:
            rows = tasks.num_rows.clamp(min=1).to(start)
            energy = FunctionEnergy(inner, rows, unit)
        moved, info = prox(energy, start, minimiser=self.minimiser, adjoint=Unrolled())
        info.gradients *= len(noise)
        return *moments(moved), info

    def bounds(
        self,
        density: Density,
        prior: GaussianPrior,
        shared: Tensor,
        tasks: Tasks,
        noise: Tensor,
        fresh: Tensor,
    ) -> tuple[Tensor, ProxInfo]:
        """KL[q_i ‖ N(θ0, Σ)] + E_{q_i}[f_i + g_i], nats: `[T]`, differentiable; and how it went.

        `noise` and `fresh`, `[S, T, D]`, are the points of the steps and those of this bound.
        """
        mean, sd, info = self.adapted(density, prior, shared, tasks.support, noise)
        info.gradients += len(fresh)
        q = GaussianQ(mean, sd)
        return free_energy(density, prior, shared, tasks.unsplit, q, fresh), info

    def task_losses(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, ProxInfo]:
        """See `bounds`."""
        prior, shared = state.meta.prior, state.meta.shared
        noise, fresh = (self._noise(prior, batch.tasks, generator) for _ in range(2))
        return self.bounds(density, prior, shared, batch.tasks, _standardised(noise), fresh)

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """q_i by the same steps as in training, on all rows."""
        prior, shared = state.meta.fixed()
        with torch.no_grad():
            noise = _standardised(self._noise(prior, tasks, generator))
            mean, sd, info = self.adapted(density, prior, shared, tasks, noise)
        return Gaussian(density, tasks.names, shared, mean, sd, stats=info.stats())

    def _noise(self, prior: GaussianPrior, tasks: Tasks, generator: torch.Generator) -> Tensor:
        """Standard normals `[S, T, D]` in antithetic pairs."""
        like: Any = {"generator": generator, "dtype": prior.loc.dtype, "device": prior.loc.device}
        half = torch.randn(self.samples // 2, len(tasks), prior.dim, **like)
        return torch.cat([half, -half])

    def _part_size(self, density: Density, state: State, batch: Batch) -> int | None:
        """Every step keeps the activations of every draw."""
        size = super()._part_size(density, state, batch)
        if size is None or self.memory is None:
            return size
        return max(size // (self.samples * self.minimiser.max_iterations), 1)
