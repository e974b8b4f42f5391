"""Basins: the minima that a random algorithm finds, how often, and how that hangs on θ0.

Each particle is run down from its end to the minimum of E_i in whose basin it lies, and ends that
coincide are one basin. With p_k the share of the particles in basin k, a region that is held still
while θ0 moves has dp_k = E[(1_k − p_k) W], where W are the weights of `BismutElworthyLi` over the
whole run: the indicator of a region has no derivative that could be followed along the path. A
basin's borders move as well, and what they carry across is added where θ has one coordinate
(`borders.py`). Where it has more it is left out, and results say so: their borders are "fixed".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.inference.borders import FIXED, MOVING, find_borders
from varmeta.inference.chain import Chain
from varmeta.inference.descent import RandomDescent
from varmeta.inference.estimators import BismutElworthyLi, others_mean, standard_error
from varmeta.inference.minimise import Minimiser
from varmeta.inference.partition import RADIUS, descend, partition, require_adaptation
from varmeta.inference.point import Point
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

if TYPE_CHECKING:  # imported where it is used, so that `import varmeta` does not wait for it
    import xarray as xr

SHOWN_DIM = 4  # coordinates that a table has columns for
_ROWS = 40  # of a table that is printed


@dataclass(frozen=True, eq=False)
class Basins:
    """The minima that particles ended above. Nats, θ unconstrained; see `find_basins`.

    K is the largest number of basins of a task; where a task has fewer its other entries are NaN.
    A task's basins are ranked by energy, the lowest first.

    Attributes:
        density: the model.
        point: θ0, scales and φ.
        tasks: T tasks.
        ends: `[S, T, D]`, where the particles ended.
        labels: `[S, T]` int, the basin that each lies in.
        converged: `[S, T]` bool, its descent reached the minimiser's tolerance.
        saddle: `[S, T]` bool, its descent ended where the curvature is negative somewhere.
        minima: `[K, T, D]`.
        occupation: `[K, T]`, p_k, the share of the particles.
        occupation_se: its standard error.
        energy: `[K, T]`, E at the minimum.
        support_loss: `[K, T]`, f there.
        query_loss: `[K, T]`, g there; f where the tasks are not split.
        query_loss_mean: `[K, T]`, mean g of the basin's particles where they ended.
        slope: `[K, T, n]`, dp_k/dx in units of the prior (`Point`), with what `borders` says; None
            if some step of the algorithm injects no noise.
        slope_se: its standard error.
        borders: `"moving"`: `slope` is the derivative of the occupation; NaN next to a border at a
            kink of E, whose movement is not known. `"fixed"`, where θ has more than one coordinate:
            `slope` is the derivative of the probability of the region that is the basin at this
            point, and what its moving border carries across is left out (in one dimension 1% to
            33% of the slope, over 20 settings).
        gradients: gradient evaluations of each task's loss.
    """

    density: Density
    point: Point
    tasks: Tasks
    ends: Tensor
    labels: Tensor
    converged: Tensor
    saddle: Tensor
    minima: Tensor
    occupation: Tensor
    occupation_se: Tensor
    energy: Tensor
    support_loss: Tensor
    query_loss: Tensor
    query_loss_mean: Tensor
    slope: Tensor | None
    slope_se: Tensor | None
    borders: str
    gradients: int

    @property
    def count(self) -> Tensor:
        """`[T]`, basins found of each task."""
        return self.occupation.isfinite().sum(0)

    @property
    def sensitivity(self) -> dict[str, Tensor] | None:
        """`slope` by `loc` `[K, T, D]`, `log_scale`, `shared`, per unit of each; None likewise."""
        return None if self.slope is None else self.point.natural(self.slope)

    @property
    def sensitivity_se(self) -> dict[str, Tensor] | None:
        """Standard errors of `sensitivity`."""
        return None if self.slope_se is None else self.point.natural(self.slope_se)

    @property
    def table(self) -> pd.DataFrame:
        """One row per task and basin.

        Columns `task`, `basin`, `occupation`, `occupation_se`, `energy`, `support_loss`,
        `query_loss`, `query_loss_mean`; up to 4 coordinates each one's place under its name, and
        `d occupation / d θ0` by coordinate as `slope[name]`, `slope_se[name]`, per unit of it; for
        more the norm of that derivative in units of the prior, `slope`, `slope_se`. Norms of noise
        are not 0: compare a norm with its standard error. `borders` says whether the basins'
        borders move in it or are held fixed.
        """
        t, k = self.occupation.T.isfinite().cpu().numpy().nonzero()

        def column(values: Tensor) -> np.ndarray:
            return values.double().cpu().numpy()[k, t]

        columns: dict[str, object] = {"task": np.array(self.tasks.names)[t], "basin": k}
        for name in _NUMBERS:
            columns[name] = column(getattr(self, name))
        names = coordinate_names(self.density)
        small = len(names) <= SHOWN_DIM
        for d, name in enumerate(names if small else ()):
            columns[name] = column(self.minima[..., d])
        if self.slope is not None:
            columns["borders"] = self.borders
        natural, errors = self.sensitivity, self.sensitivity_se
        if natural is not None and errors is not None and small:
            for d, name in enumerate(names):
                columns[f"slope[{name}]"] = column(natural["loc"][..., d])
                columns[f"slope_se[{name}]"] = column(errors["loc"][..., d])
        elif self.slope is not None and self.slope_se is not None:
            size, error = norm_and_error(self.point, self.slope, self.slope_se)
            columns["slope"], columns["slope_se"] = column(size), column(error)
        return pd.DataFrame(columns)

    def to_dataset(self) -> xr.Dataset:
        """The same numbers with named dimensions: `basin`, `task`, `coordinate`, `particle`."""
        import xarray as xr

        def numbers(values: Tensor) -> np.ndarray:
            return values.cpu().numpy()

        both = ("basin", "task")
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            name: (both, numbers(getattr(self, name))) for name in _NUMBERS
        }
        variables["minimum"] = ((*both, "coordinate"), numbers(self.minima))
        if self.sensitivity is not None and self.sensitivity_se is not None:
            for name, part in (("slope", self.sensitivity), ("slope_se", self.sensitivity_se)):
                variables[name] = ((*both, "coordinate"), numbers(part["loc"]))
        attributes = {} if self.slope is None else {"borders": self.borders}
        for name in ("labels", "converged", "saddle"):
            variables[name] = (("particle", "task"), numbers(getattr(self, name)))
        coords = {
            "task": np.array(self.tasks.names),
            "coordinate": np.array(coordinate_names(self.density)),
        }
        return xr.Dataset(variables, coords, attributes)

    def __repr__(self) -> str:
        few, many = int(self.count.min()), int(self.count.max())
        head = f"Basins({len(self.tasks)} × {self.tasks.task_name!r}, {len(self.labels)} particles"
        found = f"{few} basins each" if few == many else f"{few} to {many} basins each"
        slopes = f", slopes at {self.borders} borders"
        if self.slope is None:
            slopes = ", no slopes: the algorithm injects no noise"
        return f"{head}, {found}{slopes})"

    def __str__(self) -> str:
        table = self.table.to_string(
            index=False, float_format="{:.4g}".format, max_rows=_ROWS, line_width=200
        )
        return f"{self!r}\n{table}"


_NUMBERS = (
    "occupation",
    "occupation_se",
    "energy",
    "support_loss",
    "query_loss",
    "query_loss_mean",
)


def find_basins(
    density: Density,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    algorithm: RandomDescent,
    shared: Tensor | None = None,
    particles: int = 1000,
    minimiser: Minimiser | None = None,
    radius: float = RADIUS,
    seed: int = 0,
) -> Basins:
    """Where a random algorithm's particles end: which minima, how often, at what losses.

    And how the share of each follows θ0: exactly so where θ has one coordinate, else with the
    basins' borders held fixed (`Basins.borders`).

    Args:
        density: the model.
        prior: the anchor N(θ0, Σ).
        tasks: f_i is of the support rows, g_i of the query rows; both of all rows where the tasks
            are not split.
        algorithm: the random algorithm; without injected noise there are no slopes.
        shared: φ `[P]`; where it starts if None.
        particles: S, runs for each task. `[S, T, n]` numbers are kept, n the learned values.
        minimiser: of the descents; None for `GradientFlow` in units of the prior's scales, which
            stays in the basin where it starts. A line search may leave it: of points all over a
            one-dimensional task with waves, `NewtonCG` and `LBFGS` took 13 to 47% elsewhere.
        radius: minima closer than this, in prior standard deviations, are one (single linkage).
        seed: of the runs.

    Raises:
        ValueError: fewer than 2 particles; a radius that is not positive; a prior of no width.
        NonFiniteLoss: particles of a task went off to infinity.

    Warns:
        RuntimeWarning: descents that did not converge, or that ended at a saddle, with their
            number; they are counted where they ended.

    Example:
        >>> import pyro, pyro.distributions as dist, varmeta as vm
        >>> def wells(x, y=None):  # two minima, at θ = ±√y
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal(theta**2, 0.5), obs=y)
        >>> tasks = vm.Tasks.from_list([(torch.zeros(1, 1), torch.tensor([1.0]))])
        >>> algorithm = vm.Langevin(run_length=50, step_size=0.03)
        >>> prior = GaussianPrior.create(torch.tensor([0.3]), 1.0)
        >>> found = find_basins(vm.Density(wells, tasks), prior, tasks, algorithm=algorithm)
        >>> found
        Basins(1 × 'task', 1000 particles, 2 basins each, slopes at moving borders)
        >>> found.table["theta"].round(2).tolist()
        [0.96, -0.91]
    """
    if particles < 2:
        raise ValueError(f"particles must be at least 2, got {particles}")
    require_adaptation(prior)
    shared = density.shared_init if shared is None else shared
    point = Point.of(density, prior, shared)
    chain = Chain(algorithm, density, point, tasks.support, particles, seed)
    weights = None
    if algorithm.always_noisy:
        ends, weights, _ = BismutElworthyLi().weights(chain)
    else:
        ends = chain.run()
    descent = descend(chain, ends, minimiser)
    parts = partition(chain, descent, radius)
    place = parts.gather(descent.theta)
    with torch.no_grad():
        support = density.negative_log_likelihood(place, tasks.support, shared)
        query = density.negative_log_likelihood(place, tasks.query, shared)
        losses = density.negative_log_likelihood(ends, tasks.query, shared)
    chain.gradients += 1
    shape = (len(place), *losses.shape[1:])
    share, error, mean = (losses.new_full(shape, float("nan")) for _ in range(3))
    slope = slope_error = borders = None
    if weights is not None:
        borders = find_borders(chain, ends, parts, place)
        slope, slope_error = (weights.new_zeros(*shape, point.size) for _ in range(2))
    for k in range(len(place)):
        inside = (parts.labels == k).to(losses)
        share[k], error[k] = inside.mean(0), standard_error(inside)
        mean[k] = (inside * losses).sum(0) / inside.sum(0)
        if weights is not None and slope is not None and slope_error is not None:
            each = (inside - others_mean(inside))[..., None] * weights
            if borders is not None:
                each = each + borders.carried(torch.eye(len(place)).to(inside)[k])
            slope[k], slope_error[k] = each.mean(0), standard_error(each)
    none = parts.first < 0

    def where(values: Tensor) -> Tensor:
        return values.masked_fill(none.reshape(*none.shape, *[1] * (values.dim() - 2)), math.nan)

    return Basins(
        density,
        point,
        tasks,
        ends,
        parts.labels,
        descent.converged,
        descent.saddle,
        where(place),
        where(share),
        where(error),
        where(parts.gather(descent.energy)),
        where(support),
        where(query),
        where(mean),
        None if slope is None else where(slope),
        None if slope_error is None else where(slope_error),
        FIXED if borders is None else MOVING,
        chain.gradients,
    )


def coordinate_names(density: Density) -> list[str]:
    """Of θ: a site's name, with the position in its flat unconstrained value if it has several."""
    return [
        site.name if site.size == 1 else f"{site.name}[{k}]"
        for site in density.sites
        for k in range(site.size)
    ]


def norm_and_error(point: Point, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """‖·‖ of the part in θ0 of `[..., n]`, in units of the prior, `[...]`; its standard error.

    To first order, the coordinates taken as independent.
    """
    part, spread = point.split(x)["loc"], point.split(error)["loc"]
    size = part.norm(dim=-1)
    return size, (part * spread).norm(dim=-1) / size.clamp(min=torch.finfo(size.dtype).tiny)
