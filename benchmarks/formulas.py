"""Formula models beside maximum likelihood: is what `varmeta compare FORMULA` fits what R would?

    python -m benchmarks.formulas    # writes results/formulas.md, a minute or two

Each real data set of `fleet/data` is fitted by `LaplaceEvidence` from a formula, and by maximising
its marginal likelihood in SciPy, which knows nothing of varmeta: the groups' intercepts are
integrated over by adaptive Gauss-Hermite quadrature with 15 nodes (exact for the normal law).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp

import varmeta as vm

DATA = Path(__file__).parent / "fleet" / "data"
PAGE = Path(__file__).parent / "results" / "formulas.md"
LogDensity = Callable[[np.ndarray, np.ndarray, pd.DataFrame], np.ndarray]  # of η, extras, rows


def _normal(eta: np.ndarray, extra: np.ndarray, d: pd.DataFrame, y: str) -> np.ndarray:
    z = (d[y].to_numpy() - eta) / np.exp(extra[0])
    return -0.5 * z**2 - extra[0] - 0.5 * np.log(2 * np.pi)


def _negative_binomial(eta: np.ndarray, extra: np.ndarray, d: pd.DataFrame) -> np.ndarray:
    y, size = d["ticks"].to_numpy(), np.exp(extra[0])
    free = gammaln(y + size) - gammaln(size) - gammaln(y + 1)
    return free + size * extra[0] + y * eta - (y + size) * np.logaddexp(extra[0], eta)


# By data set: formula, family, extra parameters (logarithms), columns of the population, log p.
CASES: dict[str, tuple[str, str, int, list[str], LogDensity]] = {
    "rail": (
        "travel ~ 1 + (1 | rail)", "normal", 1, [], lambda e, p, d: _normal(e, p, d, "travel"),
    ),
    "milk": (
        "protein ~ week + (1 | cow)", "normal", 1, ["week"],
        lambda e, p, d: _normal(e, p, d, "protein"),
    ),
    "mmmec": (
        "deaths | rate(expected) ~ uvb + (1 | nation)", "poisson", 0, ["uvb"],
        lambda e, p, d: d["deaths"].to_numpy() * (e + np.log(d["expected"].to_numpy()))
        - d["expected"].to_numpy() * np.exp(e) - gammaln(d["deaths"].to_numpy() + 1),
    ),
    "grouseticks": (
        "ticks ~ year_96 + year_97 + (1 | location)", "negative-binomial", 1,
        ["year_96", "year_97"], _negative_binomial,
    ),
    "contraception": (
        "use ~ urban + age + I(age^2) + (1 | district)", "bernoulli", 0,
        ["urban", "age", "I(age ** 2)"],
        lambda e, p, d: d["use"].to_numpy() * e - np.logaddexp(0, e),
    ),
    "efron_morris": (
        "hits | trials(at_bats) ~ 1 + (1 | player)", "binomial", 0, [],
        lambda e, p, d: d["hits"].to_numpy() * e - d["at_bats"].to_numpy() * np.logaddexp(0, e),
    ),
}  # fmt: skip


def maximum(
    d: pd.DataFrame,
    x: np.ndarray,
    group: np.ndarray,
    extras: int,
    log_p: LogDensity,
    start: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients, log τ and extras at the maximum of the likelihood, and their errors.

    `start` is where the intercept begins, and the logarithms.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    weights = np.log(weights) + 0.5 * nodes**2 - 0.5 * np.log(2 * np.pi)
    count, k = int(group.max()) + 1, x.shape[1]

    def loss(p: np.ndarray) -> float:
        eta, tau, extra = x @ p[:k], np.exp(p[k]), p[k + 1 :]

        def energy(u: np.ndarray) -> np.ndarray:  # of each group, u standard normal
            rows = log_p(eta + tau * u[group], extra, d)
            return np.bincount(group, rows, count) - 0.5 * u**2

        mode, step = np.zeros(count), 1e-4
        for _ in range(30):  # Newton's method by differences; the energies are concave
            low, mid, high = (energy(mode + shift) for shift in (-step, 0.0, step))
            curve = np.minimum((high - 2 * mid + low) / step**2, -0.1)
            mode = mode - np.clip((high - low) / (2 * step) / curve, -2, 2)
        scale = (-curve) ** -0.5
        each = [energy(mode + scale * node) + w for node, w in zip(nodes, weights, strict=True)]
        return -float((logsumexp(each, axis=0) + np.log(scale)).sum())

    begin = np.concatenate([[start[0]], np.zeros(k - 1), np.full(1 + extras, start[1])])
    found: Any = minimize(loss, begin, method="BFGS", options={"gtol": 1e-3})
    return found.x, np.sqrt(np.diag(found.hess_inv))


def main() -> pd.DataFrame:
    """One row a data set and parameter; written as a page."""
    rows = []
    for name, (formula, family, extras, columns, log_p) in CASES.items():
        d = pd.read_csv(DATA / f"{name}.csv").dropna()
        made = vm.from_formula(formula, d, family=family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vm.UndeterminedScale)
            fit = vm.fit(vm.LaplaceEvidence(), made.density, made.tasks, progress=False)
        shared = made.density.constrain_shared(fit.shared)
        ours = [float(fit.prior.loc[0]), *(float(shared[c]) for c in columns)]
        ours += [
            float(fit.prior.scale[0]),
            *(float(shared[s]) for s in list(shared)[len(columns) :]),
        ]
        x = [np.ones(len(d)), *(d["age"] ** 2 if "(" in c else d[c] for c in columns)]
        size = np.array([1.0, *(np.std(c) for c in x[1:])])
        group = pd.factorize(d[made.tasks.task_name])[0]
        y = made.tasks.targets[made.tasks.mask].numpy()
        start = (y.mean(), np.log(y.std())) if family == "normal" else (0.0, 0.0)
        best, errors = maximum(d, np.column_stack(x) / size, group, extras, log_p, start)
        k = len(x)
        wanted = [*(best[:k] / size), *np.exp(best[k:])]
        spread = [*(errors[:k] / size), *(np.exp(best[k:]) * errors[k:])]
        names = ["Intercept", *columns, "sd of the groups", *list(shared)[len(columns) :]]
        for what, a, b, se in zip(names, ours, wanted, spread, strict=True):
            rows.append((name, formula, family, what, a, b, se, (a - b) / se))
            print(f"{name:14} {what:18} {a:10.4g} {b:10.4g} ± {se:.2g}", flush=True)
    heads = ["data", "formula", "family", "parameter", "varmeta", "ML", "error", "in errors"]
    table = pd.DataFrame(rows, columns=heads)
    PAGE.write_text(_page(table))
    return table


def _page(table: pd.DataFrame) -> str:
    lines = [
        "# Formula models beside maximum likelihood",
        "",
        "`python -m benchmarks.formulas`: `LaplaceEvidence` from a formula, with its priors,",
        "beside the maximum of the marginal likelihood by adaptive quadrature (15 nodes) in SciPy.",
        "The last column is their difference in standard errors of the maximum.",
        "",
        "| data | formula, family | parameter | varmeta | maximum | ± | difference |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in table.to_dict("records"):
        formula = r["formula"].replace("|", "\\|")
        lines.append(
            f"| {r['data']} | `{formula}`, {r['family']} | {r['parameter']} | {r['varmeta']:.4g} | "
            f"{r['ML']:.4g} | {r['error']:.2g} | {r['in errors']:+.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
