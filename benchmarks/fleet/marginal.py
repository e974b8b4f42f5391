"""Maximum marginal likelihood of a case: θ0, scales and φ, with every θ_i integrated out.

By adaptive Gauss-Hermite quadrature (Pinheiro and Bates, 1995), which is exact where the model is
normal and linear in θ_i; and by statsmodels where that has the model. A tool for references only.
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from benchmarks.fleet.numpyro_hierarchy import Target

NODES = {1: 31, 2: 15, 3: 9, 4: 7}  # a side, by the number of coordinates
_LOWEST = 1e-4  # of a scale, in units of its prior's: taken for 0
_STEPS = jnp.array([1.0, 0.5, 0.2, 0.05, 0.01, 0.0])
_LINEAR = ("radon", "sleepstudy", "gcsemv", "mathachieve", "egsingle", "rail", "cake")


def log_marginal(target: Target, loc: Any, log_scale: Any, shared: Any, start: Any) -> Any:
    """Σ_i log ∫ N(z; 0, I) p(y_i | θ0 + σ z, φ) dz, nats, from the better of `start` (θ) and 0."""
    sd = jnp.exp(log_scale)[target.groups]
    dim = len(target.loc)
    x, w = np.polynomial.hermite.hermgauss(NODES[dim])
    nodes = jnp.asarray(list(product(x, repeat=dim)))
    log_w = jnp.asarray([np.log(c).sum() for c in product(w, repeat=dim)])

    def joint(z: Any, x: Any, y: Any, mask: Any, sd: Any, loc: Any, shared: Any) -> Any:
        rows = jnp.where(mask, target.rows(loc + sd * z, shared, x, y), 0.0).sum()
        return rows - 0.5 * (z**2).sum() - 0.5 * dim * jnp.log(2 * jnp.pi)

    fixed = jax.lax.stop_gradient((sd, loc, shared))

    def shape(z: Any, *data: Any) -> tuple[Any, Any]:
        hessian = -jax.hessian(joint)(z, *data, *fixed)
        values, vectors = jnp.linalg.eigh(jnp.nan_to_num(hessian))
        return jnp.maximum(jnp.abs(values), 0.1), vectors

    def one(first: Any, *data: Any) -> Any:
        def newton(_: int, z: Any) -> Any:
            slope = jax.grad(joint)(z, *data, *fixed)
            values, vectors = shape(z, *data)
            direction = vectors @ ((vectors.T @ slope) / values)
            trials = z + _STEPS[:, None] * direction
            height = jax.vmap(lambda t: joint(t, *data, *fixed))(trials)
            return trials[jnp.argmax(jnp.where(jnp.isfinite(height), height, -jnp.inf))]

        starts = jnp.stack([first, jnp.zeros(dim)])
        height = jax.vmap(lambda t: joint(t, *data, *fixed))(starts)
        z = starts[jnp.argmax(jnp.where(jnp.isfinite(height), height, -jnp.inf))]
        z = jax.lax.stop_gradient(jax.lax.fori_loop(0, 30, newton, z))
        values, vectors = jax.lax.stop_gradient(shape(z, *data))
        spread = jnp.sqrt(2.0) * vectors / jnp.sqrt(values)
        heights = jax.vmap(lambda node: joint(z + spread @ node, *data, sd, loc, shared))(nodes)
        volume = 0.5 * dim * jnp.log(2.0) - 0.5 * jnp.log(values).sum()
        return jax.nn.logsumexp(heights + log_w + (nodes**2).sum(-1)) + volume

    first = (start - fixed[1]) / fixed[0]
    return jax.vmap(one)(first, target.x, target.y, target.mask).sum()


def maximum_likelihood(target: Target, means: dict[str, np.ndarray]) -> dict[str, Any]:
    """The maximum, sought from the posterior means `loc`, `log_scale`, `shared`, `theta`."""
    dim, modules = len(target.loc), len(target.scale_width)
    unit = jnp.concatenate([target.width, jnp.ones(modules), target.shared_scale])
    origin = jnp.concatenate([means["loc"], means["log_scale"], means["shared"]])
    theta = jnp.asarray(means["theta"])

    @jax.jit
    def loss(u: Any) -> Any:
        point = origin + unit * u
        parts = jnp.split(point, [dim, dim + modules])
        return -log_marginal(target, *parts, theta)

    both = jax.jit(jax.value_and_grad(loss))
    low = np.log(_LOWEST * target.scale_width) - means["log_scale"]
    bounds = [(None, None)] * dim + [(float(b), None) for b in low]
    bounds += [(None, None)] * len(target.shared_scale)
    found = None
    point = np.zeros(len(unit))
    for _ in range(3):  # a fresh memory, since nodes have moved
        found = minimize(
            lambda u: tuple(np.asarray(v, dtype=float) for v in both(u)),
            point,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 500, "ftol": 1e-13, "gtol": 1e-6},
        )
        point = found.x
    parts = np.split(np.asarray(origin + unit * point), [dim, dim + modules])
    scale = np.exp(parts[1])
    scale[scale < 10 * _LOWEST * np.asarray(target.scale_width)] = 0.0
    return {
        "how": f"adaptive Gauss-Hermite quadrature, {NODES[dim]} nodes a coordinate",
        "loc": parts[0].tolist(),
        "scale": scale.tolist(),
        "shared": parts[2].tolist(),
        "log_likelihood": -float(found.fun),
        "largest_gradient": float(np.abs(_free(found, bounds)).max()),
    }


def _free(found: Any, bounds: list[Any]) -> np.ndarray:
    """The gradient, but for scales that rest at their lowest value."""
    at = [
        low is not None and abs(x - low) < 1e-9 for x, (low, _) in zip(found.x, bounds, strict=True)
    ]
    return np.where(at, 0.0, found.jac)


def mixed_lm(target: Target) -> dict[str, Any] | None:
    """statsmodels' MixedLM with independent effects; None where it does not have the model."""
    from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

    case = target.case
    if case.name not in _LINEAR:
        return None
    mask = np.asarray(target.mask)
    x, y = np.asarray(target.x)[mask], np.asarray(target.y)[mask]
    design = np.column_stack([np.ones(len(y)), x])
    groups = np.repeat(np.arange(len(mask)), mask.sum(1))
    dim = len(target.loc)
    model = MixedLM(y, design, groups, exog_re=design[:, :dim])
    free = MixedLMParams.from_components(np.ones(design.shape[1]), np.eye(dim))
    best = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in ("lbfgs", "bfgs"):  # others do not hold what is not free
            result = model.fit(reml=False, method=method, free=free, maxiter=2000)
            if best is None or result.llf > best.llf:
                best = result
    assert best is not None
    return {
        "how": "statsmodels MixedLM",
        "loc": best.fe_params[:dim].tolist(),
        "scale": np.sqrt(np.maximum(np.diag(best.cov_re), 0.0)).tolist(),
        "shared": [*best.fe_params[dim:].tolist(), 0.5 * float(np.log(best.scale))],
        "log_likelihood": float(best.llf),
    }
