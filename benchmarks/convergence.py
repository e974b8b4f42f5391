"""What it takes to arrive: `python -m benchmarks.convergence`.

Strategies whose objective has no noise, by the quasi-Newton method that they use by default and by
a fixed number of steps of Adam, as they were before: gradient evaluations, seconds, and how far
what was learned is from the optimum, in standard errors from the curvature there (the largest over
θ0, the scales and φ; scales that the optimum takes to 0 are left out).
"""

import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import varmeta as vm
from varmeta.inference.learned import flat, learned
from varmeta.problems import PROBLEMS

COLLAPSED = 0.02  # of a scale's start

# Now, and before: JointVariational's q_i were diagonal, which is another bound.
PAIRS: dict[str, tuple[Callable[[], vm.Strategy], Callable[[], vm.Strategy]]] = {
    "LaplaceEvidence": (vm.LaplaceEvidence, lambda: vm.LaplaceEvidence(optimiser="adam")),
    "JointVariational": (
        vm.JointVariational,
        lambda: vm.JointVariational(q="full", q_update="gradient", tolerance=1e-9),
    ),
    "IMAML": (vm.IMAML, lambda: vm.IMAML(optimiser="adam")),
    "AmortisedVariational": (
        vm.AmortisedVariational,
        lambda: vm.AmortisedVariational(optimiser="adam"),
    ),
}


def compare_on(name: str) -> Table:
    """A row for each strategy on a shipped problem, now and before."""
    problem = PROBLEMS[name](0)
    table = Table("strategy", "", "steps", "gradients", "seconds", "converged", "off, in errors")
    for label, (now, before) in PAIRS.items():
        best = None
        for which, make in (("now", now), ("before", before)):
            start = time.process_time()
            fit = vm.fit(make(), problem.density, problem.train.support)
            seconds = time.process_time() - start
            values = flat([*learned(fit.state.meta).values()])
            if best is None:
                best, errors = values, torch.tensor(fit.moving()["error"].to_numpy())
                small = (
                    fit.prior.log_scale - fit.state.meta.origin.log_scale
                    < torch.tensor(COLLAPSED).log()
                )
                judged = torch.ones_like(values, dtype=torch.bool)
                if "log_scale" in learned(fit.state.meta):
                    first = len(fit.prior.loc)
                    judged[first : first + len(small)] = ~small
                off = float(torch.tensor(fit.moving()["moves"].to_numpy())[judged].max())
            else:
                off = float(((values - best).abs() / errors)[judged].max())
            row = (len(fit.history), f"{fit.gradients:.2g}", f"{seconds:.1f}", fit.converged)
            table.add_row(label if which == "now" else "", which, *map(str, row), f"{off:.2g}")
    return table


def main() -> None:
    """Both shipped problems of some size."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    console = Console(width=110)
    for name in ("radon", "sleepstudy"):
        console.print(name)
        console.print(compare_on(name))


if __name__ == "__main__":
    main()
