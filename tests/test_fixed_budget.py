"""A fixed budget: a step that never waits for its device, in parts, with true diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from adjoint_problems import bytes_held
from helpers import FLOAT, Case, assert_close, case_of, leaves_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta.inference import maml, metagradient
from varmeta.inference.base import Batch, StepInfo, update
from varmeta.inference.imaml import IMAML
from varmeta.inference.linear import CG, Neumann
from varmeta.inference.maml import FOMAML, MAML, MetaSGD, Reptile
from varmeta.inference.metagradient import MetaGradient
from varmeta.inference.minimise import Adam, GradientDescent
from varmeta.inference.prox import Implicit, OneStep, Unrolled
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

FEW = GradientDescent(0.02, 4, tolerance=0)
BUDGET = Implicit(CG(2, tolerance=0))
STRATEGIES: dict[str, MetaGradient] = {
    "imaml": IMAML(minimiser=FEW, adjoint=BUDGET),
    "imaml, momentum": IMAML(minimiser=replace(FEW, momentum=0.5), adjoint=BUDGET),
    "imaml, Neumann": IMAML(minimiser=FEW, adjoint=Implicit(Neumann(3, 0.02))),
    "imaml, one step": IMAML(minimiser=FEW, adjoint=OneStep(0.02)),
    "imaml, warm start": IMAML(minimiser=FEW, adjoint=BUDGET, warm_start=True),
    "imaml, unrolled Adam": IMAML(minimiser=Adam(0.1, 4, tolerance=0), adjoint=Unrolled()),
    "maml": MAML(minimiser=FEW),
    "maml with prior": MAML(minimiser=FEW, with_prior=True, learn_scale=True),
    "fomaml": FOMAML(minimiser=FEW),
    "meta-sgd": MetaSGD(minimiser=FEW),
    "reptile": Reptile(minimiser=FEW),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)

# -- waiting for the device -----------------------------------------------------------------------

READS = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
}


class Reads(TorchDispatchMode):
    """Counts what would make a host wait for its device: values, and shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if (name in READS or masks) and not self.paused:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Without the optimiser's own: its count of steps is kept on the CPU."""
    counter = Reads()

    def paused(*args: Any) -> None:
        counter.paused = True
        update(*args)
        counter.paused = False

    def counted(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            counter.found.append(name)  # on the CPU these go past the dispatcher
            return method(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module in (metagradient, maml):
            patch.setattr(module, "update", paused)
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, counted(getattr(Tensor, name), name))
        with counter:
            yield counter.found


def prepared(case: Case, strategy: MetaGradient) -> Callable[[], StepInfo]:
    """A step of the strategy on all tasks, of which the parts have been taken before."""
    tasks = case.tasks
    assert len(tasks.support) == len(tasks.query) == len(tasks)
    state = strategy.init(case.density, case.prior, tasks, generator(0))
    batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))

    def step() -> StepInfo:
        info = strategy.step(case.density, state, batch, generator(0))
        state.step += 1
        return info

    return step


def test_the_counter_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.arange(3.0)
    for wait in (
        lambda: t.sum().item(),
        lambda: bool(t.any()),
        lambda: t[t > 1],
        lambda: t.tolist(),
        lambda: t.nonzero(),
        lambda: torch.linalg.cholesky(torch.eye(2)),
    ):
        with reads(monkeypatch) as found:
            wait()
        assert len(found) == 1
    with reads(monkeypatch) as found:
        torch.where(t > 1, t, 0.0)[torch.tensor([0, 1])].cumsum(0)
    assert not found


CASE = case_of(LinearGaussian.random(0, 4, 2), shared_noise=True)  # recorded once for all


@every_strategy
def test_a_step_reads_from_its_device_once(
    strategy: MetaGradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To report its loss; recordings are compared with the model when they are made, and then not
    any more."""
    assert CASE.tasks.unsplit is CASE.tasks.unsplit
    step = prepared(CASE, replace(strategy, learning_rate=1e-4))
    for _ in range(55):
        step()
    with reads(monkeypatch) as found:
        step()
    assert len(found) == 1, found


def test_so_does_the_first_step_of_a_model_not_yet_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = prepared(case_of(LinearGaussian.random(0, 4, 2)), STRATEGIES["imaml"])
    with reads(monkeypatch) as found:
        step()
    assert len(found) == 1, found


def test_so_does_a_step_with_a_low_rank_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(LinearGaussian.random(0, 4, 2))
    prior = GaussianPrior.from_density(case.density, rank=1)
    step = prepared(replace(case, prior=prior), STRATEGIES["imaml"])
    with reads(monkeypatch) as found:
        step()
    assert len(found) == 1, found


def test_a_tolerance_reads_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fixed budget is for."""
    steps = replace(FEW, tolerance=1e-12)
    step = prepared(case_of(LinearGaussian.random(0, 4, 2)), IMAML(minimiser=steps))
    with reads(monkeypatch) as found:
        step()
    assert len(found) > 4


# -- a few tasks at once --------------------------------------------------------------------------


@every_strategy
def test_tasks_at_once_changes_no_gradient(
    strategy: MetaGradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a diagnostic; to the rounding of sums in another order."""
    case = case_of(LinearGaussian.random(1, 5, 2), shared_noise=True)
    found: list[list[Tensor]] = []
    kind = type(strategy)
    monkeypatch.setattr(kind, "apply", lambda self, state, leaves, grads: found.append(grads))
    infos = [prepared(case, replace(strategy, tasks_at_once=n))() for n in (None, 1, 2, 4, 9)]
    for grads, info in zip(found[1:], infos[1:], strict=True):
        for a, b in zip(grads, found[0], strict=True):
            assert_close(a, b, 1e-12)
        assert abs(info.loss - infos[0].loss) < 1e-12 * abs(info.loss)
        assert info.stats.keys() == infos[0].stats.keys() and info.gradients == infos[0].gradients
        for name, each in info.stats.items():
            torch.testing.assert_close(each, infos[0].stats[name], rtol=1e-9, atol=1e-12)


# -- diagnostics ----------------------------------------------------------------------------------


def conjugate_gradients(matrix: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """x after `count` steps, as the minimiser of ½xᵀAx − bᵀx over the Krylov space."""
    krylov = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(count)], 1)
    basis, _ = np.linalg.qr(krylov)
    return basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)


def test_diagnostics_are_those_of_each_task() -> None:
    """Of the paper's budget, against the same steps in NumPy; 4 tasks, 3 coordinates."""
    problem = LinearGaussian.random(2, 4, 3)
    few = replace(FEW, reduction="sum", clip=None)
    info = prepared(case_of(problem), IMAML(minimiser=few, adjoint=BUDGET))()
    exact: dict[str, list[float]] = {"grad_norm": [], "grad_reduction": [], "residual": []}
    for i, (xq, yq) in enumerate(zip(problem.query_designs, problem.query_targets, strict=True)):
        matrix = problem.hessian(i) + np.diag(problem.precision)
        shift = matrix @ problem.theta_star(i)
        theta = problem.theta0
        for _ in range(4):
            theta = theta - 0.02 * (matrix @ theta - shift)
        norm, before = (np.linalg.norm(matrix @ t - shift) for t in (theta, problem.theta0))
        right = xq.T @ (xq @ theta - yq) / problem.noise2
        left = right - matrix @ conjugate_gradients(matrix, right, 2)
        exact["grad_norm"].append(float(norm))
        exact["grad_reduction"].append(float(norm / (1 + before)))
        exact["residual"].append(float(np.linalg.norm(left) / np.linalg.norm(right)))
    for name, wanted in exact.items():
        assert_close(info.stats[name], wanted, 1e-8)
        assert abs(info.worst[name] - max(wanted)) < 1e-8
    assert info.stats["iterations"].tolist() == [4] * 4
    assert info.stats["negative_curvature"].tolist() == [False] * 4
    assert "converged" not in info.stats
    # 4 gradients, one more at the end, 2 products of two, the pullback of two: for each task
    assert info.gradients == 4 * (4 + 1 + 4 + 2)


def square(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=FLOAT), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(theta**2 + 0 * x[:, 0], 1.0), obs=y)


def test_negative_curvature_is_that_of_the_task() -> None:
    """Close to 0, (θ² − y)²/2 + θ²/2 curves by 6θ² − 2y + 1: downwards in the task with y = 3."""
    rows = torch.ones(2, 1, dtype=FLOAT)
    tasks = Tasks.from_list([(rows, tensor([y, y])) for y in (-3.0, 3.0, 0.1)])
    query = torch.zeros_like(tasks.mask)
    query[:, 1] = True
    tasks = replace(tasks, is_query=query, is_split=True)
    density = Density(square, tasks)
    prior = GaussianPrior.create(tensor([0.1]), 1.0)
    strategy = IMAML(minimiser=GradientDescent(1e-3, 2, tolerance=0), adjoint=BUDGET)
    state = strategy.init(density, prior, tasks, generator(0))
    info = strategy.step(density, state, Batch(tasks, torch.arange(3), 3), generator(0))
    assert info.stats["negative_curvature"].tolist() == [False, True, False]
    assert info.worst["negative_curvature"] == 1


# -- compiled -------------------------------------------------------------------------------------


def bent(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Three coordinates that adapt, and a shared slope."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3, dtype=FLOAT), 1.0).to_event(1))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = (theta**2 * (1 + x)).sum(-1) + slope * x[:, 0]
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's, when it is imported
def test_compiled_together_the_steps_and_the_solve_are_the_same() -> None:
    """Gradients in θ0, scales and φ, and every diagnostic; one task has negative curvature, and the
    steps of some are cut."""
    x = tensor([[0.3, 0.1, -0.2], [1.0, 0.5, 0.2]])
    tasks = Tasks.from_list([(x, tensor([y, y])) for y in (-3.0, 3.0, 0.1)])
    query = torch.zeros_like(tasks.mask)
    query[:, 1] = True
    tasks = replace(tasks, is_query=query, is_split=True)
    density = Density(bent, tasks, shared=["slope"])
    strategy = IMAML(
        minimiser=GradientDescent(1e-2, 4, tolerance=0, momentum=0.5, clip=0.03),
        adjoint=Implicit(CG(2, tolerance=0)),
    )
    found = []
    for d in (density, density.compiled()):
        prior = GaussianPrior.create(tensor([0.1, -0.2, 0.3]).requires_grad_(), 1.0)
        prior = replace(prior, log_scale=prior.log_scale.detach().requires_grad_())
        shared = tensor([0.4]).requires_grad_()
        losses, info = strategy.losses(d, prior, shared, tasks)
        grads = torch.autograd.grad(losses.sum(), [prior.loc, prior.log_scale, shared])
        found.append(([losses.detach(), *grads, *info.stats().values()], info.gradients))
    assert found[0][1] == found[1][1]
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert info.negative_curvature.tolist() == [False, True, False]
    how = d.execution()
    assert set(how.values()) == {"compiled"}
    assert {"energy: 4 x gradient", "energy: 2 x product"} < set(how)


# -- memory ---------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_inner_steps_nor_the_solve() -> None:
    """Bytes that autograd keeps until the solve, which keeps none; MAML's grow by one θ a step, and
    by the step itself where it may be cut."""
    case = case_of(LinearGaussian.random(3, 6, 3), shared_noise=True)
    prior, shared, leaves = leaves_of(case)

    def held(strategy: IMAML | MAML) -> int:
        return bytes_held(lambda: strategy.losses(case.density, prior, shared, case.tasks)[0])

    def imaml(steps: int, products: int) -> IMAML:
        minimiser = GradientDescent(0.01, steps, tolerance=0)
        return IMAML(minimiser=minimiser, adjoint=Implicit(CG(products, tolerance=0)))

    for _ in range(2):
        held(imaml(60, 1))  # until the gradient is recorded
    counts = {held(imaml(steps, products)) for steps in (5, 50) for products in (1, 20)}
    assert len(counts) == 1

    def solve(products: int) -> int:
        losses, _ = imaml(5, products).losses(case.density, prior, shared, case.tasks)
        return bytes_held(lambda: torch.autograd.grad(losses.sum(), leaves))

    assert solve(1) == solve(20) == 0
    maml = [held(MAML(minimiser=GradientDescent(0.01, steps, tolerance=0))) for steps in (5, 50)]
    assert maml[1] - maml[0] == 2 * 45 * 6 * 3 * 8
