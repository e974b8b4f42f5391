"""What tasks are built from: pairs of tensors and tables, checked and padded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.checked import nearest
from varmeta.columns import Place, is_missing, why_bad

_MOST_EXACT = 2.0**53  # whole numbers beyond it share a float
_SHOWN = 5  # rows that are named

Missing = Literal["error", "drop"]


@dataclass(frozen=True)
class Table:
    """A data frame whose rows are known by where they come from.

    Attributes:
        frame: the rows, numbered from 0.
        rows: `[n]` int, the number of each in the data it comes from.
        first_line: line of the file where row 0 of these data stands; None where none is known.
        doubtful: by column, the row of a number that can be read in two ways.
    """

    frame: pd.DataFrame
    rows: np.ndarray
    first_line: int | None = None
    doubtful: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, frame: pd.DataFrame, first_line: int | None = None) -> Table:
        """All rows of a frame, whatever its index."""
        if len(frame) == 0:
            raise ValueError("frame has no rows")
        return cls(frame.reset_index(drop=True), np.arange(len(frame)), first_line)

    def place(self, row: int) -> str:
        """Where a row is, in words."""
        where = int(self.rows[row])
        return f"row {where}" if self.first_line is None else f"line {where + self.first_line}"

    def take(self, keep: np.ndarray) -> Table:
        """The rows where `keep` is True."""
        return Table(self.frame[keep].reset_index(drop=True), self.rows[keep], self.first_line)

    def having(self, columns: Iterable[str]) -> np.ndarray:
        """`[n]` bool: which rows have a value in each of these columns."""
        found = np.ones(len(self.rows), dtype=bool)
        for name in columns:
            found &= ~is_missing(self.frame[name])
        return found

    def complete(
        self, columns: Sequence[str], missing: Missing, names: Iterable[str] = ()
    ) -> tuple[Table, str]:
        """The rows with a value in each of these columns, and a sentence on the others, if any.

        Args:
            columns: of inputs and target.
            missing: what to do with the other rows.
            names: columns of names, in which 'NA' is one; who reads them refuses an empty one.

        Raises:
            ValueError: a row without, unless `missing` is `"drop"`; no row with.
        """
        if missing not in get_args(Missing):
            raise ValueError(f"missing must be 'error' or 'drop', got {missing!r}")
        for name in columns:
            if name in self.doubtful:
                row = self.doubtful[name]
                raise ValueError(
                    f"column {name!r} holds {self.frame[name].iloc[row]!r} in {self.place(row)}, "
                    "which may be a thousand and more, or a few and some thousandths; write "
                    "numbers with a decimal point and no separators of thousands, as 1234.5"
                )
        gaps = {name: is_missing(self.frame[name]) for name in dict.fromkeys(columns)}
        if missing == "drop":
            gaps |= {name: is_empty(self.frame[name]) for name in names}
        gaps = {name: gap for name, gap in gaps.items() if gap.any()}
        if not gaps:
            return self, ""
        if missing != "drop":
            name, gap = next(iter(gaps.items()))
            raise why_bad(self.frame[name], int(gap.argmax()), self.place, int(gap.sum()))
        keep = ~np.logical_or.reduce(list(gaps.values()))
        if not keep.any():
            counts = ", ".join(f"{name!r} in {int(gap.sum())}" for name, gap in gaps.items())
            raise ValueError(f"all {len(keep)} rows have a missing value: {counts}; none is left")
        said = f"{int((~keep).sum())} of {len(keep)} rows are left out, since a value is missing: "
        return self.take(keep), said + "; ".join(self._gap(n, g) for n, g in gaps.items())

    def _gap(self, name: str, gap: np.ndarray) -> str:
        rows = [self.place(int(row)) for row in np.flatnonzero(gap)[:_SHOWN]]
        kind, numbers = rows[0].split()[0], [row.split()[1] for row in rows]
        shown = ", ".join(numbers) + ", …" * (int(gap.sum()) > _SHOWN)
        return f"{name!r} in {int(gap.sum())} ({kind}{'s' * (len(rows) > 1)} {shown})"


def pad(rows: Tensor, width: int) -> Tensor:
    """`[n, ...]` to `[width, ...]`, with copies of the first row."""
    return torch.cat([rows, rows[:1].expand(width - len(rows), *rows.shape[1:])])


def check_pair(label: str, x: Tensor, y: Tensor, first_x: Tensor, first_y: Tensor) -> None:
    """Raise a ValueError unless x and y of a task fit each other and the first task's."""
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(
            f"task {label!r}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; "
            "wanted the same number of rows in both"
        )
    if len(y) == 0:
        raise ValueError(f"task {label!r} is empty; drop it or give it at least one row")
    for name, value, first in (("x", x, first_x), ("y", y, first_y)):
        if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
            raise ValueError(
                f"task {label!r}: {name} has rows of shape {tuple(value.shape[1:])} and type "
                f"{value.dtype}, the first task {tuple(first.shape[1:])} and {first.dtype}; "
                "wanted the same for all tasks"
            )
        if not value.is_floating_point():
            continue
        bad = (
            value.isinf() if name == "y" else ~value.isfinite()
        )  # y may be what is to be predicted
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            what = "infinity" if name == "y" else "NaN or infinity"
            raise ValueError(
                f"task {label!r}: {name} holds {what} in row {row}; drop or fill that row"
            )


def check_columns(
    frame: pd.DataFrame, uses: Mapping[str, Sequence[str]], *, apart: bool = True
) -> None:
    """Raise a ValueError unless each named column is there once, and has one use if `apart`.

    Args:
        frame: the data.
        uses: columns, by the argument that names them.
        apart: whether two uses of a column are a mistake.
    """
    have = [str(column) for column in frame.columns]
    found: dict[str, str] = {}
    for argument, columns in uses.items():
        for column in columns:
            count = list(frame.columns).count(column)
            if count != 1:
                number = "no column" if count == 0 else f"{count} columns"
                raise ValueError(
                    f"{argument}: {number} {column!r}; the data have: {', '.join(have)}"
                    + nearest(str(column), have) * (count == 0)
                )
            if apart and column in found:
                twice = "named twice" if found[column] == argument else f"the {found[column]} too"
                raise ValueError(
                    f"{argument}: column {column!r} is {twice}; give each column one use"
                )
            found[column] = argument


def task_labels(column: pd.Series, place: Place) -> tuple[np.ndarray, list[str]]:
    """The number of each row's task, and the tasks' names in order of appearance.

    Raises:
        ValueError: a row without a task; names that a float cannot hold, or that look alike.
    """
    name = column.name
    empty = is_empty(column)
    if empty.any():
        row = int(empty.argmax())
        raise ValueError(f"task: column {name!r} is empty in {place(row)}; drop or fill that row")
    if pd.api.types.is_float_dtype(column) and bool((column.abs() >= _MOST_EXACT).any()):
        raise ValueError(
            f"task: column {name!r} holds {column.abs().max():.17g} as a float, which cannot tell "
            "it from its neighbours; read the column as text (dtype=str)"
        )
    codes, found = pd.factorize(column)
    labels = [str(label) for label in found]
    seen: dict[str, Any] = {}
    for raw, label in zip(found, labels, strict=True):
        other = seen.setdefault(label.strip(), raw)
        if other is not raw:
            raise ValueError(
                f"task: column {name!r} holds both {other!r} and {raw!r}; are they one task? Write "
                "its name in one way"
            )
    return codes, labels


def is_empty(column: pd.Series) -> np.ndarray:
    """`[rows]` bool: where a column of names has none."""
    found: np.ndarray = (column.isna() | (column == "")).to_numpy(dtype=bool)
    return found
