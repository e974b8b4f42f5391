"""Shrinkage: which modules of a model adapt from task to task, and which tasks share.

The prior's learned scales say how far tasks are expected to differ in each module (Chen, Friesen,
Behbahani, Doucet, Budden, Hoffman & de Freitas, 2019, Modular Meta-Learning with Shrinkage). What
the tasks then do is read off their posteriors: how far they move, and what that is worth to them.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.tasks import Tasks, TaskSource

if TYPE_CHECKING:
    from varmeta.inference.fit import Fit

MOST_MODULES = 1000  # that are looked at one by one
_WIDTH = 110


@dataclass(frozen=True, eq=False)
class Shrinkage:
    """What `fit.shrinkage()` found; printed as a table.

    A module is *adapted* if the tasks would miss it: if putting it back to θ0 in every task, all
    else as it is, raised their own negative log-likelihood by `least` nats per task or more, on
    average. Otherwise it is *shared*: one value for all tasks does. The learned scale alone does
    not decide, since what is a large one depends on the units of the coordinate and on the data.

    Attributes:
        strategy: name of what ran.
        least: nats per task.
        table: one row per module, with columns `module`; `size`, its coordinates; `scale`, the
            learned standard deviation of a task's coordinates around θ0 (with a low-rank prior the
            root mean square over the module's coordinates of the whole of Σ's); `start`, what it
            was before learning (a strategy that learns no scales, as `NoPooling`, leaves it there;
            `CompletePooling` states 0); `movement`, the root mean square over tasks and
            coordinates of θ̄_i − θ0, θ̄_i the posterior means on the unconstrained scale;
            `relative`, that over the root mean square of the module's θ0, infinite where θ0 is 0;
            `cost`, nats per task, by how much the tasks' negative log-likelihood at θ̄_i rises when
            this module alone is put back to θ0. The other modules stay where they are: an upper
            bound where they could make up for it. `verdict`, `"adapted"` or `"shared"`.
        scales_path: `[steps, M]`, `fit.scales`: the scales after each step, where there are any.
    """

    strategy: str
    least: float
    table: pd.DataFrame
    scales_path: Tensor | None = None

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, markup=False)
        console.print(self.rich_table())
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def rich_table(self) -> Table:
        """The table for reading."""
        adapted = int((self.table["verdict"] == "adapted").sum())
        out = Table(
            title=f"{self.strategy}: {adapted} of {len(self.table)} modules adapt to a task",
            title_justify="left",
            caption="scale: learned sd of tasks around θ0; movement: root mean square of tasks' "
            "means − θ0, and relative to θ0; cost: nats per task that putting the module back to "
            f"θ0 takes, adapted from {self.least:g}",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for heading in self.table.columns:
            left = heading in ("module", "verdict")
            wraps = heading == "module"  # a long name, and no number, gives way
            out.add_column(heading, justify="left" if left else "right", no_wrap=not wraps)
        for row in self.table.to_dict("records"):
            out.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        return out


def find_shrinkage(
    fit: Fit, tasks: Tasks | None, posterior: TaskPosterior | None, least: float
) -> Shrinkage:
    """What `fit.shrinkage` returns; see there."""
    if not least > 0:
        raise ValueError(f"least must be positive, got {least}; it is in nats per task")
    if tasks is None and isinstance(fit.tasks, TaskSource):
        raise ValueError("a stream's tasks are not kept; give shrinkage the tasks to look at")
    prior, start = fit.prior, fit.state.meta.origin
    modules = prior.modules
    if len(modules) > MOST_MODULES:
        raise ValueError(
            f"the prior has {len(modules)} modules, and shrinkage looks at no more than "
            f"{MOST_MODULES} one by one; make them larger: GaussianPrior.from_density(scales=...)"
        )
    if posterior is None:
        posterior = fit.posterior() if tasks is None else fit.adapt(tasks)
    rows: Tasks = fit.tasks if tasks is None else tasks  # type: ignore[assignment]
    if posterior.names != rows.names:
        raise ValueError(
            f"posterior is of {len(posterior.names)} tasks, {posterior.names[0]!r} first, which "
            "are not those looked at; pass the posterior of these, or leave it out"
        )
    with torch.no_grad():
        moved = (posterior.mean - prior.loc).square().mean(0)
        movement, size = _rms(moved, prior), _rms(prior.loc.square(), prior)
        relative = torch.where(movement == 0, 0.0, movement / size)
        columns = {
            "scale": module_scales(prior),
            "start": module_scales(start),
            "movement": movement,
            "relative": relative,
            "cost": _costs(prior, rows, posterior),
        }
    table = modules.table().assign(**{k: v.cpu().double().numpy() for k, v in columns.items()})
    table["verdict"] = ["adapted" if cost >= least else "shared" for cost in table["cost"]]
    return Shrinkage(fit.strategy.name, least, table, fit.scales)


def scales_path(path: list[Tensor], start: GaussianPrior, steps: int) -> Tensor | None:
    """`[steps, M]` or None, as `fit.scales`; `path` says how far each log scale was moved."""
    if not path:
        return None
    moved = torch.stack(path)
    if not bool(moved[:-1].any()):
        return None
    return pad((start.log_scale + moved).exp(), (0, 0, steps - len(moved), 0), value=math.nan)


def module_scales(prior: GaussianPrior) -> Tensor:
    """`[M]`, each module's standard deviation, root mean square with a low-rank part."""
    low_rank = 0 if prior.factor is None else prior.factor.square().sum(-1)
    return _rms((prior.scale**2 + low_rank).detach(), prior)


def _rms(squares: Tensor, prior: GaussianPrior) -> Tensor:
    """Root of each module's mean: `[D]` to `[M]`."""
    count = prior.log_scale.shape[-1]
    total = squares.new_zeros(count).index_add(0, prior.groups, squares)
    return (total / prior.groups.bincount(minlength=count)).sqrt()


def _costs(prior: GaussianPrior, tasks: Tasks, posterior: TaskPosterior) -> Tensor:
    """`[M]`, nats per task: f_i at θ̄_i with one module at θ0, less f_i at θ̄_i, mean over tasks."""
    theta, phi = posterior.mean, posterior.shared
    phi = phi if phi.dim() == 1 else phi.mean(0)  # draws of φ: at their mean, as θ
    loss = posterior.density.negative_log_likelihood
    kept = loss(theta, tasks, phi)
    return torch.stack(
        [
            (loss(torch.where(prior.groups == m, prior.loc, theta), tasks, phi) - kept).mean()
            for m in range(prior.log_scale.shape[-1])
        ]
    )
