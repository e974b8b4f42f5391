"""Meta-steps on a GPU beside the CPU: `make gpu`, or `python -m benchmarks.gpu`.

Writes `benchmarks/results/gpu-<device>.json` with the device's name. Without a CUDA device it says
so and writes nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import varmeta as vm
from varmeta.models import sinusoids
from varmeta.models.network import network
from varmeta.seeds import generator

RESULTS = Path(__file__).parent / "results"
SIZES = (25, 200, 2000)
WARM_UP, ROUNDS = 30, 30  # programs are recorded in the warm-up


def seconds(device: str, tasks: int, *, compiled: bool = False, precision: str = "full") -> float:
    """Median seconds of a meta-step: 16 inner and 5 CG steps of the 1-40-40-1 network."""
    torch.manual_seed(0)
    layers = (nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    data = sinusoids(tasks)(generator(0)).to(device=device)
    density = vm.Density(
        network(nn.Sequential(*layers), lambda out: dist.Normal(out[:, 0], 1.0)), data
    )
    density = density.compiled() if compiled else density
    strategy = vm.IMAML(
        minimiser=vm.GradientDescent(
            0.005,
            16,
            tolerance=0,
            precision=precision,  # type: ignore[arg-type]
            reduction="sum",
            clip=None,
        ),
        adjoint=vm.Implicit(vm.CG(5, tolerance=0)),
    )
    prior = vm.GaussianPrior.create(density.prior_loc.requires_grad_(), 10**-0.5)
    times = []
    for step in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        losses, _ = strategy.losses(density, prior, density.shared_init, data)
        torch.autograd.grad(losses.mean(), prior.loc)[0].sum().item()
        if step >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Time, print and write."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("No CUDA device on this machine: GPU benchmarks skipped.")
        return
    name = torch.cuda.get_device_name()
    rows = []
    for tasks in SIZES:
        row = {
            "tasks": tasks,
            "cpu": seconds("cpu", tasks),
            "gpu": seconds("cuda", tasks),
            "gpu tf32": seconds("cuda", tasks, precision="tf32"),
            "gpu bf16": seconds("cuda", tasks, precision="bf16"),
            "gpu compiled": seconds("cuda", tasks, compiled=True),
        }
        rows.append(row)
    table = Table(title=f"ms per meta-step, {name}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(v) if k == "tasks" else f"{1e3 * v:.2f}" for k, v in row.items()))
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{name.lower().replace(' ', '-')}.json"
    path.write_text(
        json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1)
    )
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
