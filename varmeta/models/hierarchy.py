"""The hierarchy as one ordinary Pyro model, so that Pyro's own inference runs on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.models.sites import Site
from varmeta.tasks import Tasks


def hierarchy(
    density: Density,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    centred: bool = False,
    likelihood: bool = True,
) -> Callable[[], Tensor]:
    """θ0, scales and φ from their hyperpriors, θ_i ~ N(θ0, Σ) in a plate, y_i ~ the user's model.

    Sites: `loc` `[D]`; `scale` `[M]`; `shared_<name>` for each shared latent, with the user's own
    prior, given other shared latents where it depends on these; `theta` `[T, D]`, a deterministic
    function of `z ~ N(0, I)` unless `centred`. Returned is θ. The model takes no arguments:
    `pyro.infer.NUTS(hierarchy(density, prior, tasks))`. In an outer plate at `dim=-2` (Pyro's
    vectorised particles) the sites outside the plate of tasks get leading dimensions `[S, 1]`,
    those inside `[S, T]`. Without `likelihood` the data are left out.

    Raises:
        ValueError: no hyperprior, or one that is flat in the scales (which have no Bayesian answer
            then); a low-rank prior; bounds, which only `fit`'s own steps keep; or a model with
            params, which have no prior of their own.
    """
    belief = prior.hyperprior
    if belief is None:
        raise ValueError(
            "prior has no hyperprior; build it with GaussianPrior.from_density(hyperprior=True)"
        )
    if prior.factor is not None:
        raise ValueError("hierarchy takes a diagonal prior; build it with rank=0")
    if belief.scale_law == "flat":
        raise ValueError("hyperprior is flat in the scales; build the prior with another scale_law")
    if prior.bounds is not None:
        raise ValueError("hierarchy knows no bounds of the scales; build the prior without bounds")
    params = [site.name for site in density.shared_sites if site.prior is None]
    if params:
        raise ValueError(
            f"{params[0]!r} is a param and has no prior; make it a pyro.sample site to be able to "
            "draw from its posterior"
        )

    def model() -> Tensor:
        loc = pyro.sample("loc", dist.Normal(belief.loc, belief.width).to_event(1))
        scale = pyro.sample("scale", belief.scales().to_event(1))
        parts = list[Tensor]()
        for site in density.shared_sites:
            law = _law(density, site, parts)
            value = pyro.sample(f"shared_{site.name}", law.to_event(len(law.batch_shape)))
            parts.append(site.unconstrain(value))
        sd = scale[..., prior.groups]
        with pyro.plate("tasks", len(tasks), dim=-1):
            if centred:
                theta = pyro.sample("theta", dist.Normal(loc, sd).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0).to_event(1))
                theta = pyro.deterministic("theta", loc + sd * z, event_dim=1)
            if likelihood:
                pyro.factor("likelihood", _likelihood(density, theta, tasks, parts))
        return theta

    return model


def _law(density: Density, site: Site, before: list[Tensor]) -> Any:
    """The prior of a shared latent, given the values of those before it in the model."""
    if not site.depends:
        return site.prior
    known = torch.cat(before, -1)
    if known.dim() > 1:
        raise ValueError(
            f"the prior of {site.name!r} depends on another shared latent, and is made for one "
            "draw at a time: leave out the outer plate (vectorize_particles, vectorise)"
        )
    rest = density.shared_init[known.shape[-1] :]
    return density.shared_laws(torch.cat([known, rest]))[site.name]


def _likelihood(density: Density, theta: Tensor, tasks: Tasks, parts: list[Tensor]) -> Tensor:
    """log p(y_i | θ_i, φ), nats, `[..., T]`, where any of θ `[T, D]` and φ may have particles."""
    draws = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    none = theta.new_zeros(*draws, 0)
    shared = torch.cat([none, *(part.expand(*draws, -1) for part in parts)], dim=-1)
    if draws:
        lead = torch.broadcast_shapes(draws, theta.shape[:-1])
        theta, shared = theta.expand(*lead, -1), shared.expand(*lead, -1)
    return density.log_likelihood(theta, tasks, shared).sum(-1)
