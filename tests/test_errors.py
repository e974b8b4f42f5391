"""Errors name the argument, say what they got and what they wanted, and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from density_cases import CASES, FLOAT, build, numbers, reals
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from varmeta.inference.minimise import GradientDescent
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

ONE, TWO, THREE = (torch.ones(n, dtype=FLOAT) for n in (1, 2, 3))
FRAME = pd.DataFrame(
    {
        "county": ["a", "b", "b"],
        "x": [0.0, 1.0, 2.0],
        "gap": [0.0, np.nan, np.inf],
        "text": ["u", "v", "w"],
        "y": [1.0, 2.0, 3.0],
        "when": pd.date_range("2020-01-01", periods=3),
    }
)
TASKS = reals(2)


def frame(data: pd.DataFrame = FRAME, **changes: Any) -> Tasks:
    return Tasks.from_frame(data, **({"task": "county", "inputs": ["x"], "target": "y"} | changes))


def tensors(**changes: Any) -> Tasks:
    whole = torch.ones(2, 3, dtype=torch.bool)
    x = torch.zeros(2, 3, 1)
    given = {"inputs": x, "targets": x[..., 0], "mask": whole, "is_query": ~whole}
    return Tasks(**(given | {"names": ("a", "b")} | changes))


def rows(x: torch.Tensor, y: Any, mean: Any, event: int = 0) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(event), obs=y)


def normal(name: str) -> torch.Tensor:
    return pyro.sample(name, dist.Normal(0.0, 1.0))


# -- models that are no model of one task ---------------------------------------------------------


def unobserved(x, y=None):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(normal("a"), 1.0))


def without_latent(x, y=None):
    rows(x, y, x[:, 0])


def local(x, y=None):
    with pyro.plate("rows", len(x)):
        b = normal("b")
        pyro.sample("y", dist.Normal(b + x[:, 0], 1.0), obs=y)


class ReadInPlate(PyroModule):
    def __init__(self):
        super().__init__()
        self.b = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.b + x[:, 0], 1.0), obs=y)


def discrete(x, y=None):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    rows(x, y, k * x[:, 0] + normal("a"))


def summed(x, y=None):
    pyro.sample("y", dist.Normal(normal("a").expand(len(x)), 1.0).to_event(1), obs=y)


def unsummed(x, y=None):
    a = normal("a")
    pyro.sample("y", dist.Normal(a * torch.ones(len(x), 3, dtype=x.dtype), 1.0), obs=y)


def nested_plates(x, y=None):
    a = normal("a")
    with pyro.plate("copies", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def fixed_plate(x, y=None):
    a = normal("a")
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def fixed_plate_x(x, y=None):
    a = normal("a")
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(a + x[:, 0], 1.0), obs=y)


def nameless(x, y=None):
    rows(x, y, normal(""))


class Restless:
    """Its sites are others every time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, y=None):
        self.calls += 1
        rows(x, y, normal(f"a{self.calls}") + normal("b"))


def nested(x, y=None):
    mean = normal("mean")
    rows(x, y, pyro.sample("a", dist.Normal(mean, 1.0)))


def nested_support(x, y=None):
    top = pyro.sample("top", dist.HalfNormal(1.0))
    rows(x, y, pyro.sample("a", dist.Uniform(0.0, top)) + top)


def idle(x, y=None):
    normal("idle")
    rows(x, y, normal("a"))


def idle_param(x, y=None):
    pyro.param("extra", torch.tensor(1.0))
    rows(x, y, normal("a"))


LINEAR = nn.Linear(2, 1, dtype=FLOAT)


def closure(x, y=None):
    pyro.module("net", LINEAR)  # announced, but the module uses its own values
    rows(x, y, LINEAR(x)[:, 0] + normal("a"))


def raising(x, y=None):
    raise KeyError("no such city")


def mistyped(x, y=None):
    rows(x, y, x.float() @ pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1)))


def dropout(x, y=None):
    rows(x, y, nn.functional.dropout(x[:, 0], 0.5) * normal("a"))


def batch_norm(x, y=None):
    mean, spread = torch.zeros(2, dtype=FLOAT), torch.ones(2, dtype=FLOAT)
    a = normal("a") * x
    rows(x, y, nn.functional.batch_norm(a, mean, spread, training=True)[:, 0])


def embedding(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=FLOAT), 1.0).to_event(1))
    rows(x, y, w[x[:, 0]])


def noisy(x, y=None):
    rows(x, y, normal("a") + np.random.default_rng().normal())


def centring(x, y=None):
    rows(x, y, normal("a") * (x[:, 0] - x[:, 0].mean()))


def needs_y(x, y):
    a = normal("a")
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def silent_without_y(x, y=None):
    a = normal("a")
    if y is not None:
        rows(x, y, a)


def shared_given(*shared: str) -> Callable[[], Any]:
    return lambda: Density(CASES["normal"].model, TASKS, shared=shared)


DENSITY, LOC = build(CASES["normal"]), torch.zeros(3)
THETA = numbers(3, 3)


def evaluate(**changes: Any) -> Any:
    return DENSITY.log_likelihood(**({"theta": THETA, "tasks": TASKS} | changes))


def predict(model: Any) -> Any:
    return Density(model, TASKS).predict(numbers(3, 1), TASKS, generator(0))


def bad(name: str, call: Callable[[], Any], *pieces: str) -> Any:
    return pytest.param(call, pieces, id=name)


def model(name: str, function: Any, *pieces: str, tasks: Tasks = TASKS) -> Any:
    return bad(name, lambda: Density(function, tasks), *pieces)


TABLE = [
    # tasks from tensors
    bad("no pairs", lambda: Tasks.from_list([]), "pairs is empty", "at least one"),
    bad("empty", lambda: Tasks.from_list([(ONE, ONE), (ONE[:0], ONE[:0])]), "'1' is empty", "drop"),
    bad("ragged", lambda: Tasks.from_list([(TWO, ONE)]), "'0'", "(2,) and y (1,)", "same number"),
    bad("scalar", lambda: Tasks.from_list([(ONE[0], ONE[0])]), "shape ()", "same number of rows"),
    bad(
        "another width",
        lambda: Tasks.from_list([(TWO[:, None], TWO), (TWO, TWO)]),
        *("'1': x has rows of shape ()", "the first task (1,)", "same for all"),
    ),
    bad(
        "another type",
        lambda: Tasks.from_list([(ONE, ONE), (ONE, ONE.float())], names=["u", "v"]),
        *("'v': y", "torch.float32", "torch.float64", "same for all"),
    ),
    bad("too few names", lambda: Tasks.from_list([(ONE, ONE)], names=[]), "names has 0", "1 tasks"),
    bad(
        "twice a name",
        lambda: Tasks.from_list([(ONE, ONE)] * 2, names=["u", "u"]),
        *("names holds 'u' twice", "of its own"),
    ),
    bad(
        "nan",
        lambda: Tasks.from_list([(TWO, TWO / torch.tensor([1.0, 0.0]))], names=["u"]),
        *("'u': y holds infinity in row 1", "drop or fill"),
    ),
    bad("targets", lambda: tensors(targets=torch.zeros(2, 2)), "targets", "(2, 2)", "mask (2, 3)"),
    bad("mask", lambda: tensors(mask=torch.ones(3).bool()), "mask (3,)", "same [tasks, rows]"),
    bad("names", lambda: tensors(names=("a",)), "names has 1 entries for 2 tasks", "one each"),
    bad("none left", lambda: tensors().select(torch.zeros(2).bool()), "no tasks", "at least one"),
    # tasks from a frame
    bad("no rows", lambda: frame(FRAME[:0]), "frame has no rows"),
    bad("task", lambda: frame(task="city"), "task: no column 'city'", "have: county, x, gap"),
    bad("inputs", lambda: frame(inputs=["x", "z"]), "inputs: no column 'z'", "have: county, x"),
    bad("target", lambda: frame(target="z"), "target: no column 'z'", "have: county, x, gap"),
    bad("a string", lambda: frame(inputs="x"), "inputs must be a list", "got the string 'x'"),
    bad("text", lambda: frame(target="text"), "'text' holds 'u' in row 0, which is no", "encode"),
    bad("dates", lambda: frame(target="when"), "'when' holds 2020-01-01", "row 0", "encode"),
    bad(
        "gap",
        lambda: frame(inputs=["gap"]),
        *("'gap' holds nan in row 1, which is a missing value", "drop or fill"),
    ),
    bad(
        "no task given",
        lambda: frame(FRAME.assign(county=["a", None, "b"])),
        *("task: column 'county' is empty in row 1", "drop or fill"),
    ),
    bad(
        "two columns",
        lambda: frame(pd.concat([FRAME, FRAME[["x"]]], axis=1)),
        *("inputs: 2 columns 'x'", "have: county, x"),
    ),
    # splitting
    bad("share", lambda: TASKS.split(1.0), "query", "between 0 and 1", "got 1.0"),
    bad("share 0", lambda: TASKS.split(0.0), "query", "between 0 and 1", "got 0.0"),
    bad("folds", lambda: TASKS.folds(1), "count must be at least 2", "got 1"),
    bad("hold out", lambda: TASKS.hold_out(3), "count", "between 1 and 2", "got 3"),
    bad(
        "no support",
        lambda: TASKS.folds(2).require_rows("tasks"),
        *("tasks: task '1 [0]' has no support rows", "leave it out"),
    ),
    # models
    model("unobserved", unobserved, "no observed site", "obs=y"),
    model("without latent", without_latent, "no latent site", "at least one pyro.sample"),
    model("local", local, "'b' has shape (4,) with 4 rows and (5,) with 5", "outside the plate"),
    model("in plate", ReadInPlate(), "'b' has shape (4,)", "PyroSample must be read before"),
    model("discrete", discrete, "'k' is discrete", "sum it out"),
    model("summed", summed, "'y' draws all rows", "1 to 6 rows", "the same number", "plate over"),
    model(
        "square",
        unsummed,
        *("'y'", "shape (3, 3) for 3 rows", ".to_event(k)"),
        tasks=Tasks.from_list([(numbers(3, 1), numbers(3, 3))]),
    ),
    model(
        "nested plates", nested_plates, "'y'", "shape (2, 4) for 4 rows", "not within another plate"
    ),
    model("a fixed plate", fixed_plate, "'y'", "batch shape (4,)", "'rows', x.shape[-2])"),
    model("fixed, with x", fixed_plate_x, "4 rows and not on one of 5", "'rows', x.shape[-2])"),
    model("nameless", nameless, "name ''", "give it one"),
    model("restless", Restless(), "sites that change from run to run", "fixed set"),
    model("nested", nested, "prior of latent 'a' changes with another latent", "plain priors"),
    model("nested support", nested_support, "prior of latent 'a' changes", "plain priors"),
    model("idle", idle, "adapted site 'idle' does not reach", "'y'"),
    model("idle param", idle_param, "param site 'extra' does not reach", "'y'"),
    model("closure", closure, "param site 'net$$$weight'", "the module itself must be the model"),
    model("raising", raising, "failed on one task", "(4, 2)", "KeyError: 'no such city'"),
    model("mistyped", mistyped, "x of shape (4, 2) (torch.float64)", "same dtype"),
    model("dropout", dropout, "batch of tasks", "random operation", "with pyro.sample only"),
    model("batch norm", batch_norm, "averages over the rows", "module.eval()", "nn.LayerNorm"),
    model(
        "embedding",
        embedding,
        *("in task '1'", "index 3 is out of bounds", "count from 0"),
        tasks=Tasks.from_list([(torch.full((3, 1), k), numbers(3)) for k in (2, 3)]),
    ),
    model("noisy", noisy, "from call to call", "independent given the latents"),
    model("centring", centring, "another row is added", "compute means over rows", "as inputs"),
    bad("shared", shared_given("s", "z"), "shared: no latent site 'z'", "has: b, s, w"),
    bad(
        "all shared", shared_given("s", "b", "w"), "no latent site that adapts", "listed in shared"
    ),
    bad(
        "shared string",
        lambda: Density(CASES["normal"].model, TASKS, shared="s"),
        *("shared must be a list", "got the string 's'"),
    ),
    # evaluating
    bad(
        "theta",
        lambda: evaluate(theta=THETA[0]),
        "theta",
        "(3,)",
        "wanted [..., 3, 3]",
        "tasks and",
    ),
    bad("theta 2", lambda: evaluate(theta=THETA[:2]), "theta has shape (2, 3)", "[..., 3, 3]"),
    bad("shared 2", lambda: evaluate(shared=TWO), "shared has shape (2,)", "wanted (1,)"),
    bad("shared 3", lambda: evaluate(shared=numbers(2, 3, 1)), "shared", "wanted (3, 1)"),
    bad("other x", lambda: evaluate(tasks=reals(4)), "tasks", "(4,)", "was built for", "(2,)"),
    bad("other y", lambda: evaluate(tasks=reals(2, 2)), "tasks", "(2,), (2,)", "(2,), ()"),
    bad("needs y", lambda: predict(needs_y), "y=None: TypeError", "len()", "model(x, None)"),
    bad("no y", lambda: predict(silent_without_y), "no site 'y' when y is None", "sample it there"),
    # the prior
    bad("scale 0", lambda: GaussianPrior.create(LOC, 0.0), "scale must be positive", "got 0"),
    bad("scale < 0", lambda: GaussianPrior.create(LOC, -1.0), "got -1", "standard deviation"),
    bad("scale nan", lambda: GaussianPrior.create(LOC, math.nan), "positive and finite, got nan"),
    bad("scale inf", lambda: GaussianPrior.create(LOC, [1.0, math.inf, 1.0]), "finite, got inf"),
    bad("scale 2", lambda: GaussianPrior.create(LOC, [1.0, 1.0]), "scale", "(2,)", "(1,) or (3,)"),
    bad("matrix", lambda: GaussianPrior.create(LOC, torch.eye(3) + 1), "scale has shape (3, 3)"),
    bad(
        "groups",
        lambda: GaussianPrior.create(LOC, 1.0, groups=torch.zeros(2).long()),
        *("groups has shape (2,)", "wanted (3,)"),
    ),
    bad(
        "group numbers",
        lambda: GaussianPrior.create(LOC, 1.0, groups=torch.tensor([0, 1, 2])),
        *("groups holds numbers from 0 to 2", "log_scale has 1"),
    ),
    bad(
        "factor", lambda: GaussianPrior.create(LOC, 1.0, factor=TWO), "factor", "(2,)", "(3, rank)"
    ),
    bad(
        "scales",
        lambda: GaussianPrior.from_density(DENSITY, scales="sites"),
        *("scales", "'site', 'layer', 'coordinate', 'all'", "got 'sites'"),
    ),
    bad("rank", lambda: GaussianPrior.from_density(DENSITY, rank=4), "rank", "0 and 3", "got 4"),
]


@pytest.mark.parametrize(("call", "pieces"), TABLE)
def test_bad_call(call, pieces):
    with pytest.raises(ValueError) as info:
        call()
    message = str(info.value)
    for piece in pieces:
        assert piece in message, message
    assert "Trace Shapes" not in message, "Pyro's table of shapes says nothing about the mistake"


def test_the_original_error_is_kept_as_the_cause():
    with pytest.raises(ValueError) as info:
        Density(raising, TASKS)
    assert isinstance(info.value.__cause__, KeyError)


def rounded(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(torch.round(w) * x[:, 0], 1.0), obs=y)


def incomplete(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 3.0))
    mean = torch.special.gammainc(w.exp() * torch.ones(len(x)), x[:, 0].abs() + 1)
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (rounded, r"site 'w' changes the log-likelihood, but its gradient is 0 .*\(round\)"),
        (incomplete, r"not differentiable: .*igamma.*Write that operation with others"),
    ],
)
def test_a_model_without_a_derivative_names_the_operation(model: object, said: str) -> None:
    tasks = Tasks.from_list([(torch.randn(5, 1), torch.randn(5))])
    with pytest.raises(ValueError, match=said):
        Density(model, tasks)  # type: ignore[arg-type]


def test_a_tolerance_that_the_data_type_cannot_reach() -> None:
    start = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"tolerance is 1e-12, and torch\.float32 has a precision"):
        GradientDescent(0.1, tolerance=1e-12).minimise(lambda t: t.square().sum(-1), start)
