"""Modules, the laws of their scales, and bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import torch
from helpers import FLOAT, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

from varmeta import Density, GaussianPrior, JointVariational, Modules, Tasks, fit, hierarchy
from varmeta.models import Hyperprior, network

LAWS = ["half-normal", "half-cauchy", "log-cauchy", "exponential"]


def small_network() -> Density:
    module = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))
    model = network(module, lambda out: dist.Categorical(logits=out))
    return Density(model, Tasks.from_list([(torch.zeros(4, 1), torch.zeros(4).long())]))


NETWORK = small_network()


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        ("site", {"0.weight": 3, "0.bias": 3, "2.weight": 6, "2.bias": 2}),
        ("layer", {"0": 6, "2": 8}),
        ("all", {"all": 14}),
        (lambda name: name.rpartition(".")[2], {"weight": 9, "bias": 5}),
    ],
)
def test_the_usual_partitions(by: Any, wanted: dict[str, int]) -> None:
    modules = Modules.of(NETWORK, by)
    assert dict(zip(modules.names, modules.sizes, strict=True)) == wanted
    printed = str(modules).split("\n")
    assert printed[0].split() == ["module", "size"]
    assert [line.split() for line in printed[1:]] == [[n, str(s)] for n, s in wanted.items()]
    prior = GaussianPrior.from_density(NETWORK, scales=by)
    assert prior.modules.names == tuple(wanted) and prior.log_scale.shape == (len(wanted),)
    for name, site in zip(modules.names, wanted, strict=True):
        assert int(modules.select([name]).sum()) == wanted[site]


def test_groups_are_those_of_the_sites() -> None:
    modules = Modules.of(NETWORK, "layer")
    owner = [NETWORK.sites[int(k)].name.split(".")[0] for k in NETWORK.site_index]
    assert [modules.names[int(g)] for g in modules.groups] == owner


def test_by_coordinate_names_them() -> None:
    names = Modules.of(NETWORK, "coordinate").names
    assert names[:4] == ("0.weight[0, 0]", "0.weight[1, 0]", "0.weight[2, 0]", "0.bias[0]")
    assert len(set(names)) == 14

    def scalar(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    density = Density(scalar, Tasks.from_list([(torch.zeros(2, 1), torch.zeros(2))]))
    assert Modules.of(density, "coordinate").names == ("a",)


def test_any_partition_can_be_given() -> None:
    modules = Modules(("odd", "even"), torch.arange(14) % 2)
    prior = GaussianPrior.from_density(NETWORK, scales=modules)
    assert prior.modules.sizes == [7, 7] and prior.modules.names == ("odd", "even")
    again = prior.moved(prior.loc + 1, prior.log_scale, None)
    assert again.modules.names == ("odd", "even")
    unnamed = GaussianPrior.create(torch.zeros(3), [1.0, 2.0], groups=torch.tensor([0, 1, 1]))
    assert unnamed.modules.names == ("0", "1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Modules(("a",), torch.zeros(3)), r"groups must be \[D\] of integers"),
        (lambda: Modules(("a",), torch.tensor([0, 1])), "numbers from 0 to 1, and there are 1"),
        (lambda: Modules(("a", "b"), torch.tensor([0, 0])), "module 'b' has no coordinates"),
        (lambda: Modules(("a", "a"), torch.tensor([0, 1])), "two modules are called 'a'"),
        (lambda: Modules.of(NETWORK, "row"), "'site', 'layer', 'coordinate', 'all' or a"),  # type: ignore[arg-type]
        (lambda: Modules.of(NETWORK, lambda name: 3), "a str, got 3"),  # type: ignore[arg-type, return-value]
        (lambda: Modules.of(NETWORK).select(["4"]), "no module '4'; there are: 0.weight"),
        (
            lambda: GaussianPrior.from_density(NETWORK, scales=Modules(("a",), torch.tensor([0]))),
            "scales partitions 1 coordinates, the density has 14",
        ),
        (
            lambda: GaussianPrior.from_density(NETWORK, bounds=(2.0, 1.0)),
            "bounds of module '0.weight' are 2 and 1, wanted 0 < least <= largest",
        ),
        (
            lambda: GaussianPrior.from_density(NETWORK, bounds=(0.0, 1.0)),
            "are 0 and 1, wanted 0 < least",
        ),
        (
            lambda: replace(
                GaussianPrior.create(torch.zeros(1), 1.0), bounds=torch.tensor([[2.0], [3.0]])
            ),
            "the scale of module '0' is 1, beyond its bounds 2 and 3",
        ),
        (
            lambda: replace(GaussianPrior.create(torch.zeros(1), 1.0), bounds=torch.ones(1)),
            r"bounds has shape \(1,\), wanted \(2, 1\)",
        ),
        (
            lambda: replace(GaussianPrior.create(torch.zeros(1), 1.0), module_names=("a", "b")),
            "module_names has 2 names for 1 scales",
        ),
        (
            lambda: GaussianPrior.from_density(NETWORK, scale_law="gamma"),  # type: ignore[arg-type]
            "scale_law must be one of 'half-normal', .*got 'gamma'",
        ),
        (
            lambda: GaussianPrior.from_density(NETWORK, scale_law="exponential", hyperprior=False),
            "scale_law is 'exponential', and hyperprior=False leaves it out",
        ),
    ],
)
def test_bad_calls_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- laws of the scales ---------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_a_density_with_its_typical_size(law: Any) -> None:
    """It integrates to 1 over σ > 0 (the tails of Cauchy's by hand), and its scale is the width."""
    width = 0.7
    belief = Hyperprior(tensor([0.0]), tensor([1.0]), tensor([width]), law)
    normal = -0.5 * math.log(2 * math.pi)  # θ0 at its mean

    def density_of_log(u: float) -> float:
        scale = tensor([math.exp(u)])
        return math.exp(float(belief.log_prob(tensor([0.0]), scale)) - normal + u)

    low, high = math.log(width) - 30, math.log(width) + 30
    inside, _ = scipy.integrate.quad(density_of_log, low, high, points=[math.log(width)], limit=500)
    outside = 2 * (0.5 - math.atan(30) / math.pi) if law == "log-cauchy" else 0.0
    assert abs(inside + outside - 1) < 1e-6
    median, _ = scipy.integrate.quad(density_of_log, low, math.log(width), limit=500)
    by_law = {
        "half-normal": math.erf(1 / math.sqrt(2)),
        "half-cauchy": 0.5,
        "exponential": 1 - math.exp(-1),
        "log-cauchy": 0.5 - outside / 2,
    }
    assert abs(median - by_law[law]) < 1e-6


def test_a_flat_law_says_nothing_of_the_scales() -> None:
    belief = Hyperprior(tensor([0.0]), tensor([1.0]), tensor([0.7]), "flat")
    values = [float(belief.log_prob(tensor([0.3]), tensor([s]))) for s in (0.1, 10.0)]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match="flat"):
        belief.scales()


CASE = case_of(LinearGaussian.random(2, 6, 2))


def prior_with(law: Any, **options: Any) -> GaussianPrior:
    return GaussianPrior.from_density(CASE.density, scale_law=law, **options)


@pytest.mark.parametrize("law", LAWS)
def test_the_hierarchy_has_the_same_law(law: Any) -> None:
    prior = prior_with(law)
    assert prior.hyperprior is not None
    model = hierarchy(CASE.density, prior, CASE.tasks, likelihood=False)
    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    loc, scale = trace.nodes["loc"]["value"], trace.nodes["scale"]["value"]
    total = trace.nodes["loc"]["log_prob_sum"] + trace.nodes["scale"]["log_prob_sum"]
    assert torch.isclose(total, prior.hyperprior.log_prob(loc, scale))


def test_the_hierarchy_refuses_what_has_no_bayesian_answer() -> None:
    for prior, message in (
        (prior_with("flat"), "flat in the scales"),
        (prior_with("half-normal", bounds=(0.1, 10.0)), "knows no bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            hierarchy(CASE.density, prior, CASE.tasks)


STEPPED = JointVariational(
    q="full",
    q_update="gradient",
    expectation="cubature",
    steps=300,
    learning_rate=0.1,
    tolerance=1e-3,
)


@pytest.mark.parametrize("strategy", [JointVariational(), STEPPED], ids=["solved", "stepped"])
@pytest.mark.parametrize("law", [*LAWS, "flat"])
def test_a_fit_ends_where_likelihood_and_law_balance(law: Any, strategy: JointVariational) -> None:
    """One coordinate, full q: the joint optimum is the mode of p(y | θ0, σ) p(θ0) p(σ), found here
    on a grid of the marginal likelihood."""
    problem = LinearGaussian.random(5, num_tasks=30, dim=1)
    case = case_of(problem)
    wide = Hyperprior(tensor([0.0]), tensor([100.0]), tensor([0.3]), law)
    prior = replace(GaussianPrior.create(tensor([0.0]), 1.0), hyperprior=wide)
    done = fit(
        strategy,
        case.density,
        case.tasks.support,
        prior=prior,
    )
    grid = np.linspace(-3, 1.5, 901)
    theta0 = float(done.prior.loc)

    def value(u: float) -> float:
        there = problem.at(theta0=np.array([theta0]), log_scale=np.array([u]))
        return there.log_marginal() + float(wide.log_prob(tensor([theta0]), tensor([math.exp(u)])))

    best = grid[np.argmax([value(u) for u in grid])]
    assert abs(float(done.prior.log_scale) - best) < 0.01


@pytest.mark.parametrize("q", ["diagonal", "full"])
def test_the_closed_form_is_only_for_laws_that_have_one(q: Any) -> None:
    strategy = JointVariational(q=q, prior_update="closed_form", steps=3)
    with pytest.raises(ValueError, match="has none for half-cauchy scales"):
        fit(strategy, CASE.density, CASE.tasks.support, prior=prior_with("half-cauchy"))
    with_belief = prior_with("flat")
    assert with_belief.hyperprior is not None  # of θ0 alone; made so wide that it says nothing
    wide = replace(with_belief.hyperprior, width=1e6 * with_belief.hyperprior.width)
    flat, none = (
        fit(strategy, CASE.density, CASE.tasks.support, prior=prior)
        for prior in (
            replace(with_belief, hyperprior=wide),
            prior_with("flat", hyperprior=False),
        )
    )
    assert flat.prior.loc.dtype == FLOAT
    assert torch.isclose(flat.prior.log_scale, none.prior.log_scale, rtol=1e-6).all()


@pytest.mark.parametrize("q", ["diagonal", "full"])
@pytest.mark.parametrize("update", ["auto", "gradient", "closed_form"])
def test_bounds_hold_in_every_step(q: Any, update: Any) -> None:
    """Per module, for a strategy whose scales jump as well as for one whose scales creep."""
    prior = GaussianPrior.from_density(
        CASE.density,
        scales="coordinate",
        bounds=(tensor([0.5, 1.5]), tensor([0.6, 1.8])),
    )
    assert bool((prior.log_scale.exp() <= tensor([0.6, 1.8]) + 1e-9).all())
    seen = []
    strategy = JointVariational(
        q=q, prior_update=update, steps=40, learning_rate=0.2, tolerance=1e-3
    )
    done = fit(
        strategy,
        CASE.density,
        CASE.tasks.support,
        prior=prior,
        on_step=lambda step, info: seen.append(step),
    )
    assert done.scales is not None and len(done.scales) == len(seen) <= 40
    if q == "diagonal":
        assert len(seen) == 40
    elif update == "auto":
        assert done.converged
    low, high = prior.bounds if prior.bounds is not None else (None, None)
    assert bool((done.scales >= low - 1e-9).all() and (done.scales <= high + 1e-9).all())  # type: ignore[operator]
    at_edge = (
        (done.scales - low)
        .abs()
        .min(0)
        .values.minimum(  # type: ignore[operator]
            (done.scales - high).abs().min(0).values  # type: ignore[operator]
        )
    )
    assert bool((at_edge < 1e-6).any())
