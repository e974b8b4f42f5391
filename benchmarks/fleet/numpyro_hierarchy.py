"""The hierarchy of a case in JAX, and its posterior by NumPyro's NUTS. A tool for references only.

θ0 ~ N(prior_loc, prior_scale²), scale ~ half-normal, φ ~ the model's own prior, θ_i ~ N(θ0, Σ) on
the unconstrained scale, y_i ~ the model: what `varmeta.models.hierarchy` says, written again. From
varmeta come the rows of the split and the numbers of the site table alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import MCMC, NUTS

from benchmarks.fleet.cases import Case
from benchmarks.fleet.models import Language

NUMPYRO = Language(numpyro.sample, numpyro.plate, dist, jnp)


@dataclass(frozen=True)
class Target:
    """What is to be known of a case: its rows, its coordinates, its beliefs.

    `rows(theta, shared, x, y)` is log p(y_n | θ, φ) of one task, nats `[N]`.
    """

    case: Case
    x: Any
    y: Any
    mask: Any
    groups: Any
    loc: Any
    width: Any
    scale_width: Any
    shared_init: Any
    shared_scale: Any
    adapted: tuple[tuple[str, tuple[int, ...], Any], ...]
    shared: tuple[tuple[str, tuple[int, ...], Any], ...]

    def values(self, flat: Any, sites: Any) -> dict[str, Any]:
        out, start = {}, 0
        for name, shape, law in sites:
            size = int(np.prod(shape))
            part = flat[start : start + size].reshape(shape)
            out[name] = biject_to(law.support)(part)
            start += size
        return out

    def rows(self, theta: Any, shared: Any, x: Any, y: Any) -> Any:
        values = self.values(theta, self.adapted) | self.values(shared, self.shared)
        with handlers.block():
            model = handlers.substitute(self.case.model, data=values)
            trace = handlers.trace(model).get_trace(x, y, ppl=NUMPYRO)
        (seen,) = [s for s in trace.values() if s["type"] == "sample" and s["is_observed"]]
        return jnp.broadcast_to(seen["fn"].log_prob(y), y.shape)

    def log_likelihood(self, theta: Any, shared: Any, x: Any, y: Any, mask: Any) -> Any:
        """`[T]` nats."""
        each = jax.vmap(self.rows, (0, None, 0, 0))(theta, shared, x, y)
        return jnp.where(mask, each, 0.0).sum(-1)

    def model(self, centred: bool) -> None:
        """The hierarchy."""
        loc = numpyro.sample("loc", dist.Normal(self.loc, self.width).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(self.scale_width).to_event(1))
        parts = [jnp.zeros(0)]
        for name, _, law in self.shared:
            value = numpyro.sample(f"shared_{name}", law)
            parts.append(jnp.ravel(biject_to(law.support).inv(value)))
        shared = numpyro.deterministic("shared", jnp.concatenate(parts))
        sd = scale[self.groups]
        with numpyro.plate("tasks", len(self.x)):
            if centred:
                theta = numpyro.sample("theta", dist.Normal(loc, sd).to_event(1))
            else:
                z = numpyro.sample("z", dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1))
                theta = numpyro.deterministic("theta", loc + sd * z)
        data = self.x, self.y, self.mask
        numpyro.factor("data", self.log_likelihood(theta, shared, *data).sum())


def target(case: Case) -> Target:
    """Of the support rows of the training tasks."""
    problem = case.problem()
    density, support = problem.density, problem.train.support
    x, y, mask = (jnp.asarray(t.numpy()) for t in (support.inputs, support.targets, support.mask))
    model = handlers.seed(case.model, jax.random.PRNGKey(0))
    trace = handlers.trace(model).get_trace(x[0], y[0], ppl=NUMPYRO)
    groups = density.site_index.numpy()
    width = density.prior_scale.numpy()
    scales = [np.exp(np.log(width[groups == m]).mean()) for m in range(len(density.sites))]

    def sites(of: Any) -> Any:
        return tuple((s.name, tuple(s.shape), trace[s.name]["fn"]) for s in of)

    return Target(
        case,
        x,
        y,
        mask,
        jnp.asarray(groups),
        jnp.asarray(density.prior_loc.numpy()),
        jnp.asarray(width),
        jnp.asarray(scales),
        jnp.asarray(density.shared_init.numpy()),
        jnp.asarray(density.shared_scale.numpy()),
        sites(density.sites),
        sites(density.shared_sites),
    )


@dataclass(frozen=True)
class Posterior:
    """`draws` of loc, log_scale, shared and theta, each `[chains, S, ...]`; how good they are."""

    draws: dict[str, np.ndarray]
    rhat: float
    ess: float
    divergent: int
    centred: bool

    @property
    def good(self) -> bool:
        return self.rhat < 1.01 and self.ess > 400


def _start(target: Target, key: Any, chains: int, centred: bool) -> dict[str, Any]:
    """Near the prior's middle, every chain elsewhere; unconstrained."""
    tasks, dim = len(target.x), len(target.loc)
    keys = jax.random.split(key, 4)
    loc = target.loc + 0.2 * target.width * jax.random.normal(keys[0], (chains, dim))
    log_scale = jnp.log(0.3 * target.scale_width)
    log_scale = log_scale + 0.3 * jax.random.normal(keys[1], (chains, len(log_scale)))
    z = 0.3 * jax.random.normal(keys[2], (chains, tasks, dim))
    out = {"loc": loc, "scale": log_scale}
    if centred:
        out["theta"] = loc[:, None] + jnp.exp(log_scale)[:, None, target.groups] * z
    else:
        out["z"] = z
    away = 0.2 * jax.random.normal(keys[3], (chains, len(target.shared_init)))
    flat, start = target.shared_init + target.shared_scale * away, 0
    for name, shape, _ in target.shared:
        size = int(np.prod(shape))
        out[f"shared_{name}"] = flat[:, start : start + size].reshape(chains, *shape)
        start += size
    return out


def nuts(
    target: Target, *, warmup: int, draws: int, chains: int = 4, centred: bool, seed: int = 0
) -> Posterior:
    """NumPyro's NUTS; the globals share a dense mass matrix."""
    several = tuple(["loc", "scale"] + [f"shared_{name}" for name, _, _ in target.shared])
    kernel = NUTS(target.model, target_accept_prob=0.95, dense_mass=[several])
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    keys = jax.random.split(jax.random.PRNGKey(seed))
    start = _start(target, keys[0], chains, centred)
    mcmc.run(keys[1], centred=centred, init_params=start, extra_fields=("diverging",))
    found = mcmc.get_samples(group_by_chain=True)
    out = {
        "loc": np.asarray(found["loc"]),
        "log_scale": np.log(np.asarray(found["scale"])),
        "shared": np.asarray(found["shared"]),
        "theta": np.asarray(found["theta"]),
    }
    rhats, sizes = [], []
    for values in out.values():
        if values.size:
            rhats.append(float(np.max(numpyro.diagnostics.split_gelman_rubin(values))))
            sizes.append(float(np.min(numpyro.diagnostics.effective_sample_size(values))))
    divergent = int(np.asarray(mcmc.get_extra_fields()["diverging"]).sum())
    return Posterior(out, max(rhats), min(sizes), divergent, centred)


def long_nuts(target: Target) -> Posterior:
    """Non-centred, then centred, then the better of them with four times the draws, until good."""
    tried = []
    for centred in (False, True):
        tried.append(nuts(target, warmup=1000, draws=1000, centred=centred))
        if tried[-1].good:
            return tried[-1]
    best = max(tried, key=lambda found: found.ess)
    longer = nuts(target, warmup=2000, draws=4000, centred=best.centred, seed=1)
    return max([longer, best], key=lambda found: found.ess)
