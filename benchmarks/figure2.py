"""Figure 2 of Rajeswaran, Finn, Kakade & Levine (2019): `python -m benchmarks.figure2`.

Synthetic linear regression with ill-conditioned inputs, float64. Left: relative error of the
meta-gradient against the exact one (dense, in closed form), over gradient evaluations, a
Hessian-vector product counted as two. Right: bytes that autograd holds at its peak, over inner
steps. Implicit gradients are varmeta's; the unrolled ones are plain torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import varmeta as vm

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 130, 200, 300)
CG_STEPS = (2, 5, 10)
MEMORY_STEPS = (1, 50, 100, 200, 300)
WARM_STEPS = 60  # varmeta records its program after 50 calls: that is no part of a step
PRECISION = 1.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Support and query rows x `[T, N, D]`, y `[T, N]`, unit noise, and θ0 `[D]`."""

    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor
    theta0: Tensor

    @classmethod
    def make(cls, tasks: int = 10, rows: int = 50, dim: int = 40, seed: int = 0) -> Problem:
        """Column j of the inputs has scale 1/j, so that H + λ is ill-conditioned."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(tasks, 2 * rows, dim)) / np.arange(1, dim + 1)
        theta = rng.normal(size=(tasks, dim))
        y = np.einsum("tnd,td->tn", x, theta) + rng.normal(size=(tasks, 2 * rows))
        parts = (x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:], np.zeros(dim))
        return cls(*(torch.as_tensor(np.ascontiguousarray(p)) for p in parts))

    def hessians(self) -> Tensor:
        """H_i + λ, `[T, D, D]`."""
        eye = torch.eye(len(self.theta0), dtype=torch.float64)
        return self.x.mT @ self.x + PRECISION * eye

    def spectrum(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue over tasks."""
        values = torch.linalg.eigvalsh(self.hessians())
        return float(values.min()), float(values.max())

    def exact(self) -> Tensor:
        """d/dθ0 of the mean query loss at the exact minima, `[D]`."""
        a = self.hessians()
        right = (self.x.mT @ self.y[..., None])[..., 0] + PRECISION * self.theta0
        theta = torch.linalg.solve(a, right)
        residual = (self.x_query @ theta[..., None])[..., 0] - self.y_query
        outer = (self.x_query.mT @ residual[..., None])[..., 0]
        return PRECISION * torch.linalg.solve(a, outer).mean(0)


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    """One task as a Pyro model."""
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


class Implicit:
    """varmeta's iMAML with k gradient-descent steps and a fixed number of CG steps."""

    def __init__(self, problem: Problem, cg: int) -> None:
        self.cg, self.step_size = cg, 1 / problem.spectrum()[1]
        x = torch.cat([problem.x, problem.x_query], dim=1)
        y = torch.cat([problem.y, problem.y_query], dim=1)
        is_query = (torch.arange(y.shape[1]) >= problem.y.shape[1]).expand(y.shape)
        names = tuple(map(str, range(len(y))))
        self.tasks = vm.Tasks(x, y, torch.ones_like(is_query), is_query, names)
        self.density = vm.Density(regression, self.tasks)
        start = problem.theta0.clone().requires_grad_()
        self.prior = vm.GaussianPrior.create(start, PRECISION**-0.5)

    def __call__(self, steps: int) -> tuple[Tensor, int]:
        """Meta-gradient `[D]` and gradient evaluations."""
        strategy = vm.IMAML(
            minimiser=vm.GradientDescent(
                self.step_size, max_iterations=steps, tolerance=0.0, reduction="sum", clip=None
            ),
            adjoint=vm.Implicit(vm.CG(max_iterations=self.cg, tolerance=0.0)),
            learn_scale=False,
        )
        shared = self.density.shared_init
        losses, info = strategy.losses(self.density, self.prior, shared, self.tasks)
        (gradient,) = torch.autograd.grad(losses.mean(), self.prior.loc)
        return gradient, info.gradients + 1


class Unrolled:
    """MAML with the prox term: autograd through every step."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.step_size = problem, 1 / problem.spectrum()[1]

    def __call__(self, steps: int) -> tuple[Tensor, int]:
        """Meta-gradient `[D]` and gradient evaluations."""
        p = self.problem
        theta0 = p.theta0.clone().requires_grad_()

        def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * ((x @ theta[..., None])[..., 0] - y).square().sum(-1)

        theta = theta0.expand(len(p.y), -1)
        for _ in range(steps):
            energy = loss(theta, p.x, p.y) + 0.5 * PRECISION * (theta - theta0).square().sum(-1)
            (slope,) = torch.autograd.grad(energy.sum(), theta, create_graph=True)
            theta = theta - self.step_size * slope
        total = loss(theta, p.x_query, p.y_query).mean()
        return torch.autograd.grad(total, theta0)[0], 3 * steps + 1


class Held:
    """Counts the distinct bytes that autograd's graphs hold; `peak` is the most at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.references: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> _Saved:
        """Hook for `saved_tensors_hooks`."""
        return _Saved(tensor, self)

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        """The other one."""
        return saved.tensor


class _Saved:
    def __init__(self, tensor: Tensor, held: Held) -> None:
        self.tensor, self.held = tensor, held
        self.key = tensor.untyped_storage().data_ptr()
        self.size = tensor.untyped_storage().nbytes()
        held.references[self.key] += 1
        if held.references[self.key] == 1:
            held.now += self.size
            held.peak = max(held.peak, held.now)

    def __del__(self) -> None:
        self.held.references[self.key] -= 1
        if not self.held.references[self.key]:
            self.held.now -= self.size


def method(name: str, problem: Problem) -> Implicit | Unrolled:
    """`unrolled` or `implicit CG 5`."""
    return Unrolled(problem) if name == "unrolled" else Implicit(problem, int(name.split()[-1]))


def errors(problem: Problem) -> dict[str, list[dict[str, float]]]:
    """Relative error and compute of every method for every number of steps."""
    exact = problem.exact()
    out: dict[str, list[dict[str, float]]] = {}
    for name in (*(f"implicit CG {cg}" for cg in CG_STEPS), "unrolled"):
        made = method(name, problem)
        out[name] = []
        for steps in STEPS:
            gradient, evaluations = made(steps)
            error = float((gradient - exact).norm() / exact.norm())
            out[name].append({"steps": steps, "gradients": evaluations, "error": error})
        print(f"{name}: error {out[name][-1]['error']:.1e} after {steps} steps", flush=True)
    return out


def bytes_held(name: str, problem: Problem, steps: int) -> int:
    """The most that autograd holds at once during one meta-step."""
    held = Held()
    made = method(name, problem)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        made(steps)
    return held.peak


def resident(name: str) -> None:
    """Print, for every number of steps, how far above its start the peak RSS of a step goes."""
    made = method(name, Problem.make(tasks=320))
    made(1 if name == "unrolled" else WARM_STEPS)
    grown = []
    for steps in MEMORY_STEPS:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
        before = peak_bytes()
        made(steps)
        grown.append(peak_bytes() - before)
    print(json.dumps(grown))


def peak_bytes() -> int:
    """Peak resident bytes of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(problem: Problem) -> dict[str, list[dict[str, int]]]:
    """Bytes held by autograd, and growth of the peak RSS in a process of its own."""
    out: dict[str, list[dict[str, int]]] = {}
    for name in ("implicit CG 5", "unrolled"):
        command = [sys.executable, "-m", "benchmarks.figure2", "--resident", name]
        found = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, cwd=RESULTS.parents[1]
        )
        grown = json.loads(found.stdout.splitlines()[-1])
        out[name] = [
            {"steps": steps, "held": bytes_held(name, problem, steps), "resident": size}
            for steps, size in zip(MEMORY_STEPS, grown, strict=True)
        ]
        print(f"{name}: {out[name]}", flush=True)
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """The picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for name, rows in report["errors"].items():
        style = {"color": "black", "linestyle": "--"} if name == "unrolled" else {}
        left.loglog(
            [r["gradients"] for r in rows], [r["error"] for r in rows], marker=".", label=name,
            **style,
        )  # fmt: skip
    left.set(xlabel="gradient evaluations", ylabel="relative error of the meta-gradient")
    left.legend(frameon=False)
    for name, rows in report["memory"].items():
        style = {"color": "black", "linestyle": "--"} if name == "unrolled" else {"color": "C1"}
        steps = [r["steps"] for r in rows]
        right.plot(steps, [r["held"] / 2**20 for r in rows], marker=".", label=name, **style)
    right.set(xlabel="inner steps", ylabel="MiB held by autograd (peak)", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Numbers to figure2.json, picture to figure2.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figure2", description=__doc__)
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.resident:
        resident(options.resident)
        return
    problem = Problem.make()
    low, high = problem.spectrum()
    print(f"condition number of H + λ: {high / low:.0f}")
    report = {
        "condition": high / low,
        "errors": errors(problem),
        "memory": memory(problem),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "figure2.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, RESULTS / "figure2.png")
    print(f"written: {RESULTS / 'figure2.png'} and figure2.json")


if __name__ == "__main__":
    main()
