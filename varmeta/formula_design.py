"""A formula's design: which of its columns vary by group, and which are left for all groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch

from varmeta.columns import Column, Columns, Place
from varmeta.design import NUMBERS, Beside, Coding, Design
from varmeta.formula import INTERCEPT, Formula, Matrix
from varmeta.raw_data import Missing, Table, check_columns

Response = Literal["number", "classes", "two"]


def of_formula(
    table: Table,
    formula: Formula,
    *,
    response: Response = "number",
    query: str = "",
    dtype: torch.dtype = torch.float64,
    missing: Missing = "error",
) -> tuple[Design, tuple[str, ...], tuple[str, ...]]:
    """A design learned from a table, with the names of the terms that vary and of those that don't.

    Both may hold `Intercept`, which is no column of the inputs: these are the terms that vary, the
    others, and the offset, the trials and the weights, where there are some.

    Args:
        table: the rows.
        formula: what to make of them.
        response: `"number"`; `"classes"`, numbered from 0 in the order of its levels; or `"two"`,
            a truth or one of two levels, of which the second is 1.
        query: see `Design`.
        dtype: see `Design`.
        missing: see `Design.read`.

    Raises:
        ValueError: a name that is no column, terms that vary without a mean of their own, columns
            that are combinations of others, or a value that cannot be.
    """
    needs = formula.needs(table.frame)
    uses = {"formula": needs} | ({"query": (query,)} if query else {})
    check_columns(table.frame, uses, apart=False)
    table, _ = table.complete(needs[len(formula.group) :], missing, formula.group)
    frame, place = table.frame, table.place
    fixed = Matrix.learn(formula.fixed, frame, place)
    parts = [fixed, *(Matrix.learn(text, frame, place) for text in formula.varying)]
    own: dict[str, int] = {}
    for k, part in enumerate(parts[1:], 1):
        for name in part.names:
            own.setdefault(name, k)
    vary = Beside(tuple(parts), tuple((k, name, name) for name, k in own.items()))
    rest = _not_spanned(
        formula, vary.names, fixed.names, vary.encode(frame, place), fixed.encode(frame, place)
    )
    take = [each for each in vary.take if each[1] != INTERCEPT]
    take += [(0, name, name) for name in rest if name != INTERCEPT]
    terms = [f"({term})" for term in formula.offsets]
    terms += [f"log({formula.beside['rate']})"] if "rate" in formula.beside else []
    beside = {"offset": " + ".join(terms)} if terms else {}
    beside |= {k: formula.beside[k] for k in ("trials", "weights") if k in formula.beside}
    for name, expression in beside.items():
        parts.append(Matrix.of_expression(expression, frame, place))
        take.append((len(parts) - 1, parts[-1].names[0], f"{name}({expression})"))
    aim = formula.response.strip("` ")
    target: Coding
    if aim in frame:
        target = Columns((_response(frame[aim], place, response),))
    elif response == "classes":
        raise ValueError(
            f"formula: the response {aim!r} is an expression; for classes name a column"
        )
    else:
        target = Matrix.of_expression(formula.response, frame, place)
    whole = ("target",) * (response == "classes")
    kind = str(dtype).removeprefix("torch.")
    design = Design(formula.group, Beside(tuple(parts), tuple(take)), target, query, kind, whole)
    return design, vary.names, rest


def _response(column: pd.Series, place: Place, response: Response) -> Column:
    if response == "classes":
        return Column.learn(column, place, as_levels=True, coded=True)
    if response == "number":
        return Column.learn(column, place, allowed=NUMBERS)
    found = Column.learn(column, place, coded=True, allowed=(*NUMBERS, "levels"))
    if found.kind == "levels" and len(found.levels) != 2:
        raise ValueError(
            f"column {found.name!r} has {len(found.levels)} levels ({', '.join(found.levels)}); "
            "wanted two, or 0 and 1"
        )
    return found


def _not_spanned(
    formula: Formula,
    vary: Sequence[str],
    fixed: Sequence[str],
    varying: np.ndarray,
    means: np.ndarray,
) -> tuple[str, ...]:
    """The population's columns that are left once those that vary have their means.

    η = F β + V u_i with u_i around 0 is V θ_i + (the rest) φ with θ_i around their means, if the
    columns V are combinations of F.
    """
    nothing = np.empty((len(means), 0))
    for text, names, values in (
        (formula.fixed, fixed, means),
        (" and ".join(formula.varying), vary, varying),
    ):
        clash = _first_dependent(nothing, values)
        if clash is not None:
            raise ValueError(
                f"formula: {names[clash]} is a combination of the other columns of {text!r} in "
                "these data; leave it out"
            )
    group = ":".join(formula.group)
    for k, name in enumerate(vary):
        if _first_dependent(means, varying[:, [k]]) is None:
            raise ValueError(
                f"formula: {name} varies by {group} around a mean that is learned, as R's formulas "
                f"have it with + {'1' if name == INTERCEPT else name} among the other terms too; "
                f"add it there, outside of (… | {group})"
            )
    left, base = [], varying
    for k, name in enumerate(fixed):
        if name not in vary and _first_dependent(base, means[:, [k]]) is None:
            left.append(name)
            base = np.concatenate([base, means[:, [k]]], axis=1)
    return tuple(left)


def _first_dependent(base: np.ndarray, columns: np.ndarray) -> int | None:
    """The first of `columns` that `base` and those before it span, up to rounding."""
    known = np.linalg.qr(base / np.maximum(np.linalg.norm(base, axis=0), 1e-300))[0]
    for k, column in enumerate(columns.T):
        size = np.linalg.norm(column)
        left = column - known @ (known.T @ column)
        left = left - known @ (known.T @ left)  # once more, against rounding
        if np.linalg.norm(left) <= 1e-9 * size or size == 0:
            return k
        known = np.concatenate([known, (left / np.linalg.norm(left))[:, None]], axis=1)
    return None
