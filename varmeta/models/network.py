"""Any `nn.Module` as a Pyro model of one task: its parameters become latent sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


def network(
    module: nn.Module,
    likelihood: Callable[[Tensor], dist.TorchDistribution],
    *,
    prior_scale: float = 1.0,
    observed: str = "y",
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A Pyro model whose latents are the module's parameters.

    Each parameter has the prior N(its value now, prior_scale²), so that θ0 starts at the module's
    own initialisation. The module itself is never changed.

    Args:
        module: maps `[N, *input_shape]` to outputs with N rows; without buffers that change in
            `forward` (no batch-norm in training mode).
        likelihood: outputs to a distribution with batch shape `[N]`, for example
            `lambda out: dist.Normal(out[:, 0], 0.1)` or `lambda out: dist.Categorical(logits=out)`.
        prior_scale: standard deviation of the prior over every parameter.
        observed: name of the observed site.

    Example:
        >>> import pyro.distributions as dist
        >>> from varmeta import Density, Tasks
        >>> mlp = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> model = network(mlp, lambda out: dist.Normal(out[:, 0], 0.1))
        >>> tasks = Tasks.from_list([(torch.zeros(5, 1), torch.zeros(5))])
        >>> Density(model, tasks).dim
        25
    """
    return _Network(module, likelihood, prior_scale, observed)


@dataclass(frozen=True, eq=False)
class _Network:
    """A model that, unlike a function within a function, can be pickled."""

    module: nn.Module
    likelihood: Callable[[Tensor], dist.TorchDistribution]
    prior_scale: float
    observed: str

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        weights = {
            name: pyro.sample(
                name, dist.Normal(value.detach().to(x), self.prior_scale).to_event(value.dim())
            )
            for name, value in self.module.named_parameters()
        }
        out = torch.func.functional_call(self.module, weights, (x,))
        with pyro.plate("rows", len(x)):
            return pyro.sample(self.observed, self.likelihood(out), obs=y)
