"""A memory budget: how many tasks fit, and that fewer at once give the same gradient."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from helpers import case_of
from linear_gaussian import LinearGaussian
from torch import nn

from varmeta import IMAML, MAML, Density, GaussianPrior, Tasks, fit
from varmeta.inference.memory import bytes_per_task
from varmeta.models.network import network

CASE = case_of(LinearGaussian.random(3, num_tasks=5, dim=2))


def network_bytes(rows: int, width: int) -> int:
    tasks = Tasks.from_list([(torch.ones(rows, 1), torch.ones(rows))])
    module = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
    density = Density(network(module, lambda out: dist.Normal(out[:, 0], 1.0)), tasks)
    prior = GaussianPrior.from_density(density)
    return bytes_per_task(density, prior, density.shared_init, tasks, vectors=0)


def test_bytes_follow_rows_and_width() -> None:
    """Activations of a hidden layer, rows × width floats each, dominate."""
    ratio = network_bytes(400, 64) / network_bytes(200, 64)
    assert 1.8 < ratio < 2.2
    assert network_bytes(400, 64) > 2 * 400 * 64 * 4  # tanh and what its slope multiplies


@pytest.mark.parametrize("strategy", [IMAML, MAML])
def test_a_small_budget_changes_nothing_but_the_parts(
    strategy: type[IMAML | MAML], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    losses = strategy.task_losses

    def spy(self, density, state, batch, generator):  # type: ignore[no-untyped-def]
        sizes.append(len(batch.tasks))
        return losses(self, density, state, batch, generator)

    monkeypatch.setattr(strategy, "task_losses", spy)
    prior = GaussianPrior.from_density(CASE.density)
    one = bytes_per_task(
        CASE.density, prior, CASE.density.shared_init, CASE.tasks, strategy().kept_vectors
    )
    whole = fit(strategy(steps=2, optimiser="adam"), CASE.density, CASE.tasks)
    parts = fit(
        strategy(steps=2, memory=2.5 * one / 2**30, optimiser="adam"), CASE.density, CASE.tasks
    )
    assert sizes == [5, 5, 2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(parts.prior.loc, whole.prior.loc, rtol=1e-9, atol=1e-9)


def test_one_task_is_always_possible() -> None:
    result = fit(IMAML(steps=1, memory=1e-12), CASE.density, CASE.tasks)
    assert result.finished


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"memory must be positive .*, got -1"):
        IMAML(memory=-1)
    with pytest.raises(ValueError, match="tasks_at_once or memory, not both"):
        IMAML(memory=1, tasks_at_once=3)
    with pytest.raises(ValueError, match=r"steps must be .* at least 1, got 0"):
        IMAML(steps=0)
