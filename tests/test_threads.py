"""Fits in several threads of one process: each as if alone, and nothing else notices."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyro
import pytest
import torch
from helpers import assert_same, case_of, linear_model
from linear_gaussian import LinearGaussian

import varmeta as vm
from benchmarks import threads
from varmeta.inference import nuts
from varmeta.seeds import (
    AS_ANOTHER,
    DRAW_FROM_GLOBAL_STATE,
    TAKE_A_GENERATOR,
    OwnDraws,
    generator,
    global_rng,
)

CASE = case_of(LinearGaussian.random(3, num_tasks=4, dim=2), shared_noise=True)
TRAIN = CASE.tasks.support
TOGETHER: dict[str, vm.Strategy] = {
    "imaml": vm.IMAML(steps=3),
    "svi": vm.PyroSVI(steps=4, adapt_steps=2, draws=8),
    "nuts": vm.PyroNUTS(draws=3, warmup=2, chains=1, proposals=50),
    "joint": vm.JointVariational(q="diagonal", steps=25, adapt_steps=4),  # long enough to record
    "stochastic": vm.Stochastic(vm.Langevin(run_length=3), steps=2, draws=8),
    "svi point": vm.PyroSVI(point_globals=True, steps=4, adapt_steps=2, draws=8),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nuts, "_QUICK_STEPS", 10)


def fresh() -> vm.Density:
    return vm.Density(linear_model(2), CASE.tasks, shared=["noise"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fits_in_threads_are_those_alone() -> None:
    """All at once, half of them on one density; one more thread draws numbers meanwhile."""

    def everything(name: str, density: vm.Density) -> dict[str, object]:
        return threads.everything(TOGETHER[name], density, TRAIN, CASE.tasks.query)

    alone = {name: everything(name, fresh()) for name in TOGETHER}
    one = fresh()
    found, faults = threads.at_once(
        [
            partial(everything, name, one if number % 2 else fresh())
            for number, name in enumerate(TOGETHER)
        ]
    )
    assert_same(found, list(alone.values()))
    assert faults == []


def test_what_a_thread_disturbs_is_found() -> None:
    """The checks above could fail."""

    def disturb() -> None:
        torch.rand(1)
        time.sleep(0.2)  # in which the other thread draws what comes next
        pyro.param("left", torch.tensor(1.0))

    with pyro.get_param_store().scope():
        assert threads.at_once([disturb]) == ([None], [threads.RANDN, threads.STATE])


def test_the_lock_is_free_after_an_error() -> None:
    """Another thread may run a model after one has failed."""

    def failing(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        raise KeyError("oh")

    with pytest.raises(ValueError, match="model failed"):
        vm.Density(failing, TRAIN)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fresh).result(timeout=20)


def test_every_operation_that_draws_is_known() -> None:
    """All of PyTorch's that are tagged as drawing, by the names that Python calls them."""
    known, found = TAKE_A_GENERATOR | DRAW_FROM_GLOBAL_STATE | AS_ANOTHER.keys(), set()
    spaces = (torch, torch.Tensor, torch.nn.functional)
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        called = any(callable(getattr(space, name, None)) for space in spaces)
        if called and schema.name.startswith("aten::"):
            op = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default", None)
            if op is not None and torch.Tag.nondeterministic_seeded in op.tags:
                found.add(name)
    assert len(found) > 25
    internal = {n for n in found if n.startswith("_") and n not in TAKE_A_GENERATOR}
    assert found - internal <= known, found - internal - known


DRAWS = {
    "rand": lambda: torch.rand(4),
    "positional sizes": lambda: torch.randn(2, 3, dtype=torch.float64),
    "normal": lambda: torch.normal(torch.zeros(3), torch.ones(3)),
    "in place": lambda: torch.empty(3).exponential_(),
    "gamma": lambda: torch.distributions.Gamma(torch.ones(3), 2.0).rsample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(torch.ones(3)).rsample(),
    "categorical": lambda: torch.distributions.Categorical(torch.ones(3)).sample((5,)),
    "batched": lambda: torch.vmap(lambda x: torch.randn(2) + x, randomness="different")(
        torch.zeros(3)
    ),
    "like": lambda: torch.randn_like(torch.ones(3)),
    "like, of another kind": lambda: torch.rand_like(
        input=torch.ones(2, 9, dtype=torch.half), dtype=torch.float64, memory_format=None
    ),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(9)),
    "init": lambda: torch.nn.Linear(3, 2).weight.detach(),
    "init by hand": lambda: torch.nn.init.trunc_normal_(
        torch.nn.init.orthogonal_(torch.ones(3, 3))
    ),
    "two kinds": lambda: torch.cat([torch.rand(2), torch.rand_like(torch.ones(2)), torch.rand(2)]),
}


EXCHANGED = {"dropout"}  # PyTorch's operation takes no generator


@pytest.mark.parametrize("name", DRAWS)
def test_own_draws_are_those_of_the_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from PyTorch's global state with that seed, which itself stays where it is, all the time.

    An exchange for a moment would disturb another thread's draws.
    """
    if name not in EXCHANGED:
        monkeypatch.delattr(OwnDraws, "_exchanged")
    source = generator(7)
    seed = int(torch.randint(2**62, (), generator=generator(7)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted = DRAWS[name](), DRAWS[name]()
        state = torch.get_rng_state()
        with global_rng(source):
            found = DRAWS[name](), DRAWS[name]()
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(found, wanted)


def test_recordings_run_under_a_mode_of_the_users() -> None:
    """`with torch.device(...)` is one; after 20 calls derivatives are replayed."""
    density = fresh()
    plain = vm.fit(vm.IMAML(steps=12), density, TRAIN, progress=False)
    assert "recorded" in density.execution().values()
    with torch.device("cpu"):
        under = vm.fit(vm.IMAML(steps=12), density, TRAIN, progress=False)
    assert_same(under.state.state_dict(), plain.state.state_dict())
