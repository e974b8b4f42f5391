"""What tasks are built from: pairs of tensors and tables, checked and padded."""

from __future__ import annotations

import codecs
import gzip
import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

_MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "--", ".", "?", "missing"}
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before that of UTF-16, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MOST_EXACT = 2.0**53  # whole numbers beyond it share a float


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


def read_csv(path: str | PathLike[str]) -> tuple[pd.DataFrame, int | None]:
    """A CSV file as text, cell by cell, and the line of its first row (None where rows span lines).

    UTF-8, or whatever its byte order mark says; a file that gzip packed is unpacked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no CSV file with a header and rows; with what is wrong and what to do.
    """
    name = str(path)
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"path: {name!r} {kind}; give a CSV file")
    text = _decoded(Path(path).read_bytes(), name).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{name!r} is empty; wanted a line of column names, then rows")
    try:
        cells = pd.read_csv(
            io.StringIO(text), header=None, dtype=str, keep_default_na=False, na_filter=False
        )
    except pd.errors.ParserError as error:
        said = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        first = text.lstrip().split("\n", 1)[0]
        raise ValueError(
            f"{name!r} is no CSV file: {said}. Give every line as many values as the first, "
            'separated by commas, and quote those that hold a comma: "a, b"'
            + ("" if "," in first else _other_separator(first))
        ) from None
    header = [str(cell).strip() for cell in cells.iloc[0]]
    if len(cells) == 1:
        raise ValueError(
            f"{name!r} has no rows below its first line, {', '.join(header)!r}; wanted a line of "
            "column names, then rows"
        )
    frame = cells.iloc[1:].reset_index(drop=True)
    frame.columns = pd.Index(header)
    return frame, 2 if text.rstrip("\n").count("\n") + 1 == len(cells) else None


def _decoded(data: bytes, name: str) -> str:
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name!r} is packed by gzip and broken: {error}") from None
    encoding = next((e for mark, e in _BOMS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name!r} is not written in {encoding.upper()}: line {line} has the byte "
            f"0x{data[error.start]:02x}; save it as UTF-8 (or read it with "
            "pandas.read_csv(..., encoding=...) and use Tasks.from_frame)"
        ) from None
    if "\0" in text:
        raise ValueError(f"{name!r} holds NUL characters and is no text file; save it as UTF-8 CSV")
    return text


def _other_separator(line: str) -> str:
    """What to do with a first line that has another separator than commas; '' if it has none."""
    found = next((mark for mark in (";", "\t", "|") if mark in line), None)
    if found is None:
        return ""
    return (
        f". The columns seem to be separated by {found!r}: save the file with commas and decimal "
        f"points, or use Tasks.from_frame(pandas.read_csv(..., sep={found!r}), ...)"
    )


def check_columns(frame: pd.DataFrame, task: str, inputs: Sequence[str], target: str) -> None:
    """Raise a ValueError unless each named column is there once, and has one use."""
    have = [str(column) for column in frame.columns]
    uses: dict[str, str] = {}
    for argument, columns in (("task", [task]), ("target", [target]), ("inputs", inputs)):
        for column in columns:
            count = list(frame.columns).count(column)
            if count != 1:
                number = "no column" if count == 0 else f"{count} columns"
                remedy = _other_separator(have[0]) if len(have) == 1 else ""
                raise ValueError(
                    f"{argument}: {number} {column!r}; the data have: {', '.join(have)}{remedy}"
                )
            if column in uses:
                twice = "named twice" if uses[column] == argument else f"the {uses[column]} too"
                raise ValueError(
                    f"{argument}: column {column!r} is {twice}; give each column one use"
                )
            uses[column] = argument


def task_labels(column: pd.Series, place: Callable[[int], str]) -> tuple[np.ndarray, list[str]]:
    """The number of each row's task, and the tasks' names in order of appearance.

    Raises:
        ValueError: a row without a task; names that a float cannot hold, or that look alike.
    """
    name = column.name
    empty = column.isna() | (column == "")
    if empty.any():
        row = int(np.flatnonzero(empty)[0])
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


def numeric(frame: pd.DataFrame, columns: Sequence[str], place: Callable[[int], str]) -> np.ndarray:
    """The columns as a float64 array; `place` says where a row is.

    Raises:
        ValueError: with the column, the row and the value that is no finite number.
    """
    values = np.empty((len(frame), len(columns)))
    for k, name in enumerate(columns):
        values[:, k] = _numbers(frame[name])
        bad = np.flatnonzero(~np.isfinite(values[:, k]))
        if len(bad):
            row = int(bad[0])
            count = "" if len(bad) == 1 else f" ({len(bad)} rows in all)"
            shown, why, remedy = _why(frame[name].iloc[row])
            raise ValueError(
                f"column {name!r} holds {shown} in {place(row)}, which is {why}{count}; {remedy}"
            )
    return values


def is_missing(column: pd.Series) -> np.ndarray:
    """`[rows]` bool: which cells hold no value."""
    empty = column.isna().to_numpy()
    if not (isinstance(column.dtype, pd.StringDtype) or column.dtype == object):
        return empty
    texts = column.map(lambda v: v.strip().lower() if isinstance(v, str) else "x")
    found: np.ndarray = empty | texts.isin(_MISSING).to_numpy()
    return found


def _numbers(column: pd.Series) -> np.ndarray:
    """As floats; NaN where a value is none."""
    kind = pd.api.types
    if kind.is_numeric_dtype(column) and not kind.is_complex_dtype(column):
        return column.to_numpy(dtype=float, na_value=np.nan)
    plain = column
    if not isinstance(column.dtype, pd.StringDtype):  # of objects, only what is meant as a number
        plain = column.astype(object)
        plain = plain.where(plain.map(lambda v: isinstance(v, (str, Real, Decimal))), None)
    found = np.asarray(pd.to_numeric(plain, errors="coerce"), dtype=float)
    if np.isnan(found).all():  # a column of truths alone
        truths = plain.map(lambda v: {"true": 1.0, "false": 0.0}.get(str(v).strip().lower()))
        if not truths.isna().any():
            return truths.to_numpy(dtype=float)
    return found


def _why(value: Any) -> tuple[str, str, str]:
    """A value that is no finite number, why it is none, and what mends it."""
    text = value.strip().lower() if isinstance(value, str) else ""
    shown = repr(value) if isinstance(value, str) else str(value)
    if text in _MISSING if isinstance(value, str) else pd.isna(value) is True or value is pd.NA:
        return shown, "a missing value", "drop or fill such rows"
    try:
        infinite = isinstance(value, (str, Real, Decimal)) and math.isinf(float(text or value))
    except (TypeError, ValueError):
        infinite = False
    if infinite:
        return shown, "infinite", "drop or fill such rows"
    if re.fullmatch(r"[-+]?\d[\d.,' \u00a0\u202f]*", text):
        plain = "write numbers with a decimal point and no separators of thousands, as 1234.5"
        return shown, "no number", plain
    return shown, "no number", "encode it as numbers, or drop such rows"
