"""The fleet: its cases can be learned from, references are of the same rows, the runner runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from benchmarks.fleet import __main__ as command
from benchmarks.fleet import references
from benchmarks.fleet.cases import CASES, LINEAR
from benchmarks.fleet.page import write_page
from benchmarks.fleet.references import load_reference, maximum
from benchmarks.fleet.runner import (
    Prepared,
    against_references,
    float64,
    paired,
    run_one,
    run_several,
)
from benchmarks.fleet.verdicts import reasons, worse_than_unpooled
from varmeta import (
    AmortisedVariational,
    CompletePooling,
    GaussianPrior,
    JointVariational,
    NoPooling,
    Strategy,
    compare,
)
from varmeta.scores import KNOWN, NEW

EVERY = pytest.mark.parametrize("name", CASES)
KNOWN_CASES = [name for name in CASES if load_reference(name)]
REFERENCED = pytest.mark.parametrize("name", KNOWN_CASES)
AT_MAXIMUM = [name for name in KNOWN_CASES if maximum(load_reference(name))]
KINDS = (
    "normal",
    "robust",
    "binomial",
    "Poisson",
    "negative binomial",
    "Bernoulli",
    "growth",
    "pharmacokinetics",
    "Gamma",
)


def test_the_fleet_is_large_and_of_many_kinds() -> None:
    assert len(CASES) >= 22
    for kind in KINDS:
        assert any(case.kind.startswith(kind) for case in CASES.values()), kind
    kept_for_checking = {"exam", "oxboys", "theoph", "orthodont", "phenobarb", "epil", "toenail"}
    kept_for_checking |= {"kidney", "cbpp", "culcita", "penicillin", "pastes", "btheb", "wine"}
    assert not (kept_for_checking | {"dyestuff"}) & set(CASES)


@EVERY
def test_a_case_is_a_problem(name: str) -> None:
    problem = CASES[name].problem()
    for tasks in [problem.train] + ([problem.new] if problem.new else []):
        start = problem.density.prior_loc.expand(len(tasks), -1)
        assert problem.density.negative_log_likelihood(start, tasks).isfinite().all()
        assert tasks.query.mask.any()


def test_most_cases_have_their_references() -> None:
    assert len(KNOWN_CASES) >= 16
    assert len(AT_MAXIMUM) >= 0.8 * len(KNOWN_CASES)


@REFERENCED
def test_a_reference_is_of_the_rows_of_the_split(name: str) -> None:
    prepared = Prepared(CASES[name])  # compares the digests of the rows
    problem, reference, nuts = prepared.problem, prepared.reference, prepared.reference["nuts"]
    density, tasks = problem.density, len(problem.train)
    assert reference["support_rows"] == int(problem.train.support.mask.sum())
    assert reference["tasks"] == list(problem.train.names)
    assert reference["sites"] == [site.name for site in density.sites]
    assert reference["shared_sites"] == [site.name for site in density.shared_sites]
    assert np.shape(nuts["theta_mean"]) == np.shape(nuts["theta_sd"]) == (tasks, density.dim)
    assert np.shape(nuts["known_log_density"]) == (tasks,)
    sizes = {"loc": density.dim, "log_scale": len(density.sites), "shared": density.shared_dim}
    for key, size in sizes.items():
        if size:
            for value in nuts[key].values():
                assert np.shape(value) == (size,) and np.isfinite(value).all()
            assert (np.array(nuts[key]["sd"]) > 0).all()
            assert (np.array(nuts[key]["q05"]) < nuts[key]["q95"]).all()
    assert (np.array(nuts["theta_sd"]) > 0).all()


@REFERENCED
def test_a_reference_is_long_enough(name: str) -> None:
    nuts = load_reference(name)["nuts"]
    assert nuts["worst_rhat"] < 1.01 and nuts["least_ess"] >= 400


@pytest.mark.parametrize("name", AT_MAXIMUM)
def test_nuts_and_maximum_likelihood_agree_on_the_mean(name: str) -> None:
    """Within one posterior sd: the hyperprior is weak, but where tasks are few it does count."""
    reference = load_reference(name)
    nuts, best = reference["nuts"]["loc"], reference["maximum_likelihood"][0]
    far = np.abs(np.array(nuts["mean"]) - best["loc"]) / nuts["sd"]
    assert far.max() < 1.0


@pytest.mark.parametrize("name", [name for name in LINEAR if name in KNOWN_CASES])
def test_two_ways_to_the_maximum_of_the_likelihood(name: str) -> None:
    """Quadrature and statsmodels; and the closed form is as high there.

    Where statsmodels stops short of the maximum, it is lower; it is never higher.
    """
    ours, theirs = load_reference(name)["maximum_likelihood"]
    unit = np.array(load_reference(name)["nuts"]["loc"]["sd"])
    short = ours["log_likelihood"] - theirs["log_likelihood"]
    assert short > -1e-3
    if short < 1e-3:
        assert (np.abs(np.subtract(ours["loc"], theirs["loc"])) < 0.02 * unit).all()
    tasks, total, dim = CASES[name].problem().train.support, 0.0, len(ours["loc"])
    noise = np.exp(ours["shared"][-1])
    for x, y, mask in zip(tasks.inputs, tasks.targets, tasks.mask, strict=True):
        design = np.column_stack([np.ones(int(mask.sum())), x[mask]])
        random = design[:, :dim] * ours["scale"]
        mean = design @ [*ours["loc"], *ours["shared"][:-1]]
        law = multivariate_normal(mean, random @ random.T + noise**2 * np.eye(len(mean)))
        total += law.logpdf(y[mask])
    assert total == pytest.approx(ours["log_likelihood"], abs=1e-6)


@REFERENCED
def test_both_languages_read_the_same_model(name: str) -> None:
    """NumPyro's log-likelihood at its posterior means is that of the density."""
    problem, nuts = CASES[name].problem(), load_reference(name)["nuts"]
    theta = float64(nuts["theta_mean"])
    density, support = problem.density, problem.train.support
    shared = float64(nuts["shared"]["mean"] if nuts["shared"] else [])
    found = -density.negative_log_likelihood(theta, support, shared)
    assert found.tolist() == pytest.approx(nuts["log_likelihood_at_means"], rel=1e-9, abs=1e-9)


def test_distances_are_zero_at_the_references() -> None:
    reference = load_reference("rail")
    nuts, best = reference["nuts"], reference["maximum_likelihood"][0]
    prior = GaussianPrior.create(float64(nuts["loc"]["mean"]), float64(best["scale"]))
    found = against_references(prior, float64(best["shared"]), reference)
    assert found["loc_nuts"] == found["shared_ml"] == 0.0
    assert found["scale_ml"] == pytest.approx(0.0, abs=1e-9)
    assert found["loc_ml"] == pytest.approx(
        abs(nuts["loc"]["mean"][0] - best["loc"][0]) / nuts["loc"]["sd"][0]
    )


def test_gains_are_those_of_compare() -> None:
    prepared = Prepared(CASES["rail"])
    problem = prepared.problem
    makers = {"no-pooling": lambda: NoPooling(steps=5), "complete-pooling": CompletePooling}
    records = run_several(prepared, makers, limit=600.0)
    strategies = {name: make() for name, make in makers.items()}
    table = compare(strategies, problem.density, problem.train, problem.new, draws=1000).table
    for which in (KNOWN, NEW):
        rows = table[table["set"] == which].set_index("strategy")
        best = rows["elpd"].idxmax()
        (other,) = set(makers) - {best}
        gain, error = paired(records[other], records[best], which)
        assert gain == pytest.approx(rows.loc[other, "elpd_diff"], rel=1e-9)
        assert error == pytest.approx(rows.loc[other, "elpd_diff_se"], rel=1e-9, nan_ok=True)
        assert paired(records[best], records[best], which)[0] == 0.0


def test_what_fails_is_a_record() -> None:
    prepared = Prepared(CASES["warpbreaks"])

    def broken() -> Strategy:
        raise FloatingPointError("task 'AL' has a loss of nan")

    record = run_one(prepared, "broken", broken, limit=60.0)
    assert not record["finished"]
    assert "task 'AL' has a loss of nan" in record["reason"]
    long = NoPooling(q="diagonal", steps=10**6)  # steps of Adam, and no end before the last
    late = run_one(prepared, "late", lambda: long, limit=0.5)
    assert not late["finished"] and "stopped after" in late["reason"]


def test_the_command_runs_goes_on_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "fleet.md"
    options = ["--cases", "rail,warpbreaks", "--strategies", "complete-pooling"]
    monkeypatch.setattr(sys, "argv", ["fleet", *options, "--out", str(out), "--page", str(page)])
    command.main()
    rows = json.loads(page.with_suffix(".json").read_text())
    assert [(row["case"], row["strategy"]) for row in rows] == [
        ("rail", "complete-pooling"),
        ("warpbreaks", "complete-pooling"),
    ]
    assert all(row["finished"] for row in rows) and "## warpbreaks" in page.read_text()
    done = (out / "rail" / "complete-pooling.json").stat().st_mtime_ns
    capsys.readouterr()
    command.main()
    assert (out / "rail" / "complete-pooling.json").stat().st_mtime_ns == done
    assert "rail, complete-pooling" not in capsys.readouterr().out
    records = command.read_records(out)
    assert rows[0]["shift"] == records["rail"]["complete-pooling"]["shift"]
    assert rows[0]["commit"] == records["rail"]["complete-pooling"]["commit"]
    write_page({"rail": records["rail"]}, page)  # a run that is not made again keeps its numbers
    assert json.loads(page.with_suffix(".json").read_text()) == rows


def test_a_case_without_a_reference_has_all_that_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "FOLDER", tmp_path / "none")
    assert Prepared(CASES["warpbreaks"]).reference is None
    out, page = tmp_path / "out", tmp_path / "fleet.md"
    options = ["--cases", "warpbreaks", "--strategies", "complete-pooling,no-pooling"]
    monkeypatch.setattr(sys, "argv", ["fleet", *options, "--out", str(out), "--page", str(page)])
    command.main()
    rows = {row["strategy"]: row for row in json.loads(page.with_suffix(".json").read_text())}
    row = rows["complete-pooling"]
    assert row["finished"] and row["converged"] and row["seconds"] > 0 and row["gradients"] > 0
    assert np.isfinite([row["known_elpd"], row["known_gain"], row["known_gain_se"]]).all()
    assert [row[key] for key in ("shift", "sd_ratio", "loc_nuts", "scale_ml")] == [None] * 4
    text = page.read_text()
    assert "No reference has been computed for warpbreaks" in text
    assert "make fleet-references" in text


def test_scales_that_are_stated_are_not_held_against_the_references() -> None:
    prepared = Prepared(CASES["rail"])
    far = run_one(prepared, "amortised", AmortisedVariational, limit=60.0)["globals"]
    assert set(far) == {"loc_nuts", "loc_ml", "shared_nuts", "shared_ml"}
    far = run_one(prepared, "joint", JointVariational, limit=60.0)["globals"]
    assert far["scale_ml"] < 0.2


def test_reasons_are_what_the_record_has() -> None:
    row = {
        "strategy": "imaml",
        "posterior": "laplace",
        "undetermined": "slope",
        "converged": False,
        "known_pareto_k": 0.8,
        "known_gain": -0.5,
        "known_gain_se": 0.1,
        "nuts_gain": -0.4,
        "nuts_gain_se": 0.1,
        "known_to_nuts": -0.1,
        "known_to_nuts_se": 0.1,
        "loc_ml": 3.0,
    }
    said = reasons(row)
    for part in ("NUTS is worse too", "slope", "k̂ 0.80", "not converged", "θ0 3.0 sd from ML"):
        assert any(part in text for text in said), part
    assert not any("NUTS" in text for text in reasons(row | {"known_to_nuts": -0.3}))
    fine = {"undetermined": "", "converged": True, "known_pareto_k": 0.2, "loc_ml": 0.1}
    assert reasons(row | fine | {"nuts_gain": 0.0}) == []
    assert reasons(row | fine | {"nuts_gain": 0.0, "posterior": "delta"})


def test_worse_than_unpooled_is_by_two_standard_errors() -> None:
    assert worse_than_unpooled({"known_gain": -0.3, "known_gain_se": 0.1})
    assert not worse_than_unpooled({"known_gain": -0.3, "known_gain_se": 0.2})
    assert worse_than_unpooled(
        {"known_gain": 0.3, "known_gain_se": 0.1, "new_gain": -0.5, "new_gain_se": 0.1}
    )
    assert not worse_than_unpooled({"known_gain": None, "known_gain_se": None})
