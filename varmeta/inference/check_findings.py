"""What `check_gradient` says: from numbers to sentences that name the mend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from varmeta.inference.prox import Detached, OneStep, Unrolled

OWN, EXACT = "own objective", "exact minimum"
_SOLVED = f"{EXACT}: dense solve"
WIDE = "the same in float64"
_FAR = 1e-5  # prior standard deviations: further from the minimum is not solved
_FLAT = 1e-12  # of the largest curvature: below is no curvature at all


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that the findings are drawn from.

    Attributes:
        strategy: the one checked.
        dtype: that of the gradient checked.
        tolerance: relative error up to which two gradients are the same.
        rows: of the largest task.
        table: see `GradientCheck`.
        tasks: see `GradientCheck`.
        rough: per task, finite differences with a whole and a half step disagree.
        leaps: per task, and θ* moves to another minimum between them.
        gap: by how much of their size the exact minimum's finite differences with a whole and a
            half step disagree; extrapolated from both, they are off by less.
    """

    strategy: Any
    dtype: torch.dtype
    tolerance: float
    rows: int
    table: pd.DataFrame
    tasks: pd.DataFrame
    rough: list[bool]
    leaps: list[bool]
    gap: float

    @property
    def adjoint(self) -> Any:
        """How θ* is differentiated; None if the strategy does not say."""
        return getattr(self.strategy, "adjoint", None)

    def error(self, reference: str) -> float:
        """The largest error of any block, against all references whose name starts so."""
        return max((row["error"] for row in self.against(reference)), default=0.0, key=_badness)

    def against(self, reference: str) -> list[dict[str, Any]]:
        """The rows of `table` with the references whose name starts so."""
        rows: list[Any] = self.table.to_dict("records")
        return [row for row in rows if row["reference"].startswith(reference)]

    @property
    def agrees_with_solve(self) -> bool:
        """The implicit function theorem with a dense solve at the minimum gives this gradient."""
        return bool(self.against(_SOLVED)) and self.error(_SOLVED) <= self.tolerance

    def column(self, name: str) -> np.ndarray[Any, Any] | None:
        """One column of `tasks`."""
        return self.tasks[name].to_numpy() if name in self.tasks else None


def conclude(evidence: Evidence) -> tuple[bool, list[str]]:
    """Whether all is well, and the findings."""
    e = evidence
    # Where the own objective is too rough to have a slope, the exact minimum's is what is wanted.
    known = EXACT if any(e.rough) and not any(e.leaps) and e.error(EXACT) > 0 else OWN
    bends = [*_bends(e)]
    if bends:  # then differences are what is wrong, and no reason to doubt the gradient
        known = _SOLVED
    agrees = e.error(known) <= e.tolerance
    causes = [*_saddles(e), *_leaps(e)]
    ok = agrees and not causes
    causes += bends or [*_rough(e)]
    causes += [*_by_design(e), *_unsolved(e, agrees), *_solver(e), *_rounding(e)]
    if not agrees and not causes:
        causes = [_unexplained(e)]
    return ok, [_verdict(e, known, agrees), *causes]


def _unexplained(e: Evidence) -> str:
    adjoint = type(e.adjoint).__name__
    if e.agrees_with_solve:
        return (
            f"the adjoint ({adjoint}) is right, since a dense solve at the minimum gives the same "
            f"gradient: what {e.strategy.name}'s losses return is not its loss_at at θ*. Compare "
            "these two"
        )
    return (
        f"nothing else that was looked at explains it: the adjoint ({adjoint}) is wrong. Compare "
        "it with Implicit()"
    )


def _verdict(e: Evidence, known: str, agrees: bool) -> str:
    what = "its own objective" if known == OWN else "the exact minimum's objective"
    if known == _SOLVED:
        what += " by a dense solve"
    if agrees:
        return f"the gradient is that of {what} (relative error {e.error(known):.1g})"
    worst = max(e.against(known), key=lambda row: _badness(row["error"]))
    error, cosine, block = worst["error"], worst["cosine"], worst["block"]
    if not np.isfinite(error):
        return "the gradient is not finite: look for a square root or a division at 0 in the model"
    how = f"cosine {cosine:.3g}"
    if np.isnan(cosine):
        how = "it is 0" if error <= 1 and worst["norm"] > 0 else "it should be 0"
    elif cosine < -0.99:
        how = f"it points the other way, cosine {cosine:.3g}"
    where = "" if block == "all" else f" in {block}"
    return f"the gradient is not that of {what}: relative error {error:.2g}{where}, {how}"


def _saddles(e: Evidence) -> Iterator[str]:
    low, high = e.column("curvature_min"), e.column("curvature_max")
    if low is not None and high is not None:
        bad, what = low < -_FLAT * np.abs(high), "the Hessian is indefinite at θ*"
        flat = ~bad & (low <= _FLAT * high)
        if flat.any():
            yield (
                f"{_count(e, flat)}: the Hessian is singular at θ*, which is not one point but a "
                "line of them: fix the scale of what the data leave open by the prior"
            )
    else:  # too many coordinates: what the solve happened to meet
        negative = e.column("negative_curvature")
        bad = np.zeros(len(e.tasks), bool) if negative is None else negative.astype(bool)
        what = "the adjoint's solve met negative curvature"
    if bad.any():
        yield (
            f"{_count(e, bad)}: {what}, it is a saddle and no minimum, and its derivative means "
            "nothing: start elsewhere (a θ0 off the point of symmetry), or give the prior a "
            "smaller scale"
        )


def _leaps(e: Evidence) -> Iterator[str]:
    leaps = np.array(e.leaps)
    if leaps.any():
        yield (
            f"{_count(e, leaps)}: θ* jumps to another minimum within the finite differences' step "
            "(whole and half steps disagree). The implicit derivative holds along one branch only "
            "and does not see the jump: leave the task out of this check, or use Stochastic, whose "
            "gradient counts how often each minimum is found"
        )


def _bends(e: Evidence) -> Iterator[str]:
    """Where the dense solve and differences of the same exact objective cannot both be right.

    Differences that agree among themselves better than with the solve are right: then the loss at
    θ* has another slope than the solve takes it to have.
    """
    reference = f"{EXACT}: differences"
    off, low = e.error(reference), e.column("curvature_min")
    if not e.agrees_with_solve or off <= e.tolerance or low is None:
        return
    if any(row["error"] > e.gap for row in e.against(reference) if row["block"] == "all"):
        return
    least = int(low.argmin())
    yield (
        f"finite differences are off by {off:.2g} here, and not the gradient, which a dense solve "
        "gives too: θ* bends within their step, as it does near a fold, where the minimum vanishes "
        f"(the smallest curvature at θ* is {low[least]:.2g}, in task {e.tasks['task'][least]})"
    )


def _rough(e: Evidence) -> Iterator[str]:
    rough = np.array(e.rough) & ~np.array(e.leaps)
    if rough.any():
        yield (
            f"{_count(e, rough)}: the objective is rough on the scale of the finite differences "
            "(whole and half steps disagree): the minimiser stops after another number of steps. "
            "Lower its tolerance, or set it to 0 for a fixed number of steps"
        )


def _by_design(e: Evidence) -> Iterator[str]:
    if e.error(OWN) <= e.tolerance:
        return
    adjoint = e.adjoint
    if isinstance(adjoint, Unrolled) and adjoint.first_order:
        left = "takes the inner gradients as constants: use MAML or Unrolled()"
    elif getattr(e.strategy, "gradient", "") == "envelope":
        if not _far(e).any():  # then the theorem holds, and it is something else
            return
        left = (
            "has no derivative through θ*, by the envelope theorem, which wants θ* to be solved "
            "for: solve the inner problem, or use gradient='implicit'"
        )
    elif isinstance(adjoint, Detached):
        left = "has no derivative through θ* at all: use Implicit()"
    elif isinstance(adjoint, OneStep):
        left = (
            f"puts {adjoint.step_size:g}·I for the inverse Hessian, which is close only where the "
            "problem is well conditioned: use Implicit()"
        )
    elif getattr(adjoint, "curvature", "hessian") != "hessian":
        left = "leaves out the model's own second derivatives: use curvature='hessian'"
    else:
        return
    cosine = next(row["cosine"] for row in e.against(OWN) if row["block"] == "all")
    yield (
        f"{e.strategy.name} gives another gradient by design (cosine {cosine:.3g}): its adjoint "
        f"{type(adjoint).__name__} {left}"
    )


def _unsolved(e: Evidence, agrees: bool) -> Iterator[str]:
    distance, norm, far = e.column("distance"), e.column("grad_norm"), _far(e)
    if distance is None or not e.error(EXACT) > e.tolerance or not far.any():
        return
    steps = getattr(e.strategy.minimiser, "max_iterations", None)
    now = "" if steps is None else f" (now {steps})"
    how = "" if norm is None else f", ‖∇E‖ up to {norm[far].max():.2g}"
    if agrees and isinstance(e.adjoint, Unrolled):
        yield (
            "it is the exact gradient of the steps as they are run, and differs from that of the "
            f"exact minimum (relative error {e.error(EXACT):.2g}); if you mean the latter, take "
            "more steps"
        )
    yield (
        f"{_count(e, far)}: the inner problem is not solved (up to {distance[far].max():.2g} prior "
        f"standard deviations from the minimum{how}): raise max_iterations{now}, lower the "
        "tolerance, or change the step size"
    )


def _far(e: Evidence) -> np.ndarray[Any, Any]:
    """Per task, whether the inner loop ended away from the minimum; False where none is known."""
    distance = e.column("distance")
    return np.zeros(len(e.tasks), bool) if distance is None else distance > _FAR


def _solver(e: Evidence) -> Iterator[str]:
    residual, negative = e.column("residual"), e.column("negative_curvature")
    if residual is None:
        return
    if negative is not None:  # stopped for another reason than its budget
        residual = np.where(negative.astype(bool), 0.0, residual)
    if not residual.max() > e.tolerance:
        return
    solver = getattr(e.adjoint, "solver", None)
    products = getattr(solver, "max_iterations", getattr(solver, "terms", None))
    after = "" if products is None else f" at {products} products"
    yield (
        f"{_count(e, residual > e.tolerance)}: {type(solver).__name__} stopped{after} with "
        f"residual {residual.max():.2g}: raise its budget, give it a preconditioner "
        "(Nystrom), or use Cholesky where there are few coordinates"
    )


def _rounding(e: Evidence) -> Iterator[str]:
    error = e.error(WIDE)
    if error > 0.1 * e.tolerance:
        name = str(e.dtype).removeprefix("torch.")
        yield (
            f"{name}: the loss of a task is a sum over up to {e.rows} rows; its rounding, and the "
            f"looser tolerance that this allows, cost {error:.1g} of the gradient: use float64 "
            "(tasks.to(torch.float64), and a density and prior made from them)"
        )


def _badness(error: float) -> float:
    return error if np.isfinite(error) else float("inf")


def _count(e: Evidence, which: np.ndarray[Any, Any]) -> str:
    """`"2 of 6 tasks (north, south)"`."""
    names = [str(n) for n, w in zip(e.tasks["task"], which, strict=True) if w]
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} of {len(e.tasks)} tasks ({shown})"
