"""The shell commands of README.md and docs/, run as written (Sybil runs their Python blocks)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from varmeta.cli import app
from varmeta.data import load

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
COMMANDS = {
    command.replace("\\\n", " "): page
    for page, text in PAGES.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for command in re.findall(r"^((?:.*\\\n)*.+)$", block, re.M)
}

SMALL = {  # the options that make an example small, and what it then says
    "against_nuts.py": ("--problem eight_schools --draws 10 --chains 2 --steps 5", "worst R-hat"),
    "does_it_pay.py": (
        "--seeds 1 --steps 2 --settings phases --arms location;Pathwise",
        "location",
    ),
    "joint_or_not.py": ("--seeds 2 --steps 12 --adapt 10 --problems radon", "amortised"),
    "mode_connectivity.py": (
        "--problems spirals --widths 4 --tasks 2 --train 20 --steps 5",
        "two parabolas",
    ),
    "shrinkage.py": (
        "--seeds 1 --steps 1 --small --problems linear --parts recovery",
        "PriorDominated",
    ),
    "sinusoids.py": ("--steps 3 --tasks 4", "adapted"),
    "which_coefficients.py": (
        "--problem sleepstudy --draws 5 --chains 2 --steps 5 --part learned",
        "learned scales",
    ),
    "which_layers.py": ("--kinds ink --seeds 1 --steps 2 --width 4 --new 10", "only the last"),
}


def test_make_targets_exist() -> None:
    targets = [c.split("#")[0].split()[1] for c in COMMANDS if c.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("command", [c for c in COMMANDS if "my_model.py" in c])
def test_own_model_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = re.search(r"```python\n(import pyro.*?)```", PAGES[COMMANDS[command]], re.S)
    assert model is not None
    Path("my_model.py").write_text(model.group(1).split("tasks =")[0])
    frame = load("radon")
    frame[frame["county"].isin(frame["county"].unique()[:12])].to_csv("radon.csv", index=False)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert "known tasks" in result.output
    assert Path("runs/my_model_county/table.csv").exists()
    rows = load("radon").iloc[::40].assign(log_radon=lambda f: f["log_radon"].where(f["floor"] > 0))
    rows.to_csv("new.csv", index=False)
    for other in (c for c in COMMANDS if c.startswith("varmeta predict")):
        if COMMANDS[other] == COMMANDS[command]:
            result = CliRunner().invoke(app, shlex.split(other)[1:])
            assert result.exit_code == 0, result.output
            found = pd.read_csv("predictions.csv")
            assert len(found) == int(rows["log_radon"].isna().sum())
            assert found["log_radon.mean"].between(-1, 4).all()


def test_the_first_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    readme = PAGES["README.md"]
    example, shown = (
        re.search(rf"```{kind}\n(.*?)```", readme, re.S) for kind in ("python", "text")
    )
    assert example is not None and shown is not None
    assert len(example.group(1).strip().splitlines()) <= 20 and readme.count("\n") <= 120
    exec(example.group(1), {"__name__": "readme"})
    number = r"[−\d]?\d+\.\d+"
    printed, said = (" ".join(t.split()) for t in (capsys.readouterr().out, shown.group(1)))
    assert re.sub(number, "#", printed) == re.sub(number, "#", said)
    for one, other in zip(re.findall(number, printed), re.findall(number, said), strict=True):
        assert abs(float(one.replace("−", "-")) - float(other.replace("−", "-"))) < 0.003


@pytest.mark.parametrize("command", [c for c in COMMANDS if "~" in c])
def test_formula_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, on a few counties and by one strategy."""
    monkeypatch.chdir(tmp_path)
    frame = load("radon")
    frame[frame["county"].isin(frame["county"].unique()[:8])].to_csv("radon.csv", index=False)
    quick = ["--strategies", "complete-pooling"] * (" compare " in command)
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *quick])
    assert result.exit_code == 0, result.output
    assert ("known tasks" in result.output) or ("pyro.sample" in result.output)


def test_every_command_is_known() -> None:
    known = ("make ", "varmeta compare my_model.py", "varmeta compare radon", "pip install", "git ")
    known += ("varmeta predict runs/my_model_county ",)
    known += ('varmeta compare "log_radon ~', 'varmeta model "log_radon ~')
    for command in COMMANDS:
        assert command.startswith(known), f"README shows a command that no test covers: {command}"


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "examples").glob("*.py"))])
def test_examples_run_at_small_size(name: str, tmp_path: Path) -> None:
    options, said = SMALL[name]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
