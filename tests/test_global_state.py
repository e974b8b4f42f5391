"""varmeta leaves PyTorch's, Pyro's, NumPy's and Python's global state as it found it."""

from __future__ import annotations

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from density_cases import CASES, FLOAT, Network, build, numbers, reals, values
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.distributions import Distribution, constraints

from benchmarks.threads import flags, snapshot
from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator


@pytest.fixture(params=["on", "off", "torch's alone", "pyro's alone"])
def user(request):
    """A user with settings and params of their own, some named as the models' are."""
    before = flags()
    pyro.enable_validation(request.param in ("on", "pyro's alone"))
    Distribution.set_default_validate_args(request.param in ("on", "torch's alone"))
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(5)
        pyro.param("sd", torch.tensor(7.0, dtype=FLOAT), constraint=constraints.positive)
        pyro.param("bias", torch.tensor(-3.0, dtype=FLOAT))
        pyro.param("mine", torch.rand(3), constraint=constraints.unit_interval)
        yield snapshot()
    pyro.enable_validation(before[1])
    Distribution.set_default_validate_args(before[0])


def evaluate(name):
    case = CASES[name]
    density, (theta, shared) = build(case), values(case, 2)
    theta.requires_grad_()
    for _ in range(55):  # so that it is recorded, too
        torch.autograd.grad(density.log_likelihood(theta, case.tasks, shared).sum(), theta)


def predict(name):
    case = CASES[name]
    density, (theta, shared) = build(case), values(case, 2)
    density.predict(theta, case.tasks, generator(0), shared)


def raising(x, y=None):
    pyro.param("sd", torch.tensor(1.0))
    pyro.sample("a", dist.Normal(0.0, 1.0))
    raise KeyError("oh")


def raising_when_batched(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + torch.rand(()), 1.0), obs=y)


def raising_when_predicting(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a * y.abs().sign(), 1.0), obs=y)


def fails(model):
    with pytest.raises(ValueError, match="model failed"):
        Density(model, reals(2)).predict(numbers(3, 1), reals(2), generator(0))


def hyper():
    case = CASES["normal"]
    density = build(case)
    prior = GaussianPrior.from_density(density, rank=0)
    prior.sample((3,), generator(0))
    hierarchy(density, prior, case.tasks)
    case.tasks.split().folds(3).hold_out(1)


ACTIONS = {
    "evaluate normal": lambda: evaluate("normal"),
    "evaluate network": lambda: evaluate("network"),
    "evaluate plain module": lambda: evaluate("plain module"),
    "evaluate constrained": lambda: evaluate("constrained"),
    "predict network": lambda: predict("network"),
    "predict several sites": lambda: predict("several sites"),  # draw by draw: Student's t
    "raise in the first run": lambda: fails(raising),
    "raise in a batch": lambda: fails(raising_when_batched),
    "raise in predict": lambda: fails(raising_when_predicting),
    "prior, hierarchy, splits": hyper,
}


@pytest.mark.parametrize("name", ACTIONS)
def test_everything_is_as_it_was(name, user):
    ACTIONS[name]()
    after = snapshot()
    for key, value in user.items():
        assert after[key] == value, key


def test_what_the_user_set_changes_no_number(user):
    """Their params have the names of this module's: it starts at its own values all the same."""
    start = build(CASES["network"]).shared_init
    with pyro.get_param_store().scope():
        assert torch.equal(build(CASES["network"]).shared_init, start)


def test_a_module_is_not_changed():
    net, tasks = Network(), reals(2)
    before = {n: (id(p), p.requires_grad, p.clone()) for n, p in net.named_parameters()}
    density = Density(net, tasks)
    density.log_likelihood(numbers(3, 6), tasks, numbers(6)).sum()
    density.predict(numbers(3, 6), tasks, generator(0), numbers(6))
    for n, p in net.named_parameters():
        assert before[n][:2] == (id(p), p.requires_grad) and torch.equal(before[n][2], p)
        assert p.grad is None


def test_default_dtype_of_the_user_is_respected():
    torch.set_default_dtype(FLOAT)
    try:
        build(CASES["one hot"])
        assert torch.get_default_dtype() == FLOAT
        assert build(CASES["one hot"]).prior_loc.dtype == FLOAT, "integer inputs have no type"
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_density_may_be_used_within_a_running_svi():
    """Its evaluations come between Pyro's reading the params and its stepping them."""
    case = CASES["normal"]
    density = build(case)

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(3, 3, dtype=FLOAT), 1.0).to_event(2))
        pyro.factor("fit", density.log_likelihood(theta, case.tasks).sum())

    with pyro.get_param_store().scope(), torch.random.fork_rng():
        svi = SVI(model, AutoDelta(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0]


IMPORT = """
import random, sys, warnings
import numpy as np, pandas, pyro, torch
import rich.progress, scipy.optimize  # these do change some of it
from torch.distributions import Distribution
pyro.param("mine", torch.tensor(1.0))
def state():
    return (
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
        Distribution._validate_args, pyro.distributions.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(), pyro.poutine.util.is_validation_enabled(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
        list(pyro.get_param_store()), list(warnings.filters),
    )
before = state()
import varmeta
assert state() == before
print(*sorted({"arviz", "matplotlib", "xarray", "h5py", "typer", "IPython"} & set(sys.modules)))
"""


def test_importing_varmeta_changes_nothing_and_does_not_load_arviz():
    out = subprocess.run(
        [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True, timeout=120
    )
    assert out.stdout.split() == []
