"""The hierarchy as variational guides like to see it: real sites in the user's units, from 0.

A site's value is t(start + unit · u): t maps the real line to the site's support, start and unit
are the location and standard deviation of the prior that the user wrote, and u is the new site.
These are the coordinates in which the other strategies' optimisers step too (`Meta.raw`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import sum_rightmost
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor
from torch.distributions import biject_to, constraints

from varmeta.inference.base import Meta
from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks


def model_in_units(
    density: Density,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    centred: bool,
    point_globals: bool,
    likelihood: bool = True,
) -> Callable[[], Tensor]:
    """`hierarchy` with the sites `loc_units` `[D]`, `scale_units` `[M]`, `shared_<name>_units`.

    And, by task, `z` `[T, D]` as it is there, or `theta_units` `[T, D]` if `centred`. It returns θ.

    Args:
        density: the model.
        prior: θ0 and the scales at 0, and the units of θ.
        tasks: T tasks.
        centred: as in `hierarchy`.
        point_globals: leave the Jacobian out of the density of θ0, scales and φ, so that its mode
            is that of their density on their own scale. That of θ always has it.
        likelihood: as in `hierarchy`.
    """
    unit, log_scale = prior.scale.detach(), prior.log_scale
    config: dict[str, Reparam] = {
        "loc": _Units(prior.loc, unit, point_globals),
        "scale": _Units(log_scale, torch.ones_like(log_scale), point_globals),
    }
    for site in density.shared_sites:
        start, width = (t.reshape(site.unconstrained_shape) for t in (site.loc, site.scale))
        config[f"shared_{site.name}"] = _Units(start, width, point_globals)
    if centred:
        config["theta"] = _Units(prior.loc, unit, False)
    plain = hierarchy(density, prior, tasks, centred=centred, likelihood=likelihood)
    model: Callable[[], Tensor] = poutine.reparam(plain, config=config)
    return model


def global_sites(meta: Meta) -> dict[str, Tensor]:
    """The model's sites of θ0, scales and φ with their values, in the order of `meta.raw`."""
    raw, sites = meta.raw, meta.density.shared_sites
    parts = raw["shared"].split([site.size for site in sites]) if sites else ()
    values = {"loc_units": raw["loc"], "scale_units": raw["log_scale"]}
    for site, part in zip(sites, parts, strict=True):
        values[f"shared_{site.name}_units"] = part.reshape(site.unconstrained_shape)
    return {name: value.detach() for name, value in values.items()}


class _Units(Reparam):
    """One site as t(start + unit · u)."""

    def __init__(self, start: Tensor, unit: Tensor, point: bool) -> None:
        self.start, self.unit, self.point = start, unit, point

    def apply(self, msg: Any) -> Any:
        """The site becomes a function of u."""
        fn = msg["fn"]
        in_units = _InUnits(fn, self.start, self.unit, jacobian=not self.point)
        value = in_units.value(pyro.sample(f"{msg['name']}_units", in_units))
        return {
            "fn": dist.Delta(value, event_dim=fn.event_dim),
            "value": value,
            "is_observed": True,
        }


class _InUnits(TorchDistribution):
    """The law of u where t(start + unit · u) has the law `fn`; a TransformedDistribution is slow.

    Without `jacobian` the density is that of the value.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, fn: Any, start: Tensor, unit: Tensor, jacobian: bool) -> None:
        self.fn, self.start, self.unit, self.jacobian = fn, start, unit, jacobian
        self.transform = biject_to(fn.support)
        super().__init__(fn.batch_shape, start.shape)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _InUnits:
        """In a plate around the model: one u for each of its particles."""
        return _InUnits(self.fn.expand(batch_shape), self.start, self.unit, self.jacobian)

    def value(self, units: Tensor) -> Tensor:
        out: Tensor = self.transform(self.start + self.unit * units)
        return out

    def sample(self, sample_shape: Any = ()) -> Tensor:
        out: Tensor = (self.transform.inv(self.fn.sample(sample_shape)) - self.start) / self.unit
        return out

    def log_prob(self, units: Tensor) -> Tensor:
        value = self.value(units)
        total: Tensor = self.fn.log_prob(value)
        if self.jacobian:
            there = self.start + self.unit * units
            jacobian = self.transform.log_abs_det_jacobian(there, value)
            rest = len(self.event_shape) - self.transform.domain.event_dim
            total = total + sum_rightmost(jacobian, rest)
            total = total + self.unit.log().sum()
        return total
