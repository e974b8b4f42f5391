"""Seconds to a whole posterior: `NestedLaplace`, NUTS over ψ, Pyro's and NumPyro's NUTS, MixedLM.

    OMP_NUM_THREADS=1 python -m benchmarks.nested samplers [--cases radon,mathachieve]
    OMP_NUM_THREADS=1 python -m benchmarks.nested size [--tasks 100,1000,10000,100000]
    OMP_NUM_THREADS=1 python -m benchmarks.nested truth [--cases all]
    OMP_NUM_THREADS=1 python -m benchmarks.nested sbc [--fits 500]

`samplers`: cases of the fleet, all by the same half-normal hyperprior, one process and one thread
after the other. Effective draws are the smallest bulk ESS (ArviZ) over θ0, log scales and φ; of
weighted draws 1/Σw². Seconds are those of the processor, since a shared machine's clock says
little, with everything that a first call costs. NumPyro and statsmodels are left out where they
are not installed. `size`: a random intercept and a shared noise, 5 rows a group. `truth`: every
case of the fleet beside its long NUTS (four chains of 1,000 draws or more, R-hat below 1.01):
distances of means in NUTS sds, and ratios of sds. `sbc`: simulation-based calibration (Talts et
al., 2018): of data drawn from the prior, the ranks of the truth among the draws, which are uniform
where the posterior is right; χ² of ten bins, and its p-value, for each quantity.
"""

from __future__ import annotations

import argparse
import json
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
from scipy.stats import chisquare
from torch import Tensor

import varmeta as vm
from benchmarks.fleet.cases import CASES, FOLDER, LINEAR, Case

REFERENCES = FOLDER.parent / "references"
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

    jax.config.update("jax_enable_x64", True)
    from numpyro.infer import MCMC, NUTS

    from benchmarks.fleet import numpyro_hierarchy as other

    target = other.target(case)
    tasks, dim = len(target.x), len(target.loc)
    # A flat expansion is the form that is not centred.
    flat = other.Expansion(jax.numpy.zeros((tasks, dim)), jax.numpy.zeros((tasks, dim, dim)))
    how = {"num_warmup": 1000, "num_samples": 1000, "num_chains": 2, "progress_bar": False}
    begun = time.process_time()
    mcmc = MCMC(NUTS(target.model), chain_method="sequential", **how)
    mcmc.run(jax.random.PRNGKey(0), flat)
    found = mcmc.get_samples(group_by_chain=True)
    inside = {n: np.asarray(v) for n, v in found.items() if n not in ("w", "theta", "shared")}
    seconds = time.process_time() - begun
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


def truth(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    for name in names:
        path = REFERENCES / f"{name}.json"
        if not path.exists():
            continue
        problem = CASES[name].problem()
        begun = time.process_time()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", RuntimeWarning)
            result = vm.fit(NESTED, problem.density, problem.train.support, progress=False)
            posterior = result.posterior()
        seconds = time.process_time() - begun
        wanted, kept = json.loads(path.read_text())["nuts"], result.state.tensors
        row = [name, str(len(posterior.names)), f"{seconds:.1f}", f"{float(kept['psi_k']):.2f}"]
        for part in ("loc", "log_scale", "shared"):
            if not wanted[part]:
                row += ["–", "–"]
                continue
            mean, sd = (np.array(wanted[part][key]) for key in ("mean", "sd"))
            shift = np.abs(kept[part].mean(0).numpy() - mean) / sd
            ratio = kept[part].std(0).numpy() / sd
            row += [f"{shift.max():.2f}", f"{ratio.min():.2f}–{ratio.max():.2f}"]
        mean, sd = (np.array(wanted[key]) for key in ("theta_mean", "theta_sd"))
        shift = np.abs(posterior.mean.numpy() - mean) / sd
        ratio = posterior.sd.numpy() / sd
        row += [f"{np.median(shift):.2f}, {np.quantile(shift, 0.95):.2f}"]
        low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
        row += [f"{middle:.2f} ({low:.2f}–{high:.2f})", "; ".join(_short(w) for w in said)]
        yield tuple(row)


def _short(warning: warnings.WarningMessage) -> str:
    text = str(warning.message).removeprefix("NestedLaplace: ").removeprefix("NestedLaplace ")
    return text if len(text) < 120 else f"{text[:117]}…"


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


def toss(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Four Bernoulli rows a task, an effect of x that all tasks share."""
    level = pyro.sample("level", dist.Normal(0.0, 1.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Bernoulli(logits=level + slope * x[..., 0]), obs=y)


def sbc(fits: int) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    count, rows, kept = 20, 4, 99
    ranks: dict[str, list[int]] = {"θ0": [], "log σ": [], "φ": [], "θ of the first task": []}
    x = torch.linspace(-1, 1, rows, dtype=torch.float64)[:, None]
    density, unsure = None, 0
    for seed in range(fits):
        source = torch.Generator().manual_seed(seed)
        drawn = torch.randn(3 + count, generator=source, dtype=torch.float64)
        loc, scale, slope = 1.5 * drawn[0], 1.5 * drawn[1].abs(), drawn[2]
        theta = loc + scale * drawn[3:]
        chance = (theta[:, None] + slope * x[:, 0]).sigmoid()
        y = torch.bernoulli(chance, generator=source)
        tasks = vm.Tasks.from_list([(x, row) for row in y])
        density = density or vm.Density(toss, tasks, shared=["slope"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = vm.fit(vm.NestedLaplace(draws=400), density, tasks, progress=False, seed=seed)
        unsure += not result.converged
        found, posterior = result.state.tensors, result.posterior()
        some = torch.linspace(0, 399, kept).round().long()
        theirs = posterior.draws[some, 0, 0]  # type: ignore[attr-defined]
        truth = (loc, scale.log(), slope, theta[0])
        draws = (
            found["loc"][some, 0],
            found["log_scale"][some, 0],
            found["shared"][some, 0],
            theirs,
        )
        for name, true, value in zip(ranks, truth, draws, strict=True):
            ranks[name].append(int((value < true).sum()))
    for name, each in ranks.items():
        bins = np.bincount(np.array(each) * 10 // (kept + 1), minlength=10)
        found = chisquare(bins)
        numbers = " ".join(map(str, bins))
        yield name, numbers, f"{found.statistic:.1f}", f"{found.pvalue:.3f}", f"{unsure} of {fits}"


def main() -> None:
    """Print one table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["samplers", "size", "truth", "sbc"])
    parser.add_argument("--cases", default="radon,mathachieve")
    parser.add_argument("--tasks", default="100,1000,10000,100000")
    parser.add_argument("--fits", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "samplers":
        heads = ("case", "by", "seconds", "effective draws", "a second")
        rows = samplers(options.cases.split(","))
    elif options.what == "sbc":
        heads = ("of", "ranks in ten bins", "χ²", "p", "not converged")
        rows = sbc(options.fits)
    elif options.what == "truth":
        heads = ("case", "tasks", "seconds", "k̂", "θ0 shift", "sd", "log σ shift", "sd", "φ shift",
                 "sd", "θ shift: median, 95%", "θ sd: median (90%)", "said")  # fmt: skip
        cases = list(CASES) if options.cases == "all" else options.cases.split(",")
        rows = truth(cases)
    else:
        heads = ("groups", "seconds to ψ", "and tasks", "GiB", "scale (truth 0.5)")
        rows = size([int(n) for n in options.tasks.split(",")])
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
