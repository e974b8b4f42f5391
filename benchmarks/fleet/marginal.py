"""The marginal likelihood of a case: every θ_i integrated out. A tool for references only.

By adaptive Gauss-Hermite quadrature (Pinheiro and Bates, 1995), which is exact where the model is
normal and linear in θ_i; and by statsmodels where that has the model.
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from benchmarks.fleet.cases import LINEAR
from benchmarks.fleet.numpyro_hierarchy import Expansion, Point, Target

NODES = {1: 31, 2: 15, 3: 9, 4: 7}  # a side, by the number of coordinates
_LOWEST = 1e-4  # of a scale, in units of its prior's: taken for 0
_STEPS = jnp.array([1.0, 0.5, 0.2, 0.05, 0.01, 0.0])


class Marginal:
    """log p(y | θ0, σ, φ) of a target, its maximum, and the modes of the θ_i."""

    def __init__(self, target: Target) -> None:
        self.target, self.dim = target, len(target.loc)
        x, w = np.polynomial.hermite.hermgauss(NODES[self.dim])
        self.nodes = jnp.asarray(list(product(x, repeat=self.dim)))
        weights = [np.log(c).sum() for c in product(w, repeat=self.dim)]
        self.log_weights = jnp.asarray(weights) + (self.nodes**2).sum(-1)
        self.unit = jnp.concatenate(
            [target.width, jnp.ones(len(target.scale_width)), target.shared_scale]
        )
        self._loss = jax.jit(jax.value_and_grad(self._loss_at))
        self._expansion = jax.jit(self._expansion_at)

    def point(self, flat: Any) -> Point:
        """`[D + M + P]` to its parts."""
        return Point(*jnp.split(flat, [self.dim, self.dim + len(self.target.scale_width)]))

    def log_density(self, at: Point, first: Any) -> Any:
        """Σ_i log ∫ N(z; 0, I) p(y_i | θ0 + σ z, φ) dz, nats, about modes sought from `first`."""
        z = jax.lax.stop_gradient(self._modes(at, first))
        z = (z - at.loc) / jnp.exp(at.log_scale)[self.target.groups]
        z = jax.lax.stop_gradient(z)
        here = jax.lax.stop_gradient(self._pack(at))

        def one(z: Any, *data: Any) -> Any:
            values, vectors = self._curvature(z, data, *here)
            spread = jax.lax.stop_gradient(jnp.sqrt(2.0) * vectors / jnp.sqrt(values))
            points = z + self.nodes @ spread.T
            heights = jax.vmap(lambda p: self._joint(p, data, *self._pack(at)))(points)
            volume = 0.5 * self.dim * jnp.log(2.0) - 0.5 * jnp.log(values).sum()
            volume = jax.lax.stop_gradient(volume)
            return jax.nn.logsumexp(heights + self.log_weights) + volume

        return jax.vmap(one)(z, *self._data()).sum()

    def expansion(self, flat: Any, first: Any) -> Expansion:
        """Of each task's log-likelihood at its mode, flat where it does not curve downwards."""
        return Expansion(*self._expansion(flat, first))

    def most_likely(self, start: Point, first: Any, belief: float) -> tuple[np.ndarray, Any]:
        """The maximum of log p(y | ·) + belief · log p(·) and scipy's result, from `start`.

        Steps are in units of the priors, and scales stay above a ten-thousandth of theirs.
        """
        origin = np.concatenate([start.loc, start.log_scale, start.shared])
        low = np.log(_LOWEST * np.asarray(self.target.scale_width)) - np.asarray(start.log_scale)
        bounds = [(None, None)] * self.dim + [(float(b), None) for b in low]
        bounds += [(None, None)] * len(self.target.shared_scale)
        u, found = np.zeros(len(origin)), None

        def loss(u: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self._loss(origin + self.unit * u, first, belief)
            if not np.isfinite(value):
                return 1e10, np.zeros_like(u)
            return float(value), np.asarray(slope * self.unit, dtype=float)

        for _ in range(3):  # each with a fresh memory
            options = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-6}
            found = minimize(loss, u, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            u = found.x
        free = [b is None or x > b + 1e-9 for x, (b, _) in zip(found.x, bounds, strict=True)]
        found.jac = np.where(free, found.jac, 0.0)
        return origin + np.asarray(self.unit) * u, found

    def spread(self, flat: np.ndarray, first: Any) -> Point:
        """Standard deviations of the marginal posterior by its curvature at `flat`, at most 1 unit.

        The curvature is from differences of gradients; where it is not positive a unit is taken.
        """
        step, rows = 1e-3, []
        for k in range(len(flat)):
            shift = np.zeros(len(flat))
            shift[k] = step
            ends = [self._loss(flat + s * shift * self.unit, first, 1.0)[1] for s in (1, -1)]
            rows.append(np.asarray((ends[0] - ends[1]) * self.unit) / (2 * step))
        values, vectors = np.linalg.eigh(0.5 * (np.array(rows) + np.array(rows).T))
        sd = np.sqrt(((vectors**2) / np.maximum(values, 1.0)).sum(-1))
        return self.point(jnp.asarray(np.minimum(sd, 1.0)) * self.unit)

    # -- private -----------------------------------------------------------------------------------

    def _data(self) -> tuple[Any, Any, Any]:
        return self.target.x, self.target.y, self.target.mask

    def _pack(self, at: Point) -> tuple[Any, Any, Any]:
        return at.loc, jnp.exp(at.log_scale)[self.target.groups], at.shared

    def _loss_at(self, flat: Any, first: Any, belief: Any) -> Any:
        at = self.point(flat)
        return -self.log_density(at, first) - belief * self.target.log_belief(at)

    def _expansion_at(self, flat: Any, first: Any) -> tuple[Any, Any]:
        at, target = self.point(flat), self.target

        def one(theta: Any, x: Any, y: Any, mask: Any) -> tuple[Any, Any]:
            def height(t: Any) -> Any:
                return jnp.where(mask, target.rows(t, at.shared, x, y), 0.0).sum()

            values, vectors = jnp.linalg.eigh(-jax.hessian(height)(theta))
            precision = (vectors * jnp.maximum(values, 0.0)) @ vectors.T
            return jax.grad(height)(theta) + precision @ theta, precision

        return jax.vmap(one)(self._modes(at, first), *self._data())

    def _joint(self, z: Any, data: Any, loc: Any, sd: Any, shared: Any) -> Any:
        """log N(z; 0, I) + log p(y | θ0 + σ z, φ) of one task."""
        x, y, mask = data
        rows = jnp.where(mask, self.target.rows(loc + sd * z, shared, x, y), 0.0).sum()
        return rows - 0.5 * (z**2).sum() - 0.5 * self.dim * jnp.log(2 * jnp.pi)

    def _curvature(self, z: Any, data: Any, *here: Any) -> tuple[Any, Any]:
        """Eigenvalues, by their size and at least .1, and eigenvectors."""
        hessian = -jax.hessian(self._joint)(z, data, *here)
        values, vectors = jnp.linalg.eigh(jnp.nan_to_num(hessian))
        return jnp.maximum(jnp.abs(values), 0.1), vectors

    def _modes(self, at: Point, first: Any) -> Any:
        """`[T, D]` θ_i by Newton steps that never go down, from the better of `first` and θ0."""
        here = jax.lax.stop_gradient(self._pack(at))

        def best(points: Any, data: Any) -> Any:
            height = jax.vmap(lambda p: self._joint(p, data, *here))(points)
            return points[jnp.argmax(jnp.where(jnp.isfinite(height), height, -jnp.inf))]

        def one(first: Any, *data: Any) -> Any:
            def newton(_: int, z: Any) -> Any:
                slope = jax.grad(self._joint)(z, data, *here)
                values, vectors = self._curvature(z, data, *here)
                step = vectors @ ((vectors.T @ jnp.nan_to_num(slope)) / values)
                return best(z + _STEPS[:, None] * step, data)

            start = jnp.stack([(first - here[0]) / here[1], jnp.zeros(self.dim)])
            return jax.lax.fori_loop(0, 30, newton, best(start, data))

        z = jax.vmap(one)(first, *self._data())
        return here[0] + here[1] * z


def maximum_likelihood(marginal: Marginal, start: Point, first: Any) -> dict[str, Any]:
    """The maximum of the marginal likelihood, without any prior of θ0, σ and φ."""
    flat, found = marginal.most_likely(start, first, 0.0)
    at = marginal.point(flat)
    scale = np.exp(at.log_scale)
    scale[scale < 10 * _LOWEST * np.asarray(marginal.target.scale_width)] = 0.0
    return {
        "how": f"adaptive Gauss-Hermite quadrature, {NODES[marginal.dim]} nodes a coordinate",
        "loc": np.asarray(at.loc).tolist(),
        "scale": scale.tolist(),
        "shared": np.asarray(at.shared).tolist(),
        "log_likelihood": -float(found.fun),
        "largest_gradient": float(np.abs(found.jac).max()),
    }


def mixed_lm(target: Target) -> dict[str, Any] | None:
    """statsmodels' MixedLM with independent effects; None where it does not have the model."""
    from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

    if target.case.name not in LINEAR:
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
