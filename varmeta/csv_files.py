"""CSV files as text, cell by cell: whatever their encoding, separator and decimal mark."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import logging
import re
import zlib
from dataclasses import replace
from os import PathLike
from pathlib import Path

import pandas as pd

from varmeta.raw_data import Table

_log = logging.getLogger("varmeta")
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before that of UTF-16, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATORS = (",", ";", "\t", "|")  # where two would do, the first
_NUMBER = re.compile(
    r"[-+]?(\d+|[1-9]\d{0,2}(\.\d{3})+)(,\d+)?(e[-+]?\d+)?", re.IGNORECASE
)  # 1.234,5
_EITHER = re.compile(r"[-+]?[1-9]\d{0,2}[.,]\d{3}")  # a thousand and more, or some thousandths


def read_csv(path: str | PathLike[str]) -> Table:
    """A CSV file, all cells as text; what separates its columns is read off its first line.

    UTF-8, or whatever its byte order mark says; a file that gzip packed is unpacked. Where columns
    are not separated by commas, a comma may be the decimal mark.

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
    mark = _separator(text.lstrip("\n").split("\n", 1)[0])
    try:
        cells = pd.read_csv(
            io.StringIO(text),
            header=None,
            dtype=str,
            keep_default_na=False,
            na_filter=False,
            sep=mark,
        )
    except pd.errors.ParserError as error:
        said = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise ValueError(
            f"{name!r} is no CSV file: {said}. Give every line as many values as the first, "
            f'separated by {mark!r}, and quote those that hold this sign: "a{mark} b"'
        ) from None
    header = [str(cell).strip() for cell in cells.iloc[0]]
    if len(cells) == 1:
        raise ValueError(
            f"{name!r} has no rows below its first line, {', '.join(header)!r}; wanted a line of "
            "column names, then rows"
        )
    frame = cells.iloc[1:].reset_index(drop=True)
    frame.columns = pd.Index(header)
    first = 2 if text.rstrip("\n").count("\n") + 1 == len(cells) else None
    if mark == ",":
        return Table.of(frame, first)
    frame, commas, doubtful = _points(frame)
    if commas:
        _log.warning("%s: columns are separated by %r, decimals by ','", Path(path).name, mark)
    return replace(Table.of(frame, first), doubtful=doubtful)


def _separator(line: str) -> str:
    """The sign that makes the most columns of the first line."""
    try:
        return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([line], delimiter=mark), [])))
    except csv.Error:  # a field beyond the limit of Python's reader
        return ","


def _points(frame: pd.DataFrame) -> tuple[pd.DataFrame, bool, dict[str, int]]:
    """Decimal commas as points, if there are some, and the columns that can be read in two ways.

    Columns of numbers alone are changed. 1,234 and 1.234 are a thousand and more in one place, a
    little more than 1 in another: what the file does elsewhere decides, if it does so.
    """
    written: dict[int, pd.Series] = {}  # by position: names may repeat
    for k in range(frame.shape[1]):
        cells = frame.iloc[:, k].str.strip()
        some = cells[cells != ""]
        if (_having(some, ".") | _having(some, ",")).any() and _like(some, _NUMBER).all():
            written[k] = cells
    clear = any((_having(c, ",") & ~_like(c, _EITHER)).any() for c in written.values())
    out, doubtful = frame.copy(), {}
    for k, cells in written.items():
        marked = _having(cells, ".") | _having(cells, ",")
        commas = bool(_having(cells, ",").any())
        if clear and commas:
            plain = cells.str.replace(".", "", regex=False).str.replace(",", ".", regex=False)
            out.isetitem(k, plain.tolist())
        elif (commas or clear) and _like(cells[marked], _EITHER).all():
            doubtful[str(frame.columns[k])] = int(marked.argmax())
        elif clear:  # 1.234.567 beside 3,5
            out.isetitem(k, cells.str.replace(".", "", regex=False).tolist())
    return out, clear, doubtful


def _having(cells: pd.Series, mark: str) -> pd.Series:
    return cells.str.contains(mark, regex=False)


def _like(cells: pd.Series, pattern: re.Pattern[str]) -> pd.Series:
    return cells.map(lambda cell: pattern.fullmatch(cell) is not None).astype(bool)


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
