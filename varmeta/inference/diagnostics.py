"""What a run says of itself in words: beside the progress bar, and as a warning at the end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.inference.base import NotConverged, UndeterminedScale
from varmeta.inference.determined import HARDLY, Undetermined, undetermined
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks, TaskSource

if TYPE_CHECKING:
    from varmeta.inference.fitted import Fit

_COLLAPSED = 0.01  # of the scale at the start, where the evidence is not asked
_log = logging.getLogger("varmeta")
WORST_IS_LOW = ("converged", "importance_ess")  # of the other diagnostics the largest is the worst
LOOSE = 0.1  # relative residual or gradient above which a derivative is called inexact

# Diagnostic, where it is bad, and what to say of so many tasks.
_FINDINGS: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
    (
        "converged",
        lambda value: ~value.bool(),
        "{} did not reach the inner minimiser's tolerance: raise its max_iterations",
    ),
    (
        "grad_reduction",
        lambda value: value > LOOSE,
        "{} kept more than a tenth of the first gradient's norm after the fixed inner budget, and "
        "an implicit derivative is only as exact as that is small: raise max_iterations or the "
        "step size, or use NewtonCG",
    ),
    (
        "diverged",
        lambda value: value.bool(),
        "{} were led away by their inner steps, to a steeper place than the start or out of all "
        "reach of the prior: lower the minimiser's step_size, or use IMAML, whose NewtonCG needs "
        "none",
    ),
    (
        "cut",
        lambda value: value.bool(),
        "{} had even their last inner step cut to the longest allowed (the minimiser's clip), so "
        "that they had not arrived: lower step_size where steps swing to and fro, raise "
        "max_iterations where they are on their way",
    ),
    (
        "negative_curvature",
        lambda value: value.bool(),
        "{} met negative curvature in the implicit solve, so that θ* is no minimum and the "
        "derivative is not its: raise the minimiser's max_iterations, start from a tighter prior, "
        "or use Implicit(curvature='gauss_newton')",
    ),
    (
        "residual",
        lambda value: value > LOOSE,
        "{} ended the implicit solve with a relative residual above a tenth: raise the solver's "
        "max_iterations, or take a closer stand-in for the inverse (CG is exact)",
    ),
)


def note(row: dict[str, float], tasks: int) -> str:
    """A step in a few words, for the progress bar."""
    text = f"loss {row['loss']:.4g}"
    if "residual" in row:
        text += f"  residual {row['residual']:.1e}"
    if row.get("converged", tasks) < tasks:
        text += f"  {tasks - row['converged']:.0f} not converged"
    if row.get("negative_curvature", 0) > 0:
        text += f"  {row['negative_curvature']:.0f} negative curvature"
    return text


def warn_of(name: str, stats: Mapping[str, Tensor]) -> None:
    """Warn of what was left undone inside, and say what mends it.

    `stats` are diagnostics per task, `[T]` each, as in `ProxInfo.stats`; where there is one named
    `visited`, of the tasks for which it is True.
    """
    of = "tasks"
    if "visited" in stats and not bool(stats["visited"].all()):
        of = "tasks that were visited"
        stats = {name: value[stats["visited"]] for name, value in stats.items()}
    # Reducing the gradient is asked of a budget whose result is differentiated implicitly alone.
    asked = set(stats) - ({"grad_reduction"} if _asks_no_reduction(stats) else set())
    said = []
    for key, bad, text in _FINDINGS:
        count = int(bad(stats[key]).sum()) if key in asked else 0
        if count:
            said.append(text.format(f"{count} of {len(stats[key])} {of}"))
    if said:
        warnings.warn(f"{name}: {'; '.join(said)}", RuntimeWarning, stacklevel=3)


def by_task(
    stats: Mapping[str, Tensor], seen: Sequence[str], names: Sequence[str]
) -> dict[str, Tensor]:
    """The worst of each diagnostic over a task's folds, where a run has seen tasks as folds.

    Args:
        stats: one value for each of `seen`.
        seen: names of what the run was given, for folds as `Tasks.folds` makes them.
        names: of the tasks.

    Returns:
        `[T]` each; nothing where `seen` are tasks of a strategy's own making.
    """
    if tuple(seen) == tuple(names):
        return dict(stats)
    place = {name: index for index, name in enumerate(names)}
    owners = [place.get(name.rsplit(" [", 1)[0], -1) for name in seen]
    if set(owners) != set(range(len(names))):
        return {}
    owner = torch.tensor(owners)
    visited = stats.get("visited", torch.ones(len(owner), dtype=torch.bool))
    out = {}
    for name, value in stats.items():
        known = ~value.isnan() & (visited | (name == "visited")).to(value.device)
        exact = value if value.is_floating_point() else value.long()
        none = exact.new_full((len(names),), torch.nan if value.is_floating_point() else 0)
        place_of, way = owner.to(value.device)[known], "amin" if name in WORST_IS_LOW else "amax"
        worst = none.scatter_reduce(0, place_of, exact[known], way, include_self=False)
        out[name] = worst.to(value.dtype)
    return out


def say_of_stream(tasks: Tasks | TaskSource, prior: GaussianPrior) -> None:
    """On a stream the hyperprior counts nothing: a log line, and a warning where one was chosen.

    It counts once for all tasks, and a stream has no end of them.
    """
    if not isinstance(tasks, TaskSource) or prior.hyperprior is None:
        return
    law = prior.hyperprior.scale_law
    text = (
        "the tasks are a stream without end, of which the belief about θ0, scales and shared "
        f"parameters (scale_law={law!r}) is no share: it counts 0, and the tasks alone decide"
    )
    if law in ("half-normal", "flat"):  # the default, and what says nothing of the scales
        _log.info("%s", text)
    else:
        warnings.warn(
            f"{text}. For the law to count give Tasks, or bounds=(least, largest) to keep scales "
            "from 0",
            RuntimeWarning,
            stacklevel=3,
        )


def undetermined_of(fit: Fit) -> list[Undetermined] | None:
    """The modules whose learned scale the training data hardly tell from 0; see `undetermined`.

    None where it is not looked for: on a stream, or where posteriors are not given the scales as
    points, and what `undetermined` leaves out.
    """
    prior, start = fit.prior, fit.state.meta.origin
    learned = (prior.log_scale != start.log_scale) & prior.log_scale.isfinite()
    if isinstance(fit.tasks, TaskSource) or not fit.strategy.point_scales:
        return None
    if not bool(learned.any()):
        return []
    found = undetermined(fit.density, prior, fit.shared, fit.tasks.unsplit)
    names = {name for name, yes in zip(prior.modules.names, learned.tolist(), strict=True) if yes}
    return found and [scale for scale in found if scale.module in names]


def warn_of_collapse(fit: Fit) -> None:
    """Name the modules whose learned scale the data hardly tell from 0.

    Where that is not looked for, those whose scale fell below a hundredth of where it started. A
    scale of exactly 0 is not learned but stated (`CompletePooling`).
    """
    name, found = fit.strategy.name, undetermined_of(fit)
    if found is None:
        _warn_of_small(name, fit.state.meta.origin, fit.prior)
    if not found:
        return
    said = [f"{s.module!r} ({s.scale:.2g}: {s.down:+.1g} and {s.up:+.1g} nats)" for s in found]
    raised = any(s.up > HARDLY for s in found)
    pruned = (
        ". Where ten times as much is better, the data did not make it small: a diagonal q prunes "
        "what q='full' keeps, and query losses of few rows what LaplaceEvidence keeps"
    )
    warnings.warn(
        f"{name}: the data hardly tell the scale of {_some(said)} from 0; the nats are what the "
        "log evidence of all tasks gains at a tenth of it and at ten times. Posteriors of tasks "
        "are given this value, and their standard deviations there are too small if the truth is "
        "larger. Integrate over the scales (NestedLaplace, PyroNUTS), give more tasks, or name the "
        "site in shared= if tasks need not differ there" + pruned * raised,
        UndeterminedScale,
        stacklevel=3,
    )


def still_improving(history: pd.DataFrame) -> str:
    """How much the objective fell in the last tenth of a run, as the end of a sentence."""
    losses = history["loss"].to_numpy() if len(history) else np.zeros(0)
    tenth = max(len(losses) // 10, 1)
    if len(losses) < 2 * tenth:
        return ""
    fell = float(losses[-2 * tenth : -tenth].mean() - losses[-tenth:].mean())
    if fell <= 0:
        return ", and its objective did not fall in the last tenth of them"
    return f", still improving by {fell:.2g} nats per task in the last tenth of them"


def warn_of_limit(name: str, reason: str) -> None:
    """Say that a run was ended by its limit."""
    warnings.warn(f"{name} did not converge: {reason}", NotConverged, stacklevel=3)


def warn_of_skipped(name: str, skipped: Sequence[int], names: Sequence[str]) -> None:
    """Count and name a stream's tasks that were left out."""
    some = ", ".join(map(repr, names[:5])) + f" and {len(names) - 5} more" * (len(names) > 5)
    warnings.warn(
        f"{name}: {skipped[0]} of the stream's {skipped[1]} tasks were skipped, since "
        f"their loss or its gradient was not finite{f': {some}' if names else ''}. Check their "
        "data, or tighten the model's priors",
        RuntimeWarning,
        stacklevel=3,
    )


def _warn_of_small(name: str, start: GaussianPrior, end: GaussianPrior) -> None:
    ratio = (end.log_scale - start.log_scale).exp()
    small = (ratio < _COLLAPSED) & (ratio > 0)
    if not bool(small.any()):
        return
    modules = zip(end.modules.names, small.tolist(), strict=True)
    names = [repr(module) for module, collapsed in modules if collapsed]
    warnings.warn(
        f"{name}: the scale of {_some(names)} fell to {float(ratio[small].max()):.1g} of its "
        "start or less, so that new tasks hardly adapt in it; fit.shrinkage() says what that "
        "costs. Tasks may not differ there (name the site in shared=); or there are too few of "
        "them to tell, where a point estimate of a scale goes to 0 and PyroNUTS does not; or q is "
        "diagonal and prunes what q='full' keeps",
        UndeterminedScale,
        stacklevel=4,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def _asks_no_reduction(stats: Mapping[str, Tensor]) -> bool:
    return "converged" in stats or "residual" not in stats
