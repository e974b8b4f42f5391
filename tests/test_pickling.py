"""What a user keeps can be pickled and copied, also after use, and gives the same numbers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from threading import Lock

import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE
from helpers import assert_same
from test_laws import CASE, NEW, TRAIN, done, numbers, quick
from torch import Tensor, nn

import varmeta as vm
from varmeta.models import network, sinusoids

__all__ = ["quick"]  # a fixture


ELSEWHERE = """
import pickle, sys, torch
from helpers import assert_same
from test_pickling import NEW, numbers
with open(sys.argv[1], "rb") as file:
    fits, wanted, table = pickle.load(file)
for name, found in fits.items():
    assert_same(numbers(found.adapt(NEW), NEW), wanted[name])
print(table)
"""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_in_another_process(tmp_path: Path) -> None:
    """Every kind of posterior, and a comparison of some."""
    names = ["maml", "joint full", "nuts", "svi"]
    fits = {name: done(CATALOGUE[name]) for name in names}
    wanted = {name: numbers(fit.adapt(NEW), NEW) for name, fit in fits.items()}
    strategies = {"a": vm.CompletePooling(draws=5)}
    table = vm.compare(strategies, CASE.density, CASE.tasks, draws=20, progress=False)
    assert str(copy.deepcopy(table)) == str(table)
    path = tmp_path / "fits.pickle"
    path.write_bytes(pickle.dumps((fits, wanted, table)))
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert out.stdout.strip() == str(table).strip()


def test_a_used_density_keeps_its_numbers() -> None:
    """After recording, with a module inside, in another density's shape, and compiled or not."""
    mlp = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    source = vm.TaskSource(sinusoids(4, support=3, query=3))
    density = vm.Density(network(mlp, normal), source)
    tasks, theta = source.batch(0), torch.linspace(-1, 1, 4 * density.dim).reshape(4, -1)
    for _ in range(25):
        wanted = density.log_likelihood(theta, tasks)
    for other in (pickle.loads(pickle.dumps(density)), copy.copy(density), copy.deepcopy(density)):
        assert_same(other.log_likelihood(theta, tasks), wanted)
        assert not other.execution() and density._batched, "recordings are left behind"
    again = pickle.loads(pickle.dumps(source))
    assert_same(again.batch(7).targets, source.batch(7).targets)
    assert pickle.loads(pickle.dumps(density.compiled()))._compiled


def normal(out: Tensor) -> dist.Normal:
    return dist.Normal(out[:, 0], 0.3)


def local() -> tuple[vm.Density, vm.TaskSource, vm.Strategy]:
    """Things of a user's who wrote functions within functions."""

    def county(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(theta * x[:, 0], 1.0), obs=y)

    density, tasks = vm.Density(county, TRAIN), TRAIN
    return density, vm.TaskSource(lambda _: tasks), vm.PyroSVI(guide=lambda model: model)


@pytest.mark.parametrize(
    ("which", "named"),
    [
        (0, r"the density's model 'local\.<locals>\.county' cannot be pickled"),
        (1, r"the stream's draw 'local\.<locals>\.<lambda>' cannot be pickled"),
        (2, r"PyroSVI \(.*\)'s guide 'local\.<locals>\.<lambda>' cannot be pickled"),
    ],
)
def test_a_local_function_is_named(which: int, named: str) -> None:
    thing = local()[which]
    remedy = r".*define it, and what it uses, at the top of a module.*cloudpickle"
    for dump in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]
        with pytest.raises(pickle.PicklingError, match=named + remedy):
            dump([thing])
    copy.deepcopy(thing)


def test_a_local_function_is_copied_and_pickled_by_value() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    density, theta = local()[0], torch.ones(len(TRAIN), 1, dtype=torch.float64)
    wanted = density.log_likelihood(theta, TRAIN)
    for other in (copy.deepcopy(density), pickle.loads(cloudpickle.dumps(density))):
        assert_same(other.log_likelihood(theta, TRAIN), wanted)


def test_what_a_model_holds_is_said() -> None:
    """A callable object of a class at the top of a module, with a lock in it."""
    density = vm.Density(Locked(), TRAIN)
    with pytest.raises(pickle.PicklingError, match=r"model 'Locked' cannot be pickled \(.*lock"):
        pickle.dumps(density)


class Locked:
    def __init__(self) -> None:
        self.lock = Lock()

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(theta * x[:, 0], 1.0), obs=y)
