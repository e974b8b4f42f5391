"""What cannot be right is said at once: in `fit`, `adapt`, `to_arviz` and `compare`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from catalogue import CATALOGUE
from helpers import case_of
from linear_gaussian import LinearGaussian
from torch import Tensor

import varmeta as vm
from varmeta.inference import nuts
from varmeta.inference.soundness import risen
from varmeta.posterior import Delta, TaskPosterior
from varmeta.scores import KNOWN, Outcome, Score, score_table

CASE = case_of(LinearGaussian.random(3, num_tasks=4, dim=2), shared_noise=True)
TRAIN = CASE.tasks.support
OURS = ("is far off", "is untouched", "objective diverged")
FIRST = {type(entry.strategy): entry.strategy for entry in reversed(CATALOGUE.values())}


def run(strategy: vm.Strategy, tasks: vm.Tasks = TRAIN) -> tuple[vm.Fit, list[str]]:
    """A fit with its posteriors, and what was said of its soundness."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = vm.fit(strategy, CASE.density, tasks, progress=False)
        for posterior in (result.adapt(tasks), result.posterior()):
            assert posterior.mean.isfinite().all()
    said = [str(w.message) for w in seen]
    return result, [text for text in said if any(ours in text for ours in OURS)]


def damage(result: vm.Fit) -> float:
    """Nats a row by which the likeliest draw of a posterior is worse than the start, at worst."""
    origin, worst = result.state.meta.origin, -np.inf
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        start = origin.loc.expand(len(TRAIN), -1)
        before = CASE.density.negative_log_likelihood(start, TRAIN)
        for posterior in (result.adapt(TRAIN), result.posterior()):
            shared = posterior.shared.mean(0) if posterior.shared.dim() == 3 else posterior.shared
            after = CASE.density.negative_log_likelihood(posterior.mean, TRAIN, shared)
            worst = max(worst, float(((after - before) / TRAIN.num_rows).max()))
    return worst


RATED = {type(s).__name__: s for s in FIRST.values() if hasattr(s, "learning_rate")}


@pytest.mark.parametrize("name", RATED)
def test_no_strategy_ruins_a_posterior_in_silence(name: str) -> None:
    """A learning rate of 1e3: an error, or words, wherever the rows came to be far less likely."""
    strategy = replace(RATED[name], learning_rate=1e3)  # type: ignore[call-arg]
    try:
        result, said = run(strategy)
    except FloatingPointError as error:
        assert strategy.name in str(error) or "task '" in str(error)
        return
    assert bool(said) == (damage(result) > 100), (said, damage(result))
    assert all(text.startswith(strategy.name) for text in said)


@pytest.mark.parametrize("name", [type(s).__name__ for s in FIRST.values()])
def test_no_false_alarm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every strategy at the settings of the catalogue, which are few steps."""
    monkeypatch.setattr(nuts, "_QUICK_STEPS", 10)
    strategy = {type(s).__name__: s for s in FIRST.values()}[name]
    if name == "PyroNUTS":
        strategy = vm.PyroNUTS(draws=4, warmup=2, chains=1, proposals=50)
    assert run(strategy)[1] == []


@pytest.mark.parametrize("kind", [vm.MAML, vm.FOMAML, vm.MetaSGD, vm.ABML, vm.Reptile])
def test_steps_that_lead_away_end_in_words(kind: Any) -> None:
    """Inner steps too long by far, without the clip, and finite all the same."""
    size = 3.0 if kind is vm.ABML else 30.0
    inner = vm.GradientDescent(size, 12, tolerance=0, clip=None)
    options = {"optimiser": "adam"} if kind is not vm.ABML else {}
    result, said = run(kind(steps=4, minimiser=inner, **options))
    assert damage(result) > 1e6 and result.converged is False
    assert sum("of 4 tasks ('" in text and "is far off" in text for text in said) == 2, said
    assert "did not converge: the objective diverged" in said[0] and "nats per task" in said[0]


LOSSES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "falls": (lambda t: 100 * np.exp(-t / 20), False),
    "flat": (lambda t: 5 + 0 * t, False),
    "rises within a nat a row": (lambda t: 5 + 4 * t / len(t), False),
    "rises, then falls below": (lambda t: 5 + 30 * np.sin(t / 25) - t / 5, False),
    "explodes": (lambda t: 1.2**t, True),
    "explodes at the end": (lambda t: 5 + 1e9 * (t > 0.93 * len(t)), True),
    "ends at 1e95": (lambda t: np.where(t < 20, 5.0, 1e95), True),
    "ends beyond any number": (lambda t: np.where(t < 20, 5.0, np.inf), True),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_losses_that_rose(name: str, noise: float) -> None:
    """Five rows a task; noise of up to six nats a row is not taken for a rise (fixed seed)."""
    law, wanted = LOSSES[name]
    steps = np.arange(200.0)
    losses = law(steps) + noise * np.random.default_rng(0).standard_normal(200)
    said = risen(pd.DataFrame({"loss": losses}), 5.0)
    assert bool(said) == wanted
    if wanted:
        assert said.startswith("the objective diverged, from ")


def test_a_run_whose_loss_rose_has_not_converged() -> None:
    """The warning has the strategy's name."""
    inner = vm.GradientDescent(0.01, 5, tolerance=0)
    strategy = vm.Reptile(steps=6, learning_rate=1e3, minimiser=inner)
    result, said = run(strategy)
    assert said[0].startswith("Reptile did not converge: the objective diverged")
    assert result.converged is False and "lower the learning rate" in result.reason


@dataclass(frozen=True)
class Ill(vm.Strategy):
    """Hands out what `change` makes of a point at θ0 for each task."""

    change: Callable[[Tensor], Tensor]

    name = "Ill"  # type: ignore[assignment]
    num_steps = 1  # type: ignore[assignment]

    def init(self, density: Any, prior: Any, tasks: Any, generator: Any) -> Any:
        return vm.CompletePooling().init(density, prior, tasks, generator)

    def step(self, density: Any, state: Any, batch: Any, generator: Any) -> Any:
        from varmeta.inference.base import StepInfo

        return StepInfo(1.0, 1)

    def adapt(self, density: Any, state: Any, tasks: Any, generator: Any) -> TaskPosterior:
        prior = vm.GaussianPrior.from_density(density)
        loc = self.change(prior.loc.expand(len(tasks), -1).clone())
        return Delta(density, tasks.names, density.shared_init, loc)


def nan_in_task_2(loc: Tensor) -> Tensor:
    return loc.index_fill(0, torch.tensor([2]), torch.nan)


def test_a_posterior_that_is_no_number_is_not_handed_out() -> None:
    strategy = Ill(nan_in_task_2)
    result = vm.fit(strategy, CASE.density, TRAIN, progress=False)
    named = r"Ill: the posterior of task '2' is not finite \(1 of 4 tasks\)\. Lower the learning"
    for call in (
        lambda: result.adapt(TRAIN),
        lambda: result.posterior(),
        lambda: vm.to_arviz(result),
        lambda: vm.to_arviz(result, posterior=strategy.adapt(CASE.density, None, TRAIN, None)),
    ):
        with pytest.raises(vm.NonFinitePosterior, match=named):
            call()
    assert issubclass(vm.NonFinitePosterior, FloatingPointError)
    both = {"ill": strategy, "pooled": vm.CompletePooling(draws=5)}
    table = vm.compare(both, CASE.density, CASE.tasks, draws=5, progress=False)
    assert table.failures["ill"].startswith(
        "posterior of the training tasks: the posterior of task '2' is not finite (1 of 4 tasks)"
    )
    assert (table.table.set_index("strategy")["elpd_diff"] == 0)["pooled"]


def test_a_learned_number_that_is_none_is_found_when_the_run_ends() -> None:
    """The last step's update has no later loss to show it."""

    class Last(Ill):
        def step(self, density: Any, state: Any, batch: Any, generator: Any) -> Any:
            with torch.no_grad():
                state.meta.raw["loc"][1] = torch.nan
            return super().step(density, state, batch, generator)

    with pytest.raises(vm.NonFiniteLoss, match=r"Ill: after the last step 1 of 2 .*\(loc\)"):
        vm.fit(Last(nan_in_task_2), CASE.density, TRAIN, progress=False)


def test_a_task_that_was_left_where_it_was_is_named() -> None:
    result = vm.fit(Ill(lambda loc: loc), CASE.density, TRAIN, progress=False)
    result.state.meta.raw["log_scale"].data.zero_()  # the prior's, and not complete pooling's 0
    with pytest.warns(RuntimeWarning, match=r"Ill: the posterior of 4 of 4 tasks .* untouched"):
        result.adapt(TRAIN)
    moved = vm.fit(Ill(lambda loc: loc + 1e-3), CASE.density, TRAIN, progress=False)
    moved.state.meta.raw["log_scale"].data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved.adapt(TRAIN)


def test_a_row_of_nan_does_not_take_best_from_the_table() -> None:
    rows = TRAIN.mask.to(torch.float64)
    tasks = replace(TRAIN, is_query=TRAIN.mask)
    values = {"nan": rows * torch.nan, "worse": -2 * rows, "better": -rows, "never": -torch.inf}
    scores = {
        name: {KNOWN: Score({"posterior": "delta"}, value * rows)} for name, value in values.items()
    }
    outcomes: dict[str, Outcome] = {}
    table = score_table(list(scores), {KNOWN: tasks}, scores, outcomes, None, {})
    found = table.set_index("strategy")["elpd_diff"]
    assert found["better"] == 0 and found["worse"] == -1 and found["nan"] != 0
