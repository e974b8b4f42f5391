"""Memory is bounded by parts, and no number depends on how large these are.

What is random here has a fixed seed. The one statistical comparison, of the moments of draws made
block by block, is to 5 standard errors: one of its 24 numbers in 70,000 runs is a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from export_case import TASKS, gaussian, group, groups_of, unfitted
from helpers import FLOAT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import size
from varmeta import parts
from varmeta.export import to_arviz
from varmeta.importance import evidence, loo
from varmeta.inference.joint import JointVariational
from varmeta.inference.pooling import NoPooling
from varmeta.inference.reachability import reachability_gap
from varmeta.models.density import Density
from varmeta.models.network import network
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Delta, Draws, Gaussian, TaskPosterior
from varmeta.scores import KNOWN, Outcome, score
from varmeta.seeds import generator
from varmeta.shrinkage import find_shrinkage

COUNTS = [1, 40, 2, 1, 7, 1, 3, 1]  # one long task beside short ones
RAGGED = size.lines(COUNTS)
MODEL = Density(size.line, RAGGED, shared=["noise"])
PRIOR = GaussianPrior.from_density(MODEL)
T, D, S = len(RAGGED), 2, 50


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=FLOAT)


def posteriors() -> dict[str, TaskPosterior]:
    names, phi, loc = RAGGED.names, torch.tensor([-0.5], dtype=FLOAT), 1 + 0.1 * noise(T, D)
    tril = 0.2 * torch.eye(D, dtype=FLOAT).expand(T, D, D) + 0.05 * noise(T, D, D, seed=1).tril(-1)
    sd = 0.2 + 0.1 * noise(T, D, seed=2).abs()
    stats = {"grad_norm": torch.arange(T)}
    each_phi = 0.1 * noise(S, 1, 1, seed=3).expand(S, T, 1)
    return {
        "full": Gaussian(MODEL, names, phi, loc, tril, stats=stats),
        "diagonal": Gaussian(MODEL, names, phi, loc, sd),
        "low rank": Gaussian(MODEL, names, phi, loc, sd, 0.1 * noise(T, D, 1, seed=4)),
        "delta": Delta(MODEL, names, phi, loc),
        "draws": Draws(MODEL, names, each_phi, loc + 0.1 * noise(S, T, D, seed=5), 2),
    }


POSTERIORS = posteriors()
every_form = pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS.keys())


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Of what PyTorch computes within, the number of numbers."""
    seen = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor) and func is not torch.ops.aten.expand.default:
                    seen[0] = max(seen[0], t.numel())
            return out

    with Watch():
        yield seen


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7, 13, 80, 319, 320, 1000])
def test_every_row_is_in_one_part_and_no_part_is_larger(rows: int) -> None:
    holes = noise(T, 40, seed=7) > 0.5  # the constructor takes any mask
    for tasks in (RAGGED, replace(RAGGED, mask=holes, row_ids=None)):
        seen = torch.zeros(tasks.mask.shape, dtype=torch.long)
        evaluated = 0
        for part in parts.row_parts(tasks, rows):
            assert part.tasks.mask.numel() <= max(1, rows)
            evaluated += part.tasks.mask.numel()
            part.put(seen, part.tasks.mask.long() + torch.as_tensor(0))
            assert torch.equal(tasks.row_ids[part.places], part.tasks.row_ids[part.tasks.mask])
            assert part.tasks.names == tuple(tasks.names[i] for i in part.index)
        assert torch.equal(seen, tasks.mask.long())
        if tasks is RAGGED:  # 56 rows, 320 with padding
            assert evaluated <= (320 if rows >= 320 else 2 * 56 + rows)


def test_a_long_task_does_not_pad_the_others() -> None:
    tasks = size.lines([1] * 500 + [1000])
    pieces = list(parts.row_parts(tasks, 400))
    assert sum(p.tasks.mask.numel() for p in pieces) == 1500 and len(pieces) == 5


# -- nothing depends on them ---------------------------------------------------------------------


def everything(posterior: TaskPosterior) -> dict[str, Any]:
    """All that is computed from draws, each by the way that its users take."""
    split = RAGGED.split(0.4)
    run = unfitted(JointVariational(), RAGGED, MODEL)
    out: dict[str, Any] = {"log predictive": posterior.log_predictive(RAGGED, S, generator(1))}
    if isinstance(posterior, Gaussian):
        found, left = (
            evidence(posterior, PRIOR, RAGGED, draws=S),
            loo(posterior, PRIOR, RAGGED, draws=S),
        )
        out |= {n: getattr(found, n) for n in ("log_evidence", "psis", "elbo", "pareto_k", "ess")}
        out |= {"loo": left.table["elpd"], "loo k": left.table["pareto_k"]}
    data = to_arviz(run, posterior=posterior, draws=S)
    for name in ("log_likelihood", "posterior_predictive", "posterior"):
        out |= {f"{name} {n}": v.values for n, v in group(data, name).data_vars.items()}
    if posterior.kind in ("gaussian", "laplace"):
        stats = group(data, "sample_stats")
        out |= {n: stats[n].values for n in ("log_p", "log_q")}
    table = find_shrinkage(run, None, posterior, None, 0.1).table
    out |= {f"shrinkage {n}": table[n] for n in ("cost", "cost_se", "optimism")}
    scored = score(Outcome(run, posterior, None, 0.0), KNOWN, split, S, 0).row
    return out | {n: scored[n] for n in ("elpd", "elpd_se", "rmse", "coverage", "pareto_k")}


@every_form
def test_no_number_depends_on_what_is_evaluated_at_once(
    posterior: TaskPosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = everything(posterior)
    monkeypatch.setattr(parts, "AT_ONCE", 5 * S)  # five rows at a time
    for name, value in everything(posterior).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-12, atol=1e-12, err_msg=name)


@every_form
@pytest.mark.parametrize("numbers", [1, 500])
def test_what_is_drawn_in_blocks_belongs_together(
    posterior: TaskPosterior, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evidence, densities and predictions from the draws of `sample` itself, held whole."""
    monkeypatch.setattr(parts, "LARGEST", numbers)
    theta, phi = posterior.sample(S, generator(3, 0))
    assert theta.shape == (S, T, D)
    rows = MODEL.log_likelihood(theta, RAGGED, phi)
    got = posterior.log_predictive(RAGGED, S, generator(3, 0))
    wanted = torch.where(RAGGED.mask, rows.logsumexp(0) - np.log(S), 0.0)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    if isinstance(posterior, Gaussian):
        log_w = rows.sum(-1) + PRIOR.log_prob(theta) - posterior.log_prob(theta)
        found = evidence(posterior, PRIOR, RAGGED, draws=S, seed=3)
        torch.testing.assert_close(found.elbo, log_w.mean(0), rtol=1e-12, atol=1e-12)
        law = posterior.law.log_prob(theta)
        torch.testing.assert_close(posterior.log_prob(theta), law, rtol=1e-12, atol=1e-12)
    blocks = list(posterior.blocks(S, generator(3, 0)))
    assert torch.equal(torch.cat([b.theta for b in blocks], 1), theta)
    assert [n for b in blocks for n in b.posterior.names] == list(RAGGED.names)
    for count in (S, S + 7, 9):  # of draws, more and fewer than there are: not their own moments
        blocks = list(posterior.blocks(count, generator(3, 0)))
        for name in ("mean", "sd"):
            got = torch.cat([getattr(b.posterior, name) for b in blocks])
            torch.testing.assert_close(got, getattr(posterior, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["full", "diagonal", "low rank"])
def test_blocks_have_the_law_of_the_whole_and_are_independent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, count = POSTERIORS[name], 4000
    monkeypatch.setattr(parts, "LARGEST", 4 * count)  # two tasks
    theta, _ = posterior.sample(count, generator(9))
    z = (theta - posterior.mean) / posterior.sd
    assert z.mean(0).abs().max() < 5 / count**0.5
    assert (z.std(0) - 1).abs().max() < 5 / (2 * count) ** 0.5
    other = torch.corrcoef(z[:, :, 0].T) - torch.eye(T)
    assert other.abs().max() < 5 / count**0.5


def test_predictions_beyond_a_part_have_the_law_and_every_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posterior, count = POSTERIORS["delta"], 2000
    monkeypatch.setattr(parts, "LARGEST", 10 * count)
    values: dict[int, Tensor] = {}
    for part, predicted in posterior.predictions(RAGGED, count, generator(2)):
        assert predicted["y"].numel() <= parts.LARGEST
        ids = part.row_ids[part.mask].tolist()  # type: ignore[index]
        values |= dict(zip(ids, predicted["y"][:, part.mask].T, strict=True))
    assert sorted(values) == list(range(sum(COUNTS)))
    mean = (posterior.mean[:, :1] + posterior.mean[:, 1:] * RAGGED.inputs[..., 0])[RAGGED.mask]
    z = (torch.stack([values[i] for i in range(len(values))]) - mean[:, None]) / np.exp(-0.5)
    assert z.mean(1).abs().max() < 5 / count**0.5


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["evidence", "loo", "moved draws", "score", "gap", "predictions", "export"]
)
def test_no_tensor_is_larger_than_asked_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task of 300 rows beside 60 of one: whole, 30 draws of padded rows are 549,000 numbers."""
    tasks = size.lines([1] * 60 + [300])
    density = Density(size.line, tasks, shared=["noise"])
    run = unfitted(JointVariational(), tasks, density)
    q = Gaussian(
        density, tasks.names, run.shared, 0.1 * noise(61, D), torch.ones(61, D, dtype=FLOAT)
    )
    monkeypatch.setattr(parts, "AT_ONCE", 3000)
    monkeypatch.setattr(parts, "LARGEST", 6000)
    monkeypatch.setattr("varmeta.importance.undetermined", lambda *_: None)  # of the data's size
    draws, padded, existing, two = 30, 61 * 300, 360, [0, 60]
    first = torch.arange(300) < 40  # of these rows; each is left out with draws of its own
    shorter = parts.tasks_at(tasks, slice(0, 61, 60))
    shorter = next(parts.row_parts(replace(shorter, mask=shorter.mask & first), 100)).tasks
    calls: dict[str, Callable[[], Any]] = {
        "evidence": lambda: evidence(q, run.prior, tasks, draws=draws),
        "loo": lambda: loo(q, run.prior, tasks, draws=draws, moment_match=False),
        "moved draws": lambda: loo(q.select(two), run.prior, shorter, draws=draws),
        "score": lambda: score(Outcome(run, q, None, 0.0), KNOWN, tasks.split(), draws, 0),
        "gap": lambda: reachability_gap(replace_posterior(run, q), draws=draws),
        "predictions": lambda: list(q.predictions(tasks, draws, generator(0))),
        "export": lambda: to_arviz(run, posterior=q, draws=draws),
    }
    with largest_tensor() as seen:
        calls[what]()
    # What the data themselves take is there already; an export returns its rows.
    assert seen[0] <= max(6000, padded, draws * existing if what == "export" else 0)


def replace_posterior(run: Any, q: TaskPosterior) -> Any:
    """A fit whose two posteriors are these: no training, no adapting."""
    run.posterior = lambda: q
    run.adapt = lambda _: replace(q, loc=q.mean + 1.0)
    return run


def test_a_network_counts_with_its_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 hidden units: the largest tensor has 200 numbers for each row, not one."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 200), torch.nn.Tanh(), torch.nn.Linear(200, 1))
    tasks = size.lines([30, 4, 30]).to(torch.float32)
    density = Density(network(net, lambda out: dist.Normal(out[:, 0], 0.3)), tasks)
    q = Delta(density, tasks.names, density.shared_init, density.prior_loc.expand(3, -1))
    q = Draws(density, tasks.names, q.shared, q.mean.expand(40, -1, -1))
    whole = q.log_predictive(tasks, 40, generator(0))
    monkeypatch.setattr(parts, "AT_ONCE", 20_000)
    with largest_tensor() as seen:
        again = q.log_predictive(tasks, 40, generator(0))
    held = 40 * 3 * density.dim
    assert seen[0] <= held < 40 * 3 * 30 * 200
    torch.testing.assert_close(again, whole)


# -- files -----------------------------------------------------------------------------------------


def test_what_an_export_holds_can_be_chosen() -> None:
    run, q = unfitted(), gaussian()
    whole = to_arviz(run, posterior=q, draws=7)
    for names, option in (
        ({"log_likelihood"}, {"log_likelihood": False}),
        ({"posterior_predictive", "prior_predictive"}, {"predictive": False}),
    ):
        less = to_arviz(run, posterior=q, draws=7, **option)
        assert groups_of(whole) - groups_of(less) == names
    assert group(to_arviz(run, posterior=q), "posterior").sizes["draw"] == 500


def test_a_large_export_has_fewer_draws_unless_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, q, rows = unfitted(), gaussian(), int(TASKS.mask.sum())
    each = 2 * len(TASKS) * (q.density.dim + 1) + 3 * rows
    for limit, wanted in ((300 * each, 300), (1, 100)):
        monkeypatch.setattr("varmeta.export._NUMBERS", limit)
        assert group(to_arviz(run, posterior=q), "posterior").sizes["draw"] == wanted
    monkeypatch.setattr("varmeta.export._NUMBERS", 1)
    assert group(to_arviz(run, posterior=q, draws=150), "posterior").sizes["draw"] == 150


def test_single_precision_where_it_does_not_show(tmp_path: Path) -> None:
    """A site far from 0 whose spread would drown stays as it is; so do the weights."""
    run, q = unfitted(), gaussian()
    far = replace(q, loc=q.loc + 1e6 * torch.tensor([1.0, 0, 0, 0, 0], dtype=FLOAT))
    made = {s: to_arviz(run, posterior=far, draws=100, single=s) for s in (False, True)}
    both = {single: group(data, "posterior") for single, data in made.items()}
    assert both[True]["a"].dtype == np.float64 and both[True]["b"].dtype == np.float32
    assert group(made[True], "sample_stats")["log_p"].dtype == np.float64
    for name in ("a", "b", "width"):
        spread = both[False][name].std("draw").values
        off = np.abs(both[True][name].values - both[False][name].values).max((0, 1))
        assert (off <= 1e-3 * spread).all()
    near = to_arviz(run, posterior=q, draws=100, single=True)
    for name in ("posterior", "prior", "log_likelihood", "posterior_predictive"):
        assert {v.dtype for v in group(near, name).data_vars.values()} == {np.dtype(np.float32)}
    for data, path in ((near, "near.nc"), (made[False], "far.nc")):
        data.to_netcdf(str(tmp_path / path))
    assert (tmp_path / "near.nc").stat().st_size < (tmp_path / "far.nc").stat().st_size


# -- the benchmark ---------------------------------------------------------------------------------


def test_the_benchmark_of_size(tmp_path: Path) -> None:
    """A small size: every stage is timed, and there is a file."""
    found = size.measure([2] * 20 + [30], tmp_path, [NoPooling()], draws=50)
    assert [row["stage"] for row in found] == ["start", "compare", "evidence", "export"]
    assert found[-1]["file"] > 0 and all(row["peak"] > 0.05 for row in found)
    assert size.table({"small": found}).row_count == 4
