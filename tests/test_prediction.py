"""Predictions of rows without a target, against the exact posterior predictive of a linear model.

The model is y ~ N(a + b x, 0.5²) with (a, b) ~ N(θ0, Σ) per group, so that each prediction is a
normal law with known mean and variance. Monte Carlo comparisons are to 5 standard errors: under
normality one number in 1.7e6 is a false alarm, and there are some 30.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm
from varmeta.prediction import ADAPTED, PRIOR, TRAINED, UPDATED

NOISE, DRAWS = 0.5, 4000
RNG = np.random.default_rng(0)


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("obs", dist.Normal(a + b * x[:, 0], NOISE), obs=y)


def made(group: str, rows: int) -> pd.DataFrame:
    x, (a, b) = RNG.normal(size=rows), RNG.normal([1.0, -1.0], [0.7, 0.4])
    return pd.DataFrame(
        {"x": x, "g": group, "y": a + b * x + NOISE * RNG.normal(size=rows), "remark": "-"}
    )


FRAME = pd.concat([made(f"g{k}", 4 + k % 3) for k in range(8)], ignore_index=True)
COLUMNS: dict = {"task": "g", "inputs": ["x"], "target": "y"}
TASKS = vm.Tasks.from_frame(FRAME, **COLUMNS)
FIT = vm.fit(vm.LaplaceEvidence(), vm.Density(line, TASKS), TASKS)
POSTERIOR = FIT.posterior()


def exact(rows: pd.DataFrame, x: float) -> tuple[float, float]:
    """Mean and standard deviation of y at x given these rows, θ0 and Σ."""
    loc, precision = FIT.prior.loc.numpy(), FIT.prior.precision().numpy()
    design = np.c_[np.ones(len(rows)), rows["x"].to_numpy(float)]
    target = rows["y"].to_numpy(float)
    total = precision + design.T @ design / NOISE**2
    mean = np.linalg.solve(total, precision @ loc + design.T @ target / NOISE**2)
    at = np.array([1.0, x])
    return float(at @ mean), float(np.sqrt(NOISE**2 + at @ np.linalg.solve(total, at)))


def agrees(row: pd.Series, rows: pd.DataFrame) -> None:
    mean, sd = exact(rows, row["x"])
    assert abs(row["obs.mean"] - mean) < 5 * sd / DRAWS**0.5
    assert abs(row["obs.sd"] / sd - 1) < 5 / (2 * DRAWS) ** 0.5
    error = 5 * sd * (0.05 * 0.95 / DRAWS) ** 0.5 / 0.1031  # the density of N(0, 1) at its 5%
    assert abs(row["obs.q5"] - (mean - 1.6449 * sd)) < error


def empty(group: str, *x: float) -> pd.DataFrame:
    return pd.DataFrame({"x": x, "g": group, "y": None, "remark": "?"})


def test_each_task_is_predicted_by_all_that_is_known_of_it() -> None:
    more, new = made("g2", 3), made("new", 3)
    data = pd.concat(
        [
            empty("none", 2.0),
            FRAME,
            empty("g5", 0.3),
            more,
            new,
            empty("g2", -1.0, 0.5),
            empty("new", 1.0),
            empty("g1", 0.0),
        ],
        ignore_index=True,
    ).astype({"y": object})
    data.index = data.index[::-1]  # the index is the user's own
    found = FIT.predict(data, draws=DRAWS).table
    assert list(found.index) == list(data.index[data["y"].isna()])
    assert list(found["g"]) == ["none", "g5", "g2", "g2", "new", "g1"]
    assert list(found["remark"]) == ["?"] * 6
    assert list(found["known_by"]) == [PRIOR, TRAINED, UPDATED, UPDATED, ADAPTED, TRAINED]
    rows = {"none": FRAME[:0], "new": new, "g2": pd.concat([FRAME[FRAME["g"] == "g2"], more])}
    for _, row in found.iterrows():
        agrees(row, rows.get(row["g"], FRAME[FRAME["g"] == row["g"]]))


def test_without_the_targets_column_all_rows_are_predicted() -> None:
    data = FRAME.drop(columns="y").sample(frac=1.0, random_state=0)
    found = FIT.predict(data, draws=DRAWS, quantiles=[0.05], keep=7)
    assert list(found.table.index) == list(data.index)
    assert found.draws["obs"].shape == (7, len(data))
    for _, row in found.table.iloc[::6].iterrows():
        agrees(row, FRAME[FRAME["g"] == row["g"]])
    again = FIT.predict(data, draws=DRAWS, keep=7)
    np.testing.assert_array_equal(found.draws["obs"], again.draws["obs"])
    other = FIT.predict(data, draws=DRAWS, keep=7, seed=1)
    assert not np.array_equal(found.draws["obs"], other.draws["obs"])


def test_tasks_say_which_rows_to_predict_by_a_split_or_by_nan() -> None:
    more = made("new", 4)
    whole = vm.Tasks.from_frame(more, **COLUMNS)
    last = torch.tensor([[False, False, False, True]])
    split = vm.Tasks(whole.inputs, whole.targets, whole.mask, last, whole.names)
    missing = whole.targets.where(~last, torch.nan)
    gaps = vm.Tasks(whole.inputs, missing, whole.mask, torch.zeros_like(last), whole.names)
    first, second = (FIT.predict(tasks, draws=DRAWS).table for tasks in (split, gaps))
    pd.testing.assert_frame_equal(first, second)
    agrees(pd.concat([first.iloc[0], more.iloc[3][["x"]]]), more[:3])
    known = FIT.predict(TASKS.select([4, 1]), draws=10).table
    assert list(known["known_by"].unique()) == [TRAINED]


def test_posteriors_match_tasks_by_name() -> None:
    """Rows of a few tasks in another order are theirs still."""
    order = [6, 0, 3]
    some = TASKS.select(order)
    drawn = POSTERIOR.predict(some, DRAWS)["obs"]
    assert torch.equal(POSTERIOR.select(order).predict(some, DRAWS)["obs"], drawn)
    nats = POSTERIOR.log_predictive(some, DRAWS)
    for t, name in enumerate(some.names):
        rows = FRAME[FRAME["g"] == name]
        for n in range(len(rows)):
            mean, sd = exact(rows, float(some.inputs[t, n, 0]))
            assert abs(float(drawn[:, t, n].mean()) - mean) < 5 * sd / DRAWS**0.5
            density = torch.distributions.Normal(mean, sd).log_prob(some.targets[t, n])
            assert abs(float(nats[t, n] - density)) < 0.1
    parts = [(part.names, values["obs"]) for part, values in POSTERIOR.predictions(some, 50)]
    assert parts[0][0] == some.names


@pytest.mark.parametrize("call", ["predict", "log_predictive", "predictions"])
def test_an_unknown_task_is_named_and_what_mends_it(call: str) -> None:
    other = vm.Tasks.from_frame(made("elsewhere", 2), **COLUMNS)
    with pytest.raises(ValueError, match=r"not of 'elsewhere'.*fit\.adapt.*fit\.unseen") as caught:
        list(getattr(POSTERIOR, call)(other))
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="tasks must be a Tasks"):
        list(getattr(POSTERIOR, call)(FRAME))
    with pytest.raises(ValueError, match="count must be"):
        list(getattr(POSTERIOR, call)(TASKS, 0))
    with pytest.raises(TypeError, match="generator must be"):
        list(getattr(POSTERIOR, call)(TASKS, 1, 0))


def test_what_cannot_be_predicted_is_said() -> None:
    wrong = {
        "every row has a target": FRAME,
        "are they one task": empty(" G1", 0.0),
        "no column 'x'": FRAME.drop(columns=["x", "y"]),
        r"column 'x' holds nan in row 1": empty("g1", 0.0, np.nan),
        "task 'new' is new, and which of its rows": vm.Tasks.from_frame(made("new", 2), **COLUMNS),
    }
    for said, data in wrong.items():
        with pytest.raises(ValueError, match=said):
            FIT.predict(data)
    with pytest.raises(TypeError, match="data must be"):
        FIT.predict("new.csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be at most draws"):
        FIT.predict(FRAME.drop(columns="y"), draws=10, keep=11)
    with pytest.raises(ValueError, match="names must be different texts"):
        FIT.unseen(["a", "a"])


STRATEGIES = {
    "svi": vm.PyroSVI(steps=20),
    "complete": vm.CompletePooling(),
    "reptile": vm.Reptile(steps=3),
}


@pytest.mark.filterwarnings("ignore::varmeta.NotConverged", "ignore::varmeta.UndeterminedScale")
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_what_it_knows_of_a_task_without_rows(name: str) -> None:
    fit = vm.fit(STRATEGIES[name], FIT.density, TASKS)
    posterior = fit.unseen(["p", "q"])
    assert posterior.names == ("p", "q") and posterior.mean.shape == (2, 2)
    theta, _ = posterior.sample(40, torch.Generator().manual_seed(0))
    assert theta.shape == (40, 2, 2) and bool(theta.isfinite().all())
    if name == "complete":
        assert torch.equal(theta[:, 0], fit.posterior().sample(40, torch.Generator())[0][:, 0])
    else:
        assert not torch.equal(theta[:, 0], theta[:, 1])
    if name == "reptile":  # Σ is not learned
        with pytest.warns(RuntimeWarning, match="Reptile has not learned Σ"):
            fit.predict(empty("p", 0.0))


def test_nuts_knows_a_task_without_rows_by_each_draw_of_the_prior() -> None:
    nuts, noise = vm.PyroNUTS(draws=DRAWS, chains=1), torch.Generator().manual_seed(0)
    state = nuts.init(FIT.density, FIT.prior, TASKS, noise)
    loc, spread = torch.arange(DRAWS, dtype=torch.float64) % 5, torch.tensor([0.5, 2.0])
    state.tensors["loc"][:] = loc[:, None]
    state.tensors["log_scale"][:] = spread.log()
    posterior = nuts.unseen(FIT.density, state, ["p", "q"], noise)
    theta, _ = posterior.sample(DRAWS, noise)
    white = (theta - loc[:, None, None]) / spread
    assert float(white.mean(0).abs().max()) < 5 / DRAWS**0.5
    assert float((white.var(0) - 1).abs().max()) < 5 * (2 / DRAWS) ** 0.5
    assert not torch.equal(white[:, 0], white[:, 1])


def kinds(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("kind", dist.Categorical(logits=a + x), obs=y)


def test_classes_have_probabilities_and_no_mean() -> None:
    x = torch.zeros(6, 1)
    tasks = vm.Tasks.from_list([(x, torch.tensor([0, 0, 0, 2, 2, 0]))] * 4)
    fit = vm.fit(vm.NoPooling(), vm.Density(kinds, tasks), tasks)
    table = fit.predict(tasks, draws=500).table
    assert [c for c in table if c.startswith("kind")] == [
        "kind.mode",
        *(f"kind.p[{k}]" for k in range(3)),
    ]
    shares = table[[f"kind.p[{k}]" for k in range(3)]].to_numpy()
    np.testing.assert_allclose(shares.sum(1), 1.0)
    assert (table["kind.mode"] == 0).all() and (shares[:, 0] > shares[:, 1]).all()


def test_what_is_printed_is_short() -> None:
    for thing in (FIT, POSTERIOR, FIT.unseen(["a"])):
        assert len(repr(thing)) < 300 and "\n" not in repr(thing)
    assert "LaplaceEvidence on Tasks(8 × 'g'" in repr(FIT)
    assert "8 tasks ('g0', 'g1', 'g2', …)" in repr(POSTERIOR)
    assert str(FIT.predict(empty("g1", 0.0))).count("\n") == 1


def test_arviz_wants_a_fit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"fit must be a Fit, got a Density; .*vm\.fit"):
        vm.to_arviz(FIT.density)
