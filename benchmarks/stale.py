"""Stale resumes: what is kept of one run is taken up with something changed, or with nothing.

    python -m benchmarks.stale            # what becomes of each kind
    python -m benchmarks.stale --each     # and what is said

A stale one is `refused` where one sentence names what differs, that and nothing else, no step is
run and no file is touched. `read` is a finished run that other versions of PyTorch or Pyro may
read, with a warning. Anything else is a defect. Then the same arguments in a new process, which
must go on to the result of a run that nobody stopped, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from benchmarks import stale_models as models
from benchmarks.kills import same, short
from benchmarks.stale_models import DENSITIES, F64, around, data, heavy
from varmeta import (
    IMAML,
    Density,
    GaussianPrior,
    JointVariational,
    Modules,
    PyroSVI,
    Tasks,
    TaskSource,
    compare,
    comparison,
    fingerprint,
    fit,
)
from varmeta.inference.base import StepInfo
from varmeta.models import linear_modules, sinusoids
from varmeta.settings import STRATEGIES

UNFINISHED, FINISHED, RUN = KEPT = ("unfinished checkpoint", "finished checkpoint", "run.json")
FIT = KEPT[:2]  # of `fit` alone: `compare` has no such argument
JOINT = JointVariational(q="delta", steps=4, adapt_steps=2)
TASKS = data()
DENSITY = Density(around(0.5), TASKS)
Given = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One change.

    Attributes:
        change: arguments that are given anew.
        wanted: the only topics that a refusal may name.
        start: arguments of the run that was kept, where they are not `given()`.
        under: what is other around the call.
        kept: what can be stale in this way.
        reads: a finished run may be read all the same, with a warning.
    """

    change: Callable[[], Given]
    wanted: str
    start: Callable[[], Given] = dict
    under: Callable[[], AbstractContextManager[Any]] = nullcontext
    kept: tuple[str, ...] = KEPT
    reads: bool = False


def prior(**options: Any) -> GaussianPrior:
    return GaussianPrior.from_density(DENSITY, **options)


def moved(name: str, amount: float, where: int | None = None) -> Tasks:
    values = getattr(TASKS, name).clone()
    values[... if where is None else where] += amount
    return replace(TASKS, **{name: values})


def single() -> Given:
    tasks = TASKS.to(torch.float32)
    return {"tasks": tasks, "density": Density(around(0.5), tasks)}


@contextmanager
def double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stream(query: int = 2, seed: int = 0) -> Given:
    source = TaskSource(sinusoids(num_tasks=3, support=2, query=query, dtype=F64), seed=seed)
    return {"strategy": IMAML(steps=4), "tasks": source}


def stored(tasks: Tasks, twice: bool = False) -> Given:
    """A stream of what lies elsewhere, as in a file."""
    files = {"batch": tasks}
    once = lambda rng: files["batch"]  # noqa: E731
    other = lambda rng: files["batch"].to(None)  # noqa: E731
    return {"strategy": IMAML(steps=4), "tasks": TaskSource(other if twice else once)}


# Two guides, one `repr`.
GUIDES = (lambda m: AutoNormal(m, init_scale=0.1)), (lambda m: AutoNormal(m, init_scale=1.0))


def svi(guide: int = 0) -> Given:
    return {"strategy": PyroSVI(GUIDES[guide], steps=4, adapt_steps=2, draws=10)}


def version(name: str) -> Kind:
    there = fingerprint._VERSIONS[name]
    return Kind(
        dict,
        f"{name} ({there}, now 0.0.1)",
        under=lambda: mock.patch.dict(fingerprint._VERSIONS, {name: "0.0.1"}),
        reads=name in ("torch", "pyro"),
    )


def reads(name: str, value: Any, topic: str) -> Kind:
    """A global that a model reads; its fingerprint is taken when the density is made."""
    return Kind(
        lambda: {"density": Density(models.line, TASKS), "prior": prior()},
        topic,
        start=lambda: {"density": Density(models.line, TASKS), "prior": prior()},
        under=lambda: mock.patch.object(models, name, value),
    )


STALE: dict[str, Kind] = {
    "data + 100": Kind(lambda: {"tasks": moved("targets", 100.0)}, "the targets"),
    "one target by 1e-9": Kind(lambda: {"tasks": moved("targets", 1e-9, 2)}, "the targets"),
    "inputs": Kind(lambda: {"tasks": moved("inputs", 0.5)}, "the inputs"),
    "order of tasks": Kind(lambda: {"tasks": TASKS.select([2, 1, 0])}, "the order of the tasks"),
    "names of tasks": Kind(
        lambda: {"tasks": replace(TASKS, names=("beta", "alpha", "gamut"))},
        "the names of the tasks",
    ),
    "names of columns": Kind(
        lambda: {"tasks": replace(TASKS, input_names=("weight",))},
        "the names of inputs and target (dose, target, now weight, target)",
    ),
    "split": Kind(lambda: {"tasks": TASKS.split(0.3, seed=5)}, "the split"),
    "no split": Kind(lambda: {"tasks": TASKS.unsplit}, "the split (4 query rows, now none)"),
    "data in float32": Kind(
        single,
        "the inputs (float64, now float32), the targets (float64, now float32), the prior's "
        "location, the prior's scales, the hyperprior",
    ),
    "default dtype": Kind(
        dict, "torch's default dtype (float32, now float64)", under=double_by_default
    ),
    "prior's scales": Kind(
        lambda: {"prior": replace(prior(), log_scale=prior().log_scale + 1)},
        "the prior's scales",
    ),
    "prior's location": Kind(
        lambda: {"prior": replace(prior(), loc=prior().loc + 0.01)}, "the prior's location"
    ),
    "prior's bounds": Kind(lambda: {"prior": prior(bounds=(0.01, 10.0))}, "the prior's bounds"),
    "prior's rank": Kind(lambda: {"prior": prior(rank=1)}, "the prior's low-rank part"),
    "hyperprior": Kind(
        lambda: {"prior": prior(scale_law="half-cauchy")},
        "the hyperprior (half-normal scales, now half-cauchy scales)",
    ),
    "no hyperprior": Kind(
        lambda: {"prior": prior(hyperprior=False)},
        "the hyperprior (half-normal scales, now none)",
    ),
    "modules": Kind(
        lambda: {"prior": prior(scales=Modules(("other",), torch.zeros(1, dtype=torch.long)))},
        "the prior's modules",
    ),
    "likelihood": Kind(lambda: {"density": Density(heavy, TASKS)}, "the model's code"),
    "a constant of the model": Kind(
        lambda: {"density": Density(around(0.6), TASKS)}, "the model's noise"
    ),
    "a global that it reads": reads("SCALE", 3.0, "the model's mean_of"),
    "a function that it calls": reads(
        "mean_of", lambda theta, x: theta + x[..., 0], "the model's mean_of"
    ),
    "options that it reads": reads(
        "OPTIONS", {"tails": {"light"}, "laws": [dist.Normal]}, "the model's OPTIONS"
    ),
    "the model's prior": Kind(
        lambda: {"density": Density(around(0.5, prior=20.0), TASKS), "prior": prior()},
        "the model's prior, the latent 'theta' (Normal(0, 2) on Real, shape (), now Normal(0, 20) "
        "on Real, shape ())",
    ),
    "renamed site": Kind(
        lambda: {"density": Density(around(0.5, site="psi"), TASKS)},
        "the model's site, the latent 'psi' (new), the prior's modules, the latent 'theta' (gone)",
    ),
    "batch_size": Kind(lambda: {"batch_size": 2}, "batch_size (None, now 2)", kept=FIT),
    "seed": Kind(lambda: {"seed": 1}, "seed (0, now 1)"),
    "draws": Kind(lambda: {"draws": 11}, "draws (10, now 11)", kept=(RUN,)),
    "new tasks": Kind(
        lambda: {"new": data(4, shift=1.0).select([3])},
        "new: the targets",
        start=lambda: {"new": data(4).select([3])},
        kept=(RUN,),
    ),
    "shared latent": Kind(
        lambda: {"density": Density(models.noisy, TASKS)},
        "the latent 'noise' (new), the prior's location, the prior's scales, the prior's modules "
        "(1, now 2), the hyperprior, the shared latent 'noise' (gone)",
        start=lambda: {"density": Density(models.noisy, TASKS, shared=["noise"])},
    ),
    "setting": Kind(
        lambda: {"strategy": replace(JOINT, adapt_steps=3)},
        "the strategy (adapt_steps=2, now adapt_steps=3)",
    ),
    "SVI guide, with one repr": Kind(lambda: svi(1), "the strategy", start=svi),
    "stream's seed": Kind(
        lambda: stream(seed=1),
        "the stream's seed (0, now 1), the stream's first batches",
        start=stream,
        kept=FIT,
    ),
    "stream's setting": Kind(
        lambda: stream(query=3),
        "the stream's query, the stream's first batches",
        start=stream,
        kept=FIT,
    ),
    "stream's code": Kind(
        lambda: stored(TASKS, twice=True),
        "the stream's code",
        start=lambda: stored(TASKS),
        kept=FIT,
    ),
    "what a stream draws": Kind(
        lambda: stored(moved("targets", 1.0)),
        "the stream's files, the stream's first batches",
        start=lambda: stored(TASKS),
        kept=FIT,
    ),
    **{f"version of {name}": version(name) for name in fingerprint._VERSIONS},
}


def given(**change: Any) -> Given:
    return {"strategy": JOINT, "density": DENSITY, "tasks": TASKS} | change


def ask(what: str, path: Path, arguments: Given, **more: Any) -> Any:
    """The call that begins a run, or takes up what is kept of it."""
    if what != RUN:
        return fit(**arguments, checkpoint=path, progress=False, **more)
    arguments = {"draws": 10} | arguments
    strategy, density, tasks = (arguments.pop(k) for k in ("strategy", "density", "tasks"))
    return compare({"it": strategy}, density, tasks, folder=path, progress=False, **arguments)


def stop(step: int, info: StepInfo) -> None:
    if step == 2:
        raise KeyboardInterrupt


def keep(what: str, path: Path, arguments: Given) -> None:
    """What is kept of a run: stopped after two of four steps, finished, or before its files."""
    if what == FINISHED:
        ask(what, path, arguments)
        return
    with suppress(KeyboardInterrupt):
        if what == UNFINISHED:
            ask(what, path, arguments, on_step=stop)
        else:
            with mock.patch.object(comparison, "_write", side_effect=KeyboardInterrupt):
                ask(what, path, arguments)


def content(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def outcome(kind: Kind, what: str, path: Path) -> tuple[str, str]:
    """What becomes of a stale resume, and what is said."""
    before = content(path)
    with warnings.catch_warnings(record=True) as warned, kind.under():
        warnings.simplefilter("always")
        try:
            ask(what, path, given(**kind.change()))
        except (ValueError, FileExistsError) as error:
            said = str(error).replace(str(path), "runs/mine" if what == RUN else "run.pt")
        else:
            told = [str(w.message) for w in warned if "under other versions" in str(w.message)]
            return ("read", told[0]) if told else ("taken up", "")
    if content(path) != before:
        return "file touched", said
    found = re.search(r"differs in (.*?)(\. Give the same arguments|; repeat them)", said)
    if found is None:
        return "error", said
    topics = found[1].replace("train: ", "").replace("the strategy 'it'", "the strategy")
    return ("refused" if topics == kind.wanted else "vague"), said


def wanted(kind: Kind, what: str) -> str:
    if what not in kind.kept:
        return "–"
    return "read" if kind.reads and what == FINISHED else "refused"


class Shelf:
    """What is kept of each start, made once and copied for each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[tuple[Any, str], Path]()

    def copy(self, kind: Kind, what: str, path: Path) -> Path:
        key = (kind.start, what)
        if key not in self._made:
            self._made[key] = kept = self._folder / f"{len(self._made)}"
            keep(what, kept, given(**kind.start()))
        if self._made[key].is_dir():
            shutil.copytree(self._made[key], path)
        else:
            shutil.copy(self._made[key], path)
        return path


def table() -> pd.DataFrame:
    """The outcome of every kind `[kind, kept]`, whether it is as `wanted`, and what was said."""
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        shelf = Shelf(Path(place))
        for name, kind in STALE.items():
            found: dict[str, Any] = dict.fromkeys(KEPT, "–")
            said = ""
            for what in kind.kept:
                path = shelf.copy(kind, what, Path(place) / f"{name} {what}")
                found[what], said = outcome(kind, what, path)
            found["wanted"] = all(found[what] == wanted(kind, what) for what in KEPT)
            rows[name] = found | {"said": said}
    return pd.DataFrame.from_dict(rows, orient="index")


# -- no run is refused that is the same ------------------------------------------------------------


def runs() -> dict[str, Callable[[], Given]]:
    """Models of every kind, every strategy of the command line, streams, a guide."""

    def of(make: Callable[[], tuple[Density, Tasks]]) -> Callable[[], Given]:
        return lambda: dict(zip(("density", "tasks"), make(), strict=True))

    planted = TaskSource(linear_modules(3), seed=1)
    inputs = {"density": Density(linear_modules(3).model, planted.batch(0)), "tasks": planted}
    return {
        **{f"model: {name}": of(make) for name, make in DENSITIES.items()},
        **{f"strategy: {n}": lambda n=n: {"strategy": short(n)} for n in STRATEGIES},
        "stream: sinusoids": stream,
        "stream: planted": lambda: {"strategy": IMAML(steps=4)} | inputs,
        "guide": svi,
    }


def take_up(folder: Path) -> None:
    """Go on with the runs whose checkpoints are there; what became of each is kept beside them."""
    found: dict[str, Any] = {}
    for number, (name, make) in enumerate(runs().items()):
        path = folder / f"{number}.pt"
        if path.exists():
            try:
                found[name] = state(ask(FINISHED, path, given(**make())))
            except ValueError as error:
                found[name] = str(error)
    torch.save(found, folder / "found.pt")


def state(done: Any) -> dict[str, Any]:
    return {"state": done.state.state_dict(), "losses": done.history["loss"].tolist()}


def again(folder: Path, command: list[str], *names: str) -> dict[str, str]:
    """What becomes of runs that are stopped here and taken up by a new process, by name."""
    alone = {}
    for number, (name, make) in enumerate(runs().items()):
        if not names or name in names:
            alone[name] = state(fit(**given(**make()), progress=False))
            steps = len(alone[name]["losses"])

            def at_half(step: int, info: StepInfo, half: int = max(steps // 2, 1)) -> None:
                if step == half:
                    raise KeyboardInterrupt

            with suppress(KeyboardInterrupt):
                ask(UNFINISHED, folder / f"{number}.pt", given(**make()), on_step=at_half)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, str(folder)], env={**os.environ, **environment}, check=True)
    found = torch.load(folder / "found.pt", weights_only=True)
    return {
        name: "goes on" if same(found[name], whole) else "refused, or another result"
        for name, whole in alone.items()
    }


def new_process() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as place:
        return again(Path(place), [sys.executable, "-m", "benchmarks.stale", "--again"])


def main() -> bool:
    """Print what was found; whether all of it is as it should be."""
    found = table()
    print(found.drop(columns="said").to_string())
    if "--each" in sys.argv:
        for name, said in found["said"].items():
            print(f"\n{name}\n    {said}")
    resumed = new_process()
    bad = {name: end for name, end in resumed.items() if end != "goes on"}
    print(
        f"\nThe same arguments in a new process: {len(resumed) - len(bad)} of {len(resumed)} go on"
    )
    for name, end in bad.items():
        print(f"{name}: {end}")
    return bool(found["wanted"].all()) and not bad


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "--again" in sys.argv:
        take_up(Path(sys.argv[-1]))
    else:
        sys.exit(not main())
