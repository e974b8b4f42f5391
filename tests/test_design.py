"""Columns of tables become numbers, always in the same way, or the value that cannot is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from varmeta import Design, Tasks
from varmeta.raw_data import Table

USES: dict[str, Any] = {"task": "g", "target": "y"}


def frame(**columns: Any) -> pd.DataFrame:
    size = len(next(iter(columns.values())))
    return pd.DataFrame({"g": ["a", "b"] * (size // 2) + ["a"] * (size % 2), **columns}).assign(
        y=lambda f: np.arange(len(f), dtype=float)
    )


def made(table: pd.DataFrame, inputs: list[str], **options: Any) -> Tasks:
    return Tasks.from_frame(table, inputs=inputs, **USES, **options)


def matrix(tasks: Tasks) -> list[list[float]]:
    """The inputs in the order of the table."""
    assert tasks.row_ids is not None
    ids, rows = tasks.row_ids[tasks.mask], tasks.inputs[tasks.mask]
    return rows[ids.argsort()].tolist()


CODED: dict[str, tuple[Any, tuple[str, ...], list[list[float]]]] = {
    "texts": (["sand", "clay", " sand"], ("c[sand]",), [[1], [0], [1]]),
    "three texts": (["b", "c", "a"], ("c[b]", "c[c]"), [[1, 0], [0, 1], [0, 0]]),
    "a level called none": (["none", "some", "none"], ("c[some]",), [[0], [1], [0]]),
    "ranges": (["18-25", "26+", "18-25"], ("c[26+]",), [[0], [1], [0]]),
    "booleans": ([True, False, True], ("c",), [[1], [0], [1]]),
    "truths as text": (["true", "FALSE", "True"], ("c",), [[1], [0], [1]]),
    "an ordered category": (
        pd.Categorical(["mid", "low", "top"], ["low", "mid", "high", "top"], ordered=True),
        ("c[mid]", "c[top]"),  # no row is high
        [[1, 0], [0, 0], [0, 1]],
    ),
    "dates": (pd.to_datetime(["2020-03-01", "2020-02-28", "2020-02-29"]), ("c",), [[2], [0], [1]]),
    "dates as text": (["2020-01-02", "2020-01-01 12:00", "2020-01-01"], ("c",), [[1], [0.5], [0]]),
    "dates in time zones": (
        ["2020-01-02T00:00+02:00", "2020-01-01T22:00Z", "2020-01-02T00:00Z"],
        ("c",),
        [[0], [0], [2 / 24]],
    ),
}


@pytest.mark.parametrize("case", CODED)
def test_a_column_is_coded_and_another_table_the_same(case: str, tmp_path: Path) -> None:
    values, names, wanted = CODED[case]
    table = frame(c=values)
    tasks = made(table, ["c"])
    assert tasks.input_names == names and tasks.inputs.dtype == torch.float64
    np.testing.assert_allclose(matrix(tasks), wanted, rtol=0, atol=1e-12)
    assert tasks.design is not None
    kept = Design.from_json(json.loads(json.dumps(tasks.design.to_json())))
    assert kept == tasks.design
    for k in range(3):  # a row by itself has not all levels, nor the first date
        alone = Tasks.from_frame(table.iloc[[k]], design=kept)
        np.testing.assert_allclose(matrix(alone), wanted[k : k + 1], rtol=0, atol=1e-12)
    if not isinstance(values, pd.Categorical):  # whose order no file keeps
        table.to_csv(tmp_path / "t.csv", index=False)
        read = Tasks.from_csv(tmp_path / "t.csv", inputs=["c"], **USES)
        assert torch.equal(read.inputs, tasks.inputs) and read.input_names == names
        again = Tasks.from_csv(tmp_path / "t.csv", design=kept)
        assert torch.equal(again.inputs, tasks.inputs)


def test_numbers_are_levels_where_it_is_said() -> None:
    tasks = made(frame(c=[10, 9, 10, 8], x=[1.0, 2, 3, 4]), ["C(c)", "x"])
    assert tasks.input_names == ("c[9]", "c[10]", "x")
    assert matrix(tasks) == [[0, 1, 1], [1, 0, 2], [0, 1, 3], [0, 0, 4]]
    as_floats = Tasks.from_frame(frame(c=[9.0], x=[0]), design=tasks.design)
    assert matrix(as_floats) == [[1, 0, 0]], "9 and 9.0 are one level"


def test_whole_numbers_and_levels_stay_so_where_it_is_asked() -> None:
    table = frame(word=["to", "be", "to"], k=[3, 4, 5])
    for integers, kinds in (
        (["inputs"], (torch.int64, torch.float64)),
        (["inputs", "target"], (torch.int64, torch.int64)),
        ("target", (torch.float64, torch.int64)),
    ):
        tasks = made(table, ["word", "k"], integers=integers)
        assert (tasks.inputs.dtype, tasks.targets.dtype) == kinds
    tasks = made(table, ["word", "k"], integers=["inputs"])
    assert tasks.input_names == ("word", "k") and matrix(tasks) == [[1, 3], [0, 4], [1, 5]]
    classes = Tasks.from_frame(table, task="g", inputs=["k"], target="word", integers=["target"])
    assert classes.targets[classes.mask].tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"int64 cannot hold 0.5, of column 'k' in row 0"):
        made(frame(k=[0.5, 1]), ["k"], integers=["inputs"])


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (["1", "2", "3+"], "'c' holds '3.' in row 2, which is no number"),
        (["1,5", "2,5", "3,5"], "'c' holds '1,5' in row 0, .* decimal point"),
        (["5%", "6%", "7%"], "'c' holds '5%' in row 0, which is no number"),
        (["2020-01-01", "2020-13-01", "soon"], "'2020-13-01' in row 1, which is no date .2 rows"),
        (["a", "a", "a"], "'c' has one level only, 'a'"),
        (["a", None, "b"], "'c' holds .* in row 1, which is a missing value"),
        ([True, None, False], "'c' holds None in row 1, which is a missing value"),
        ([f"name {k}" for k in range(30)], "30 different texts, .* insist with C.c."),
        ([1j, 2, 3], "'c' holds .*1j.* in row 0, which is no number"),
    ],
)
def test_a_column_that_cannot_be_is_refused(column: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(frame(c=column), ["c"])


def test_a_level_that_was_not_seen_is_named() -> None:
    design = made(frame(c=["a", "b", "a"]), ["c"]).design
    new = frame(c=["a", "z", "q"])
    with pytest.raises(ValueError, match=r"'c' holds 'z' in row 1, a level .*\(2 such .*: a, b\."):
        Tasks.from_frame(new, design=design)
    with pytest.raises(ValueError, match="design names the columns; leave task out"):
        Tasks.from_frame(new, design=design, task="g")
    with pytest.raises(ValueError, match="inputs is missing; name its column, or give a design"):
        Tasks.from_frame(new, task="g", target="y")


def test_targets_are_optional_where_rows_are_to_be_predicted() -> None:
    design = made(frame(c=["a", "b", "a"]), ["c"]).design
    assert design is not None
    table = frame(c=["b", "a", "b"]).assign(y=["1", "", "NA"])
    rows = design.read(Table.of(table), optional_target=True)
    assert rows.is_query is not None and rows.is_query.tolist() == [False, True, True]
    assert rows.targets.tolist() == [1, 0, 0] and rows.inputs[:, 0].tolist() == [1, 0, 1]
    bare = design.read(Table.of(table.drop(columns="y")), optional_target=True)
    assert bare.is_query is not None and bare.is_query.all()
    with pytest.raises(ValueError, match="data: no column 'y'"):
        design.read(Table.of(table.drop(columns="y")))


def test_incomplete_rows_are_named_or_dropped(caplog: pytest.LogCaptureFixture) -> None:
    table = frame(x=[1, None, 3, 4, 5], c=["a", "b", "NA", "b", "a"])
    with pytest.raises(ValueError, match=r"'x' holds nan in row 1, .*missing='drop'"):
        made(table, ["x", "c"])
    tasks = made(table, ["x", "c"], missing="drop")
    assert tasks.row_ids is not None
    assert sorted(tasks.row_ids[tasks.mask].tolist()) == [0, 3, 4]
    assert tasks.input_names == ("x", "c[b]")
    said = "2 of 5 rows are left out, since a value is missing: 'x' in 1 (row 1); 'c' in 1 (row 2)"
    assert caplog.messages[-1] == said
    with pytest.raises(ValueError, match="all 2 rows have a missing value: 'x' in 2; none is left"):
        made(frame(x=["", "NA"]), ["x"], missing="drop")
    with pytest.raises(ValueError, match="missing must be 'error' or 'drop', got 'fill'"):
        made(table, ["x"], missing="fill")


def test_query_rows_are_those_that_a_column_or_masks_name() -> None:
    table = frame(x=[1.0, 2, 3, 4, 5], test=[0, 1, 1, 0, 0])
    tasks = made(table, ["x"], query="test")
    assert tasks.is_split and tasks.row_ids is not None
    assert tasks.query.inputs[tasks.query.mask].flatten().tolist() == [3, 2]
    masks = [[False, True, False], [True, False]]  # of a: rows 0, 2, 4; of b: rows 1, 3
    plain = made(table, ["x"])
    for given in (masks, [torch.tensor(m) for m in masks], tasks.is_query):
        assert torch.equal(plain.split(given).is_query, tasks.is_query)
    assert torch.equal(made(table.assign(test=table["test"] > 0), ["x"], query="test").is_query,
                       tasks.is_query)  # fmt: skip
    with pytest.raises(ValueError, match="query: column 'x' holds 2 in row 1; wanted 1"):
        made(table, [], query="x")
    with pytest.raises(ValueError, match="query: column 'y' is the target too"):
        made(table, ["x"], query="y")
    with pytest.raises(ValueError, match=r"mask of task 'b' has shape \(3,\) .* wanted 2 truths"):
        plain.split([masks[0], masks[0]])
    with pytest.raises(ValueError, match="wanted a share, or 2 masks, one a task; got 1"):
        plain.split(masks[:1])
