"""Mode connectivity: a path between two solutions of a task along which the loss stays low.

Two runs on the same task end at a_i and b_i. On the straight line between them the loss may be high
where a curved path has none of it (Garipov, Izmailov, Podoprikhin, Vetrov & Wilson, 2018, Loss
Surfaces, Mode Connectivity, and Fast Ensembling of DNNs; Draxler, Veschgini, Salmhofer & Hamprecht,
2018, Essentially No Barriers in Neural Network Energy Landscape). The path has one bend φ_i:

    bezier      w(t) = (1−t)² a + 2t(1−t) φ + t² b
    polyline    w(t) = (1−2t) a + 2t φ  up to t = ½, then  2(1−t) φ + (2t−1) b

and φ_i minimises E_{t∼U[0,1]} E_i(w(t)), with E_i(θ) = f_i(θ) + ½(θ−θ0)ᵀΛ(θ−θ0).

The gradient in φ is ∫ c(t) ∇E_i(w(t)) dt, with c the factor of φ in w. A step estimates it at
evenly spaced values of t from a random start. That is unbiased, and since the integrand vanishes at
both ends, on a parabola between two minima with its slope, the error falls with the cube of their
number (the square, on a polyline), not with its root.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from varmeta.inference.base import NonFiniteLoss, decayed, update
from varmeta.inference.energy import TaskEnergy
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

Kind = Literal["bezier", "polyline"]
# Gradients are thousands of times larger at the start, and must be forgotten soon.
_BETAS = (0.9, 0.95)
_JITTER = 0.01  # of the ends' distance: a bend half-way may be a saddle, by symmetry


@dataclass(frozen=True, eq=False)
class ModePath:
    """Paths with one bend between two solutions of each of T tasks; losses in nats.

    `path` and `line` hold `[P, T]` losses at `t`, along the path found and along the straight line:
    `"energy"`, E_i, which the bend minimises; `"support"`, f_i, the negative log-likelihood of the
    support rows (all rows, if the tasks are not split); and, if they are, `"query"`, g_i.

    Attributes:
        kind: `"bezier"` or `"polyline"`.
        t: `[P]`, evenly spaced from 0 to 1.
        a: `[T, D]`, where the paths start.
        b: `[T, D]`, where they end.
        bend: `[T, D]`, φ.
        path: losses along the path.
        line: losses along the straight line.
        density: the model.
        prior: N(θ0, Σ), or None.
        tasks: T tasks.
        shared: φ of the model, `[Q]`.
    """

    kind: Kind
    t: Tensor
    a: Tensor
    b: Tensor
    bend: Tensor
    path: dict[str, Tensor]
    line: dict[str, Tensor]
    density: Density
    prior: GaussianPrior | None
    tasks: Tasks
    shared: Tensor

    def point(self, t: float | Tensor) -> Tensor:
        """w(t): t of shape `[...]` to `[..., T, D]`; exactly a at 0 and b at 1.

        Raises:
            ValueError: t outside [0, 1].
        """
        t = torch.as_tensor(t, dtype=self.a.dtype, device=self.a.device)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"t must lie between 0 and 1, got {t.tolist()}")
        return _point(self.kind, t, self.a, self.bend, self.b)

    def barrier(self, loss: str = "energy", *, line: bool = False) -> Tensor:
        """How far the loss rises above the worse end, `[T]` nats; 0 or more.

        max_t L(w(t)) − max(L(a), L(b)), over the points at `t`: a path has no barrier if its worst
        point is an end (Draxler et al. 2018). It does not hang on how fast the path is walked, and
        a convex loss has none on a straight line. Frankle, Dziugaite, Roy & Carbin (2020) take the
        ends' mean away instead: that is larger by half of the ends' difference.

        Args:
            loss: `"energy"`, `"support"` or `"query"`.
            line: along the straight line instead of the path.

        Raises:
            ValueError: no such loss.
        """
        known = self.line if line else self.path
        if loss not in known:
            hint = "; split the tasks for 'query'" if loss == "query" else ""
            raise ValueError(f"loss must be one of {', '.join(known)}, got {loss!r}{hint}")
        values = known[loss]
        return values.amax(0) - torch.maximum(values[0], values[-1])

    @property
    def table(self) -> pd.DataFrame:
        """One row per task, nats.

        `start` and `end`: the energy of a and b; `path` and `line`: its mean along each;
        `path_barrier` and `line_barrier`: see `barrier`, the same for `support_…` and `query_…`.
        """
        energy, straight = self.path["energy"], self.line["energy"]
        columns = {
            "start": energy[0],
            "end": energy[-1],
            "path": torch.trapezoid(energy, self.t, dim=0),
            "line": torch.trapezoid(straight, self.t, dim=0),
        }
        for loss in self.path:
            prefix = "" if loss == "energy" else f"{loss}_"
            columns[f"{prefix}path_barrier"] = self.barrier(loss)
            columns[f"{prefix}line_barrier"] = self.barrier(loss, line=True)
        numbers = {name: value.double().cpu().numpy() for name, value in columns.items()}
        return pd.DataFrame({"task": self.tasks.names, **numbers})

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="{:.6g}".format)


def mode_path(
    density: Density,
    prior: GaussianPrior | None,
    a: Tensor,
    b: Tensor,
    tasks: Tasks,
    *,
    shared: Tensor | None = None,
    kind: Kind = "bezier",
    steps: int = 1000,
    learning_rate: float = 0.1,
    samples: int = 6,
    points: int = 61,
    seed: int = 0,
    progress: bool | None = None,
) -> ModePath:
    """A path of low loss between two solutions of each task, and the loss along it.

    All tasks at once; a task's path depends on nothing but its own ends and rows. Adam moves the
    bend in units of the distance between the ends, measured in prior standard deviations, so that
    neither the units of a parameter nor how far apart the ends are matter; the step size falls to 0
    on a cosine. Models with batch-norm in training mode are no models of one task, `Density` says
    so: there are no statistics to be computed anew for each t, as in the paper.

    Args:
        density: the model.
        prior: N(θ0, Σ), whose penalty is part of the loss; None for f_i alone.
        a: `[T, D]`, one solution of each task, for example `fit.adapt(tasks).mean`.
        b: `[T, D]`, another.
        tasks: T tasks. The path follows the support rows, all rows if they are not split; the query
            rows' loss is reported.
        shared: φ `[Q]`; `density.shared_init` if None.
        kind: `"bezier"`, a parabola, or `"polyline"`, two straight pieces.
        steps: of the optimiser, each with `samples` gradients per task.
        learning_rate: how far a step moves the bend at most, in the ends' distance.
        samples: values of t per step.
        points: values of t at which losses are reported, evenly spaced.
        seed: of the draws of t.
        progress: show a progress bar; None for "when the output is a terminal".

    Raises:
        NonFiniteLoss: a task's loss is not finite, on the line, on the way or on the path.
        ValueError: shapes or data types that do not fit together, a number out of range.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, varmeta as vm
        >>> def ring(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal((w**2).sum(), 0.1), obs=y)
        >>> tasks = vm.Tasks.from_list([(torch.zeros(1, 1), torch.ones(1))])
        >>> density = vm.Density(ring, tasks)
        >>> here, there = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
        >>> found = mode_path(density, None, here, there, tasks)
        >>> round(float(found.barrier(line=True)))  # through the middle: ½(1 / 0.1)²
        50
        >>> bool(found.barrier() < 5)  # around it; a parabola is not quite half a circle
        True
    """
    shared = density.shared_init if shared is None else shared.detach()
    a, b = a.detach(), b.detach()
    _check(density, prior, a, b, tasks)
    for name, number, least in (
        ("steps", steps, 1),
        ("samples", samples, 1),
        ("points", points, 3),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    density.check_data(tasks, shared)
    t = torch.linspace(0, 1, points, dtype=a.dtype, device=a.device)
    found = ModePath(kind, t, a, b, (a + b) / 2, {}, {}, density, prior, tasks, shared)
    line = _along(found, "line", lambda t: torch.lerp(a, b, t))
    bend = _bend(found, steps, learning_rate, samples, seed, progress)
    path = _along(found, "path", lambda t: _point(kind, t, a, bend, b))
    return ModePath(kind, t, a, b, bend, path, line, density, prior, tasks, shared)


def losses(
    density: Density,
    prior: GaussianPrior | None,
    theta: Tensor,
    tasks: Tasks,
    shared: Tensor,
) -> dict[str, Tensor]:
    """What a `ModePath` reports, at any θ: `[..., T, D]` to `[..., T]` nats each, no gradients."""
    with torch.no_grad():
        support = density.negative_log_likelihood(theta, tasks.support, shared)
        penalty = 0.0 if prior is None else prior.penalty(theta)
        out = {"energy": support + penalty, "support": support}
        if tasks.is_split:
            out["query"] = density.negative_log_likelihood(theta, tasks.query, shared)
    return out


def bend_gradient(kind: Kind, energy: TaskEnergy, ends: Tensor, bend: Tensor, t: Tensor) -> Tensor:
    """∂/∂φ of the mean of E_i(w(t)) over these t, `[T, D]` nats per unit of θ.

    Args:
        kind: of curve.
        energy: E_i.
        ends: `[2, T, D]`, a and b.
        bend: `[T, D]`, φ.
        t: `[S]`.

    Raises:
        NonFiniteLoss: the energy there is not finite.
    """
    total = torch.zeros_like(bend)
    for s, (of_a, of_bend, of_b) in zip(t, weights(kind, t), strict=True):
        theta = of_a * ends[0] + of_bend * bend + of_b * ends[1]
        value, grad = energy.value_and_gradient(theta)
        _require_finite(value, energy.tasks, "energy", "on the way", s)
        largest = grad.abs().amax(-1)
        _require_finite(largest, energy.tasks, "energy's gradient", "on the way", s)
        total = total + of_bend * grad
    return total / len(t)


def weights(kind: Kind, t: Tensor) -> Tensor:
    """Of a, φ and b in w(t): `[...]` to `[..., 3]`. They add up to 1."""
    if kind == "bezier":
        return torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=-1)
    before, after = (1 - 2 * t).clamp(min=0), (2 * t - 1).clamp(min=0)
    return torch.stack([before, 1 - before - after, after], dim=-1)


# -- steps -----------------------------------------------------------------------------------------


def _bend(
    start: ModePath, steps: int, rate: float, samples: int, seed: int, progress: bool | None
) -> Tensor:
    """φ `[T, D]` after so many steps."""
    a, b, middle = start.a, start.b, start.bend
    energy = TaskEnergy(start.density, start.tasks.support, start.shared, start.prior)
    scale = start.density.prior_scale if start.prior is None else start.prior.scale.detach()
    unit = scale * ((b - a) / scale).square().mean(-1, keepdim=True).sqrt()
    noise, like = generator(seed, device=a.device), {"dtype": a.dtype, "device": a.device}
    # The same numbers for all tasks, so that a task's path hangs on no other task.
    raw = _JITTER * torch.randn(a.shape[-1], generator=noise, **like).expand_as(a)  # type: ignore[call-overload]
    raw = raw.clone().requires_grad_()
    optimiser = torch.optim.Adam([raw], betas=_BETAS)
    ends, grid = torch.stack([a, b]), torch.arange(samples, **like)  # type: ignore[call-overload]
    console = Console(stderr=True)
    hidden = not console.is_terminal if progress is None else not progress
    for step in track(range(steps), "mode path", console=console, disable=hidden):
        t = (grid + torch.rand((), generator=noise, **like)) / samples  # type: ignore[call-overload]
        bend = middle + unit * raw.detach()
        grad = bend_gradient(start.kind, energy, ends, bend, t)
        update(optimiser, [raw], [unit * grad], decayed(rate, step, steps))
    return middle + unit * raw.detach()


def _point(kind: Kind, t: Tensor, a: Tensor, bend: Tensor, b: Tensor) -> Tensor:
    """`[...]` to `[..., T, D]`."""
    of_a, of_bend, of_b = weights(kind, t)[..., None, None].unbind(-3)
    return of_a * a + of_bend * bend + of_b * b


def _along(at: ModePath, where: str, point: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Losses `[P, T]` at w(t) for all of `at.t`; one t after the other, for the memory's sake."""
    rows = [losses(at.density, at.prior, point(t), at.tasks, at.shared) for t in at.t]
    for t, row in zip(at.t, rows, strict=True):
        for name, values in row.items():
            _require_finite(values, at.tasks, f"{name} loss", f"along the {where}", t)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _require_finite(values: Tensor, tasks: Tasks, what: str, where: str, t: Tensor) -> None:
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        task = int(bad[0, 0])
        raise NonFiniteLoss(
            f"the {what} of task {tasks.names[task]!r} is {float(values[task])} {where}, at "
            f"t = {float(t):.3g} ({len(bad)} of {len(values)} tasks). Check that a and b are this "
            "task's solutions, lower the learning rate, or give the model a likelihood that is "
            "positive everywhere"
        )


def _check(
    density: Density, prior: GaussianPrior | None, a: Tensor, b: Tensor, tasks: Tasks
) -> None:
    wanted, like = (len(tasks), density.dim), density.prior_loc
    for name, end in (("a", a), ("b", b)):
        if tuple(end.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(end.shape)}, wanted {wanted}: a solution of every task "
                "in unconstrained coordinates, for example posterior.mean"
            )
        if end.dtype != like.dtype or end.device != like.device:
            raise ValueError(
                f"{name} is {end.dtype} on {end.device}, the density {like.dtype} on "
                f"{like.device}; use {name}.to(density.prior_loc)"
            )
    if prior is not None and prior.dim != density.dim:
        raise ValueError(
            f"prior has {prior.dim} coordinates, the density {density.dim}; build it with "
            "GaussianPrior.from_density(density)"
        )
