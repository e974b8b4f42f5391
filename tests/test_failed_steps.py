"""A step that fails changes nothing: the state is what it was, and the run goes on from there.

In each of a run's first steps one of the evaluations of the model fails, by an error of the model's
own or by values that are not finite from there on. Which one it is a seeded generator picks, among
as many as the step before made; over the catalogue that is some two hundred places.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE, Entry
from helpers import assert_same
from torch import Tensor

from varmeta import Density, GaussianPrior, JointVariational, NonFiniteLoss, Reset, Tasks, fit
from varmeta.inference import nuts
from varmeta.inference.base import Batch, StepInfo, Strategy
from varmeta.inference.fitted import STEP, noise_of
from varmeta.models.programs import Linearised, Programs
from varmeta.seeds import generators

every_strategy = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE.keys())


class Broken(Exception):
    """The model's own error."""


class Evaluations:
    """Of the model, which fail where they are told to.

    Attributes:
        count: how many there were so far.
        fails_from: this one fails, and all later ones; None for never.
        quietly: by NaN, and not by an error.
    """

    def __init__(self) -> None:
        self.count = 0
        self.fails_from: int | None = None
        self.quietly = False

    def watch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            fails = self.fails_from is not None and self.count >= self.fails_from
            if fails and not self.quietly:
                raise Broken
            out = method(*args, **kwargs)
            return spoiled(out) if fails else out

        return watched


def spoiled(out: Any) -> Any:
    if isinstance(out, Linearised):
        return replace(out, value=out.value * torch.nan, grad=out.grad * torch.nan)
    if isinstance(out, (list, tuple)):
        return type(out)(spoiled(part) for part in out)
    return out * torch.nan if isinstance(out, Tensor) else out


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """y ~ N(θ_0 + θ_1 x, noise²)."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=x.dtype), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(theta[0] + theta[1] * x[..., 0], noise), obs=y)


def tasks() -> Tasks:
    source = torch.Generator().manual_seed(3)
    like: dict[str, Any] = {"generator": source, "dtype": torch.float64}
    pairs = []
    for _ in range(3):
        x, line = torch.randn(4, 1, **like), torch.randn(2, **like)
        pairs.append((x, line[0] + line[1] * x[:, 0] + 0.3 * torch.randn(4, **like)))
    return Tasks.from_list(pairs).split(0.25)


TASKS = tasks()
DENSITY = Density(model, TASKS, shared=["noise"])  # one for all: what is recorded is kept
PRIOR = GaussianPrior.from_density(DENSITY)


@pytest.fixture(autouse=True)
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluations]:
    found = Evaluations()
    for owner, name in (
        (Density, "log_likelihood"),
        (Programs, "gradient"),
        (Programs, "linearise"),
        (Programs, "pullback"),
        (Programs, "first"),
    ):
        monkeypatch.setattr(owner, name, found.watch(getattr(owner, name)))
    monkeypatch.setattr(nuts, "_QUICK_STEPS", 3)
    with warnings.catch_warnings():  # few steps and draws are reported, as they should be
        warnings.simplefilter("ignore", RuntimeWarning)
        yield found


class Run:
    """What `fit` does, one step at a time."""

    def __init__(self, asked: Strategy, evaluations: Evaluations) -> None:
        training = asked.prepare(TASKS, 0)
        assert isinstance(training, Tasks)
        self.evaluations, self.strategy = evaluations, asked.settled(DENSITY, whole=True)
        self.state = self.strategy.init(DENSITY, PRIOR, training, noise_of(DENSITY, 0, 3))
        self.batch = Batch(training, torch.arange(len(training)), len(training))

    @property
    def ended(self) -> bool:
        return self.state.step >= self.strategy.num_steps or bool(self.state.arrived)

    def attempt(self) -> None:
        noise = next(generators(0, STEP, first=self.state.step))
        self.strategy.step(DENSITY, self.state, self.batch, noise)

    def step(self) -> int:
        """One step; how many evaluations it made."""
        before = self.evaluations.count
        self.attempt()
        self.state.meta.keep_bounds()
        self.state.step += 1
        return self.evaluations.count - before

    def fails(self, number: int, quietly: bool) -> bool:
        """Attempt a step in which this evaluation fails, and undo one that got around it."""
        made, state = self.evaluations, self.state
        before, kept = state.state_dict(), (dict(state.tensors), dict(state.optimisers))
        made.fails_from, made.quietly = made.count + number, quietly
        try:
            self.attempt()
        except (NonFiniteLoss, Broken) as error:
            assert isinstance(error, NonFiniteLoss) == quietly
            assert_same(state.state_dict(), before)
            return True
        else:  # a line search did without the point, or the step made fewer evaluations
            state.tensors, state.optimisers = kept
            state.load_state_dict(before)
            return False
        finally:
            made.fails_from = None


@every_strategy
def test_a_failed_step_changes_nothing(entry: Entry, evaluations: Evaluations) -> None:
    run, pick = Run(entry.strategy, evaluations), torch.Generator().manual_seed(1)
    count = failed = 0
    while not run.ended and run.state.step < 4:  # there are resets before steps 2 and 3
        number = int(torch.randint(1, max(count, 1) + 1, (), generator=pick))
        failed += run.fails(number, quietly=run.state.step % 2 == 1)
        count = run.step()
    assert failed  # a line search may do without the point that fails


def test_a_partial_reset_is_not_made_twice(evaluations: Evaluations) -> None:
    """The rows of a step that fails at a reset are where they were, not halfway to the prior."""
    strategy = JointVariational(steps=6, q="diagonal", resets=Reset(3, amount=0.5))
    run = Run(strategy, evaluations)
    for _ in range(3):
        run.step()
    rows = run.state.tensors["rows"].clone()
    assert run.fails(1, quietly=False) and torch.equal(run.state.tensors["rows"], rows)
    run.step()
    assert not torch.equal(run.state.tensors["rows"], rows)


@pytest.mark.parametrize("name", ["joint reset", "imaml, warm start", "maml", "svi", "nuts"])
def test_a_run_that_failed_goes_on_as_if_it_had_not(
    name: str, evaluations: Evaluations, tmp_path: Path
) -> None:
    """Resumed from its checkpoint, which is of the step before the failure, and in memory."""
    strategy, path = CATALOGUE[name].strategy, tmp_path / "run.pt"
    wanted = fit(strategy, DENSITY, TASKS).state.state_dict()
    run = Run(strategy, evaluations)
    while not run.ended:
        if run.state.step == 5:
            run.fails(1, quietly=False)
        run.step()
    assert_same(run.state.state_dict(), wanted)
    if name == "nuts":  # its potential is recorded, and does not ask the model again
        return

    for last, quietly in ((2, False), (4, True)):  # the model's own error, then a loss of NaN

        def spoil(step: int, _: StepInfo, last: int = last, quietly: bool = quietly) -> None:
            if step == last:
                evaluations.fails_from, evaluations.quietly = evaluations.count + 1, quietly

        with pytest.raises(NonFiniteLoss if quietly else Broken) as caught:
            fit(strategy, DENSITY, TASKS, checkpoint=path, on_step=spoil)
        evaluations.fails_from = None
        assert torch.load(path, weights_only=True)["state"]["step"] == last
        if quietly:
            assert re.search(rf"step {last}: .*(nan|not)", str(caught.value))
        else:
            assert f"stopped after step {last} of" in caught.value.__notes__[0]
    done = fit(strategy, DENSITY, TASKS, checkpoint=path)
    assert_same(done.state.state_dict(), wanted)
