"""A model that cannot be drawn, or only slowly, is said to be so with what mends it."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm


def by_factor(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        if y is not None:
            pyro.factor("likelihood", -((y - level) ** 2))


class InPlace(dist.Exponential):
    """Its sample fills a tensor that knows nothing of tasks."""

    has_rsample = False

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return torch.empty((*sample_shape, *self.batch_shape)).exponential_() / self.rate

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> InPlace:
        return InPlace(self.rate.expand(batch_shape))


def in_place(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", InPlace(torch.exp(level + 0 * x[..., 0])), obs=y)


ROWS = torch.zeros(2, 1)
TASKS = vm.Tasks.from_list([(ROWS, torch.tensor([1.0, 2.0])), (ROWS, torch.tensor([3.0, 4.0]))])


def test_a_factor_that_cannot_be_drawn_says_what_can() -> None:
    posterior = vm.fit(vm.NoPooling(), vm.Density(by_factor, TASKS), TASKS).posterior()
    with pytest.raises(ValueError, match=r"pyro\.factor.*TorchDistribution"):
        posterior.predict(TASKS, count=2, generator=torch.Generator().manual_seed(0))


def test_a_law_drawn_in_place_is_slow_and_says_what_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "varmeta"):  # before any training, and once
        density = vm.Density(in_place, TASKS)
        density.predict(torch.zeros(2, 2, 1), TASKS, torch.Generator().manual_seed(0))
    (said,) = [m for m in caplog.messages if "one by one" in m]
    assert "torch.rand(" in said and "functorch" not in said
