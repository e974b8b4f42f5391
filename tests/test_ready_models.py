"""Networks as models, the sinusoid stream, and the shipped problems."""

from __future__ import annotations

import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from varmeta import IMAML, Density, NewtonCG, Tasks, TaskSource, fit
from varmeta.data import NAMES, load
from varmeta.models import network, sinusoids
from varmeta.problems import PROBLEMS


def test_network_equals_the_module() -> None:
    mlp = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    before = [p.detach().clone() for p in mlp.parameters()]
    x, y = torch.randn(2, 7, 2).double(), torch.randint(3, (2, 7))
    tasks = Tasks.from_list(list(zip(x, y, strict=True)))
    density = Density(network(mlp, lambda out: dist.Categorical(logits=out)), tasks)
    theta = density.prior_loc.expand(2, -1)  # θ0 starts at the module's own initialisation
    loss = density.negative_log_likelihood(theta, tasks)
    for i in range(2):
        own = nn.functional.cross_entropy(mlp(x[i]), y[i], reduction="sum")
        assert torch.allclose(loss[i], own)
    assert all(torch.equal(a, b) for a, b in zip(before, mlp.parameters(), strict=True))


def test_sinusoids_are_as_published() -> None:
    source = TaskSource(sinusoids(2000, support=5, query=10), seed=3)
    tasks = source.batch(7)
    assert torch.equal(tasks.inputs, source.batch(7).inputs)
    assert not torch.equal(tasks.inputs, source.batch(8).inputs)
    assert tasks.support.inputs.shape == (2000, 5, 1) and tasks.query.targets.shape == (2000, 10)
    assert tasks.inputs.abs().max() <= 5 and 4.9 < tasks.targets.abs().max() <= 5
    # E A² E sin² for A ~ U[0.1, 5] and x uniform over 10 ≈ 1.6 periods; 5 standard errors wide
    power = tasks.targets.square().mean()
    assert power == pytest.approx(8.5 / 2, abs=0.5)


def test_imaml_learns_on_a_stream() -> None:
    """The path hangs on rounding: a start moved by 1e-12 to 1e-6 gives ratios of 0.63 to 0.69."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    model = network(mlp, lambda out: dist.Normal(out[:, 0], 0.5))
    source = TaskSource(sinusoids(32, support=5, query=5, dtype=torch.float64))
    density = Density(model, source)
    strategy = IMAML(steps=15, minimiser=NewtonCG(max_iterations=15), posterior_kind="delta")
    with warnings.catch_warnings():
        # A network's inner problem is not always solved; tested elsewhere.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fit(strategy, density, source)
        test = source.batch(1000)
        adapted = result.adapt(test.support).mean
    start = result.prior.loc.expand_as(adapted)
    untrained = density.prior_loc.expand_as(adapted)
    losses = [
        float(density.negative_log_likelihood(theta, test.query).sum().detach())
        for theta in (adapted, start, untrained)
    ]
    assert losses[0] < losses[1] and losses[0] < 0.8 * losses[2]


@pytest.mark.parametrize("name", NAMES)
def test_problems_load_their_data(name: str) -> None:
    problem = PROBLEMS[name](0)
    total = int(problem.train.num_rows.sum())
    if problem.new is not None:
        total += int(problem.new.num_rows.sum())
        assert not set(problem.new.names) & set(problem.train.names)
    assert total == len(load(name))
