"""Tasks of like length are evaluated together: the same numbers, of few more rows than exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from density_cases import CASES, Case, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta import Density, GaussianPrior, NoPooling, Tasks, evidence, fit, lengths, to_arviz
from varmeta.inference.energy import TaskEnergy
from varmeta.models.capture import CALLS_BEFORE_CAPTURE
from varmeta.seeds import generator

FLOAT = torch.float64
LONG = torch.tensor([3, 40, 3, 0, 4, 3])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tasks are worth it, too."""
    monkeypatch.setattr(lengths, "WORTH", 0)
    yield


@pytest.mark.parametrize("worth", [0, 100, 20_000])
def test_groups_are_of_like_length(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "WORTH", worth)
    length = torch.randint(1, 4000, (500,), generator=generator(0)) // torch.arange(1, 501)
    groups = lengths.alike(length, 2)
    assert groups is not None
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(500))
    widths = [int(length[g].max().clamp(min=1)) for g in groups]
    assert widths == sorted(widths, reverse=True)
    padded = sum(w * len(g) for w, g in zip(widths, groups, strict=True))
    assert len(groups) <= lengths.MOST
    assert padded <= 2.5 * int(length.clamp(min=1).sum()) + worth / 2 * 12  # 12 octaves


@pytest.mark.parametrize(
    "length",
    [torch.tensor([7]), torch.full((1000,), 4000), torch.arange(500, 1000), torch.tensor([1, 30])],
    ids=["one task", "equal tasks", "little padding", "few numbers"],
)
def test_one_group_is_left_as_it_is(length: Tensor) -> None:
    assert lengths.alike(length, 2) is None


def test_no_length_is_beyond_the_first_octave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the longest is: a logarithm of 1 may be rounded below 0."""
    monkeypatch.setattr(lengths, "WORTH", 0)
    for widest in range(3, 600):
        groups = lengths.alike(torch.tensor([widest, widest, *[1] * 9]), 2)
        assert groups is not None and [len(g) for g in groups] == [2, 9]


def ragged(case: Case, rows: Tensor = LONG) -> Tasks:
    """The case's rows, over and over, as tasks of these lengths; holes among a task's rows, too."""
    data = case.tasks
    column = torch.arange(int(rows.max())) % int(data.num_rows.min())
    tasks = [k % len(data) for k in range(len(rows))]
    mask = torch.arange(int(rows.max())) < rows[:, None]
    mask[2, 1::2] = False
    taken = [t[tasks][:, column] for t in (data.inputs, data.targets)]
    return Tasks(*taken, mask, torch.zeros_like(mask), tuple(map(str, range(len(rows)))))


@pytest.mark.parametrize("name", ["normal", "network", "categorical"])
def test_a_grouped_energy_is_the_padded_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, gradient, products, and derivatives in θ, φ and the prior."""
    case = CASES[name]
    density = build(case)
    noise = generator(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=density.prior_loc.dtype)

    theta, v = 0.3 * normal(len(LONG), density.dim), normal(len(LONG), density.dim)
    prior = GaussianPrior.from_density(density)

    def found() -> list[Tensor]:
        tasks = ragged(case)
        energy = TaskEnergy(density, tasks, density.shared_init.clone().requires_grad_(), prior)
        leaves = [energy.shared, prior.loc.requires_grad_(), prior.log_scale.requires_grad_()]
        at = theta.clone().requires_grad_()
        grad = energy.gradient(at)
        pulled = torch.autograd.grad((grad * v).sum(), [at, *leaves], materialize_grads=True)
        loss = torch.autograd.grad(energy.loss(at).sum(), leaves, materialize_grads=True)
        value, slope = energy.value_and_gradient(theta)
        curve = energy.linearise(theta)
        out = [grad.detach(), *pulled, *loss, value, slope, curve.value, curve.product(v)]
        out.append(energy.linearise(theta, gauss_newton=True).product(v))
        return out

    padded = found()
    monkeypatch.setattr(lengths, "WORTH", 0)
    groups = ragged(case).buckets
    assert groups is not None and len(groups.groups) == 3
    # Sums in another order are rounded in another way.
    close: Any = (
        {"rtol": 1e-9, "atol": 1e-9} if theta.dtype == FLOAT else {"rtol": 1e-4, "atol": 1e-4}
    )
    for got, wanted in zip(found(), padded, strict=True):
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.usefixtures("eager")
def test_draws_with_a_phi_of_their_own() -> None:
    case = CASES["normal"]
    density, data = build(case), ragged(case)
    like = {"dtype": density.prior_loc.dtype}
    theta = torch.randn(3, len(LONG), density.dim, generator=generator(0), **like)
    shared = torch.randn(3, len(LONG), density.shared_dim, generator=generator(1), **like)
    for phi in (shared, shared[0, 0]):
        wanted = -density.log_likelihood(theta, data, phi).sum(-1)
        torch.testing.assert_close(density.negative_log_likelihood(theta, data, phi), wanted)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.numbers = max(self.numbers, made.numel())
        return out


def line(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", x.shape[-2]):
        pyro.sample("y", dist.Normal(level + slope * x[..., 0], 0.5), obs=y)


def lines(*counts: int) -> Tasks:
    noise = generator(0)
    x = [torch.randn(n, 1, generator=noise, dtype=FLOAT) for n in counts]
    return Tasks.from_list([(t, torch.randn(len(t), generator=noise, dtype=FLOAT)) for t in x])


def test_a_long_task_does_not_pad_the_short_ones() -> None:
    """Nowhere from a density's checks to the gradient and the products of 3,000 tasks."""
    data = lines(3000, *[2] * 3000)
    rows = int(data.num_rows.sum())
    assert data.padded_rows == rows  # found once
    with Largest() as seen:
        density = Density(line, data)
    padding = data.mask.numel()
    assert seen.numbers == padding  # whether the data are finite is asked as they stand
    energy = TaskEnergy(density, data, density.shared_init, GaussianPrior.from_density(density))
    theta = torch.zeros(len(data), 2, dtype=FLOAT)
    with Largest() as seen:
        energy.value_and_gradient(theta)
        energy.linearise(theta).product(theta)
        energy.linearise(theta, gauss_newton=True).product(theta)
        density.negative_log_likelihood(theta.expand(3, -1, -1), data)
    assert seen.numbers <= 2 * 3 * rows


@pytest.mark.usefixtures("eager")
def test_groups_are_recorded_as_one_program() -> None:
    data = lines(30, 2, 3, 2)
    density = Density(line, data)
    energy = TaskEnergy(density, data, density.shared_init, GaussianPrior.from_density(density))
    theta = torch.randn(4, 2, generator=generator(0), dtype=FLOAT)
    first = [*energy.value_and_gradient(theta), energy.linearise(theta).product(theta)]
    for _ in range(CALLS_BEFORE_CAPTURE):
        again = [*energy.value_and_gradient(theta), energy.linearise(theta).product(theta)]
    assert density.execution() == {
        "energy of 2 lengths: gradient": "recorded",
        "energy of 2 lengths: linearise": "recorded",
    }
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_selecting_short_tasks_does_not_copy_the_long_one() -> None:
    data = lines(3000, *[2] * 1000)
    with Largest() as seen:
        some = data.select(range(1, 1001))
    assert some.mask.shape == (1000, 2) and seen.numbers <= 1000 * 3000  # the mask's bytes
    assert torch.equal(some.inputs, data.inputs[1:, :2])
    assert torch.equal(some.row_ids, data.row_ids[1:, :2])  # type: ignore[index]


def test_a_comparison_of_very_different_lengths_is_that_of_each_task_alone() -> None:
    """Posterior means in closed form; evidence and export take the same tasks."""
    data = lines(2000, *[3] * 40)
    assert data.buckets is not None
    density = Density(line, data)
    result = fit(NoPooling(), density, data, progress=False)
    posterior = result.posterior()
    x = torch.cat([torch.ones_like(data.inputs), data.inputs], -1) * data.mask[..., None]
    gram = x.mT @ x / 0.25 + torch.eye(2, dtype=FLOAT) / 25
    wanted = torch.linalg.solve(gram, x.mT @ (data.targets * data.mask)[..., None] / 0.25)[..., 0]
    torch.testing.assert_close(posterior.mean, wanted, rtol=1e-5, atol=1e-6)
    found = evidence(posterior, result.prior, data, draws=100)
    assert len(found.log_evidence) == 41 and bool(found.log_evidence.isfinite().all())
    exported = to_arviz(result, posterior=posterior, draws=2)
    assert exported["observed_data"].sizes["row"] == 2120


def test_a_hundred_thousand_tasks_of_one_row() -> None:
    """Each posterior mean in closed form: y / (1 + ¼ / 5²) for the level."""
    noise = generator(0)
    y = torch.randn(100_000, 1, generator=noise, dtype=FLOAT)
    mask = torch.ones_like(y, dtype=torch.bool)
    names = tuple(map(str, range(len(y))))
    data = Tasks(torch.zeros(*y.shape, 1, dtype=FLOAT), y, mask, ~mask, names)

    def level(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("level", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", x.shape[-2]):
            pyro.sample("y", dist.Normal(mean + 0 * x[..., 0], 0.5), obs=y)

    posterior = fit(NoPooling(), Density(level, data), data, progress=False).posterior()
    torch.testing.assert_close(posterior.mean, y / 1.01, rtol=1e-6, atol=1e-9)
