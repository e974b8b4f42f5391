"""One failure is one row: whatever a strategy dies of, the others are fitted, scored and drawn."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import Tensor

import varmeta.report as report
from varmeta import (
    Comparison,
    CompletePooling,
    Density,
    GaussianPrior,
    JointVariational,
    PyroNUTS,
    Tasks,
    compare,
)
from varmeta.inference.base import check_finite
from varmeta.posterior import Delta
from varmeta.seeds import generator

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*did not converge:RuntimeWarning")


def level(x: Tensor, y: Tensor | None = None) -> Tensor:
    if x.shape[-2] > 12 and y is None:
        raise ValueError("more rows than there are shelves")
    mean = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(mean + x[..., 0], 0.5), obs=y)


def tasks(*rows: int, prefix: str = "t") -> Tasks:
    rng = generator(0)
    pairs = [
        (torch.randn(n, 1, generator=rng, dtype=F64), torch.randn(n, generator=rng, dtype=F64))
        for n in rows
    ]
    return Tasks.from_list(pairs, names=[f"{prefix}{i}" for i in range(len(rows))]).split(0.4)


TRAIN, FRESH = tasks(5, 6, 7, 5), tasks(6, 5, prefix="new")
DENSITY = Density(level, TRAIN)
SICK: set[str] = set()  # strategies that are not well, by label
STEPS: Counter[str] = Counter()  # taken, by label


@dataclass(frozen=True)
class Ill(JointVariational):
    """Fails at one point of its life, as long as its label is in `SICK`."""

    q: Any = "delta"
    steps: int = 6
    adapt_steps: int = 3
    learn_scale: bool | None = False
    label: str = ""
    at: str = "step"
    how: Callable[..., Any] | None = None

    def fails(self, at: str, *arguments: Any) -> bool:
        if self.at == at and self.how is not None and self.label in SICK:
            self.how(*arguments)
            return True
        return False

    def init(self, *arguments: Any) -> Any:
        self.fails("init")
        return super().init(*arguments)

    def step(self, density: Density, state: Any, batch: Any, rng: torch.Generator) -> Any:
        if state.step == 2:
            self.fails("step", batch.tasks, state.step)
        STEPS[self.label] += 1
        return super().step(density, state, batch, rng)

    def adapt(self, density: Density, state: Any, given: Tasks, rng: torch.Generator) -> Any:
        self.fails("adapt")
        return super().adapt(density, state, given, rng)

    def posterior(self, density: Density, state: Any, given: Tasks, rng: torch.Generator) -> Any:
        found = super().posterior(density, state, given, rng)
        if self.fails("posterior"):
            return self.how(found)  # type: ignore[misc]
        return found


def ill(label: str, at: str = "step", how: Callable[..., Any] | None = None) -> Ill:
    SICK.add(label)
    return Ill(label=label, at=at, how=how)


@pytest.fixture(autouse=True)
def healthy() -> None:
    SICK.clear()
    STEPS.clear()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varmeta.report_write.write_figures", lambda *_: [])


def not_finite(given: Tasks | None = None, step: int = 0) -> None:
    assert given is not None
    check_finite(torch.tensor([1.0, float("nan"), 2.0, 3.0]), given, step)


def no_cholesky(*_: object) -> None:
    torch.linalg.cholesky(-torch.eye(2))


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def nan_mean(found: Delta | None = None) -> Delta | None:
    if found is None:
        return None
    return replace(found, loc=found.loc.index_fill(0, torch.tensor([3]), float("nan")))


@dataclass(frozen=True, eq=False)
class NoDensity(Delta):
    """A finite posterior under which a row's density is not a number."""

    def log_predictive(self, given: Tasks, count: int, rng: torch.Generator) -> Tensor:
        return torch.full(given.mask.shape, float("nan"), dtype=F64)


def no_density(found: Delta | None = None) -> Delta | None:
    if found is None:
        return None
    return NoDensity(found.density, found.names, found.shared, found.loc)


# How it fails, where, and what the row says.
WAYS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "nan": ("step", not_finite, "step 2: the loss of task 't1' is nan (1 of 4 tasks)"),
    "eigen": ("step", no_cholesky, "step 2: linear algebra: linalg.cholesky: "),
    "memory": ("step", raising(MemoryError()), "step 2: out of memory"),
    "allocator": (
        "step",
        lambda *_: torch.empty(10**16, dtype=F64),
        "step 2: out of memory (tried to allocate 80000000000000000 bytes)",
    ),
    "device": (
        "step",
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0")),
        "step 2: out of memory (tried to allocate 20.00 gib)",
    ),
    "refusal": ("init", lambda *_: TRAIN.split(2.0), "query must lie strictly between 0 and 1"),
    "key": ("adapt", raising(KeyError("x")), "adapting to new tasks: KeyError: 'x'"),
    "nan posterior": (
        "posterior",
        nan_mean,
        "posterior of the training tasks: the posterior of task 't3' is not finite (1 of 4 tasks)",
    ),
    "nan density": (
        "posterior",
        no_density,
        "scores: the log density of held-out rows of task 't0' is not finite (4 of 4 tasks)",
    ),
}


def plain(result: Comparison) -> str:
    return re.sub(r"\s+", " ", str(result))


def test_every_kind_of_failure_is_a_row_and_the_others_are_whole(tmp_path: Path) -> None:
    alone = compare({"pooled": CompletePooling(draws=50)}, DENSITY, TRAIN, FRESH, draws=50)
    strategies: dict[str, Any] = {name: ill(name, *way[:2]) for name, way in WAYS.items()}
    strategies["pooled"] = CompletePooling(draws=50)
    result = compare(strategies, DENSITY, TRAIN, FRESH, draws=50, folder=tmp_path / "run")
    assert list(result.outcomes) == ["pooled"] and list(result.failures) == list(WAYS)
    for name, (*_, reason) in WAYS.items():
        assert result.failures[name].startswith(reason), result.failures[name]
        file = tmp_path / "run" / "failures" / f"{name.replace(' ', '_')}.txt"
        assert "Traceback" in file.read_text()
        rows = result.table[result.table["strategy"] == name]
        assert len(rows) == 2 and (rows["failed"] == result.failures[name]).all()
        assert rows[["elpd", "elpd_diff", "rmse", "seconds"]].isna().all(axis=None)
    mine = result.table[result.table["strategy"] == "pooled"].reset_index(drop=True)
    times = ["seconds", "adapt_seconds"]
    same = (frame.drop(columns=times) for frame in (mine, alone.table))
    pd.testing.assert_frame_equal(*same, check_dtype=False)  # a NaN makes whole numbers floats
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"table.csv", "pooled.nc", "modules.csv", "scores.png", "forest_level.png"} <= files
    assert not any("part" in name for name in files)
    written = pd.read_csv(tmp_path / "run" / "table.csv")
    assert written["failed"].notna().sum() == 2 * len(WAYS)
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    text = str(result)
    assert all(cell_len(line) <= 150 for line in text.splitlines())
    for part in re.split(r"\n(?=new tasks: \d)", text):  # failed rows come last, with the reason
        last = part.index("pooled")
        assert last < part.index("failed: step 2: the loss of task 't1' is nan (1 of 4 tasks)")


def test_own_line_of_the_user() -> None:
    """A model that cannot predict one task: the row has the file, and the line with its number."""
    wide = tasks(5, 40, prefix="wide")
    result = compare([Ill()], DENSITY, TRAIN, wide, draws=20)
    (reason,) = result.failures.values()
    here = Path(__file__).read_text().splitlines()
    number = next(i for i, text in enumerate(here, 1) if "there are shelves" in text)
    assert reason.startswith("scores: ")
    assert "more rows than there are shelves" in reason
    assert f"test_failures.py, line {number}: raise ValueError(" in reason


@pytest.mark.usefixtures("no_pictures")
def test_the_same_call_tries_only_the_failed_again(tmp_path: Path) -> None:
    """And then holds what it would have held had nothing failed."""
    strategies = {
        "well": Ill(label="well"),
        "stumbles": ill("stumbles", "step", not_finite),
        "cannot adapt": ill("cannot adapt", "adapt", raising(RuntimeError("not today"))),
    }
    arguments: Any = (strategies, DENSITY, TRAIN, FRESH)
    first = compare(*arguments, draws=50, folder=tmp_path / "run")
    assert list(first.failures) == ["stumbles", "cannot adapt"]
    assert STEPS == {"well": 6, "stumbles": 2, "cannot adapt": 6}
    again = compare(*arguments, draws=50, folder=tmp_path / "run")
    assert again.failures == first.failures
    assert STEPS == {"well": 6, "stumbles": 2, "cannot adapt": 6}
    SICK.clear()
    healed = compare(*arguments, draws=50, folder=tmp_path / "run")
    assert not healed.failures and not (tmp_path / "run" / "failures").exists()
    assert STEPS == {"well": 6, "stumbles": 6, "cannot adapt": 6}
    whole = compare(*arguments, draws=50)
    times = ["seconds", "adapt_seconds"]
    pd.testing.assert_frame_equal(healed.table.drop(columns=times), whole.table.drop(columns=times))
    with pytest.raises(FileExistsError, match="finished run"):
        compare(*arguments, draws=50, folder=tmp_path / "run")


@pytest.mark.usefixtures("no_pictures")
def test_overwrite_takes_the_failures_away(tmp_path: Path) -> None:
    broken = {"ill": ill("ill", "step", not_finite), "well": Ill(label="well")}
    compare(broken, DENSITY, TRAIN, draws=20, folder=tmp_path / "run")
    assert (tmp_path / "run" / "failures" / "ill.txt").exists()
    with pytest.raises(FileExistsError, match="unfinished run with other settings"):
        compare({"well": Ill(label="well")}, DENSITY, TRAIN, draws=20, folder=tmp_path / "run")
    SICK.clear()
    compare(broken, DENSITY, TRAIN, draws=20, folder=tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "failures").exists()


def test_all_fail(tmp_path: Path) -> None:
    strategies = {name: ill(name, "step", not_finite) for name in ("one", "two")}
    result = compare(strategies, DENSITY, TRAIN, FRESH, draws=20, folder=tmp_path / "run")
    assert not result.outcomes and len(result.table) == 4
    assert plain(result).count("failed: step 2: the loss of task 't1' is nan") == 4
    assert result.shrinkage().empty
    files = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert files == {"run.json", "table.csv", "data.pt"}


def test_without_the_reference_nothing_is_measured_against_it() -> None:
    @dataclass(frozen=True)
    class Broken(PyroNUTS):
        def step(self, *_: Any) -> Any:
            raise RuntimeError("no start found")

    result = compare({"nuts": Broken(), "well": Ill(label="well")}, DENSITY, TRAIN, draws=20)
    assert result.reference is None and list(result.failures) == ["nuts"]
    assert result.table[["mean_shift", "sd_ratio"]].isna().all(axis=None)
    assert "reference" not in str(result)


@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_stops_and_keeps_what_is_known(tmp_path: Path) -> None:
    strategies = {
        "ill": ill("ill", "step", not_finite),
        "stopped": ill("stopped", "step", raising(KeyboardInterrupt("now"))),  # type: ignore[arg-type]
    }
    with pytest.raises(KeyboardInterrupt):
        compare(strategies, DENSITY, TRAIN, draws=20, folder=tmp_path / "run")
    assert (tmp_path / "run" / "failures" / "ill.txt").exists()


def test_a_failure_after_the_scores_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ArviZ, shrinkage, pictures: the strategy is marked, its scores stay, the others are drawn."""
    import varmeta.export as export

    summary, to_arviz = report._summary, export.to_arviz
    monkeypatch.setattr(
        report,
        "_summary",
        lambda q, *a: 1 / 0 if q.kind == "delta" else summary(q, *a),
    )
    monkeypatch.setattr(
        export,
        "to_arviz",
        lambda fit, **k: [][1] if isinstance(fit.strategy, Ill) else to_arviz(fit, **k),
    )
    strategies = {"ill": Ill(label="ill"), "pooled": CompletePooling(draws=50)}
    result = compare(strategies, DENSITY, TRAIN, draws=50, folder=tmp_path / "run")
    reason = result.failures["ill"]
    assert "ArviZ file: IndexError" in reason and "picture forest_level: ZeroDivision" in reason
    assert "ill" in result.outcomes and result.table["elpd"].notna().all()
    assert (result.table["failed"] != "").tolist() == [True, False]
    assert "ill was scored, and then failed: ArviZ file: IndexError" in plain(result)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"pooled.nc", "forest_level.png", "scores.png"} <= files and "ill.nc" not in files
    assert pd.read_csv(tmp_path / "run" / "table.csv")["failed"].notna().tolist() == [True, False]


def test_a_picture_that_no_strategy_spoils_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from varmeta.report_write import write_figures

    strategies = {name: Ill(label=name, learn_loc=name != "c") for name in ("a", "b", "c")}
    result = compare(strategies, DENSITY, TRAIN, draws=20)
    drawn, blamed = report.forest, []

    def forest(comparison: Comparison, **site: Any) -> Any:
        if {"a", "b"} <= set(comparison.outcomes):
            raise RuntimeError("a and b do not go together")
        return drawn(comparison, **site)

    monkeypatch.setattr("varmeta.report_write.forest", forest)
    with pytest.raises(RuntimeError, match="do not go together"):
        write_figures(result, tmp_path / "plain")
    written = write_figures(result, tmp_path, lambda name, what, error: blamed.append((name, what)))
    assert blamed == [("a", "picture forest_level")]
    assert "forest_level.png" in [path.name for path in written]


def test_no_density_on_a_row_is_the_worst_score_and_never_the_best() -> None:
    """log 0 is an answer: -inf, below every other; with nothing else there is no best."""
    never: dict[str, Any] = {"lost": Ill(at="posterior", how=_moved, label="lost")}
    SICK.add("lost")
    with pytest.warns(RuntimeWarning, match="the posterior of 4 of 4 tasks .* is far off"):
        result = compare(never | {"well": Ill(label="well")}, DENSITY, TRAIN, draws=20)
    table = result.table.set_index("strategy")
    assert not result.failures
    assert table.loc["lost", "elpd"] == -np.inf and table.loc["lost", "elpd_diff"] == -np.inf
    assert table.loc["well", "elpd_diff"] == 0
    with pytest.warns(RuntimeWarning, match="far off"):
        alone = compare(never, DENSITY, TRAIN, draws=20)
    assert np.isnan(alone.table["elpd_diff"].item()) and "best" not in str(alone).split("RMSE")[1]


def _moved(found: Delta | None = None) -> Delta | None:
    return None if found is None else replace(found, loc=found.loc + 1e200)


@pytest.mark.usefixtures("no_pictures")
def test_names_that_look_like_markup(tmp_path: Path) -> None:
    strategies = {"[/x]": Ill(label="a"), "[bold]": ill("b", "step", not_finite), ":smile:": Ill()}
    result = compare(strategies, DENSITY, TRAIN, draws=20, folder=tmp_path / "run")
    console = Console(record=True, width=140, file=io.StringIO())
    for table in result.rich_tables():
        console.print(table)
    for text in (str(result), console.export_text()):
        assert "[/x]" in text and "[bold]" in text and ":smile:" in text


def test_converged_column_and_sentences() -> None:
    """Read off the fit: ✓, ✗ with a sentence below, – where it cannot say."""

    @dataclass(frozen=True)
    class Told(Ill):
        arrives: bool | None = None

        def is_tested(self, state: Any) -> bool:
            return self.arrives is not None

        def step(self, density: Density, state: Any, batch: Any, rng: torch.Generator) -> Any:
            info = super().step(density, state, batch, rng)
            if self.arrives and state.step == 4:
                state.arrived = "no gradient is left"
            return info

    told = {"yes": Told(arrives=True), "no": Told(arrives=False), "silent": Told()}
    result = compare(told, DENSITY, TRAIN, draws=20)
    table = result.table.set_index("strategy")
    assert table["converged"].to_dict() == {"yes": True, "no": False, "silent": None}
    for name, outcome in result.outcomes.items():
        assert table.loc[name, "reason"] == outcome.fit.reason
    text = plain(result)
    assert f"no did not converge: {result.outcomes['no'].fit.reason}." in text
    assert "yes did not" not in text and "silent did not" not in text
    assert "✓" in text and "✗" in text
    fig = report.training_curves(result)
    assert fig is not None
    ends = {a.get_gid(): a for ax in fig.axes for a in ax.lines if "end:" in str(a.get_gid())}
    assert set(ends) == {"end:yes:True", "end:no:False"}
    assert ends["end:no:False"].get_markerfacecolor() == "white"
    assert ends["end:yes:True"].get_markerfacecolor() != "white"
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert "converged" in labels and "stopped at its limit of steps" in labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"new": TRAIN}, "among the training tasks"),
        (
            {"prior": GaussianPrior.create(torch.zeros(3, dtype=F64), 1.0)},
            "prior has 3 coordinates",
        ),
        ({"new": FRESH.to(torch.float32)}, "float32"),
        ({"strategies": {"a": Ill(), " ": Ill()}}, "a text that is not empty, got ' '"),
        (
            {"train": replace(TRAIN, is_query=TRAIN.mask)},
            "train: task 't0' has no support rows",
        ),
    ],
)
def test_what_concerns_every_strategy_is_said_before_any_training(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"strategies": {"a": Ill()}, "train": TRAIN, "density": DENSITY}
    with pytest.raises(ValueError, match=message):
        compare(**given | change, folder=tmp_path / "run")
    assert not STEPS and not (tmp_path / "run").exists()
