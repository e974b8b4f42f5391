"""What comes after a fit is tried before it: what cannot be is said when the density is made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from varmeta import Density, NoPooling, Tasks, compare, fit, to_arviz
from varmeta.models.drawing import CannotPredict
from varmeta.seeds import generator

FLOAT = torch.float64
NOISE = generator(0)
RAGGED = Tasks.from_list(
    [
        (torch.randn(n, 1, generator=NOISE, dtype=FLOAT), torch.randn(n, generator=NOISE))
        for n in (4, 6, 5)
    ]
).to(FLOAT)
EQUAL = RAGGED._part(RAGGED.mask & (torch.arange(6) < 4))


def level() -> Tensor:
    return pyro.sample("level", dist.Normal(0.0, 1.0))


def rows(x: Tensor) -> Any:
    return pyro.plate("rows", x.shape[-2])


class Loss(dist.TorchDistribution):
    """exp(−½(y − loc)²), up to a constant: a law of the user's own, without a sampler."""

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real}
    support = constraints.real

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Loss:
        return type(self)(self.loc.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * (value - self.loc) ** 2


class Misspelt(Loss):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale


class Raises(Loss):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise RuntimeError("no such law")


class OtherShape(Loss):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.zeros(3, dtype=FLOAT)


def own(law: Any) -> Callable[..., Any]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = level() + 0 * x[..., 0]
        with rows(x):
            pyro.sample("y", law(mean), obs=y)

    return model


def by_factor(x: Tensor, y: Tensor) -> None:
    pyro.factor("loss", -0.5 * (y - level()) ** 2)


def needs_y(x: Tensor, y: Tensor) -> None:
    mean = level()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def of_logs(x: Tensor, y: Tensor) -> None:
    mean = level()
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y.exp())


def returns(x: Tensor, y: Tensor | None = None) -> Tensor | None:
    mean = level()
    if y is None:
        return mean
    with rows(x):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def zeros(x: Tensor, y: Tensor | None = None) -> None:
    mean = level() - (0 if y is None else y)
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros((), dtype=FLOAT))


CANNOT = {
    "a law without a sampler": (own(Loss), "Loss has no sampler"),
    "a sampler with an error": (own(Misspelt), "no attribute 'scale'"),
    "a sampler that raises": (own(Raises), "no such law"),
    "a sampler of another shape": (own(OtherShape), r"shape \(3,\), and is given some of shape"),
    "a factor": (by_factor, r"pyro\.factor adds cannot be drawn.*TorchDistribution"),
    "y is needed": (needs_y, r"y=None: TypeError.*model\(x, None\)"),
    "y is transformed": (of_logs, r"obs=None if y is None else"),
    "no site": (returns, "no site 'y' when y is None"),
    "a value without y": (zeros, "'y' a value when y is None; pass obs=None"),
}


@pytest.mark.filterwarnings("ignore:posterior_predictive is left out")
@pytest.mark.parametrize(("model", "said"), CANNOT.values(), ids=list(CANNOT))
def test_a_model_that_cannot_predict_is_said_at_once_and_works(
    model: Callable[..., Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    density = Density(model, EQUAL)
    assert density.cannot_predict is not None
    assert density.cannot_predict in caplog.text and caplog.text.count("without predictions") == 1
    caplog.clear()
    with pytest.raises(CannotPredict, match=said):
        density.predict(torch.zeros(3, 1, dtype=FLOAT), EQUAL, generator(0))
    assert not caplog.text
    result = fit(NoPooling(), density, EQUAL, progress=False)
    data = to_arviz(result, draws=2)
    groups = set(data.groups()) if callable(data.groups) else {g.strip("/") for g in data.groups}
    assert {"posterior", "log_likelihood"} <= groups and "posterior_predictive" not in groups
    seen = EQUAL.targets.exp() if model is of_logs else EQUAL.targets  # beside N(0, 1) as prior
    torch.testing.assert_close(result.posterior().mean[:, 0], seen.sum(1) / (4 + 1))


def test_a_comparison_of_losses_is_scored_without_draws() -> None:
    data = RAGGED.split(0.3)
    table = compare([NoPooling()], Density(by_factor, data), data, draws=20, progress=False).table
    assert not table["failed"].any() and np.isfinite(table["elpd"]).all()
    assert table["rmse"].isna().all() and table["coverage"].isna().all()


def with_factor(x: Tensor, y: Tensor | None = None) -> None:
    """N(y; level, 1) and a loss of each row, which is 2 N(y; level, 1) but for a constant."""
    mean = level()
    if y is not None:
        pyro.factor("loss", -0.5 * (y - mean) ** 2)
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_a_factor_beside_an_observed_site(caplog: pytest.LogCaptureFixture) -> None:
    data = RAGGED.split(0.3)
    density = Density(with_factor, data)
    assert density.cannot_predict is None and density.drawn == ("y",)
    assert "'loss' counts in every log density; predictions are drawn without" in caplog.text
    theta = torch.full((3, 1), 0.5, dtype=FLOAT)
    nats = dist.Normal(0.5, 1.0).log_prob(data.targets) - 0.5 * (data.targets - 0.5) ** 2
    torch.testing.assert_close(density.log_likelihood(theta, data), nats.where(data.mask, 0.0))
    assert set(density.predict(theta, data, generator(0))) == {"y"}
    compared = compare([NoPooling()], density, data, draws=20, progress=False)
    assert np.isfinite(compared.table[["elpd", "rmse", "coverage"]]).all(axis=None)
    exported = to_arviz(compared.outcomes["NoPooling"].fit, draws=2)
    assert set(exported["posterior_predictive"].data_vars) == {"y"}
    assert set(exported["observed_data"].data_vars) == {"y"}


def mean_loss(x: Tensor, y: Tensor) -> None:
    pyro.factor("loss", -((y - level()) ** 2).mean())


def penalty(x: Tensor, y: Tensor | None = None) -> None:
    mean = level()
    pyro.factor("penalty", -(mean**2))
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize(("model", "name"), [(mean_loss, "loss"), (penalty, "penalty")])
def test_a_factor_without_a_value_per_row_is_refused(model: Any, name: str) -> None:
    said = f"pyro.factor '{name}' has one value for all rows.*one value per row, shape"
    with pytest.raises(ValueError, match=said):
        Density(model, RAGGED)


def law_of_rows(x: Tensor, y: Tensor | None = None) -> None:
    mean = level() + x[..., 0]
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def law_of_columns(x: Tensor, y: Tensor | None = None) -> None:
    mean = level() + x
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def law_of_columns_bare(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("y", dist.Normal(level() + x, 1.0), obs=y)


def loss_of_rows(x: Tensor, y: Tensor) -> None:
    pyro.factor("loss", -((y - level() - x[..., 0]) ** 2))


@pytest.mark.parametrize(
    ("model", "column", "said"),
    [
        (law_of_rows, True, r"law has shape \(4,\) and its value \(4, 1\).*obs=y.squeeze\(-1\)"),
        (law_of_columns, False, r"law has shape \(4, 4\) and its value \(4,\).*mean.squeeze"),
        (law_of_columns_bare, False, r"law has shape \(4, 1\) and its value \(4,\).*mean.squeeze"),
        (law_of_columns, True, r"\.to_event\(k\)"),
        (loss_of_rows, True, r"y has shape \(4, 1\); give targets of shape \[N\]"),
    ],
)
def test_rows_that_meet_every_other_row_are_told_by_shapes(
    model: Any, column: bool, said: str
) -> None:
    y = EQUAL.targets[..., None] if column else EQUAL.targets
    with pytest.raises(ValueError, match=said):
        Density(model, replace(EQUAL, targets=y))


def test_a_name_that_cannot_be_exported_is_said_before_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("task", dist.Normal(0.0, 1.0))
        with rows(x):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with caplog.at_level(logging.WARNING, "varmeta"):
        Density(model, RAGGED)
    assert "to_arviz will not export this model: site 'task' has the name of" in caplog.text


def test_one_value_for_all_rows_is_observed_in_each() -> None:
    data = to_arviz(fit(NoPooling(), Density(with_zero, EQUAL), EQUAL, progress=False), draws=2)
    assert data["observed_data"]["y"].shape == (12,)
    assert float(data["posterior_predictive"]["y"].std()) > 0.1


def with_zero(x: Tensor, y: Tensor | None = None) -> None:
    mean = level() + x[..., 0]
    with rows(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else torch.zeros(()))
