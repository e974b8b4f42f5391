"""Whatever comes in, what comes out is a result or an error of ours that says what to do.

`VARMETA_FUZZ=50` tries fifty times as many examples.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import varmeta.cli as cli
from varmeta.failures import expected, message
from varmeta.inference.base import Strategy
from varmeta.models.density import Density
from varmeta.seeds import generator
from varmeta.settings import STRATEGIES, choose, described
from varmeta.tasks import Tasks

MORE = int(os.environ.get("VARMETA_FUZZ", "1"))


def tries(count: int) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count * MORE,
        derandomize=MORE == 1,
        deadline=None,
        database=None,
        suppress_health_check=quiet,
    )


def check_error(error: BaseException) -> None:
    """Raised on purpose, in a sentence that is not the bare remark of a library."""
    assert expected(error), f"raw: {type(error).__name__}: {error}"
    said = message(error)
    assert len(said.split()) >= 5 and "Traceback" not in said and "Trace Shapes" not in said, said


# -- CSV files ------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-99, 99), st.floats(allow_nan=False, width=32)).map(str)
ODD = ["", "NA", "-", "nan", "inf", "-inf", "1e999", "1,5", "1.234,5", "1_000", "0x1f", "True"]
ODD += ["2020-01-01", " 3 ", "\t4", '"', '"a', "a;b", "é", "３", "\0", "\ufeff", "[/x]", "$a$"]
NAMES = st.sampled_from(["g", "x", "y", "g", "x", "y", " x", "", "X", "[/x]", "$y$", "x;y", "1"])
CELLS = st.one_of(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(ODD), st.text(max_size=3))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    plain = draw(st.booleans())
    header = ["g", "x", "y"] if plain else draw(st.lists(NAMES, max_size=4))
    cells = NUMBERS if plain and draw(st.booleans()) else CELLS
    width = st.just(len(header)) if draw(st.booleans()) else st.integers(0, 5)
    rows = draw(
        st.lists(width.flatmap(lambda n: st.lists(cells, min_size=n, max_size=n)), max_size=5)
    )
    text = io.StringIO(newline="")
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    mark = draw(st.sampled_from([",", ",", ",", ",", ";", "\t"]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    writer = csv.writer(text, delimiter=mark, lineterminator=end, quoting=quoting)
    writer.writerows([header, *rows])
    said = text.getvalue()
    if draw(st.integers(0, 9)) == 0:  # cut somewhere
        said = said[: draw(st.integers(0, len(said)))]
    code = draw(st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"]))
    return said.encode(code, errors="replace")


@tries(80)
@given(files(), st.sampled_from([["x"], [], ["x", "x"], ["y"], ["g"], ["z"]]))
def test_csv_files(data: bytes, inputs: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.csv")
        path.write_bytes(data)
        try:
            tasks = Tasks.from_csv(path, task="g", inputs=inputs, target="y")
        except Exception as error:
            return check_error(error)
    assert tasks.targets.isfinite().all() and tasks.inputs.isfinite().all()
    code = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = re.split("\r\n|\r|\n", data.decode(code))
    header = next(line for line in lines if line)
    mark = max(",;\t|", key=lambda sign: len(next(csv.reader([header], delimiter=sign))))
    rows = [row for row in csv.reader((line + "\n" for line in lines), delimiter=mark) if row]
    if len(rows) != len(lines) - 1 or any(len(row) != len(rows[0]) for row in rows):
        return None  # cells that hold an end of line, or empty lines
    at = [name.strip() for name in rows[0]].index("y")
    commas = mark != "," and any("," in cell for row in rows[1:] for cell in row)
    ids = tasks.row_ids[tasks.mask]  # type: ignore[index]
    found = tasks.targets[tasks.mask][ids.argsort()].tolist()
    for row, value in zip(rows[1:], found, strict=True):
        assert value in may_be(row[at].strip().lower(), commas)
    return None


def may_be(cell: str, commas: bool) -> list[float]:
    """What a cell may be read as; a comma may be the decimal mark where it separates no columns."""
    if cell in ("true", "false"):
        return [float(cell == "true")]
    if "," in cell:
        return [float(cell.replace(".", "").replace(",", "."))] if commas else []
    return [float(cell)] + [float(cell.replace(".", ""))] * (commas and "." in cell)


# -- settings -------------------------------------------------------------------------------------

FIELDS = ["steps", "q", "learning_rate", "minimiser", "minimiser.max_iterations", "adjoint.solver"]
FIELDS += ["resets", "tolerance", "posterior_kind", "samples", "draws", "guide", "", ".", "nothing"]
VALUES = ["full", "delta", "laplac", "nan", "-1", "0", "3", "1e400", "1e-3", "None", "true", "[1]"]
VALUES += [
    "Reset(5)",
    "Reset(-5)",
    "Reset()",
    "Reset(",
    "GradientDescent(0.1)",
    "CG(max_iterations=0)",
]
VALUES += ["__import__('os')", "lambda: 1", "{}", "'", "AutoNormal", "1" * 60, "(" * 300, "[/x]"]
PICKED = st.sampled_from([n for n in STRATEGIES if n != "nuts"])


def words(pool: list[str]) -> Any:
    return st.one_of(st.sampled_from(pool), st.sampled_from(pool), st.text(max_size=4))


@tries(80)
@given(
    st.lists(PICKED, min_size=1, max_size=2),
    st.lists(st.tuples(words(FIELDS), words(VALUES)), max_size=2),
    st.sampled_from([None, 1, 0, -3]),
    st.sampled_from([None, 0.1, 0.0, float("nan"), float("inf")]),
)
def test_settings(names: list[str], changes: Any, steps: Any, tolerance: Any) -> None:
    given = [f"{names[0]}.{field}={value}" for field, value in changes]
    try:
        made = choose(names, settings=given, steps=steps, tolerance=tolerance)
    except Exception as error:
        return check_error(error)
    assert list(made) == names and all(isinstance(s, Strategy) for s in made.values())
    assert all(described(strategy) for strategy in made.values())
    return None


TOML = ["[joint]", "[joint.resets]", "[mine]", "['[/x]']", "[joint", "steps = 3", "steps = 'x'"]
TOML += ["strategy = 'joint'", "strategy = 'magic'", "strategy = 3", "q = 'full'", "q = [1, 2]"]
TOML += ["resets = 'Reset(3)'", "steps = nan", "steps = 2020-01-01", "= 3", "a.b.c = 1", "\x00"]


@tries(60)
@given(st.lists(words(TOML), max_size=5), st.sampled_from(["utf-8", "utf-16", "latin-1"]))
def test_a_settings_file(lines: list[str], code: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.toml")
        path.write_bytes("\n".join(lines).encode(code, errors="replace"))
        try:
            made = choose(["joint"], config=path)
        except Exception as error:
            return check_error(error)
    assert all(isinstance(s, Strategy) for s in made.values())
    return None


# -- the command line -----------------------------------------------------------------------------

MODEL = """
import pyro, pyro.distributions as dist
def good(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(a, 1.0), obs=y)
number, fails = 3, lambda x, y=None: 1 / 0
"""
OPTIONS = {
    "--data": ["a.csv", "none.csv", ".", "m.py", ""],
    "--task": ["g", "x", "no", ""],
    "--inputs": ["x", "x,x", ",", "y", "no"],
    "--target": ["y", "g", "no", ""],
    "--shared": ["a", "no", "a,a", ""],
    "--query": ["0", "0.5", "1", "nan", "-1", "x"],
    "--hold-out": ["0", "1", "99", "-1", "x"],
    "--strategies": ["joint", "joint,joint", "", "magic", "[/x]"],
    "--steps": ["3", "0", "x"],
    "--tolerance": ["0.1", "nan", "-1"],
    "--set": ["joint.q=full", "joint", "[/x].q=1", "imaml.steps=-1", "joint.q=[/x]"],
    "--config": ["none.toml", ".", "m.py"],
    "--seed": ["0", "1", "-1", "x"],
}
BASE = {"--data": "a.csv", "--task": "g", "--target": "y", "--strategies": "joint"}
WHAT = ["m.py:good"] * 4 + ["m.py:number", "m.py:fails", "m.py:", "m.py", "none.py:f", "a.csv:f"]
WHAT += ["eight_schools", "radom", "", ":", "[/x]"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "m.py").write_text(MODEL)
    (folder / "a.csv").write_text("g,x,y\na,1,2\na,2,3\nb,3,4\nb,1,1\nc,0,0\nc,1,1\n")
    return folder


@tries(60)
@given(
    st.sampled_from(WHAT),
    st.sets(st.sampled_from(sorted(OPTIONS)), max_size=2).flatmap(
        lambda chosen: st.fixed_dictionaries({o: st.sampled_from(OPTIONS[o]) for o in chosen})
    ),
    st.booleans(),
)
def test_the_command_line(workplace: Path, what: str, options: dict[str, str], bare: bool) -> None:
    def stop(*_: object, **__: object) -> None:
        raise typer.Exit(77)  # training would begin here

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setattr(cli, "run_comparison", stop)
        given = ({} if bare or ":" not in what else BASE) | options
        words = [word for pair in given.items() for word in pair]
        result = CliRunner().invoke(cli.app, ["compare", what, *words])
    said = re.sub(r"\s+", " ", result.output)
    if result.exit_code == 77:
        return
    assert result.exit_code == 2, (said, result.exception)
    assert "Traceback" not in said and "--debug" not in said, said
    assert "Error" in said and len(said.split()) >= 5, said
    raw = re.search(r"Error: (\w+Error|\w+Exception): ", said)
    assert raw is None or "m.py, line" in said, said  # an error of the user's own has its line


# -- models and their data ------------------------------------------------------------------------

PRIORS = {
    "normal": lambda x, y: dist.Normal(0.0, 1.0),
    "half": lambda x, y: dist.HalfNormal(1.0),
    "simplex": lambda x, y: dist.Dirichlet(torch.ones(3, dtype=x.dtype)),
    "flat": lambda x, y: dist.Normal(0.0, float("inf")),
    "no scale": lambda x, y: dist.Normal(0.0, 0.0),
    "cauchy": lambda x, y: dist.Cauchy(0.0, 1.0),
    "discrete": lambda x, y: dist.Poisson(1.0),
    "of x": lambda x, y: dist.Normal(x.mean(), 1.0),
    "of rows": lambda x, y: dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0).to_event(1),
    "none": lambda x, y: None,
}
LAWS = {
    "normal": lambda a, x: dist.Normal(a + 0 * x[:, 0], 1.0),
    "scalar": lambda a, x: dist.Normal(a, 1.0),
    "scale": lambda a, x: dist.Normal(0 * x[:, 0], a),
    "bernoulli": lambda a, x: dist.Bernoulli(logits=a + 0 * x[:, 0]),
    "poisson": lambda a, x: dist.Poisson((a + 0 * x[:, 0]).exp()),
    "beta": lambda a, x: dist.Beta((a + 0 * x[:, 0]).exp(), 1.0),
    "binomial": lambda a, x: dist.Binomial(2, logits=a + 0 * x[:, 0]),
    "uniform": lambda a, x: dist.Uniform(0.0, (a + 0 * x[:, 0]).exp()),
    "categorical": lambda a, x: dist.Categorical(logits=a * torch.ones(len(x), 3)),
    "event": lambda a, x: dist.Normal(a + 0 * x[:, 0], 1.0).to_event(1),
    "delta": lambda a, x: dist.Delta(a + 0 * x[:, 0]),
}
PLATES: dict[str, Any] = {"right": None, "fixed": 3, "none": 0, "nested": 2, "subsample": 1}
TARGETS = [0.0, 1.0, 2.0, 0.5, -3.0]


@tries(40)
@given(
    st.sampled_from(sorted(PRIORS)),
    st.sampled_from(sorted(LAWS)),
    st.sampled_from(["right"] * 5 + sorted(PLATES)),
    st.sampled_from(["a", "[/x]", "$\\frac$", "", "y", "task", "a b"]),
    st.lists(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.long]),
)
def test_models(
    prior: str, law: str, plate: str, name: str, targets: list[list[float]], dtype: torch.dtype
) -> None:
    def task(x: Tensor, y: Tensor | None = None) -> Any:
        made = PRIORS[prior](x, y)
        a = x.new_ones(()) if made is None else pyro.sample(name, made)
        if a.dim() and prior != "of rows":
            a = a[..., 0]
        if plate == "none":
            return pyro.sample("y", LAWS[law](a, x), obs=y)
        if plate == "nested":
            with pyro.plate("outer", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
                return pyro.sample("y", LAWS[law](a, x), obs=y)
        size = 3 if plate == "fixed" else len(x)
        with pyro.plate("rows", size, subsample_size=1 if plate == "subsample" else None):
            return pyro.sample("y", LAWS[law](a, x), obs=y)

    kind = torch.float64 if dtype == torch.long else dtype
    pairs = [
        (torch.linspace(0, 1, len(y))[:, None].to(kind), torch.tensor(y).to(dtype)) for y in targets
    ]
    tasks = Tasks.from_list(pairs)
    try:
        density = Density(task, tasks)
    except Exception as error:
        return check_error(error)
    theta = density.prior_loc.expand(len(tasks), -1)
    nats = density.log_likelihood(theta, tasks)
    assert nats.shape == tasks.mask.shape
    if law not in ("uniform", "scale", "beta"):  # whose density may be 0 at a draw, or infinite
        assert nats.isfinite().all()
    predicted = density.predict(theta[None], tasks, generator(0))
    assert predicted["y"].shape == (1, *tasks.mask.shape)
    return None
