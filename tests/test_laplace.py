"""Laplace's approximation is exact where the energy is quadratic, and honest where it is none."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import FLOAT, assert_close, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.inference.energy import TaskEnergy
from varmeta.inference.laplace import hessian, laplace_scale

NAMES = ("a", "b", "c")


def diagonal(values: Tensor) -> Tensor:
    """Lower-triangular roots of the inverses of diagonal Hessians `values` `[T, D]`, at 0."""
    theta = torch.zeros_like(values)
    return laplace_scale(lambda t: 0.5 * (values * t**2).sum(-1), theta, NAMES[: len(values)])


@pytest.mark.parametrize("shape", [(0, 6, 3), (3, 5, 1), (2, 9, 4)], ids=str)
def test_covariance_is_the_exact_posteriors(shape: tuple[int, int, int]) -> None:
    problem = LinearGaussian.random(*shape)
    case = case_of(problem)
    energy = TaskEnergy(case.density, case.tasks.support, case.shared, case.prior)
    tril = laplace_scale(energy, tensor(problem.theta_stars()), case.tasks.names)
    exact = np.stack([problem.posterior_cov(i) for i in range(problem.num_tasks)])
    assert_close(tril @ tril.mT, exact, 1e-8)
    assert torch.equal(tril, tril.tril()) and bool((tril.diagonal(dim1=-2, dim2=-1) > 0).all())


def test_hessian_is_the_second_derivative() -> None:
    def energy(theta: Tensor) -> Tensor:
        x, y = theta.unbind(-1)
        return torch.sin(x) * y**2 + torch.exp(x * y)

    theta = torch.randn(4, 2, dtype=FLOAT, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        dense = torch.autograd.functional.hessian(lambda t: energy(t[None])[0], theta[i])
        assert_close(hessian(energy, theta)[i], dense, 1e-12)


def test_badly_scaled_curvature_keeps_its_digits() -> None:
    values = tensor([[1e-6, 1.0, 1e6], [1.0, 1.0, 1.0]])
    assert_close(diagonal(values).diagonal(dim1=1, dim2=2), values.rsqrt(), 1e-9)


@pytest.mark.parametrize("bad", [-4.0, 0.0])
def test_no_mode_is_said_and_named(bad: float) -> None:
    """A negative direction is folded over, a flat one is finite; the other task stays exact."""
    values = tensor([[1.0, 2.0], [1.0, bad]])
    with pytest.warns(
        RuntimeWarning, match=r"not positive definite at the mode of 1 task\(s\) \(b"
    ):
        tril = diagonal(values)
    assert bool(tril.isfinite().all())
    assert_close(tril[0].diagonal(), values[0].rsqrt(), 1e-12)
    if bad < 0:
        assert_close(tril[1].diagonal(), values[1].abs().rsqrt(), 1e-12)


def test_a_good_mode_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagonal(tensor([[1.0, 2.0], [3.0, 1e-3]]))
