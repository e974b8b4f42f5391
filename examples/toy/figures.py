"""The pictures of the anchor's story for a toy task of your own.

Every picture is a function of a task: `Toy` with other numbers, or any object with the methods
`value`, `slope` and `curvature`, and `limits`. Every number of the algorithm is a keyword. The
story itself is told in docs/the-story.md; `varmeta figures` draws it for the default task.

    python examples/toy/figures.py --folder figures/mine
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varmeta.figures import Toy, mechanisms, minimum, moving_anchor, save, stochastic_objective

# A flat bowl with two waves: wide wells, one of them twice.
TASK = Toy(bowl=0.25, centre=-0.4, heights=(0.5, 0.12), frequencies=(2.4, 5.1), crests=(0.6, 0.1))


def main(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("figures/mine"),
    precision: Annotated[float, typer.Option(help="λ, of the penalty ½ λ (θ − θ0)².")] = 1.0,
    temperature: Annotated[float, typer.Option(help="τ of the random algorithm, in nats.")] = 0.2,
    run_length: Annotated[int, typer.Option(help="Its steps.")] = 60,
    points: Annotated[int, typer.Option(help="How many anchors are drawn.")] = 121,
    frames: Annotated[int, typer.Option(help="Of the film.")] = 60,
) -> None:
    algorithm = {"precision": precision, "run_length": run_length, "points": points}
    pictures = {
        "moving_anchor": moving_anchor(TASK, precision=precision, frames=frames),
        "minimum": minimum(TASK, precision=precision),
        "stochastic_objective": stochastic_objective(
            TASK, temperatures=(temperature / 2, temperature, 2 * temperature), **algorithm
        ),
        "mechanisms": mechanisms(TASK, temperature=temperature, **algorithm),
    }
    for name, picture in pictures.items():
        print("wrote", save(picture, folder, name))


if __name__ == "__main__":
    typer.run(main)
