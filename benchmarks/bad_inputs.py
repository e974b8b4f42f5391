"""What is said of bad input: how many kinds of it end in which way.

    python -m benchmarks.bad_inputs            # the counts
    python -m benchmarks.bad_inputs --each     # and every kind, with what was said

Each kind is one mistake of a user: in a CSV file, a data frame, the command line, a model or its
data. An outcome is `ours` (an error raised on purpose that names what is wrong), `vague` (raised on
purpose, without naming it), `raw` (of another library) or `silent` (no error).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import varmeta.cli as cli
from varmeta import Density, NoPooling, Tasks, fit
from varmeta.failures import expected, message

Kind = tuple[str, Callable[[], Any], tuple[str, ...]]  # name, what is done, what must be named
GOOD = "g,x,y\na,1,2\na,2,3\nb,3,4\nb,1,1\nc,0,0\nc,1,1\n"
F64 = torch.float64


def csv_files() -> Iterator[Kind]:
    def read(data: str | bytes, **changes: Any) -> Callable[[], Tasks]:
        def call() -> Tasks:
            path = Path("data.csv")
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
            return Tasks.from_csv(path, **({"task": "g", "inputs": ["x"], "target": "y"} | changes))

        return call

    bad = ["", "NA", "-", "?", "nan", "inf", "-inf", "1e999", "3,5", "1,234.5", "1 234", "1_000"]
    bad += ["0x1f", "True", "yes", "2020-01-01", "12:30", "£3", "5%", "#N/A", "[/x]", "1.2.3"]
    for cell in bad:
        for column, row in (("x", f'c,"{cell}",1\n'), ("y", f'c,1,"{cell}"\n')):
            yield f"cell {cell!r} in {column}", read(GOOD + row), (f"{column!r}", cell, "line 8")
    yield "empty file", read(""), ("empty",)
    yield "blank lines alone", read("\n\n"), ("empty",)
    yield "header alone", read("g,x,y\n"), ("no rows",)
    yield "no header", read(GOOD[6:]), ("no column 'g'", "a, 1, 2")
    semicolons = GOOD.replace(",", ";")
    for cell in ("1,234", "1.234"):  # which may be a thousand and more
        text = f"g;x;y\na;{cell};{'1,5' if '.' in cell else 1}\n"
        yield f"{cell} beside semicolons", read(text), ("'x'", cell, "line 2", "decimal point")
    yield "another notation beside semicolons", read(semicolons + "c;1'5;1\n"), ("'x'", "line 8")
    yield "a longer line, semicolons", read(semicolons + "c;1;2;3\n"), ("line 8", "4", "';'")
    yield "texts among numbers", read(GOOD + "c,high,1\n"), ("'x'", "high", "line 8")
    yield "free text", read("g,x,y\n" + "".join(f"a,t{k},1\n" for k in range(30))), ("'x'", "C(x)")
    yield "one level alone", read("g,x,y\na,u,1\nb,u,2\n"), ("'x'", "'u'", "leave it out")
    yield "a bad date", read("g,x,y\na,2020-01-01,1\nb,2020-30-01,2\n"), ("'x'", "2020-30-01")
    yield "a query column of 2", read(GOOD.replace("2", "5"), query="y"), ("'y'", "target")
    yield "no such query", read(GOOD, query="z"), ("query", "'z'")
    levels = Tasks.from_frame(pd.DataFrame({"g": [1, 1], "x": list("uv"), "y": [0, 1]}), task="g",
                              inputs=["x"], target="y").design  # fmt: skip
    new = pd.DataFrame({"g": [1], "x": ["w"], "y": [0]})
    yield "a new level", lambda: Tasks.from_frame(new, design=levels), ("'x'", "'w'", "u, v")
    yield "Latin-1", read(GOOD.replace("a", "é").encode("latin-1")), ("line 2", "UTF-8")
    yield "UTF-16 without a mark", read(GOOD.encode("utf-16-le")), ("UTF-8",)
    yield "a workbook", read(b"PK\x03\x04\xff\xfe\x00"), ("UTF-8",)
    yield "broken gzip", read(b"\x1f\x8bnothing"), ("gzip",)
    yield "a longer line", read(GOOD + "c,1,2,3\n"), ("line 8", "4")
    yield "a shorter line", read(GOOD + "c,1\n"), ("'y'", "line 8")
    yield "an open quote", read(GOOD + 'c,"1,2\n'), ("string",)
    yield "a row without a task", read(GOOD + ",1,2\n"), ("'g'", "line 8")
    yield "a task in two spellings", read(GOOD + " a,1,2\n"), ("'a'", "' a'")
    yield "two columns of one name", read(GOOD.replace("x", "y", 1)), ("'y'",)
    yield "the target twice", read("g,x,y,y\na,1,2,3\n"), ("2 columns 'y'",)
    yield "one column", read("g\na\nb\n"), ("no column 'y'", "g")
    for argument in ("task", "target"):
        yield f"no such {argument}", read(GOOD, **{argument: "z"}), (argument, "'z'", "g, x, y")
    yield "no such input", read(GOOD, inputs=["z"]), ("inputs", "'z'", "g, x, y")
    yield "the target as an input", read(GOOD, inputs=["x", "y"]), ("inputs", "'y'", "target")
    yield "the task as an input", read("g,x,y\n1,1,1\n2,2,2\n", inputs=["g"]), ("'g'", "task")
    yield "the task as the target", read("g,x,y\n1,1,1\n2,2,2\n", target="g"), ("'g'", "task")
    yield "an input twice", read(GOOD, inputs=["x", "x"]), ("'x'", "twice")
    yield "inputs as a string", read(GOOD, inputs="x"), ("inputs", "list")
    yield "no file", lambda: Tasks.from_csv("no.csv", task="g", inputs=[], target="y"), ("no.csv",)
    yield "a folder", lambda: Tasks.from_csv(".", task="g", inputs=[], target="y"), ("folder",)


def frames() -> Iterator[Kind]:
    def read(dtype: torch.dtype = F64, **columns: Any) -> Callable[[], Tasks]:
        frame = pd.DataFrame({"g": [1, 2]} | columns)
        return lambda: Tasks.from_frame(frame, task="g", inputs=[], target="y", dtype=dtype)

    yield "complex numbers", read(y=[1, 2j]), ("'y'", "j)", "row 0")
    yield "dates", read(y=pd.to_datetime(["2020", "2021"])), ("'y'", "2020", "row 0")
    yield "spans of time", read(y=[pd.Timedelta(1), pd.Timedelta(2)]), ("'y'", "row 0")
    yield "None", read(y=[1.0, None]), ("'y'", "row 1")
    yield "pd.NA", read(y=pd.array([1, None], "Int64")), ("'y'", "row 1")
    yield "lists", read(y=[1, [2]]), ("'y'", "[2]", "row 1")
    yield "text", read(y=[1, "two"]), ("'y'", "two", "row 1")
    yield "too large for float32", read(torch.float32, y=[1, 1e300]), ("dtype", "1e+300", "row 1")
    yield "a half as a whole number", read(torch.int64, y=[1, 0.5]), ("dtype", "0.5", "row 1")
    yield "large names as floats", read(g=[2.0**53 + 2, 1.0], y=[1, 2]), ("'g'", "float")
    yield "1 and '1'", read(g=[1, "1"], y=[1, 2]), ("'g'", "1", "'1'")


def model(law: Any, prior: Any = None) -> Any:
    def task(x: Tensor, y: Tensor | None = None) -> Any:
        a = pyro.sample("a", prior(x, y) if prior else dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", law(a + 0 * x[:, 0]), obs=y)

    return task


def targets() -> Iterator[Kind]:
    def three(a: Tensor) -> Tensor:
        return a[:, None] * torch.arange(3)

    laws: dict[str, tuple[Any, list[float], list[float]]] = {
        "Bernoulli": (lambda a: dist.Bernoulli(logits=a), [0, 1], [2, -1, 0.5]),
        "Poisson": (lambda a: dist.Poisson(a.exp()), [0, 1], [-3, 0.5]),
        "Binomial": (lambda a: dist.Binomial(3, logits=a), [0, 3], [4, -1, 0.5]),
        "Geometric": (lambda a: dist.Geometric(logits=a), [0, 1], [-1, 0.5]),
        "NegativeBinomial": (lambda a: dist.NegativeBinomial(3.0, logits=a), [0, 1], [-1, 0.5]),
        "Beta": (lambda a: dist.Beta(a.exp(), 2.0), [0.1, 0.5], [1.5, -0.5]),
        "Exponential": (lambda a: dist.Exponential(a.exp()), [0.1, 2], [-2]),
        "Gamma": (lambda a: dist.Gamma(a.exp(), 1.0), [0.1, 2], [-2]),
        "LogNormal": (lambda a: dist.LogNormal(a, 1.0), [0.1, 2], [-2, 0]),
        "HalfNormal": (lambda a: dist.HalfNormal(a.exp()), [0.1, 2], [-2]),
        "Categorical": (lambda a: dist.Categorical(logits=three(a)), [0, 2], [3, -1]),
    }
    x = torch.ones(4, 1, dtype=F64)
    for name, (law, good, bad) in laws.items():
        for value in bad:
            for where in (0, 1):
                kind = torch.long if name == "Categorical" else F64
                ys = [torch.tensor(good * 2, dtype=kind) for _ in range(2)]
                ys[where][2] = value
                tasks = Tasks.from_list([(x, y) for y in ys], names=["first", "second"])

                def call(law: Any = law, tasks: Tasks = tasks) -> None:
                    density = Density(model(law), tasks)
                    fit(NoPooling(steps=2), density, tasks)

                task = ("first", "second")[where]
                yield f"{name} on {value}, {task} task", call, (task, "row 2", f"{value}")


def priors() -> Iterator[Kind]:
    x = [torch.ones(3, 1, dtype=F64), 2 * torch.ones(3, 1, dtype=F64)]
    follows: dict[str, Any] = {
        "x": lambda x, y: dist.Normal(x.mean(), 1.0),
        "rows": lambda x, y: dist.Normal(0.0, 1.0 / len(x)),
        "y": lambda x, y: dist.Normal(0.0 if y is None else y.mean(), 1.0),
    }
    for name, prior in follows.items():
        for what, inputs in (("other", x), ("equal", [x[0], x[0]])):
            tasks = Tasks.from_list([(each, each[:, 0]) for each in inputs])
            call = lambda p=prior, t=tasks: Density(model(lambda a: dist.Normal(a, 1.0), p), t)  # noqa: E731
            yield f"a prior of {name}, {what} inputs", call, ("prior", "'a'", name)


def command_line() -> Iterator[Kind]:
    Path("m.py").write_text(
        "import pyro, pyro.distributions as dist, torch\n"
        "def good(x, y=None):\n"
        "    a = pyro.sample('a', dist.Normal(0.0, 1.0))\n"
        "    with pyro.plate('rows', x.shape[-2]):\n"
        "        return pyro.sample('y', dist.Normal(a, 1.0), obs=y)\n"
        "class Net(torch.nn.Module): pass\n"
        "number = 3\n"
    )
    Path("broken.py").write_text("def good(x\n")

    def compare(*words: str, data: bool = True) -> Callable[[], None]:
        def stop(*_: object, **__: object) -> None:
            raise typer.Exit(77)

        def call() -> None:
            Path("a.csv").write_text(GOOD)
            base = ["--data", "a.csv", "--task", "g", "--target", "y"] if data else []
            kept, cli.run_comparison = cli.run_comparison, stop
            try:
                result = CliRunner().invoke(cli.app, ["compare", words[0], *base, *words[1:]])
            finally:
                cli.run_comparison = kept
            if result.exit_code != 77:
                raise Said(result.output, result.exit_code)

        return call

    for option, value in (
        *(("--data", "a.csv"), ("--task", "g"), ("--inputs", "x"), ("--target", "y")),
        *(("--shared", "a"), ("--query", "0.3"), ("--hold-out", "1")),
    ):
        yield f"radon {option}", compare("eight_schools", option, value, data=False), (option,)
    for words, named in (
        (("--query", "1.5"), ("--query", "1.5")),
        (("--query", "nan"), ("--query", "nan")),
        (("--query", "z"), ("query", "'z'", "g, x, y")),
        (("--missing", "fill"), ("--missing", "fill")),
        (("--integers", "all"), ("integers", "all", "target")),
        (("--family", "normal"), ("--family", "formula")),
        (("--query", "0.001"), ("--query 0.001", "'g'")),
        (("--hold-out", "99"), ("--hold-out", "99")),
        (("--hold-out", "-1"), ("--hold-out", "-1")),
        (("--shared", "b"), ("'b'", "a")),
        (("--strategies", "magic"), ("'magic'", "joint")),
        (("--strategies", "joint,joint"), ("'joint'", "twice")),
        (("--set", "joint.nothing=1"), ("nothing", "steps")),
        (("--set", "joint"), ("NAME.FIELD=VALUE",)),
        (("--steps", "0"), ("--steps", "0")),
        (("--config", "no.toml"), ("--config", "no.toml")),
        (("--config", "m.py"), ("--config", "TOML")),
    ):
        yield " ".join(words), compare("m.py:good", *words), named
    for what, named in (
        ("m.py:Net", ("'Net'", "class")),
        ("m.py:number", ("'number'", "good")),
        ("m.py:none", ("'none'", "good")),
        ("none.py:good", ("none.py",)),
        ("broken.py:good", ("broken.py, line 1",)),
        ("m.py", ("FILE.py:FUNCTION",)),
    ):
        yield what, compare(what), named


class Said(Exception):
    """What the command line printed, and its exit status."""


def outcome(call: Callable[[], Any], named: tuple[str, ...]) -> tuple[str, str]:
    """One kind's outcome, and what was said."""
    try:
        call()
    except Said as error:
        said, code = " ".join(str(error.args[0]).split()), error.args[1]
        raw = code != 2 or "Traceback" in said or "--debug" in said
    except Exception as error:
        said, raw = message(error), not expected(error)
    else:
        return "silent", ""
    if raw:
        return "raw", said
    return ("ours" if all(name in said for name in named) else "vague"), said


def main(each: bool = False) -> pd.DataFrame:
    """Counts, `[area, outcome]`; printed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            for area in (csv_files, frames, targets, priors, command_line):
                for name, call, named in area():
                    kind, said = outcome(call, named)
                    rows.append((area.__name__, name, kind, said))
                    if each:
                        print(f"{kind:7} {area.__name__:13} {name:45} {said[:160]!r}")
        finally:
            os.chdir(before)
    found = Counter((area, kind) for area, _, kind, _ in rows)
    areas = dict.fromkeys(area for area, *_ in rows)
    kinds = ("ours", "vague", "raw", "silent")
    table = pd.DataFrame({k: [found[a, k] for a in areas] for k in kinds}, index=list(areas))
    table.loc["all"] = table.sum()
    print(table.to_string())
    return table


if __name__ == "__main__":
    main("--each" in sys.argv)
