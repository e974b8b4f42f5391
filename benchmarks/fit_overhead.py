"""What `fit` costs above its meta-steps: `python -m benchmarks.fit_overhead [--compiled]`.

A meta-step written by hand is `IMAML.losses` and the prior's log density, their gradient in what is
learned, and a step of Adam. `fit` does that many and everything else that it does (batches, seeds,
checks, diagnostics, history, hidden progress bar). Both run in one process, in turn, on the same
density; a ratio is the median over rounds of the ratio within a round. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table

import varmeta as vm
from benchmarks.peers.varmeta_compiled import VarmetaCompiled
from benchmarks.peers.varmeta_eager import VarmetaEager
from benchmarks.workloads import make
from varmeta.inference.base import Meta

WARM = 60  # recordings of the derivatives begin after 20 calls: they are no part of a step
LEARNING_RATE = 1e-3  # in the prior's units: small, so that all steps are alike
CASES = (("sinusoid", 4), ("sinusoid", 25), ("sinusoid", 200), ("radon", 85))


def by_hand(case: VarmetaEager, steps: int) -> float:
    """CPU seconds of so many meta-steps."""
    imaml = case.strategy
    meta = Meta.start(case.density, case.prior, learn_scale=imaml.learn_scale)
    leaves = meta.leaves()
    adam = torch.optim.Adam(leaves, imaml.learning_rate)
    start = time.process_time()
    for _ in range(steps):
        losses, _ = imaml.losses(case.density, meta.prior, meta.shared, case.tasks)
        total = losses.mean() - meta.log_prior() / len(losses)
        for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
            leaf.grad = grad
        adam.step()
    return time.process_time() - start


def by_fit(case: VarmetaEager, steps: int) -> float:
    """The same steps in `fit`, with what it does before and after them."""
    strategy = replace(case.strategy, steps=steps)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the budgets are small, and it says so
        vm.fit(strategy, case.density, case.tasks, prior=case.prior, progress=False)
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="with density.compiled()")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="meta-steps of each in a round")
    args = parser.parse_args()
    torch.set_num_threads(1)

    titles = "workload", "step by hand, ms", "of fit, ms", "fit / by hand", "middle half"
    table = Table(*titles, title="What fit costs above its meta-steps")
    for name, count in CASES:
        case = (VarmetaCompiled if args.compiled else VarmetaEager)(make(name, count))
        case.strategy = replace(case.strategy, learning_rate=LEARNING_RATE)
        by_hand(case, WARM)
        by_fit(case, WARM)
        rounds = [(by_hand(case, args.steps), by_fit(case, args.steps)) for _ in range(args.rounds)]
        low, middle, high = quantiles([fit / hand for hand, fit in rounds], n=4)
        hand, fit = (1e3 * median(column) / args.steps for column in zip(*rounds, strict=True))
        table.add_row(
            f"{name} T={count}",
            *(f"{hand:.3g}", f"{fit:.3g}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
