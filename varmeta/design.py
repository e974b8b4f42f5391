"""Design: which columns of a table are task, inputs and target, and how they become numbers.

It is learned from one table (kinds of columns, levels, what transforms keep) and codes every later
one the same way. `to_json` and `from_json` keep it in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.columns import Column, Columns, Kind, Place, bare
from varmeta.formula import Matrix
from varmeta.packing import packed, unpacked
from varmeta.raw_data import Missing, Table, check_columns, is_empty, task_labels

_INTEGERS = ("inputs", "target")
NUMBERS: tuple[Kind, ...] = ("number", "truth")
_RULES: dict[
    str, tuple[Callable[[np.ndarray], np.ndarray], str]
] = {  # of columns that stand beside the inputs
    "trials(": (lambda v: (v >= 0) & (v % 1 == 0), "a whole number from 0"),
    "weights(": (lambda v: v > 0, "a positive number"),
}


class Coding(Protocol):
    """Columns of a table that become columns of numbers, always in the same way."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of numbers."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of a table that are read."""

    def encode(self, frame: pd.DataFrame, place: Place) -> np.ndarray:
        """`[rows, len(names)]`, in float64; a ValueError names a value that cannot be."""


@dataclass(frozen=True)
class Beside:
    """Columns chosen from several matrices.

    Attributes:
        parts: the matrices.
        take: the number of a matrix, its column, and the column's name here.
    """

    parts: tuple[Matrix, ...]
    take: tuple[tuple[int, str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(name for _, _, name in self.take)

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of a table that are read."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.needs))

    def encode(self, frame: pd.DataFrame, place: Place) -> np.ndarray:
        """`[rows, len(names)]`, in float64.

        Raises:
            ValueError: a value that cannot be, with its row.
        """
        used = {part for part, _, _ in self.take}
        made = {k: self.parts[k].encode(frame, place) for k in used}
        out = np.empty((len(frame), len(self.take)))
        for j, (k, column, name) in enumerate(self.take):
            out[:, j] = made[k][:, self.parts[k].names.index(column)]
            for sign, (holds, wanted) in _RULES.items():
                bad = np.flatnonzero(~holds(out[:, j]))
                if name.startswith(sign) and len(bad):
                    raise ValueError(
                        f"formula: {name} is {out[bad[0], j]:g} in {place(int(bad[0]))}; wanted "
                        f"{wanted}" + f" ({len(bad)} rows in all)" * (len(bad) > 1)
                    )
        return out


@dataclass(frozen=True)
class Rows:
    """A table as numbers.

    Attributes:
        codes: `[n]` int, each row's task.
        labels: names of the tasks, in order of appearance.
        inputs: `[n, K]`.
        targets: `[n]`; 0 where there is none.
        is_query: `[n]` bool, those that the design's column names, or else, where targets are
            optional, those without one; None where nothing says it.
        rows: `[n]` int, each row's number in the data.
        said: a sentence on rows that were left out, or ''.
    """

    codes: np.ndarray
    labels: list[str]
    inputs: Tensor
    targets: Tensor
    is_query: np.ndarray | None
    rows: np.ndarray
    said: str


@dataclass(frozen=True)
class Design:
    """How a table becomes tasks.

    Attributes:
        task: the columns that name a row's task; of several, their combinations are the tasks.
        inputs: what a model receives as `x`.
        target: what it receives as `y`, one column.
        query: the column that says which rows are query rows; '' for none.
        dtype: of inputs and target, as PyTorch calls it.
        integers: which of them are whole numbers (`torch.int64`) instead, with levels numbered.

    Example:
        >>> frame = pd.DataFrame({"g": [1, 1, 2], "soil": ["clay", "sand", "clay"], "y": [1, 2, 3]})
        >>> design = Design.of_columns(Table.of(frame), task="g", inputs=["soil"], target="y")
        >>> design.inputs.names
        ('soil[sand]',)
        >>> new = pd.DataFrame({"g": [7], "soil": ["sand"], "y": [0]})
        >>> design.read(Table.of(new)).inputs
        tensor([[1.]], dtype=torch.float64)
    """

    task: tuple[str, ...]
    inputs: Coding
    target: Coding
    query: str = ""
    dtype: str = "float64"
    integers: tuple[str, ...] = ()

    @classmethod
    def of_columns(
        cls,
        table: Table,
        *,
        task: str,
        inputs: Sequence[str],
        target: str,
        query: str = "",
        dtype: torch.dtype = torch.float64,
        integers: Sequence[str] = (),
        missing: Missing = "error",
    ) -> Design:
        """Learned from a table: an input is a column, or `C(column)` to take numbers for levels.

        Raises:
            ValueError: see `Tasks.from_frame`.
        """
        if isinstance(inputs, str):
            raise ValueError(f"inputs must be a list of column names, got the string {inputs!r}")
        integers = (integers,) if isinstance(integers, str) else tuple(integers)
        for which in integers:
            if which not in _INTEGERS:
                raise ValueError(f"integers: {which!r} is not one of {', '.join(_INTEGERS)}")
        named = [bare(name) if name not in table.frame else (name, False) for name in inputs]
        columns = [name for name, _ in named]
        uses = {"task": [task], "target": [target], "inputs": columns}
        check_columns(table.frame, uses | ({"query": [query]} if query else {}))
        table, _ = table.complete([*columns, target], missing, (task,))
        found = tuple(
            Column.learn(
                table.frame[name], table.place, as_levels=levels, coded="inputs" in integers
            )
            for name, levels in named
        )
        coded = "target" in integers
        aim = Column.learn(
            table.frame[target],
            table.place,
            coded=coded,
            allowed=(*NUMBERS, "levels") if coded else NUMBERS,
        )
        kind = str(dtype).removeprefix("torch.")
        return cls((task,), Columns(found), Columns((aim,)), query, kind, integers)

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of a table that are read."""
        query = (self.query,) if self.query else ()
        return (*self.task, *self.inputs.needs, *self.target.needs, *query)

    def described(self) -> list[str]:
        """A phrase on each column that is not the numbers that one sees."""
        parts = [self.inputs, self.target]
        matrices = [*getattr(self.inputs, "parts", ()), *parts]
        columns = dict.fromkeys(c for part in matrices for c in getattr(part, "columns", ()))
        return [phrase for column in columns if (phrase := column.described())]

    def read(
        self, table: Table, *, missing: Missing = "error", optional_target: bool = False
    ) -> Rows:
        """A table's rows as numbers, coded as those that the design was learned from.

        Args:
            table: the rows.
            missing: `"drop"` leaves out rows with a missing value.
            optional_target: rows without a target are query rows, and the column may be absent;
                the design's own column of query rows is not asked.

        Raises:
            ValueError: see `Tasks.from_frame`; a level that was not seen when it was learned.
        """
        aims = self.target.needs
        if optional_target and not set(aims) <= set(table.frame):
            gap = {n: np.full(len(table.rows), np.nan) for n in aims if n not in table.frame}
            table = replace(table, frame=table.frame.assign(**gap))
        needs = (*self.task, *self.inputs.needs, *aims)
        if self.query and not optional_target:
            needs = (*needs, self.query)
        check_columns(table.frame, {"data": needs}, apart=False)
        wanted = self.inputs.needs if optional_target else (*self.inputs.needs, *aims)
        table, said = table.complete(wanted, missing, self.task)
        codes, labels = task_labels(_joined(table.frame, self.task), table.place)
        inputs = self.inputs.encode(table.frame, table.place)
        there = table.having(aims) if optional_target else np.ones(len(codes), dtype=bool)
        targets, some = np.zeros((len(codes), 1)), table.take(there)
        if there.any():
            targets[there] = self.target.encode(some.frame, some.place)
        is_query = ~there if optional_target else None
        if self.query and not optional_target:
            is_query = _truths(table, self.query)
        return Rows(
            codes,
            labels,
            self._cast(inputs, self.inputs.names, "inputs", table.place),
            self._cast(targets, self.target.names, "target", table.place)[:, 0],
            is_query,
            table.rows,
            said,
        )

    def to_json(self) -> dict[str, Any]:
        """In plain values, for `json.dump` and `from_json`."""
        found: dict[str, Any] = packed(self, KINDS)
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Design:
        """The inverse of `to_json`."""
        made = unpacked(found, KINDS)
        assert isinstance(made, Design)
        return made

    def _cast(self, values: np.ndarray, names: Sequence[str], which: str, place: Place) -> Tensor:
        dtype = torch.int64 if which in self.integers else getattr(torch, self.dtype)
        exact = torch.as_tensor(values)
        cast = exact.to(dtype)
        lost = (cast.double() != exact) & (
            ~cast.double().isfinite() | torch.tensor(not dtype.is_floating_point)
        )
        if bool(lost.any()):
            row, column = lost.nonzero()[0].tolist()
            raise ValueError(
                f"dtype: {dtype} cannot hold {values[row, column]:g}, of column "
                f"{names[column]!r} in {place(row)}; choose another, such as torch.float64"
            )
        return cast


def _joined(frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The column that names a row's task: of several, their values with a colon between."""
    if len(columns) == 1:
        return frame[columns[0]]
    parts = [frame[name] for name in columns]
    empty = np.logical_or.reduce([is_empty(part) for part in parts])
    texts = [":".join(str(v).strip() for v in row) for row in zip(*parts, strict=True)]
    return pd.Series(np.where(empty, "", texts), name=":".join(columns), dtype=object)


def _truths(table: Table, name: str) -> np.ndarray:
    """A column of 0 and 1, or of truths.

    Raises:
        ValueError: another value, with its row.
    """
    table.complete([name], "error")
    found = Column(name, "number").encode(table.frame[name], table.place)[:, 0]
    bad = np.flatnonzero((found != 0) & (found != 1))
    if len(bad):
        raise ValueError(
            f"query: column {name!r} holds {found[bad[0]]:g} in {table.place(int(bad[0]))}; wanted "
            "1 (or true) for a query row and 0 (or false) for another"
        )
    return found == 1


KINDS: dict[str, type] = {k.__name__: k for k in (Design, Columns, Column, Beside, Matrix)}
