"""map_estimate: θ*(θ0, Σ, φ) of a model; its derivative by finite differences and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

import varmeta as vm


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    trend = pyro.sample("trend", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        rate = (level + slope * x[:, 0] + trend * x[:, 1]).exp()
        return pyro.sample("y", dist.Poisson(rate), obs=y)


def count_tasks(count: int = 4) -> vm.Tasks:
    made = torch.Generator().manual_seed(0)
    rows = []
    for n in (3, 5, 4, 6)[:count]:
        x = torch.randn(n, 2, dtype=FLOAT, generator=made)
        rows.append((x, torch.poisson((0.3 + 0.5 * x[:, 0]).exp(), generator=made)))
    return vm.Tasks.from_list(rows)


TASKS = count_tasks()
DENSITY = vm.Density(counts, TASKS, shared=["trend"])
LOC = tensor([0.2, -0.1])
LOG_SCALE = tensor([-0.3, 0.4])
SHARED = tensor([0.3])
TIGHT = vm.NewtonCG(tolerance=1e-12)


def at(loc: Tensor, log_scale: Tensor, shared: Tensor) -> Tensor:
    prior = vm.GaussianPrior(loc, log_scale, torch.arange(2))
    return vm.map_estimate(DENSITY, TASKS, prior, shared, minimiser=TIGHT)[0]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["θ0", "log scales", "φ"])
def test_its_derivative_is_that_of_finite_differences(which: int) -> None:
    """Central differences of step 1e-5 in float64: exact to about 1e-9 beside 1."""
    inputs = [LOC, LOG_SCALE, SHARED]
    leaves = [t.clone().requires_grad_() for t in inputs]
    theta = at(*leaves)
    v = torch.randn(theta.shape, dtype=FLOAT, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((theta * v).sum(), leaves[which])
    wanted = torch.zeros_like(inputs[which])
    for k in range(len(wanted)):
        ends = []
        for sign in (1, -1):
            moved = [t.clone() for t in inputs]
            moved[which][k] += sign * 1e-5
            ends.append((at(*moved) * v).sum())
        wanted[k] = (ends[0] - ends[1]) / 2e-5
    assert_close(ours, wanted, 1e-6)


def test_one_over_one_plus_curvature() -> None:
    """λ = 1 and one dimension: dθ*/dθ0 = 1/(1+f″), with f″ = Σ exp(θ*) for counts of a log rate."""

    def rate(x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Poisson(level.exp()), obs=y)

    loc = torch.zeros(1, dtype=FLOAT, requires_grad=True)
    prior = vm.GaussianPrior.create(loc, 1.0)
    theta, info = vm.map_estimate(vm.Density(rate, TASKS), TASKS, prior)
    assert info.converged is not None and bool(info.converged.all())
    for i, n in enumerate(TASKS.num_rows):
        (ours,) = torch.autograd.grad(theta[i].sum(), loc, retain_graph=True)
        assert float(ours) == pytest.approx(1 / (1 + float(n * theta[i].detach().exp())), rel=1e-6)


def test_it_is_the_exact_posterior_mean_and_takes_any_adjoint() -> None:
    case = case_of(LinearGaussian.random(0))
    tasks, wanted = case.tasks.support, LinearGaussian.random(0).theta_stars()
    theta, _ = vm.map_estimate(case.density, tasks, case.prior, case.shared)
    assert_close(theta, wanted, 1e-7)
    prior = replace(case.prior, loc=case.prior.loc.clone().requires_grad_())
    one = vm.GradientDescent(max_iterations=1, step_size=1e-3, reduction="sum", tolerance=0)
    step, _ = vm.map_estimate(
        case.density, tasks, prior, case.shared, minimiser=one, adjoint=vm.Unrolled()
    )
    (ours,) = torch.autograd.grad(step.sum(), prior.loc)
    problem = LinearGaussian.random(0)  # one step from θ0: I − h H
    total = sum(problem.hessian(i) for i in range(len(tasks)))
    assert_close(ours, len(tasks) - 1e-3 * total.sum(0), 1e-9)
    start = torch.zeros_like(theta)
    found, _ = vm.map_estimate(
        case.density, tasks, prior, case.shared, start=start, adjoint=vm.Detached()
    )
    assert not found.requires_grad
    assert_close(found, wanted, 1e-7)


def test_what_does_not_fit_is_refused_and_what_has_not_arrived_is_said() -> None:
    prior = vm.GaussianPrior(LOC, LOG_SCALE, torch.arange(2))
    with pytest.raises(TypeError, match="tasks must be a Tasks"):
        vm.map_estimate(DENSITY, prior, TASKS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query rows, which are held out"):
        vm.map_estimate(DENSITY, TASKS.split(0.3), prior)
    with pytest.raises(ValueError, match="prior has 3 coordinates, the density 2"):
        vm.map_estimate(DENSITY, TASKS, vm.GaussianPrior.create(torch.zeros(3).double(), 1.0))
    with pytest.raises(ValueError, match=r"shared has shape \(2,\), wanted \(1,\)"):
        vm.map_estimate(DENSITY, TASKS, prior, torch.zeros(2).double())
    with pytest.raises(ValueError, match=r"start has shape \(2,\), wanted \(4, 2\)"):
        vm.map_estimate(DENSITY, TASKS, prior, start=torch.zeros(2).double())
    early = vm.LBFGS(max_iterations=1)
    with pytest.warns(vm.NotConverged, match="4 of 4 tasks .* are not at a minimum"):
        vm.map_estimate(DENSITY, TASKS, prior, minimiser=early)
