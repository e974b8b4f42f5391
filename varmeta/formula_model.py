"""from_formula: a formula, a family and a table as a Pyro model that one can read and edit."""

from __future__ import annotations

import json
import keyword
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch

from varmeta.csv_files import read_csv
from varmeta.design import Design
from varmeta.families import FAMILIES, Family
from varmeta.formula import INTERCEPT, Formula
from varmeta.formula_design import of_formula
from varmeta.models.density import Density
from varmeta.raw_data import Missing, Table
from varmeta.tasks import Tasks

MODEL_FILE = "model.py"  # of a run's folder
# Names that stand for something else: in an export's dimensions, or in the model's source.
_TAKEN = {"chain", "draw", "module", "task", "row", "input", "task_of_row", "row_id"}
_LOCAL = {"x", "y", "eta", "mean", "cutpoints", "torch", "pyro", "dist"}
_WIDTH = 92


@dataclass(frozen=True)
class WrittenModel:
    """A Pyro model of one task that is run from its source, which it is kept and pickled as.

    Attributes:
        source: a Python file.
        name: of the function in it.
    """

    source: str
    name: str

    def __call__(self, x: Any, y: Any = None) -> Any:
        """Run the function."""
        return _function(self.source, self.name)(x, y)


@dataclass(frozen=True)
class FormulaModel:
    """What a formula stands for.

    Attributes:
        formula: its parts.
        family: the law's name.
        tasks: the table, coded; split if a column said so.
        varying: latents that vary by group: `density.sites`.
        shared: latents with one value for all groups.
        source: the Pyro model, a Python file.
        name: of the function in it.
    """

    formula: Formula
    family: str
    tasks: Tasks
    varying: tuple[str, ...]
    shared: tuple[str, ...]
    source: str
    name: str

    @property
    def model(self) -> WrittenModel:
        """The Pyro model of one task."""
        return WrittenModel(self.source, self.name)

    @cached_property
    def density(self) -> Density:
        """The model with its shared latents, for `fit` and `compare`."""
        return Density(self.model, self.tasks, shared=self.shared)


def from_formula(
    formula: str,
    data: pd.DataFrame | str | PathLike[str],
    *,
    family: str = "normal",
    query: str | None = None,
    missing: Missing = "error",
    dtype: torch.dtype = torch.float64,
) -> FormulaModel:
    """A model and its tasks from a formula in R's style.

    The terms in `(… | group)` vary by group: a task's own parameters, with a learned mean (lme4's
    fixed effect of the same term) and a learned standard deviation each, uncorrelated as with
    lme4's `||`. The other terms, and a law's own parameters, have one value for all groups. Terms,
    interactions and transforms (`center(x)`, `C(x)`, `poly(x, 2)`, `bs(x, df=5)`, `log(x)`) are
    those of the package formulaic. `offset(z)` adds z as it is; `y | trials(n)` or
    `cbind(successes, failures)` is for the binomial, `y | rate(t)` an exposure t of counts, and
    `y | weights(w)` counts a row's log density w times.

    The priors are weakly informative in the units of these data (`varmeta.families` says which);
    they are written in `source`.

    Args:
        formula: such as `"y ~ 1 + x + (1 + x | group)"`.
        data: a frame, or a CSV file.
        family: `"normal"`, `"student"`, `"bernoulli"`, `"binomial"`, `"poisson"`,
            `"negative-binomial"`, `"beta"`, `"ordinal"` (cumulative logit) or `"categorical"`
            (softmax, the first level as the reference).
        query: column of truths: which rows are query rows.
        missing: `"drop"` leaves out rows with a missing value, and says which in the log.
        dtype: of inputs and targets.

    Raises:
        ValueError: a formula or family that cannot be, a name that is no column, a value that the
            family cannot have; with the row.

    Example:
        >>> from varmeta.data import load
        >>> made = from_formula("reaction ~ days + (days | subject)", load("sleepstudy"))
        >>> made.varying, made.shared
        (('Intercept', 'days'), ('sigma',))
        >>> print(made.source.split("import ")[-1])  # doctest: +ELLIPSIS
        pyro.distributions as dist
        ...
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    law, parts = FAMILIES[family], Formula.read(formula)
    table = read_csv(data) if isinstance(data, (str, PathLike)) else Table.of(data)
    design, varying, rest = of_formula(
        table,
        parts,
        response="classes" if law.classes else "two" if family == "bernoulli" else "number",
        query=query or "",
        dtype=dtype,
        missing=missing,
    )
    rows = design.read(table, missing=missing)
    tasks = Tasks.from_rows(rows, design, table.first_line)
    beside = _beside(design)
    if ("trials" in beside) != (family == "binomial"):
        wanted = "needs the number of trials: write response | trials(n), or cbind(successes, "
        wanted += "failures)"
        raise ValueError(
            f"family {family!r} "
            + (wanted if family == "binomial" else "has no trials; the family binomial has")
        )
    if "rate" in parts.beside and law.link != "log":
        raise ValueError(f"family {family!r} has no rate(…); poisson and negative-binomial have")
    _check_response(tasks, family, law)
    writer = _Writer(parts, family, law, tasks, varying, rest, beside)
    return FormulaModel(
        parts, family, tasks, writer.own, writer.all_shared, writer.text(), writer.function
    )


@cache
def _function(source: str, name: str) -> Any:
    space: dict[str, Any] = {}
    exec(compile(source, "<formula>", "exec"), space)
    return space[name]


def _beside(design: Design) -> dict[str, int]:
    """Where the offset, the trials and the weights stand among the inputs."""
    found = {}
    for k, name in enumerate(design.inputs.names):
        for kind in ("offset", "trials", "weights"):
            if name.startswith(f"{kind}("):
                found[kind] = k
    return found


def _check_response(tasks: Tasks, family: str, law: Family) -> None:
    """What the law's support does not say, or says less plainly."""
    y = tasks.targets.double()
    column = getattr(tasks.design.target, "columns", (None,))[0] if tasks.design else None
    levels = () if column is None else column.levels
    least = {"ordinal": 3, "categorical": 2}.get(family, 0)
    if law.classes and len(levels) < least:
        raise ValueError(
            f"family {family!r} wants {least} levels or more, and {tasks.target_name!r} has "
            f"{len(levels)}: {', '.join(levels)}"
            + "; the family bernoulli is for two"
            * (len(levels) == 2)
        )
    bad = {
        "bernoulli": (y != 0) & (y != 1),
        "binomial": (y < 0) | (y % 1 != 0),
        "poisson": (y < 0) | (y % 1 != 0),
        "negative-binomial": (y < 0) | (y % 1 != 0),
        "beta": (y <= 0) | (y >= 1),
    }.get(family, torch.zeros_like(y, dtype=torch.bool))
    places = (bad & tasks.mask).nonzero()
    if len(places):
        task, row = places[0].tolist()
        raise ValueError(
            f"{tasks.place(task, row)}: {tasks.target_name!r} is {float(y[task, row]):g}, and the "
            f"family {family!r} wants {law.response} ({len(places)} such rows in all)"
        )


class _Writer:
    """Writes one model's source; numbers are those of the tasks' rows."""

    def __init__(
        self,
        parts: Formula,
        family: str,
        law: Family,
        tasks: Tasks,
        varying: Sequence[str],
        rest: Sequence[str],
        beside: dict[str, int],
    ) -> None:
        self.parts, self.family, self.law, self.tasks, self.beside = (
            parts, family, law, tasks, beside,
        )  # fmt: skip
        assert tasks.design is not None
        self.names = tasks.design.inputs.names
        self.x = tasks.inputs[tasks.mask].double().numpy()
        self.y = tasks.targets[tasks.mask].double().numpy()
        column = getattr(tasks.design.target, "columns", (None,))[0]
        self.classes = len(column.levels) if column is not None and law.classes else 0
        self.group = ":".join(parts.group)
        self.function = _identifier(self.group, set())
        sites = {tasks.target_name, *_TAKEN}
        locals_ = {*_LOCAL, self.function, *dict(law.extra)}  # which the law reads by their names
        self.terms: list[tuple[str, str, str]] = []  # of each: the column, its site, its variable
        for name in (*varying, *rest):
            site = _free(name, sites)
            variable = _identifier("intercept" if name == INTERCEPT else name, locals_)
            self.terms.append((name, site, variable))
        self.own = tuple(site for _, site, _ in self.terms[: len(varying)])
        self.extra = [(_free(name, sites), name, prior) for name, prior in law.extra]
        shared = [site for _, site, _ in self.terms[len(varying) :]]
        self.all_shared = (*shared, *(site for site, _, _ in self.extra))

    def text(self) -> str:
        """The file."""
        head = ["import pyro", "import pyro.distributions as dist"]
        if "torch." in self.law.law + self.law.before:
            head.append("import torch")
        lines = [
            self._docstring(),
            "",
            *head,
            "",
            "",
            f"def {self.function}(x, y=None):",
            f"    # What varies by {self.group}, around a mean that is learned.",
            *(self._sample(*term) for term in self.terms[: len(self.own)]),
        ]
        if self.all_shared:
            lines += [
                f"    # One value for every {self.group}.",
                *(self._sample(*term) for term in self.terms[len(self.own) :]),
                *(
                    f"    {name} = pyro.sample({_quoted(site)}, {self._filled(prior)})"
                    for site, name, prior in self.extra
                ),
            ]
        lines += self._predictor()
        if self.law.before:
            lines.append(f"    {self._filled(self.law.before)}")
        scaled = ""
        if "weights" in self.beside:
            scaled = f", pyro.poutine.scale(scale={self._column(self.beside['weights'])})"
        lines += [
            f'    with pyro.plate("rows", x.shape[-2]){scaled}:',
            f"        law = {self._filled(self.law.law)}",
            f"        return pyro.sample({_quoted(self.tasks.target_name)}, law, obs=y)",
        ]
        return "\n".join(lines) + "\n"

    def _docstring(self) -> str:
        shared = f" \\\n        --shared {_argument(','.join(self.all_shared))}" * bool(
            self.all_shared
        )
        columns = [f"    x[..., {k}]  {name}" for k, name in enumerate(self.names)]
        text = [
            f"{self.parts.text}, {self.family}.",
            "",
            "The formula writes the inputs of this model of one task; run it, once edited, with",
            "",
            f"    varmeta compare FILE.py:{self.function} --data DATA.csv \\",
            f"        --inputs {_argument(self.parts.text)}"
            + " --integers target" * self.law.classes
            + shared,
            "",
            "Priors are weakly informative in the units of the data. Of what varies, they say",
            "where the learned mean and standard deviation start; nothing is correlated a priori.",
        ]
        if columns:
            text += ["", *columns]
        safe = "\n".join(text).replace("\\", "\\\\").replace('"""', "'''")
        return 'r"""' + safe.replace("\\\\", "\\") + '\n"""'

    def _sample(self, name: str, site: str, variable: str) -> str:
        loc, scale = self._prior(name)
        shape = f".expand([{self.classes - 1}]).to_event(1)" * (self.law.link == "classes")
        law = f"dist.Normal({_number(loc)}, {_number(scale)}){shape}"
        return f"    {variable} = pyro.sample({_quoted(site)}, {law})"

    def _prior(self, name: str) -> tuple[float, float]:
        """Location and standard deviation; see `varmeta.families`."""
        if name != INTERCEPT:
            return 0.0, self._coefficient(self.x[:, self.names.index(name)])
        terms = [self.x[:, self.names.index(n)] for n, _, _ in self.terms if n != INTERCEPT]
        moved = [self._coefficient(column) * float(column.mean()) for column in terms]
        return self._middle(), math.hypot(2.5 * self._spread(), *moved)

    def _coefficient(self, column: np.ndarray) -> float:
        width = float(column.std())
        level = float(np.abs(column).max())
        return 2.5 * self._spread() / (width if width > 1e-9 * level else level)

    def _spread(self) -> float:
        if self.law.link != "identity":
            return 1.0
        return float(self.y.std()) or 1.0

    def _middle(self) -> float:
        """The linear predictor of the mean response, less the mean offset."""
        offset = float(self.x[:, self.beside["offset"]].mean()) if "offset" in self.beside else 0.0
        mean = float(self.y.mean())
        if self.law.link == "log":
            return (math.log(mean) if mean > 0 else 0.0) - offset
        if self.law.link == "classes":
            return 0.0
        if self.law.link == "identity":
            return mean - offset
        if "trials" in self.beside:
            mean = float(self.y.sum() / max(self.x[:, self.beside["trials"]].sum(), 1.0))
        if self.family == "ordinal":
            mean = float((self.y > 0).mean())
        edge = 0.5 / len(self.y)
        mean = min(max(mean, edge), 1 - edge)
        return math.log(mean / (1 - mean)) - offset

    def _predictor(self) -> list[str]:
        across = ", None" * (self.law.link == "classes")
        parts = []
        for name, _, variable in self.terms:
            where = "" if name == INTERCEPT else f" * x[..., {self.names.index(name)}{across}]"
            parts.append(variable + where)
        if "offset" in self.beside:
            parts.append(f"x[..., {self.beside['offset']}{across}]")
        line = "    eta = " + " + ".join(parts)
        if len(line) <= _WIDTH:
            return [line]
        return [
            "    eta = (",
            *(f"        {'+ ' * (k > 0)}{p}" for k, p in enumerate(parts)),
            "    )",
        ]

    def _filled(self, text: str) -> str:
        return text.format(
            eta="eta",
            rate=_number(1 / self._spread()),
            gaps=self.classes - 2,
            trials=self._column(self.beside.get("trials", 0)),
        )

    @staticmethod
    def _column(k: int) -> str:
        return f"x[..., {k}]"


def _number(value: float) -> str:
    """Three digits that count."""
    return repr(float(f"{value:.3g}"))


def _argument(text: str) -> str:
    """For a shell."""
    return shlex.quote(text) if re.search(r'["$`\\\\!]', text) else f'"{text}"'


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _free(name: str, taken: set[str]) -> str:
    """The name, with signs below it until no other has it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _identifier(name: str, taken: set[str]) -> str:
    """A name that Python takes for a variable."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "term"
    if plain[0].isdigit() or keyword.iskeyword(plain):
        plain = f"{plain}_" if keyword.iskeyword(plain) else f"_{plain}"
    return _free(plain, taken)
