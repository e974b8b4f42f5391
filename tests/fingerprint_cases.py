"""Fingerprints of everything, which must be the same in every process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from catalogue import CATALOGUE

from benchmarks import stale
from benchmarks.stale import JOINT
from benchmarks.stale_models import DENSITIES, around, data
from varmeta import Density, GaussianPrior, TaskSource
from varmeta.digest import digest
from varmeta.fingerprint import fingerprint
from varmeta.models import linear_modules, sinusoids


def of(
    density: Density, tasks: Any = None, strategy: Any = JOINT, **options: Any
) -> dict[str, str]:
    """The fingerprint of a run with the defaults of `fit`, save `options`."""
    prior = options.pop("prior", None) or GaussianPrior.from_density(density)
    given = {"batch_size": None, "seed": 0, **options}
    return fingerprint({"": strategy}, density, {"": tasks or data()}, prior, **given)


def everything() -> dict[str, Any]:
    """All fingerprints: of each model, of each strategy, and of two streams."""
    found: dict[str, Any] = {name: of(*make()) for name, make in DENSITIES.items()}
    base = Density(around(0.5), data())
    found |= {f"strategy {n}": of(base, strategy=e.strategy) for n, e in CATALOGUE.items()}
    for name, draw in (
        ("planted", linear_modules(3)),
        ("sinusoids", sinusoids(num_tasks=3, support=2, query=2)),
    ):
        found[f"stream {name}"] = of(base, TaskSource(draw, seed=1))
    found["a set of texts"] = digest({"a", "b", "c", ("d", 1)}, frozenset({"x", "y"}))
    return found


if __name__ == "__main__":  # a new process, which goes on with the runs that are in a folder
    folder = Path(sys.argv[1])
    stale.take_up(folder)
    (folder / "everything.json").write_text(json.dumps(everything()))
