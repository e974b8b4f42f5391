"""Which layers of a small convolutional network adapt to a task? An experiment on images.

A prior scale per layer, learned by `SigmaMAML` from query losses, says it for two kinds of tasks.
*characters*: five classes never seen together, in any order, so that something must learn what the
labels mean. *ink*: always the same five classes, each image with another character over it, and
the task says in which ink the one that counts is drawn, so that only what reads the pixels has to
change.
Then the same network is trained anew with only some of its layers adapting (the others shared), at
the same budget: those that the table names, the last alone (ANIL), all but the last, the first
alone, none, and all with one scale. Accuracy is that of query images in new tasks.

    python examples/which_layers.py --omniglot FOLDER

FOLDER holds images_background_small1.zip and images_background_small2.zip, the official minimal
splits of Omniglot (Lake, Salakhutdinov & Tenenbaum, 2015): new characters are those of alphabets in
the second that the first lacks, new drawers are others than in training. Without it: the digits of
scikit-learn, `pip install scikit-learn`. A full run, read: docs/shrinkage.md.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
import typer
from images.few_shot import KINDS, WAYS, Images, digits, omniglot
from scipy.stats import t as student
from torch import Tensor, nn

import varmeta as vm
from varmeta.inference.minimise import ProximalDescent
from varmeta.models import network
from varmeta.report_modules import plot_scales, plot_shrinkage
from varmeta.seeds import generator

TASKS = 8  # of a meta-step
LAYERS = ("conv1", "conv2", "conv3", "head")
SCALE = 0.5  # of the prior over every weight, where learning starts
RATE = 0.03
# Of a descent. With 0.03 that of *ink* diverges in some arms and seeds.
STEP = {"characters": 0.03, "ink": 0.01}
NAMED = "only what is named"
COLUMNS = ("kind", "seed", "adapt", "accuracy", "nats", "seconds", "gradients")


# -- the network -----------------------------------------------------------------------------------


class Patches(nn.Module):
    """A convolution whose stride is its kernel's size: `[N, H, W, C]` to `[N, H/k, W/k, out]`."""

    def __init__(self, size: int, channels: int, out: int) -> None:
        super().__init__()
        inputs = size * size * channels
        self.size = size
        self.weight = nn.Parameter(torch.randn(inputs, out) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        k = self.size
        patches = x.reshape(n, h // k, k, w // k, k, c).transpose(2, 3)
        return patches.reshape(n, h // k, w // k, k * k * c) @ self.weight + self.bias


class ChannelsLast(nn.Module):
    """`[N, C, H, W]` to `[N, H, W, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class Temperature(nn.Module):
    """All logits times one number, which changes no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def net(channels: int, width: int, seed: int, *, temperature: bool) -> nn.Sequential:
    """Three convolutions and a linear layer; with a temperature, where no layer is to adapt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: list[tuple[str, nn.Module]] = [
            ("input", ChannelsLast()),
            ("conv1", Patches(4, channels, width)),
            ("tanh1", nn.Tanh()),
            ("conv2", Patches(2, width, 2 * width)),
            ("tanh2", nn.Tanh()),
            ("conv3", Patches(2, 2 * width, 2 * width)),
            ("tanh3", nn.Tanh()),
            ("flat", nn.Flatten()),
            ("head", nn.Linear(2 * width, WAYS)),
        ]
        last = [("temperature", Temperature())] if temperature else []
        return nn.Sequential(OrderedDict(parts + last))


@dataclass(frozen=True)
class Arm:
    """Which layers adapt, and the partition of their scales; None for scales that stay."""

    adapt: tuple[str, ...]
    scales: Any = "layer"


PER_LAYER = "a scale per layer"
SINGLE = ("one scale, learned",)
ARMS = {
    PER_LAYER: Arm(LAYERS),
    "one scale, learned": Arm(LAYERS, "all"),
    "only the last": Arm(LAYERS[-1:]),
    "all but the last": Arm(LAYERS[:-1]),
    "only the first": Arm(LAYERS[:1]),
    "none": Arm(()),
}


def strategy(kind: str, steps: int, rate: float, learn_scale: bool) -> vm.SigmaMAML:
    """A few steps from θ0, unrolled: the same budget for every arm."""
    return vm.SigmaMAML(
        steps=steps,
        learning_rate=rate,
        learn_scale=learn_scale,
        minimiser=ProximalDescent(
            STEP[kind], 6, tolerance=0, momentum=0.8, reduction="sum", clip=None
        ),
        adjoint=vm.Unrolled(),
        posterior_kind="delta",
    )


def train(
    kind: str, data: Images, arm: Arm, width: int, steps: int, rate: float, seed: int
) -> vm.Fit:
    """Meta-train one arm on a stream of fresh tasks."""
    source = vm.TaskSource(KINDS[kind](data, TASKS, False), seed=seed)
    channels = source.batch(0).inputs.shape[2]
    sites = [f"{layer}.{p}" for layer in LAYERS for p in ("weight", "bias")]
    shared = [s for s in sites if s.split(".")[0] not in arm.adapt]
    built = net(channels, width, seed, temperature=not arm.adapt)
    model = network(built, lambda out: dist.Categorical(logits=out), prior_scale=SCALE)
    density = vm.Density(model, source, shared=shared)
    prior = vm.GaussianPrior.from_density(density, scales=arm.scales or "layer")
    how = strategy(kind, steps, rate, arm.scales is not None and bool(arm.adapt))
    with short_budget():
        return vm.fit(how, density, source, prior=prior, seed=seed)


@contextmanager
def short_budget() -> Iterator[None]:
    """Six steps are not to converge, and fit need not say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SigmaMAML", category=RuntimeWarning)
        yield


# -- the experiment --------------------------------------------------------------------------------


def score(fit: vm.Fit, tasks: vm.Tasks, adapted: bool = True) -> tuple[float, float]:
    """Accuracy, and nats per image, of the query images; adapted, or at θ0."""
    query = tasks.query
    with short_budget():
        theta = fit.adapt(tasks.support).mean
    theta = theta if adapted else fit.prior.loc.expand_as(theta)
    logits = torch.stack(
        [
            fit.density.log_likelihood(
                theta, replace(query, targets=torch.full_like(query.targets, k)), fit.shared
            )
            for k in range(WAYS)
        ],
        -1,
    )
    right = logits.argmax(-1) == query.targets
    nats = -logits.gather(-1, query.targets[..., None])
    return float(right.float().mean()), float(nats.mean())


def study(
    data: Images,
    kinds: list[str],
    seeds: int,
    steps: int,
    width: int,
    least: float,
    tasks: int,
    out: Path,
) -> pd.DataFrame:
    """Every arm of every kind and seed, going on where `out` ends; a row each."""
    path = out / "results.csv"
    rows: list[dict[str, Any]] = pd.read_csv(path).to_dict("records") if path.exists() else []
    for seed in range(seeds):
        for kind in kinds:
            done = {r["arm"] for r in rows if (r["kind"], r["seed"]) == (kind, seed)}
            if NAMED in done:
                continue
            rows = [r for r in rows if (r["kind"], r["seed"]) != (kind, seed)]
            rows += one(data, kind, seed, steps, width, least, tasks, out)
            pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")
    return pd.DataFrame(rows)


def one(
    data: Images, kind: str, seed: int, steps: int, width: int, least: float, tasks: int, out: Path
) -> list[dict[str, Any]]:
    """All arms on one seed; those that the first one's table names at last."""
    new = KINDS[kind](data, tasks, True)(generator(1000, seed))
    seen = KINDS[kind](data, tasks, False)(generator(1001, seed))  # costs are of its query images
    rows: list[dict[str, Any]] = []
    named: tuple[str, ...] = ()

    def learn(name: str, arm: Arm) -> vm.Fit:
        fit = train(kind, data, arm, width, steps, RATE, seed)
        accuracy, nats = score(fit, new)
        row = {"kind": kind, "seed": seed, "arm": name, "adapt": "+".join(arm.adapt) or "-"}
        row |= {"accuracy": accuracy, "nats": nats, "seconds": fit.seconds}
        rows.append(row | {"gradients": fit.gradients / steps / TASKS})
        typer.echo(f"{kind} {seed} {name}: {accuracy:.3f}, {fit.seconds:.0f} s", err=True)
        return fit

    for name, arm in ARMS.items():
        fit = learn(name, arm)
        if name != PER_LAYER:
            continue
        accuracy, nats = score(fit, new, adapted=False)
        rows.append(rows[-1] | {"arm": "the same, at θ0", "accuracy": accuracy, "nats": nats})
        with short_budget():
            found = fit.shrinkage(seen, least=least)
        table = found.table.set_index("module")
        for layer in LAYERS:
            rows[0] |= {f"{c} {layer}": table.loc[layer, c] for c in ("scale", "movement", "cost")}
        named = tuple(k for k in LAYERS if table.loc[k, "verdict"] == "adapted")
        if seed == 0:
            typer.echo(f"\n{kind}\n{found}")
            scales = plot_scales(found)
            assert scales is not None
            scales.savefig(out / f"which-layers-{kind}-scales.png", dpi=84)
            plot_shrinkage(found).savefig(out / f"which-layers-{kind}-shrinkage.png", dpi=84)
            assert found.scales_path is not None
            paths = pd.DataFrame(found.scales_path.numpy(), columns=list(LAYERS))
            paths.to_csv(out / f"which-layers-{kind}-scales.csv", float_format="%.4g")
    same = [r for r in rows if r["adapt"] == ("+".join(named) or "-") and r["arm"] not in SINGLE]
    if same:  # it is one of the others
        rows.append({k: v for k, v in same[0].items() if k in COLUMNS} | {"arm": NAMED})
    else:
        learn(NAMED, Arm(named))
    return rows


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Per kind and arm: mean over seeds, half a 95% interval, and the paired one to the first."""
    rows = []
    for (kind, arm), part in found.groupby(["kind", "arm"], sort=False):
        first = found[(found["kind"] == kind) & (found["arm"] == PER_LAYER)]
        pairs = part.set_index("seed")["accuracy"] - first.set_index("seed")["accuracy"]
        row = {"kind": kind, "arm": arm, "adapt": ", ".join(sorted(set(part["adapt"])))}
        row["accuracy"], row["±"] = interval(part["accuracy"])
        row["to first"], row["± "] = interval(pairs)
        row["nats"], _ = interval(part["nats"])
        row |= {c: part[c].mean() for c in ("gradients", "seconds")}
        rows.append(row)
    return pd.DataFrame(rows)


def layers(found: pd.DataFrame) -> pd.DataFrame:
    """Per kind and layer: scale, movement and cost of the first arm, mean and range over seeds."""
    rows = []
    for kind, part in found[found["arm"] == PER_LAYER].groupby("kind", sort=False):
        for layer in LAYERS:
            row = {"kind": kind, "layer": layer}
            for column in ("scale", "movement", "cost"):
                values = part[f"{column} {layer}"]
                row[column] = values.mean()
                row[f"{column} range"] = f"{values.min():.2f} to {values.max():.2f}"
            rows.append(row)
    return pd.DataFrame(rows)


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t)."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(values.sem() * student.ppf(0.975, len(values) - 1))


def draw(table: pd.DataFrame, path: Path) -> None:
    """Accuracy of every arm, a panel per kind."""
    kinds = list(table["kind"].unique())
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.6 * len(kinds), 3.4), sharey=True, squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        part = table[table["kind"] == kind]
        at = np.arange(len(part))[::-1]
        axis.errorbar(part["accuracy"], at, xerr=part["±"].fillna(0), fmt="o", ms=5, capsize=3)
        axis.axvline(1 / WAYS, color="0.7", lw=1, ls="--")
        axis.set(title=kind, xlabel="accuracy on query images of new tasks", xlim=(0, 1))
        axis.set_yticks(at, part["arm"])
    figure.tight_layout()
    figure.savefig(path, dpi=84)
    plt.close(figure)


def main(
    omniglot_folder: Annotated[
        Path | None, typer.Option("--omniglot", help="Folder of the two minimal splits.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(KINDS),
    seeds: Annotated[int, typer.Option(help="Of start, tasks and new tasks together.")] = 5,
    steps: Annotated[int, typer.Option(help="Meta-steps of every arm.")] = 60,
    width: Annotated[int, typer.Option(help="Channels of the first layer.")] = 16,
    least: Annotated[float, typer.Option(help="Nats per task from which a layer is named.")] = 2.0,
    new: Annotated[int, typer.Option(help="New tasks for the accuracy.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures.")] = Path(
        "runs/which_layers"
    ),
) -> None:
    """Run the experiment, or go on with it; print the tables, write them and the pictures."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    data = omniglot(omniglot_folder) if omniglot_folder else digits()
    found = study(data, kinds.split(","), seeds, steps, width, least, new, out)
    table = summary(found)
    for each, name in ((layers(found), "layers"), (table, "table")):
        each.to_csv(out / f"{name}.csv", index=False, float_format="%.4g")
        typer.echo("\n" + each.to_string(index=False, float_format="{:.3f}".format))
    draw(table, out / "which-layers.png")


if __name__ == "__main__":
    typer.run(main)
