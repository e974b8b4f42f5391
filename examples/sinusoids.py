"""Few-shot sinusoid regression with a network: iMAML on an endless stream of tasks.

A plain `nn.Module` becomes a Pyro model, the prior N(θ0, 1/λ) is learned from batches of 25 fresh
tasks a step, and the result is scored on tasks never seen, before and after adapting to 10 points.

    python examples/sinusoids.py --steps 100
"""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
import torch
import typer
from torch import nn

import varmeta as vm
from varmeta.models import network, sinusoids


def main(
    steps: Annotated[int, typer.Option(help="Meta-steps.")] = 100,
    tasks: Annotated[int, typer.Option(help="Tasks per meta-step, and in the test.")] = 25,
    penalty: Annotated[float, typer.Option(help="λ, the prior's precision.")] = 2.0,
) -> None:
    """Train, then print the mean squared error on new tasks without and with adaptation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(
            nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
        )
    model = network(mlp, lambda out: dist.Normal(out[:, 0], 0.3))
    source = vm.TaskSource(sinusoids(tasks, support=10, query=10), seed=0)
    density = vm.Density(model, source)
    prior = vm.GaussianPrior.create(density.prior_loc, penalty**-0.5)
    strategy = vm.IMAML(
        steps=steps,
        learning_rate=0.01,
        learn_scale=False,
        minimiser=vm.NewtonCG(max_iterations=6, tolerance=1e-2, solver=vm.CG(max_iterations=10)),
        adjoint=vm.Implicit(vm.CG(max_iterations=10)),
        posterior_kind="delta",
    )
    fit = vm.fit(strategy, density, source, prior=prior)

    test = vm.TaskSource(source.draw, seed=1).batch(0)
    adapted = fit.adapt(test.support).mean
    for label, theta in (("at θ0", fit.prior.loc.expand_as(adapted)), ("adapted", adapted)):
        loss = density.negative_log_likelihood(theta, test.query).mean() / 10
        mse = 2 * 0.3**2 * (float(loss) - float(torch.tensor(0.3 * (2 * torch.pi) ** 0.5).log()))
        print(f"{label:8} mean squared error {mse:.3f} on {len(test)} new tasks")


if __name__ == "__main__":
    typer.run(main)
