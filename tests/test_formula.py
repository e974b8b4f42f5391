"""Formulas: what they say, the columns they make, and the models they stand for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, special, stats
from typer.testing import CliRunner

import varmeta as vm
from varmeta.cli import app
from varmeta.data import load
from varmeta.families import FAMILIES
from varmeta.formula import Formula
from varmeta.formula_model import WrittenModel
from varmeta.own_problems import Options, own_problem

RNG = np.random.default_rng(0)
N = 60
DATA = pd.DataFrame(
    {
        "g": RNG.choice(list("pqrs"), N),
        "x": RNG.normal(3.0, 2.0, N),
        "z.1": RNG.normal(size=N),
        "k": RNG.choice([2019, 2020, 2021], N),
        "soil": RNG.choice(["clay", "loam", "sand"], N),
        "t": RNG.uniform(1, 9, N),
        "n": RNG.integers(5, 9, N),
        "w": RNG.uniform(0.5, 2, N),
        "real": RNG.normal(10, 3, N),
        "count": RNG.poisson(3, N),
        "share": RNG.uniform(0.1, 0.9, N),
        "two": RNG.choice(["no", "yes"], N),
        "grade": RNG.choice(["1", "2", "3", "10"], N),
        "kind": RNG.choice(["ash", "elm", "oak"], N),
    }
)
Law = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


def ordinal(eta: np.ndarray, v: dict[str, Any]) -> np.ndarray:
    cuts = np.concatenate([[-np.inf, 0.0], np.cumsum(v["gaps"]), [np.inf]])
    below = special.expit(cuts - eta[:, None])
    y = DATA["grade"].map({"1": 0, "2": 1, "3": 2, "10": 3}).to_numpy()
    rows = np.arange(N)
    return np.log(below[rows, y + 1] - below[rows, y])


def negative_binomial(eta: np.ndarray, v: dict[str, Any]) -> np.ndarray:
    size, mean = float(v["shape"]), np.exp(eta)
    return stats.nbinom.logpmf(DATA["count"], size, size / (size + mean))


def beta(eta: np.ndarray, v: dict[str, Any]) -> np.ndarray:
    mean, phi = special.expit(eta), float(v["precision"])
    return stats.beta.logpdf(DATA["share"], mean * phi, (1 - mean) * phi)


LAWS: dict[str, tuple[str, Law]] = {
    "normal": ("real", lambda eta, v: stats.norm.logpdf(DATA["real"], eta, v["sigma"])),
    "student": (
        "log(real + 20)",
        lambda eta, v: stats.t.logpdf(np.log(DATA["real"] + 20), v["nu"], eta, v["sigma"]),
    ),
    "bernoulli": (
        "two",
        lambda eta, v: stats.bernoulli.logpmf(DATA["two"] == "yes", special.expit(eta)),
    ),
    "binomial": (
        "count | trials(n + 8)",
        lambda eta, v: stats.binom.logpmf(DATA["count"], DATA["n"] + 8, special.expit(eta)),
    ),
    "poisson": (
        "count | rate(t)",
        lambda eta, v: stats.poisson.logpmf(DATA["count"], DATA["t"] * np.exp(eta)),
    ),
    "negative-binomial": ("count", negative_binomial),
    "beta": ("share", beta),
    "ordinal": ("grade", ordinal),
}


def rows_of(tasks: vm.Tasks, values: torch.Tensor) -> np.ndarray:
    """`[T, N]` in the order of the table."""
    assert tasks.row_ids is not None
    out = values[tasks.mask][tasks.row_ids[tasks.mask].argsort()]
    return out.numpy()


def values_of(made: vm.FormulaModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """θ `[T, D]` and φ at random, and what the shared ones are by name."""
    g = torch.Generator().manual_seed(0)
    like: Any = {"generator": g, "dtype": torch.float64}
    theta = 0.3 * torch.randn(len(made.tasks), made.density.dim, **like)
    shared = 0.3 * torch.randn(made.density.shared_dim, **like)
    known = made.density.constrain_shared(shared)
    return theta, shared, {name: value.numpy() for name, value in known.items()}


@pytest.mark.parametrize("family", LAWS)
def test_the_model_has_the_likelihood_that_scipy_has(family: str) -> None:
    """With terms that vary, others, an offset and weights; every family but the categorical."""
    response, law = LAWS[family]
    beside = "+" if "|" in response else "|"
    made = vm.from_formula(
        f"{response} {beside} weights(w) ~ x + soil + z.1 + offset(0.1 * t) + (x | g)",
        DATA,
        family=family,
    )
    assert made.varying == ("Intercept", "x")
    theta, shared, v = values_of(made)
    own = dict(zip(made.tasks.names, theta.numpy(), strict=True))
    eta = np.array([own[g][0] for g in DATA["g"]])
    eta += np.array([own[g][1] for g in DATA["g"]]) * DATA["x"]
    eta += v["soil[loam]"] * (DATA["soil"] == "loam") + v["soil[sand]"] * (DATA["soil"] == "sand")
    eta += v["z.1"] * DATA["z.1"] + 0.1 * DATA["t"]
    wanted = DATA["w"] * law(np.asarray(eta), v)
    got = rows_of(made.tasks, made.density.log_likelihood(theta, made.tasks, shared))
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_classes_are_a_softmax_with_the_first_as_reference() -> None:
    made = vm.from_formula("kind ~ x + (1 | g)", DATA, family="categorical")
    theta, shared, v = values_of(made)
    own = dict(zip(made.tasks.names, theta.numpy(), strict=True))
    eta = np.array([own[g] for g in DATA["g"]]) + DATA["x"].to_numpy()[:, None] * v["x"]
    logits = np.concatenate([np.zeros((N, 1)), eta], 1)
    y = DATA["kind"].map({"ash": 0, "elm": 1, "oak": 2})
    wanted = special.log_softmax(logits, 1)[np.arange(N), y]
    got = rows_of(made.tasks, made.density.log_likelihood(theta, made.tasks, shared))
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    assert set(LAWS) | {"categorical"} == set(FAMILIES)


def test_the_fit_is_the_maximum_likelihood_of_the_mixed_model() -> None:
    """Of sleepstudy, whose priors are weak: within 2% of a standard error, scales within 1%."""
    data = load("sleepstudy")
    made = vm.from_formula("reaction ~ 1 + days + (1 + days || subject)", data)
    found = vm.fit(vm.LaplaceEvidence(), made.density, made.tasks)
    days, y = np.arange(10.0), data["reaction"].to_numpy().reshape(18, 10)
    z = np.column_stack([np.ones(10), days])

    def loss(p: np.ndarray) -> float:
        cov = (z * np.exp(2 * p[2:4])) @ z.T + np.exp(2 * p[4]) * np.eye(10)
        rest = y - z @ p[:2]
        quadratic = (rest * np.linalg.solve(cov, rest.T).T).sum()
        return float(0.5 * (18 * np.linalg.slogdet(cov)[1] + quadratic))

    best = optimize.minimize(loss, [250, 10, 3, 1.5, 3.2], method="BFGS", options={"gtol": 1e-3})
    errors = np.sqrt(np.diag(best.hess_inv))[:2]
    assert (np.abs(found.prior.loc.numpy() - best.x[:2]) < 0.02 * errors).all()
    sigma = made.density.constrain_shared(found.shared)["sigma"]
    scales = torch.cat([found.prior.scale, sigma[None]])
    np.testing.assert_allclose(scales.numpy(), np.exp(best.x[2:]), rtol=0.01)


def test_columns_are_indicators_centred_numbers_and_their_products() -> None:
    made = vm.from_formula("real ~ center(x) * soil + C(k) + (1 | g)", DATA)
    x, loam = DATA["x"] - DATA["x"].mean(), DATA["soil"] == "loam"
    wanted = {
        "center(x)": x,
        "soil[loam]": loam,
        "soil[sand]": DATA["soil"] == "sand",
        "C(k)[2020]": DATA["k"] == 2020,
        "C(k)[2021]": DATA["k"] == 2021,
        "center(x):soil[loam]": x * loam,
        "center(x):soil[sand]": x * (DATA["soil"] == "sand"),
    }
    assert made.tasks.input_names == tuple(wanted)
    for k, column in enumerate(wanted.values()):
        np.testing.assert_allclose(rows_of(made.tasks, made.tasks.inputs[..., k]), column)


@pytest.mark.parametrize(
    "terms",
    ["center(x) * soil + C(k)", "bs(x, df=5) + k", "scale(z.1) + log(t):soil", "I(x^2) + sqrt(t)"],
)
def test_new_rows_are_coded_as_those_learned_from(terms: str) -> None:
    made = vm.from_formula(f"real ~ {terms} + (1 | g)", DATA)
    design = vm.Design.from_json(json.loads(json.dumps(made.tasks.design.to_json())))  # type: ignore[union-attr]
    assert design == made.tasks.design
    whole = vm.Tasks.from_frame(DATA, design=design)
    assert torch.equal(whole.inputs, made.tasks.inputs)
    some = vm.Tasks.from_frame(DATA.iloc[7:10], design=design)
    for k in range(made.tasks.inputs.shape[-1]):
        column = rows_of(whole, whole.inputs[..., k])[7:10]
        np.testing.assert_array_equal(rows_of(some, some.inputs[..., k]), column)
    if "x^2" in terms:
        k = made.tasks.input_names.index("I(x ** 2)")
        np.testing.assert_allclose(rows_of(whole, whole.inputs[..., k]), DATA["x"] ** 2)
    if "C(k)" in terms:
        with pytest.raises(ValueError, match="levels that the data learned from do not have"):
            vm.Tasks.from_frame(DATA.assign(k=1999), design=design)


@pytest.mark.parametrize(
    ("formula", "varying", "shared"),
    [
        ("real ~ x + (1 | g)", ["Intercept"], ["x"]),
        ("real ~ x + (x | g)", ["Intercept", "x"], []),
        ("real ~ x + (1 | g) + (0 + x | g)", ["Intercept", "x"], []),
        ("real ~ x + (0 + x | g)", ["x"], ["Intercept"]),
        ("real ~ soil + (0 + soil | g)", ["soil[clay]", "soil[loam]", "soil[sand]"], []),
        ("real ~ 0 + soil + (1 | g)", ["Intercept"], ["soil[clay]", "soil[loam]"]),
        ("real ~ x + (1 | g:soil)", ["Intercept"], ["x"]),
    ],
)
def test_means_of_what_varies_are_taken_from_the_population(
    formula: str, varying: list[str], shared: list[str]
) -> None:
    """η = F β + V u with u around 0 is V θ + (the rest) φ: the columns span the same space."""
    made = vm.from_formula(formula, DATA)
    assert list(made.varying) == varying and list(made.shared) == [*shared, "sigma"]
    assert [s.name for s in made.density.sites] == varying
    if "g:soil" in formula:
        assert made.tasks.names[0] == f"{DATA['g'][0]}:{DATA['soil'][0]}"


@pytest.mark.parametrize(
    ("formula", "family", "said"),
    [
        ("real", "normal", "wanted one '~'"),
        ("real ~ x", "normal", "no term varies by group"),
        ("real ~ (1 | g) + (1 | soil)", "normal", "terms vary by g and by soil"),
        ("real ~ (1 | g / soil)", "normal", "a group is a column, or columns as a:b"),
        ("real ~ x + x | g", "normal", r"write terms that vary as \+ \(terms"),
        ("real | se(w) ~ (1 | g)", "normal", "stands 'se.w.'; there are: trials"),
        ("real ~ flor + (1 | g)", "normal", "no column 'flor'; the data have: g, x"),
        ("real ~ x + (1 | group)", "normal", "no column 'group'"),
        ("real ~ foo(x) + (1 | g)", "normal", "name 'foo' is not defined"),
        ("real ~ x + + (1 | g", "normal", "formula"),
        ("real ~ log(x - 100) + (1 | g)", "normal", r"log\(x - 100\) is nan in row 0 \(60 rows"),
        ("real ~ x + I(2 * x) + (1 | g)", "normal", "I.2 . x. is a combination of the other"),
        ("real ~ 1 + (x | g)", "normal", r"x varies by g around a mean .* \+ x among"),
        ("real ~ x + (1 | g)", "gaussian", "family must be one of normal, student"),
        ("count ~ x + (1 | g)", "binomial", "write response . trials"),
        ("count | trials(n) ~ x + (1 | g)", "poisson", "'poisson' has no trials"),
        ("real | rate(t) ~ x + (1 | g)", "normal", "'normal' has no rate"),
        ("real ~ x + (1 | g)", "poisson", "'poisson' wants whole numbers from 0"),
        ("count | trials(2) ~ x + (1 | g)", "binomial", "Binomial, wants whole numbers from 0"),
        ("count | trials(n / 2) ~ (1 | g)", "binomial", r"trials\(n / 2\) is .*; wanted a whole"),
        ("count | weights(z.1) ~ (1 | g)", "poisson", "wanted a positive number"),
        ("kind ~ x + (1 | g)", "bernoulli", "'kind' has 3 levels .ash, elm, oak.; wanted two"),
        ("two ~ x + (1 | g)", "ordinal", "'ordinal' wants 3 levels .* bernoulli is for two"),
        ("kind ~ x + (1 | g)", "normal", "'kind' holds .* no number"),
        ("log(kind) ~ x + (1 | g)", "categorical", "for classes name a column"),
    ],
)
def test_a_formula_that_cannot_be_is_refused(formula: str, family: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _ = vm.from_formula(formula, DATA, family=family).density


def test_names_that_python_takes_for_something_else() -> None:
    table = DATA.rename(columns={"real": "yield", "x": "a b"})
    made = vm.from_formula("yield ~ `a b` + log(z.1 + 9) + (1 | g)", table)
    assert made.tasks.input_names == ("a b", "log(z.1 + 9)")
    with pytest.raises(ValueError, match="Rename the column 'yield', whose name is a word"):
        vm.from_formula("log(yield + 9) ~ (1 | g)", table)


def test_parts_of_a_formula() -> None:
    found = Formula.read("cbind(`a b`, n - y) | weights(w) ~ -1 + f(u, '|') + ((x - 1) || g)")
    assert found.response == "`a b`" and found.beside["trials"] == "(`a b`) + (n - y)"
    assert found.fixed == "- 1 + f(u, '|')" and found.varying == ("(x - 1)",)
    assert found.group == ("g",) and found.beside["weights"] == "w"


def test_priors_are_in_the_units_of_the_data() -> None:
    """Of the same data in other units, the same model; the source says the numbers."""
    one = vm.from_formula("real ~ x + (x | g)", DATA)
    scaled = DATA.assign(x=1000 * DATA["x"], real=100 * DATA["real"])
    two = vm.from_formula("real ~ x + (x | g)", scaled)
    factor = torch.tensor([100.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(two.density.prior_scale, factor * one.density.prior_scale)
    torch.testing.assert_close(two.density.prior_loc, factor * one.density.prior_loc)
    width = 2.5 * DATA["real"].std(ddof=0) / DATA["x"].std(ddof=0)
    assert float(one.density.prior_scale[1]) == pytest.approx(width, rel=5e-3)  # three digits
    assert f"dist.Normal(0.0, {float(f'{width:.3g}')})" in one.source


def test_the_printed_model_is_an_ordinary_model_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`varmeta model` prints it; with the formula as `--inputs` it is what the formula is."""
    monkeypatch.chdir(tmp_path)
    DATA.to_csv("data.csv", index=False)
    formula = "two ~ C(k) + x + (1 + x | g)"
    arguments = ["model", formula, "--data", "data.csv", "--family", "bernoulli"]
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0, printed.output
    Path("mine.py").write_text(printed.output)
    made = vm.from_formula(formula, "data.csv", family="bernoulli")
    assert printed.output == made.source
    options = Options(Path("data.csv"), inputs=formula, shared=",".join(made.shared))
    with own_problem("mine.py:g", options, 0) as (label, mine):
        assert label == "mine_g"
        theta, shared, _ = values_of(made)
        tasks = made.tasks.select([made.tasks.names.index(n) for n in mine.train.names])
        some = theta[: len(tasks)]
        for one in (mine.train.unsplit, tasks):
            wanted = made.density.log_likelihood(some, tasks, shared)
            assert torch.equal(mine.density.log_likelihood(some, one, shared), wanted)
    with own_problem(formula, Options(Path("data.csv"), family="bernoulli"), 0) as (label, other):
        assert label == "two_g" and torch.equal(other.train.is_query, mine.train.is_query)


def test_a_formula_model_is_pickled_and_named_like_its_columns() -> None:
    made = vm.from_formula("real ~ soil + (1 | g)", DATA.rename(columns={"x": "sigma"}))
    again = pickle.loads(pickle.dumps(made.density))
    theta, shared, _ = values_of(made)
    assert torch.equal(
        again.log_likelihood(theta, made.tasks, shared),
        made.density.log_likelihood(theta, made.tasks, shared),
    )
    clash = vm.from_formula("real ~ sigma + row + (1 | g)",
                            DATA.rename(columns={"x": "sigma", "z.1": "row"}))  # fmt: skip
    assert clash.shared == ("sigma", "row_", "sigma_")


def test_a_formula_predicts_new_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the run's folder alone, with the levels and centres of the data learned from."""
    monkeypatch.chdir(tmp_path)
    DATA.to_csv("data.csv", index=False)
    formula = "real ~ soil + scale(x) + (1 | g)"
    options = ["--data", "data.csv", "--out", "run", "--hold-out", "0", "--steps", "300"]
    command = ["compare", formula, *options, "--strategies", "no-pooling"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    new = DATA[["g", "x", "soil"]].head(3).assign(g=["p", "q", "q"])
    new.to_csv("new.csv", index=False)
    Path("data.csv").unlink()
    done = CliRunner().invoke(app, ["predict", "run", "--data", "new.csv"])
    assert done.exit_code == 0, done.output
    found = pd.read_csv("predictions.csv")
    assert found["known_by"].tolist() == ["training"] * 3 and found["soil"].equals(new["soil"])
    made = vm.from_formula(formula, DATA)
    loaded = vm.load("run", WrittenModel(Path("run", "model.py").read_text(), made.name))
    design = vm.Design.from_json(json.loads(Path("run", "run.json").read_text())["design"])
    assert design == made.tasks.design == loaded.tasks.design  # type: ignore[union-attr]
    means = loaded.predict(new, seed=0).table["real.mean"]
    np.testing.assert_allclose(found["real.mean"], means)
    new.assign(soil="peat").to_csv("new.csv", index=False)
    done = CliRunner().invoke(app, ["predict", "run", "--data", "new.csv", "--overwrite"])
    assert done.exit_code == 2 and "'soil' holds 'peat' in line 2, a level" in done.output
