"""The cases of the fleet: a data set, its model, and how the two are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fleet import models
from varmeta.data import load
from varmeta.problems import Problem
from varmeta.tasks import Tasks

FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One data set with the obvious model of its kind.

    Attributes:
        name: also of its CSV file, of its model in `models.py` and of its reference.
        kind: of its likelihood.
        task: column that says which task a row belongs to.
        inputs: columns, in the order in which the model reads them.
        target: column.
        shared: latents with one value for all tasks.
        shipped: whether the data lie in `varmeta.data`.
    """

    name: str
    kind: str
    task: str
    inputs: tuple[str, ...]
    target: str
    shared: tuple[str, ...] = ()
    shipped: bool = False

    @property
    def model(self) -> Callable[..., Any]:
        """The Pyro model of one task; NumPyro's if its `ppl` is that."""
        found: Callable[..., Any] = getattr(models, self.name)
        return found

    def tasks(self) -> Tasks:
        """All tasks, in float64."""
        columns: Any = {"task": self.task, "inputs": self.inputs, "target": self.target}
        if self.shipped:
            return Tasks.from_frame(load(self.name), **columns)
        return Tasks.from_csv(FOLDER / f"{self.name}.csv", **columns)

    def problem(self, seed: int = 0) -> Problem:
        """30% of each task's rows and a sixth of the tasks held out, as `varmeta compare` does."""
        tasks = self.tasks()
        shared, hold_out = list(self.shared), len(tasks) // 6
        return Problem.make(self.model, tasks, shared=shared, hold_out=hold_out, seed=seed)


_ALL = (
    Case("radon", "normal", "county", ("floor", "log_uranium"), "log_radon",
         ("uranium", "noise"), shipped=True),
    Case("sleepstudy", "normal", "subject", ("days",), "reaction", ("noise",), shipped=True),
    Case("chickweight", "normal, own noise", "chick", ("days",), "weight"),
    Case("gcsemv", "normal", "school", ("written",), "course", ("noise",)),
    Case("mathachieve", "normal", "school", ("ses", "minority"), "score", ("minority", "noise")),
    Case("machines", "normal", "worker", ("a", "b", "c"), "score", ("noise",)),
    Case("egsingle", "normal", "child", ("grade",), "math", ("noise",)),
    Case("rail", "normal", "rail", (), "travel", ("noise",)),
    Case("cake", "normal", "batch", ("temperature",), "angle", ("noise",)),
    Case("grunfeld", "normal, own noise", "firm", ("value", "capital"), "investment"),
    Case("milk", "robust", "cow", ("week",), "protein", ("spread",)),
    Case("igf", "robust", "lot", ("age",), "conc", ("spread",)),
    Case("cane", "binomial", "variety", ("pieces", "shoots"), "ill", ("stems",)),
    Case("efron_morris", "binomial", "player", ("at_bats",), "hits"),
    Case("mmmec", "Poisson", "nation", ("expected", "uvb"), "deaths"),
    Case("warpbreaks", "Poisson", "loom", (), "breaks"),
    Case("grouseticks", "negative binomial", "location", ("height", "year_96", "year_97"),
         "ticks", ("height", "year_96", "year_97", "size")),
    Case("contraception", "Bernoulli", "district", ("urban", "age", "children"), "use",
         ("age", "children")),
    Case("guimmun", "Bernoulli", "community",
         ("two_or_older", "mother_primary", "rural", "indigenous"), "immunised",
         ("primary", "rural", "indigenous")),
    Case("verbagg", "Bernoulli", "person", ("do", "scold", "shout", "own"), "yes",
         ("scold", "shout", "own")),
    Case("soybean", "growth, log-normal", "plot", ("days",), "weight", ("noise",)),
    Case("orange", "growth", "tree", ("age",), "circumference", ("noise",)),
    Case("loblolly", "growth", "seed", ("age",), "height", ("noise",)),
    Case("indometh", "pharmacokinetics", "subject", ("hours",), "conc", ("noise",)),
    Case("cefamandole", "pharmacokinetics, log-normal", "subject", ("minutes",), "conc",
         ("noise",)),
    Case("tetracycline", "pharmacokinetics, log-normal", "course", ("hours",), "conc",
         ("noise",)),
    Case("earthquake", "Gamma", "quake", ("distance",), "accel", ("shape",)),
)  # fmt: skip
CASES: dict[str, Case] = {case.name: case for case in _ALL}

# Normal with an intercept, inputs of which the first D - 1 adapt, and a shared noise: what
# statsmodels has too. (The three levels of `machines` have one scale, which it does not.)
LINEAR = tuple(c.name for c in _ALL if c.kind == "normal" and c.name != "machines")
