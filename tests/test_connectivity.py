"""Mode connectivity: paths whose truth is known, and the gradient that their bends follow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, assert_same, case_of, widened
from linear_gaussian import LinearGaussian
from ring_tasks import SD, constant, found, rings
from scipy.integrate import quad
from scipy.optimize import minimize
from torch import Tensor, nn

from varmeta import Density, GaussianPrior, NonFiniteLoss, Tasks
from varmeta.inference.connectivity import Kind, bend_gradient, losses, mode_path, weights
from varmeta.inference.energy import TaskEnergy
from varmeta.models import network
from varmeta.seeds import generator

KINDS = get_args(Kind)


# -- exact truths ---------------------------------------------------------------------------------


def test_the_straight_line_across_a_ring_is_known() -> None:
    """At t the radius is r|1 − 2t|, so that f − constant = ½ (r²(1 − (1−2t)²) / SD)² per row."""
    density, tasks, a, b = rings([1.0, 0.7], rows=3)
    path = mode_path(density, None, a, b, tasks, steps=1)
    r = torch.tensor([1.0, 0.7], dtype=FLOAT)
    depth = r**2 * (1 - (1 - 2 * path.t[:, None]) ** 2)
    assert_close(path.line["energy"], 3 * 0.5 * (depth / SD) ** 2 + constant(3), 1e-12)
    assert_close(path.barrier(line=True), 1.5 * r**4 / SD**2, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_goes_round_the_ring(kind: Kind) -> None:
    """Its barrier is that of the best bend on the symmetry axis, which one number describes."""
    density, tasks, a, b = rings([1.0])
    path = mode_path(density, None, a, b, tasks, kind=kind, steps=400)

    def radius_squared(t: float, height: float) -> float:
        of_a, of_bend, of_b = weights(kind, torch.tensor(t, dtype=FLOAT)).tolist()
        return (of_a - of_b) ** 2 + (of_bend * height) ** 2

    def misfit(t: float, height: float) -> float:
        return 0.5 * ((radius_squared(t, height) - 1) / SD) ** 2

    def mean(height: float) -> float:
        return 2 * quad(misfit, 0, 0.5, args=(height,), epsabs=1e-11)[0]

    best = minimize(lambda h: mean(h[0]), [1.5], tol=1e-12)
    height = float(best.x[0])
    # What is left is noise of the last steps, of first order in φ and of second order in the loss.
    assert abs(float(path.bend[0] @ a[0])) < 1e-2 * height
    assert_close(path.bend.norm(dim=-1), [height], 1e-2)
    assert 0 <= mean(float(path.bend.norm())) - best.fun < 1e-3 * best.fun
    trapezoid = 2e-3 if kind == "bezier" else 1e-2  # of 61 points; a polyline has a corner
    assert_close(path.table["path"] - constant(), [best.fun], trapezoid)
    top = max(misfit(t, float(path.bend.norm())) for t in path.t.tolist())
    assert_close(path.barrier(), [top], 2e-2)
    assert top < float(path.barrier(line=True)[0]) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_bend_minimises_the_quadrature_of_the_energy(kind: Kind) -> None:
    """An oracle without symmetry: scipy on 2,000 midpoints, with a prior and unequal ends."""
    density, tasks, a, b = rings([1.0, 1.2])
    prior = GaussianPrior.create(torch.tensor([0.3, -0.2], dtype=FLOAT), [0.5, 0.8])
    b = b + 0.1
    path = mode_path(density, prior, a, b, tasks, kind=kind, steps=500, samples=8)
    nodes = (torch.arange(2000, dtype=FLOAT) + 0.5) / 2000
    of_a, of_bend, of_b = weights(kind, nodes)[..., None].unbind(-2)
    for i in range(2):
        one = tasks.select([i])

        def mean(
            bend: np.ndarray, one: Tasks = one, ends: tuple[Tensor, Tensor] = (a[i], b[i])
        ) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(bend, dtype=FLOAT, requires_grad=True)
            theta = of_a * ends[0] + of_bend * leaf + of_b * ends[1]
            loss = density.negative_log_likelihood(theta[:, None], one)[:, 0] + prior.penalty(theta)
            (grad,) = torch.autograd.grad(loss.mean(), leaf)
            return loss.mean().item(), grad.numpy()

        best = minimize(mean, path.bend[i].numpy(), jac=True, tol=1e-12)
        gap = mean(path.bend[i].numpy())[0] - best.fun
        assert 0 <= gap < 1e-3 * (mean(((a + b) / 2)[i].numpy())[0] - best.fun)
        assert_close(path.bend[i], best.x, 5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bend_follows_the_gradient_of_the_mean_energy(kind: Kind) -> None:
    density, tasks, a, b = rings([1.0, 0.7])
    prior = GaussianPrior.create(torch.tensor([0.3, -0.2], dtype=FLOAT), [0.5, 0.8])
    energy = TaskEnergy(density, tasks, density.shared_init, prior)
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 1.0], dtype=FLOAT)
    bend = torch.tensor([[0.4, 1.1], [-0.3, 0.2]], dtype=FLOAT, requires_grad=True)
    of_a, of_bend, of_b = weights(kind, t)[..., None, None].unbind(-3)
    total = energy(of_a * a + of_bend * bend + of_b * b).mean(0).sum()
    (wanted,) = torch.autograd.grad(total, bend)
    ends = torch.stack([a, b])
    assert_close(bend_gradient(kind, energy, ends, bend.detach(), t), wanted, 1e-12)


@pytest.mark.parametrize(("kind", "order"), [("bezier", 2.5), ("polyline", 1.7)])
def test_evenly_spaced_draws_err_by_a_power_of_their_number(kind: Kind, order: float) -> None:
    """Root mean square error over random starts; independent draws would have order ½."""
    density, tasks, a, b = rings([1.0])
    energy = TaskEnergy(density, tasks, density.shared_init)
    bend, ends = a.flip(-1) * 2 + 0.1, torch.stack([a, b])

    def error(samples: int) -> float:
        starts = (torch.arange(32, dtype=FLOAT) + 0.5) / 32
        each = torch.stack(
            [
                bend_gradient(
                    kind, energy, ends, bend, (torch.arange(samples, dtype=FLOAT) + u) / samples
                )
                for u in starts
            ]
        )
        return float((each - each.mean(0)).square().sum(-1).mean().sqrt())

    assert math.log2(error(16) / error(32)) > order


def test_a_polyline_is_two_straight_pieces_and_a_parabola_a_parabola() -> None:
    for kind, wanted in (
        ("polyline", [[0.0, 0.0], [2.0, 1.0], [4.0, 2.0], [5.0, 1.0], [6.0, 0.0]]),
        ("bezier", [[0.0, 0.0], [1.875, 0.75], [3.5, 1.0], [4.875, 0.75], [6.0, 0.0]]),
    ):
        path = replace(
            found(kind, steps=1),  # type: ignore[arg-type]
            a=torch.zeros(1, 2, dtype=FLOAT),
            b=torch.tensor([[6.0, 0.0]], dtype=FLOAT),
            bend=torch.tensor([[4.0, 2.0]], dtype=FLOAT),
        )
        t = torch.linspace(0, 1, 5, dtype=FLOAT)
        assert torch.equal(path.point(t), torch.tensor(wanted, dtype=FLOAT)[:, None])
        assert torch.equal(path.point(0.25), path.point(t)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_stay_where_they_are(kind: Kind) -> None:
    path = found(kind)
    noise = torch.randn(2, 2, generator=generator(3), dtype=FLOAT)
    odd = replace(path, a=path.a + noise, b=path.b - noise * math.pi)
    assert torch.equal(odd.point(0.0), odd.a) and torch.equal(odd.point(1.0), odd.b)
    for values, straight in zip(path.path.values(), path.line.values(), strict=True):
        assert torch.equal(values[[0, -1]], straight[[0, -1]])


def test_a_convex_energy_has_no_barrier() -> None:
    """On the line the energy is a parabola in t; the best bend is what quadrature says."""
    case = case_of(LinearGaussian.random(0))
    shape = (len(case.tasks), case.density.dim)
    a, b = torch.randn(2, *shape, generator=generator(1), dtype=FLOAT)
    path = mode_path(case.density, case.prior, a, b, case.tasks, shared=case.shared, steps=500)
    for line in (True, False):
        assert torch.equal(path.barrier(line=line), torch.zeros(shape[0], dtype=FLOAT))
    bent = path.line["energy"].diff(n=2, dim=0)
    assert float(bent.min()) > 0
    assert_close(bent, bent[:1].expand_as(bent), 1e-6)
    assert bool((path.table["path"] < path.table["line"]).all())
    # ∇ of ∫ E dt in φ is H (∫c² φ + ∫cα a + ∫cβ b − ∫c θ*) with ∫c², ∫cα = ∫cβ and ∫c:
    c = (2 / 15, 1 / 10, 1 / 3)
    energy = TaskEnergy(case.density, case.tasks.support, case.shared, case.prior)
    zero = torch.zeros(shape, dtype=FLOAT)
    hessian = torch.stack(
        [energy.gradient(zero + e) - energy.gradient(zero) for e in torch.eye(shape[1]).double()],
        -1,
    )
    best = -torch.linalg.solve(hessian, energy.gradient(zero))
    bend = (c[2] * best - c[1] * (a + b)) / c[0]
    assert_close(path.bend, bend, 1e-2)


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_by_itself_has_the_path_that_it_has_among_others(kind: Kind) -> None:
    both = found(kind)
    for i in range(2):
        one = mode_path(
            both.density, None, *(end[[i]] for end in (both.a, both.b)), both.tasks.select([i]),
            kind=kind, steps=40,
        )  # fmt: skip
        assert_close(one.bend, both.bend[[i]], 1e-10)
        for name, values in one.path.items():
            assert_close(values, both.path[name][:, [i]], 1e-10)


def test_padding_changes_nothing() -> None:
    case = case_of(LinearGaussian.random(0))
    shape = (len(case.tasks), case.density.dim)
    a, b = torch.randn(2, *shape, generator=generator(1), dtype=FLOAT)
    one, other = (
        mode_path(case.density, case.prior, a, b, tasks, steps=40)
        for tasks in (case.tasks, widened(case.tasks, 5))
    )
    assert_close(other.bend, one.bend, 1e-9)
    assert one.path.keys() == {"energy", "support", "query"}
    for name, values in one.path.items():
        assert_close(other.path[name], values, 1e-9)


def test_the_same_seed_gives_the_same_path_and_another_one_another() -> None:
    one, again, other = found(), found(), found(seed=1)
    assert_same(one.bend, again.bend)
    assert_same(one.path, again.path)
    assert not torch.equal(one.bend, other.bend)


def test_units_of_a_parameter_do_not_matter() -> None:
    """w in other units, the prior along with it: the same losses."""
    unit = torch.tensor([1000.0, 1e-3], dtype=FLOAT)

    def scaled(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), unit).to_event(1)) / unit
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal((w**2).sum(), SD), obs=y)

    one = found()
    other = mode_path(Density(scaled, one.tasks), None, one.a * unit, one.b * unit, one.tasks,
                      steps=40)  # fmt: skip
    assert_close(other.path["energy"], one.path["energy"], 1e-3)  # Adam's eps has a unit
    assert_close(other.bend / unit, one.bend, 1e-3)


def test_query_rows_are_reported_and_not_followed() -> None:
    """Query rows of another radius change the query loss alone."""
    density, tasks, a, b = rings([1.0, 0.7], rows=2)
    is_query = torch.tensor([[False, True]]).expand(2, 2)
    split = replace(tasks, is_query=is_query, is_split=True)
    moved = replace(split, targets=torch.where(is_query, 4.0, split.targets))
    one, other = (mode_path(density, None, a, b, t, steps=30) for t in (split, moved))
    assert_same(one.bend, other.bend)
    assert_same(one.path["energy"], other.path["energy"])
    assert_close(one.path["query"], one.path["support"], 1e-12)
    r2 = one.point(one.t).square().sum(-1)
    assert_close(other.path["query"], 0.5 * ((r2 - 4) / SD) ** 2 + constant(), 1e-9)


def test_the_energy_is_the_loss_and_the_priors_penalty() -> None:
    density, tasks, a, b = rings([1.0, 0.7])
    prior = GaussianPrior.create(torch.tensor([0.3, -0.2], dtype=FLOAT), 0.5)
    path = mode_path(density, prior, a, b, tasks, steps=20)
    theta = path.point(path.t)
    assert_close(path.path["energy"] - path.path["support"], prior.penalty(theta), 1e-10)
    again = losses(density, prior, theta, tasks, density.shared_init)
    assert_close(again["energy"], path.path["energy"], 1e-12)
    alone = mode_path(density, None, a, b, tasks, steps=20)
    assert_same(alone.path["energy"], alone.path["support"])


def test_the_table_has_a_row_per_task() -> None:
    path = found()
    table = path.table
    assert table["task"].tolist() == ["ring 0", "ring 1"]
    energy = path.path["energy"].numpy()
    assert_close(table["path_barrier"], energy.max(0) - np.maximum(energy[0], energy[-1]), 1e-12)
    assert_close(table["line_barrier"], path.barrier(line=True), 1e-12)
    assert_close(table["start"], energy[0], 1e-12)
    assert_close(table["path"], (energy[1:] + energy[:-1]).mean(0) / 2, 1e-12)
    assert "ring 1" in str(path) and path.t.shape == (61,) and energy.shape == (61, 2)


# -- errors ---------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_the_mend() -> None:
    density, tasks, a, b = rings([1.0, 0.7])
    go: Any = lambda *ends, **options: mode_path(density, None, *ends, tasks, **options)  # noqa: E731
    for ends, said in (
        ((a[:1], b), r"a has shape \(1, 2\), wanted \(2, 2\).*posterior.mean"),
        ((a, b[..., :1]), r"b has shape \(2, 1\), wanted \(2, 2\)"),
        ((a, b.float()), r"b is torch.float32 .*use b.to\(density.prior_loc\)"),
    ):
        with pytest.raises(ValueError, match=said):
            go(*ends)
    for options, said in (
        ({"kind": "spline"}, "kind must be one of bezier, polyline, got 'spline'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"points": 2}, "points must be at least 3, got 2"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"shared": torch.zeros(1, dtype=FLOAT)}, r"shared has shape \(1,\), wanted \(0,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            go(a, b, **options)
    narrow = GaussianPrior.create(torch.zeros(3, dtype=FLOAT), 1.0)
    with pytest.raises(ValueError, match="prior has 3 coordinates, the density 2"):
        mode_path(density, narrow, a, b, tasks)
    path = found(steps=1)
    with pytest.raises(ValueError, match=r"t must lie between 0 and 1, got 1\.5"):
        path.point(1.5)
    with pytest.raises(ValueError, match=r"one of energy, support.*split the tasks"):
        path.barrier("query")


def test_a_loss_that_is_not_finite_names_the_task_and_where() -> None:
    density, tasks, a, b = rings([1.0, 0.7])
    b[1, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"'ring 1' is nan along the line"):
        mode_path(density, None, a, b, tasks)
    broken = replace(tasks, targets=torch.full_like(tasks.targets, float("inf")))
    with pytest.raises(NonFiniteLoss, match=r"'ring 0' is inf along the line, at t = 0 \(2 of 2"):
        mode_path(density, None, a, -a, broken)


def test_a_loss_that_stops_being_finite_on_the_way_says_so() -> None:
    """The line is fine, and the first step of the bend is longer than numbers bear."""
    density, tasks, a, b = rings([1.0])
    with pytest.raises(NonFiniteLoss, match=r"'ring 0' is .* on the way, at t = "):
        mode_path(density, None, a, b, tasks, learning_rate=1e160, steps=3)


def test_batch_norm_in_training_is_refused_and_in_evaluation_taken() -> None:
    x = torch.randn(2, 6, 1, generator=generator(0))
    tasks = Tasks.from_list([(row, row[:, 0]) for row in x])
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    law: Any = lambda out: dist.Normal(out[:, 0], 0.3)  # noqa: E731
    with pytest.raises(ValueError, match="module has batch norm in training mode"):
        network(net, law)
    density = Density(network(net.eval(), law), tasks)
    a, b = torch.randn(2, 2, density.dim, generator=generator(1))
    assert bool(mode_path(density, None, a, b, tasks, steps=2).path["energy"].isfinite().all())
