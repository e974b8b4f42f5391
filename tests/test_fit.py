"""The outer loop: what it reports, how it stops, and how it goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT, assert_close, assert_same, case_of, linear_model, tasks_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.inference import fit as fit_module
from varmeta.inference.base import NonFiniteLoss, State, StepInfo
from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.minimise import GradientDescent
from varmeta.inference.resets import Reset
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks, TaskSource

CASE = case_of(LinearGaussian.random(0))
JOINT = JointVariational(q="diagonal", steps=10, adapt_steps=5)
SETTLED = JOINT.settled(CASE.density, whole=True)


def run(strategy: Any = JOINT, tasks: Tasks | TaskSource = CASE.tasks, **options: Any) -> Fit:
    return fit(strategy, CASE.density, tasks, **options)


def stop_at(when: int) -> Callable[[int, StepInfo], None]:
    def on_step(step: int, info: StepInfo) -> None:
        if step == when:
            raise KeyboardInterrupt

    return on_step


# -- batches and seeds ----------------------------------------------------------------------------


def test_different_seeds_differ_and_the_same_does_not() -> None:
    a, b, c = (run(seed=seed) for seed in (0, 1, 0))
    assert not torch.equal(a.prior.loc, b.prior.loc)
    assert_same(a.state.state_dict(), c.state.state_dict())


def test_every_step_draws_new_noise() -> None:
    """At a standstill the loss still varies, by more than the standstill's 1e-12."""
    assert run(replace(JOINT, learning_rate=1e-12)).history["loss"].std() > 1e-3


def test_batches_are_random_and_reach_every_task() -> None:
    done = run(batch_size=2)
    assert bool(done.stats["grad_norm"].isfinite().all()) and len(done.stats["grad_norm"]) == 6
    assert not torch.equal(done.prior.loc, run(batch_size=2, seed=1).prior.loc)
    gradients = done.history["gradients"].diff().iloc[1:]
    assert (gradients == 2 * JOINT.samples).all()


def test_every_epoch_visits_every_task_once() -> None:
    """Ten steps of two: three epochs of six tasks, and two tasks more."""
    visits = run(batch_size=2).state.tensors["visits"]
    assert visits.sum() == 20 and set(visits.tolist()) <= {3.0, 4.0}


def test_a_batch_of_all_is_no_batch() -> None:
    assert_same(run(batch_size=6).state.state_dict(), run().state.state_dict())


@pytest.mark.parametrize("size", [-1, 0, 7])
def test_a_batch_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must lie between 1 and 6"):
        run(batch_size=size)


def test_a_streams_batches_are_its_own() -> None:
    source = TaskSource(lambda g: tasks_of(LinearGaussian.random(0)))
    with pytest.raises(ValueError, match="draws its own"):
        run(IMAML(steps=1), source, batch_size=2)
    with pytest.raises(ValueError, match="not kept"):
        run(IMAML(steps=1), source).posterior()


def test_a_prior_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="prior has 2 coordinates, the density 3"):
        run(prior=GaussianPrior.create(torch.zeros(2, dtype=FLOAT), 1.0))


# -- history --------------------------------------------------------------------------------------


def test_history_has_a_row_per_step_and_counts_up() -> None:
    done = run(IMAML(steps=4))
    history = done.history
    assert history["step"].tolist() == [1, 2, 3, 4] and done.finished
    for column in ("gradients", "seconds"):
        assert (history[column].diff().iloc[1:] > 0).all() and history[column].iloc[0] > 0
    assert done.gradients == history["gradients"].iloc[-1]
    assert done.seconds == history["seconds"].iloc[-1]
    assert {"loss", "grad_norm", "residual"} <= set(history.columns)


def test_history_of_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, on_step=stop_at(4))
    resumed, whole = run(checkpoint=path).history, run().history
    assert resumed["step"].tolist() == list(range(1, 11))
    for column in ("loss", "gradients", "grad_norm"):
        assert_same(resumed[column].tolist(), whole[column].tolist())
    assert resumed["seconds"].is_monotonic_increasing


def test_on_step_sees_every_step() -> None:
    seen = []
    done = run(on_step=lambda step, info: seen.append((step, info.loss)))
    assert seen == list(zip(done.history["step"], done.history["loss"], strict=True))


# -- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        replace(JOINT, resets=Reset(3)),
        replace(JOINT, q="delta"),
        replace(JOINT, steps=150),  # long enough for the model to be recorded in one run only
        JointVariational(steps=160),
        IMAML(steps=12),
    ],
    ids=["resets", "points", "recorded", "solved", "imaml"],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_resumed_run_is_the_uninterrupted_one(
    strategy: Any, batch_size: int | None, tmp_path: Path
) -> None:
    """Bit for bit, also from a new process's point of view: a new model object each time."""

    def once(**options: Any) -> Fit:
        density = Density(linear_model(3, 0.5), CASE.tasks)
        return fit(strategy, density, CASE.tasks, batch_size=batch_size, seed=3, **options)

    whole, path = once(), tmp_path / "run.pt"
    for when in (1, len(whole.history) // 2, len(whole.history) - 1):
        with pytest.raises(KeyboardInterrupt, match=f"after step {when} of {strategy.num_steps}"):
            once(checkpoint=path, on_step=stop_at(when))
    resumed = once(checkpoint=path)
    assert_same(resumed.state.state_dict(), whole.state.state_dict())
    assert_same(resumed.stats, whole.stats)


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_tensors_and_numbers_and_never_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    path, sizes = tmp_path / "run.pt", []
    run(checkpoint=path, on_step=lambda step, info: sizes.append(path.exists()))
    assert sizes == [False] + [True] * 9  # after every step
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    saved = torch.load(path, weights_only=True)
    assert saved["state"]["step"] == 10 and saved["seed"] == 0


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = run(checkpoint=path)

    def never(step: int, info: StepInfo) -> None:
        raise AssertionError("nothing is left to do")

    again = run(checkpoint=path, on_step=never)
    assert_same(again.state.state_dict(), first.state.state_dict())
    assert_same(again.adapt(CASE.tasks.unsplit).mean, first.adapt(CASE.tasks.unsplit).mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"differs in seed \(0, now 1\)"),
        (
            {"strategy": replace(JOINT, learning_rate=0.1)},
            r"differs in the strategy \(learning_rate=0.05, now learning_rate=0.1\)",
        ),
        ({"strategy": IMAML(steps=10)}, "differs in the strategy"),
        ({"strategy": replace(JOINT, steps=20)}, "A run is not made longer afterwards"),
        (
            {"tasks": CASE.tasks.select([0, 1])},
            r"the names of the tasks \(6 × task, now 2 × task\)",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(**options, checkpoint=path)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    other = case_of(LinearGaussian.random(1, dim=2))
    with pytest.raises(ValueError, match=r"another run; it differs in .*the latent 'theta'"):
        fit(JOINT, other.density, other.tasks, checkpoint=path)


def test_a_states_copy_does_not_change_with_it() -> None:
    """Neither the learned tensors nor the optimiser's momentum."""
    done = run()
    before = done.state.state_dict()
    tasks = CASE.tasks.unsplit
    batch = fit_module.Batch(tasks, torch.arange(6), 6)
    done.state.step = before["step"] = 3  # where the learning rate is not 0
    again = deepcopy(before)
    SETTLED.step(CASE.density, done.state, batch, generator(0))
    assert_same(before, again)
    fresh = SETTLED.init(
        CASE.density, GaussianPrior.from_density(CASE.density), tasks, generator(0)
    )
    fresh.load_state_dict(before)
    SETTLED.step(CASE.density, fresh, batch, generator(0))
    assert_same(before, again)
    assert not torch.equal(fresh.meta.raw["loc"], before["raw"]["loc"])


# -- losses that are not finite -------------------------------------------------------------------


def bounded(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Where x = 1 θ must stay below 0.8; the targets are 1. The other tasks have x = 0."""
    theta = pyro.sample("theta", dist.Normal(tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        edge = torch.where(x[:, 0] > 0, 0 * (0.8 - theta).log(), 0.0)  # 0, or NaN beyond
        return pyro.sample("y", dist.Normal(theta + edge, 1.0), obs=y)


def rooted(x: Tensor, y: Tensor | None = None) -> Tensor:
    """√θ² has the value 0 and no derivative at θ = 0."""
    theta = pyro.sample("theta", dist.Normal(tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal((theta**2).sqrt() + x[:, 0], 1.0), obs=y)


def flagged() -> Tasks:
    rows = [(torch.zeros(2, 1, dtype=FLOAT), torch.ones(2, dtype=FLOAT)) for _ in range(4)]
    rows[2] = (rows[2][0] + 1, rows[2][1])
    return Tasks.from_list(rows, names=["a", "b", "c", "d"])


def test_a_loss_that_overflows_stops_the_run_before_its_step(tmp_path: Path) -> None:
    """In mid-run, when the task's θ leaves the model's domain."""

    class Watched(JointVariational):
        def step(self, density: Density, state: State, *rest: Any) -> StepInfo:
            states.append(state.state_dict())
            return super().step(density, state, *rest)

    states: list[dict[str, Any]] = []
    path, strategy = tmp_path / "run.pt", Watched(q="delta", steps=200, learning_rate=0.1)
    message = r"step \d+: the loss of task 'c' is (inf|nan) \(1 of 4"
    with pytest.raises(NonFiniteLoss, match=message):
        fit(strategy, Density(bounded, flagged()), flagged(), checkpoint=path)
    assert len(states) > 3, "it should not fail at once"
    assert_same(torch.load(path, weights_only=True)["state"], states[-1])


@pytest.mark.parametrize(
    "strategy", [JointVariational(q="delta"), IMAML(folds=None, learn_scale=False)], ids=str
)
def test_a_gradient_that_is_not_finite_stops_the_run(strategy: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(NonFiniteLoss, match="finite but the gradient is not"):
        fit(strategy, Density(rooted, flagged()), flagged(), checkpoint=path)
    saved = torch.load(path, weights_only=True)["state"]
    assert saved["step"] == 0
    assert all(bool((t == 0).all()) for t in saved["raw"].values())
    assert bool((saved["tensors"].get("rows", torch.zeros(1)) == 0).all())


# -- what is said ---------------------------------------------------------------------------------


def test_unsolved_inner_problems_are_said_in_plain_words() -> None:
    """By the run, and by adapting."""
    strategy = IMAML(steps=1, minimiser=GradientDescent(1e-4, max_iterations=2))
    message = "IMAML: 6 of 6 tasks did not reach the inner minimiser's tolerance.*max_iterations"
    with pytest.warns(RuntimeWarning, match=message):
        done = run(strategy)
    with pytest.warns(RuntimeWarning, match="2 of 2 tasks did not reach"):
        done.adapt(CASE.tasks.unsplit.select([0, 1]))


def test_negative_curvature_is_said_in_plain_words() -> None:
    """Support: two symmetric modes and θ0 = 0 on the saddle between them. Query: a slope there."""

    def square(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(theta**2 + x[:, 0] * theta, 0.5), obs=y)

    x, y = tensor([[0.0], [0.0], [1.0]]), tensor([4.0, 4.1, 1.0])
    tasks = Tasks.from_list([(x, y), (x, y + 1)])
    tasks = replace(tasks, is_query=tasks.inputs[..., 0] > 0)
    with pytest.warns(RuntimeWarning, match="IMAML: 2 of 2 tasks met negative curvature"):
        fit(IMAML(steps=1), Density(square, tasks), tasks)


def test_a_good_run_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(IMAML()).adapt(CASE.tasks.unsplit)
    assert capfd.readouterr() == ("", "")


def test_the_bar_is_shown_on_demand_only(capfd: pytest.CaptureFixture[str]) -> None:
    run(progress=None)  # no terminal here
    run(progress=False)
    assert capfd.readouterr() == ("", "")
    run(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "JointVariational" in err and "10/10" in err


# -- adapting -------------------------------------------------------------------------------------


def test_adapting_uses_all_rows_of_the_tasks_given_and_refuses_held_out_ones() -> None:
    done = run(IMAML(steps=1))
    with pytest.raises(ValueError, match=r"query rows, which are held out: pass tasks\.support to"):
        done.adapt(CASE.tasks)
    whole = done.adapt(CASE.tasks.unsplit)
    assert not torch.equal(whole.mean, done.adapt(CASE.tasks.support).mean)
    assert_close(done.posterior().mean, whole.mean, 1e-12)


def test_a_task_without_rows_is_refused() -> None:
    done = run(IMAML(steps=1))
    empty = replace(CASE.tasks, is_query=CASE.tasks.mask & (torch.arange(6) == 1)[:, None])
    with pytest.raises(ValueError, match="task '1' has no support rows"):
        done.adapt(empty.support)
    with pytest.raises(ValueError, match="task '1' has no support rows"):
        run(tasks=empty)
