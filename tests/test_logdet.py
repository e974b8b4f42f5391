"""Log-determinants: against dense algebra, against differences, and what they say of themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from adjoint_problems import Tensors, assert_slopes, leaves, slopes
from density_cases import numbers
from helpers import FLOAT, assert_close, tensor
from torch import Tensor

from varmeta import CG, Density, GaussianPrior, LogDet, Tasks
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.lanczos import log_quadrature, probes, tridiagonal
from varmeta.inference.laplace import hessian
from varmeta.seeds import generator

DIM = 6
EXACT = LogDet(probes=DIM, lanczos_steps=DIM)


def logistic(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(DIM, dtype=FLOAT), 1.0).to_event(1))
    stretch = pyro.sample("stretch", dist.LogNormal(torch.tensor(0.0, dtype=FLOAT), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=stretch * (x @ w)), obs=y)


@cache
def problem() -> tuple[Density, Tasks]:
    """The density and its tasks, split."""
    rows = [
        (numbers(n, DIM, seed=i), (numbers(n, seed=40 + i) > 0).to(FLOAT))
        for i, n in enumerate((9, 2, 6, 4))
    ]
    tasks = Tasks.from_list(rows).split(0.4)
    with torch.enable_grad():  # whoever asks first
        return Density(logistic, tasks, shared=["stretch"]), tasks


AT: Tensors = {
    "loc": 0.3 * numbers(DIM, seed=1),
    "log_scale": 0.3 * numbers(DIM, seed=2),
    "factor": 0.5 * numbers(DIM, 2, seed=3),
    "shared": tensor([0.4]),
    "theta": numbers(4, DIM, seed=4),
}


def value(
    loc: Tensor,
    log_scale: Tensor,
    shared: Tensor,
    theta: Tensor,
    factor: Tensor | None = None,
    *,
    with_query: bool = False,
    logdet: LogDet | None = None,
    seed: int = 0,
) -> Tensor:
    """The terms of all tasks, `[T]`."""
    density, tasks = problem()
    prior = GaussianPrior(loc, log_scale, torch.arange(DIM), factor)
    terms, _ = (logdet or LogDet()).terms(
        density,
        prior,
        shared,
        tasks.support,
        theta,
        query=tasks.query if with_query else None,
        generator=generator(seed),
    )
    return terms


def by_hand(at: Tensors, with_query: bool) -> Tensor:
    density, tasks = problem()
    factor = at.get("factor")
    prior = GaussianPrior(at["loc"], at["log_scale"], torch.arange(DIM), factor)
    inverse = prior.precision()
    a = hessian(TaskEnergy(density, tasks.support, at["shared"]), at["theta"]) + inverse
    out = 0.5 * (torch.logdet(a) - torch.logdet(inverse))
    if with_query:
        m = hessian(TaskEnergy(density, tasks.query, at["shared"]), at["theta"]) + inverse
        solved = torch.linalg.solve(a, m)
        out = out + 0.5 * solved.diagonal(dim1=1, dim2=2).sum(-1) - 0.5 * DIM
    return out


def chosen(low_rank: bool) -> Tensors:
    return {n: t for n, t in AT.items() if low_rank or n != "factor"}


variants = pytest.mark.parametrize("low_rank", [False, True], ids=["diagonal", "low rank"])
with_and_without = pytest.mark.parametrize("with_query", [False, True], ids=["support", "query"])
both_ways = pytest.mark.parametrize("logdet", [LogDet(), EXACT], ids=["dense", "all probes"])


@variants
@with_and_without
@both_ways
def test_value_is_that_of_dense_algebra(low_rank: bool, with_query: bool, logdet: LogDet) -> None:
    """With D orthogonal probes and D Lanczos steps too: nothing is left to chance."""
    at = chosen(low_rank)
    terms = value(**at, with_query=with_query, logdet=logdet)
    assert_close(terms, by_hand(at, with_query), 1e-9)


@variants
@with_and_without
@both_ways
def test_gradient_is_that_of_differences(low_rank: bool, with_query: bool, logdet: LogDet) -> None:
    """In θ, the scales, the factor and φ."""
    at = leaves(chosen(low_rank))
    weights = tensor([1.0, -2.0, 0.5, 3.0])
    terms = value(**at, with_query=with_query, logdet=logdet)
    grads = torch.autograd.grad((weights * terms).sum(), list(at.values()), allow_unused=True)
    names = [n for n in at if n != "loc"]

    def total(**at: Tensor) -> Tensor:
        return (weights * value(**at, with_query=with_query)).sum()

    found = {n: g for n, g in zip(at, grads, strict=True) if g is not None}
    assert_slopes(found, slopes(total, chosen(low_rank), names, 2e-3), 1e-8)


@with_and_without
def test_probes_are_unbiased(with_query: bool) -> None:
    """Means over 200 seeds of one probe each lie within 4 standard errors of the dense answer.

    26 numbers are compared; were the errors normal, a right estimator would fail at one in 600
    choices of the seeds. These are fixed.
    """
    draws = []
    exact = []
    for seed in range(-1, 200):
        at = leaves(chosen(True))
        logdet = LogDet() if seed < 0 else LogDet(probes=1, lanczos_steps=DIM)
        terms = value(**at, with_query=with_query, logdet=logdet, seed=max(seed, 0))
        wanted = [at[n] for n in ("log_scale", "shared", "theta")]
        grads = torch.autograd.grad(terms.sum(), wanted)
        flat = torch.cat([terms.sum().detach()[None], grads[0], grads[1], grads[2].sum(0)])
        (exact if seed < 0 else draws).append(flat)
    sample = torch.stack(draws)
    error = sample.std(0) / len(sample) ** 0.5
    assert bool(((sample.mean(0) - exact[0]).abs() < 4 * error).all())
    assert bool((error > 0).all())  # and one probe is an estimate


def test_more_probes_leave_less_error() -> None:
    exact = value(**chosen(False))
    spread = []
    for count in (1, 3, 5, DIM):
        logdet = LogDet(probes=count, lanczos_steps=DIM)
        each = [value(**chosen(False), logdet=logdet, seed=s) - exact for s in range(20)]
        spread.append(float(torch.stack(each).square().mean().sqrt()))
    assert spread[0] > spread[1] > spread[2] > 1e-3 > 1e-9 > spread[3]


def matrix(*values: float) -> Tensor:
    q = torch.linalg.qr(numbers(len(values), len(values), seed=7)).Q
    return q @ tensor(values).diag() @ q.mT


def test_quadrature_is_exact_after_as_many_steps_as_eigenvalues() -> None:
    """Three distinct eigenvalues: three steps, and more change nothing."""
    a = matrix(0.5, 0.5, 2.0, 2.0, 9.0, 9.0)
    z = numbers(5, 6, seed=8)
    values, vectors = torch.linalg.eigh(a)
    log = vectors @ values.log().diag() @ vectors.mT
    wanted = torch.einsum("ni,ij,nj->n", z, log, z)
    for steps in (3, 4, 6, 50):
        found, bad = log_quadrature(lambda v: v @ a, z, steps)
        assert_close(found, wanted, 1e-11)
        assert not bool(bad.any())
    two, _ = log_quadrature(lambda v: v @ a, z, 2)
    assert bool(((two - wanted).abs() > 1e-3).all())


def test_lanczos_stays_orthogonal() -> None:
    """Eigenvalues over ten decades: the matrix's own are those of the operator."""
    values = torch.logspace(-5, 5, 12, dtype=FLOAT)
    a = matrix(*values.tolist())
    start = torch.nn.functional.normalize(numbers(1, 12, seed=9))
    found = torch.linalg.eigvalsh(tridiagonal(lambda v: v @ a, start, 12))[0]
    assert_close(found, torch.linalg.eigvalsh(a), 1e-12)
    assert float((found.log() - values.log()).abs().max()) < 1e-3


def test_probes_are_orthogonal_and_of_length_root_d() -> None:
    z = probes(4, torch.zeros(3, 7, dtype=FLOAT), generator(0))
    gram = torch.einsum("ktd,ltd->tkl", z, z)
    assert_close(gram, (7 * torch.eye(4, dtype=FLOAT)).expand(3, 4, 4), 1e-12)


def hilly(x: Tensor, y: Tensor | None = None) -> Tensor:
    """−log p has the Hessian diag(cos θ_j) n, up to a constant: indefinite where cos θ < −1/n."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(w.cos().sum() + 0 * x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize("logdet", [LogDet(), LogDet(probes=2)], ids=["dense", "probes"])
def test_negative_curvature_is_reported(logdet: LogDet) -> None:
    """And the value is that of the absolute eigenvalues."""
    x = torch.zeros(4, 1, dtype=FLOAT)
    tasks = Tasks.from_list([(x, x[:, 0] + 5), (x, x[:, 0] + 5)])
    density = Density(hilly, tasks)
    prior = GaussianPrior(torch.zeros(2, dtype=FLOAT), tensor([0.0, 0.1]), torch.arange(2))
    theta = tensor([[0.1, 0.2], [3.0, 0.1]])
    terms, info = logdet.terms(density, prior, density.shared_init, tasks, theta)
    a = hessian(TaskEnergy(density, tasks, density.shared_init, prior), theta)
    assert info.indefinite.tolist() == (torch.linalg.eigvalsh(a).amin(-1) < 0).tolist()
    assert info.indefinite.any() and not info.indefinite.all()
    size = torch.linalg.eigvalsh(prior.scale[:, None] * a * prior.scale).abs()
    assert_close(terms, 0.5 * size.log().sum(-1), 1e-9)


def test_gradient_of_folded_curvature_is_that_of_differences() -> None:
    """Also where |B| stands in for B, in the trace as well."""
    x = torch.zeros(4, 1, dtype=FLOAT)
    tasks = Tasks.from_list([(x, x[:, 0] + 5), (x, x[:, 0] + 5)]).split(0.5)
    density = Density(hilly, tasks)

    def total(log_scale: Tensor, factor: Tensor, theta: Tensor) -> Tensor:
        prior = GaussianPrior(theta.new_zeros(2), log_scale, torch.arange(2), factor)
        terms, info = LogDet().terms(
            density, prior, density.shared_init, tasks.support, theta, query=tasks.query
        )
        assert info.indefinite.tolist() == [False, True]
        return terms.sum()

    at = {
        "log_scale": tensor([0.0, 0.1]),
        "factor": tensor([[0.3], [-0.2]]),
        "theta": tensor([[0.1, 0.2], [2.8, 0.3]]),
    }
    moving = leaves(at)
    grads = torch.autograd.grad(total(**moving), list(moving.values()))
    assert_slopes(dict(zip(at, grads, strict=True)), slopes(total, at, list(at), 1e-3), 1e-8)


def test_no_small_scale_spoils_the_condition() -> None:
    """A scale of 1e-9 beside others: that coordinate is the prior's, the rest as without it."""
    at = chosen(False)
    at["log_scale"] = at["log_scale"].clone()
    at["log_scale"][2] = -20.0
    density, tasks = problem()
    prior = GaussianPrior(at["loc"], at["log_scale"], torch.arange(DIM))
    terms, info = LogDet().terms(density, prior, at["shared"], tasks.support, at["theta"])
    keep = [0, 1, 3, 4, 5]
    h = hessian(TaskEnergy(density, tasks.support, at["shared"]), at["theta"])[:, keep][:, :, keep]
    scale = prior.scale[keep]
    wanted = torch.logdet(torch.eye(5, dtype=FLOAT) + scale[:, None] * h * scale)
    assert_close(terms, 0.5 * wanted, 1e-12)
    assert not bool(info.indefinite.any())


def test_it_says_what_it_cost_and_how_well_it_went() -> None:
    density, tasks = problem()
    prior = GaussianPrior(AT["loc"], AT["log_scale"], torch.arange(DIM))
    logdet = LogDet(probes=3, lanczos_steps=4, solver=CG(max_iterations=2))
    arguments = density, prior, AT["shared"], tasks.support, AT["theta"]
    _, few = logdet.terms(*arguments)
    assert few.residual is not None and few.standard_error is not None
    assert bool((few.standard_error > 0).all()) and float(few.residual.max()) > 1e-6
    assert few.gradients == 3 * (2 * (4 + 2) + 1 + 4)
    _, dense = LogDet().terms(*arguments)
    assert dense.residual is None and dense.gradients == 2 * DIM + 4 * DIM
    assert LogDet().is_dense(200) and not LogDet().is_dense(201)
    assert not replace(LogDet(), probes=4).is_dense(3)


@pytest.mark.parametrize("field", ["probes", "lanczos_steps"])
def test_numbers_that_make_no_sense_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be a whole number of at least 1.*, got 0"):
        LogDet(**{field: 0})
