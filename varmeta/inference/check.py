"""check_gradient: is a strategy's meta-gradient the one that you want, and if not, why not?

A wrong adjoint trains: the loss falls, more slowly and to another place, and nothing is said. Here
the gradient is set beside others that are computed in other ways, all of them in float64.
"""

from __future__ import annotations

import copy
import inspect
import io
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from varmeta.inference.base import Strategy
from varmeta.inference.check_findings import EXACT, OWN, WIDE, Evidence, conclude
from varmeta.inference.check_references import (
    InnerProblem,
    compare_blocks,
    differences,
    directions,
    loss_gradient,
)
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.point import Point
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

_WIDTH = 140
_WORDS = ("reference", "block", "task")


@dataclass(frozen=True, eq=False, repr=False)
class GradientCheck:
    """What `check_gradient` found; print it.

    Attributes:
        strategy: name of the strategy.
        ok: the gradient is that of the strategy's own objective, at a minimum of each task.
        findings: in words, what was found and what mends it.
        table: one row per reference and block of parameters: `error`, ‖gradient − reference‖ /
            ‖reference‖; `cosine` between the two; `norm` of the reference, nats per unit of the
            prior (standard deviations for θ0, 1 for log scales, the shared latents' own).
        tasks: one row per task: `grad_norm` ‖∇E‖ where the inner loop stopped and `iterations` it
            took, `converged`, the adjoint's `residual` and `negative_curvature`; and where there is
            an exact minimum, the `distance` to it in units of the prior's standard deviations and
            the smallest and largest eigenvalue of ∇²E there, `curvature_min` and `curvature_max`.
        gradient: the gradient that was checked, by block, in the units of `table`.
        tolerance: error up to which two gradients count as the same.
    """

    strategy: str
    ok: bool
    findings: tuple[str, ...]
    table: pd.DataFrame
    tasks: pd.DataFrame
    gradient: dict[str, Tensor]
    tolerance: float

    def rich_tables(self) -> list[Table]:
        """For a rich console: references, and tasks."""
        verdict = "ok" if self.ok else "NOT OK"
        return [
            _rich(self.table, f"Gradient of {self.strategy}: {verdict}"),
            _rich(self.tasks, "Tasks"),
        ]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, markup=False)
        references, tasks = self.rich_tables()
        console.print(references)
        for finding in self.findings:
            console.print(f"- {finding}", markup=False, highlight=False)
        console.print(tasks)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return str(self)


def check_gradient(
    strategy: Strategy,
    density: Density,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    shared: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> GradientCheck:
    """Compare a strategy's meta-gradient with references that are found in other ways.

    The gradient is that of `strategy.losses(density, prior, shared, tasks)`, summed over tasks, in
    θ0, the log scales, the prior's factor and φ, in the data type given. Beside it, in float64:

    - finite differences of the same objective, the adaptation run again for each: along each
      coordinate where there are few, else along some random directions in each block;
    - the same computation, where the given data type is another;
    - the strategy's own steps unrolled, where its minimiser is of first order;
    - the same three for the *exact* minimum, whatever budget the strategy has: a dense solve of
      the implicit function theorem at a tight θ* (up to 200 coordinates), finite differences along
      the branch of θ*, and the steps unrolled to convergence.

    A few hundred adaptations of all tasks: give it some tasks, not all of them.

    Args:
        strategy: with `losses` and no random numbers: `IMAML`, `MAML`, `FOMAML`, `MetaSGD`,
            `SigmaIMAML`, `SigmaMAML`, `AmortisedVariational`, `LaplaceEvidence` (of these two the
            objective is the bound; with Laplace's q up to 200 coordinates).
        density: the model.
        prior: N(θ0, Σ), where the gradient is taken.
        tasks: with a support and a query part; without, all rows are both.
        shared: φ `[P]`; `density.shared_init` if None.
        seed: of the random directions.
        tolerance: relative error up to which two gradients count as the same.

    Raises:
        ValueError: a strategy that has no gradient to check, or a model that cannot be run in
            float64.

    Example:
        >>> import pyro, pyro.distributions as dist, varmeta
        >>> def line(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
        >>> pairs = [(x, s * x[:, 0] + 0.1 * x[:, 0].cos()) for s in (0.5, 1.0, 2.0)]
        >>> tasks = varmeta.Tasks.from_list(pairs).split(0.5)
        >>> density = varmeta.Density(line, tasks)
        >>> prior = varmeta.GaussianPrior.from_density(density)
        >>> varmeta.check_gradient(varmeta.IMAML(), density, prior, tasks).ok
        True
        >>> few = varmeta.GradientDescent(0.01, max_iterations=3, tolerance=0)
        >>> check = varmeta.check_gradient(varmeta.IMAML(minimiser=few), density, prior, tasks)
        >>> check.ok, "raise max_iterations (now 3)" in check.findings[1]
        (False, True)
    """
    _check_strategy(strategy, density)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is a relative error between 0 and 1, got {tolerance}")
    shared = density.shared_init if shared is None else shared
    given = Point.of(density, prior, shared)
    gradient, info = _gradient(strategy, density, given, tasks)
    wide, wide_tasks = _in_float64(density, tasks, given.dtype)
    point = given.to(torch.float64)

    def objective(x: Tensor) -> Tensor:
        with torch.no_grad():
            return _losses(strategy, wide, *point.moved(x), wide_tasks)[0]

    basis = directions(point, seed)
    own = differences(objective, basis)
    rounding = 1e-12 / tolerance * float(own.losses.abs().sum())
    table: list[dict[str, Any]] = []

    def add(name: str, reference: Tensor) -> None:
        along = basis @ gradient.to(basis)
        for block, (error, cosine, norm) in compare_blocks(
            point, basis, along, reference, rounding
        ).items():
            row = {"reference": name, "block": block, "error": error}
            table.append(row | {"cosine": cosine, "norm": norm})

    add(f"{OWN}: differences", own.values.sum(1))
    if given.dtype != torch.float64:
        add(WIDE, basis @ _gradient(strategy, wide, point, wide_tasks)[0])
    rough = own.rough(tolerance)
    stats, leaps, gap = _stats(info, len(tasks)), rough, 0.0
    inner = InnerProblem.of(strategy, wide, point, wide_tasks)
    if inner is not None:
        leaps = inner.leaps(rough, own, basis)
        references = {f"{OWN}: unrolled": inner.unrolled_as_run()}
        if inner.has_minimum:
            references |= {
                f"{EXACT}: dense solve": inner.dense(),
                f"{EXACT}: unrolled": inner.unrolled_to_the_end(),
            }
            stats |= inner.stats()
            exact = differences(inner.exact_losses, basis)
            gap = float(exact.gap.sum(1).norm() / exact.values.sum(1).norm())
            add(f"{EXACT}: differences", exact.values.sum(1))
        for name, reference in references.items():
            if reference is not None:
                add(name, basis @ reference)
    evidence = Evidence(
        strategy=strategy,
        dtype=given.dtype,
        tolerance=tolerance,
        rows=int(tasks.num_rows.max()),
        table=pd.DataFrame(table),
        tasks=pd.DataFrame({"task": tasks.names, **{k: v.tolist() for k, v in stats.items()}}),
        rough=rough.tolist(),
        leaps=leaps.tolist(),
        gap=gap,
    )
    ok, findings = conclude(evidence)
    return GradientCheck(
        strategy=strategy.name,
        ok=ok,
        findings=tuple(findings),
        table=evidence.table,
        tasks=evidence.tasks,
        gradient=given.split(gradient),
        tolerance=tolerance,
    )


def _check_strategy(strategy: Any, density: Density) -> None:
    """Raise a ValueError unless its steps go along the gradient of `losses`, without noise."""
    kind = type(strategy)
    works = (
        "check_gradient works with IMAML, MAML, FOMAML, MetaSGD, SigmaIMAML, SigmaMAML, "
        "AmortisedVariational and LaplaceEvidence"
    )
    if not hasattr(kind, "losses"):
        raise ValueError(
            f"strategy is {kind.__name__}, which has no method losses(density, prior, shared, "
            f"tasks) and so no meta-gradient to check; {works}"
        )
    _, *arguments = inspect.signature(kind.losses).parameters.values()
    wanted = [a.name for a in arguments if a.default is a.empty][4:]
    if wanted:
        raise ValueError(
            f"strategy is {kind.__name__}, whose losses want {', '.join(wanted)} as well: its "
            f"gradient is random and has no finite differences; {works}"
        )
    if getattr(strategy, "q", "") == "laplace" and not strategy.logdet.is_dense(density.dim):
        raise ValueError(
            f"strategy is {kind.__name__}, whose log-determinants come from random probes here: "
            "its gradient is that of their mean, and no finite difference of one draw is. Check it "
            f"with logdet=LogDet() on a model of at most {MAX_DIM} coordinates (this one has "
            f"{density.dim})"
        )
    if getattr(strategy, "loc_from", "") == "joint":
        raise ValueError(
            f"strategy is {kind.__name__} with loc_from='joint': θ0 and the scales follow two "
            "objectives, and no function has both as its gradient. Check it with "
            "loc_from='validation' (SigmaIMAML)"
        )
    # A subclass that learns from other losses than those that it has inherited (Reptile).
    if not issubclass(_owner(kind, "losses"), _owner(kind, "task_losses")):
        raise ValueError(
            f"strategy is {kind.__name__}, whose steps do not follow the gradient of its losses; "
            f"{works}"
        )


def _owner(kind: type, name: str) -> type:
    """The class that a method comes from; `object` for a method that there is not."""
    return next((c for c in kind.__mro__ if name in vars(c)), object)


def _losses(
    strategy: Any, density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks
) -> tuple[Tensor, Any]:
    """g_i `[T]` nats, and the report of how θ* was found."""
    losses, info = strategy.losses(density, prior, shared, tasks)
    return losses, info


def _gradient(
    strategy: Strategy, density: Density, point: Point, tasks: Tasks
) -> tuple[Tensor, Any]:
    """The strategy's own gradient in x `[n]`, and its report once backward has run."""
    reports = []

    def losses(prior: GaussianPrior, shared: Tensor) -> Tensor:
        out, info = _losses(strategy, density, prior, shared, tasks)
        reports.append(info)
        return out

    return loss_gradient(point, losses), reports[0]


def _in_float64(density: Density, tasks: Tasks, dtype: torch.dtype) -> tuple[Density, Tasks]:
    """The same model and tasks in float64; as they are if that is what they are in."""
    if dtype == torch.float64:
        return density, tasks
    model, wide = density.model, tasks.to(torch.float64)
    if isinstance(model, torch.nn.Module):
        model = copy.deepcopy(model).to(torch.float64)
    shared = [site.name for site in density.shared_sites if site.role == "shared"]
    try:
        return Density(model, wide, shared=shared), wide
    except ValueError as error:
        raise ValueError(
            "density: its model cannot be run in float64, which the references need. Let its "
            "constants take the data type of x (torch.zeros(3, dtype=x.dtype), x.new_ones(3)). "
            f"It said: {error}"
        ) from error


def _stats(info: Any, count: int) -> dict[str, Tensor]:
    """What the strategy reports per task, `[T]` each."""
    stats = info.stats() if hasattr(info, "stats") else {}
    return {name: s.detach() for name, s in stats.items() if s.shape == (count,)}


def _rich(frame: pd.DataFrame, title: str) -> Table:
    table = Table(title=Text(title), box=SIMPLE_HEAD, title_justify="left")
    for name in frame:
        table.add_column(str(name), justify="left" if name in _WORDS else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in row))  # a name is no markup
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3g}"
    return str(value)
