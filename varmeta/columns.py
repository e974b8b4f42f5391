"""Columns of a table as numbers: what each holds, and the same coding for other tables later."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd

Place = Callable[[int], str]  # where a row is, in words
Kind = Literal["number", "truth", "levels", "date"]

_EMPTY = {"", "na", "n/a", "nan", "null", "?", "."}  # no level has such a name
_MISSING = _EMPTY | {"none", "-", "--", "missing"}  # nor is a number written so
_TRUTHS = {"true": 1.0, "false": 0.0}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?")
# A number in another notation: with separators, a sign of money, a unit of percent, as hexadecimal.
_NOTATION = re.compile(r"[-+]?[£$€¥]?\d[\d.,'_ \u00a0\u202f]*[%£$€¥]?|0x[0-9a-f]+", re.IGNORECASE)
_SEPARATED = re.compile(r"[-+]?\d[\d.,' \u00a0\u202f]*")
_FREE_TEXT = 20  # rows from which a column whose values hardly repeat is no set of levels
_DAY = pd.Timedelta(days=1)
_AS_LEVELS = re.compile(r"C\((.+)\)")


@dataclass(frozen=True)
class Column:
    """What a column holds, and how it becomes numbers.

    Attributes:
        name: of the column.
        kind: `"number"`; `"truth"`, 0 or 1; `"levels"`, an indicator for each level but the first;
            or `"date"`, in days since `origin`.
        levels: the levels as texts, in their order; of a categorical column its own order, of texts
            the alphabet's, of numbers theirs.
        origin: the earliest date, in ISO 8601.
        coded: whether levels are numbered from 0 (for an embedding, or classes) and not indicated.
    """

    name: str
    kind: Kind
    levels: tuple[str, ...] = ()
    origin: str = ""
    coded: bool = False

    @classmethod
    def learn(
        cls,
        column: pd.Series,
        place: Place,
        *,
        as_levels: bool = False,
        coded: bool = False,
        allowed: Sequence[Kind] = ("number", "truth", "levels", "date"),
    ) -> Column:
        """What a column without missing values holds.

        Args:
            column: one of a table.
            place: where a row is.
            as_levels: take its values for levels whatever they are, as `C(column)` says.
            coded: see the attribute.
            allowed: kinds that there may be; a value of another is no number.

        Raises:
            ValueError: levels that are one alone, or hardly repeat.
        """
        name = str(column.name)
        kind: Kind = "levels" if as_levels else _kind(column)
        if kind not in allowed:
            kind = "number"
        if kind == "date":
            return cls(name, kind, origin=_dates(column, name, place).min().isoformat())
        if kind != "levels":
            return cls(name, kind)
        texts = _labels(column)
        if isinstance(column.dtype, pd.CategoricalDtype):
            found = [level for level in map(_label, column.cat.categories) if level in set(texts)]
        elif all(_is_number(text) for text in set(texts)):
            found = sorted(set(texts), key=float)
        else:
            found = sorted(set(texts))
        if len(found) == 1 and not coded:
            raise ValueError(
                f"column {name!r} has one level only, {found[0]!r}, which tells no rows apart; "
                "leave it out"
            )
        explicit = as_levels or isinstance(column.dtype, pd.CategoricalDtype) or coded
        if not explicit and len(column) >= _FREE_TEXT and len(found) > len(column) / 2:
            raise ValueError(
                f"column {name!r} holds {texts[0]!r} in {place(0)}, which is no number; its "
                f"{len(column)} rows have {len(found)} different texts, so that they are hardly "
                f"levels. Leave it out, encode it as numbers, or insist with C({name})"
            )
        return cls(name, kind, tuple(found), coded=coded)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of numbers that it becomes."""
        if self.kind == "levels" and not self.coded:
            return tuple(f"{self.name}[{level}]" for level in self.levels[1:])
        return (self.name,)

    def described(self) -> str:
        """In words, where it is not the numbers that one sees; else ''."""
        if self.kind == "date":
            return f"{self.name}: days since {self.origin.removesuffix('T00:00:00')}"
        if self.kind != "levels":
            return ""
        shown = [*self.levels[:6], "…"] if len(self.levels) > 7 else list(self.levels)
        if self.coded:
            return f"{self.name}: {', '.join(shown)}, numbered from 0"
        return f"{self.name}: indicators of {', '.join(shown[1:])}, beside {shown[0]}"

    def values(self, column: pd.Series, place: Place) -> pd.Series:
        """The column as floats, truths, days, or a categorical column of these levels.

        Raises:
            ValueError: with the row and the value that is none of these.
        """
        if self.kind == "levels":
            codes = self._codes(column, place)
            return pd.Series(
                pd.Categorical.from_codes(codes.tolist(), pd.Index(self.levels)), name=self.name
            )
        if self.kind == "date":
            days = (_dates(column, self.name, place) - pd.Timestamp(self.origin)) / _DAY
            return pd.Series(days.to_numpy(dtype=float), name=self.name)
        numbers = _numbers(column)
        _require_finite(numbers, column, place)
        return pd.Series(numbers, name=self.name)

    def encode(self, column: pd.Series, place: Place) -> np.ndarray:
        """`[rows, len(names)]`, in float64; raises as `values` does."""
        if self.kind != "levels":
            return self.values(column, place).to_numpy()[:, None]
        codes = self._codes(column, place)
        if self.coded:
            return codes[:, None].astype(float)
        return (codes[:, None] == np.arange(1, len(self.levels))).astype(float)

    def _codes(self, column: pd.Series, place: Place) -> np.ndarray:
        texts = _labels(column)
        codes = pd.Index(list(self.levels)).get_indexer(pd.Index(texts))
        unseen = np.flatnonzero(codes < 0)
        if len(unseen):
            row = int(unseen[0])
            count = "" if len(unseen) == 1 else f" ({len(unseen)} such rows in all)"
            raise ValueError(
                f"column {self.name!r} holds {texts[row]!r} in {place(row)}, a level that the data "
                f"learned from do not have{count}; they have: {', '.join(self.levels)}. Drop such "
                "rows, or give them one of these levels"
            )
        return codes


def is_missing(column: pd.Series) -> np.ndarray:
    """`[rows]` bool: which cells hold no value; 'none' may be a level, and is no number."""
    found: np.ndarray = column.isna().to_numpy(dtype=bool, copy=True)
    if not _is_text(column):
        return found
    numbers = _parsed(column)
    rest = np.flatnonzero(np.isnan(numbers) & ~found)  # of a long column of numbers hardly any
    if not len(rest):
        return found
    words = _MISSING if _kind(column) == "number" else _EMPTY
    found[rest] = _by_value(column.iloc[rest], lambda v: str(v).strip().lower() in words)
    return found


def bare(name: str) -> tuple[str, bool]:
    """The column that an entry of `inputs` names, and whether as levels: `C(column)`."""
    found = _AS_LEVELS.fullmatch(name.strip())
    return (found[1].strip(), True) if found else (name, False)


def why_bad(column: pd.Series, row: int, place: Place, count: int) -> ValueError:
    """An error for a cell that is no finite number, one of so many."""
    shown, why, remedy = _why(column.iloc[row])
    more = "" if count == 1 else f" ({count} rows in all)"
    return ValueError(
        f"column {str(column.name)!r} holds {shown} in {place(row)}, which is {why}{more}; {remedy}"
    )


def _kind(column: pd.Series) -> Kind:
    """What a column is meant to hold; a few cells of it may hold something else."""
    kind = pd.api.types
    if isinstance(column.dtype, pd.CategoricalDtype):
        return "levels"
    if kind.is_bool_dtype(column):
        return "truth"
    if kind.is_datetime64_any_dtype(column):
        return "date"
    if not _is_text(column):
        return "number"
    if np.isfinite(_parsed(column)).any():
        return "number"
    values = column[~column.isna()]
    if not _by_value(values, lambda v: isinstance(v, (str, bool))).all():
        return "number"
    texts = pd.Series(_by_value(values, lambda v: str(v).strip().lower())).drop_duplicates()
    texts = texts[~texts.isin(_EMPTY)]
    if texts.isin(_TRUTHS.keys()).all():
        return "truth" if len(texts) else "number"
    if texts.map(_NOTATION.fullmatch).notna().any():
        return "number"
    return "date" if texts.str.fullmatch(_DATE.pattern.lower()).any() else "levels"


def _is_text(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.StringDtype) or column.dtype == object


def _parsed(column: pd.Series) -> np.ndarray:
    """Texts as floats, NaN where one is no number; truths are none."""
    plain = column
    if column.dtype == object:
        plain = column.where(column.map(lambda v: isinstance(v, str)), None)
    return np.asarray(pd.to_numeric(plain, errors="coerce"), dtype=float)


def _is_number(text: str) -> bool:
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False


def _by_value(column: pd.Series, function: Callable[[Any], Any]) -> np.ndarray:
    """What a function says of each cell, asked once for each value."""
    try:
        codes, found = pd.factorize(column, use_na_sentinel=False)
    except TypeError:  # lists, say, which have no hash
        codes, found = np.arange(len(column)), pd.Index(column, dtype=object)
    out = np.empty(len(found), dtype=object)
    out[:] = [function(value) for value in found]
    return out[codes]


def _labels(column: pd.Series) -> list[str]:
    labels: list[str] = _by_value(column, _label).tolist()
    return labels


def _label(value: Any) -> str:
    """A level's name; 1, 1.0 and "1" are one."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _dates(column: pd.Series, name: str, place: Place) -> pd.Series:
    """As times; of several time zones in that of Greenwich.

    Raises:
        ValueError: with the row and the value that is no date of ISO 8601.
    """
    plain = column
    if _is_text(column):
        texts = column.map(lambda v: v.strip() if isinstance(v, str) else v)
        plain = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True)
        bad = np.flatnonzero(plain.isna())
        if len(bad):
            row = int(bad[0])
            count = "" if len(bad) == 1 else f" ({len(bad)} rows in all)"
            raise ValueError(
                f"column {name!r} holds {column.iloc[row]!r} in {place(row)}, which is no date"
                f"{count}; write dates as 2020-12-31 (ISO 8601), or take the column for levels: "
                f"C({name})"
            )
    return plain.dt.tz_convert(None) if plain.dt.tz is not None else plain


def _require_finite(numbers: np.ndarray, column: pd.Series, place: Place) -> None:
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise why_bad(column, int(bad[0]), place, len(bad))


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
        truths = plain.map(lambda v: _TRUTHS.get(str(v).strip().lower()))
        if not truths.isna().any():
            return truths.to_numpy(dtype=float)
    return found


def _why(value: Any) -> tuple[str, str, str]:
    """A value that is no finite number, why it is none, and what mends it."""
    text = value.strip().lower() if isinstance(value, str) else ""
    shown = repr(value) if isinstance(value, str) else str(value)
    drop = "drop or fill such rows (missing='drop' or --missing drop leaves them out)"
    if text in _MISSING if isinstance(value, str) else pd.isna(value) is True or value is pd.NA:
        return shown, "a missing value", drop
    try:
        infinite = isinstance(value, (str, Real, Decimal)) and math.isinf(float(text or value))
    except (TypeError, ValueError):
        infinite = False
    if infinite:
        return shown, "infinite", "drop or fill such rows"
    if _SEPARATED.fullmatch(text):
        plain = "write numbers with a decimal point and no separators of thousands, as 1234.5"
        return shown, "no number", plain
    return shown, "no number", "encode it as numbers, or drop such rows"


@dataclass(frozen=True)
class Columns:
    """Columns side by side, each for itself."""

    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of numbers that they become."""
        return tuple(name for column in self.columns for name in column.names)

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of a table that are read."""
        return tuple(column.name for column in self.columns)

    def encode(self, frame: pd.DataFrame, place: Place) -> np.ndarray:
        """`[rows, len(names)]`, in float64.

        Raises:
            ValueError: a value that a column cannot have, with its row.
        """
        found = [column.encode(frame[column.name], place) for column in self.columns]
        return np.concatenate([np.empty((len(frame), 0)), *found], axis=1)
