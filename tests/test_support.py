"""Targets outside their law's support, and priors that follow the data: refused, in every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from varmeta import NoPooling, compare, fit
from varmeta.models.density import Density
from varmeta.tasks import Tasks

F64 = torch.float64
X = torch.tensor([[0.5], [1.0], [1.5], [0.8]], dtype=F64)
EYE = torch.eye(3, dtype=F64)[[0, 1, 2, 0]]


def model(law: Callable[[Tensor, Tensor], Any], prior: Any = None) -> Any:
    """A task model whose latent `a` has this prior, of x and y, and whose rows have this law."""

    def task(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", prior(x, y) if prior else dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[-2]):
            return pyro.sample("y", law(a, x), obs=y)

    return task


def each(a: Tensor, x: Tensor) -> Tensor:
    return a + 0 * x[:, 0]


def three(a: Tensor, x: Tensor) -> Tensor:
    return a * x * torch.arange(3)


def tasks(*targets: Any, x: Tensor = X) -> Tasks:
    pairs = [(x, torch.as_tensor(y, dtype=None if isinstance(y, Tensor) else F64)) for y in targets]
    return Tasks.from_list(pairs, names=["first", "second", "third"][: len(targets)])


GOOD, COUNTS = [0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 1.0, 0.0]
# law, targets that it allows, others of which row 2 alone is at fault, what it wants
LAWS: dict[str, tuple[Any, Any, Any, str]] = {
    "Bernoulli 2": (lambda a, x: dist.Bernoulli(logits=each(a, x)), COUNTS, 2.0, "0 or 1"),
    "Bernoulli -1": (lambda a, x: dist.Bernoulli(logits=each(a, x)), COUNTS, -1.0, "0 or 1"),
    "Bernoulli 0.5": (lambda a, x: dist.Bernoulli(logits=each(a, x)), COUNTS, 0.5, "0 or 1"),
    "Poisson -3": (lambda a, x: dist.Poisson(each(a, x).exp()), COUNTS, -3.0, "numbers from 0"),
    "Poisson 0.5": (lambda a, x: dist.Poisson(each(a, x).exp()), COUNTS, 0.5, "whole numbers"),
    "zero-inflated": (
        lambda a, x: dist.ZeroInflatedPoisson(each(a, x).exp(), gate=torch.tensor(0.2)),
        *(COUNTS, -3.0, "whole numbers from 0"),
    ),
    "Beta": (lambda a, x: dist.Beta(each(a, x).exp(), 2.0), GOOD, 1.5, "numbers from 0 to 1"),
    "Exponential": (lambda a, x: dist.Exponential(each(a, x).exp()), GOOD, -2.0, "from 0"),
    "LogNormal": (lambda a, x: dist.LogNormal(each(a, x), 1.0), GOOD, 0.0, "positive numbers"),
    "to_event": (
        lambda a, x: dist.Gamma(torch.ones(len(x), 2, dtype=F64), a.exp()).to_event(1),
        *(torch.ones(4, 2, dtype=F64), torch.tensor([1.0, -1.0], dtype=F64), "positive|from 0"),
    ),
    "a constant bound": (
        lambda a, x: dist.Binomial(3, logits=each(a, x)),
        *([0.0, 1.0, 2.0, 3.0], 4.0, "whole numbers from 0 to 3"),
    ),
    "a bound that is data": (
        lambda a, x: dist.Binomial((x[:, 0] * 4).round(), logits=each(a, x)),
        *([2.0, 1.0, 6.0, 3.0], 7.0, "whole numbers from 0 to 6"),
    ),
    "a scale that is data": (
        lambda a, x: dist.Pareto(x[:, 0], a.exp()),
        *([3.0, 3.0, 3.0, 3.0], 0.1, "numbers from 1.5"),
    ),
    "Categorical": (
        lambda a, x: dist.Categorical(logits=three(a, x)),
        *(torch.tensor([0, 1, 2, 0]), 3, "whole numbers from 0 to 2"),
    ),
    "one-hot": (lambda a, x: dist.OneHotCategorical(logits=three(a, x)), EYE, 2 * EYE[2], "one 1"),
    "Dirichlet": (
        lambda a, x: dist.Dirichlet(a.exp() * torch.ones(len(x), 3, dtype=F64)),
        *(torch.full((4, 3), 1 / 3, dtype=F64), torch.full((3,), 0.5, dtype=F64), "sum to 1"),
    ),
    "a mixture": (
        lambda a, x: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(len(x), 2)), dist.Poisson((a * x * torch.arange(2)).exp())
        ),
        *(COUNTS, 0.5, "whole numbers from 0"),
    ),
}


def spoilt(good: Any, bad: Any) -> Tensor:
    out = good.clone() if isinstance(good, Tensor) else torch.tensor(good, dtype=F64)
    out[2] = bad
    return out


@pytest.mark.parametrize("name", LAWS)
def test_a_target_outside_its_law_is_named_in_every_task(name: str) -> None:
    law, good, bad, wanted = LAWS[name]
    density = Density(model(law), tasks(good, good, good))  # what is possible passes
    for at, task in enumerate(("first", "second", "third")):
        targets = [good] * 3
        targets[at] = spoilt(good, bad)
        given = tasks(*targets)
        with pytest.raises(ValueError) as error:
            density.check_tasks(given)
        said = str(error.value)
        assert f"task {task!r}, row 2 of the task (row {4 * at + 2} of the data)" in said
        assert "'y' gets " in said and "this row alone" in said
        assert any(w in said for w in wanted.split("|")), said
        if at < 2:
            with pytest.raises(ValueError) as again:
                Density(model(law), given)
            assert str(again.value) == said


@pytest.mark.parametrize("validated", [True, False])
def test_validation_flags_are_left_as_found_and_change_nothing(validated: bool) -> None:
    law, good, bad, _ = LAWS["Poisson -3"]
    with pyro.validation_enabled(validated):
        for given in (tasks(spoilt(good, bad), good), tasks(good, spoilt(good, bad))):
            with pytest.raises(ValueError, match="wants whole numbers from 0"):
                Density(model(law), given)
        assert torch.distributions.Distribution._validate_args is validated
        assert pyro.poutine.util.is_validation_enabled() is validated


def test_it_is_said_before_any_training_and_before_adapting() -> None:
    law = LAWS["Poisson -3"][0]
    good, bad = tasks(COUNTS, COUNTS), tasks(COUNTS, spoilt(COUNTS, -3.0))
    density = Density(model(law), good)
    for call in (
        lambda: fit(NoPooling(), density, bad),
        lambda: compare([NoPooling()], density, bad),
        lambda: compare([NoPooling()], density, good.select([0]), bad.select([1])),
        lambda: fit(NoPooling(), density, good).adapt(bad),
    ):
        with pytest.raises(ValueError, match=r"task 'second', row 2 .* gets -3, .*Poisson"):
            call()


def test_a_bound_that_moves_with_a_latent_is_left_to_the_likelihood() -> None:
    density = Density(
        model(lambda a, x: dist.Uniform(-5.0, 5.0 + each(a, x).exp())), tasks(COUNTS, COUNTS)
    )
    density.check_tasks(tasks(COUNTS, spoilt(COUNTS, 6.5)))


def test_rows_that_the_model_leaves_out_may_hold_anything() -> None:
    def law(a: Tensor, x: Tensor) -> Any:
        return dist.Poisson(each(a, x).exp()).mask(x[:, 0] < 1.2)

    good, third = tasks(COUNTS, COUNTS), tasks(COUNTS, spoilt(COUNTS, -1.0))
    Density(model(law), good).check_tasks(third)  # x is 1.5 there
    padded = tasks(COUNTS, spoilt(COUNTS, -1.0))
    padded.mask[1, 2] = False
    Density(model(LAWS["Poisson -3"][0]), padded)


def test_numbers_that_are_none() -> None:
    density = Density(model(lambda a, x: dist.Normal(each(a, x), 1.0)), tasks(GOOD, GOOD))
    bad = tasks(GOOD, GOOD)
    bad.targets[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"task 'second', row 3 .*: y holds NaN or infinity"):
        density.check_tasks(bad)
    bad = tasks(GOOD, GOOD)
    bad.inputs[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"task 'second', row 0 .*: x holds NaN or infinity"):
        density.check_tasks(bad)


def test_a_target_that_the_model_transforms_is_shown_as_it_was_given() -> None:
    def log(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("log", dist.Normal(a, 1.0), obs=None if y is None else y.log())

    with pytest.raises(ValueError, match=r"'log' gets nan, from the target -3, .* finite numbers"):
        Density(log, tasks(GOOD, spoilt(GOOD, -3.0)))


def test_a_line_of_a_file_is_named(tmp_path: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text("g,x,y\na,1,1\nb,1,0\na,2,-3\n")
    with pytest.raises(ValueError, match=r"task 'a', line 4: .* gets -3"):
        Density(
            model(LAWS["Poisson -3"][0]), Tasks.from_csv(path, task="g", inputs=["x"], target="y")
        )


def normal(a: Tensor, x: Tensor) -> Any:
    return dist.Normal(each(a, x), 1.0)


PRIORS: dict[str, tuple[Any, str]] = {
    "mean": (lambda x, y: dist.Normal(x.double().mean(), 1.0), "x"),
    "first": (lambda x, y: dist.Normal(x[0, 0].double(), 1.0), "x"),
    "spread": (lambda x, y: dist.Normal(0.0, 1.0 + x.double().std()), "x"),
    "half": (lambda x, y: dist.HalfNormal(1.0 + x.double().abs().sum()), "x"),
    "bound": (lambda x, y: dist.Uniform(x.double().min() - 1, 9.0), "x"),
    "transform": (
        lambda x, y: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [dist.transforms.AffineTransform(x.double().mean(), 1.0)]
        ),
        "x",
    ),
    "rows": (lambda x, y: dist.Normal(0.0, 1.0 / len(x)), "the number of rows"),
    "y": (lambda x, y: dist.Normal(0.0 if y is None else y.mean(), 1.0), "y"),
}
INPUTS = {
    "all alike": [torch.ones(4, 1, dtype=F64)] * 3,
    "the first two alike": [X, X, 2 * X],
    "zeros": [torch.zeros(4, 1, dtype=F64)] * 3,
    "whole numbers": [torch.ones(4, 1, dtype=torch.long)] * 3,
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_that_follows_the_data_is_refused(name: str) -> None:
    prior, what = PRIORS[name]
    for inputs in INPUTS.values():
        given = Tasks.from_list([(x, torch.tensor(GOOD, dtype=F64)) for x in inputs])
        Density(model(normal), given)
        with pytest.raises(ValueError, match=f"prior of latent 'a' changes with {what};.*mean"):
            Density(model(normal, prior), given)
        with pytest.raises(ValueError, match=f"prior of latent 's' changes with {what};"):
            Density(two_latents(prior), given, shared=["s"])


def two_latents(prior: Any) -> Any:
    def task(x: Tensor, y: Tensor | None = None) -> Tensor:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", prior(x, y))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(a + s, 1.0), obs=y)

    return task


def test_a_prior_that_follows_one_task_alone() -> None:
    """Which no change of the first tasks' data shows."""

    def prior(x: Tensor, y: Any) -> Any:
        return dist.Normal(torch.where(x[0, 0] > 100, 1.0, 0.0), 1.0)

    given = [X] * 20 + [X + 200]
    with pytest.raises(ValueError, match="prior of latent 'a' changes with the task"):
        Density(
            model(normal, prior),
            Tasks.from_list([(x, torch.tensor(GOOD, dtype=F64)) for x in given]),
        )
