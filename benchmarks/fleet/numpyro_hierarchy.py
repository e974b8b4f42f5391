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
class Point:
    """Values of what is learned across tasks, on the unconstrained scale."""

    loc: Any
    log_scale: Any
    shared: Any


@dataclass(frozen=True)
class Expansion:
    """A likelihood of every θ_i taken for exp(linear · θ − ½ θᵀ precision θ), up to a factor."""

    linear: Any
    precision: Any


@dataclass(frozen=True)
class Target:
    """What is to be known of a case: its support rows, its coordinates, its beliefs."""

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

    def rows(self, theta: Any, shared: Any, x: Any, y: Any) -> Any:
        """log p(y_n | θ, φ) of one task, nats, `[N]`."""
        values = _values(theta, self.adapted) | _values(shared, self.shared)
        with handlers.block():
            model = handlers.substitute(self.case.model, data=values)
            trace = handlers.trace(model).get_trace(x, y, ppl=NUMPYRO)
        (seen,) = [s for s in trace.values() if s["type"] == "sample" and s["is_observed"]]
        return jnp.broadcast_to(seen["fn"].log_prob(y), y.shape)

    def log_likelihood(self, theta: Any, shared: Any, x: Any, y: Any, mask: Any) -> Any:
        """`[T]` nats."""
        each = jax.vmap(self.rows, (0, None, 0, 0))(theta, shared, x, y)
        return jnp.where(mask, each, 0.0).sum(-1)

    def log_belief(self, at: Point) -> Any:
        """The hyperprior as a density of the unconstrained values, nats."""
        total = dist.Normal(self.loc, self.width).log_prob(at.loc).sum()
        scales = dist.HalfNormal(self.scale_width).log_prob(jnp.exp(at.log_scale))
        total += (scales + at.log_scale).sum()
        values = _values(at.shared, self.shared)
        for (name, _, law), flat in zip(self.shared, at.shared, strict=True):
            onto = biject_to(law.support)
            total += law.log_prob(values[name]) + onto.log_abs_det_jacobian(flat, values[name])
        return total

    def model(self, expansion: Expansion) -> None:
        """The hierarchy, with θ_i written as what it would be if the expansion held.

        Given θ0, Σ and φ that is N(mean_i, (precision_i + Λ)⁻¹), and θ_i = mean_i + L⁻ᵀ w_i. The
        factor takes the density of w_i away and puts the hierarchy's in its place, so that the law
        of θ_i is exact whatever the expansion; a good one leaves w_i near N(0, I).
        """
        loc = numpyro.sample("loc", dist.Normal(self.loc, self.width).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(self.scale_width).to_event(1))
        parts = [jnp.zeros(0)]
        for name, _, law in self.shared:
            value = numpyro.sample(f"shared_{name}", law)
            parts.append(jnp.ravel(biject_to(law.support).inv(value)))
        shared = numpyro.deterministic("shared", jnp.concatenate(parts))
        sd = scale[self.groups]
        precision = expansion.precision + jnp.diag(sd**-2)
        root = jnp.linalg.cholesky(precision)
        mean = jnp.linalg.solve(precision, (expansion.linear + loc / sd**2)[..., None])[..., 0]
        with numpyro.plate("tasks", len(self.x)):
            w = numpyro.sample("w", dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1))
        away = jax.scipy.linalg.solve_triangular(jnp.swapaxes(root, -1, -2), w[..., None])[..., 0]
        theta = numpyro.deterministic("theta", mean + away)
        drawn = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
        drawn += jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
        wanted = dist.Normal(loc, sd).log_prob(theta).sum(-1)
        wanted += self.log_likelihood(theta, shared, self.x, self.y, self.mask)
        numpyro.factor("exact", (wanted - drawn).sum())


def _values(flat: Any, sites: Any) -> dict[str, Any]:
    out, start = {}, 0
    for name, shape, law in sites:
        size = int(np.prod(shape))
        out[name] = biject_to(law.support)(flat[start : start + size].reshape(shape))
        start += size
    return out


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

    @property
    def good(self) -> bool:
        return self.rhat < 1.01 and self.ess > 400


def nuts(
    target: Target,
    expansion: Expansion,
    middle: Point,
    spread: Point,
    *,
    warmup: int = 1000,
    draws: int = 1000,
    chains: int = 4,
    seed: int = 0,
) -> Posterior:
    """NumPyro's NUTS from chains that start at N(middle, spread²).

    The globals share a dense mass matrix.
    """
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
    keys = jax.random.split(jax.random.PRNGKey(seed), 5)

    def around(key: Any, centre: Any, sd: Any) -> Any:
        return centre + sd * jax.random.normal(key, (chains, *jnp.shape(centre)))

    shared = around(keys[2], middle.shared, spread.shared)
    start = {
        "loc": around(keys[0], middle.loc, spread.loc),
        "scale": around(keys[1], middle.log_scale, spread.log_scale),
        "w": around(keys[3], jnp.zeros((len(target.x), len(target.loc))), 0.5),
    }
    start |= {f"shared_{name}": shared[:, k] for k, (name, _, _) in enumerate(target.shared)}
    mcmc.run(keys[4], expansion, init_params=start, extra_fields=("diverging",))
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
    return Posterior(out, max(rhats), min(sizes), divergent)
