"""What a run says of itself: beside the bar, and at the end with the mend."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import case_of
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import (
    CG,
    IMAML,
    CompletePooling,
    Density,
    GaussianPrior,
    GradientDescent,
    Implicit,
    LaplaceEvidence,
    NotConverged,
    Tasks,
    TaskSource,
    fit,
)
from varmeta.inference import determined
from varmeta.inference.diagnostics import by_task, note, warn_of, warn_of_collapse

GOOD = {
    "converged": torch.tensor([True, True, True]),
    "grad_reduction": torch.tensor([1e-9, 1e-9, 1e-9]),
    "negative_curvature": torch.tensor([False, False, False]),
    "residual": torch.tensor([1e-6, 1e-6, 1e-6]),
}


def test_nothing_to_say() -> None:
    warn_of("IMAML", GOOD)
    warn_of("IMAML", {})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("converged", [True, False, False], "2 of 3 tasks did not reach .* max_iterations"),
        ("negative_curvature", [True, False, False], "1 of 3 tasks met negative .*gauss_newton"),
        ("residual", [0.2, 0.3, 0.05], "2 of 3 tasks ended the implicit solve .* solver's max_it"),
    ],
)
def test_each_finding_and_its_mend(key: str, value: list[float], said: str) -> None:
    with pytest.warns(RuntimeWarning, match="IMAML: " + said):
        warn_of("IMAML", GOOD | {key: torch.tensor(value)})


@pytest.mark.filterwarnings("ignore::varmeta.NotConverged")
def test_tasks_that_were_not_visited_are_not_counted() -> None:
    """Of eight tasks a run of three steps of one sees three, and all of these converged."""
    case = case_of(LinearGaussian.random(3, num_tasks=8, dim=2))
    given = IMAML(steps=3, folds=None, learn_scale=False), case.density, case.tasks.support
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", NotConverged)
        done = fit(*given, batch_size=1)
    assert int(done.stats["visited"].sum()) == int(done.stats["converged"].sum()) == 3
    bad = {"converged": torch.tensor([True, False, False]), "visited": torch.arange(3) < 2}
    with pytest.warns(RuntimeWarning, match="1 of 2 tasks that were visited did not reach"):
        warn_of("IMAML", bad)


@pytest.mark.filterwarnings("ignore::varmeta.NotConverged")
def test_folds_of_a_task_are_one_task() -> None:
    """Four tasks in two folds each."""
    case = case_of(LinearGaussian.random(3, num_tasks=4, dim=2))
    few = IMAML(steps=2, folds=2, minimiser=GradientDescent(1e-5, 2, tolerance=1e-9))
    with pytest.warns(RuntimeWarning, match="4 of 4 tasks did not reach"):
        done = fit(few, case.density, case.tasks.unsplit)
    assert len(done.stats["converged"]) > 4


def test_the_worst_fold_speaks_for_its_task() -> None:
    seen, names = ["a [0]", "a [1]", "b [0]", "b [3]"], ["a", "b"]
    stats = {
        "converged": torch.tensor([True, False, True, False]),
        "residual": torch.tensor([0.1, 0.5, 0.2, torch.nan]),
        "visited": torch.tensor([True, True, True, False]),
    }
    found = by_task(stats, seen, names)
    assert found["converged"].tolist() == [False, True]  # that of b that failed was never made
    assert found["residual"].tolist() == pytest.approx([0.5, 0.2])
    assert found["visited"].tolist() == [True, True]
    assert by_task(stats, ["u", "v", "w", "x"], names) == {}


def test_a_budget_that_is_too_small_says_so() -> None:
    """Without a tolerance nothing is called converged; the gradient that is left tells."""
    case = case_of(LinearGaussian.random(3, num_tasks=4, dim=3))
    few = GradientDescent(1e-4, 2, tolerance=0)
    strategy = IMAML(steps=2, minimiser=few, adjoint=Implicit(CG(1, tolerance=0)))
    with pytest.warns(RuntimeWarning, match="4 of 4 tasks kept more than a tenth") as seen:
        result = fit(strategy, case.density, case.tasks)
    assert any("ended the implicit solve" in str(w.message) for w in seen)
    assert "converged" not in result.stats
    assert {"residual", "negative_curvature"} <= set(result.history.columns)


def test_unrolled_steps_need_not_reduce_the_gradient() -> None:
    """Their derivative is that of the steps, whatever they reached."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of("MAML", {"grad_reduction": torch.tensor([0.9, 0.9])})


def test_the_note_beside_the_bar() -> None:
    row = {"loss": 1.5, "residual": 0.02, "converged": 3.0, "negative_curvature": 1.0}
    assert note(row, 5) == "loss 1.5  residual 2.0e-02  2 not converged  1 negative curvature"
    assert note({"loss": 1.5}, 5) == "loss 1.5"


def alike(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Level and slope; the slope will be the same in every task."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(level + slope * x[:, 0], 0.1), obs=y)


def test_a_collapsed_scale_is_named() -> None:
    """Only the slope's, and not where it is held fixed or pooled on purpose."""
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    tasks = Tasks.from_list([(x, level + x[:, 0]) for level in (-1.0, 0.0, 1.0, 2.0)])
    density = Density(alike, tasks)
    with pytest.warns(RuntimeWarning, match="tell the scale of 'slope' .* name the site in shar"):
        done = fit(LaplaceEvidence(steps=60, learning_rate=0.3), density, tasks)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(RuntimeWarning, match="the scale of 'slope' fell to .*name the site in shar"),
    ):
        patch.setattr(determined, "MAX_MODULES", 1)  # too many to ask the evidence
        warn_of_collapse(done)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(LaplaceEvidence(steps=60, learning_rate=0.3, learn_scale=False), density, tasks)
        fit(CompletePooling(), density, tasks)


@pytest.mark.parametrize("law", ["half-normal", "half-cauchy", None])
def test_on_a_stream_the_hyperprior_counts_nothing_and_that_is_said(
    law: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing: the fit is that of a flat belief, bit for bit. A law that was chosen: a warning."""
    case = case_of(LinearGaussian.random(3, num_tasks=4))
    source = TaskSource(lambda g: case.tasks)
    kind: Any = {"hyperprior": False} if law is None else {"scale_law": law}
    flat, prior = (
        GaussianPrior.from_density(case.density, **k) for k in ({"hyperprior": False}, kind)
    )
    chosen = law == "half-cauchy"
    with caplog.at_level(logging.INFO, "varmeta"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        done = fit(IMAML(steps=2), case.density, source, prior=prior, progress=False)
        same = fit(IMAML(steps=2), case.density, source, prior=flat, progress=False)
    assert torch.equal(done.prior.log_scale, same.prior.log_scale)
    assert sum("counts 0" in str(w.message) for w in seen) == chosen
    assert sum("counts 0" in r.getMessage() for r in caplog.records) == (law == "half-normal")
