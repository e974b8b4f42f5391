"""The pictures of a path show its numbers, where they are, and leave pyplot alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import FLOAT, assert_close
from ring_tasks import found, rings

from varmeta import GaussianPrior
from varmeta.inference.connectivity import mode_path
from varmeta.report_paths import plot_mode_path, plot_mode_plane


def line_of(ax: Any, gid: str) -> np.ndarray:
    """Every line of this name, `[lines, 2, points]`."""
    return np.array([line.get_data() for line in ax.lines if line.get_gid() == gid])


def test_the_picture_shows_both_losses_above_the_better_end() -> None:
    path = found()
    ax = plot_mode_path(path)
    above = path.path["energy"] - path.path["energy"][[0, -1]].amin(0)
    assert_close(line_of(ax, "each:path")[:, 1], above.T, 1e-12)
    assert_close(line_of(ax, "median:path")[0, 1], above.median(1).values * 0 + above.mean(1), 1e-9)
    one = plot_mode_path(path, "ring 1")
    straight = path.line["energy"][:, 1] - path.line["energy"][[0, -1], 1].min()
    assert_close(line_of(one, "each:line")[0], torch.stack([path.t, straight]), 1e-12)
    assert "ring 1" in one.figure.texts[0].get_text()
    assert one.get_ylim()[1] > float(straight.max())
    assert not plt.get_fignums()


def test_the_plane_holds_the_path_and_its_loss() -> None:
    """In prior sds: the ends at 0 and |b − a|, the bend above, and the path where it is in θ."""
    density, tasks, a, b = rings([1.0, 0.7])
    prior = GaussianPrior.create(torch.zeros(2, dtype=FLOAT), [0.5, 2.0])
    path = mode_path(density, prior, a, b, tasks, steps=40)
    ax = plot_mode_plane(path, "ring 1", resolution=15)
    scaled = (path.b - path.a)[1] / prior.scale
    (ends,), (curve,), (bend,) = (line_of(ax, gid) for gid in ("ends", "path", "bend"))
    assert_close(ends, [[0.0, float(scaled.norm())], [0.0, 0.0]], 1e-12)
    distances = ((path.point(path.t)[:, 1] - path.a[1]) / prior.scale).norm(dim=-1)
    assert_close(np.hypot(*curve), distances, 1e-9)
    assert bend[1, 0] > 0
    assert_close(np.hypot(*bend), ((path.bend - path.a)[1] / prior.scale).norm()[None], 1e-9)
    assert len(ax.figure.axes) == 2  # a colour bar
    ax.figure.canvas.draw()


def test_a_bend_on_the_line_makes_no_plane() -> None:
    path = found(steps=1)
    flat = replace(path, bend=(path.a + path.b) / 2)
    with pytest.raises(ValueError, match="task 'ring 0': the bend lies on the straight line"):
        plot_mode_plane(flat)
    with pytest.raises(ValueError, match="no task 'ring 7'; there are: ring 0, ring 1"):
        plot_mode_path(path, "ring 7")
    with pytest.raises(ValueError, match="task must lie between 0 and 1"):
        plot_mode_plane(path, 2)
    with pytest.raises(ValueError, match="resolution must be at least 2"):
        plot_mode_plane(path, resolution=1)
    with pytest.raises(ValueError, match="loss must be one of"):
        plot_mode_path(path, loss="query")


def test_pictures_leave_pyplot_alone() -> None:
    before = dict(matplotlib.rcParams)
    plot_mode_plane(found(), resolution=8)
    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()
