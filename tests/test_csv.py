"""What a CSV file may be, and what is said of one that is not."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from varmeta.tasks import Tasks

GOOD = "g,x,y\na,1,2\na,2,3\nb,3,4\n"


def read(tmp_path: Path, text: str | bytes, **changes: Any) -> Tasks:
    path = tmp_path / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Tasks.from_csv(path, **({"task": "g", "inputs": ["x"], "target": "y"} | changes))


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.encode("utf-8-sig"),
        GOOD.encode("utf-16"),
        GOOD.encode("utf-32"),
        gzip.compress(GOOD.encode(), mtime=0),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        GOOD.replace(",", " , "),
        GOOD.replace("\n", "\n\n"),
        "z,g,x,y\nq,a,1,2\n,a,2,3\nNA,b,3,4\n",
        *(GOOD.replace(",", mark) for mark in ";\t|"),
        ("\ufeff" + GOOD.replace(",", ";")).encode("utf-16"),
        '"weight, kg";g;x;y\n1;a;1;2\n1;a;2;3\n1;b;3;4\n',
    ],
)
def test_files_that_are_read(tmp_path: Path, text: str | bytes) -> None:
    tasks = read(tmp_path, text)
    assert [name.strip() for name in tasks.names] == ["a", "b"]
    assert tasks.inputs[tasks.mask].flatten().tolist() == [1, 2, 3]
    assert tasks.targets[tasks.mask].tolist() == [2, 3, 4]


def test_numbers_are_read_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(2000) * 10.0 ** rng.integers(-30, 30, 2000)
    text = pd.DataFrame({"g": 1, "x": 0, "y": values}).to_csv(index=False)
    assert torch.equal(read(tmp_path, text).targets[0], torch.as_tensor(values))


def test_truths_and_long_names(tmp_path: Path) -> None:
    assert read(tmp_path, "g,x,y\na,1,True\na,2,false\n").targets.tolist() == [[1.0, 0.0]]
    long = "12345678901234567890", "12345678901234567891"
    assert read(tmp_path, f"g,x,y\n{long[0]},1,1\n{long[1]},2,2\n").names == long


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (("1,5", "-2,25", "3"), [1.5, -2.25, 3.0]),  # decimal commas
        (("1.234,5", "2,5", "12.345.678"), [1234.5, 2.5, 12345678.0]),  # and points of thousands
        (("0,125", "1,250", "7,5e-3"), [0.125, 1.25, 0.0075]),  # 1,250 as the others are
        (("0,5", "0,125", "12.345,75"), [0.5, 0.125, 12345.75]),
        (("1.5", "2.25", "1.234"), [1.5, 2.25, 1.234]),  # decimal points
    ],
)
def test_decimal_commas_beside_semicolons(
    tmp_path: Path, cells: tuple[str, ...], numbers: list[float]
) -> None:
    text = "g;x;y\n" + "".join(f"a,1;{cell};0.12{k}\n" for k, cell in enumerate(cells))
    tasks = read(tmp_path, text + "b;0;0\n")
    assert tasks.targets[0].tolist() == [0.12, 0.121, 0.122], "no thousand begins with 0"
    assert tasks.inputs[0, :, 0].tolist() == numbers
    assert tasks.names == ("a,1", "b")  # which is no number


def cell(value: str) -> str:
    return GOOD + f'b,5,"{value}"\nb,6,7\n'


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("", {}, "is empty; wanted a line of column names"),
        ("\n \n", {}, "is empty; wanted a line of column names"),
        ("g,x,y\n", {}, "no rows below its first line, 'g, x, y'"),
        (
            GOOD.replace("a", "é").encode("latin-1"),
            {},
            r"not written in UTF-8: line 2 .* 0xe9",
        ),
        (GOOD.encode("utf-16-le"), {}, "NUL characters .* save it as UTF-8"),
        (b"\x1f\x8bnothing", {}, "packed by gzip and broken"),
        (GOOD.replace(",", ";") + "b;1;2;3\n", {}, "no CSV file: Expected 3 .*separated by ';'"),
        ("g;x;y\na;1,234;1\na;2,345;2\n", {}, "'x' holds '1,234' in line 2, which may be"),
        ("g;x;y\na;1.234;1,5\na;12.345;2\n", {}, "'x' holds '1.234' in line 2, which may be"),
        ("g;x;y\na;1.5;1,5\na;2;2,5\nb;3;1'000,5\n", {}, "'y' holds '1,5' .* decimal point"),
        (
            GOOD + "b,1,2,3\n",
            {},
            "no CSV file: Expected 3 fields in line 5, saw 4. Give",
        ),
        (GOOD + 'b,"1,2\n', {}, "no CSV file: EOF inside string"),
        ("a,1,2\nb,2,3\n", {}, "task: no column 'g'; the data have: a, 1, 2"),
        (GOOD, {"target": "z"}, "target: no column 'z'; the data have: g, x, y"),
        (GOOD.replace("y", "x"), {"target": "x", "inputs": []}, "target: 2 columns 'x'"),
        (GOOD, {"inputs": ["x", "y"]}, "inputs: column 'y' is the target too; give each"),
        (GOOD, {"inputs": ["x", "g"]}, "inputs: column 'g' is the task too; give each"),
        (GOOD, {"target": "g"}, "target: column 'g' is the task too"),
        (GOOD, {"inputs": ["x", "x"]}, "inputs: column 'x' is named twice"),
        (GOOD + "b,5\n", {}, "'y' holds '' in line 5, which is a missing value; drop or fill"),
        (GOOD + ",5,6\n", {}, "task: column 'g' is empty in line 5"),
        (GOOD + " a,5,6\n", {}, "task: column 'g' holds both 'a' and ' a'; .* in one way"),
        (GOOD + "\nb,5,q\n", {}, "'y' holds 'q' in row 3, which is no number"),
        *(
            (cell(value), {}, f"'y' holds '{value}' in line 5, which is {what}; {remedy}")
            for value, what, remedy in (
                ("", "a missing value", "drop or fill"),
                ("NA", "a missing value", "drop or fill"),
                ("-", "a missing value", "drop or fill"),
                ("nan", "a missing value", "drop or fill"),
                ("inf", "infinite", "drop or fill"),
                ("1e400", "infinite", "drop or fill"),
                ("3,5", "no number", "write numbers with a decimal point"),
                ("1,234.5", "no number", "write .* no separators of thousands"),
                ("1 234", "no number", "write .* no separators of thousands"),
                ("2020-01-01", "no number", "encode it as numbers"),
                ("True", "no number", "encode it as numbers"),
                ("high", "no number", "encode it as numbers"),
            )
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: Any, changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, text, **changes)


def test_no_file(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "no.csv", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=f"path: .* {said}; give a CSV file"):
            Tasks.from_csv(path, task="g", inputs=[], target="y")


@pytest.mark.parametrize(
    ("columns", "dtype", "said"),
    [
        ({"g": [1, "1"], "y": [1, 2]}, torch.float64, "'g' holds both 1 and '1'"),
        ({"g": [2.0**53, 1.0], "y": [1, 2]}, torch.float64, "as a float, .* read .* as text"),
        ({"g": [1, 2], "y": [1j, 2]}, torch.float64, "'y' holds 1j in row 0, which is no number"),
        ({"g": [1, 2], "y": [pd.Timedelta(1)] * 2}, torch.float64, "'y' holds 0 days.* no number"),
        (
            {"g": [1, 2], "y": pd.array([1, None], "Int64")},
            torch.float64,
            "<NA> in row 1.*missing",
        ),
        ({"g": [1, 2], "y": [1.0, 1e300]}, torch.float32, "dtype: torch.float32 cannot hold 1e"),
        ({"g": [1, 2], "y": [1.0, 0.5]}, torch.int64, "torch.int64 cannot hold 0.5, .* in row 1"),
    ],
)
def test_frames_that_are_refused(columns: Any, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tasks.from_frame(pd.DataFrame(columns), task="g", inputs=[], target="y", dtype=dtype)
