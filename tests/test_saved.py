"""A fit that is saved and loaded is the fit that it was, without training and without code."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE
from helpers import assert_same
from torch import Tensor

import varmeta as vm
from varmeta.inference.base import Strategy
from varmeta.models import sinusoids
from varmeta.packing import packed, unpacked
from varmeta.saved import _settings, packed_strategy, strategy_from

X = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
TASKS = vm.Tasks.from_list(
    [(X, 0.3 * k + (1 - 0.2 * k) * X[:, 0] + 0.1 * torch.sin(9.0 * X[:, 0] * k)) for k in range(5)],
    names=[f"t{k}" for k in range(5)],
)


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a + b * x[:, 0], noise), obs=y)


class Head(pyro.nn.PyroModule):
    """A parameter that is another in every new module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = pyro.nn.PyroModule[torch.nn.Linear](1, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            mean = a + self.layer(x.to(self.layer.weight.dtype))[:, 0]
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


DENSITY = vm.Density(line, TASKS, shared=["noise"])


def check_same(fit: vm.Fit, again: vm.Fit) -> None:
    assert_same(again.state.state_dict(), fit.state.state_dict())
    one, other = fit.posterior(), again.posterior()
    assert torch.equal(one.mean, other.mean) and torch.equal(one.sd, other.sd)
    assert torch.equal(one.shared, other.shared)
    assert (again.converged, again.reason, again.seed) == (fit.converged, fit.reason, fit.seed)
    assert again.history.equals(fit.history) and repr(again.strategy) == repr(fit.strategy)
    drawn = [f.predict(TASKS, draws=5, keep=5).draws["y"] for f in (fit, again)]
    assert (drawn[0] == drawn[1]).all()
    new = TASKS.select([0, 1]).split(0.4)
    new = vm.Tasks(new.inputs + 1, new.targets, new.mask, new.is_query, ("p", "q"))
    assert torch.equal(fit.adapt(new.support).mean, again.adapt(new.support).mean)


@pytest.mark.parametrize(
    "strategy",
    [
        vm.LaplaceEvidence(steps=3),
        vm.JointVariational(q="low_rank", steps=3, adapt_steps=3),
        vm.CompletePooling(draws=20),
        vm.MetaSGD(steps=2, minimiser=vm.GradientDescent(0.01, 2, tolerance=0)),
    ],
    ids=lambda s: s.name,
)
@pytest.mark.filterwarnings("ignore::varmeta.NotConverged")
def test_a_loaded_fit_is_the_fit(strategy: Strategy, tmp_path: Path) -> None:
    fit = vm.fit(strategy, DENSITY, TASKS, seed=3)
    fit.save(tmp_path / "fit.pt")
    check_same(fit, vm.load(tmp_path / "fit.pt", line, map_location="cpu"))


@pytest.mark.parametrize("name", CATALOGUE)
def test_settings_come_back(name: str) -> None:
    strategy = CATALOGUE[name].strategy
    again = unpacked(packed(strategy, _settings()), _settings())
    assert type(again) is type(strategy) and repr(again) == repr(strategy)


@pytest.mark.filterwarnings("ignore::varmeta.NotConverged")
def test_a_module_made_anew_gets_what_was_learned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = Head(), Head()
    assert not torch.equal(one.layer.weight, other.layer.weight)
    fit = vm.fit(
        vm.JointVariational(q="delta", learn_scale=False, steps=3), vm.Density(one, TASKS), TASKS
    )
    fit.save(tmp_path / "fit.pt")
    with pytest.warns(RuntimeWarning, match="it is not what the fit learned with"):
        again = vm.load(tmp_path / "fit.pt", other)
    check_same(fit, again)


def other_sites(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a + x[:, 0], noise), obs=y)


def other_code(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a - b * x[:, 0], noise), obs=y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "fit.pt"
    vm.fit(vm.CompletePooling(draws=5), DENSITY, TASKS).save(path)
    return path


def test_another_model_is_refused_or_said(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"sites a \(adapted, 1\), b .*this one has a"):
        vm.load(saved, other_sites)
    with pytest.warns(RuntimeWarning, match="it differs in the model's code"):
        vm.load(saved, other_code)


def test_files_that_are_no_fit_are_named(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    (tmp_path / "bad.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("a,b\n1,2\n")
    vm.fit(vm.CompletePooling(), DENSITY, TASKS, checkpoint=tmp_path / "state.pt")
    wrong = {"bad.pt": "damaged", "text.pt": "another program", "none.pt": "No such file"}
    for name, said in {**wrong, "state.pt": "is a checkpoint, which holds no data"}.items():
        with pytest.raises(vm.BrokenFile, match=said):
            vm.load(tmp_path / name, line)
    with pytest.raises(vm.BrokenFile, match="no finished comparison"):
        vm.load(tmp_path, line)


def own_guide(*_: object) -> None:
    """Code that no file may hold."""


def test_code_of_the_users_is_given_again(tmp_path: Path) -> None:
    assert packed_strategy(vm.PyroSVI(guide=own_guide)) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold code of your own, which is not saved; give it by"):
        strategy_from(None, "PyroSVI")
    with pytest.raises(ValueError, match="another version of varmeta"):
        strategy_from({"class": "Oracle", "fields": {}}, "Oracle")


@pytest.mark.filterwarnings("ignore::varmeta.NotConverged")
def test_a_stream_is_given_again(tmp_path: Path) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a * x[:, 0].sin(), 0.5), obs=y)

    source = vm.TaskSource(sinusoids(num_tasks=3, support=3, query=3))
    fit = vm.fit(vm.FOMAML(steps=2), vm.Density(model, source), source)
    fit.save(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="learned from a stream, which is not saved"):
        vm.load(tmp_path / "fit.pt", model)
    again = vm.load(tmp_path / "fit.pt", model, tasks=source)
    assert torch.equal(again.prior.loc, fit.prior.loc)
