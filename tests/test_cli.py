"""The command line, as a user meets it."""

from __future__ import annotations

import io
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import varmeta.cli as cli
import varmeta.settings as settings
from varmeta import CompletePooling, Density, Tasks
from varmeta.data import load
from varmeta.model_files import load_model, model_file
from varmeta.problems import Problem
from varmeta.settings import DEFAULT, choose

MODEL = """
import pyro, pyro.distributions as dist, torch

def county(x, y=None):
    a = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    b = pyro.sample("slope", dist.Normal(0.0, 5.0))
    s = pyro.sample("noise", dist.HalfNormal(5.0))
    with pyro.plate("homes", x.shape[-2]):
        return pyro.sample("log_radon", dist.Normal(a + b * x[..., 0], s), obs=y)

def broken(x, y=None):
    pyro.sample("a", dist.Normal(0.0, 1.0))

def misfit(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = a + x @ torch.ones(7, dtype=x.dtype)
    with pyro.plate("homes", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

def counts(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("homes", x.shape[-2]):
        return pyro.sample("y", dist.Poisson((a + 0 * x[..., 0]).exp()), obs=y)

class Net(torch.nn.Module):
    pass
"""
COLUMNS = ["--task", "county", "--inputs", "floor,log_uranium", "--target", "log_radon"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(MODEL)
    frame = load("radon")
    counties = frame["county"].unique()[:12]
    frame[frame["county"].isin(counties)].to_csv("radon.csv", index=False)
    rows = "county,floor,log_uranium,log_radon\nA,0,0,1\nB,0,0,2\nB,1,0,-3\n"
    (tmp_path / "counts.csv").write_text(rows)
    return tmp_path


def run(*arguments: str, command: str = "compare") -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [command, *arguments])
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
    predicted(workplace)


def predicted(workplace: Path) -> None:
    """What `varmeta predict` makes of the run in out/, and of mistakes."""
    frame = pd.read_csv("radon.csv").iloc[:4].astype({"log_radon": object})
    frame.loc[1:2, "log_radon"] = ""
    frame.to_csv("new.csv", index=False)
    command = ["out", "--data", "new.csv", "--strategy", "imaml", "--quantiles", "0.5"]
    code, output = run(*command, "--draws", "2", command="predict")
    assert code == 0 and "2 rows predicted by IMAML" in output, output
    found = pd.read_csv("predictions.csv")
    assert found["county"].tolist() == frame["county"].tolist()[1:3]
    own = ["known_by", *(f"log_radon.{n}" for n in ("mean", "sd", "q50", "draw[0]", "draw[1]"))]
    assert list(found)[len(frame.columns) :] == own
    wrong = {
        "'predictions.csv' is there": [*command],
        "out has no 'PyroNUTS'": ["out", "--data", "new.csv", "--strategy", "nuts", "--out", "p"],
        "gone.py', where the model was": [*command, "--model", "gone.py:county"],
        "holds no run": ["nowhere", "--data", "new.csv"],
        "is there; name another file": ["out", "--data", "new.csv", "--out", "new.csv"],
    }
    for said, arguments in wrong.items():
        code, output = run(*arguments, command="predict")
        assert code == 2 and said in output and "Traceback" not in output, output
    Path("other.py").write_text(MODEL.replace("def county", "def state"))
    frame["floor"] = ["0", "1", "ground", "0"]
    frame.to_csv("new.csv", index=False)
    code, output = run(*command, "--model", "other.py:state", "--overwrite", command="predict")
    assert code == 2 and "'ground' in line 4" in output, output
    assert list(pd.read_csv("predictions.csv")) == list(found)


def test_of_the_default_strategies_those_that_refuse_a_model_are_left_out() -> None:
    """And said to be, with the reason: a task of 201 coordinates is none for nested Laplace."""

    def wide(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(201), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)

    tasks = Tasks.from_list([(torch.zeros(3, 1), torch.zeros(3)) for _ in range(2)])
    console = Console(file=io.StringIO(), width=200)
    chosen = choose(DEFAULT.split(","))
    left = cli._able(console, dict(chosen), Problem(Density(wide, tasks), tasks, None))
    assert set(chosen) - set(left) == {"nested-laplace"}
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("nested-laplace is left out: a task has 201 coordinates, and")


def test_shipped_problem_without_held_out_rows(workplace: Path) -> None:
    code, output = run("eight_schools", "--strategies", "complete-pooling")
    assert code == 0, output
    assert Path("runs/eight_schools/table.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["radom"], ["no shipped problem 'radom'", "eight_schools, radon, sleepstudy"]),
        (["radon", "--strategies", "imaml,magic"], ["no strategy 'magic'", "imaml, maml"]),
        (["radon", "--set", "joint.q=round"], ["--set joint.q=round", "'diagonal'"]),
        (["radon", "--strategies", "complete-pooling", "--steps", "3"], ["--steps fits none"]),
        (["radon", "--config", "no.toml"], ["--config: no file 'no.toml'"]),
        (["radon", "--target", "x"], ["--target: goes with a model of your own", "leave it out"]),
        *(
            (["radon", option, value], [f"{option}: goes with a model of your own", "leave it out"])
            for option, value in (
                ("--inputs", "x"),
                ("--shared", "noise"),
                ("--query", "0.3"),
                ("--hold-out", "0"),
            )
        ),
        (["my_model.py:county"], ["--data is missing"]),
        (["my_model.py:county", "--data", "no.csv", *COLUMNS], ["--data: no file 'no.csv'"]),
        (["none.py:county", "--data", "radon.csv", *COLUMNS], ["no file 'none.py'"]),
        (
            ["my_model.py:town", "--data", "radon.csv", *COLUMNS],
            ["no model 'town'", "county, broken, misfit, counts, Net"],
        ),
        (["my_model.py:broken", "--data", "radon.csv", *COLUMNS], ["no observed site", "obs=y"]),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS[:3], "flor", *COLUMNS[4:]],
            ["inputs: no column 'flor'", "floor, log_uranium"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS[:5], "county"],
            ["target: column 'county' is the task too"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS, "--shared", "noize"],
            ["shared: no latent site 'noize'", "did you mean 'noise'?"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS, "--query", "1.5"],
            ["--query must lie between 0 and below 1, got 1.5"],
        ),
        (
            ["my_model.py:county", "--data", "radon.csv", *COLUMNS, "--hold-out", "12"],
            ["--hold-out must lie between 0 and 11, got 12"],
        ),
        (
            ["my_model.py:Net", "--data", "radon.csv", *COLUMNS],
            ["'Net' is a class; name an object of it: write model = Net()"],
        ),
        (
            ["my_model.py:counts", "--data", "counts.csv", *COLUMNS],
            ["task 'B', line 4: the observed site 'y' gets -3, and its law, Poisson, wants whole"],
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


@dataclass(frozen=True)
class Ill(CompletePooling):
    """Fails in its only step, unless it is told that all is well."""

    well: bool = False

    def step(self, *arguments: Any) -> Any:
        if not self.well and not Path("medicine").exists():
            raise RuntimeError("a pain in [/bold] places. Lie down")
        return super().step(*arguments)


@pytest.fixture
def ill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.STRATEGIES, "ill", Ill)


@pytest.mark.usefixtures("ill")
def test_a_strategy_that_fails_is_a_row_and_exit_status_1(workplace: Path) -> None:
    command = ["eight_schools", "--strategies", "ill,complete-pooling", "--out", "out"]
    code, output = run(*command)
    assert code == 1, output
    assert "Ill failed: step 0: RuntimeError: a pain in [/bold] places" in output
    assert "1 of 2 strategies failed: Ill." in output and "out/failures/" in output
    assert "Traceback" not in output and "Files in out/: CompletePooling.nc" in output
    assert "Traceback" in Path("out/failures/Ill.txt").read_text()
    assert pd.read_csv("out/table.csv")["failed"].notna().tolist() == [True, False]
    code, output = run(*command, "--debug")
    assert code == 1 and "Traceback" in output
    Path("medicine").touch()
    code, output = run(*command)
    assert code == 0 and "failed" not in output and not Path("out/failures").exists()
    code, output = run(*command)
    assert code == 2 and "finished run" in output


@pytest.mark.usefixtures("ill")
def test_all_strategies_fail(workplace: Path) -> None:
    code, output = run("eight_schools", "--strategies", "ill", "--out", "out")
    assert code == 1 and "All strategies failed: Ill." in output
    assert Path("out/table.csv").exists()


@pytest.mark.usefixtures("ill")
def test_settings_reach_the_strategies_and_are_printed(workplace: Path) -> None:
    Path("my.toml").write_text(
        "['[/x]']\nstrategy = 'ill'\nwell = true\n[complete-pooling]\ndraws = 30\n"
    )
    command = ["eight_schools", "--strategies", "ill,complete-pooling", "--out", "out"]
    code, output = run(*command, "--config", "my.toml", "--set", "ill.well=True")
    assert code == 0, output
    for line in ("ill: Ill(well=True)", "[/x]: Ill(well=True)", "CompletePooling(draws=30)"):
        assert line in output
    assert pd.read_csv("out/table.csv")["strategy"].tolist() == ["ill", "CompletePooling", "[/x]"]


def test_an_error_of_the_user_is_shown_with_the_line(workplace: Path) -> None:
    number = 1 + MODEL[: MODEL.index("    mean = a + x @")].count("\n")
    for data in (["--data", "radon.csv"], ["--data", "radon.csv", "--debug"]):
        code, output = run("my_model.py:misfit", *data, *COLUMNS)
        assert code == 2 and "RuntimeError: size mismatch" in output
        assert (
            f"(my_model.py, line {number}: mean = a + x @ torch.ones(7, dtype=x.dtype))" in output
        )
        assert ("Traceback" in output) == ("--debug" in data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise KeyError('[/x]')\n", "KeyError: '[/x]' (bad.py, line 2: raise KeyError"),
        ("def county(x, y=None)\n", "SyntaxError: expected ':' (bad.py, line 1: def county("),
        ("import nowhere_to_be_found\n", "No module named 'nowhere_to_be_found' (bad.py, line 1"),
        ("import sys\nsys.exit(0)\n", "bad.py ended the program when it was loaded"),
    ],
)
def test_a_model_file_that_cannot_be_read(workplace: Path, text: str, said: str) -> None:
    Path("bad.py").write_text(text)
    code, output = run("bad.py:county", "--data", "radon.csv", *COLUMNS)
    assert (
        code == 2 and said in output and "Traceback" not in output and "site-packages" not in output
    )


FUTURE = """
from __future__ import annotations
from dataclasses import dataclass
import pyro, pyro.distributions as dist
import neighbour

@dataclass
class Settings:
    scale: float = neighbour.SCALE

def county(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, Settings().scale))
    with pyro.plate("homes", x.shape[-2]):
        return pyro.sample("y", dist.Normal(a, 1.0), obs=y)
"""


@pytest.mark.parametrize("name", ["my_model", "pyro", "random"])
def test_a_model_file_is_a_module_that_may_import_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever its own name is; then the path and the modules are as they were."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    scales = []
    for folder, scale in (("one", 2.0), ("two", 3.0)):
        Path(folder).mkdir()
        Path(folder, f"{name}.py").write_text(FUTURE)
        Path(folder, "neighbour.py").write_text(f"SCALE = {scale}\n")
        model = load_model(Path(folder, f"{name}.py"), "county")
        pairs = [(torch.ones(3, 1), torch.ones(3))] * 2
        scales.append(float(Density(model, Tasks.from_list(pairs)).prior_scale))
    assert scales == [2.0, 3.0]
    assert sys.path == path and not [m for m in set(sys.modules) - modules if "neighb" in m]
    assert not [m for m in set(sys.modules) - modules if m.startswith("varmeta_model_")]


def test_a_model_may_import_its_neighbours_when_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no library that is imported meanwhile is taken from its folder."""
    monkeypatch.chdir(tmp_path)
    Path("one").mkdir()
    body = "    import neighbour\n    a = pyro.sample('a', dist.Normal(0.0, neighbour.SCALE))\n"
    plate = "    with pyro.plate('rows', x.shape[-2]):\n"
    law = "        pyro.sample('y', dist.Normal(a, 1.0), obs=y)\n"
    head = "import pyro, pyro.distributions as dist\ndef late(x, y=None):\n"
    Path("one", "mine.py").write_text(head + body + plate + law)
    Path("one", "neighbour.py").write_text("SCALE = 3.0\n")
    Path("one", "wave.py").write_text("raise ImportError('not the library')\n")
    path, modules = list(sys.path), set(sys.modules)
    with model_file(Path("one", "mine.py"), "late") as model:
        import wave

        assert hasattr(wave, "open")
        pairs = [(torch.ones(3, 1), torch.ones(3))] * 2
        assert float(Density(model, Tasks.from_list(pairs)).prior_scale) == 3.0
    assert sys.path == path and "neighbour" not in set(sys.modules) - modules


def test_a_table_with_texts_is_read_and_said(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tasks] = {}

    def stop(_: Any, density: Density, train: Tasks, *rest: Any, **__: Any) -> None:
        seen["train"] = train
        raise ValueError("enough")

    monkeypatch.setattr(cli, "run_comparison", stop)
    Path("mine.csv").write_text(
        "county;floor;held;log_radon\n"
        + "".join(f"{c};{f};{h};1,{k}5\n" for k, (c, f, h) in enumerate(
            [("A", "low", 0), ("A", "top", 1), ("B", "low", 0), ("B", "", 1), ("B", "low", 1)]))
    )  # fmt: skip
    command = ["my_model.py:county", "--data", "mine.csv", "--task", "county"]
    command += ["--inputs", "floor", "--target", "log_radon", "--query", "held"]
    code, output = run(*command)
    assert code == 2 and "'floor' holds '' in line 5" in output and "--missing drop" in output
    code, output = run(*command, "--missing", "drop")
    assert "floor: indicators of top, beside low" in output and "enough" in output
    train = seen["train"]
    assert train.input_names == ("floor[top]",) and len(train) == 2  # none is held out whole
    assert train.is_query[train.mask].tolist() == [False, True, False, True]
    assert train.targets[0].tolist() == [1.05, 1.15]
    code, output = run(*command, "--missing", "fill")
    assert "--missing must be error or drop, got 'fill'" in output
    code, output = run(*[*command[:-1], "hold"])
    assert "query: no column 'hold'" in output
    code, output = run("log_radon ~ (1 | county)", "--data", "mine.csv", "--task", "county")
    assert "--task: a formula says it; leave it out" in output
    code, output = run(*command, "--family", "normal")
    assert "--family: goes with a formula, and the model file has its own law" in output


def test_what_nobody_expected(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*_: object, **__: object) -> None:
        raise ZeroDivisionError("[/x] by zero")

    monkeypatch.setattr(cli, "run_comparison", surprise)
    monkeypatch.setattr("varmeta.failures.own_line", lambda error: None)
    monkeypatch.setattr(cli, "own_line", lambda error: None)
    code, output = run("eight_schools")
    assert code == 2 and "Error: ZeroDivisionError: [/x] by zero" in output
    assert "Run again with --debug for the traceback." in output and "Traceback" not in output
    code, output = run("eight_schools", "--debug")
    assert code == 2 and "Traceback" in output


def test_warnings_are_sentences(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: object, **__: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("[/x] looks odd", RuntimeWarning, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(cli, "run_comparison", warned)
    shown = warnings.showwarning
    code, output = run("eight_schools")
    assert code == 2 and "Warning: [/x] looks odd" in output and "RuntimeWarning" not in output
    assert warnings.showwarning is shown


def test_interrupt_says_how_to_go_on(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("stopped after step 3 of 9")

    monkeypatch.setattr(cli, "run_comparison", stop)
    code, output = run("eight_schools")
    assert code == 130 and "stopped after step 3 of 9" in output and "The same command" in output


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and re.match(r"varmeta \d+\.\d+", result.output)
