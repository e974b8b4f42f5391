"""What the command line says of a user's own problem: a formula, or a model file, and a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from varmeta.csv_files import read_csv
from varmeta.formula import Formula, apart
from varmeta.formula_design import of_formula
from varmeta.formula_model import FormulaModel, from_formula
from varmeta.model_files import model_file
from varmeta.models.sites import Model
from varmeta.problems import PROBLEMS, Problem
from varmeta.raw_data import Missing
from varmeta.tasks import Tasks


@dataclass(frozen=True)
class Options:
    """The options that go with a problem of the user's own, None where they were not given.

    Attributes:
        data: CSV file.
        task: column that names a row's task.
        inputs: columns by commas, or a formula.
        target: column.
        shared: latents by commas.
        query: a share of rows, or the column that says which.
        hold_out: a number of tasks.
        family: of a formula model.
        missing: what to do with incomplete rows.
        integers: what stays whole numbers, by commas.
    """

    data: Path | None = None
    task: str | None = None
    inputs: str | None = None
    target: str | None = None
    shared: str | None = None
    query: str | None = None
    hold_out: int | None = None
    family: str | None = None
    missing: str | None = None
    integers: str | None = None

    def refuse(self, why: str, *names: str) -> None:
        """Raise a ValueError that names those of these options that were given (or of all)."""
        given = [n for n, v in vars(self).items() if v is not None and (not names or n in names)]
        if given:
            shown = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{shown}: {why}; leave it out")

    def require(self, what: str, *names: str) -> None:
        """Raise a ValueError that names the first of these options that was not given."""
        for name in names:
            if getattr(self, name) is None:
                wanted = ", ".join("--" + n for n in names)
                raise ValueError(f"--{name} is missing; {what} needs {wanted}")
        if self.data is not None and not self.data.is_file():
            raise ValueError(f"--data: no file {str(self.data)!r}; give a CSV file that is there")

    @property
    def query_column(self) -> str | None:
        """The column that says which rows are query rows, if it is not a share."""
        return None if self.query is None or self.share is not None else self.query

    @property
    def share(self) -> float | None:
        """The share of rows to hold out; None where a column says which."""
        try:
            return 0.3 if self.query is None else float(self.query)
        except ValueError:
            return None

    @property
    def _missing(self) -> Missing:
        if self.missing not in (None, "error", "drop"):
            raise ValueError(f"--missing must be error or drop, got {self.missing!r}")
        return "drop" if self.missing == "drop" else "error"

    def formula_model(self, formula: str) -> FormulaModel:
        """What the formula stands for."""
        self.require("a formula", "data")
        self.refuse("a formula says it", "task", "inputs", "target", "shared", "integers")
        assert self.data is not None
        return from_formula(
            formula,
            self.data,
            family=self.family or "normal",
            query=self.query_column,
            missing=self._missing,
        )

    def tasks(self) -> Tasks:
        """The table as the options say, by columns or by a formula in `inputs`."""
        integers = split(self.integers or "")
        if self.inputs is not None and "~" in self.inputs:
            self.require("a model of your own", "data")
            self.refuse("the formula in --inputs says it", "task", "target")
            assert self.data is not None
            table = read_csv(self.data)
            design, _, _ = of_formula(
                table,
                Formula.read(self.inputs),
                response="classes" if "target" in integers else "two",
                query=self.query_column or "",
                missing=self._missing,
            )
            return Tasks.from_rows(
                design.read(table, missing=self._missing), design, table.first_line
            )
        self.require("a model of your own", "data", "task", "target")
        assert self.data is not None
        return Tasks.from_csv(
            self.data,
            task=self.task,
            inputs=split(self.inputs or ""),
            target=self.target,
            integers=integers,
            query=self.query_column,
            missing=self._missing,
        )


@contextmanager
def own_problem(spec: str, options: Options, seed: int) -> Iterator[tuple[str, Problem]]:
    """A name for the output and the problem; a model's file may import its neighbours meanwhile.

    Raises:
        ValueError: no such model or data, or options that do not fit.
    """
    if "~" in spec:
        made = options.formula_model(spec)
        shared = list(made.shared)
        label = "_".join(re.findall(r"\w+", f"{made.tasks.target_name} {made.tasks.task_name}"))
        yield label, _split_up(made.model, made.tasks, shared, options, seed)
        return
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(
            f"no shipped problem {spec!r}; there are: {', '.join(PROBLEMS)}. For a model of your "
            "own give FILE.py:FUNCTION, or a formula such as 'y ~ x + (1 + x | group)'"
        )
    options.refuse("goes with a formula, and the model file has its own law", "family")
    if options.inputs is None or "~" not in options.inputs:
        options.require("a model of your own", "data", "task", "target")
    with model_file(Path(path), name) as model:
        tasks, shared = options.tasks(), split(options.shared or "")
        yield f"{Path(path).stem}_{name}", _split_up(model, tasks, shared, options, seed)


def split(text: str) -> list[str]:
    """What stands between commas, outside of brackets and quotes."""
    return [part.strip() for part in apart(text, ",") if part.strip()]


def _split_up(
    model: Model, tasks: Tasks, shared: list[str], options: Options, seed: int
) -> Problem:
    """The tasks split and set aside as the options say; a column that says it sets none aside."""
    share = 0.0 if tasks.is_split or options.share is None else options.share
    if not 0 <= share < 1:
        raise ValueError(f"--query must lie between 0 and below 1, got {share:g}; 0 holds out none")
    count = options.hold_out
    if count is None:
        count = 0 if tasks.is_split else len(tasks) // 6
    if not 0 <= count < len(tasks):
        raise ValueError(
            f"--hold-out must lie between 0 and {len(tasks) - 1}, got {count}: there are "
            f"{len(tasks)} tasks, and one must be left to learn from"
        )
    made = Problem.make(model, tasks, shared=shared, query=share, hold_out=count, seed=seed)
    parts = [part for part in (made.train, made.new) if part is not None]
    if (share or tasks.is_split) and not any(bool(part.is_query.any()) for part in parts):
        found = (
            f"column {options.query!r} names no row"
            if tasks.is_split
            else f"{share:g} finds no row to hold out: each of the {len(tasks)} tasks of --task "
            f"{tasks.task_name!r} has too few. Name another column"
        )
        raise ValueError(f"--query {found}, or give --query 0 to fit without scores")
    return made
