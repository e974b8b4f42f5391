"""Formulas in R's style: what one says, and its columns, coded the same way for other tables later.

`response | trials(n) ~ population terms + (terms that vary | group) + offset(expression)`. Terms,
interactions and functions (`center`, `scale`, `poly`, `bs`, `C`, `log`, `np.…`) are those of the
package formulaic; what vary by group, offsets and what stands beside the response are read here.
"""

from __future__ import annotations

import ast
import keyword
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from varmeta.checked import nearest
from varmeta.columns import Column, Place
from varmeta.process import ALONE

_BESIDE = ("trials", "rate", "weights")
_STRING = re.compile(r"'[^']*'|\"[^\"]*\"")
_QUOTED = re.compile(r"`([^`]*)`")
_NAME = re.compile(r"(?<![\w.`])[^\W\d][\w.]*+(?!\s*[(`]|\s*=(?!=))")
_KNOWN = re.compile(r"(True|False|TRUE|FALSE|None|(np|contr)\..*)")
INTERCEPT = "Intercept"


@dataclass(frozen=True)
class Formula:
    """What a formula says, part by part, as texts.

    Attributes:
        text: the whole.
        response: the column that is modelled, or an expression of columns.
        fixed: the terms with one coefficient for all groups.
        varying: the terms with a coefficient for each group, bracket by bracket.
        group: the columns that name a row's group; several where groups are their combinations.
        beside: expressions of `trials`, `rate` (exposure) and `weights`, those that there are.
        offsets: expressions that are added to the linear predictor.
    """

    text: str
    response: str
    fixed: str
    varying: tuple[str, ...]
    group: tuple[str, ...]
    beside: Mapping[str, str]
    offsets: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Formula:
        """Take a formula apart.

        Raises:
            ValueError: it is none, or none that a hierarchy of one level can be.

        Example:
            >>> found = Formula.read("y | trials(n) ~ x + offset(z) + (1 + x | g)")
            >>> found.response, found.fixed, found.varying, found.group, found.offsets
            ('y', 'x', ('1 + x',), ('g',), ('z',))
        """
        sides = apart(text, "~")
        if len(sides) != 2 or not all(side.strip() for side in sides):
            raise _wrong(text, "wanted one '~' between the response and the terms")
        response, beside = _response(text, sides[0])
        fixed, varying, groups, offsets = list[str](), list[str](), list[str](), list[str]()
        for sign, term in _terms(sides[1]):
            inner = term[1:-1] if term.startswith("(") and _closes(term) else ""
            bars = apart(inner.replace("||", "|"), "|") if inner else []
            if len(bars) > 1:
                if len(bars) > 2 or sign == "-" or not all(bar.strip() for bar in bars):
                    raise _wrong(text, f"{term} is no (terms | group) that is added")
                varying.append(bars[0].strip())
                groups.append(bars[1].strip())
            elif "|" in _STRING.sub("", term):
                raise _wrong(text, f"{term} has a '|'; write terms that vary as + (terms | group)")
            elif term.startswith("offset(") and _closes(term[6:]):
                if sign == "-":
                    raise _wrong(text, f"{term} is taken away; an offset is added")
                offsets.append(term[7:-1].strip())
            else:
                fixed.append(f"{sign} {term}" if fixed or sign == "-" else term)
        if not groups:
            raise _wrong(
                text,
                "no term varies by group; say which do and what the groups (tasks) are, such as "
                "+ (1 | county)",
            )
        if len(set(groups)) > 1:
            raise _wrong(
                text,
                f"terms vary by {' and by '.join(dict.fromkeys(groups))}, and tasks are the groups "
                "of one factor; write the other one as a term of its own, such as C(name), or "
                "write the model in Pyro with a shared vector",
            )
        if any(mark in _QUOTED.sub("", groups[0]) for mark in "/+*() "):
            raise _wrong(text, f"a group is a column, or columns as a:b, and not {groups[0]!r}")
        return cls(
            text.strip(),
            response,
            " ".join(fixed) or "1",
            tuple(varying),
            tuple(part.strip("` ") for part in apart(groups[0], ":")),
            beside,
            tuple(offsets),
        )

    def expressions(self) -> tuple[str, ...]:
        """All that columns may be named in, save for the group."""
        return (self.response, *self.beside.values(), *self.offsets, self.fixed, *self.varying)

    def needs(self, frame: pd.DataFrame) -> tuple[str, ...]:
        """The columns that the formula names, the group's first.

        Raises:
            ValueError: a name that is no column.
        """
        found = [name for part in self.expressions() for name in _columns_in(part, frame.columns)]
        return tuple(dict.fromkeys([*self.group, *found]))


@dataclass(frozen=True)
class Matrix:
    """A one-sided formula's columns, with what transformations and levels they have learned.

    Attributes:
        formula: as formulaic reads it.
        names: of the columns, `Intercept` among them.
        columns: of the table.
        state: what stateful transforms have learned and the levels of factors, as a Python literal.
    """

    formula: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    state: str

    @classmethod
    def learn(cls, text: str, frame: pd.DataFrame, place: Place) -> Matrix:
        """The columns of `text` on a table without missing values.

        Raises:
            ValueError: a name that is no column, a formula that cannot be read or computed.
        """
        text = _in_python(_with_quotes(text, frame.columns))
        columns = tuple(
            Column.learn(frame[name], place) for name in _columns_in(text, frame.columns)
        )
        found = _matrix(text, {}, {}, _prepared(columns, frame, place))
        spec = found.model_spec
        levels = {
            factor: _plain(state["categories"])
            for factor, (_, state) in spec.encoder_state.items()
            if "categories" in state
        }
        names = tuple(map(_shown, found.columns))
        return cls(text, names, columns, repr((_plain(spec.transform_state), levels)))

    @classmethod
    def of_expression(cls, text: str, frame: pd.DataFrame, place: Place) -> Matrix:
        """One column, of an expression in Python such as `log(x) + 1`.

        Raises:
            ValueError: as `learn`, or it is not one column.
        """
        made = cls.learn("0 + {" + text.strip() + "}", frame, place)
        if len(made.names) != 1:
            raise ValueError(f"formula: {text!r} makes {len(made.names)} columns; wanted one")
        return made

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of a table that are read."""
        return tuple(column.name for column in self.columns)

    def encode(self, frame: pd.DataFrame, place: Place) -> np.ndarray:
        """`[rows, len(names)]`, in float64.

        Raises:
            ValueError: a level that is not among those learned, or a result that is not finite,
                with its row.
        """
        transforms, levels = ast.literal_eval(self.state)
        found = _matrix(self.formula, transforms, levels, _prepared(self.columns, frame, place))
        if tuple(map(_shown, found.columns)) != self.names:
            raise ValueError(
                f"formula: {self.formula} has the columns {', '.join(map(_shown, found.columns))} "
                f"here and had {', '.join(self.names)}"
            )
        values = np.array(found, dtype=float)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, k = bad[0]
            raise ValueError(
                f"formula: {self.names[k]} is {values[row, k]:g} in {place(int(row))}"
                + f" ({len(set(bad[:, 0].tolist()))} rows in all)" * (len(bad) > 1)
            )
        return values


# -- reading ---------------------------------------------------------------------------------------


def _wrong(text: str, why: str) -> ValueError:
    return ValueError(f"formula: {why}; got {text.strip()!r}")


def _response(text: str, side: str) -> tuple[str, dict[str, str]]:
    """The response and what stands beside it: `y | trials(n) + weights(w)`, `cbind(y, n - y)`."""
    parts = apart(side, "|")
    if len(parts) > 2:
        raise _wrong(text, "the response has more than one '|'")
    response, beside = parts[0].strip(), dict[str, str]()
    if response.startswith("cbind(") and _closes(response[5:]):
        counts = apart(response[6:-1], ",")
        if len(counts) != 2:
            raise _wrong(text, "cbind has two arguments, successes and failures")
        response = counts[0].strip()
        beside["trials"] = f"({response}) + ({counts[1].strip()})"
    for term in apart(parts[1], "+") if len(parts) == 2 else []:
        found = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", term)
        if found is None or found[1] not in _BESIDE or found[1] in beside:
            known = ", ".join(f"{name}(…)" for name in _BESIDE)
            raise _wrong(text, f"beside the response stands {term.strip()!r}; there are: {known}")
        beside[found[1]] = found[2].strip()
    return response, beside


def _characters(text: str) -> Iterator[tuple[int, str, int]]:
    """Position, character and depth in brackets, of what is not quoted."""
    depth, quote = 0, ""
    for position, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
            continue
        if sign in "'\"`":
            quote = sign
            continue
        depth -= sign in ")]}"
        yield position, sign, depth
        depth += sign in "([{"


def apart(text: str, mark: str) -> list[str]:
    """Parts between these signs, outside of brackets and quotes."""
    cuts = [k for k, sign, depth in _characters(text) if sign == mark and depth == 0]
    return [text[a:b] for a, b in zip([0, *(k + 1 for k in cuts)], [*cuts, None], strict=True)]


def _closes(text: str) -> bool:
    """Whether the bracket that the text begins with is closed at its very end."""
    ends = [k for k, sign, depth in _characters(text) if sign in ")]}" and depth == 0]
    return ends == [len(text) - 1]


def _terms(text: str) -> Iterator[tuple[str, str]]:
    """Sign and text of each term of a sum."""
    cuts = [k for k, sign, depth in _characters(text) if sign in "+-" and depth == 0]
    if text.lstrip()[:1] not in ("+", "-"):
        yield "+", text[: cuts[0] if cuts else None].strip()
    for k, end in zip(cuts, [*cuts, None][1:], strict=True):
        yield text[k], text[k + 1 : end].strip()


def _with_quotes(text: str, columns: Iterable[Any]) -> str:
    """Names with a point or a meaning in Python, such as Sepal.Length and yield, in quotes."""
    odd = [name for name in map(str, columns) if "." in name or keyword.iskeyword(name)]
    for name in sorted(odd, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.`]){re.escape(name)}(?![\w.`(])", f"`{name}`", text)
    return text


def _in_python(text: str) -> str:
    """R's power and truths as Python's: x^2 is no exclusive or."""
    words = {"^": "**", "TRUE": "True", "FALSE": "False"}
    pattern = re.compile(rf"({_STRING.pattern}|`[^`]*`)|\^|\b(TRUE|FALSE)\b")
    return pattern.sub(lambda m: m[0] if m[1] else words[m[0]], text)


def _columns_in(text: str, columns: Sequence[Any] | pd.Index) -> list[str]:
    """The names of columns in a formula or an expression, in order.

    Raises:
        ValueError: a name that is no column.
    """
    have = [str(column) for column in columns]
    plain = _STRING.sub("''", text)
    quoted = _QUOTED.findall(plain)
    names = [*quoted, *(m[0] for m in _NAME.finditer(_QUOTED.sub("0", plain)))]
    found = [name for name in names if name in have or not _KNOWN.fullmatch(name)]
    for name in found:
        if have.count(name) != 1:
            number = "no column" if name not in have else f"{have.count(name)} columns"
            raise ValueError(
                f"formula: {number} {name!r}; the data have: {', '.join(have)}"
                + nearest(name, have) * (name not in have)
            )
    return list(dict.fromkeys(found))


# -- computing -------------------------------------------------------------------------------------


def _prepared(columns: Sequence[Column], frame: pd.DataFrame, place: Place) -> pd.DataFrame:
    """The columns as formulaic takes them; whole numbers as such, so that C(year) has whole levels.

    Raises:
        ValueError: a value that a column cannot have, with its row.
    """
    made = {}
    for column in columns:
        values = column.values(frame[column.name], place)
        if column.kind == "number":
            exact = values.to_numpy() % 1 == 0
            values = values.astype("int64") if (exact & (values.abs() < 2**53)).all() else values
        made[column.name] = values
    return pd.DataFrame(made, index=range(len(frame)))


def _matrix(
    text: str, transforms: Mapping[str, Any], levels: Mapping[str, Any], frame: pd.DataFrame
) -> Any:
    import formulaic  # takes a second, which no one waits for without a formula
    from formulaic.errors import DataMismatchWarning, FormulaicError
    from formulaic.parser.types import Factor
    from formulaic.transforms import TRANSFORMS

    known = {name: getattr(np, name) for name in ("sqrt", "abs", "log1p", "expm1", "sin", "cos")}
    known |= {"factor": TRANSFORMS["C"]}  # as R calls it
    kind = Factor.Kind.CATEGORICAL
    try:
        with ALONE, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", DataMismatchWarning)
            spec = formulaic.ModelSpec(
                formulaic.Formula(text),
                transform_state=dict(transforms),
                encoder_state={f: (kind, {"categories": found}) for f, found in levels.items()},
                na_action="ignore",
                output="pandas",
            )
            return spec.get_model_matrix(frame, context=known)
    except DataMismatchWarning as error:
        raise ValueError(
            f"formula: {text} meets levels that the data learned from do not have; those have: "
            + "; ".join(f"{f}: {', '.join(map(str, found))}" for f, found in levels.items())
        ) from error
    except FormulaicError as error:
        said = re.sub(r"\x1b?\S?\[[\d;]+m\S?", "", str(error)).strip().splitlines()[0]
        raise ValueError(f"formula: {text!r} cannot be computed: {said}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        word = next((name for name in frame.columns if keyword.iskeyword(name)), "")
        remedy = f". Rename the column {word!r}, whose name is a word of Python" if word else ""
        raise ValueError(f"formula: {text!r} cannot be computed: {said}{remedy}") from error


def _shown(name: str) -> str:
    """A column's name without the sign of its coding: a[T.b] is a[b]."""
    return re.sub(r"\[[A-Z]\.", "[", str(name)).replace("`", "")


def _plain(value: Any) -> Any:
    """Numbers, texts and containers of Python's own, which can be written and read as literals."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
