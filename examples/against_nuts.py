"""Every strategy's answer beside a long NUTS run, on problems where NUTS is affordable.

Eight schools, the radon counties and a hierarchical logistic regression. NUTS samples θ0, the
scales, φ and every θ_i together and is the reference, with its own R-hat and effective sample size
in the table's title; each strategy sees the same rows. What is compared is what is shared (θ0 and
the scales on the unconstrained scale, φ on its own), and the tasks' posteriors: means in units of
NUTS's standard deviations, and ratios of standard deviations.

    python examples/against_nuts.py --problem eight_schools --draws 200

A full run, read: docs/against-nuts.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import arviz as az
import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import varmeta as vm
from varmeta import problems
from varmeta.seeds import generator


def patient(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Does the patient respond to a dose x? One patient's intercept and slope on the logit."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("doses", x.shape[-2]):
        law = dist.Bernoulli(logits=intercept + slope * x[..., 0])
        return pyro.sample("response", law, obs=y)


def logistic(tasks: int = 40, rows: int = 15) -> tuple[vm.Density, vm.Tasks]:
    """Drawn from the model: θ0 = (−1, 1.5), scales (0.8, 0.6), doses N(0.5, 1)."""
    noise = generator(0)
    loc, scale = torch.tensor([-1.0, 1.5]).double(), torch.tensor([0.8, 0.6]).double()
    theta = loc + scale * torch.randn(tasks, 2, generator=noise, dtype=torch.float64)
    x = 0.5 + torch.randn(tasks, rows, 1, generator=noise, dtype=torch.float64)
    logits = theta[:, :1] + theta[:, 1:] * x[..., 0]
    y = torch.bernoulli(logits.sigmoid(), generator=noise)
    data = vm.Tasks.from_list(list(zip(x, y, strict=True)), input_names=["dose"])
    return vm.Density(patient, data), data


def shipped(name: str) -> tuple[vm.Density, vm.Tasks]:
    """A shipped problem, with all rows of its training tasks."""
    problem = problems.PROBLEMS[name](0)
    return problem.density, problem.train.unsplit


PROBLEMS: dict[str, Callable[[], tuple[vm.Density, vm.Tasks]]] = {
    "eight_schools": lambda: shipped("eight_schools"),
    "radon": lambda: shipped("radon"),
    "logistic": logistic,
}

STRATEGIES: tuple[vm.Strategy, ...] = (
    vm.JointVariational(),
    vm.JointVariational(q="diagonal", steps=2000),
    vm.JointVariational(q="low_rank", rank=1, steps=2000),
    vm.JointVariational(q="delta", steps=2000),
    vm.LaplaceEvidence(),
    vm.AmortisedVariational(q="laplace", outside="query"),
    # Few steps of gradient descent suit no more than one of the problems: Adam needs no curvature.
    vm.ABML(natural=False, minimiser=vm.Adam(0.1, 30, tolerance=0, clip=None)),
    vm.IMAML(),
    vm.PyroSVI(AutoNormal, steps=5000),
    vm.PyroSVI(AutoMultivariateNormal, steps=5000),
)


@dataclass
class Reference:
    """The NUTS run.

    Attributes:
        fit: as it is.
        shared: draws of θ0, the scales and φ by name, `[S]` each.
        theta: draws of the tasks' parameters `[S, T, D]`.
        verdict: R-hat, effective sample size and divergences in words.
    """

    fit: vm.Fit
    shared: dict[str, Tensor]
    theta: Tensor
    verdict: str

    @classmethod
    def of(cls, fit: vm.Fit) -> Reference:
        """Read the draws."""
        kept, strategy = fit.state.tensors, fit.strategy
        assert isinstance(strategy, vm.PyroNUTS)
        scale = kept["log_scale"].exp()[:, fit.prior.groups]
        shared = named(fit.density, kept["loc"], scale, kept["shared"])
        every = {**shared, "theta": kept["theta"]}
        chains = {k: v.numpy().reshape(strategy.chains, -1, *v.shape[1:]) for k, v in every.items()}
        rhat = max(float(v.max()) for v in az.rhat(chains).data_vars.values())
        ess = min(float(v.min()) for v in az.ess(chains).data_vars.values())
        verdict = (
            f"{strategy.chains} chains of {strategy.draws} draws, worst R-hat {rhat:.3f}, smallest "
            f"effective sample {ess:.0f}, {int(kept['diverging'].sum())} divergences"
        )
        return cls(fit, shared, kept["theta"], verdict)


def named(density: vm.Density, loc: Tensor, scale: Tensor, shared: Tensor) -> dict[str, Tensor]:
    """θ0 and scales of each coordinate `[..., D]`, and φ of scalar sites, by name: `[...]` each."""
    sites = [site for site in density.sites for _ in range(site.size)]
    labels = [s.name if s.size == 1 else f"{s.name} {j}" for j, s in enumerate(sites)]
    out = {f"θ0\n{label}": loc[..., j] for j, label in enumerate(labels)}
    out |= {f"scale\n{label}": scale[..., j] for j, label in enumerate(labels)}
    return out | {f"φ\n{name}": v for name, v in density.constrain_shared(shared).items()}


def compare(name: str, draws: int, chains: int, steps: int | None, seed: int) -> Table:
    """NUTS, every strategy, and a table of both."""
    density, tasks = PROBLEMS[name]()
    nuts = vm.PyroNUTS(draws=draws, warmup=max(draws // 3, 20), chains=chains, target_accept=0.9)
    truth = Reference.of(vm.fit(nuts, density, tasks, seed=seed))
    mean, sd = truth.theta.mean(0), truth.theta.std(0)
    table = Table(
        title=f"{name}: {len(tasks)} tasks, {int(tasks.mask.sum())} rows; NUTS: {truth.verdict}",
        title_justify="left",
        caption="shift: |mean − NUTS mean| in NUTS sds, over tasks and coordinates",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    headings = ("shift\nmedian", "shift\nworst", "sd ratio\nmedian", "seconds")
    for heading in (*truth.shared, *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    whole = truth.shared.values()
    table.add_row("NUTS mean", *(f"{v.mean():.3f}" for v in whole), "", "", "", seconds(truth.fit))
    table.add_row("NUTS sd", *(f"{v.std():.3f}" for v in whole))
    table.add_row("NUTS median", *(f"{v.median():.3f}" for v in whole), end_section=True)
    for strategy in STRATEGIES:
        changes: dict[str, Any] = {} if steps is None else {"steps": steps}
        fit = vm.fit(replace(strategy, **changes), density, tasks, seed=seed)  # type: ignore[type-var]
        posterior = fit.posterior()
        shift, ratio = (posterior.mean - mean).abs() / sd, posterior.sd / sd
        learned = named(density, fit.prior.loc, fit.prior.scale, fit.shared)
        row = [*(f"{v:.3f}" for v in learned.values())]
        row += [f"{v:.2f}" for v in (shift.median(), shift.max(), ratio.median())]
        table.add_row(strategy.name, *row, seconds(fit))
        typer.echo(" ".join([strategy.name, *row, seconds(fit)]), err=True)
    return table


def seconds(fit: vm.Fit) -> str:
    """Wall time of the learning."""
    return f"{fit.seconds:.1f}"


def main(
    problem: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PROBLEMS)}; all if left out.")
    ] = None,
    draws: Annotated[int, typer.Option(help="NUTS draws per chain, after a third as many.")] = 1000,
    chains: Annotated[int, typer.Option(help="NUTS chains.")] = 4,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every strategy; their own if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random, save for the data.")] = 0,
) -> None:
    """Print a table for each problem."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # batches of small matrices: a second thread costs time
    for name in problem or PROBLEMS:
        if name not in PROBLEMS:
            raise typer.BadParameter(f"{name!r}: there are {', '.join(PROBLEMS)}")
        table = compare(name, draws, chains, steps, seed)
        Console(width=None if os.isatty(1) else 150).print(table)


if __name__ == "__main__":
    typer.run(main)
