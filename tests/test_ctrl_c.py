"""Ctrl-C: a step is never left half done, and what is done is never lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same, case_of, linear_model
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.inference.base import StepInfo
from varmeta.inference.fit import fit
from varmeta.inference.joint import JointVariational
from varmeta.models.density import Density

CASE = case_of(LinearGaussian.random(0))
JOINT = JointVariational(q="diagonal", steps=10, adapt_steps=5)  # one call of the model a step
SOLVED = JointVariational(steps=10, tolerance=1e-7)


def stop(step: int, info: StepInfo) -> None:
    if step == 2:
        raise KeyboardInterrupt


def press(step: int, info: StepInfo) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def terminal() -> Iterator[None]:
    """Python's own Ctrl-C, as at a terminal: a shell starts background jobs without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(times: int) -> tuple[Callable[..., Tensor], dict[str, int]]:
    """A model in which Ctrl-C is pressed, `times` times, on a call when `left` reaches 0."""
    plain, clock = linear_model(3, 0.5), {"left": -1}

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        clock["left"] -= 1
        if clock["left"] == 0:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return plain(x, y)

    return model, clock


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_within_a_step_waits_for_its_end(tmp_path: Path) -> None:
    """A half-taken step could not be resumed exactly."""
    model, clock = interrupting(times=1)
    density, path = Density(model, CASE.tasks), tmp_path / "run.pt"
    whole = fit(JOINT, density, CASE.tasks)
    clock["left"] = 6  # `fit` asks the model once before its steps
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 10; everything done is in"):
        fit(JOINT, density, CASE.tasks, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = fit(JOINT, density, CASE.tasks, checkpoint=path)
    assert_same(resumed.state.state_dict(), whole.state.state_dict())
    assert_same(
        resumed.history.drop(columns="seconds").to_dict("list"),
        whole.history.drop(columns="seconds").to_dict("list"),
    )


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize("update", ["auto", "gradient", "closed_form"])
def test_a_run_with_solved_q_resumes_bit_for_bit(update: Any, at: int, tmp_path: Path) -> None:
    """Within the closed form's first steps, and among those of each way of the prior."""

    def halt(step: int, info: StepInfo) -> None:
        if step == at:
            raise KeyboardInterrupt

    strategy, path = replace(SOLVED, prior_update=update), tmp_path / "run.pt"
    whole = fit(strategy, CASE.density, CASE.tasks)
    with pytest.raises(KeyboardInterrupt, match=f"after step {at} of 10"):
        fit(strategy, CASE.density, CASE.tasks, checkpoint=path, on_step=halt)
    resumed = fit(strategy, CASE.density, CASE.tasks, checkpoint=path)
    assert len(whole.history) > at
    assert_same(resumed.state.state_dict(), whole.state.state_dict())
    assert_same(resumed.history["loss"].tolist(), whole.history["loss"].tolist())
    assert resumed.history["step"].tolist() == list(range(1, len(whole.history) + 1))


@pytest.mark.usefixtures("terminal")
def test_a_second_ctrl_c_does_not_wait_and_saves_no_half_step(tmp_path: Path) -> None:
    model, clock = interrupting(times=2)
    density, path = Density(model, CASE.tasks), tmp_path / "run.pt"
    clock["left"] = 6  # `fit` asks the model once before its steps
    with pytest.raises(KeyboardInterrupt):
        fit(JOINT, density, CASE.tasks, checkpoint=path)
    assert not path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_without_a_checkpoint_is_just_that() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(JOINT, CASE.density, CASE.tasks, on_step=stop)
    assert str(caught.value) == ""


def test_a_users_own_handler_is_respected() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(JOINT, CASE.density, CASE.tasks, on_step=press)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
