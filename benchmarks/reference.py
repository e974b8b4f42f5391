"""The meta-gradient in float64, with the same fixed budgets: what every implementation must match.

Written apart from the implementations: Hessian-vector products are forward over reverse
(`torch.func.jvp` of `torch.func.grad`), conjugate gradients are the textbook's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from benchmarks.workloads import Workload, nll


@dataclass(frozen=True, eq=False)
class Reference:
    """Per task, float64.

    Attributes:
        losses: `[T]`, g_i(θ_i*).
        gradients: `[T, D]`, in θ0.
        probe: `[D]`, a point near θ0.
        probe_gradients: `[T, D]`, ∇(f_i + prox) at the probe, for the hand-written `floor`.
    """

    losses: np.ndarray
    gradients: np.ndarray
    probe: np.ndarray
    probe_gradients: np.ndarray


def solve(workload: Workload) -> Reference:
    """All tasks; convolutions task by task, the rest in one batch."""
    data = workload.tensors(torch.float64)
    f, lam = nll(workload.name), workload.precision
    theta0 = data.theta0
    generator = torch.Generator().manual_seed(1)
    probe = theta0 + 0.05 * torch.randn(theta0.shape, generator=generator, dtype=theta0.dtype)

    def energy(theta: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return f(theta, x, y, mask) + 0.5 * lam * ((theta - theta0) ** 2).sum()

    def task(*rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        support, query = rows[:3], rows[3:]

        def slope(t: Tensor) -> Tensor:
            return grad(energy)(t, *support)

        theta = theta0
        for _ in range(workload.inner_steps):
            theta = theta - workload.step_size * slope(theta)
        b = grad(f)(theta, *query)
        x, r, p = torch.zeros_like(b), b, b
        for _ in range(workload.cg_steps):
            ap = jvp(slope, (theta,), (p,))[1]
            rr, pap = (r * r).sum(), (p * ap).sum()
            alpha = _ratio(rr, pap)
            x, r = x + alpha * p, r - alpha * ap
            p = r + _ratio((r * r).sum(), rr) * p
        return f(theta, *query), lam * x, slope(probe)

    rows = (*data.support, *data.query)
    if workload.name == "omniglot":
        each = [task(*(t[i] for t in rows)) for i in range(workload.tasks)]
        out = [torch.stack(part) for part in zip(*each, strict=True)]
    else:
        out = list(vmap(task)(*rows))
    losses, gradients, probes = (t.detach().numpy() for t in out)
    return Reference(losses, gradients, probe.numpy(), probes)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 for 0 / 0: a solve that has already arrived."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """‖got − want‖ / ‖want‖; 0 where both are 0."""
    off, size = np.linalg.norm(got - want), np.linalg.norm(want)
    return float(off / size) if size else float(off)
