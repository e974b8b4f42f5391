"""Stand-ins for (H + Λ)⁻¹: exact in their own case, and no worse than theory says in others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same, case_of, leaves_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import CG, BlockDiagonal, Diagonal, GaussianPrior, Implicit, PriorDominated, SigmaIMAML
from varmeta.inference.approximate import bound
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.linear import LinearSolver, Solution
from varmeta.models import Modules
from varmeta.seeds import generator

TASKS, DIM = 6, 8
MODULES = Modules(("a", "b", "c"), torch.tensor([0, 0, 1, 2, 1, 2, 2, 0]))
ALL = [PriorDominated(), Diagonal(), Diagonal(probes=3), BlockDiagonal()]


def curvature(seed: int = 0, keep: Tensor | None = None) -> Tensor:
    """Random positive semidefinite H `[T, D, D]` of rank 6, its entries times `keep`."""
    root = torch.randn(TASKS, DIM, 6, generator=generator(seed), dtype=torch.float64)
    h = root @ root.mT
    return h if keep is None else h * keep


def prior_of(*scales: float, rank: int = 0) -> GaussianPrior:
    factor = tensor(0.2 * np.cos(np.arange(DIM * rank)).reshape(DIM, rank)) if rank else None
    return GaussianPrior.create(
        torch.zeros(DIM, dtype=torch.float64), tensor(scales), groups=MODULES, factor=factor
    )


def solve(solver: object, h: Tensor, prior: GaussianPrior, b: Tensor) -> tuple[Solution, list[int]]:
    """With A = H + Λ; and how many products were really made."""
    made = [0]

    def matvec(v: Tensor) -> Tensor:
        made[0] += 1
        return (h @ v[..., None])[..., 0] + prior.precision_mv(v)

    class Energy:
        pass

    energy = Energy()
    energy.prior = prior  # type: ignore[attr-defined]
    chosen: LinearSolver = bound(solver, energy)  # type: ignore[arg-type]
    return chosen.solve(matvec, b), made


def exact(h: Tensor, prior: GaussianPrior, b: Tensor) -> Tensor:
    return torch.linalg.solve(h + prior.precision(), b[..., None])[..., 0]


B = torch.randn(TASKS, DIM, generator=generator(9), dtype=torch.float64)
SAME = (MODULES.groups[:, None] == MODULES.groups).double()


@pytest.mark.parametrize(
    ("solver", "keep", "rank"),
    [
        (PriorDominated(), torch.zeros(DIM, DIM, dtype=torch.float64), 0),
        (PriorDominated(), torch.zeros(DIM, DIM, dtype=torch.float64), 2),
        (Diagonal(), torch.eye(DIM, dtype=torch.float64), 0),
        (Diagonal(probes=1), torch.eye(DIM, dtype=torch.float64), 0),
        (BlockDiagonal(), SAME, 0),
        (BlockDiagonal(CG()), SAME, 0),  # type: ignore[arg-type]
    ],
)
def test_exact_in_its_own_case(solver: object, keep: Tensor, rank: int) -> None:
    h, prior = curvature(keep=keep), prior_of(1.0, 0.3, 2.0, rank=rank)
    found, made = solve(solver, h, prior, B)
    assert_close(found.x, exact(h, prior, B), 1e-9)
    assert float(found.residual.max()) < 1e-9
    assert found.products == made[0]


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_the_residual_is_that_of_the_whole_and_tasks_are_separate(solver: object) -> None:
    h, prior = curvature(), prior_of(1.0, 0.3, 2.0, rank=1)
    found, made = solve(solver, h, prior, B)
    a = h + prior.precision()
    residual = (B - (a @ found.x[..., None])[..., 0]).norm(dim=-1) / B.norm(dim=-1)
    assert_close(found.residual, residual, 1e-9)
    assert float(residual.min()) > 1e-3 and made[0] == found.products
    alone = [solve(solver, h[i : i + 1], prior, B[i : i + 1])[0].x for i in range(TASKS)]
    assert_close(found.x, torch.cat(alone), 1e-9)
    assert_same(found.x, solve(solver, h, prior, B)[0].x)


def test_prior_dominated_is_right_to_first_order_in_the_scales() -> None:
    """‖Σb − A⁻¹b‖ = ‖ΣHA⁻¹b‖ ≤ σ²‖H‖‖A⁻¹b‖ for equal scales: a hundredth for a tenth of σ."""
    h = curvature()
    size = float(torch.linalg.matrix_norm(h, 2).max())
    for scale in (0.1, 0.01, 0.001):
        prior = prior_of(scale, scale, scale)
        x, wanted = solve(PriorDominated(), h, prior, B)[0].x, exact(h, prior, B)
        error = (x - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(error.max()) < scale**2 * size
        assert float(error.max()) > 1e-3 * scale**2 * size


def test_the_closer_stand_in_is_the_better_one() -> None:
    """Where modules interact little: none of H, its diagonal, its blocks, all of it."""
    within = curvature(keep=SAME) + 0.1 * curvature(1)
    prior = prior_of(1.0, 1.0, 1.0)
    wanted = exact(within, prior, B)
    errors = [
        float((solve(s, within, prior, B)[0].x - wanted).norm() / wanted.norm())
        for s in (PriorDominated(), Diagonal(), BlockDiagonal(), CG())
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9


def test_the_diagonal_by_probes_is_unbiased() -> None:
    """b/(h + λ) with h read back: the mean over 1,000 seeds within 4.5 standard errors in every
    entry of 48 (false alarm 3e-4), where no estimate was negative."""
    h = curvature() + 40 * torch.eye(DIM, dtype=torch.float64)
    prior = prior_of(1.0, 1.0, 1.0)
    read = torch.stack(
        [
            B / solve(Diagonal(probes=1, seed=s), h, prior, B)[0].x - prior.precision_diagonal()
            for s in range(1000)
        ]
    )
    mean, error = read.mean(0), read.std(0) / 1000**0.5
    assert float(read.min()) > 0
    assert bool(((mean - h.diagonal(dim1=-2, dim2=-1)).abs() < 4.5 * error).all())


def test_negative_curvature() -> None:
    """Reported where the diagonal or a block of A has it, and x stays within Σb."""
    h = curvature()
    h[2] -= 50 * torch.eye(DIM, dtype=torch.float64)
    prior = prior_of(1.0, 0.5, 2.0)
    for solver in (Diagonal(), BlockDiagonal()):
        assert solve(solver, h, prior, B)[0].negative_curvature.tolist() == [
            i == 2 for i in range(TASKS)
        ]
    x = solve(Diagonal(), h, prior, B)[0].x
    assert bool((x.abs() <= prior.covariance_mv(B.abs()) + 1e-12).all())


@pytest.mark.parametrize("rank", [0, 2])
def test_in_units_of_the_prior_small_scales_cost_no_products(rank: int) -> None:
    """Scales from 1 to 1e-4: preconditioned CG ends in about D products, plain CG later."""
    h, prior = curvature(), prior_of(1.0, 1e-2, 1e-4, rank=rank)
    found, _ = solve(CG(60, 1e-10, PriorDominated()), h, prior, B)  # type: ignore[arg-type]
    assert int(found.iterations.max()) <= DIM + 2
    assert_close(found.x, exact(h, prior, B), 1e-8)
    plain, _ = solve(CG(60, 1e-10), h, prior, B)
    assert int(plain.iterations.max()) > int(found.iterations.max())


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_the_meta_gradient_is_what_the_stand_in_says(solver: object) -> None:
    """2 σ_m⁻² (θ_m − θ0_m)ᵀ x_m with x the stand-in's, and θ0's is Λ x: no other place is inexact.

    Reported per task: the residual, and a relative error of the gradient that it explains.
    """
    problem = LinearGaussian.random(4, 5, 4)
    case = case_of(problem)
    modules = Modules(("a", "b"), torch.tensor([0, 1, 1, 0]))
    prior = GaussianPrior.create(case.prior.loc, tensor([0.7, 0.4]), groups=modules)
    prior, shared, leaves = leaves_of(replace(case, prior=prior))
    strategy = SigmaIMAML(adjoint=Implicit(solver))  # type: ignore[arg-type]
    losses, info = strategy.losses(case.density, prior, shared, case.tasks)
    loc, log_scale = torch.autograd.grad(losses.sum(), leaves[:2])
    there = problem.at(log_scale=prior.log_scale.detach()[modules.groups].numpy())
    theta = tensor(there.theta_stars())
    slope = TaskEnergy(case.density, case.tasks.query, shared).linearise(theta).grad.detach()
    h = torch.stack([tensor(there.hessian(i)) for i in range(5)])
    held = GaussianPrior.create(case.prior.loc, tensor([0.7, 0.4]), groups=modules)
    x = solve(solver, h, held, slope)[0].x
    pulled = held.precision_mv(x)
    assert_close(loc, pulled.sum(0), 1e-7)
    per_coordinate = 2 * (pulled * (theta - held.loc)).sum(0)
    wanted = torch.zeros(2, dtype=torch.float64).index_add(0, modules.groups, per_coordinate)
    assert_close(log_scale, wanted, 1e-6)
    assert info.residual is not None and float(info.residual.min()) > 1e-4
