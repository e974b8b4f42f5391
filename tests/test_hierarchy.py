"""hierarchy: the joint density of an ordinary Pyro model, against a sum written by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from density_cases import CASES, FLOAT, numbers, reals
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.prior import GaussianPrior


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=FLOAT), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(1.0, 3.0))
    s = pyro.sample("s", dist.LogNormal(0.5, 0.8))
    with pyro.plate("two", 2):
        v = pyro.sample("v", dist.Normal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ (w + v.to(x)) + b, s), obs=y)


TASKS = reals(2)
DENSITY = Density(model, TASKS, shared=["s", "v"])
LOC, SCALE, THETA = numbers(3), numbers(2, seed=1).exp(), numbers(3, 3, seed=2)
S, V = torch.tensor(0.6, dtype=FLOAT), numbers(2, seed=3)
SD = SCALE[[0, 0, 1]]


def by_hand(prior: GaussianPrior, *, centred: bool) -> torch.Tensor:
    belief = prior.hyperprior
    total = td.Normal(belief.loc, belief.width).log_prob(LOC).sum()
    total += td.HalfNormal(belief.scale_width).log_prob(SCALE).sum()
    total += td.LogNormal(0.5, 0.8).log_prob(S) + td.Normal(0.0, 0.5).log_prob(V).sum()
    if centred:
        total += td.Normal(LOC, SD).log_prob(THETA).sum()
    else:
        total += td.Normal(0.0, 1.0).log_prob((THETA - LOC) / SD).sum()
    for i, mask in enumerate(TASKS.mask):
        x, y = TASKS.inputs[i][mask], TASKS.targets[i][mask]
        mean = x @ (THETA[i, :2] + V) + THETA[i, 2]
        total += td.Normal(mean, S).log_prob(y).sum()
    return total


@pytest.mark.parametrize("centred", [False, True])
def test_the_joint_density_is_the_sum_by_hand(centred):
    prior = GaussianPrior.from_density(DENSITY)
    free = {"theta": THETA} if centred else {"z": (THETA - LOC) / SD}
    values = {"loc": LOC, "scale": SCALE, "shared_s": S, "shared_v": V, **free}
    conditioned = poutine.condition(hierarchy(DENSITY, prior, TASKS, centred=centred), values)
    trace = poutine.trace(conditioned).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), by_hand(prior, centred=centred))
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], THETA)
    torch.testing.assert_close(trace.nodes["theta"]["value"], THETA)


@pytest.mark.parametrize("centred", [False, True])
def test_its_sites_are_what_it_says_and_no_task_site_leaks_out(centred):
    prior = GaussianPrior.from_density(DENSITY)
    trace = poutine.trace(hierarchy(DENSITY, prior, TASKS, centred=centred)).get_trace()
    assert set(trace.stochastic_nodes) - {"tasks"} == {
        *("loc", "scale", "shared_s", "shared_v"),
        "theta" if centred else "z",
    }
    assert set(trace.observation_nodes) == {"likelihood", *([] if centred else ["theta"])}
    shapes = {n: tuple(trace.nodes[n]["value"].shape) for n in ("loc", "scale", "theta")}
    assert shapes == {"loc": (3,), "scale": (2,), "theta": (3, 3)}


@pytest.mark.parametrize("centred", [False, True])
def test_particles_side_by_side(centred):
    """The task model's plates do not collide with those around the hierarchy."""
    target = hierarchy(DENSITY, GaussianPrior.from_density(DENSITY), TASKS, centred=centred)
    guide = AutoNormal(target)
    with pyro.get_param_store().scope(), pyro.validation_enabled():
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
        elbo.loss(target, guide)  # makes the guide, guesses the nesting
        model, drawn = elbo._get_vectorized_trace(target, guide, (), {})
    sites = {n: v["value"] for n, v in drawn.nodes.items() if n in model.stochastic_nodes}
    total = sum(
        v["log_prob"].sum(-1) for n, v in model.nodes.items() if n in {*sites, "likelihood"}
    )
    for k in range(4):
        one = {n: v[k] if n in ("z", "theta") else v[k, 0] for n, v in sites.items()}
        alone = poutine.trace(poutine.condition(target, one)).get_trace()
        torch.testing.assert_close(total[k], alone.log_prob_sum())


def test_without_the_likelihood_it_is_the_prior():
    target = hierarchy(DENSITY, GaussianPrior.from_density(DENSITY), TASKS, likelihood=False)
    assert set(poutine.trace(target).get_trace().observation_nodes) == {"theta"}


def test_pyros_own_inference_runs_on_it():
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        target = hierarchy(DENSITY, GaussianPrior.from_density(DENSITY), TASKS)
        guide = AutoNormal(target)
        svi = SVI(target, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses = [svi.step() for _ in range(5)]
        assert all(map(torch.isfinite, torch.tensor(losses)))
        grown = guide.median()
        assert set(grown) >= {"loc", "scale", "z", "shared_s", "shared_v"}
    with pyro.get_param_store().scope():
        again = poutine.trace(hierarchy(DENSITY, GaussianPrior.from_density(DENSITY), TASKS))
        gradient = again.get_trace().log_prob_sum()
    assert gradient.isfinite()


def test_what_has_no_posterior_is_refused():
    prior = GaussianPrior.from_density(DENSITY)
    flat = GaussianPrior.from_density(DENSITY, hyperprior=False)
    with pytest.raises(ValueError, match=r"no hyperprior; build it with .*hyperprior=True"):
        hierarchy(DENSITY, flat, TASKS)
    with pytest.raises(ValueError, match="diagonal prior; build it with rank=0"):
        hierarchy(DENSITY, GaussianPrior.from_density(DENSITY, rank=1), TASKS)
    case = CASES["plain module"]
    params = Density(case.model, case.tasks)
    with pytest.raises(ValueError, match=r"'sd' is a param .*make it a pyro\.sample site"):
        hierarchy(params, GaussianPrior.from_density(params), case.tasks)
    assert prior.hyperprior is not None
