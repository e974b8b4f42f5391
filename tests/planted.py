"""Linear tasks whose coefficients have planted scales 0, 1, 0 and 0.4, and where criteria end.

Everything here is a closed form in numpy and torch, apart from varmeta; only the tasks and the
model are varmeta's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import minimize
from torch import Tensor

from varmeta.inference.base import State
from varmeta.inference.fitted import Fit
from varmeta.inference.imaml import IMAML
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks

PLANTED = (0.0, 1.0, 0.0, 0.4)
NAMES = ("same", "far", "alike", "near")
NOISE = 0.5
_LOC = (1.0, -1.0, 0.5, 0.0)
_TINY = 1e-6  # stands for a scale of 0, where a learned one would end


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """y ~ N(Σ_m x_m θ_m, noise²), a site for each coefficient."""
    theta = [pyro.sample(name, dist.Normal(x.new_zeros(()), 1.0)) for name in NAMES]
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(x @ torch.stack(theta), NOISE), obs=y)


@cache
def _density(rows: int) -> Density:
    x = torch.zeros(rows, 4, dtype=torch.float64)
    return Density(model, Tasks.from_list([(x, x[:, 0])]))


def density_of(tasks: Tasks) -> Density:
    """The same one for all tasks of a size, so that its derivatives are recorded once."""
    return _density(tasks.mask.shape[1])


@dataclass(frozen=True, eq=False)
class Planted:
    """Arrays, and the same as tasks whose last rows are the query part.

    Attributes:
        x: `[T, N, 4]` support rows, the first column 1; y: `[T, N]`.
        tasks: with as many query rows, split.
    """

    x: Tensor
    y: Tensor
    tasks: Tasks

    @classmethod
    def draw(cls, seed: int, tasks: int, rows: int) -> Planted:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(tasks, 2 * rows, 4))
        x[..., 0] = 1
        theta = np.array(_LOC) + np.array(PLANTED) * rng.normal(size=(tasks, 4))
        y = np.einsum("tnd,td->tn", x, theta) + NOISE * rng.normal(size=(tasks, 2 * rows))
        made = Tasks.from_list(
            [(torch.tensor(a), torch.tensor(b)) for a, b in zip(x, y, strict=True)]
        )
        split = replace(made, is_query=torch.arange(2 * rows).expand(tasks, -1) >= rows)
        return cls(torch.tensor(x[:, :rows]), torch.tensor(y[:, :rows]), split)

    def negative_evidence(self, loc: Tensor, scale: Tensor) -> Tensor:
        """−Σ_i log p(y_i), nats, but for a constant."""
        eye = torch.eye(self.y.shape[1], dtype=self.y.dtype)
        root = torch.linalg.cholesky(NOISE**2 * eye + self.x * scale**2 @ self.x.mT)
        left = torch.linalg.solve_triangular(root, (self.y - self.x @ loc)[..., None], upper=False)
        return 0.5 * left.square().sum() + root.diagonal(dim1=1, dim2=2).log().sum()

    def validation(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Squared error of each half of the rows at the MAP given the other, nats."""
        half = torch.arange(self.y.shape[1]) % 2 == 0
        total = scale.new_zeros(())
        for seen in (half, ~half):
            x, error = self.x[:, seen] * scale, self.y[:, seen] - self.x[:, seen] @ loc
            matrix = x.mT @ x / NOISE**2 + torch.eye(4, dtype=x.dtype)
            unit = torch.linalg.solve(matrix, x.mT @ error[..., None] / NOISE**2)
            out = self.y[:, ~seen] - self.x[:, ~seen] @ loc
            off = out - (self.x[:, ~seen] * scale @ unit)[..., 0]
            total = total + 0.5 * off.square().sum() / NOISE**2
        return total

    def optimum(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """θ0 and scales where a criterion is least, by scipy."""

        def both(point: np.ndarray) -> tuple[float, np.ndarray]:
            at = torch.tensor(point, requires_grad=True)
            value = criterion(at[:4], at[4:].exp())
            return value.item(), torch.autograd.grad(value, at)[0].numpy()

        start = np.r_[_LOC, np.log([0.3] * 4)]
        bounds = [(None, None)] * 4 + [(np.log(_TINY), 3.0)] * 4
        found = minimize(both, start, jac=True, method="L-BFGS-B", bounds=bounds, tol=1e-7).x
        return torch.tensor(found[:4]), torch.tensor(np.exp(found[4:]))

    def truth(self) -> tuple[Tensor, Tensor]:
        """The planted ones."""
        return torch.tensor(_LOC).double(), torch.tensor(PLANTED).double().clamp(min=_TINY)

    def fit_at(self, loc: Tensor, scale: Tensor, tasks: Tasks) -> Fit:
        """What a fit on `tasks` that ended there would be."""
        density = density_of(tasks)
        prior = GaussianPrior.from_density(density)
        state: State = IMAML().init(density, prior, tasks, torch.Generator())
        with torch.no_grad():
            state.meta.raw["loc"].copy_((loc - prior.loc) / prior.scale)
            state.meta.raw["log_scale"].copy_(scale.log() - prior.log_scale)
        return Fit(IMAML(), density, tasks, state, 0, pd.DataFrame())


def wrong(tasks: int, rows: int, seeds: int = 100) -> pd.DataFrame:
    """Wrong verdicts in percent at the evidence's optimum, for scales 0, 1 and 0.4: by what."""
    count: dict[str, np.ndarray] = {}
    adapts = np.array(PLANTED) > 0
    for seed in range(1000, 1000 + seeds):
        drawn = Planted.draw(seed, tasks, rows)
        loc, scale = drawn.optimum(drawn.negative_evidence)
        found = drawn.fit_at(loc, scale, drawn.tasks.support).shrinkage()
        query = drawn.fit_at(loc, scale, drawn.tasks).shrinkage()
        said = {
            "cost on the rows fitted to": found.table["cost"] + found.table["optimism"] >= 0.1,
            "less the optimism": found.table["verdict"] == "adapted",
            "the same, whatever its error": found.table["cost"] >= 0.1,
            "query rows": query.table["verdict"] == "adapted",
        }
        for by, verdict in said.items():
            count[by] = count.get(by, np.zeros(4)) + (verdict.to_numpy() != adapts)
    percent = {by: [(w[0] + w[2]) / 2, w[1], w[3]] for by, w in count.items()}
    return 100 / seeds * pd.DataFrame(percent, index=["0", "1", "0.4"]).T


if __name__ == "__main__":  # the table of docs/shrinkage.md
    for size in ((100, 10), (30, 5), (8, 10), (8, 4)):
        print(*size, wrong(*size), sep="\n")
