"""The command line, as a user meets it."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import varmeta.cli as cli
from varmeta.data import load

MODEL = """
import pyro, pyro.distributions as dist

def county(x, y=None):
    a = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    b = pyro.sample("slope", dist.Normal(0.0, 5.0))
    s = pyro.sample("noise", dist.HalfNormal(5.0))
    with pyro.plate("homes", x.shape[-2]):
        return pyro.sample("log_radon", dist.Normal(a + b * x[..., 0], s), obs=y)

def broken(x, y=None):
    pyro.sample("a", dist.Normal(0.0, 1.0))
"""
COLUMNS = ["--task", "county", "--inputs", "floor,log_uranium", "--target", "log_radon"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(MODEL)
    frame = load("radon")
    counties = frame["county"].unique()[:12]
    frame[frame["county"].isin(counties)].to_csv("radon.csv", index=False)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["compare", *arguments])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_own_model_and_data(workplace: Path) -> None:
    command = ["my_model.py:county", "--data", "radon.csv", *COLUMNS, "--shared", "noise"]
    command += ["--strategies", "complete-pooling,imaml", "--hold-out", "3", "--out", "out"]
    code, output = run(*command)
    assert code == 0, output
    assert "known tasks" in output and "new tasks" in output and "Files in out/" in output
    table = pd.read_csv("out/table.csv")
    assert set(table["strategy"]) == {"CompletePooling", "IMAML"}
    assert Path("out/IMAML.nc").exists()
    code, output = run(*command)
    assert code == 2 and "holds a finished run" in output and "--overwrite" in output


def test_shipped_problem_without_held_out_rows(workplace: Path) -> None:
    code, output = run("eight_schools", "--strategies", "complete-pooling")
    assert code == 0, output
    assert Path("runs/eight_schools/table.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["radom"], ["no shipped problem 'radom'", "eight_schools, radon, sleepstudy"]),
        (["radon", "--strategies", "imaml,magic"], ["no strategy 'magic'", "imaml, maml"]),
        (["radon", "--target", "x"], ["--target goes with a model of your own"]),
        (["my_model.py:county"], ["--data is missing"]),
        (["my_model.py:county", "--data", "no.csv", *COLUMNS], ["--data: no file 'no.csv'"]),
        (["none.py:county", "--data", "radon.csv", *COLUMNS], ["no file 'none.py'"]),
        (
            ["my_model.py:town", "--data", "radon.csv", *COLUMNS],
            ["no model 'town'", "county, broken"],
        ),
        (["my_model.py:broken", "--data", "radon.csv", *COLUMNS], ["no observed site", "obs=y"]),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS[:3], "flor", *COLUMNS[4:]],
            ["inputs: no column 'flor'", "floor, log_uranium"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS[:5], "county"],
            ["'county' is not numeric"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS, "--shared", "noize"],
            ["shared: no latent site 'noize'", "noise"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS, "--query", "1.5"],
            ["query must lie strictly between 0 and 1, got 1.5"],
        ),
    ],
)
def test_bad_input(workplace: Path, arguments: list[str], pieces: list[str]) -> None:
    code, output = run(*arguments)
    assert code == 2, output
    assert "Traceback" not in output
    for piece in pieces:
        assert piece in output
    assert not Path("runs").exists()


def test_interrupt_says_how_to_go_on(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("stopped after step 3 of 9")

    monkeypatch.setattr(cli, "run_comparison", stop)
    code, output = run("eight_schools")
    assert code == 130 and "stopped after step 3 of 9" in output and "The same command" in output


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and re.match(r"varmeta \d+\.\d+", result.output)
