"""Models of one task, each with its likelihood written by hand: what a Density must reproduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from varmeta.models.density import Density
from varmeta.tasks import Tasks

FLOAT = torch.float64
SIZES = (4, 1, 6)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def tasks_from(x: Callable, y: Callable) -> Tasks:
    """`x(n, i)` and `y(n, i)` for tasks i of n rows."""
    return Tasks.from_list([(x(n, i), y(n, i)) for i, n in enumerate(SIZES)])


def reals(features: int, *target: int) -> Tasks:
    return tasks_from(
        lambda n, i: numbers(n, features, seed=i), lambda n, i: numbers(n, *target, seed=9 + i)
    )


@dataclass(frozen=True)
class Case:
    model: Any
    tasks: Tasks
    by_hand: Callable  # θ [D], φ [P], x, y -> [n]
    dim: int
    shared_dim: int = 0
    shared: tuple[str, ...] = ()


def plain(size: int, scale: float = 1.0) -> dist.Distribution:
    return dist.Normal(torch.zeros(size, dtype=FLOAT), scale).to_event(1)


def normal(x, y=None):
    w = pyro.sample("w", plain(2))
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("twice", 2 * b)
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", x @ w + b)
        return pyro.sample("y", dist.Normal(mean, s), obs=y)


def logistic(x, y=None):
    w = pyro.sample("w", plain(2))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def poisson(x, y=None):
    with pyro.plate("features", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)


def categorical(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3, dtype=FLOAT), 1.0).to_event(2))
    b = pyro.sample("b", plain(3))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Categorical(logits=x @ w + b), obs=y)


def constrained(x, y=None):
    a = pyro.sample("a", dist.HalfNormal(1.0))
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3, dtype=FLOAT)))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    u = pyro.sample("u", dist.Uniform(2.0, 5.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(a * (x @ simplex) + p * u, s), obs=y)


def constrained_by_hand(t, phi, x, y):
    # stick-breaking: fractions of what is left, centred so that t = 0 gives equal parts
    first = torch.sigmoid(t[2] - torch.tensor(2.0, dtype=FLOAT).log())
    second = torch.sigmoid(t[3]) * (1 - first)
    simplex = torch.stack([first, second, 1 - first - second])
    mean = t[0].exp() * (x @ simplex) + torch.sigmoid(t[1]) * (2 + 3 * torch.sigmoid(t[5]))
    return td.Normal(mean, t[4].exp()).log_prob(y)


class Network(PyroModule):
    """A Bayesian first layer; what follows is shared: a Parameter, a PyroParam, a plain Linear."""

    def __init__(self):
        super().__init__()
        self.first = PyroSample(dist.Normal(torch.zeros(2, 3, dtype=FLOAT), 1.0).to_event(2))
        self.bias = nn.Parameter(torch.tensor(0.3, dtype=FLOAT))
        self.last = nn.Linear(3, 1, dtype=FLOAT)
        self.frozen = nn.Parameter(torch.tensor(0.7, dtype=FLOAT), requires_grad=False)
        self.sd = PyroParam(torch.tensor(0.5, dtype=FLOAT), constraint=constraints.positive)

    def forward(self, x, y=None):
        mean = self.last(torch.tanh(x @ self.first))[..., 0] + self.bias * self.frozen
        sd = self.sd
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, sd), obs=y)


def network_by_hand(t, phi, x, y):  # φ in the order in which forward reads: last, bias, sd
    mean = torch.tanh(x @ t.reshape(2, 3)) @ phi[:3] + phi[3] + 0.7 * phi[4]
    return td.Normal(mean, phi[5].exp()).log_prob(y)


class PlainModule(nn.Module):
    """Not a PyroModule: Pyro hears nothing of its parameters."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.1, 0.2], dtype=FLOAT))

    def forward(self, x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        sd = pyro.param("sd", torch.tensor(0.5, dtype=FLOAT), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(x @ self.slope + b, sd), obs=y)


def vector(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3, dtype=FLOAT), 1.0).to_event(2))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def school(x, y=None):
    effect = pyro.sample("effect", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(effect, x[:, 0].exp()), obs=y)


def several(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    first, second = (None, None) if y is None else y.unbind(-1)
    with pyro.plate("rows", len(x)):
        pyro.sample("height", dist.Normal(a, 1.0), obs=first)
        pyro.sample("weight", dist.StudentT(4.0, a * x[:, 0], 2.0), obs=second)


def one_hot(x, y=None):
    a = pyro.sample("a", plain(3))
    with pyro.plate("rows", len(x)):
        mean = F.one_hot(x[:, 0], 3).to(a.dtype) @ a
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def whole(high: int) -> Callable:
    return lambda n, i: torch.arange(i, n + i) % high


CASES = {
    "normal": Case(
        normal,
        reals(2),
        lambda t, phi, x, y: td.Normal(x @ t[:2] + t[2], phi[0].exp()).log_prob(y),
        3,
        1,
        ("s",),
    ),
    "logistic": Case(
        logistic,
        tasks_from(lambda n, i: numbers(n, 2, seed=i), lambda n, i: whole(2)(n, i).to(FLOAT)),
        lambda t, phi, x, y: y * F.logsigmoid(x @ t) + (1 - y) * F.logsigmoid(-(x @ t)),
        2,
    ),
    "poisson": Case(
        poisson,
        tasks_from(lambda n, i: numbers(n, 3, seed=i), lambda n, i: whole(4)(n, i).to(FLOAT)),
        lambda t, phi, x, y: y * (x @ t) - (x @ t).exp() - torch.lgamma(y + 1),
        3,
    ),
    "categorical": Case(
        categorical,
        tasks_from(lambda n, i: numbers(n, 2, seed=i), whole(3)),
        lambda t, phi, x, y: (
            (x @ t[:6].reshape(2, 3) + t[6:]).log_softmax(-1).gather(-1, y[:, None])[:, 0]
        ),
        9,
    ),
    "constrained": Case(constrained, reals(3), constrained_by_hand, 6),
    "network": Case(Network(), reals(2), network_by_hand, 6, 6),
    "plain module": Case(
        PlainModule(),
        reals(2),
        lambda t, phi, x, y: td.Normal(x @ phi[1:] + t[0], phi[0].exp()).log_prob(y),
        1,
        3,
    ),
    "vector target": Case(
        vector,
        reals(2, 3),
        lambda t, phi, x, y: td.Normal(x @ t.reshape(2, 3), 0.5).log_prob(y).sum(-1),
        6,
    ),
    "eight schools": Case(
        school,
        reals(1),
        lambda t, phi, x, y: td.Normal(t[0], x[:, 0].exp()).log_prob(y),
        1,
    ),
    "several sites": Case(
        several,
        reals(1, 2),
        lambda t, phi, x, y: (
            td.Normal(t[0], 1.0).log_prob(y[:, 0])
            + td.StudentT(torch.tensor(4.0, dtype=FLOAT), t[0] * x[:, 0], 2.0).log_prob(y[:, 1])
        ),
        1,
    ),
    "one hot": Case(
        one_hot,
        tasks_from(lambda n, i: whole(3)(n, i)[:, None], lambda n, i: numbers(n, seed=i).float()),
        lambda t, phi, x, y: td.Normal(t[x[:, 0]], 1.0).log_prob(y),
        3,
    ),
}


def build(case: Case) -> Density:
    return Density(case.model, case.tasks, shared=case.shared)


def values(case: Case, *draws: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    theta = 0.5 * numbers(*draws, len(case.tasks), case.dim, seed=seed)
    return theta, 0.5 * numbers(case.shared_dim, seed=seed + 1)


def energy_of(theta: Tensor, weight: Tensor) -> Tensor:
    """Of a toy without a model: `[T, D]` to `[T]`."""
    return (torch.tanh(theta * weight).sum(-1) ** 2 + (theta**4).sum(-1)) / 3


def second_order(v: Tensor, theta: Tensor, weight: Tensor) -> list[Tensor]:
    """Its value, its gradient and its Hessian's product with v, as autograd takes them."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        value = energy_of(leaf, weight)
        (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        (product,) = torch.autograd.grad(grad, leaf, v)
    return [value.detach(), grad.detach(), product]
