"""Seconds to a whole posterior: `NestedLaplace`, NUTS over ψ, Pyro's and NumPyro's NUTS, MixedLM.

    OMP_NUM_THREADS=1 python -m benchmarks.nested samplers [--cases radon,mathachieve]
    OMP_NUM_THREADS=1 python -m benchmarks.nested size [--tasks 100,1000,10000,100000]

`samplers`: cases of the fleet, all by the same half-normal hyperprior, one process and one thread
after the other. Effective draws are the smallest bulk ESS (ArviZ) over θ0, log scales and φ; of
weighted draws 1/Σw². Seconds are those of the processor, since a shared machine's clock says little,
with everything that a first call costs. NumPyro and statsmodels are left out where they are not
installed. `size`: a random intercept and a shared noise, 5 rows a group.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import varmeta as vm
from benchmarks.fleet.cases import CASES, LINEAR, Case

NESTED = vm.NestedLaplace()
MARGINAL = vm.NestedLaplace(sampler="nuts", draws=400, warmup=60)
PYRO = vm.PyroNUTS(draws=100, warmup=50)


def smallest(draws: dict[str, np.ndarray]) -> float:
    """Bulk ESS over all of `{name: [chain, draw, ...]}`."""
    found = az.ess(az.convert_to_dataset(draws), method="bulk")
    return float(min(float(v.min()) for v in found.values()))


def by_chain(values: dict[str, Tensor], chains: int) -> dict[str, np.ndarray]:
    """Flat draws, chain after chain, as ArviZ has them."""
    shaped = {n: v.reshape(chains, -1, v.shape[-1]).numpy() for n, v in values.items()}
    return {n: v for n, v in shaped.items() if v.shape[-1]}


def ours(case: Case, strategy: vm.Strategy) -> tuple[float, float]:
    """Processor seconds to the posterior of every task, and effective draws."""
    problem = case.problem()
    begun = time.process_time()
    result = vm.fit(strategy, problem.density, problem.train.support, progress=False)
    result.posterior()
    seconds = time.process_time() - begun
    kept = result.state.tensors
    if strategy is NESTED:
        return seconds, float(kept["psi_ess"])
    if strategy is MARGINAL:
        return seconds, smallest(by_chain({"psi": kept["psi"]}, MARGINAL.chains))
    names = ("loc", "log_scale", "shared")
    return seconds, smallest(by_chain({n: kept[n] for n in names}, PYRO.chains))


def numpyro_nuts(case: Case) -> tuple[float, float]:
    """Two chains of 1,000 draws after 1,000, one after the other, not centred."""
    import jax
    from numpyro.infer import MCMC, NUTS

    from benchmarks.fleet import numpyro_hierarchy as other

    jax.config.update("jax_enable_x64", True)
    target = other.target_of(case)
    model = other.hierarchy(target, centred=False)
    begun = time.process_time()
    mcmc = MCMC(
        NUTS(model), num_warmup=1000, num_samples=1000, num_chains=2, progress_bar=False,
        chain_method="sequential",
    )  # fmt: skip
    mcmc.run(jax.random.PRNGKey(0))
    found = mcmc.get_samples(group_by_chain=True)
    seconds = time.process_time() - begun
    inside = {n: np.asarray(v) for n, v in found.items() if n not in ("z", "theta")}
    return seconds, smallest({n: np.log(v) if n == "scale" else v for n, v in inside.items()})


def mixed_lm(case: Case) -> tuple[float, float]:
    """REML point estimates."""
    import statsmodels.api as sm

    tasks = case.problem().train.support
    x, y = tasks.inputs[tasks.mask].numpy(), tasks.targets[tasks.mask].numpy()
    group = np.repeat(np.arange(len(tasks)), tasks.num_rows.numpy())
    free = len(case.inputs) + 1 - (len(case.shared) - 1)
    exog = sm.add_constant(x)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sm.MixedLM(y, exog, groups=group, exog_re=exog[:, :free]).fit()
    return time.process_time() - begun, float("nan")


def samplers(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    for name in names:
        case = CASES[name]
        runs: dict[str, Callable[[], tuple[float, float]]] = {
            "NestedLaplace": lambda case=case: ours(case, NESTED),
            "NestedLaplace (NUTS)": lambda case=case: ours(case, MARGINAL),
            "PyroNUTS": lambda case=case: ours(case, PYRO),
        }
        if find_spec("numpyro"):
            runs["NumPyro NUTS"] = lambda case=case: numpyro_nuts(case)
        if find_spec("statsmodels") and name in LINEAR:
            runs["statsmodels MixedLM (points)"] = lambda case=case: mixed_lm(case)
        for label, run in runs.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seconds, ess = run()
            yield name, label, f"{seconds:.1f}", f"{ess:.0f}", f"{ess / seconds:.2f}"


def group(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A random intercept, and a noise that all groups share."""
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(level + 0.0 * x[..., 0], noise), obs=y)


def size(counts: list[int]) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    for count in counts:
        source = torch.Generator().manual_seed(0)
        like: Any = {"generator": source, "dtype": torch.float64}
        y = 1 + 0.5 * torch.randn(count, 1, **like) + torch.randn(count, 5, **like)
        x = torch.zeros(count, 5, 1, dtype=torch.float64)
        tasks = vm.Tasks.from_list(list(zip(x, y, strict=True)))
        density = vm.Density(group, tasks, shared=["noise"])
        begun = time.process_time()
        result = vm.fit(vm.NestedLaplace(draws=200), density, tasks, progress=False)
        learned = time.process_time() - begun
        result.posterior()
        seconds = time.process_time() - begun
        kept, top = result.state.tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        scale = kept["log_scale"].exp()
        said = f"{float(scale.mean()):.4f} ± {float(scale.std()):.4f}"
        yield f"{count:,}", f"{learned:.1f}", f"{seconds:.1f}", f"{top:.1f}", said


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["samplers", "size"])
    parser.add_argument("--cases", default="radon,mathachieve")
    parser.add_argument("--tasks", default="100,1000,10000,100000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "samplers":
        heads = ("case", "by", "seconds", "effective draws", "a second")
        rows = samplers(options.cases.split(","))
    else:
        heads = ("groups", "seconds to ψ", "and tasks", "GiB", "scale (truth 0.5)")
        rows = size([int(n) for n in options.tasks.split(",")])
    table = Table(*heads)
    for row in rows:
        print(*row, flush=True)
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
