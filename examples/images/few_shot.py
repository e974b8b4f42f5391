"""Few-shot tasks of small images: Omniglot's characters, or the digits of scikit-learn.

Two kinds of tasks with five classes each: any characters in any order, and always the same
characters in an ink that only the labels tell. For examples/which_layers.py.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

import varmeta as vm

WAYS, SHOTS, QUERIES = 5, 5, 5
SIDE = 16  # pixels


@dataclass(frozen=True, eq=False)
class Images:
    """Classes of images `[C, M, SIDE, SIDE]`, for training and for new tasks.

    Attributes:
        train: classes to learn from.
        new: other classes.
        common: five of the training classes, by training drawers (or half of the images).
        common_new: the same five by other drawers.
        train_names: of the classes.
        new_names: of the classes.
    """

    train: Tensor
    new: Tensor
    common: Tensor
    common_new: Tensor
    train_names: list[str]
    new_names: list[str]


def read_characters(path: Path) -> dict[str, Tensor]:
    """Of an Omniglot archive: "alphabet/character" to `[20, SIDE, SIDE]`, ink 1 on 0, by drawer."""
    found: dict[str, list[Tensor]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            with Image.open(io.BytesIO(archive.read(name))) as image:
                small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
            _, alphabet, character, _ = name.split("/")
            pixels = 1 - torch.from_numpy(np.array(small)).float() / 255
            found.setdefault(f"{alphabet}/{character}", []).append(pixels)
    return {name: torch.stack(images) for name, images in found.items()}


def omniglot(folder: Path) -> Images:
    """Train on all alphabets of the first minimal split; new are those that only the second has."""
    first = read_characters(folder / "images_background_small1.zip")
    known = {name.split("/")[0] for name in first}
    second = read_characters(folder / "images_background_small2.zip")
    other = {k: v for k, v in second.items() if k.split("/")[0] not in known}
    one_each = [next(k for k in first if k.startswith(f"{a}/")) for a in sorted(known)]
    common = torch.stack([first[k] for k in one_each])
    return images(first, other, common)


def digits() -> Images:
    """scikit-learn's digits: 0 to 6 to learn from, 7 to 9 new, in four rotations each."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise typer.BadParameter(
            "no --omniglot FOLDER, and the digits need scikit-learn: pip install scikit-learn"
        ) from None
    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 16
    pixels = pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)
    kinds = {str(k): pixels[torch.from_numpy(data.target == k)][:174] for k in range(10)}
    seen, other = ({k: v for k, v in kinds.items() if (k < "7") == old} for old in (True, False))
    return images(seen, other, torch.stack([kinds[str(k)] for k in range(WAYS)]))


def images(seen: dict[str, Tensor], other: dict[str, Tensor], common: Tensor) -> Images:
    """Every rotation by 90° is a class of its own; pixels in units of their standard deviation."""
    unit = torch.stack(list(seen.values())).std()
    train, new = (
        torch.cat([torch.rot90(torch.stack(list(part.values())), k, (-2, -1)) for k in range(4)])
        for part in (seen, other)
    )
    half = common.shape[1] // 2
    names = ([f"{n} {90 * k}°" for k in range(4) for n in part] for part in (seen, other))
    return Images(
        train / unit, new / unit, common[:, :half] / unit, common[:, half:] / unit, *names
    )


# -- tasks -----------------------------------------------------------------------------------------


def draw_images(classes: Tensor, tasks: int, fixed: bool, source: torch.Generator) -> Tensor:
    """`[T, WAYS, SHOTS + QUERIES, SIDE, SIDE]`: random classes in random order, or the classes."""
    count, each = classes.shape[:2]
    chosen = torch.arange(count).expand(tasks, -1)
    if not fixed:
        chosen = torch.rand(tasks, count, generator=source).argsort(-1)[:, :WAYS]
    which = torch.rand(tasks, WAYS, each, generator=source).argsort(-1)[..., : SHOTS + QUERIES]
    return shifted(classes[chosen[..., None], which], source)


def shifted(pictures: Tensor, source: torch.Generator) -> Tensor:
    """By −1, 0 or 1 pixel in each direction, at random."""
    shape = pictures.shape[:-2]
    move = torch.randint(-1, 2, (2, *shape, 1, 1), generator=source)
    at = torch.arange(SIDE)
    rows, columns = ((at[:, None] + move[0]) % SIDE), ((at + move[1]) % SIDE)
    flat = (rows * SIDE + columns).flatten(-2)
    return pictures.flatten(-2).gather(-1, flat).reshape(pictures.shape)


def as_tasks(pictures: Tensor) -> vm.Tasks:
    """From `[T, WAYS, SHOTS + QUERIES, channels, SIDE, SIDE]`: SHOTS of each class as support."""
    count, rows = len(pictures), WAYS * (SHOTS + QUERIES)
    y = torch.arange(WAYS)[:, None].expand(WAYS, SHOTS + QUERIES).reshape(rows).expand(count, rows)
    is_query = (torch.arange(SHOTS + QUERIES) >= SHOTS).repeat(WAYS).expand(count, rows)
    names = tuple(str(k) for k in range(count))
    mask = torch.ones(count, rows, dtype=torch.bool)
    return vm.Tasks(pictures.flatten(1, 2), y, mask, is_query, names)


def characters(data: Images, tasks: int, new: bool) -> Callable[[torch.Generator], vm.Tasks]:
    """Five random classes in random order; new: of classes not in training."""

    def draw(source: torch.Generator) -> vm.Tasks:
        pictures = draw_images(data.new if new else data.train, tasks, False, source)
        return as_tasks(pictures[:, :, :, None])

    return draw


def ink(data: Images, tasks: int, new: bool) -> Callable[[torch.Generator], vm.Tasks]:
    """The common classes, each image with another of them over it in a second ink.

    An ink is a direction in the plane of two colour channels, uniform on the circle, and the other
    ink is at right angles to it, on either side: were it always on the same, an image by itself
    would say which of its two inks counts. New: other inks, and other drawers.
    """

    def draw(source: torch.Generator) -> vm.Tasks:
        classes = data.common_new if new else data.common
        glyph = draw_images(classes, tasks, True, source)
        count, each = classes.shape[:2]
        shape = glyph.shape[:3]
        other = classes[
            torch.randint(count, shape, generator=source),
            torch.randint(each, shape, generator=source),
        ]
        other = shifted(other, source)
        angle = 2 * torch.pi * torch.rand(tasks, 1, 1, 1, 1, generator=source)
        sign = 2.0 * torch.randint(2, angle.shape, generator=source) - 1
        red = angle.cos() * glyph - sign * angle.sin() * other
        blue = angle.sin() * glyph + sign * angle.cos() * other
        return as_tasks(torch.stack([red, blue], 3))

    return draw


KINDS = {"characters": characters, "ink": ink}
