"""Computes `references/*.json`: long NUTS and maximum likelihood of every case.

    pip install -e '.[fleet-references]'
    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        python -m benchmarks.fleet.references [--cases radon,cake]

The committed files are what `make fleet` reads: it needs none of these packages. A case whose file
is there is left alone unless it is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet.cases import CASES, Case
from varmeta.tasks import Tasks

FOLDER = Path(__file__).parent / "references"
_FLAT = 0.01


def load_reference(name: str) -> dict[str, Any] | None:
    """What is known of a case: see `_reference` for the keys. None if nothing is as yet."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def maximum(reference: dict[str, Any]) -> dict[str, Any] | None:
    """The maximum of the marginal likelihood; None if the search for it stopped short of one.

    A gradient, in units of the priors, of more than a hundredth of a nat tells.
    """
    best: dict[str, Any] = reference["maximum_likelihood"][0]
    return best if best["largest_gradient"] < _FLAT else None


def rows_digest(tasks: Tasks) -> str:
    """Of the tasks' names and the rows' numbers in the data: the same split has the same digest."""
    assert tasks.row_ids is not None
    rows = [ids[ids >= 0].sort().values.tolist() for ids in tasks.row_ids]
    text = json.dumps([list(tasks.names), rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _summary(draws: np.ndarray) -> dict[str, Any]:
    """Of `[chains, S, K]`."""
    flat = np.concatenate(list(draws))
    low, middle, high = np.quantile(flat, [0.05, 0.5, 0.95], axis=0)
    values = {"mean": flat.mean(0), "sd": flat.std(0), "q05": low, "q50": middle, "q95": high}
    return {name: _short(value) for name, value in values.items()}


def _short(values: Any) -> Any:
    return np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[float])(values).tolist()


def _reference(case: Case) -> dict[str, Any]:
    import jax
    import numpyro

    numpyro.enable_x64()
    from benchmarks.fleet.marginal import Marginal, maximum_likelihood, mixed_lm
    from benchmarks.fleet.numpyro_hierarchy import Point, nuts, target

    problem = case.problem()
    what = target(case)
    marginal = Marginal(what)
    begun = time.perf_counter()
    low = np.log(0.3 * np.asarray(what.scale_width))
    first = np.broadcast_to(what.loc, (len(what.x), len(what.loc)))
    mode, _ = marginal.most_likely(Point(what.loc, low, what.shared_init), first, 1.0)
    near = marginal.expansion(mode, first), marginal.point(mode), marginal.spread(mode, first)
    posterior = nuts(what, *near)
    if not posterior.good:
        posterior = nuts(what, *near, warmup=2000, draws=4000)
    seconds = time.perf_counter() - begun
    flat = {name: np.concatenate(list(v)) for name, v in posterior.draws.items()}  # chains
    theta = flat["theta"]
    query = problem.train.query
    held_out = [jax.numpy.asarray(t.numpy()) for t in (query.inputs, query.targets)]
    rows = jax.jit(jax.vmap(what.rows, (0, None, 0, 0)))
    each = [np.asarray(rows(t, s, *held_out)) for t, s in zip(theta, flat["shared"], strict=True)]
    lpd = np.logaddexp.reduce(np.stack(each), axis=0) - np.log(len(each))
    lpd = np.where(query.mask.numpy(), lpd, 0.0).sum(-1)
    means = {name: np.array(_short(value.mean(0))) for name, value in flat.items()}
    here = what.log_likelihood(means["theta"], means["shared"], what.x, what.y, what.mask)
    start = Point(means["loc"], means["log_scale"], means["shared"])
    likelihood = [maximum_likelihood(marginal, start, means["theta"])]
    other = mixed_lm(what)
    likelihood += [other] if other else []
    return {
        "case": case.name,
        "support_rows": int(problem.train.support.mask.sum()),
        "support_digest": rows_digest(problem.train.support),
        "tasks": list(problem.train.names),
        "sites": [s.name for s in problem.density.sites],
        "shared_sites": [s.name for s in problem.density.shared_sites],
        "nuts": {
            "how": f"NumPyro {numpyro.__version__}, 4 chains of {posterior.draws['loc'].shape[1]}"
            " draws",
            "seconds": round(seconds, 1),
            "worst_rhat": round(posterior.rhat, 4),
            "least_ess": round(posterior.ess),
            "divergent": posterior.divergent,
            "loc": _summary(posterior.draws["loc"]),
            "log_scale": _summary(posterior.draws["log_scale"]),
            "shared": _summary(posterior.draws["shared"]) if what.shared else None,
            "theta_mean": means["theta"].tolist(),
            "theta_sd": _short(theta.std(0)),
            "known_log_density": _short(lpd),
            "log_likelihood_at_means": [float(value) for value in here],
        },
        "maximum_likelihood": likelihood,
    }


def _lines(found: Any, depth: int = 2) -> str:
    """JSON with a line for each key of the outer two levels, however long its numbers are."""
    if not isinstance(found, dict) or depth == 0:
        return json.dumps(found)
    inner = [f"{json.dumps(key)}: {_lines(value, depth - 1)}" for key, value in found.items()]
    return "{\n" + ",\n".join(inner) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="by commas; default: those without a file")
    chosen = [name for name in parser.parse_args().cases.split(",") if name]
    FOLDER.mkdir(exist_ok=True)
    for name in chosen or [n for n in CASES if not (FOLDER / f"{n}.json").exists()]:
        begun = time.perf_counter()
        found = _reference(CASES[name])
        (FOLDER / f"{name}.json").write_text(_lines(found) + "\n")
        nuts = found["nuts"]
        print(
            f"{name}: {nuts['how']}; R-hat {nuts['worst_rhat']}, ESS {nuts['least_ess']}, "
            f"{nuts['divergent']} divergent; {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        for one in found["maximum_likelihood"]:
            print("   ", one, flush=True)


if __name__ == "__main__":
    main()
