"""Fits of two strategies at once in two threads of one process: `python -m benchmarks.threads`.

A pair passes if both results are those of either fit alone, bit for bit: state, losses, posteriors
of new tasks and predictions. Meanwhile one more thread calls `torch.randn`, which must draw what it
draws undisturbed, and in the end the flags, stores and filters of warnings are as they were.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations_with_replacement
from threading import Barrier, Event, Thread
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from torch.distributions import Distribution

from benchmarks.kills import same, short
from benchmarks.stale_models import data, noisy
from varmeta import Density, Strategy, Tasks, fit
from varmeta.inference import nuts
from varmeta.seeds import generator
from varmeta.settings import STRATEGIES

RANDN, STATE = "torch.randn disturbed", "flags or stores left changed"
DRAWS = 2000


def flags() -> tuple[bool, ...]:
    """The switches of PyTorch's and Pyro's checks."""
    return (
        Distribution._validate_args,
        pyro.distributions.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(),
        poutine.util.is_validation_enabled(),
    )


def snapshot() -> dict[str, Any]:
    """What a process has once, of PyTorch, Pyro, NumPy and Python."""
    store = pyro.get_param_store()
    numpy_state: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[1].tolist(), numpy_state[2:]),
        "python": random.getstate(),
        "flags": flags(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "names": list(store._params),
        "tensors": {n: (id(p), p.requires_grad, p.tolist()) for n, p in store._params.items()},
        "links": {id(p): n for p, n in store._param_to_name.items()},
        "constraints": {n: str(c) for n, c in store._constraints.items()},
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
    }


def everything(strategy: Strategy, density: Density, tasks: Tasks, new: Tasks) -> dict[str, Any]:
    """A fit, tasks adapted to, and their predictions: all that comes out of them."""
    result = fit(strategy, density, tasks, progress=False)
    posterior = result.adapt(new.unsplit)
    return {
        "state": result.state.state_dict(),
        "losses": result.history["loss"].tolist(),
        "mean": posterior.mean,
        "sd": posterior.sd,
        "drawn": posterior.predict(new.unsplit, 5, generator(0)),
    }


def at_once(calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[str]]:
    """What the calls return (or raise), each in a thread, and what they have disturbed."""
    torch.manual_seed(3)
    wanted = [torch.randn(3) for _ in range(DRAWS)]
    torch.manual_seed(3)
    before, filters = snapshot(), list(warnings.filters)
    drawn: list[torch.Tensor] = []
    start, done = Barrier(len(calls)), Event()

    def draw() -> None:
        while not done.is_set() and len(drawn) < DRAWS:
            drawn.append(torch.randn(3))
            done.wait(1e-3)

    def together(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except Exception as error:
            return error

    other = Thread(target=draw)
    other.start()
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(together, calls))
    done.set()
    other.join()
    faults = [] if same(drawn, wanted[: len(drawn)]) else [RANDN]
    torch.manual_seed(3)
    if snapshot() != before or list(warnings.filters) != filters:
        faults.append(STATE)
    return found, faults


def table(names: Sequence[str]) -> pd.DataFrame:
    """One row per pair of strategies, one with itself too; every other pair shares its density."""
    tasks = data().support
    new = data().query

    def fresh() -> Density:
        return Density(noisy, data(), shared=["noise"])

    def alone(name: str, density: Density) -> Any:
        return everything(short(name), density, tasks, new)

    rows = []
    with mock.patch.object(nuts, "_QUICK_STEPS", 10), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {name: alone(name, fresh()) for name in names}
        for number, pair in enumerate(combinations_with_replacement(names, 2)):
            one = fresh()
            both = [one, one if number % 2 else fresh()]
            found, faults = at_once(
                [partial(alone, name, density) for name, density in zip(pair, both, strict=True)]
            )
            rows.append(
                {
                    "first": pair[0],
                    "second": pair[1],
                    "as alone": same(found, [wanted[name] for name in pair]),
                    "randn": RANDN not in faults,
                    "state": STATE not in faults,
                    "raised": "; ".join(repr(f) for f in found if isinstance(f, Exception)),
                }
            )
    return pd.DataFrame(rows)


def main() -> bool:
    """Print how many pairs pass, and those that do not; whether all do."""
    found = table(sys.argv[1:] or list(STRATEGIES))
    good = found[["as alone", "randn", "state"]]
    print(f"{len(found)} pairs")
    print(good.sum().to_string())
    if not good.all(axis=None):
        print(found[~good.all(axis=1)].to_string())
    return bool(good.all(axis=None))


if __name__ == "__main__":
    sys.exit(not main())
