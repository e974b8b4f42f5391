"""A step that fails changes nothing: the state is what it was, and the run goes on from there.

In every step of a run the model fails at one of its evaluations, by an error of its own or by a
value that is not finite from there on. The evaluation is picked by a seeded generator among all
that the step makes; over the catalogue and the steps that is several hundred places.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
from varmeta.inference import nuts, nuts_kernel
from varmeta.inference.base import Batch, State, StepInfo, Strategy
from varmeta.inference.fit import _STEP, _noise
from varmeta.models import capture, programs
from varmeta.seeds import generators

every_strategy = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE.keys())


class Broken(Exception):
    """The model's own error."""


class Model:
    """y ~ N(θ_0 + θ_1 x, noise²), which fails where it is told to.

    Attributes:
        calls: evaluations so far.
        fails_from: it fails in this evaluation and in all later ones; None for never.
        quietly: by NaN, and not by an error.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.fails_from: int | None = None
        self.quietly = False

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        spoiled = 0.0
        if self.fails_from is not None and self.calls >= self.fails_from:
            if not self.quietly:
                raise Broken
            spoiled = torch.nan
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=x.dtype), 2.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        mean = theta[0] + theta[1] * x[..., 0] + spoiled
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def tasks() -> Tasks:
    source = torch.Generator().manual_seed(3)
    like: dict[str, Any] = {"generator": source, "dtype": torch.float64}
    pairs = []
    for _ in range(3):
        x, slope = torch.randn(4, 1, **like), torch.randn(2, **like)
        pairs.append((x, slope[0] + slope[1] * x[:, 0] + 0.3 * torch.randn(4, **like)))
    return Tasks.from_list(pairs)


TASKS = tasks()


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model is called each time: a recording of it would not fail."""
    monkeypatch.setattr(capture, "CALLS_BEFORE_CAPTURE", 10**9)
    monkeypatch.setattr(programs, "CALLS_BEFORE_CAPTURE", 10**9)
    monkeypatch.setattr(capture, "record", lambda function, tensors: None)
    monkeypatch.setattr(nuts, "_QUICK_STEPS", 3)
    monkeypatch.setattr(nuts_kernel, "_SHARES", (0.0,))
    with warnings.catch_warnings():  # few steps and draws are reported, as they should be
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


class Run:
    """What `fit` does, one step at a time."""

    def __init__(self, asked: Strategy) -> None:
        self.model = Model()
        self.density = Density(self.model, TASKS, shared=["noise"])
        training = asked.prepare(TASKS, 0)
        assert isinstance(training, Tasks)
        self.strategy = asked.settled(self.density, whole=True)
        prior = GaussianPrior.from_density(self.density)
        self.state = self.strategy.init(self.density, prior, training, _noise(self.density, 0, 3))
        self.batch = Batch(training, torch.arange(len(training)), len(training))

    @property
    def ended(self) -> bool:
        return self.state.step >= self.strategy.num_steps or bool(self.state.arrived)

    def step(self) -> int:
        """One step; how many evaluations of the model it made."""
        before = self.model.calls
        self.attempt()
        self.state.meta.keep_bounds()
        self.state.step += 1
        return self.model.calls - before

    def attempt(self) -> None:
        noise = next(generators(0, _STEP, first=self.state.step))
        self.strategy.step(self.density, self.state, self.batch, noise)

    def fails(self, evaluation: int, quietly: bool) -> bool:
        """Attempt a step in which this evaluation fails, and undo one that got around it."""
        model, state = self.model, self.state
        before, kept = state.state_dict(), (dict(state.tensors), dict(state.optimisers))
        model.fails_from, model.quietly = model.calls + evaluation, quietly
        try:
            self.attempt()
        except (NonFiniteLoss if quietly else Broken):
            assert_same(state.state_dict(), before)
            return True
        else:  # a line search did without the point, or the step needed fewer evaluations
            state.tensors, state.optimisers = kept
            state.load_state_dict(before)
            return False
        finally:
            model.fails_from = None


def evaluations(strategy: Strategy) -> tuple[list[int], State]:
    """Of the model in each step of a run in which nothing fails, and its last state."""
    run, counts = Run(strategy), []
    while not run.ended:
        counts.append(run.step())
    return counts, run.state


@every_strategy
def test_a_failed_step_changes_nothing_and_the_run_goes_on(entry: Entry) -> None:
    counts, whole = evaluations(entry.strategy)
    run, pick, failed = Run(entry.strategy), torch.Generator().manual_seed(1), 0
    for count in counts:
        if count:
            last = torch.randint(1, count + 1, (2,), generator=pick).tolist()
            failed += run.fails(last[0], False) + run.fails(last[1], True)
        run.step()
    assert failed >= len(counts) / 2
    assert_same(run.state.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    "name", ["joint reset", "imaml, warm start", "joint full", "maml", "nuts", "svi"]
)
@pytest.mark.parametrize("quietly", [False, True])
def test_a_run_that_failed_is_resumed_as_if_it_had_not(
    name: str, quietly: bool, tmp_path: Path
) -> None:
    """The checkpoint is of the step before the failure."""
    strategy = CATALOGUE[name].strategy
    wanted = fit(strategy, Density(Model(), TASKS, shared=["noise"]), TASKS)
    model = Model()
    density = Density(model, TASKS, shared=["noise"])

    def spoil(step: int, info: StepInfo) -> None:
        if step == 3:
            model.fails_from, model.quietly = model.calls + 1, quietly

    path = tmp_path / "run.pt"
    if not quietly:  # an error of the model's own is not what a checkpoint is written for

        def stop(step: int, info: StepInfo) -> None:
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(strategy, density, TASKS, checkpoint=path, on_step=stop)
        model.fails_from = model.calls + 4
        model.fails_from = max(model.fails_from, 1)
    with pytest.raises(NonFiniteLoss if quietly else Broken):
        fit(strategy, density, TASKS, checkpoint=path, on_step=spoil)
    model.fails_from = None
    if path.exists():
        assert torch.load(path, weights_only=True)["state"]["step"] == 3
    done = fit(strategy, density, TASKS, checkpoint=path)
    assert_same(done.state.state_dict(), wanted.state.state_dict())


def test_a_partial_reset_is_not_made_twice() -> None:
    """The rows of a step that fails at a reset are where they were, not halfway to the prior."""
    run = Run(JointVariational(steps=6, q="diagonal", resets=Reset(3, amount=0.5)))
    for _ in range(3):
        run.step()
    rows = run.state.tensors["rows"].clone()
    assert run.fails(1, quietly=False) and torch.equal(run.state.tensors["rows"], rows)
    run.step()
    assert not torch.equal(run.state.tensors["rows"], rows)
