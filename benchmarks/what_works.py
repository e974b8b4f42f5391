"""What works, by running it: every law of Pyro, and the layers of PyTorch in a network.

python -m benchmarks.what_works              # writes docs/what-works.md, some six minutes
python -m benchmarks.what_works Stable GRU   # tries these anew
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from benchmarks import network_layers
from benchmarks.observed_laws import LAWS, NOT_ROWS, model, tasks
from varmeta import IMAML, Density, LaplaceEvidence, fit, to_arviz
from varmeta.seeds import generator

PAGE = Path(__file__).parent.parent / "docs" / "what-works.md"
STEPS = ("fit", "score", "predict", "export")
_HEAD = """# What works

Made by `python -m benchmarks.what_works`, which runs it. Each law of `pyro.distributions` is that
of the rows of three small tasks. `LaplaceEvidence` and `IMAML` are fitted to them, rows scored and
predicted, and the fit is exported to ArviZ.

`tasks` says how the tasks are run: *together*, by `torch.vmap`; *together, law apart*, where the
law writes in place or looks at values and is asked for its density outside of `vmap`, for all tasks
at once; or *one by one*, a loop over tasks, which is said in the log. Draws are made for all tasks
at once, save in a loop.

"""


def try_law(name: str) -> list[str]:
    """How its tasks are run, and of each step ✓, or why it fails."""
    data, how = tasks(name), "–"

    def fitted() -> None:
        nonlocal how, results
        density = Density(model(name), data)
        how = density._how.replace("apart", "together, law apart")
        results = [fit(s(steps=1), density, data, progress=False) for s in (LaplaceEvidence, IMAML)]

    results: list = []
    calls: dict[str, Callable[[], object]] = {
        "fit": fitted,
        "score": lambda: [_score(r.posterior(), data) for r in results],
        "predict": lambda: [r.posterior().predict(data, 2, generator(0)) for r in results],
        "export": lambda: [to_arviz(r, draws=2) for r in results],
    }
    found = []
    for call in calls.values():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            found.append("✓")
        except Exception as error:
            found.append(str(error).split(";")[0].splitlines()[0])
    return [how, *found]


def _score(posterior: object, data: object) -> None:
    nats = posterior.log_predictive(data, 3, generator(0))  # type: ignore[attr-defined]
    if not bool(nats.isfinite().all()):
        raise FloatingPointError("the log density of a row is not finite")


_LAYERS = """
## Network layers

Each layer of `torch.nn` is in a small network of `varmeta.models.network`, with 5 tasks of 10 rows,
series of 5 steps or images of 6 × 6. `error` is the largest difference to the plain module, one
task at a time, in nats a row (float32). The times are those of a gradient and a product with the
Hessian for all tasks, in milliseconds of one processor core: as written, and after 20 calls, when
their operations have been recorded, or why they are not. *off*, *train*, *frozen* and *task* are
the choices of `network(..., dropout=..., batch_norm=...)`.

"""


def rows_of(page: str, cells: int = len(STEPS) + 1) -> dict[str, list[str]]:
    """A table of the page, with so many cells behind the name: these by name."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in split if len(rest) == cells}


def table(
    head: str,
    columns: Sequence[str],
    every: Iterable[str],
    anew: Collection[str],
    attempt: Callable[[str], list[str]],
) -> list[str]:
    """The lines of a table; what is not to be tried `anew` is as on the page."""
    old = rows_of(PAGE.read_text(), len(columns))
    lines = [f"| {head} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in every:
        if name in anew:
            old[name] = attempt(name)
            print(name, *old[name], flush=True)
        lines.append(f"| `{name}` | {' | '.join(old[name])} |")
    return lines


def main(names: list[str]) -> None:
    """Write the page, with these laws and layers or all of them tried anew."""
    logging.getLogger("varmeta").setLevel(logging.ERROR)
    every, layers = list(LAWS), list(network_layers.LAYERS)
    anew = names or [*every, *layers]
    lines = table("law", ["tasks", *STEPS], every, anew, try_law)
    lines += ["", "Not laws of rows:", "", "| class | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in NOT_ROWS.items()]
    found = table("layer", network_layers.COLUMNS, layers, anew, network_layers.try_layer)
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n" + _LAYERS + "\n".join(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
