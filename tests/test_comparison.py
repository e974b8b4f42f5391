"""compare: fair, scored against an exact oracle, and safe with its output folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.cells import cell_len
from torch import Tensor

import varmeta.comparison as compare_module
from varmeta import (
    IMAML,
    CompletePooling,
    Density,
    JointVariational,
    NoPooling,
    PyroNUTS,
    Tasks,
    compare,
    evidence,
)
from varmeta.inference.reachability import reachability_gap
from varmeta.runs import RunFolder
from varmeta.scores import _per_row
from varmeta.seeds import generator

F64 = torch.float64
QUICK = [
    IMAML(steps=30),
    JointVariational(steps=60, adapt_steps=60),
    NoPooling(steps=60, adapt_steps=60),
    CompletePooling(draws=200),
]


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + slope * x[..., 0], noise), obs=y)


def problem(count: int = 12, seed: int = 0) -> tuple[Density, Tasks, Tasks]:
    rng = generator(seed)
    pairs = []
    for i in range(count):
        n = 4 + i % 5
        x = torch.randn(n, 1, generator=rng, dtype=F64)
        level, slope = torch.randn(2, generator=rng, dtype=F64) * 0.5 + 1
        y = level + slope * x[:, 0] + 0.3 * torch.randn(n, generator=rng, dtype=F64)
        pairs.append((x, y))
    tasks = Tasks.from_list(pairs, names=[f"t{i}" for i in range(count)])
    train, new = tasks.split(0.4).hold_out(3)
    return Density(line, tasks, shared=["noise"]), train, new


def test_table_and_outcomes(tmp_path: Path) -> None:
    density, train, new = problem()
    result = compare(
        [*QUICK, PyroNUTS(draws=100, warmup=40, chains=1)], density, train, new, draws=200
    )
    table = result.table
    assert list(table["set"].unique()) == ["known tasks", "new tasks"]
    assert len(table) == 2 * 5
    assert table.drop(columns=["pareto_k", "gap", "converged"]).notna().all(axis=None)
    for row in table.to_dict("records"):
        outcome = result.outcomes[row["strategy"]]
        known = row["set"] == "known tasks"
        posterior, tasks = (outcome.known, train) if known else (outcome.new, new)
        if row["posterior"] in ("gaussian", "laplace"):
            alone = evidence(posterior, outcome.fit.prior, tasks.support, draws=200)
            assert row["pareto_k"] == float(alone.pareto_k.max())
        else:
            assert np.isnan(row["pareto_k"])
        if known and outcome.fit.strategy.keeps_posteriors:
            assert row["gap"] == float(reachability_gap(outcome.fit).mean())
        else:
            assert np.isnan(row["gap"])
    for which, tasks in (("known tasks", train), ("new tasks", new)):
        part = table[table["set"] == which]
        assert (part["rows"] == int(tasks.query.mask.sum())).all()
        assert (part["elpd_diff"] <= 0).all() and (part["elpd_diff"] == 0).sum() == 1
        best = part.loc[part["elpd_diff"].idxmax(), "elpd"]
        assert np.allclose(part["elpd"] - best, part["elpd_diff"])
    reference = table[table["strategy"] == "PyroNUTS"]
    assert (reference["mean_shift"] == 0).all() and (reference["sd_ratio"] == 1).all()
    assert "known tasks" in str(result) and "PyroNUTS" in str(result)
    assert result.outcomes["IMAML"].known.names == train.names


def test_held_out_rows_are_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing every held-out target by nonsense changes the scores and nothing else."""
    density, train, new = problem()
    nonsense = Tasks(
        train.inputs,
        torch.where(train.is_query, 1e3, train.targets),
        train.mask,
        train.is_query,
        train.names,
    )
    clean = compare(QUICK, density, train, new, draws=50)
    spoilt = compare(QUICK, density, nonsense, new, draws=50)
    for name, outcome in clean.outcomes.items():
        assert torch.equal(outcome.fit.prior.loc, spoilt.outcomes[name].fit.prior.loc)
        assert torch.equal(outcome.known.mean, spoilt.outcomes[name].known.mean)
    known = clean.table["set"] == "known tasks"
    assert (spoilt.table[known]["elpd"] < clean.table[known]["elpd"] - 10).all()
    assert np.allclose(spoilt.table[~known]["elpd"], clean.table[~known]["elpd"])


def test_score_against_the_exact_predictive_density() -> None:
    """Complete pooling in a linear-Gaussian model with known noise: everything in closed form."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 3.0).to_event(1))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", dist.Normal(w[0] + w[1] * x[..., 0], 0.3), obs=y)

    _, train, _ = problem()
    result = compare([CompletePooling(draws=4000)], Density(model, train), train, draws=4000)

    def design(tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
        x = tasks.inputs[tasks.mask][:, 0].numpy()
        return np.stack([np.ones_like(x), x], 1), tasks.targets[tasks.mask].numpy()

    seen_x, seen_y = design(train.support)
    cov = np.linalg.inv(seen_x.T @ seen_x / 0.09 + np.eye(2) / 9)
    mean = cov @ seen_x.T @ seen_y / 0.09
    x, y = design(train.query)
    variance = 0.09 + np.einsum("ni,ij,nj->n", x, cov, x)
    exact = -0.5 * np.log(2 * np.pi * variance) - 0.5 * (y - x @ mean) ** 2 / variance
    row = result.table.iloc[0]
    assert row["elpd"] == pytest.approx(exact.mean(), abs=0.01)
    assert row["rmse"] == pytest.approx(np.sqrt(((y - x @ mean) ** 2).mean()), abs=0.01)
    inside = (np.abs(y - x @ mean) < 1.6449 * np.sqrt(variance)).mean()
    assert row["coverage"] == pytest.approx(inside, abs=2.5 / len(y))


def test_standard_error_is_that_of_a_mean_over_tasks() -> None:
    """With equally large tasks the ratio estimator is the familiar sd/√T of the task means."""
    values = torch.randn(9, 4, generator=generator(0), dtype=F64)
    tasks = Tasks.from_list([(torch.ones(4, 1, dtype=F64), torch.ones(4, dtype=F64))] * 9)
    mean, error = _per_row(values, tasks)
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.mean(-1).std() / 3))


def test_table_fits_its_width_with_long_names_and_says_how_far_to_trust() -> None:
    density, train, _ = problem()
    name = "A strategy whose name is far too long for a column (and goes on)"
    wide = {name: NoPooling(steps=5, adapt_steps=5), "Laplace": IMAML(steps=2), "MAP": QUICK[3]}
    result = compare(wide, density, train, draws=20)
    result.table["pareto_k"] = [0.834, -np.inf, np.nan]
    text = str(result)
    assert all(cell_len(line) <= 150 for line in text.splitlines()) and "…" not in text
    assert "k̂" in text and "0.83" in text and "exact" in text and "above 0.7" in text


@pytest.mark.parametrize(
    ("sizes", "hold_out", "said"),
    [
        ((1, 1, 2, 1, 5, 4), 0, "known tasks: 3 of 6 tasks have no held-out row"),
        ((1, 1, 2, 1, 5, 4), 1, "new tasks: no task has a held-out row, so that nothing is scored"),
        ((1, 1, 1), 1, "known tasks: no task has a held-out row"),
    ],
)
def test_tasks_too_small_to_split(sizes: tuple[int, ...], hold_out: int, said: str) -> None:
    """They are left out of the scores, which is said, and everything else goes on."""
    density, _, _ = problem()
    ones = [(torch.ones(n, 1, dtype=F64), torch.arange(n, dtype=F64)) for n in sizes]
    split = Tasks.from_list(ones).split(0.3)
    train, new = split, None
    if hold_out:
        train, new = split.select(range(1, len(sizes))), split.select([0])
    found = compare([NoPooling(steps=5, adapt_steps=5)], density, train, new, draws=50)
    assert not found.failures and str(found).count(said) == 1
    rows = found.table.set_index("set")["rows"].to_dict()
    scored = found.table.set_index("set")["elpd"].notna().to_dict()
    assert scored == {which: count > 0 for which, count in rows.items()}


def test_nothing_held_out() -> None:
    density, train, _ = problem()
    found = compare([NoPooling(steps=5, adapt_steps=5)], density, train.unsplit)
    assert "known tasks: the tasks are not split" in str(found)
    table = found.table
    assert table["rows"].item() == 0 and np.isnan(table["elpd"].item())


def test_folder_finish_overwrite_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    density, train, new = problem()
    folder = tmp_path / "run"
    strategies = [QUICK[0], QUICK[3]]
    calls: list[str] = []
    plain_fit = compare_module.fit

    def interrupted(strategy, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(strategy.name)
        if strategy.name == "CompletePooling" and len(calls) < 3:
            raise KeyboardInterrupt("stopped")
        return plain_fit(strategy, *args, **kwargs)

    monkeypatch.setattr(compare_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(strategies, density, train, new, draws=50, folder=folder)
    assert (folder / "states" / "IMAML.pt").exists() and not (folder / "table.csv").exists()
    result = compare(strategies, density, train, new, draws=50, folder=folder)
    plain = compare(strategies, density, train, new, draws=50)
    assert torch.equal(
        result.outcomes["IMAML"].fit.prior.loc, plain.outcomes["IMAML"].fit.prior.loc
    )
    files = {path.name for path in folder.iterdir()}
    assert {"run.json", "states", "table.csv", "IMAML.nc", "CompletePooling.nc"} <= files
    assert any(name.startswith("forest") and name.endswith(".png") for name in files)
    assert not any("part" in name for name in files)
    written = pd.read_csv(folder / "table.csv")
    assert np.allclose(written["elpd"], result.table["elpd"])
    modules = pd.read_csv(folder / "modules.csv")
    for name, outcome in result.outcomes.items():
        own = outcome.fit.shrinkage(posterior=outcome.known, query=train.query).table
        mine = modules[modules["strategy"] == name].drop(columns="strategy")
        pd.testing.assert_frame_equal(mine.reset_index(drop=True), own)

    with pytest.raises(FileExistsError, match=r"finished run.*--overwrite"):
        compare(strategies, density, train, new, draws=50, folder=folder)
    (folder / "mine.txt").write_text("keep")
    compare([QUICK[3]], density, train, new, draws=50, folder=folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "keep" and not (folder / "IMAML.nc").exists()


def test_folder_refusals(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="no run of varmeta"):
        RunFolder(full, {})
    with pytest.raises(FileExistsError, match="no run of varmeta"):
        RunFolder(full, {}, overwrite=True)
    open_run = tmp_path / "open"
    RunFolder(open_run, {"seed": 0})
    with pytest.raises(FileExistsError, match="other settings"):
        RunFolder(open_run, {"seed": 1})
    RunFolder(open_run, {"seed": 0})


def test_refusals() -> None:
    density, train, new = problem()
    with pytest.raises(ValueError, match="strategies is empty"):
        compare([], density, train, new)
    with pytest.raises(ValueError, match=r"two are called 'IMAML'; give them names.*\{'first'"):
        compare([IMAML(), IMAML(steps=5)], density, train, new)
    with pytest.raises(ValueError, match="among the training tasks"):
        compare(QUICK, density, train, train)
