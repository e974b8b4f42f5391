"""What `fit` costs above its meta-steps: `python -m benchmarks.fit_overhead [--compiled]`.

Three ways to take the same meta-steps: `fit`; its meta-steps alone, calls of `IMAML.step`, which
check and report; and a meta-step written by hand, `IMAML.losses` and the prior's log density, their
gradient in what is learned, and a step of Adam. What `fit` adds to the second is batches, seeds,
history and a hidden progress bar. They take turns, one step each, in one process on the same
density, so that a machine whose speed drifts slows all three alike; a ratio is the median over
steps of the ratio to the step beside it. "Once" is what `fit` does before its first step and after
its last. CPU time of one thread.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import varmeta as vm
from benchmarks.peers.varmeta_compiled import VarmetaCompiled
from benchmarks.peers.varmeta_eager import VarmetaEager
from benchmarks.workloads import make
from varmeta.inference.base import Batch, Meta

WARM = 60  # recordings of the derivatives begin after 20 calls: they are no part of a step
LEARNING_RATE = 1e-3  # in the prior's units: small, so that all steps are alike
CASES = (("sinusoid", 4), ("sinusoid", 25), ("sinusoid", 200), ("radon", 85))

Step = Callable[[], None]


def by_hand(case: VarmetaEager) -> Step:
    """One more meta-step at each call."""
    imaml = case.strategy
    meta = Meta.start(case.density, case.prior, learn_scale=imaml.learn_scale)
    leaves = meta.leaves()
    adam = torch.optim.Adam(leaves, imaml.learning_rate)

    def step() -> None:
        losses, _ = imaml.losses(case.density, meta.prior, meta.shared, case.tasks)
        total = losses.mean() - meta.log_prior() / len(losses)
        for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
            leaf.grad = grad
        adam.step()

    return step


def by_step(case: VarmetaEager) -> Step:
    """The same, each in a call of `IMAML.step`."""
    strategy, noise, count = case.strategy, torch.Generator(), len(case.tasks)
    state = strategy.init(case.density, case.prior, case.tasks, noise)
    batch = Batch(case.tasks, torch.arange(count), count)

    def step() -> None:
        strategy.step(case.density, state, batch, noise)
        state.step += 1

    return step


def run_fit(
    case: VarmetaEager, steps: int, after_a_step: Callable[..., None] | None = None
) -> None:
    """`fit`, with what is to be done after each step."""
    strategy = replace(case.strategy, steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the budgets are small, and it says so
        given = strategy, case.density, case.tasks
        vm.fit(*given, prior=case.prior, progress=False, on_step=after_a_step)


def side_by_side(case: VarmetaEager, steps: int) -> np.ndarray:
    """CPU seconds of each step of `fit`, of `IMAML.step` and by hand: `[steps - 1, 3]`."""
    rows, since, others = list[list[float]](), 0.0, (by_step(case), by_hand(case))

    def after_a_step(*_: object) -> None:
        nonlocal since
        times = [since, time.process_time()]
        for other in others:
            other()
            times.append(time.process_time())
        rows.append(np.diff(times).tolist())
        since = time.process_time()

    run_fit(case, steps, after_a_step)
    return np.array(rows[1:])  # before the first one `fit` prepares


def once(case: VarmetaEager, step: float) -> float:
    """CPU seconds that `fit` takes beside its steps, of so many seconds each; of nine runs."""
    found = []
    for _ in range(9):
        since = time.process_time()
        run_fit(case, 1)
        found.append(time.process_time() - since - step)
    return median(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="with density.compiled()")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)

    titles = "workload", "fit, ms", "IMAML.step, ms", "by hand, ms", "fit / step", "fit / by hand"
    table = Table(*titles, "once, ms", title="What fit costs above its meta-steps")
    for name, count in CASES:
        case = (VarmetaCompiled if args.compiled else VarmetaEager)(make(name, count))
        case.strategy = replace(case.strategy, learning_rate=LEARNING_RATE)
        side_by_side(case, WARM)
        seconds = side_by_side(case, args.steps)
        each = np.median(seconds, axis=0)
        ratios = [f"{r:.3f}" for r in np.median(seconds[:, :1] / seconds[:, 1:], axis=0)]
        times = [f"{1e3 * t:.3g}" for t in each]
        table.add_row(f"{name} T={count}", *times, *ratios, f"{1e3 * once(case, each[0]):.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
