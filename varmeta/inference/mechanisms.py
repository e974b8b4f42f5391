"""Mechanisms: how much of a meta-gradient is location, and how much probability.

E g = Σ_k p_k ḡ_k over the basins in which a random algorithm ends, p_k being how often and ḡ_k the
mean loss there. θ0 moves what is found (location, Σ p_k ∂ḡ_k) and how often it is found
(probability, Σ ḡ_k ∂p_k); an implicit derivative at the minima knows of the first alone (Huszár,
inference.vc, 2019). With W the weights of `BismutElworthyLi` over the whole run, per particle

    total = (g − b) W + ∂g,    probability = (ḡ_k − b) W + (g − ḡ_k) ∂log p_k,

k its basin, b and the first ḡ_k being means over the task's other particles. The last term has mean
zero over a basin's particles: it is what the ḡ_k, which are estimates too, add to the standard
error. Location is the rest, so that the parts add up particle by particle.

W sees basins as regions that stay where they are. Their borders move with θ0 too, and carry
particles from one basin to the next. Where θ has one coordinate, what they carry is a part of ∂p_k
(`borders.py`); where it has more it is left out of the probability, and so counts as location. The
total does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.inference.at_ends import alike, implicit
from varmeta.inference.basins import SHOWN_DIM, coordinate_names, norm_and_error
from varmeta.inference.borders import FIXED, MOVING, Borders, find_borders
from varmeta.inference.chain import Chain
from varmeta.inference.descent import Langevin, RandomDescent
from varmeta.inference.estimators import BismutElworthyLi, others_mean, standard_error
from varmeta.inference.fitted import Fit
from varmeta.inference.linear import CG, LinearSolver
from varmeta.inference.minimise import Minimiser
from varmeta.inference.partition import (
    RADIUS,
    Partition,
    descend,
    partition,
    require_adaptation,
)
from varmeta.inference.point import Point
from varmeta.inference.stochastic import Stochastic
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks, TaskSource

PARTS = ("total", "location", "probability", "implicit")
_GROUPS = 20  # of particles, for the jackknife of a share
_ROWS = 40  # of a table that is printed


@dataclass(frozen=True, eq=False)
class Mechanisms:
    """The gradient of E g by its two mechanisms; see `mechanisms`.

    Each of `total`, `location`, `probability`, `implicit`, and the same with `_se`, is a dictionary
    of `loc` `[T, D]`, `log_scale` `[T, M]` and `shared` `[T, P]`, nats per unit of each. Total is
    location plus probability, exactly.

    Attributes:
        density: the model.
        point: θ0, scales and φ.
        tasks: T tasks.
        each: by part, `[S, T, n]`: each particle's contribution, in units of the prior (`Point`).
        losses: `[S, T]`, g where the particles ended, nats.
        labels: `[S, T]` int, the basins, by energy.
        borders: `"moving"`: what the basins' moving borders carry across is a part of the
            probability, which is Σ ḡ_k dp_k; both parts are NaN next to a kink of E, where the
            movement is not known. `"fixed"`, where θ has more than one coordinate: basins are the
            regions that they are at this point, and what their borders would carry is in the
            location.
        lonely: `[T]`, share of the particles that are alone in their basin. A basin of one has no
            mean of others: what such a particle says counts as location.
        gradients: gradient evaluations of each task's loss.
    """

    density: Density
    point: Point
    tasks: Tasks
    each: dict[str, Tensor]
    losses: Tensor
    labels: Tensor
    borders: str
    lonely: Tensor
    gradients: int

    @property
    def total(self) -> dict[str, Tensor]:
        """The gradient of E g."""
        return self._mean("total")

    @property
    def total_se(self) -> dict[str, Tensor]:
        """Standard error of `total`."""
        return self._error("total")

    @property
    def location(self) -> dict[str, Tensor]:
        """What is found moves."""
        return self._mean("location")

    @property
    def location_se(self) -> dict[str, Tensor]:
        """Standard error of `location`."""
        return self._error("location")

    @property
    def probability(self) -> dict[str, Tensor]:
        """What is found more often, and less."""
        return self._mean("probability")

    @property
    def probability_se(self) -> dict[str, Tensor]:
        """Standard error of `probability`."""
        return self._error("probability")

    @property
    def implicit(self) -> dict[str, Tensor]:
        """iMAML's gradient, averaged over the minima that are found."""
        return self._mean("implicit")

    @property
    def implicit_se(self) -> dict[str, Tensor]:
        """Standard error of `implicit`."""
        return self._error("implicit")

    @property
    def share(self) -> Tensor:
        """`[T]`: probability's part in θ0, ‖probability‖/(‖location‖ + ‖probability‖).

        In units of the prior. Norms have their noise taken out, ‖x‖² − Σ se² where that is
        positive; NaN where nothing is left of either.
        """
        return self._share(self.each)

    @cached_property
    def share_se(self) -> Tensor:
        """Standard error of `share` `[T]`, by a jackknife over 20 groups of particles."""
        count = len(self.losses)
        groups = torch.arange(count, device=self.losses.device) % min(_GROUPS, count // 2)
        size = int(groups.max()) + 1
        if size < 2:
            return torch.full_like(self.lonely, float("nan"))
        left = [
            self._share({name: self.each[name][groups != k] for name in PARTS[1:3]})
            for k in range(size)
        ]
        return torch.stack(left).std(0, correction=0) * (size - 1) ** 0.5

    @property
    def table(self) -> pd.DataFrame:
        """One row per task and coordinate of θ0, up to 4 of these; for more, one per task.

        Columns `task`, `coordinate`, and each part with its standard error, in nats per unit of the
        coordinate; for more coordinates each part's norm in units of the prior, which noise makes
        larger. `share` and `share_se` are the task's; `borders` says whether the basins' borders
        move in the two parts or are held fixed.
        """
        names, count = coordinate_names(self.density), len(self.tasks)
        small = len(names) <= SHOWN_DIM
        repeats = len(names) if small else 1
        columns: dict[str, object] = {"task": np.repeat(np.array(self.tasks.names), repeats)}
        if small:
            columns["coordinate"] = np.tile(names, count)
        for part in PARTS:
            if small:
                values = (getattr(self, part)["loc"], getattr(self, f"{part}_se")["loc"])
            else:
                each = self.each[part]
                values = norm_and_error(self.point, each.mean(0), standard_error(each))
            for name, value in zip((part, f"{part}_se"), values, strict=True):
                columns[name] = value.flatten().double().cpu().numpy()
        for name in ("share", "share_se"):
            columns[name] = np.repeat(getattr(self, name).double().cpu().numpy(), repeats)
        columns["borders"] = self.borders
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        share = self.share
        known = share[share.isfinite()]
        range_ = (
            f"{float(known.min()):.2f} to {float(known.max()):.2f}" if len(known) else "unknown"
        )
        alone = float(self.lonely.mean())
        return (
            f"Mechanisms({len(self.tasks)} × {self.tasks.task_name!r}, {len(self.losses)} particles"
            f", share of probability {range_} at {self.borders} borders"
            + (f", {alone:.0%} of the particles alone in their basin" if alone else "")
            + ")"
        )

    def __str__(self) -> str:
        table = self.table.to_string(
            index=False, float_format="{:.4g}".format, max_rows=_ROWS, line_width=200
        )
        return f"{self!r}\n{table}"

    # -- private ----------------------------------------------------------------------------------

    def _mean(self, part: str) -> dict[str, Tensor]:
        return self.point.natural(self.each[part].mean(0))

    def _error(self, part: str) -> dict[str, Tensor]:
        return self.point.natural(standard_error(self.each[part]))

    def _share(self, each: dict[str, Tensor]) -> Tensor:
        sizes = {}
        for part in ("location", "probability"):
            loc = self.point.split(each[part])["loc"]
            squares = loc.mean(0) ** 2 - standard_error(loc) ** 2
            sizes[part] = squares.sum(-1).clamp(min=0).sqrt()
        return sizes["probability"] / (sizes["location"] + sizes["probability"])


def mechanisms(
    fit: Fit,
    tasks: Tasks | None = None,
    *,
    algorithm: RandomDescent | None = None,
    particles: int = 1000,
    minimiser: Minimiser | None = None,
    solver: LinearSolver | None = None,
    seed: int = 0,
) -> Mechanisms:
    """How much of the gradient at a fit's θ0 is location, and how much probability, per task.

    For any strategy: what counts is the prior that it learned. With more than one coordinate the
    split holds the basins' borders fixed (`Mechanisms.borders`); the total is the same.

    Args:
        fit: whose prior and φ.
        tasks: f_i is of the support rows and g_i of the query rows, or both of all rows where they
            are not split; None for the fit's own.
        algorithm: a random algorithm with noise in every step; None for the strategy's own if it
            is `Stochastic`, else `Langevin()`.
        particles: S, runs for each task; several tensors of `[S, T, n]` are kept.
        minimiser: of the descents, see `find_basins`.
        solver: for the implicit derivative; None for `CG()`.
        seed: of the runs.

    Raises:
        ValueError: no tasks and a fit on a stream; an algorithm without noise; fewer than 4
            particles; a prior of no width (`CompletePooling`).

    Warns:
        RuntimeWarning: descents that did not converge, or ended at a saddle, with their number.

    Example:
        >>> import pyro, pyro.distributions as dist, varmeta as vm
        >>> def wells(x, y=None):  # two minima, at θ = ±√y
        ...     theta = pyro.sample("theta", dist.Normal(0.2, 1.0))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal(theta**2, 0.5), obs=y)
        >>> tasks = vm.Tasks.from_list([(torch.zeros(1, 1), torch.tensor([1.0]))])
        >>> fit = vm.fit(vm.IMAML(steps=2), vm.Density(wells, tasks), tasks)
        >>> mechanisms(fit, algorithm=vm.Langevin(20, 0.03)).table.columns[:3].tolist()
        ['task', 'coordinate', 'total']
    """
    if tasks is None:
        if isinstance(fit.tasks, TaskSource):
            raise ValueError("a stream's tasks are not kept; pass tasks")
        tasks = fit.tasks
    own = fit.strategy.algorithm if isinstance(fit.strategy, Stochastic) else Langevin()
    return mechanisms_at(
        fit.density,
        fit.prior,
        tasks,
        algorithm=algorithm or own,
        shared=fit.shared,
        particles=particles,
        minimiser=minimiser,
        solver=solver,
        seed=seed,
    )


def mechanisms_at(
    density: Density,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    algorithm: RandomDescent,
    shared: Tensor | None = None,
    particles: int = 1000,
    minimiser: Minimiser | None = None,
    solver: LinearSolver | None = None,
    radius: float = RADIUS,
    seed: int = 0,
) -> Mechanisms:
    """`mechanisms` at any prior.

    Args:
        density: the model.
        prior: the anchor N(θ0, Σ).
        tasks: see `mechanisms`.
        algorithm: with noise in every step.
        shared: φ `[P]`; where it starts if None.
        particles: S.
        minimiser: see `find_basins`.
        solver: for the implicit derivative; None for `CG()`.
        radius: see `find_basins`.
        seed: of the runs.

    Raises:
        ValueError: an algorithm without noise; fewer than 4 particles.
    """
    tasks.require_rows("tasks")
    require_adaptation(prior)
    weigher = BismutElworthyLi()
    weigher.check(algorithm, particles, False)
    if particles < 4:
        raise ValueError(f"particles must be at least 4, got {particles}")
    shared = density.shared_init if shared is None else shared
    point = Point.of(density, prior, shared)
    chain = Chain(algorithm, density, point, tasks.support, particles, seed)
    ends, weights, _ = weigher.weights(chain)

    def loss(theta: Tensor, phi: Tensor) -> Tensor:
        return density.negative_log_likelihood(theta, tasks.query, phi)

    losses, _, direct = chain.outside(loss, ends)
    descent = descend(chain, ends, minimiser)
    parts = partition(chain, descent, radius)
    place = parts.gather(descent.theta)
    at = alike(chain, len(place))
    _, moved = implicit(at, loss, place, solver or CG())
    chain.gradients += at.gradients
    baseline = others_mean(losses)
    total = (losses - baseline)[..., None] * weights + direct
    borders = find_borders(chain, ends, parts, place)
    probability, lonely = _probability(losses, baseline, weights, parts, borders)
    each = {
        "total": total,
        "location": total - probability,
        "probability": probability,
        "implicit": parts.spread(moved),
    }
    how, count = FIXED if borders is None else MOVING, chain.gradients
    return Mechanisms(density, point, tasks, each, losses, parts.labels, how, lonely, count)


def _probability(
    losses: Tensor,
    baseline: Tensor,
    weights: Tensor,
    parts: Partition,
    borders: Borders | None = None,
) -> tuple[Tensor, Tensor]:
    """Each particle's contribution `[S, T, n]`; the share of particles alone in a basin, `[T]`."""
    basins, labels = len(parts.first), parts.labels

    def sums(values: Tensor) -> Tensor:
        """`[S, T, ...]` to `[K, T, ...]`."""
        index = labels.reshape(*labels.shape, *[1] * (values.dim() - 2)).expand_as(values)
        return values.new_zeros(basins, *values.shape[1:]).scatter_add_(0, index, values)

    size, whole = sums(torch.ones_like(losses)), sums(losses)
    count = parts.spread(size)
    alone = count == 1
    others = (parts.spread(whole) - losses) / (count - 1).clamp(min=1)
    others = torch.where(alone, baseline, others)
    drift = parts.spread(sums(weights))  # count · ∂log p_k
    each = (others - baseline)[..., None] * weights
    if borders is not None:
        inside = torch.nn.functional.one_hot(labels, basins).movedim(-1, 0).to(losses)
        means = (whole[:, None] - inside * losses) / (size[:, None] - inside).clamp(min=1)
        each = each + borders.carried(torch.where(inside * size[:, None] == 1, baseline, means))
        eye = torch.eye(basins).to(losses)
        drift = drift + parts.spread(torch.stack([borders.carried(e).sum(0) for e in eye]))
    noise = (losses - parts.spread(whole) / count)[..., None] * drift / count[..., None]
    return each + noise, alone.to(losses).mean(0)
