"""Gauss–Newton products against JᵀHJ written out with torch.func."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, leaves_of
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

from varmeta import CG, IMAML, Density, GaussianPrior, Implicit, NewtonCG, Tasks, prox
from varmeta.inference.energy import FunctionEnergy, TaskEnergy
from varmeta.models.network import network

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


def classes(seed: int = 0) -> tuple[TaskEnergy, nn.Module]:
    """A softmax network on three tasks of different sizes."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    pairs = [(noise(n, 2, seed=n), torch.arange(n) % 3) for n in (5, 4, 6)]
    tasks = Tasks.from_list(pairs)
    density = Density(network(module, lambda out: dist.Categorical(logits=out)), tasks)
    prior = GaussianPrior.create(density.prior_loc, 0.7)
    return TaskEnergy(density, tasks, density.shared_init, prior), module


def dense_softmax(energy: TaskEnergy, module: nn.Module, theta: Tensor, task: int) -> Tensor:
    """Σ_n J_nᵀ (diag p − p pᵀ) J_n + Λ."""
    rows = int(energy.tasks.num_rows[task])
    x = energy.tasks.inputs[task, :rows]
    names = [name for name, _ in module.named_parameters()]
    sizes = [p.numel() for p in module.parameters()]
    shapes = [p.shape for p in module.parameters()]

    def logits(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        weights = {k: p.reshape(s) for k, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(module, weights, (x,))

    jacobian = torch.func.jacrev(logits)(theta[task])  # [N, 3, D]
    p = logits(theta[task]).softmax(-1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    total = torch.einsum("nad,nab,nbe->de", jacobian, inner, jacobian)
    assert energy.prior is not None
    return total + energy.prior.precision()


@pytest.mark.parametrize("calls", [1, 60], ids=["as written", "recorded"])
def test_product_is_the_dense_matrix(calls: int) -> None:
    energy, module = classes()
    theta = noise(3, energy.density.dim, seed=1)
    v = noise(3, energy.density.dim, seed=2)
    for _ in range(calls):
        at = energy.linearise(theta, gauss_newton=True)
        product = at.product(v)
    for task in range(3):
        assert_close(product[task], dense_softmax(energy, module, theta, task) @ v[task], 1e-10)
    plain = energy.linearise(theta)
    assert torch.equal(at.value, plain.value) and torch.equal(at.grad, plain.grad)
    assert ("energy: gauss_newton" in energy.density.execution()) == (calls > 1)


def test_it_is_the_hessian_where_the_model_is_linear() -> None:
    case = case_of(LinearGaussian.random(2, 6, 4))
    energy = TaskEnergy(case.density, case.tasks.support, case.shared, case.prior)
    theta, v = noise(6, 4, seed=1), noise(6, 4, seed=2)
    bent = energy.linearise(theta, gauss_newton=True).product(v)
    assert_close(bent, energy.linearise(theta).product(v), 1e-12)


def test_it_is_positive_definite_where_the_hessian_is_not() -> None:
    energy, _ = classes()
    theta = 3 * noise(3, energy.density.dim, seed=1)
    eye = torch.eye(energy.density.dim, dtype=FLOAT)

    def dense(gauss_newton: bool) -> Tensor:
        product = energy.linearise(theta, gauss_newton=gauss_newton).product
        return torch.stack([product(e.expand(3, -1)) for e in eye], -1)

    assert torch.linalg.eigvalsh(dense(False)).min() < 0
    # Eigenvalues of the prior's precision, 1/0.49, bound it from below.
    assert torch.linalg.eigvalsh(dense(True)).min() > 1 / 0.49 - 1e-9


def test_meta_gradient_with_it_is_exact_for_a_linear_model() -> None:
    problem = LinearGaussian.random(2)
    case = case_of(problem)
    prior, shared, leaves = leaves_of(case)
    strategy = IMAML(adjoint=Implicit(CG(), curvature="gauss_newton"))
    losses, _ = strategy.losses(case.density, prior, shared, case.tasks)
    grads = torch.autograd.grad(losses.sum(), leaves[:2])
    assert_close(grads[0], problem.meta_grad().theta0, 1e-8)
    assert_close(grads[1], problem.meta_grad().log_scale, 1e-8)


def test_newton_steps_with_it_reach_the_same_minimum() -> None:
    wide, _ = classes()
    # A tight prior: with a wide one and labels at random the left-out curvature slows it down.
    energy = replace(wide, prior=GaussianPrior.create(wide.density.prior_loc, 0.3))
    start = wide.density.prior_loc.expand(3, -1)
    plain = NewtonCG().minimise(energy, start)
    bent = NewtonCG(200, tolerance=1e-9, curvature="gauss_newton").minimise(energy, start)
    assert bent.converged is not None and bool(bent.converged.all())
    assert_close(bent.theta, plain.theta, 1e-6)


def scaled(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Normal whose spread adapts too: two parameters of the law move with θ."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(w * x[:, 0], s), obs=y)


def test_a_law_with_two_moving_parameters() -> None:
    tasks = Tasks.from_list([(noise(6, 1, seed=1), noise(6, seed=2))])
    density = Density(scaled, tasks)
    energy = TaskEnergy(density, tasks, density.shared_init)
    theta, v = noise(1, 2, seed=3), noise(1, 2, seed=4)
    x, y = tasks.inputs[0, :, 0], tasks.targets[0]

    def law(flat: Tensor) -> Tensor:
        return torch.stack([flat[0] * x, flat[1].exp().expand(6)], -1)

    def nats(z: Tensor) -> Tensor:
        return -dist.Normal(z[:, 0], z[:, 1]).log_prob(y).sum()

    jacobian = torch.func.jacrev(law)(theta[0])  # [6, 2, 2]
    inner = torch.func.hessian(nats)(law(theta[0]))  # [6, 2, 6, 2]
    dense = torch.einsum("nad,namb,mbe->de", jacobian, inner, jacobian)
    product = energy.linearise(theta, gauss_newton=True).product(v)
    assert_close(product[0], dense @ v[0], 1e-10)


def test_a_bare_function_has_none() -> None:
    start = torch.zeros(1, 1, dtype=FLOAT)
    anchor = start.clone().requires_grad_()
    adjoint = Implicit(curvature="gauss_newton")
    with pytest.raises(ValueError, match="needs a model"):
        prox(FunctionEnergy(lambda t: (t - anchor).square().sum(-1)), start, adjoint=adjoint)
    with pytest.raises(ValueError, match="one of 'hessian', 'gauss_newton', got 'fisher'"):
        Implicit(curvature="fisher")  # type: ignore[arg-type]
