"""Density: a batched Pyro model is the same as a loop over tasks written by hand."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from density_cases import CASES, FLOAT, Case, build, numbers, reals, values

from varmeta.models.density import Density
from varmeta.seeds import generator
from varmeta.tasks import Tasks, TaskSource

everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def loop(case: Case, theta: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """θ `[T, D]` and φ `[P]` or `[T, P]` to `[T, N]`."""
    out, tasks = torch.zeros(case.tasks.mask.shape, dtype=theta.dtype), case.tasks
    for i, mask in enumerate(tasks.mask):
        phi = shared if shared.dim() == 1 else shared[i]
        out[i, mask] = case.by_hand(theta[i], phi, tasks.inputs[i][mask], tasks.targets[i][mask])
    return out


# -- values and gradients -------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("draws", [(), (3,), (2, 2)])
@pytest.mark.parametrize("per_draw", [False, True])
def test_log_likelihood_is_the_loop_over_tasks(case, draws, per_draw):
    density = build(case)
    assert (density.dim, density.shared_dim) == (case.dim, case.shared_dim)
    theta, shared = values(case, *draws)
    if per_draw:
        shared = 0.5 * numbers(*draws, len(case.tasks), case.shared_dim, seed=5)
    out = density.log_likelihood(theta, case.tasks, shared)
    flat = theta.reshape(-1, *theta.shape[-2:])
    phis = (
        shared.reshape(len(flat), len(case.tasks), -1 if case.shared_dim else 0)
        if per_draw
        else [shared] * len(flat)
    )
    by_hand = torch.stack([loop(case, t, p) for t, p in zip(flat, phis, strict=True)])
    torch.testing.assert_close(out, by_hand.reshape(out.shape), rtol=1e-12, atol=1e-12)
    total = density.negative_log_likelihood(theta, case.tasks, shared)
    torch.testing.assert_close(total, -out.sum(-1))


@everywhere
def test_gradients_are_those_of_finite_differences(case):
    density = build(case)
    theta, shared = (v.requires_grad_() for v in values(case))
    weights = numbers(*case.tasks.mask.shape, seed=3)

    def loss(theta, shared):
        return (weights * density.log_likelihood(theta, case.tasks, shared)).sum()

    grads = torch.autograd.grad(loss(theta, shared), (theta, shared), allow_unused=True)
    for k, grad in enumerate(grads):
        flat = [theta.detach(), shared.detach()]
        if not flat[k].numel():
            continue
        for j in range(flat[k].numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [v.clone() for v in flat]
                moved[k].view(-1)[j] += step
                ends.append(loss(*moved))
            slope = (ends[0] - ends[1]) / 2e-5  # error h²/6 f‴ + ε f/h, about 1e-9 here
            torch.testing.assert_close(grad.view(-1)[j], slope, rtol=1e-6, atol=1e-6)


def test_the_default_shared_value_is_where_it_starts():
    case = CASES["normal"]
    density, (theta, _) = build(case), values(case)
    one, two = (density.log_likelihood(theta, case.tasks, s) for s in (None, density.shared_init))
    assert torch.equal(one, two) and abs(float(density.shared_init)) < 0.1  # LogNormal(0, 1)


def test_parameters_start_at_the_modules_own_values():
    net = CASES["network"].model
    start = build(CASES["network"]).shared_init
    by_hand = [net.last.weight.flatten(), net.last.bias, net.bias[None], net.sd.log()[None]]
    torch.testing.assert_close(start, torch.cat(by_hand).detach())


def test_a_stream_of_tasks_serves_as_well_as_tasks():
    case = CASES["normal"]
    density = Density(case.model, TaskSource(lambda g: case.tasks), shared=["s"])
    assert density.dim == case.dim


# -- coordinates ----------------------------------------------------------------------------------


@everywhere
def test_constrain_and_unconstrain_are_inverse(case):
    density = build(case)
    theta, shared = values(case, 4)
    constrained = density.constrain(theta)
    for site in density.sites:
        assert constrained[site.name].shape == (4, len(case.tasks), *site.shape)
        assert bool(site.support.check(constrained[site.name]).all())
    torch.testing.assert_close(density.unconstrain(constrained), theta, rtol=1e-9, atol=1e-9)
    phis = density.constrain_shared(shared)
    assert {s.name: s.shape for s in density.shared_sites} == {n: v.shape for n, v in phis.items()}
    assert len(density.site_index) == density.dim


def test_site_table_says_what_the_model_says():
    table = build(CASES["constrained"]).site_table().set_index("site")
    assert table["role"].tolist() == ["adapted"] * 5
    assert table["shape"].tolist() == [(), (), (3,), (), ()]
    assert table["size"].tolist() == [1, 1, 2, 1, 1]
    supports = ["GreaterThanEq(lower_bound=0.0)", "Interval(lower_bound=0.0, upper_bound=1.0)"]
    assert table["support"].tolist() == [
        *supports,
        "Simplex",
        "GreaterThan(lower_bound=0.0)",
        "Interval(lower_bound=2.0, upper_bound=5.0)",
    ]
    assert table["prior"].tolist() == [
        "HalfNormal(1)",
        "Beta(2, 3)",
        "Dirichlet(1)",
        "LogNormal(0, 0.5)",
        "Uniform(2, 5)",
    ]
    shared = build(CASES["plain module"]).site_table().set_index("site")
    assert shared.loc["sd", ["role", "prior"]].tolist() == ["param", "flat"]
    assert shared.loc["b", ["loc", "scale"]].tolist() == [0.0, 1.0]
    assert "LogNormal(0, 1)" in repr(build(CASES["normal"])), "not cut off by pandas"


def test_shared_log_prior_is_the_users():
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.ones(2, dtype=FLOAT), 2.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.5))
        with pyro.plate("three", 3):
            g = pyro.sample("g", dist.Gamma(2.0, 3.0))
        flat = pyro.param("flat", torch.tensor(0.0, dtype=FLOAT))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(a + x @ w + g.sum() + flat, s), obs=y)

    density = Density(model, reals(2), shared=["w", "s", "g"])
    phi = 0.5 * numbers(7)
    w, s, g = phi[:2], phi[2].exp(), phi[3:6].exp()
    by_hand = td.Normal(1.0, 2.0).log_prob(w).sum() + td.HalfNormal(1.5).log_prob(s)
    by_hand = by_hand + td.Gamma(2.0, 3.0).log_prob(g).sum()
    torch.testing.assert_close(density.shared_log_prior(phi), by_hand)
    assert float(build(CASES["logistic"]).shared_log_prior(numbers(0))) == 0.0


def test_priors_are_placed_on_the_unconstrained_scale():
    density = build(CASES["normal"])
    assert density.prior_loc.tolist() == [0.0, 0.0, 0.0]
    assert density.prior_scale.tolist() == [1.0, 1.0, 3.0]
    assert density.site_index.tolist() == [0, 0, 1]


# -- predicting -----------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("draws", [(), (2, 3)])
def test_predictions_have_the_targets_shape_and_follow_the_generator(case, draws):
    density, (theta, shared) = build(case), values(case, *draws)
    phi = numbers(*theta.shape[:-1], case.shared_dim)
    out, again, other = (
        density.predict(theta, case.tasks, generator(seed), phi) for seed in (0, 0, 1)
    )
    size = (*draws, *case.tasks.mask.shape)
    event = () if len(density.observed) == 2 else case.tasks.targets.shape[2:]
    assert set(out) == set(density.observed)
    for name, value in out.items():
        assert value.shape == (*size, *event) and value.isfinite().all()
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
    assert set(density.predict(theta, case.tasks, generator(0), shared)) == set(out)


MANY, DRAWS, Z = 4000, 8, 5.0  # a mean of 4000 is off by 5 standard errors once in 2 million
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=FLOAT)
LAWS = {  # of the linear predictor m [N]
    "normal": lambda m: dist.Normal(m, 2.0),
    "poisson": lambda m: dist.Poisson(m.exp()),
    "bernoulli": lambda m: dist.Bernoulli(logits=m),
    "categorical": lambda m: dist.Categorical(logits=torch.stack([m, -m, 0 * m], -1)),
    "student": lambda m: dist.StudentT(20.0, m, 0.5),
    "gamma": lambda m: dist.Gamma(m.exp(), 2.0),
    "binomial": lambda m: dist.Binomial(6, logits=m),
    "beta": lambda m: dist.Beta(m.exp(), 1.5),  # cannot be drawn inside vmap
    "von mises": lambda m: dist.VonMises(m, 3.0),  # nor can this one
    "multivariate": lambda m: dist.MultivariateNormal(torch.stack([m, -m], -1), COVARIANCE),
}


def statistics(name: str, law: Any, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Functions of the draws `[S, N, ...]`, and what they are on average."""
    if name == "categorical":
        return [(F.one_hot(y, 3).to(FLOAT), law.probs)]
    if name == "von mises":  # E cos(y - m) = I1(3) / I0(3)
        kappa = torch.tensor(3.0, dtype=FLOAT)
        resultant = torch.special.i1(kappa) / torch.special.i0(kappa)
        return [((y - law.mean).cos(), resultant), ((y - law.mean).sin(), 0 * resultant)]
    offset = y - law.mean
    out = [(y, law.mean), (offset**2, law.variance)]
    if name == "multivariate":
        out.append((offset[..., 0] * offset[..., 1], COVARIANCE[0, 1]))
    return out


@pytest.mark.parametrize("name", LAWS)
def test_predictions_follow_the_law_of_the_model(name):
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", LAWS[name](a * x[:, 0]), obs=y)

    x = torch.tensor([0.5, -1.0], dtype=FLOAT)
    law, many = LAWS[name](0.7 * x), x.repeat(MANY // DRAWS)
    tasks = Tasks.from_list([(many[:, None], LAWS[name](0.7 * many).sample())])
    density = Density(model, tasks)
    theta = torch.full((DRAWS, 1, 1), 0.7, dtype=FLOAT)
    y = density.predict(theta, tasks, generator(3))["y"]
    for sample, expected in statistics(name, law, y.reshape(MANY, 2, *law.event_shape)):
        error = (sample.mean(0) - expected).abs()
        assert (error < Z * sample.std(0) / MANY**0.5).all()


def test_draws_differ_between_tasks_and_draws():
    case = CASES["normal"]
    out = build(case).predict(torch.zeros(2, 3, 3, dtype=FLOAT), case.tasks, generator(0))["y"]
    assert len(out.flatten().unique()) == out.numel()


# -- what a model may not know --------------------------------------------------------------------


def test_silent_in_the_first_task_is_not_silent():
    """A slope does nothing where its input is 0: another task, or other inputs, show it."""

    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(slope * x[:, 0], 1.0), obs=y)

    zero, one = (torch.full((2, 1), v, dtype=FLOAT) for v in (0.0, 1.0))
    y = torch.zeros(2, dtype=FLOAT)
    assert Density(model, Tasks.from_list([(zero, y), (one, y)])).dim == 1
    assert Density(model, Tasks.from_list([(zero, y)])).dim == 1


def test_parameters_that_the_user_froze_stay_frozen():
    names = [site.name for site in build(CASES["network"]).shared_sites]
    assert "frozen" not in names and len(names) == 4


def test_it_may_be_built_where_gradients_are_off():
    with torch.no_grad():
        build(CASES["normal"])
