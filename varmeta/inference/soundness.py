"""What cannot be right: a posterior that is no number, far off or never moved; losses that rose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.inference.base import Meta, NonFiniteLoss, NonFinitePosterior, Strategy
from varmeta.models.density import Density
from varmeta.posterior import Draws, TaskPosterior
from varmeta.tasks import Tasks, TaskSource

if TYPE_CHECKING:
    from varmeta.inference.fitted import Fit

_FAR = 100.0  # nats a row below the start of learning: worse than any outlier of a sane posterior
_PER_COORDINATE = 50.0  # nats
_MOST_DRAWS = 8  # of a posterior that is draws; the best of them is what counts
_STILL = 1e-6  # of the prior's standard deviations
_PULL = 0.1  # nats per standard deviation of the prior
_RISE = 1.0  # nats a row above the start: any strategy that learns falls
_NOISE = 10.0  # standard deviations of the losses around each other


def check_posterior(name: str, posterior: TaskPosterior) -> None:
    """Stop before a posterior that is none is used.

    Raises:
        NonFinitePosterior: with the strategy's name and that of the first task whose mean, standard
            deviation or φ is not finite.
    """
    try:
        _check_finite(posterior)
    except NonFinitePosterior as error:
        raise NonFinitePosterior(f"{name}: {error}") from error


def check_learned(name: str, meta: Meta) -> None:
    """Stop where the last step left no numbers, which no later loss can show.

    Raises:
        NonFiniteLoss: naming what is not finite. (A scale of exactly 0 is.)
    """
    for what, value in meta.raw.items():
        bad = value.isnan() | (value == torch.inf) | ((value == -torch.inf) & (what != "log_scale"))
        if bool(bad.any()):
            raise NonFiniteLoss(
                f"{name}: after the last step {int(bad.sum())} of {value.numel()} learned numbers "
                f"({what}) are not finite. Lower the learning rate, or tighten the model's priors"
            )


def warn_of_posterior(
    strategy: Strategy, posterior: TaskPosterior, tasks: Tasks, meta: Meta
) -> None:
    """Warn of tasks that their posterior fits far worse than the start, or that it left untouched.

    Far: given its mean (the best of some draws), the rows are 100 nats each less likely than given
    the θ0 and φ from which learning started. Untouched: it stands at the learned θ0, where the
    rows pull by more than a tenth of a nat per standard deviation of the prior.
    """
    density, said = meta.density, []
    far = _worse_than_start(density, posterior, tasks, meta)
    if bool((far > _FAR).any()):
        said.append(
            f"the posterior of {_some(far > _FAR, posterior.names)} is far off: a row is up to "
            f"{float(far.max()):.1g} nats less likely than where learning started. Learning or "
            "adapting has diverged: lower the learning rate or step size"
        )
    still = _untouched(density, posterior, tasks, meta)
    if bool(still.any()) and not strategy.may_stay:
        said.append(
            f"the posterior of {_some(still, posterior.names)} is untouched: it stands at θ0, from "
            "which the rows pull it away. No step was taken for it: raise the steps or the step "
            "size, or check that the run has visited the task"
        )
    if said:
        warnings.warn(f"{strategy.name}: {'; '.join(said)}", RuntimeWarning, stacklevel=3)


def diverged(fit: Fit) -> str:
    """How the objective diverged, in words; empty where it did not.

    It ended above its start (`risen`), or was never near one: higher than the loss of a point at
    the start of learning by 100 nats a row and 50 a coordinate, more than any KL amounts to.
    """
    if not fit.strategy.loss_falls or not len(fit.history):
        return ""
    tasks = fit.tasks.batch(0) if isinstance(fit.tasks, TaskSource) else fit.tasks
    rows = float(tasks.num_rows.double().mean())
    said, end = risen(fit.history, rows), _last(fit.history)
    most = _FAR * rows + _PER_COORDINATE * fit.density.dim
    if said or end <= most:
        return said
    point = fit.state.meta.origin.loc.detach().expand(len(tasks), -1)
    with torch.no_grad():
        start = float(fit.density.negative_log_likelihood(point, tasks).mean())
    if end <= start + most:
        return ""
    return (
        f"the objective diverged, to {end:.4g} nats per task where a point at the start of "
        f"learning has {start:.4g}: lower the learning rate or step size"
    )


def risen(history: pd.DataFrame, rows: float) -> str:
    """How far the objective ended above its start, in words; empty where it did not.

    By more than a nat for each of a task's `rows` and ten times the noise of the losses.
    """
    losses = history["loss"].to_numpy(dtype=np.float64) if len(history) else np.zeros(0)
    tenth = max(len(losses) // 10, 1)
    if len(losses) < 2 * tenth:
        return ""
    with np.errstate(all="ignore"):
        start, end = float(np.median(losses[:tenth])), _last(history)
        # Of neighbours: a trend is no noise. Of the first half: what explodes has more later.
        steps = np.abs(np.diff(losses[: max(len(losses) // 2, 3)]))
        noise = 1.05 * float(np.median(steps))  # of normal losses, one standard deviation
    if not end - start > max(_RISE * rows, _NOISE * noise):
        return ""
    return (
        f"the objective diverged, from {start:.4g} to {end:.4g} nats per task: lower the learning "
        "rate or step size"
    )


def _check_finite(posterior: TaskPosterior) -> None:
    shared = posterior.shared
    if shared.dim() == 3:
        shared = shared.sum(0)
    parts = [posterior.mean, posterior.sd, shared.expand(len(posterior.names), -1)]
    bad = (~torch.cat(parts, -1).isfinite()).any(-1).nonzero()[:, 0].tolist()
    if bad:
        raise NonFinitePosterior(
            f"the posterior of task {posterior.names[bad[0]]!r} is not finite ({len(bad)} of "
            f"{len(posterior.names)} tasks). Lower the learning rate or step size, tighten the "
            "model's priors, or check this task's data"
        )


def _last(history: pd.DataFrame) -> float:
    """The objective's median over the last tenth of the steps, nats per task."""
    # NumPy's: that of pandas changes the filters of warnings, which threads share.
    losses = history["loss"].to_numpy(dtype=np.float64)
    return float(np.median(losses[-max(len(losses) // 10, 1) :]))


def _worse_than_start(
    density: Density, posterior: TaskPosterior, tasks: Tasks, meta: Meta
) -> Tensor:
    """`[T]` nats a row, by which the rows are less likely than where learning started."""
    with torch.no_grad():
        start = meta.origin.loc.detach().expand(len(tasks), -1)
        before = density.negative_log_likelihood(start, tasks)
        theta, shared = posterior.mean, posterior.shared
        if isinstance(posterior, Draws):
            some = torch.linspace(0, len(posterior.draws) - 1, _MOST_DRAWS).long().unique()
            theta = posterior.draws[some]
            shared = shared[some] if shared.dim() == 3 else shared
        after = density.negative_log_likelihood(theta, tasks, shared)
        after = after.amin(0) if after.dim() == 2 else after
        worse = (after - before) / tasks.num_rows.clamp(min=1)
        # Where nothing was likely at the start anything is as good; a density of 0 now is far.
        return worse.where(before.isfinite(), 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _untouched(density: Density, posterior: TaskPosterior, tasks: Tasks, meta: Meta) -> Tensor:
    """`[T]` bool."""
    prior, _ = meta.fixed()
    scale = prior.scale
    moved = ((posterior.mean - prior.loc).abs() / scale).nan_to_num(posinf=torch.inf).amax(-1)
    still = moved <= _STILL
    if isinstance(posterior, Draws) or not bool((scale > 0).all()) or not bool(still.any()):
        return torch.zeros_like(still)
    some = tasks.select(still)
    with torch.enable_grad():
        theta = posterior.mean[still].detach().requires_grad_()
        loss = density.negative_log_likelihood(theta, some, posterior.shared)
        (grad,) = torch.autograd.grad(loss.sum(), theta)
    out = torch.zeros_like(still)
    out[still] = (grad * scale).abs().amax(-1) > _PULL
    return out


def _some(bad: Tensor, names: Sequence[str]) -> str:
    """Of which tasks."""
    found = [name for name, yes in zip(names, bad.tolist(), strict=True) if yes]
    more = f" and {len(found) - 3} more" * (len(found) > 3)
    return f"{len(found)} of {len(names)} tasks ({', '.join(map(repr, found[:3]))}{more})"
