"""Errors that are the machine's or the user's own are not taken for something else."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from varmeta import Density, Tasks
from varmeta.models import capture
from varmeta.models.capture import Captured, Unrecordable, compile_graph, record, trace
from varmeta.seeds import generator


class Own(RuntimeError):
    """A user's."""


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room"), Own("mine")]
every_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)


class Failing:
    """A model that counts its calls and fails from one of them on."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls, self.fails = error, 0, False

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.fails:
            raise self.error
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(theta + 0 * x[..., 0], 1.0), obs=y)


@pytest.mark.parametrize(
    "error", [*ERRORS, RuntimeError("the pump is off")], ids=lambda e: type(e).__name__
)
def test_predicting_does_not_run_a_failing_model_again(error: Exception) -> None:
    x = torch.zeros(2, 1)
    model = Failing(error)
    density = Density(model, Tasks.from_list([(x, x[:, 0])] * 3))
    tasks = Tasks.from_list([(x, x[:, 0])] * 3)
    model.fails, model.calls = True, 0
    with pytest.raises(type(error), match=str(error)):
        density.predict(torch.zeros(3, 1), tasks, generator(0))
    assert model.calls == 1


def test_what_cannot_be_batched_is_still_drawn_one_by_one() -> None:
    def share(x: Tensor, y: Tensor | None = None) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[-2]):
            law = dist.Beta(1 + theta.exp() + 0 * x[..., 0], 2.0)
            return pyro.sample("y", law, obs=y)

    x = torch.zeros(2, 1)
    tasks = Tasks.from_list([(x, x[:, 0] + 0.5)] * 3)
    drawn = Density(share, tasks).predict(torch.zeros(3, 1), tasks, generator(0))
    assert drawn["y"].shape == (3, 2)


@every_error
def test_recording_passes_on_what_is_not_about_it(error: Exception) -> None:
    def fails(x: Tensor) -> list[Tensor]:
        raise error

    with pytest.raises(type(error)):
        trace(fails, [torch.ones(2)])
    with pytest.raises(type(error)):
        record(fails, [torch.ones(2)])


@every_error
def test_comparing_and_compiling_pass_it_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = trace(lambda x: [2 * x], [torch.ones(2)])

    def fails(*_: object) -> None:
        raise error

    with pytest.raises(type(error)):
        capture.agree(fails, fails, [torch.ones(2)], exact=True)
    monkeypatch.setattr("torch._inductor.compile", fails)
    with pytest.raises(type(error)):
        compile_graph(graph, [torch.ones(2)])
    monkeypatch.setattr(capture, "_gradients", fails)
    with pytest.raises(type(error)):
        Captured(lambda x: x)._capture([torch.ones(2)])


def test_what_cannot_be_recorded_is_still_said_to_be_so() -> None:
    def branches(x: Tensor) -> list[Tensor]:
        return [x if bool(x.sum() > 0) else -x]

    with pytest.raises(Unrecordable):
        trace(branches, [torch.ones(2)])
