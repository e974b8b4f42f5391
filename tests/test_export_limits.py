"""to_arviz: what it refuses, what its seed decides, and what it leaves alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from export_case import (
    DENSITY,
    FRAME,
    SHARED,
    TASKS,
    T,
    assert_equal_exports,
    gaussian,
    group,
    hand_draws,
    noise,
    unfitted,
)
from torch import Tensor

from varmeta.export import to_arviz
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.resets import Reset
from varmeta.models.density import Density
from varmeta.posterior import Delta, TaskPosterior
from varmeta.tasks import TaskSource

# -- what can go wrong -------------------------------------------------------------------------


def test_posterior_of_other_tasks() -> None:
    q = replace(gaussian(), names=("north", "east", "west"))
    with pytest.raises(ValueError, match=r"posterior is of 'north', 'east', 'west', the tasks are"):
        to_arviz(unfitted(), posterior=q)


def test_a_posterior_given_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> TaskPosterior:
        raise AssertionError("adapted twice")

    monkeypatch.setattr(JointVariational, "adapt", never)
    monkeypatch.setattr(JointVariational, "posterior", never)
    to_arviz(unfitted(), posterior=gaussian(), draws=2)
    to_arviz(unfitted(), TASKS, posterior=gaussian(), draws=2)


def test_a_stream_needs_tasks() -> None:
    run = unfitted(IMAML(), tasks=TaskSource(lambda g: TASKS.split(0.3)))
    with pytest.raises(ValueError, match="a stream's tasks are not kept"):
        to_arviz(run)
    with pytest.raises(ValueError, match="a stream's tasks are not kept"):
        to_arviz(run, posterior=gaussian())
    assert group(to_arviz(run, TASKS, draws=2), "observed_data").sizes["row"] == len(FRAME)


def test_no_draws() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        to_arviz(unfitted(), draws=0)


@pytest.mark.parametrize("name", ["task", "row_id", "a_loc"])
def test_names_that_clash(name: str) -> None:
    def clash(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = pyro.sample("a", dist.Normal(0.0, 1.0)) + pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    run = unfitted(density=Density(clash, TASKS))
    with pytest.raises(ValueError, match=f"site '{name}' has the name of something else"):
        to_arviz(run)


# -- seeds and side effects --------------------------------------------------------------------


def test_the_seed_decides() -> None:
    run = unfitted()
    one, same, other = (to_arviz(run, posterior=gaussian(), draws=9, seed=s) for s in (4, 4, 5))
    assert_equal_exports(one, same)
    for name, key in (("posterior", "a"), ("prior", "a")):
        assert not np.isclose(group(one, name)[key], group(other, name)[key]).any()
    point = Delta(DENSITY, TASKS.names, SHARED, noise(T, DENSITY.dim))
    drawn = [to_arviz(run, posterior=point, draws=9, seed=s) for s in (4, 5)]
    first, second = (group(data, "posterior_predictive")["score"] for data in drawn)
    assert not np.isclose(first, second).any()


def test_attributes() -> None:
    data = to_arviz(
        unfitted(JointVariational(resets=Reset(30))), posterior=gaussian(), draws=2, seed=8
    )
    assert data.attrs["strategy"] == "JointVariational (reset 30)"
    assert "Reset(every=30" in data.attrs["strategy_repr"]
    assert data.attrs["posterior_kind"] == "gaussian"
    assert (data.attrs["seed"], data.attrs["draws_seed"]) == (0, 8)
    assert data.attrs["inference_library"] == data.attrs["creation_library"] == "varmeta"
    assert data.attrs["inference_library_version"][0].isdigit()
    assert data.attrs["task_name"] == "school"


def test_nothing_global_changes() -> None:
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(3.0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run = unfitted()
    raw = {name: value.clone() for name, value in run.state.meta.raw.items()}
    to_arviz(run, draws=3)
    to_arviz(run, TASKS, posterior=hand_draws())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.is_grad_enabled() and pyro.settings.get("validate_distributions_pyro")
    assert all(torch.equal(value, raw[name]) for name, value in run.state.meta.raw.items())
    pyro.clear_param_store()


def test_importing_it_does_not_import_arviz() -> None:
    code = "import sys, varmeta.export; sys.exit('arviz' in sys.modules or 'xarray' in sys.modules)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
