"""check_gradient on strategies whose objective is a bound, at the mode and in its curvature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
from helpers import case_of, tensor
from linear_gaussian import LinearGaussian
from test_check_gradient import check, errors, said, shifted
from torch import Tensor

from varmeta import (
    AmortisedVariational,
    Density,
    GaussianPrior,
    GradientDescent,
    LaplaceEvidence,
    LogDet,
    SigmaIMAML,
    SigmaMAML,
    Tasks,
    check_gradient,
)

FEW = GradientDescent(0.01, max_iterations=3, tolerance=0)
MANY = GradientDescent(0.03, max_iterations=300, tolerance=1e-10)
BOUNDS: dict[str, AmortisedVariational] = {
    "envelope": AmortisedVariational(),
    "implicit": AmortisedVariational(gradient="implicit"),
    "query": AmortisedVariational(outside="query"),
    "laplace": LaplaceEvidence(),
    "laplace, query": AmortisedVariational(q="laplace", outside="query"),
}
every_bound = pytest.mark.parametrize("strategy", BOUNDS.values(), ids=BOUNDS)


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Log-concave, and its curvature changes with θ and φ."""
    level = pyro.sample("level", dist.Normal(tensor(0.0), 1.0))
    slope = pyro.sample("slope", dist.Normal(tensor(0.0), 0.5))
    bend = pyro.sample("bend", dist.Normal(tensor(0.0), 0.5))
    with pyro.plate("rows", len(x)):
        rate = (level + slope * x[:, 0] + bend * x[:, 0] ** 2).exp()
        return pyro.sample("y", dist.Poisson(rate), obs=y)


def problem() -> tuple[Density, GaussianPrior, Tasks]:
    x = tensor([[-1.0], [-0.4], [0.3], [0.8], [1.3]])
    pairs = [(x, tensor(y)) for y in ([0.0, 2.0, 1.0, 3.0, 5.0], [4.0, 1.0, 2.0, 0.0, 1.0])]
    tasks = Tasks.from_list(pairs).split(0.6)
    density = Density(counts, tasks, shared=["bend"])
    return density, GaussianPrior.from_density(density), tasks


@every_bound
def test_a_bound_agrees_with_every_reference_where_the_curvature_is_constant(
    strategy: AmortisedVariational,
) -> None:
    found = check(strategy, case_of(shifted(0, 6, 3), shared_noise=True))
    assert found.ok and len(found.findings) == 1
    assert float(found.table["error"].max()) < 1e-6
    assert errors(found, "exact minimum: dense solve") < 1e-7


def test_the_evidence_checked_is_that_of_all_rows() -> None:
    """Against the exact marginal likelihood of support and query rows."""
    drawn = shifted(0, 6, 3)
    whole = replace(
        drawn,
        designs=[np.concatenate(p) for p in zip(drawn.designs, drawn.query_designs, strict=True)],
        targets=[np.concatenate(p) for p in zip(drawn.targets, drawn.query_targets, strict=True)],
    )
    found = check(LaplaceEvidence(), case_of(drawn))
    exact = whole.log_marginal_grad()
    assert np.allclose(found.gradient["loc"], -exact.theta0 * np.exp(drawn.log_scale), rtol=1e-7)
    assert np.allclose(found.gradient["log_scale"], -exact.log_scale, rtol=1e-7)


@every_bound
def test_and_where_it_is_not(strategy: AmortisedVariational) -> None:
    found = check_gradient(strategy, *problem())
    assert found.ok and float(found.table["error"].max()) < 1e-5


@every_bound
def test_a_descents_own_steps_are_unrolled_too(strategy: AmortisedVariational) -> None:
    found = check(replace(strategy, minimiser=MANY), case_of(LinearGaussian.random(5, 1, 1)))
    assert found.ok
    assert errors(found, "own objective: unrolled") < 1e-5
    assert errors(found, "exact minimum: unrolled") < 1e-5


@pytest.mark.parametrize("strategy", [SigmaIMAML(), SigmaMAML(minimiser=FEW)], ids=repr)
def test_learned_scales_by_validation_are_checked_too(strategy: SigmaIMAML) -> None:
    found = check(strategy, case_of(shifted(0, 6, 3), shared_noise=True))
    assert found.ok and errors(found, "own objective") < 1e-7


# -- what is wrong --------------------------------------------------------------------------------


class ModeHeld(LogDet):
    """Without the change of the curvature along θ*, which asks for third derivatives."""

    def terms(self, *given: Any, **more: Any) -> Any:
        *rest, theta = given
        return super().terms(*rest, theta.detach(), **more)


def test_a_log_determinant_without_third_derivatives_is_exposed() -> None:
    strategy = LaplaceEvidence(logdet=ModeHeld())
    assert check(strategy, case_of(shifted(0, 6, 3))).ok  # where there are none
    found = check_gradient(strategy, *problem())
    assert not found.ok and errors(found, "own objective") > 0.01


def test_the_envelope_of_what_is_not_solved_is_exposed_and_the_mend_named() -> None:
    found = check(AmortisedVariational(minimiser=FEW), case_of(shifted(1)))
    assert not found.ok
    assert said(found, "by design", "envelope theorem", "gradient='implicit'")
    assert said(found, "the inner problem is not solved", "raise max_iterations (now 3)")


@pytest.mark.parametrize("dim", [3, 201])
def test_a_log_determinant_from_probes_is_refused(dim: int) -> None:
    probes = LogDet(probes=2) if dim == 3 else LogDet()
    with pytest.raises(ValueError, match=f"random probes.*at most 200.*has {dim}"):
        check(LaplaceEvidence(logdet=probes), case_of(LinearGaussian.random(0, 2, dim)))
