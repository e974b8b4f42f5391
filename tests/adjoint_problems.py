"""Problems and measures for the tests of adjoints: slopes by differences, bytes held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from density_cases import numbers
from helpers import FLOAT, case_of, tensor
from linear_gaussian import LinearGaussian
from torch import Tensor

from varmeta.inference.energy import Energy, FunctionEnergy, TaskEnergy
from varmeta.inference.minimise import Minimiser
from varmeta.inference.prox import Adjoint, Detached, ProxInfo, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

Tensors = dict[str, Tensor]


def direction(of: Tensor) -> Tensor:
    return numbers(*of.shape, seed=31)


def slopes(
    function: Callable[..., Tensor], at: Tensors, names: Sequence[str], step: float
) -> Tensors:
    """Derivative of a scalar `function(**at)` along a random direction in each of `names`.

    Five-point differences: the error is of order step⁴ and of rounding over step.
    """
    out = {}
    for name in names:
        values = []
        for k in (-2, -1, 1, 2):
            moved = at[name].detach() + k * step * direction(at[name])
            with torch.no_grad():
                values.append(function(**{**at, name: moved}))
        a, b, c, d = values
        out[name] = (a - 8 * b + 8 * c - d) / (12 * step)
    return out


def assert_slopes(grads: Tensors, wanted: Tensors, tolerance: float) -> None:
    for name, slope in wanted.items():
        along = direction(grads[name])
        error = float(((grads[name] * along).sum() - slope).abs())
        size = float(grads[name].norm() * along.norm())
        assert error < tolerance * size, f"{name}: {error / size:.1e} of the gradient's size"


def leaves(at: Tensors) -> Tensors:
    return {name: t.detach().clone().requires_grad_() for name, t in at.items()}


# -- the energies ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """E of T = 4 tasks, D = 3, from `at`: loc, log_scale, factor, shared; Λ between 1/4 and 16."""

    energy: Callable[..., Energy]
    at: Tensors
    groups: Tensor

    @property
    def start(self) -> Tensor:
        return self.at["loc"].expand(4, -1) + 0.3 * numbers(4, 3, seed=11)


def bent(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Neither linear in θ nor with a constant curvature; the noise is shared."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=FLOAT), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(torch.tanh(x @ w) + b, sd), obs=y)


def of_model(density: Density, tasks: Tasks, at: Tensors, groups: Tensor) -> Problem:
    def energy(loc: Tensor, log_scale: Tensor, factor: Tensor, shared: Tensor) -> Energy:
        return TaskEnergy(density, tasks, shared, GaussianPrior(loc, log_scale, groups, factor))

    return Problem(energy, at, groups)


def linear_case() -> Problem:
    case = case_of(LinearGaussian.random(0, 4, 3), shared_noise=True)
    at = {
        "loc": case.prior.loc,
        "log_scale": tensor([-0.5, -0.2, -0.4]),
        "factor": 0.3 * numbers(3, 2, seed=1),
        "shared": tensor([0.3]),
    }
    return of_model(case.density, case.tasks.support, at, case.prior.groups)


def bent_case() -> Problem:
    rows = [(numbers(n, 2, seed=i), numbers(n, seed=20 + i)) for i, n in enumerate((5, 1, 3, 4))]
    tasks = Tasks.from_list(rows)
    density = Density(bent, tasks, shared=["sd"])
    at = {
        "loc": tensor([0.4, -0.5, 0.1]),
        "log_scale": tensor([-0.4, 0.2]),  # one per site
        "factor": 0.3 * numbers(3, 1, seed=2),
        "shared": tensor([0.1]),
    }
    return of_model(density, tasks, at, density.site_index)


def bare_case() -> Problem:
    """A convex function that is no quadratic, knows nothing of models, and has its own rows."""
    data = numbers(4, 3, seed=3)

    def energy(loc: Tensor, log_scale: Tensor, factor: Tensor, shared: Tensor) -> Energy:
        def function(theta: Tensor) -> Tensor:
            loss = torch.nn.functional.softplus(shared * theta * data).sum(-1)
            pull = 0.5 * ((theta - loc) * (-log_scale).exp()).square().sum(-1)
            return loss + pull + 0.5 * ((theta - data) @ factor).square().sum(-1)

        return FunctionEnergy(function, tensor([5.0, 1.0, 3.0, 4.0]), log_scale.exp().expand(3))

    at = {
        "loc": tensor([0.3, -0.2, 0.5]),
        "log_scale": tensor([-0.1]),  # one for all
        "factor": 0.3 * numbers(3, 1, seed=4),
        "shared": tensor([1.5]),
    }
    return Problem(energy, at, torch.zeros(3, dtype=torch.long))


PROBLEMS = {"linear": linear_case, "bent": bent_case, "bare": bare_case}
WEIGHTS = numbers(4, 3, seed=12)


@cache
def problem_of(name: str) -> Problem:
    return PROBLEMS[name]()


every_problem = pytest.mark.parametrize("name", PROBLEMS)


def functional(
    problem: Problem, minimiser: Minimiser, iterations: Tensor | None = None
) -> Callable[..., Tensor]:
    """Σ w·θ* as a function of the energy's tensors and of the start.

    A difference must not straddle a change of the number of `iterations`.
    """

    def value(start: Tensor, **parameters: Tensor) -> Tensor:
        theta, info = prox(
            problem.energy(**parameters), start, minimiser=minimiser, adjoint=Detached()
        )
        assert iterations is None or torch.equal(info.iterations, iterations)
        return (theta * WEIGHTS).sum()

    return value


def derivative(
    problem: Problem, minimiser: Minimiser, adjoint: Adjoint, start: Tensor | None = None
) -> tuple[Tensors, ProxInfo]:
    """d Σ w·θ*, by the adjoint, in the energy's tensors, and in `start` if it is given."""
    at = leaves(problem.at if start is None else {**problem.at, "start": start})
    energy = problem.energy(**{n: t for n, t in at.items() if n != "start"})
    first = at.get("start", problem.start)
    theta, info = prox(energy, first, minimiser=minimiser, adjoint=adjoint)
    grads = torch.autograd.grad((theta * WEIGHTS).sum(), list(at.values()), allow_unused=True)
    return dict(zip(at, grads, strict=True)), info  # type: ignore[arg-type]


# -- what autograd holds --------------------------------------------------------------------------


class Held:
    """A tensor that autograd keeps, and a note of its memory for as long as it does."""

    def __init__(self, value: Tensor, held: dict[int, tuple[int, int]]) -> None:
        storage = value.untyped_storage()
        # Detached: an output that is held by its own node would never be freed.
        self.value, self.held, self.address = value.detach(), held, storage.data_ptr()
        count, _ = held.get(self.address, (0, 0))
        held[self.address] = (count + 1, storage.nbytes())

    def __del__(self) -> None:
        count, size = self.held.pop(self.address)
        if count > 1:
            self.held[self.address] = (count - 1, size)


def bytes_held(run: Callable[[], Any]) -> int:
    """What autograd keeps for the way back, each stretch of memory counted once."""
    held: dict[int, tuple[int, int]] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: Held(t, held), lambda h: h.value):
        result = run()
    size = sum(nbytes for _, nbytes in held.values())
    del result
    return size
