"""Laws that every strategy obeys, whatever it computes."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE, Entry
from helpers import assert_same, case_of, widened
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta import (
    CompletePooling,
    Density,
    Fit,
    GaussianPrior,
    NonFiniteLoss,
    NoPooling,
    PyroNUTS,
    Tasks,
    fit,
    lengths,
)
from varmeta.inference import nuts
from varmeta.inference.base import StepInfo
from varmeta.posterior import TaskPosterior
from varmeta.seeds import generator

CASE = case_of(LinearGaussian.random(3, num_tasks=4, dim=2), shared_noise=True)
TRAIN = CASE.tasks.support
NEW = case_of(LinearGaussian.random(4, num_tasks=3, dim=2)).tasks.support

every_strategy = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE.keys())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """NUTS may start anywhere: these laws do not ask how well it mixes."""
    monkeypatch.setattr(nuts, "_QUICK_STEPS", 10)


def run(entry: Entry, tasks: Tasks = TRAIN, **options: object) -> Fit:
    prior = GaussianPrior.from_density(CASE.density)
    with warnings.catch_warnings():  # few steps and draws are reported, as they should be
        warnings.simplefilter("ignore", RuntimeWarning)
        return fit(entry.strategy, CASE.density, tasks, prior=prior, **options)  # type: ignore[arg-type]


@cache
def done(entry: Entry) -> Fit:
    """A run that tests may read but not change."""
    return run(entry)


def adapted(result: Fit, tasks: Tasks) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        posterior = result.adapt(tasks.unsplit)
    return posterior.mean, posterior.sd


@dataclass
class Watched:
    """A second run, what it printed, and what is global before it and after."""

    fit: Fit
    adapted: tuple[Tensor, Tensor]
    printed: str
    before: list[Any]
    after: list[Any]


@cache
def watched(entry: Entry) -> Watched:
    """Of the same seed as `done`, after other global draws: one run for several laws."""
    torch.manual_seed(2)
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(3.0))
    out, before = io.StringIO(), everything_global()
    with redirect_stdout(out), redirect_stderr(out):
        result = run(entry)
    found = adapted(result, NEW)
    after = everything_global()
    pyro.get_param_store().clear()
    return Watched(result, found, out.getvalue(), before, after)


def everything_global() -> list[Any]:
    return [
        torch.random.get_rng_state().tolist(),
        list(pyro.get_param_store().keys()),
        pyro.distributions.is_validation_enabled(),
        pyro.poutine.is_validation_enabled(),
        torch.distributions.Distribution._validate_args,
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    ]


@every_strategy
def test_same_seed_same_result(entry: Entry) -> None:
    """The global generator has no say."""
    first, second = done(entry), watched(entry).fit
    assert_same(first.state.state_dict(), second.state.state_dict())
    assert_same(list(adapted(first, NEW)), list(watched(entry).adapted))
    assert_same(first.history["loss"].tolist(), second.history["loss"].tolist())


@every_strategy
def test_global_state_is_left_alone(entry: Entry) -> None:
    assert watched(entry).after == watched(entry).before
    assert watched(entry).before[1] == ["mine"] and watched(entry).before[-1] == torch.float32


@every_strategy
def test_silent_when_not_a_terminal(entry: Entry) -> None:
    assert watched(entry).printed == ""


@every_strategy
def test_padding_changes_nothing(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does learning from tasks of like length at a time."""
    plain = done(entry)
    with monkeypatch.context() as small:
        small.setattr(lengths, "WORTH", 0)
        small.setattr(lengths, "SHARE", 1)
        wide = widened(TRAIN, 3)
        assert wide.buckets is not None
        result = run(entry, wide)
    # Chaotic in the rounding (Adam's steps are as long for a gradient of 1e-16; 1 + 1e-15 times the
    # inputs leads as far away): hold the training fixed.
    if entry.strategy.name == "PyroNUTS" or entry is CATALOGUE["imaml, unrolled Adam"]:
        result.state.load_state_dict(plain.state.state_dict())
    torch.testing.assert_close(result.prior.loc, plain.prior.loc, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.shared, plain.shared, rtol=1e-9, atol=1e-9)
    for padded, narrow in zip(adapted(result, widened(NEW, 4)), adapted(plain, NEW), strict=True):
        torch.testing.assert_close(padded, narrow, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "entry",
    [e for e in CATALOGUE.values() if e.separate],
    ids=[n for n, e in CATALOGUE.items() if e.separate],
)
def test_batched_is_one_by_one(entry: Entry) -> None:
    result = done(entry)
    together = adapted(result, NEW)
    for i in range(len(NEW)):
        alone = adapted(result, NEW.select([i]))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-8, atol=1e-10)


@every_strategy
def test_interrupted_and_resumed(entry: Entry, tmp_path: Path) -> None:
    whole = done(entry)
    half = whole.state.step // 2

    def stop(step: int, info: StepInfo) -> None:
        if step == max(half, 1):
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt, match="Call fit again with the same arguments"):
        run(entry, checkpoint=path, on_step=stop)
    kept = torch.load(path, weights_only=True)
    assert kept["state"]["step"] == max(half, 1)
    resumed = run(entry, checkpoint=path)
    assert resumed.finished and len(resumed.history) == len(whole.history)
    assert_same(resumed.state.state_dict(), whole.state.state_dict())
    again = run(entry, checkpoint=path)  # a finished run is not run again
    assert_same(again.state.state_dict()["raw"], resumed.state.state_dict()["raw"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as in `run`
@every_strategy
def test_posterior_protocol(entry: Entry) -> None:
    result = done(entry)
    for posterior, tasks in ((result.posterior(), TRAIN), (result.adapt(TRAIN.unsplit), TRAIN)):
        assert posterior.names == tasks.names
        assert posterior.mean.shape == posterior.sd.shape == (len(tasks), 2)
        assert (posterior.sd >= 0).all()
        theta, shared = posterior.sample(7, generator(0))
        assert theta.shape == (7, len(tasks), 2)
        assert shared.shape in ((1,), (7, len(tasks), 1))
        lpd = posterior.log_predictive(tasks, 7, generator(0))
        assert lpd.shape == tasks.mask.shape and (lpd[~tasks.mask] == 0).all()
        predicted = posterior.predict(tasks, 7, generator(0))
        assert {name: v.shape for name, v in predicted.items()} == {"y": (7, *tasks.mask.shape)}


@every_strategy
def test_shrinkage_has_a_row_for_each_module(entry: Entry) -> None:
    result = done(entry)
    table = result.shrinkage().table
    assert len(table) == 1 and math.isfinite(table["cost"][0])
    assert table["movement"][0] > 0 and table["relative"][0] > 0 and table["start"][0] == 2
    pooled = isinstance(entry.strategy, CompletePooling)
    assert (table["scale"][0] == 0) == pooled
    scale = float(result.prior.log_scale.exp())
    assert table["scale"][0] == pytest.approx(scale, rel=1e-12)
    if result.scales is not None:
        assert result.scales.shape == (len(result.history), 1)
        assert float(result.scales[-1]) == scale
    if isinstance(entry.strategy, NoPooling | PyroNUTS) or pooled:
        assert result.scales is None


@every_strategy
def test_history_counts_up(entry: Entry) -> None:
    result = done(entry)
    history, steps = result.history, result.state.step
    assert history["step"].tolist() == list(range(1, steps + 1))
    assert steps == entry.strategy.num_steps or (
        steps < entry.strategy.num_steps and result.converged
    )
    assert history["gradients"].is_monotonic_increasing and history["gradients"].iloc[-1] > 0
    assert history["seconds"].is_monotonic_increasing
    assert history["loss"].notna().all()


def explosive(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Rows with x > 100 have no finite likelihood for any θ."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    mean = theta * x[..., 0] * torch.where(x[..., 0] > 100, torch.inf, 1.0)
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@every_strategy
def test_non_finite_loss_names_the_task(entry: Entry, tmp_path: Path) -> None:
    x = torch.ones(4, 1, dtype=torch.float64)
    pairs = [(x, x[:, 0]), (x * 2, x[:, 0]), (x * 1000, x[:, 0])]
    tasks = Tasks.from_list(pairs, names=["calm", "quiet", "wild"])
    density = Density(explosive, tasks)
    path = tmp_path / "run.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(NonFiniteLoss, match=r"step 0: the loss of task 'wild.*(nan|inf)"):
            fit(entry.strategy, density, tasks, checkpoint=path)
    saved = torch.load(path, weights_only=True)["state"]
    assert saved["step"] == 0 and all((v == 0).all() for v in saved["raw"].values())


@pytest.mark.parametrize("name", ["joint", "complete pooling", "svi"])
def test_checkpoint_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    """By the loop, whatever the strategy; `test_fingerprint.py` has what else is told apart."""
    path = tmp_path / "run.pt"
    run(CATALOGUE[name], checkpoint=path, seed=1)
    with pytest.raises(ValueError, match=r"differs in seed \(1, now 2\)\. Give the same"):
        run(CATALOGUE[name], checkpoint=path, seed=2)


def numbers(posterior: TaskPosterior, tasks: Tasks) -> list[Tensor]:
    drawn = posterior.predict(tasks, 3, generator(0))
    return [posterior.mean, posterior.sd, posterior.shared, *drawn.values()]


FIRST = {type(entry.strategy): name for name, entry in reversed(CATALOGUE.items())}.values()


@every_strategy
def test_a_fit_pickled_or_copied_is_the_same_fit(entry: Entry) -> None:
    """What it has learned; and, for one of each class, what it makes of tasks."""
    result = done(entry)
    loaded, twin = pickle.loads(pickle.dumps(result)), copy.deepcopy(result)
    for other in (loaded, twin):
        assert_same(other.state.state_dict(), result.state.state_dict())
        assert repr(other.strategy) == repr(result.strategy)
        assert other.density is not result.density and other.history.equals(result.history)
        assert (other.converged, other.reason) == (result.converged, result.reason)
    with torch.no_grad():
        twin.state.meta.raw["loc"] += 1.0
    assert not torch.equal(twin.prior.loc, result.prior.loc), "a copy is a thing of its own"
    if all(CATALOGUE[name] is not entry for name in FIRST):
        return
    with warnings.catch_warnings():  # few steps and draws are reported, as they should be
        warnings.simplefilter("ignore", RuntimeWarning)
        wanted, found = result.adapt(NEW), loaded.adapt(NEW)
        assert_same(numbers(pickle.loads(pickle.dumps(found)), NEW), numbers(wanted, NEW))
        wanted, found = result.posterior(), loaded.posterior()
        assert_same([found.mean, found.sd], [wanted.mean, wanted.sd])
