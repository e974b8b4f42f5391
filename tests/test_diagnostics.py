"""What a run says of itself: beside the bar, and at the end with the mend."""

from __future__ import annotations

import warnings

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
    GradientDescent,
    Implicit,
    LaplaceEvidence,
    Tasks,
    fit,
)
from varmeta.inference.diagnostics import note, warn_of

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
    with pytest.warns(RuntimeWarning, match="the scale of 'slope' fell to .*name the site in shar"):
        fit(LaplaceEvidence(steps=60, learning_rate=0.3), density, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(LaplaceEvidence(steps=60, learning_rate=0.3, learn_scale=False), density, tasks)
        fit(CompletePooling(), density, tasks)
