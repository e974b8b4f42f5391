"""Something that is no strategy, density or tasks is refused in one sentence with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
from torch import Tensor

import varmeta as vm


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + 0 * x[..., 0], 1.0), obs=y)


FRAME = pd.DataFrame({"g": [1, 1, 2, 2], "x": [0.0, 1.0, 0.0, 1.0], "y": [1.0, 2.0, 3.0, 4.0]})
TASKS = vm.Tasks.from_frame(FRAME, task="g", inputs=["x"], target="y")
DENSITY = vm.Density(counts, TASKS)
ONE = vm.NoPooling()

WRONG: dict[str, tuple[Callable[[], Any], str, str]] = {
    "fit: a class": (lambda: vm.fit(vm.NoPooling, DENSITY, TASKS), "strategy", "NoPooling()"),
    "fit: a name": (lambda: vm.fit("joint", DENSITY, TASKS), "strategy", "vm.JointVariational()"),
    "fit: a model": (lambda: vm.fit(ONE, counts, TASKS), "density", "vm.Density(model, tasks)"),
    "fit: a frame": (lambda: vm.fit(ONE, DENSITY, FRAME), "tasks", "from_frame"),
    "density: a frame": (lambda: vm.Density(counts, FRAME), "tasks", "from_frame"),
    "adapt: a list": (lambda: vm.fit(ONE, DENSITY, TASKS).adapt([1, 2]), "tasks", "from_frame"),
    "compare: one": (lambda: vm.compare(ONE, DENSITY, TASKS), "strategies", "give a list"),
    "compare: a class": (lambda: vm.compare([vm.NoPooling], DENSITY, TASKS), "strategies", "()"),
    "compare: names": (lambda: vm.compare(["joint"], DENSITY, TASKS), "strategies", "give a list"),
    "compare: a model": (lambda: vm.compare([ONE], counts, TASKS), "density", "vm.Density"),
    "compare: a frame": (lambda: vm.compare([ONE], DENSITY, FRAME), "train", "from_frame"),
    "compare: new": (lambda: vm.compare([ONE], DENSITY, TASKS, FRAME), "new", "from_frame"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kind_is_named_with_its_remedy(case: str) -> None:
    call, argument, remedy = WRONG[case]
    with pytest.raises(TypeError) as caught:
        call()
    said = str(caught.value)
    assert argument in said.split(" must be ")[0] and remedy in said and "\n" not in said
