"""How far a task posterior can be trusted: importance sampling from q_i to the exact posterior.

Draws θ_s ~ q_i are weighed by

    log w_s = log p(y_i | θ_s, φ) + log N(θ_s; θ0, Σ) − log q_i(θ_s).

Their mean is an unbiased estimate of the evidence p(y_i | θ0, Σ, φ), and the mean of log w_s one of
the evidence bound (ELBO). Where q_i misses a part of the posterior a few weights outgrow the rest:
Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry, 2024, Pareto Smoothed
Importance Sampling) fits a generalised Pareto distribution to the largest of them. Its shape k says
how heavy their tail is, and so whether q_i is to be trusted (Yao, Vehtari, Simpson & Gelman, 2018,
Yes, but Did It Work?); its quantiles in place of the largest weights make a steadier estimate.

Leaving a row out divides its likelihood away, w_s / p(y_n | θ_s, φ): approximate leave-one-out
(Magnusson, Andersen, Jonasson & Vehtari, 2019, Bayesian Leave-One-Out Cross-Validation for Large
Data). For a row that weighs much these weights are too unequal, and the result too high, also where
k is below 0.7: such rows get draws of their own (`matching.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta import parts
from varmeta.inference.determined import undetermined
from varmeta.matching import evidence_without
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Block, Gaussian, TaskPosterior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

_EASY, _RISKY = 0.3, 0.5  # of a row left out: k of draws that need no moving; k that is too large
MIN_DRAWS, _GOOD = 25, 0.7  # PSIS fits its tail, a fifth of the draws, to no fewer than five


@dataclass(frozen=True, eq=False)
class Evidence:
    """What draws from each q_i say of the evidence, and of q_i. Nats; `[T]` in float64.

    Attributes:
        names: the tasks' names.
        log_evidence: log p(y_i | θ0, Σ, φ), the logarithm of the mean weight.
        psis: the same with the largest weights smoothed; the better one wherever they differ.
        elbo: the bound E_q log w ≤ log p(y_i | θ0, Σ, φ).
        pareto_k: shape of the weights' tail, which has finite moments below order 1/k; −inf if the
            weights are equal (q_i is the posterior given θ0, Σ and φ), inf if no tail could be
            fitted. Weights whose k is above min(1 − 1/log10 S, 0.7) are not to be trusted.
        ess: effective sample size of the smoothed weights, 1/Σ w̃² of the normalised ones.
        draws: S, how many draws of each task.
        undetermined: modules whose scale these tasks hardly tell from a tenth of it (see
            `varmeta.inference.determined.undetermined`): there an exact q_i is too narrow for a
            scale that is not known.
    """

    names: tuple[str, ...]
    log_evidence: Tensor
    psis: Tensor
    elbo: Tensor
    pareto_k: Tensor
    ess: Tensor
    draws: int
    undetermined: tuple[str, ...] = ()

    @property
    def table(self) -> pd.DataFrame:
        """One row per task: the numbers above, and a `verdict` in plain words."""
        numbers = ("log_evidence", "psis", "elbo", "pareto_k", "ess")
        columns = {name: getattr(self, name).numpy() for name in numbers}
        verdict = [_verdict(k, self.draws) for k in self.pareto_k.tolist()]
        return pd.DataFrame({"task": self.names, **columns, "verdict": verdict})

    def __str__(self) -> str:
        table = self.table.round({"pareto_k": 2, "ess": 0})
        lines = [table.to_string(index=False, float_format="{:.6g}".format)]
        lines.append("All of it is given θ0, Σ and φ: what is not known of them is left out.")
        if self.undetermined:
            named = ", ".join(map(repr, self.undetermined))
            lines.append(f"These tasks hardly tell the scale of {named} from a tenth of it.")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Loo:
    """Leave-one-out log predictive density. Nats; see `loo`.

    Attributes:
        elpd: Σ_n log p(y_n | the task's other rows, θ0, Σ, φ) over all rows of all tasks.
        se: its standard error as ArviZ states it, √(rows × variance over rows).
        table: one row per row of data: `task`, `row` (`tasks.row_ids`), `elpd`, `pareto_k` of the
            weights that it comes from; above 0.5 it may be too high by a nat.
        draws: S, how many draws of each task.
    """

    elpd: float
    se: float
    table: pd.DataFrame
    draws: int

    def __str__(self) -> str:
        k = self.table["pareto_k"]
        bad = int((k > _RISKY).sum())
        rows = f"{len(k)} rows, {bad} of them with a Pareto k above {_RISKY}"
        off = ", which may be too high by a nat each: take more draws" if bad else ""
        return f"leave-one-out elpd {self.elpd:.2f} ± {self.se:.2f} nats: {rows}{off}"


def evidence(
    posterior: TaskPosterior,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Evidence:
    """log p(y_i | θ0, Σ, φ) of each task by importance sampling from q_i, and whether q_i is good.

    Good as the posterior given θ0, Σ and φ. A q_i that is exact in that sense is still too narrow
    where the scales in Σ are not known: `undetermined` names them.

    With `prior=fit.prior` that of what the fit learned. `laplace_evidence` is the same number by
    one expansion at the mode, without a figure of trust.

    Args:
        posterior: of these tasks given these rows, for example `fit.adapt(tasks)` of tasks
            that are not split.
        prior: N(θ0, Σ).
        tasks: T tasks, the rows that the posterior was given: `tasks.support` of split ones.
        draws: of each task, at least 25.
        seed: of the draws, which are those of `to_arviz` with the same seed and number.

    Raises:
        ValueError: a posterior without a density (a delta, or draws), or of other tasks; tasks with
            held-out rows; too few draws.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, varmeta as vm
        >>> def school(x, y=None):
        ...     effect = pyro.sample("effect", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal(effect, x[:, 0]), obs=y)
        >>> rows = [
        ...     (torch.tensor([[s]]), torch.tensor([y])) for s, y in [(15.0, 28.0), (10.0, 8.0)]
        ... ]
        >>> tasks = vm.Tasks.from_list(rows, names=["A", "B"])
        >>> fit = vm.fit(vm.LaplaceEvidence(steps=5), vm.Density(school, tasks), tasks)
        >>> result = vm.evidence(fit.posterior(), fit.prior, tasks)
        >>> bool((result.pareto_k < 0.7).all())  # Laplace's q is the exact posterior here
        True
    """
    found = [_summary(log_w) for _, log_w in _weights(posterior, prior, tasks, draws, seed)]
    numbers = [torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True)]
    log_evidence, psis, elbo, k, ess = numbers
    phi = posterior.shared if posterior.shared.dim() == 1 else posterior.shared.mean((0, 1))
    loose = undetermined(posterior.density, prior, phi, tasks, posterior.mean) or []
    named = tuple(scale.module for scale in loose)
    return Evidence(posterior.names, log_evidence, psis, elbo, k, ess, draws, named)


def loo(
    posterior: TaskPosterior,
    prior: GaussianPrior,
    tasks: Tasks,
    *,
    draws: int = 1000,
    seed: int = 0,
    moment_match: bool = True,
) -> Loo:
    """The log density of each row given its task's other rows, without adapting again.

    θ0, Σ and φ stay as they are, learned from all rows: what is left out is a row's part in θ_i.
    q_i is corrected by its own density, so that unlike `az.loo` on draws of q_i the result does not
    take q_i for the posterior. Each task by itself: the weights are those of one θ_i.

    Rows whose k is above 0.3 are computed with draws moved to where the posterior without them lies
    (`moment_match`), at up to 40 likelihoods of their task for each draw. In eight linear-Gaussian
    problems of 6 tasks and 31 to 41 rows, with 1,000 draws, the sum is then off by 0.1 to 0.3
    nats, and by about one more for each row whose k stays above 0.5 (2 of 301). With
    `moment_match=False`, which is what ArviZ's `loo_approximate_posterior` computes, it is too high
    by 2 to 9 nats, by 1 to 4 of these in rows whose k is at most 0.7.

    Args:
        posterior: as of `evidence`.
        prior: as of `evidence`.
        tasks: as of `evidence`.
        draws: as of `evidence`.
        seed: as of `evidence`.
        moment_match: move the draws for rows that weigh much.

    Raises:
        ValueError: as of `evidence`; also where all rows of a task are one draw
            (`density.joint`), of which none can be left out.
    """
    if posterior.density.joint:
        raise ValueError(
            "loo leaves out one row at a time, and all rows of a task are one draw of the model; "
            "hold out whole tasks, or ask vm.evidence"
        )
    mask = tasks.mask.cpu().numpy()
    elpds, ks = np.zeros(mask.shape), np.zeros(mask.shape)
    for block, log_w in _weights(posterior, prior, tasks, draws, seed):
        some = parts.tasks_at(tasks, block.tasks)
        elpd, k = elpds[block.tasks], ks[block.tasks]  # views
        drawn = block.theta, some, block.shared
        for part, nats in parts.log_likelihood(posterior.density, *drawn):
            each = nats[:, part.tasks.mask].double().cpu().numpy().T  # [rows, S]
            task, column = (place.cpu().numpy() for place in part.places)
            left, k[task, column] = smooth(log_w[task] - each)
            elpd[task, column] = _log_sum(left + each) - _log_sum(left)
        hard = k > _EASY
        if moment_match and hard.any():
            where = torch.as_tensor(hard, device=tasks.mask.device).nonzero()
            source = block.theta, block.shared
            whole = _log_sum(smooth(log_w)[0]) - math.log(draws)
            without, k[hard] = evidence_without(
                smooth, block.posterior, prior, some, source, where, _EASY
            )
            elpd[hard] = whole[hard.nonzero()[0]] - without
    owner, elpd, k = mask.nonzero()[0], elpds[mask], ks[mask]
    ids = tasks.row_ids.cpu().numpy()[mask]  # type: ignore[union-attr]
    columns = {"task": np.array(tasks.names)[owner], "row": ids, "elpd": elpd, "pareto_k": k}
    se = float((len(elpd) * elpd.var()) ** 0.5)
    return Loo(float(elpd.sum()), se, pd.DataFrame(columns), draws)


def good_k(draws: int) -> float:
    """The largest k to be trusted with so many draws, min(1 − 1/log10 S, 0.7) (Vehtari, 2024)."""
    return min(1 - 1 / math.log10(draws), _GOOD)


def smooth(log_w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's Pareto smoothed weights `[R, S]`, not normalised, and the shape k `[R]`.

    ArviZ normalises them, smoothing the tail alone: the median weight shows by how much. What it
    cannot fit comes back as it is, with k = −inf where the largest weights are equal up to rounding
    (√ε), and inf where there is no tail to fit or a weight is not a number.
    """
    out, k = log_w.copy(), np.full(len(log_w), np.inf)
    count = log_w.shape[1]
    order = np.argsort(log_w, axis=1)
    middle, tail = order[:, count // 2], order[:, -int(min(count / 5, 3 * count**0.5))]
    each = np.arange(len(log_w))
    largest = log_w[each, order[:, -1]]  # NaN if there is one
    fitted = np.isfinite(largest) & np.isfinite(log_w[each, middle])
    with np.errstate(invalid="ignore"):
        flat = fitted & (largest - log_w[each, tail] < np.finfo(np.float64).eps ** 0.5)
    k[flat] = -np.inf
    fitted &= ~flat
    if fitted.any():
        normalised, shape = _psislw(log_w[fitted])
        body = middle[fitted, None]
        lost = np.take_along_axis(log_w[fitted], body, 1) - np.take_along_axis(normalised, body, 1)
        good = np.isfinite(shape)
        index = fitted.nonzero()[0][good]
        out[index], k[index] = (normalised + lost)[good], shape[good]
    return out, k


def _psislw(log_w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised log weights and k from the installed ArviZ, 0.x or 1.x."""
    with np.errstate(all="ignore"):  # a tail that cannot be fitted: its k is not finite
        if int(version("arviz").split(".")[0]) >= 1:
            from arviz_stats.base import array_stats  # type: ignore[import-not-found]

            return tuple(array_stats.psislw(-log_w, axis=-1))  # which negates its argument
        from arviz import psislw

        return tuple(psislw(log_w))


def _weights(
    posterior: TaskPosterior, prior: GaussianPrior, tasks: Tasks, draws: int, seed: int
) -> Iterator[tuple[Block, np.ndarray]]:
    """Draws from q_i of some tasks at a time, and their log w_s `[t, S]`, as precise as the model.

    In float64, each task's draws together.
    """
    if not isinstance(posterior, Gaussian):
        raise ValueError(
            f"a {posterior.kind} posterior has no density to weigh its draws by; use a strategy "
            "with a Gaussian one (posterior_kind='laplace', or JointVariational), and for draws "
            "az.loo(to_arviz(fit))"
        )
    if posterior.names != tasks.names:
        got, wanted = (", ".join(names[:3]) for names in (posterior.names, tasks.names))
        raise ValueError(f"posterior is of {got}, ..., the tasks are {wanted}, ...; pass their own")
    tasks.require_no_query("tasks", "if the posterior was given them too")
    if draws < MIN_DRAWS:
        raise ValueError(f"draws must be at least {MIN_DRAWS}, got {draws}")
    for block in posterior.blocks(draws, generator(seed, 0, device=prior.loc.device)):
        some, theta = parts.tasks_at(tasks, block.tasks), block.theta
        with torch.no_grad():
            rows = parts.total_log_likelihood(posterior.density, theta, some, block.shared)
            log_p = (rows + prior.log_prob(theta)).double()
            log_w = log_p - block.posterior.log_prob(theta).double()
        yield block, log_w.T.contiguous().cpu().numpy()


def _summary(log_w: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of weights `[t, S]`: log mean, the same smoothed, mean of the logarithms, k and ess."""
    smoothed, k = smooth(log_w)
    raw, total = _log_sum(log_w), _log_sum(smoothed)
    with np.errstate(invalid="ignore"):  # no weight at all: −inf − (−inf)
        ess = 1 / (np.exp(smoothed - total[:, None]) ** 2).sum(1)
    log_s = math.log(log_w.shape[1])
    return raw - log_s, total - log_s, log_w.mean(1), k, ess


def _log_sum(log_w: np.ndarray) -> np.ndarray:
    """`[R, S]` to `[R]`; a tenth of the time of NumPy's."""
    out: np.ndarray = torch.from_numpy(log_w).logsumexp(1).numpy()
    return out


def _verdict(k: float, draws: int) -> str:
    if k == -math.inf:
        return "exact given Σ: the weights are equal"
    if k <= good_k(draws):
        return "good"
    if k <= _GOOD:
        return "take more draws"
    return "not to be trusted: q misses part of the posterior"
