"""What a comparison has computed is not computed again; and every name has files of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

import varmeta.comparison as comparison
from benchmarks.stale_models import around, data
from varmeta import (
    MAML,
    CompletePooling,
    Density,
    GradientDescent,
    JointVariational,
    NoPooling,
    compare,
)
from varmeta.file_names import file_names
from varmeta.kept import PARTS, _packed, _unpacked

TASKS = data(4)
DENSITY = Density(around(0.5), TASKS)
TRAIN, NEW = TASKS.hold_out(1)
FEW = GradientDescent(0.01, 2, tolerance=0)
# A Gaussian, draws and points; one that keeps its posteriors has a gap.
STRATEGIES = {
    "svi (tight)": JointVariational(q="full", steps=3, adapt_steps=3),
    "svi-tight": CompletePooling(draws=20),
    "α": MAML(steps=2, minimiser=FEW),
    "β": NoPooling(steps=3, adapt_steps=3),
}


class Killed(BaseException):
    """As SIGKILL: nobody catches it, and nothing is tidied up."""


def kill(*_: Any) -> None:
    raise Killed


def run(folder: Path | None = None) -> comparison.Comparison:
    return compare(STRATEGIES, DENSITY, TRAIN, NEW, draws=30, folder=folder)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which strategies are adapted or scored, in order."""
    found: list[str] = []
    for name in ("score", "reachability_gap"):
        plain = getattr(comparison, name)

        def counted(given: Any, *rest: Any, name: str = name, plain: Any = plain) -> Any:
            found.append(name)
            return plain(given, *rest)

        monkeypatch.setattr(comparison, name, counted)
    for name in ("adapt", "posterior"):
        plain = getattr(comparison.Fit, name)

        def method(fit: Any, *rest: Any, name: str = name, plain: Any = plain) -> Any:
            found.append(name)
            return plain(fit, *rest)

        monkeypatch.setattr(comparison.Fit, name, method)
    return found


def test_a_kill_costs_no_posterior_and_no_score(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last strategy is scored, then before anything is written; nothing is done twice.

    The table is that of an uninterrupted comparison, bit for bit, save for times.
    """
    whole, once = run(), list(calls)
    plain, folder = comparison.score, tmp_path / "run"
    monkeypatch.setattr(
        comparison,
        "score",
        lambda outcome, *rest: (
            kill() if outcome.fit.strategy.name == "NoPooling" else plain(outcome, *rest)
        ),
    )
    calls.clear()
    with pytest.raises(Killed):
        run(folder)
    monkeypatch.setattr(comparison, "score", plain)
    monkeypatch.setattr(comparison, "_write", kill)
    with pytest.raises(Killed):
        run(folder)
    assert calls == once and calls.count("score") == 8
    monkeypatch.setattr(comparison, "_write", lambda *_: None)
    calls.clear()
    again = run(folder)
    assert calls == []
    times = ["seconds", "adapt_seconds"]
    pd.testing.assert_frame_equal(
        again.table.drop(columns=times), whole.table.drop(columns=times), check_exact=True
    )
    for name, outcome in whole.outcomes.items():
        for which in ("known", "new"):
            one, other = getattr(outcome, which), getattr(again.outcomes[name], which)
            assert type(one) is type(other) and one.names == other.names
            assert_same(vars(one) | {"density": 0}, vars(other) | {"density": 0})
    assert again.table["adapt_seconds"].equals(run(folder).table["adapt_seconds"])


def test_a_broken_part_is_computed_again(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another state is: both count for nothing."""
    monkeypatch.setattr(comparison, "_write", lambda *_: None)
    first = run(tmp_path)
    calls.clear()
    files = sorted((tmp_path / "states").glob("svi_tight-*.scores.pt"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    saved = torch.load(files[1], weights_only=True)
    torch.save(saved | {"state": "another"}, files[1])
    again = run(tmp_path)
    assert calls == ["score"] * 4
    pd.testing.assert_frame_equal(again.table, first.table, check_exact=True)


def test_nothing_is_kept_of_a_finished_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are in the ArviZ files and the table by then; each strategy has its own."""
    monkeypatch.setattr("varmeta.report_write.write_figures", lambda *_: [])
    strategies = {"svi (tight)": STRATEGIES["svi-tight"], "svi-tight": STRATEGIES["α"]}
    compare(strategies, DENSITY, TRAIN, draws=20, folder=tmp_path)
    stems = file_names(strategies).values()
    assert len(list(tmp_path.glob("*.nc"))) == len(strategies)
    assert {p.name for p in (tmp_path / "states").iterdir()} == {f"{stem}.pt" for stem in stems}


def test_parts_are_plain(tmp_path: Path) -> None:
    """And what is no posterior of varmeta's, or no number, is not kept."""
    outcome = run().outcomes["svi (tight)"]
    torch.save(_packed((outcome.known, None, 1.5)), tmp_path / "part.pt")
    known, none, number = _unpacked(torch.load(tmp_path / "part.pt", weights_only=True), DENSITY)
    assert_same(known.mean, outcome.known.mean)
    assert none is None and number == 1.5 and known.density is DENSITY
    with pytest.raises(TypeError):
        _packed([object()])
    assert set(PARTS) == {"posteriors", "gap", "scores"}


# -- names ----------------------------------------------------------------------------------------

AWKWARD = [
    "..",
    "con",
    "CON",
    "nul",
    "a/b",
    "a b",
    "α",
    "β",
    "IMAML",
    "imaml",
    "part_x",
    "x",
    "é" * 300,
]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD)), unique=True))
def test_no_two_names_have_one_file(names: list[str]) -> None:
    """On a file system that takes capital and small letters for one, and on Windows."""
    stems = file_names(names)
    assert list(stems) == names
    assert len({stem.casefold() for stem in stems.values()}) == len(names)
    for stem in stems.values():
        assert stem.replace("_", "").replace("-", "").isalnum() and stem.isascii()
        assert len(stem) < 100 and stem.lower() not in ("con", "nul")
        assert not any(stem == f"part_{other}" for other in stems.values())


def test_usual_names_stay_as_they_are() -> None:
    usual = ["IMAML", "PyroSVI (AutoNormal)", "no-pooling", "nan posterior"]
    assert list(file_names(usual).values()) == [
        "IMAML",
        "PyroSVI_AutoNormal",
        "no_pooling",
        "nan_posterior",
    ]


def test_every_awkward_name_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_write", lambda *_: None)
    pooled = {name: CompletePooling(draws=10 + k) for k, name in enumerate(AWKWARD)}
    first = compare(pooled, DENSITY, TRAIN, draws=5, folder=tmp_path)
    again = compare(pooled, DENSITY, TRAIN, draws=5, folder=tmp_path)
    pd.testing.assert_frame_equal(again.table, first.table)
    for k, outcome in enumerate(again.outcomes.values()):
        assert len(outcome.known.draws) == 10 + k  # type: ignore[attr-defined]
    states = {p for p in tmp_path.rglob("*.pt")} - {tmp_path / "data.pt"}
    assert {p.parent for p in states} == {tmp_path / "states"}


@pytest.mark.parametrize("name", ["", "  ", 3])
def test_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="a name must be a text that is not empty, got"):
        compare({name: CompletePooling()}, DENSITY, TRAIN)
