"""The same numbers on a GPU as on the CPU; skipped, saying so, where there is none.

The precision option runs here too: bfloat16 products exist on every CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE, Entry
from helpers import assert_close, case_of
from linear_gaussian import LinearGaussian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta import (
    CG,
    IMAML,
    Density,
    GaussianPrior,
    GradientDescent,
    Implicit,
    Tasks,
    TaskSource,
    Unrolled,
    fit,
    prox,
)
from varmeta.inference.base import Batch
from varmeta.models import sinusoids
from varmeta.models.network import network
from varmeta.seeds import generator

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
FIXED = IMAML(
    minimiser=GradientDescent(0.005, 16, tolerance=0), adjoint=Implicit(CG(5, tolerance=0))
)


def regression(dtype: torch.dtype, device: str = "cpu") -> tuple[Density, GaussianPrior, Tasks]:
    """Five small sinusoids of amplitude below 1 and a tanh network: no kinks, H + Λ positive."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)
    tasks = sinusoids(5, dtype=dtype)(generator(0))
    tasks = replace(tasks, targets=0.2 * tasks.targets).to(device=device)
    density = Density(network(module, lambda out: dist.Normal(out[:, 0], 1.0)), tasks)
    return density, GaussianPrior.create(density.prior_loc.requires_grad_(), 10**-0.5), tasks


def meta_gradient(strategy: IMAML, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    density, prior, tasks = regression(dtype, device)
    losses, _ = strategy.losses(density, prior, density.shared_init, tasks)
    return torch.autograd.grad(losses.mean(), prior.loc)[0].cpu()


@cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize(
    "strategy", [FIXED, IMAML(), IMAML(adjoint=Unrolled(), minimiser=FIXED.minimiser)]
)
def test_meta_gradient_on_a_gpu(strategy: IMAML, dtype: torch.dtype, tolerance: float) -> None:
    assert_close(meta_gradient(strategy, dtype, "cuda"), meta_gradient(strategy, dtype), tolerance)


@cuda
@pytest.mark.parametrize(
    "entry",
    [e for n, e in CATALOGUE.items() if n != "nuts"],
    ids=[n for n in CATALOGUE if n != "nuts"],
)
def test_every_strategy_runs_on_a_gpu(entry: Entry) -> None:
    tasks = case_of(LinearGaussian.random(3, num_tasks=4, dim=2)).tasks.support.to(device="cuda")
    density = Density(case_of(LinearGaussian.random(3, num_tasks=4, dim=2)).density.model, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fit(entry.strategy, density, tasks)
        posterior = result.adapt(tasks)
    assert result.prior.loc.is_cuda and posterior.mean.is_cuda
    assert bool(posterior.mean.isfinite().all())


@cuda
def test_a_fixed_budget_waits_for_the_device_once() -> None:
    density, prior, tasks = regression(torch.float32, "cuda")
    state = FIXED.init(density, prior, tasks, generator(0))
    batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
    for _ in range(25):  # recorded by then
        FIXED.step(density, state, batch, generator(0))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            FIXED.step(density, state, batch, generator(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(w.message) for w in seen) <= 1


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: values of tensors that it asks for.

    But those of `host`, which lie with the host wherever the rest does.
    """

    asking = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
    count = 0

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.host = {t.data_ptr() for t in host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = [a for a in (args[1] if name == "index" else ()) if a is not None]
        asks = name in self.asking or any(m.dtype == torch.bool for m in masks)
        self.count += asks and args[0].data_ptr() not in self.host
        return func(*args, **(kwargs or {}))


def test_a_fixed_budget_asks_for_no_value() -> None:
    """What can be seen of that without a device."""
    with Waits() as seen:
        x = torch.arange(3.0)
        bool(x[0] > 0), x[x > 0], x.nonzero(), x[torch.tensor([0])]
    assert seen.count == 3
    density, prior, tasks = regression(torch.float32)
    state = FIXED.init(density, prior, tasks, generator(0))
    batch = Batch(tasks, torch.arange(len(tasks)), len(tasks))
    for _ in range(25):
        FIXED.step(density, state, batch, generator(0))
    steps = [kept["step"] for kept in state.optimisers["meta"].state.values()]  # Adam's count
    with Waits(host=steps) as seen:
        FIXED.step(density, state, batch, generator(0))
    assert steps and seen.count == 0


@cuda
def test_a_stream_is_moved_to_its_device() -> None:
    source = TaskSource(sinusoids(3), device="cuda")
    assert source.batch(0).inputs.is_cuda
    assert torch.equal(source.batch(0).inputs.cpu(), TaskSource(sinusoids(3)).batch(0).inputs)


def test_bfloat16_steps_cost_this_much_of_the_gradient() -> None:
    """bfloat16 rounds to 2⁻⁸ = 0.4%; the gradient is taken at full precision from there."""
    exact = meta_gradient(FIXED, torch.float32)
    rough = replace(FIXED, minimiser=replace(FIXED.minimiser, precision="bf16"))  # type: ignore[type-var]
    error = float((meta_gradient(rough, torch.float32) - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.05


def test_tf32_is_the_full_precision_where_there_is_none() -> None:
    before = torch.get_float32_matmul_precision()
    plain = replace(FIXED, minimiser=replace(FIXED.minimiser, precision="tf32"))  # type: ignore[type-var]
    assert torch.equal(meta_gradient(plain, torch.float32), meta_gradient(FIXED, torch.float32))
    assert torch.get_float32_matmul_precision() == before


def test_precisions_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="one of 'full', 'tf32', 'bf16', got 'fp8'"):
        GradientDescent(0.1, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unrolled steps are differentiated at full precision"):
        prox(
            lambda t: t.square().sum(-1),
            torch.ones(1, 1),
            minimiser=GradientDescent(0.1, precision="bf16"),
            adjoint=Unrolled(),
        )


def test_tasks_of_another_type_or_device_are_refused() -> None:
    density, prior, tasks = regression(torch.float32)
    with pytest.raises(ValueError, match=r"tasks holds torch\.float64, the density torch\.float32"):
        FIXED.losses(density, prior, density.shared_init, tasks.to(torch.float64))
    with pytest.raises(ValueError, match=r"tasks is on cpu, the density on meta; move .*\.to\("):
        density.check_data(tasks, density.shared_init.to("meta"))
