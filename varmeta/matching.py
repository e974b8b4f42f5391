"""Leave-one-out where a row weighs much: draws moved to where the posterior without it lies.

The weights w_s / p(y_n | θ_s) of draws from a task's posterior say where the posterior without row
n lies. Draws moved there, by the affine map that gives them its mean and variance, weigh more alike
(Paananen, Piironen, Bürkner & Vehtari, 2021, Implicitly Adaptive Importance Sampling), and the map
is improved while k falls. Then p(y_n | other rows) = Z / Z₋ₙ, the evidence with all rows from the
draws of q_i over that without row n from the moved ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from varmeta import parts
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.tasks import Tasks

Smooth = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_WIDER = (1.0, 2.0)  # few weights see too little of the tails of a wider law
_ROUNDS = 8  # of moving draws


def evidence_without(
    smooth: Smooth,
    posterior: TaskPosterior,
    prior: GaussianPrior,
    tasks: Tasks,
    draws: tuple[Tensor, Tensor],
    rows: Tensor,
    enough: float,
) -> tuple[np.ndarray, np.ndarray]:
    """log p(y_i without row n | θ0, Σ, φ), nats `[R]`, and the k of the weights behind it, `[R]`.

    Args:
        smooth: log weights `[R, S]` to smoothed ones and their k.
        posterior: q_i of these tasks, with a density.
        prior: N(θ0, Σ).
        tasks: T tasks; all of their rows count.
        draws: θ `[S, T, D]` from q_i with φ, as from `TaskPosterior.sample`.
        rows: `[R, 2]`, task and column of each row that is left out.
        enough: a k that needs no further rounds.
    """
    theta, shared = draws
    size = max(1, parts.LARGEST // 2 // (len(theta) * tasks.mask.shape[1]))
    found = [
        _part(smooth, posterior, prior, tasks, theta, shared, some, enough)
        for some in rows.split(size)
    ]
    values, ks = zip(*found, strict=True)
    return np.concatenate(values), np.concatenate(ks)


def _part(
    smooth: Smooth,
    posterior: TaskPosterior,
    prior: GaussianPrior,
    tasks: Tasks,
    theta: Tensor,
    shared: Tensor,
    rows: Tensor,
    enough: float,
) -> tuple[np.ndarray, np.ndarray]:
    owner, column = rows.unbind(-1)
    own = tasks._take(owner, tuple(map(str, range(len(owner)))))
    phi = shared if shared.dim() == 1 else shared[:, owner]
    left_out = torch.nn.functional.one_hot(column, tasks.mask.shape[1]).bool()

    def weigh(place: Tensor, log_q: Tensor) -> tuple[np.ndarray, np.ndarray]:
        nats = posterior.density.log_likelihood(place, own, phi)
        log_p = nats.masked_fill(left_out, 0.0).sum(-1) + prior.log_prob(place)
        return smooth((log_p - log_q).T.double().cpu().numpy())

    with torch.no_grad():
        place, log_q = theta[:, owner], posterior.log_prob(theta)[:, owner]
        log_w, k = weigh(place, log_q)
        for _ in range(_ROUNDS):
            weight = torch.as_tensor(log_w).softmax(-1).to(place).T[..., None]
            better = np.zeros(len(k), dtype=bool)
            start = place
            base_q = log_q
            for move, log_det in _moves(start, weight):
                moved_q = base_q - log_det
                moved_w, moved_k = weigh(move, moved_q)
                gain = (moved_k < k) & (k > enough)
                which = torch.as_tensor(gain, device=place.device)
                place = torch.where(which[:, None], move, place)
                log_q = torch.where(which, moved_q, log_q)
                log_w, k = np.where(gain[:, None], moved_w, log_w), np.where(gain, moved_k, k)
                better |= gain
            if not better.any():
                break
    return np.logaddexp.reduce(log_w, axis=1) - np.log(len(theta)), k


def _moves(place: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Draws `[S, R, D]` with the weighted mean, variances or covariance, and log |det| `[R]`.

    Of the two latter also wider ones.
    """
    mean, target = place.mean(0), (weight * place).sum(0)
    away, off = place - mean, place - target
    none = place.new_zeros(place.shape[1])
    scale = ((weight * off**2).sum(0) / (away**2).mean(0)).sqrt()
    moves = [(away + target, none)]
    for width in _WIDER:
        moves.append((away * scale * width + target, (width * scale).log().sum(-1)))
    if place.shape[-1] > 1:
        now = torch.einsum("srd,sre->rde", away, away) / len(place)
        wanted = torch.einsum("srd,sre->rde", weight * off, off)
        roots, info = torch.linalg.cholesky_ex(torch.stack([now, wanted]))
        fine = (info == 0).all(0)
        eye = torch.eye(place.shape[-1]).to(place)
        roots = torch.where(fine[None, :, None, None], roots, eye)
        turned = torch.linalg.solve_triangular(roots[0], away.movedim(0, -1), upper=False)
        turned = (roots[1] @ turned).movedim(-1, 0)
        log_det = (roots[1] / roots[0]).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        for width in _WIDER:
            log_wide = place.shape[-1] * math.log(width)
            moves.append((width * turned + target, log_det + log_wide))
    return moves
