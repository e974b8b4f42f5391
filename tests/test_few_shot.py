"""The images of examples/which_layers.py: who is seen in training, and what a task holds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from varmeta.seeds import generator

few = runpy.run_path(
    str(Path(__file__).parent.parent / "examples" / "images" / "few_shot.py"), run_name="few_shot"
)
DIGITS = few["digits"]()
KINDS = few["KINDS"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [False, True])
def test_tasks_have_five_classes_of_five_and_five(kind: str, new: bool) -> None:
    draw = KINDS[kind](DIGITS, 3, new)
    tasks = draw(generator(0))
    channels = {"characters": 1, "ink": 2}[kind]
    assert tasks.inputs.shape == (3, 50, channels, 16, 16)
    for part in (tasks.support, tasks.query):
        for targets, mask in zip(part.targets, part.mask, strict=True):
            assert targets[mask].bincount().tolist() == [5] * 5
    assert torch.equal(tasks.inputs, draw(generator(0)).inputs)
    assert not torch.equal(tasks.inputs, draw(generator(1)).inputs)


def test_new_classes_are_none_of_training() -> None:
    named = DIGITS.train_names, DIGITS.new_names
    digit = [{name.split()[0] for name in names} for names in named]
    assert digit == [set("0123456"), set("789")]
    assert len(DIGITS.train) == 7 * 4
    assert len(DIGITS.new) == 3 * 4
    seen = {tuple(image.flatten().tolist()) for image in DIGITS.common.flatten(0, 1)}
    assert not any(
        tuple(image.flatten().tolist()) in seen for image in DIGITS.common_new.flatten(0, 1)
    )


def test_no_ink_is_preferred() -> None:
    """Channels are exchangeable and have no preferred sign: correlation over images is 0.

    400 angles: 0.18 is five standard errors, a false alarm in a million.
    """
    image = KINDS["ink"](DIGITS, 400, False)(generator(3)).inputs.double()
    red, blue = image[:, :, 0].flatten(1), image[:, :, 1].flatten(1)
    total = (red**2 + blue**2).sum(1)
    assert abs(float(((red**2 - blue**2).sum(1) / total).mean())) < 0.18
    assert abs(float((2 * (red * blue).sum(1) / total).mean())) < 0.18
