"""Which coefficients vary by group, on radon and sleepstudy, beside what NUTS says of their scales.

`SigmaIMAML` learns the scale of each coefficient from the loss on rows that were not adapted to.
Here are its scales next to the posterior of NUTS, and the reason why they differ: both models are
linear and Gaussian given scales and noise, so that the validation loss, the same with predictive
densities in place of points, and the marginal likelihood are closed forms, which are minimised to
convergence: over everything (with other folds, and on data drawn from the model with known
scales), and over everything but one scale (the profile). A full run, read: docs/shrinkage.md.

    python examples/which_coefficients.py --problem sleepstudy
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

import varmeta as vm
from varmeta import problems
from varmeta.models.hyperprior import ScaleLaw
from varmeta.seeds import generator

Criterion = Literal["validation, point", "validation, predictive", "marginal likelihood"]
CRITERIA: tuple[Criterion, ...] = (
    "validation, point",
    "validation, predictive",
    "marginal likelihood",
)
SHARED = {"radon": 1, "sleepstudy": 0}  # inputs whose coefficient all groups have in common
UNITS = {"radon": 1.0, "sleepstudy": 50.0}  # in which LBFGS sees targets
GRIDS = {"radon": np.geomspace(0.01, 2, 16), "sleepstudy": np.geomspace(0.5, 40, 16)}


# -- NUTS and the strategies -----------------------------------------------------------------------


def reference(fit: vm.Fit, names: list[str]) -> tuple[pd.DataFrame, pd.Series]:
    """NUTS: a row per coefficient with its scale's posterior, and the means of all the rest."""
    kept, strategy = fit.state.tensors, fit.strategy
    assert isinstance(strategy, vm.PyroNUTS)
    scale = kept["log_scale"].exp()
    chains = scale.numpy().reshape(strategy.chains, -1, len(names))
    rhat, ess = az.rhat({"s": chains})["s"].values, az.ess({"s": chains})["s"].values
    rows = [
        {
            "coefficient": name,
            "mean": float(scale[:, k].mean()),
            "5%": float(scale[:, k].quantile(0.05)),
            "median": float(scale[:, k].median()),
            "95%": float(scale[:, k].quantile(0.95)),
            "R-hat": float(rhat[k]),
            "ESS": float(ess[k]),
        }
        for k, name in enumerate(names)
    ]
    means = {f"θ0 {n}": float(kept["loc"][:, k].mean()) for k, n in enumerate(names)}
    shared = fit.density.constrain_shared(kept["shared"])
    means |= {name: float(v.mean()) for name, v in shared.items()}
    return pd.DataFrame(rows), pd.Series(means)


def learned(
    density: vm.Density, tasks: vm.Tasks, names: list[str], lengths: list[int], seed: int
) -> pd.DataFrame:
    """The scales of every strategy, by number of steps, folds, law and bounds."""
    short, long = lengths[0], lengths[-1]
    least = 0.1 * UNITS["radon" if "floor" in names else "sleepstudy"]
    arms: list[tuple[str, vm.Strategy, dict[str, Any]]] = [
        *((f"SigmaIMAML, {n} steps", vm.SigmaIMAML(steps=n), {}) for n in lengths),
        (f"half-cauchy, {long} steps", vm.SigmaIMAML(steps=long), {"scale_law": "half-cauchy"}),
        (
            f"bounds from {least:g}, {long} steps",
            vm.SigmaIMAML(steps=long),
            {"bounds": (least, 1e4)},
        ),
        (f"SigmaReptile, {short} steps", vm.SigmaReptile(steps=short), {}),
        (f"JointVariational (full), {5 * short} steps", joint(5 * short), {}),
        (f"LaplaceEvidence, {short} steps", vm.LaplaceEvidence(steps=short), {}),
    ]
    rows = []
    for label, strategy, options in arms:
        prior = vm.GaussianPrior.from_density(density, scales="site", **options)
        fit = vm.fit(strategy, density, tasks, prior=prior, seed=seed)
        shrinkage = fit.shrinkage().table.set_index("module")
        row: dict[str, Any] = {"strategy": label}
        for name in names:
            row |= {name: shrinkage.loc[name, "scale"], f"cost {name}": shrinkage.loc[name, "cost"]}
        rows.append(row | {"seconds": fit.seconds})
        typer.echo("  ".join(f"{k} {v}" for k, v in rows[-1].items()), err=True)
    return pd.DataFrame(rows)


def joint(steps: int) -> vm.JointVariational:
    """The joint fit with full covariances: close to NUTS on these (docs/against-nuts.md)."""
    return vm.JointVariational(q="full", steps=steps)


# -- the closed forms ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Linear:
    """y = Zθ_i + Uφ + noise, θ_i ~ N(θ0, diag σ²): rows of T tasks, and which of them are query.

    Attributes:
        z: `[T, N, D]`.
        u: `[T, N, P]`.
        y: `[T, N]`, over `unit`.
        support: `[T, N]`, 1 for rows that are adapted to.
        query: `[T, N]`, 1 for rows that are scored.
        owner: `[T]`, the group that a (group, fold) belongs to.
        unit: of y.
    """

    z: Tensor
    u: Tensor
    y: Tensor
    support: Tensor
    query: Tensor
    owner: np.ndarray
    unit: float

    @classmethod
    def of(cls, tasks: vm.Tasks, shared: int, unit: float) -> Linear:
        """The last `shared` inputs have one coefficient for all tasks."""
        x, keep = tasks.inputs.double(), x_count(tasks) - shared
        z = torch.cat([torch.ones_like(x[..., :1]), x[..., :keep]], -1)
        owner = np.array([name.rpartition(" [")[0] or name for name in tasks.names])
        parts = (tasks.mask & ~tasks.is_query, tasks.mask & tasks.is_query)
        y = tasks.targets.double() / unit
        return cls(z, x[..., keep:], y, parts[0].double(), parts[1].double(), owner, unit)

    @property
    def sizes(self) -> tuple[int, int]:
        """D and P."""
        return self.z.shape[-1], self.u.shape[-1]

    def start(self) -> Tensor:
        """θ0, log σ, φ, log noise: from a regression of all rows."""
        d, p = self.sizes
        rows = (self.support + self.query) > 0
        design = torch.cat([self.z, self.u], -1)[rows]
        fit = torch.linalg.lstsq(design, self.y[rows]).solution
        noise = (self.y[rows] - design @ fit).std().log()
        spread = noise.expand(d) - self.z[rows].square().mean(0).sqrt().log() - 0.7
        return torch.cat([fit[:d], spread, fit[d : d + p], noise[None]])

    def losses(self, at: Tensor, criterion: Criterion) -> Tensor:
        """`[T]` nats: of each task's query rows, or of all its rows for the marginal likelihood."""
        d, p = self.sizes
        loc, log_scale, phi, log_noise = at.split([d, d, p, 1])
        variance, precision = (2 * log_noise).exp(), (-2 * log_scale).exp()
        residual = self.y - self.u @ phi - self.z @ loc
        given = self.support + self.query if criterion == "marginal likelihood" else self.support
        weighted = self.z * given[..., None] / variance
        inverse = weighted.mT @ self.z + precision.diag()
        pull = (weighted.mT @ residual[..., None])[..., 0]
        moved = torch.linalg.solve(inverse, pull)
        if criterion == "marginal likelihood":
            square = (given * residual**2).sum(-1) / variance - (pull * moved).sum(-1)
            volume = torch.linalg.slogdet(inverse).logabsdet + 2 * log_scale.sum()
            count = given.sum(-1)
            return 0.5 * (square + volume + count * (2 * log_noise + np.log(2 * np.pi)))
        error = residual - (self.z @ moved[..., None])[..., 0]
        spread = variance.expand_as(error)
        if criterion == "validation, predictive":
            spread = spread + (self.z * torch.linalg.solve(inverse, self.z.mT).mT).sum(-1)
        each = 0.5 * (error**2 / spread + spread.log() + np.log(2 * np.pi))
        return (self.query * each).sum(-1)

    def minimum(
        self,
        criterion: Criterion,
        held: tuple[int, float] | None = None,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where the sum over tasks is least, and the losses there; `held` is a scale that stays."""
        d = self.sizes[0]
        at = (self.start() if start is None else start).clone()
        fixed = torch.zeros_like(at, dtype=torch.bool)
        if held is not None:
            k, value = held
            at[d + k], fixed[d + k] = float(np.log(value / self.unit)), True
        free = at[~fixed].clone().requires_grad_()

        def whole() -> Tensor:
            return at.masked_scatter(~fixed, free)

        optimiser = torch.optim.LBFGS(
            [free], max_iter=400, tolerance_grad=1e-8, tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimiser.zero_grad()
            total = self.losses(whole(), criterion).sum()
            total.backward()
            return total

        optimiser.step(closure)
        done = whole().detach()
        return done, self.losses(done, criterion).detach()

    def scales(self, at: Tensor) -> np.ndarray:
        """σ in the units of the data."""
        d = self.sizes[0]
        return (at[d : 2 * d].exp() * self.unit).numpy()


def x_count(tasks: vm.Tasks) -> int:
    """Number of inputs."""
    return tasks.inputs.shape[-1]


def optima(name: str, tasks: vm.Tasks, names: list[str], seeds: int) -> pd.DataFrame:
    """σ at the minimum of each criterion: by folds, seed of the folds, and all folds together."""
    rows = []
    for folds in (2, 5, 10):
        for seed in range(seeds):
            linear = Linear.of(tasks.folds(folds, seed=seed), SHARED[name], UNITS[name])
            for criterion in CRITERIA[:2]:
                scales = linear.scales(linear.minimum(criterion)[0])
                row = {"criterion": criterion, "folds": folds, "seed": seed}
                rows.append(row | dict(zip(names, scales, strict=True)))
    linear = Linear.of(tasks.unsplit, SHARED[name], UNITS[name])
    scales = linear.scales(linear.minimum("marginal likelihood")[0])
    rows.append({"criterion": "marginal likelihood"} | dict(zip(names, scales, strict=True)))
    return pd.DataFrame(rows)


def profile(name: str, tasks: vm.Tasks, names: list[str], which: int, seeds: int) -> pd.DataFrame:
    """The least loss for each value of one scale, above the least of all, per group.

    `above` is the sum over groups and `se` the standard error of that sum, of the groups' own
    differences; the validation losses are means over `seeds` ways to make 5 folds.
    """
    rows = []
    for criterion in CRITERIA:
        marginal = criterion == "marginal likelihood"
        splits = [tasks.unsplit] if marginal else [tasks.folds(5, seed=k) for k in range(seeds)]
        curves = []
        for split in splits:
            linear, at, losses = Linear.of(split, SHARED[name], UNITS[name]), None, []
            for value in GRIDS[name][::-1]:
                at, each = linear.minimum(criterion, (which, float(value)), at)
                losses.append(pd.Series(each.numpy()).groupby(linear.owner).sum())
            curves.append(np.stack(losses[::-1]))  # [values, groups]
        mean = np.mean(curves, axis=0)
        least = mean[mean.sum(1).argmin()]
        for value, each in zip(GRIDS[name], mean, strict=True):
            gap = each - least
            row = {"criterion": criterion, "coefficient": names[which], "scale": value}
            error = gap.std(ddof=1) * len(gap) ** 0.5
            rows.append(row | {"above": gap.sum(), "se": error})
    return pd.DataFrame(rows)


def influence(
    name: str, tasks: vm.Tasks, names: list[str], which: int, value: float, seeds: int
) -> pd.DataFrame:
    """Which groups the validation loss's minimum hangs on.

    `against` is a group's share of the profile's difference between the scale `value` and a small
    one, nats; the exact minimum without that group and those above it in the table follows, next
    to the marginal likelihood's. The groups are chosen for what they do: it is no test.
    """
    size, unit, small = SHARED[name], UNITS[name], float(GRIDS[name][0])
    shares = []
    for seed in range(seeds):
        linear = Linear.of(tasks.folds(5, seed=seed), size, unit)
        at, low = linear.minimum("validation, point", (which, small))
        _, high = linear.minimum("validation, point", (which, value), at)
        shares.append(pd.Series((high - low).numpy()).groupby(linear.owner).sum())
    against = pd.concat(shares, axis=1).mean(axis=1).sort_values(ascending=False)
    rows = []
    for count in range(4):
        gone = list(against.index[:count])
        rest = tasks.select([k for k, label in enumerate(tasks.names) if label not in gone])
        splits = [Linear.of(rest.folds(5, seed=k), size, unit) for k in range(seeds)]
        found = [s.scales(s.minimum("validation, point")[0])[which] for s in splits]
        whole = Linear.of(rest.unsplit, size, unit)
        row = {"without": gone[-1] if gone else "-", "against": float(against.iloc[count - 1])}
        row |= {"median": np.median(found), "least": min(found), "most": max(found)}
        row["marginal"] = whole.scales(whole.minimum("marginal likelihood")[0])[which]
        rows.append(row)
    rows[0]["against"] = float(against.sum())
    return pd.DataFrame(rows)


def replicates(
    name: str, tasks: vm.Tasks, names: list[str], truth: pd.Series, scales: np.ndarray, count: int
) -> pd.DataFrame:
    """σ at each criterion's minimum on data drawn at the same inputs from known scales."""
    rows = []
    shared = [float(truth["uranium"])] if SHARED[name] else []
    loc = torch.tensor([truth[f"θ0 {n}"] for n in names], dtype=torch.float64)
    for k in range(count):
        noise = generator(1, k)
        design = Linear.of(tasks.unsplit, SHARED[name], 1.0)
        draw: dict[str, Any] = {"generator": noise, "dtype": torch.float64}
        theta = loc + torch.tensor(scales) * torch.randn(len(tasks), len(names), **draw)
        mean = (design.z @ theta[..., None])[..., 0]
        if shared:
            mean = mean + design.u @ torch.tensor(shared, dtype=torch.float64)
        y = mean + float(truth["noise"]) * torch.randn(mean.shape, **draw)
        drawn = replace(tasks.unsplit, targets=y.to(tasks.targets))
        for criterion in CRITERIA:
            split = drawn if criterion == "marginal likelihood" else drawn.folds(5, seed=k)
            linear = Linear.of(split, SHARED[name], UNITS[name])
            found = linear.scales(linear.minimum(criterion)[0])
            rows.append({"criterion": criterion} | dict(zip(names, found, strict=True)))
    return pd.DataFrame(rows)


def spread(found: pd.DataFrame, by: list[str], names: list[str]) -> pd.DataFrame:
    """Median and quartiles of the scales, and how often one is below a hundredth of the median."""
    rows = []
    for key, part in found.groupby(by, sort=False, dropna=False):
        row = dict(zip(by, key, strict=True)) | {"runs": len(part)}
        for name in names:
            row |= {f"{name} {100 * q:.0f}%": part[name].quantile(q) for q in (0.1, 0.5, 0.9)}
            row[f"{name} → 0"] = int((part[name] < 0.02 * found[name].median()).sum())
        rows.append(row)
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame, table: pd.DataFrame, title: str, path: Path) -> None:
    """The profiles of each coefficient, with NUTS's 90% interval behind them."""
    names = list(table["coefficient"])
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, (_, row) in zip(axes[0], table.iterrows(), strict=True):
        axis.axvspan(row["5%"], row["95%"], color="0.9", label="NUTS, 90%")
        axis.axvline(row["mean"], color="0.6", lw=1, label="NUTS, mean")
        for k, criterion in enumerate(CRITERIA):
            part = found[
                (found["criterion"] == criterion) & (found["coefficient"] == row["coefficient"])
            ]
            axis.plot(part["scale"], part["above"], color=f"C{k}", label=criterion, lw=1.4)
            ends = part["above"] - part["se"], part["above"] + part["se"]
            axis.fill_between(part["scale"], *ends, color=f"C{k}", alpha=0.12, lw=0)
        axis.set(xscale="log", ylim=(-1, 12), xlabel=f"scale of {row['coefficient']}")
        axis.set_title(f"{title}: {row['coefficient']}", fontsize=9)
    axes[0, 0].set_ylabel("nats above the minimum, all groups")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=84)
    plt.close(figure)


def show(title: str, table: pd.DataFrame) -> None:
    """Print."""
    typer.echo(f"\n{title}\n" + table.to_string(index=False, float_format="{:.3g}".format))


def main(
    problem: Annotated[list[str] | None, typer.Option(help="radon, sleepstudy; both.")] = None,
    draws: Annotated[int, typer.Option(help="NUTS draws per chain, after a third as many.")] = 500,
    chains: Annotated[int, typer.Option(help="NUTS chains.")] = 4,
    steps: Annotated[str, typer.Option(help="Lengths of SigmaIMAML's runs.")] = "200,600",
    seeds: Annotated[int, typer.Option(help="Ways to make the folds.")] = 5,
    drawn: Annotated[int, typer.Option(help="Data sets drawn from known scales.")] = 20,
    law: Annotated[str, typer.Option(help="Law of the scales for NUTS.")] = "half-normal",
    part: Annotated[str, typer.Option(help="Of nuts, learned, exact: which to run.")] = "all",
    seed: Annotated[int, typer.Option(help="Of NUTS and the strategies.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures.")] = Path(
        "runs/which_coefficients"
    ),
) -> None:
    """Print and write the tables of each problem, and draw the profiles."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for name in problem or SHARED:
        made = problems.PROBLEMS[name](0)
        density, tasks = made.density, made.train.unsplit
        names = [site.name for site in density.sites]
        kind: ScaleLaw = law  # type: ignore[assignment]
        prior = vm.GaussianPrior.from_density(density, scale_law=kind)
        warmup = max(draws // 3, 20)
        nuts = vm.PyroNUTS(draws=draws, warmup=warmup, chains=chains, target_accept=0.9)
        kept = out / f"{name}-{law}-{draws}.pt"
        sampled = vm.fit(nuts, density, tasks, prior=prior, seed=seed, checkpoint=kept)
        truth, means = reference(sampled, names)
        tables = {f"NUTS ({chains} x {draws} draws, {sampled.seconds:.0f} s)": truth}
        if part in ("all", "learned"):
            lengths = [int(n) for n in steps.split(",")]
            tables["learned scales"] = learned(density, tasks, names, lengths, seed)
        if part in ("all", "exact"):
            found = pd.concat([profile(name, tasks, names, k, seeds) for k in range(len(names))])
            draw(found, truth, name, out / f"which-coefficients-{name}.png")
            at_folds = optima(name, tasks, names, seeds)
            tables["exact minima, by folds"] = spread(at_folds, ["criterion", "folds"], names)
            scales = truth["median"].to_numpy()
            for k, coefficient in enumerate(names):
                hang = influence(name, tasks, names, k, float(scales[k]), seeds)
                tables[f"{coefficient} without the groups most against it"] = hang
            again = replicates(name, tasks, names, means, scales, drawn)
            title = "exact minima on data drawn with scales " + ", ".join(
                f"{s:.3g}" for s in scales
            )
            tables[title] = spread(again, ["criterion"], names)
            tables["profile"] = found
        for title, table in tables.items():
            short = title.split(" (")[0].split(" drawn")[0].replace(", ", " ").replace(" ", "-")
            table.to_csv(out / f"{name}-{short}.csv", index=False, float_format="%.4g")
            show(f"{name}: {title}", table)


if __name__ == "__main__":
    typer.run(main)
