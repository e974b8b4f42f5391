"""The same in JAX: jit, vmap, a custom derivative, and a linearised Hessian-vector product."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.workloads import NOISE, URANIUM, Workload, split

Array = Any


def _conv(x: Array, weight: Array, bias: Array) -> Array:
    """3x3, stride 2, padding 1, as a matrix product: XLA's grouped convolutions crawl on a CPU."""
    rows, _, side, _ = x.shape
    out = (side + 1) // 2
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = [
        padded[:, :, i : i + 2 * out - 1 : 2, j : j + 2 * out - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    columns = jnp.stack(windows, axis=2).reshape(rows, -1, out * out).swapaxes(1, 2)
    z = columns.reshape(rows * out * out, -1) @ weight.reshape(len(weight), -1).T + bias
    return jax.nn.relu(z).reshape(rows, out * out, -1).swapaxes(1, 2).reshape(rows, -1, out, out)


def outputs(name: str, theta: Array, x: Array) -> Array:
    """The model of one task: θ `[D]` and x `[N, ...]` to `[N]` (logits `[N, 5]`)."""
    if name == "linear":
        return x @ theta
    if name == "radon":
        return theta[0] + theta[1] * x[:, 0] + URANIUM * x[:, 1]
    *layers, w, b = split(name, theta)
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = _conv(x, weight, bias) if name == "omniglot" else jax.nn.relu(x @ weight.T + bias)
    if name == "omniglot":
        return x.mean((-2, -1)) @ w.T + b
    return (x @ w.T + b)[:, 0]


def negative_log_likelihood(name: str, theta: Array, x: Array, y: Array, mask: Array) -> Array:
    """Nats, summed over the rows of one task."""
    out = outputs(name, theta, x)
    if name == "omniglot":
        rows = -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], axis=-1)[:, 0]
    else:
        scale = NOISE if name == "radon" else 1.0
        rows = 0.5 * ((y - out) / scale) ** 2 + 0.5 * math.log(2 * math.pi) + math.log(scale)
    return jnp.where(mask, rows, 0.0).sum()


class JaxVmap:
    """One jitted function of (θ0, weights, data)."""

    def __init__(self, workload: Workload) -> None:
        w = workload

        def f(theta: Array, rows: Array) -> Array:
            return negative_log_likelihood(w.name, theta, *rows)

        def energy(theta: Array, theta0: Array, rows: Array) -> Array:
            return f(theta, rows) + 0.5 * w.precision * ((theta - theta0) ** 2).sum()

        slope = jax.grad(energy)

        @jax.custom_vjp
        def adapt(theta0: Array, rows: Array) -> Array:
            def descend(_: int, theta: Array) -> Array:
                return theta - w.step_size * slope(theta, theta0, rows)

            return lax.fori_loop(0, w.inner_steps, descend, theta0)

        def forward(theta0: Array, rows: Array) -> Any:
            theta = adapt(theta0, rows)
            return theta, (theta, theta0, rows)

        def backward(saved: Any, b: Array) -> Any:
            theta, theta0, rows = saved
            _, hvp = jax.linearize(lambda t: slope(t, theta0, rows), theta)

            def iterate(_: int, state: Any) -> Any:
                x, r, p, rr = state
                ap = hvp(p)
                pap = p @ ap
                alpha = jnp.where(pap == 0, 0.0, rr / jnp.where(pap == 0, 1.0, pap))
                x, r = x + alpha * p, r - alpha * ap
                new = r @ r
                beta = jnp.where(rr == 0, 0.0, new / jnp.where(rr == 0, 1.0, rr))
                return x, r, r + beta * p, new

            state = lax.fori_loop(0, w.cg_steps, iterate, (jnp.zeros_like(b), b, b, b @ b))
            return w.precision * state[0], None

        adapt.defvjp(forward, backward)

        def total(theta0: Array, weights: Array, support: Array, query: Array) -> Array:
            theta = jax.vmap(adapt, in_axes=(None, 0))(theta0, support)
            return (weights * jax.vmap(f)(theta, query)).sum()

        self.total = jax.jit(jax.value_and_grad(total))
        self.theta0 = jnp.asarray(w.theta0)
        self.support = tuple(jnp.asarray(a) for a in (w.x, w.y, w.mask))
        self.query = tuple(jnp.asarray(a) for a in (w.x_query, w.y_query, w.mask_query))

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """See `Implementation.step`."""
        value, gradient = self.total(self.theta0, jnp.asarray(weights), self.support, self.query)
        return float(value), np.asarray(gradient)
