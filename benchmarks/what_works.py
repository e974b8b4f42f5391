"""What works, by running it: every law of Pyro fitted, scored, predicted and exported.

python -m benchmarks.what_works              # writes docs/what-works.md, some five minutes
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

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


def rows_of(page: str) -> dict[str, list[str]]:
    """The page's table: by law, its other cells."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells if len(rest) == len(STEPS) + 1}


def main(names: list[str]) -> None:
    """Write the page, with these laws or all of them tried anew."""
    logging.getLogger("varmeta").setLevel(logging.ERROR)
    rows = rows_of(PAGE.read_text()) if names else {}
    lines = [f"| law | tasks | {' | '.join(STEPS)} |", "|---|---|" + "---|" * len(STEPS)]
    for name in LAWS:
        if not names or name in names:
            rows[name] = try_law(name)
            print(name, *rows[name], flush=True)
        lines.append(f"| `{name}` | {' | '.join(rows[name])} |")
    lines += ["", "Not laws of rows:", "", "| class | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in NOT_ROWS.items()]
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
