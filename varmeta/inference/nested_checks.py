"""What nested Laplace cannot see from where it stands: improper posteriors, and other modes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varmeta.inference.belief import Belief
from varmeta.inference.marginal import Marginal, Points, Reference

_FAR = 1e4  # times a scale's start, where its density must fall
_FALLING = -0.1  # nats per nat: d log density / d log scale
_APART = 0.1  # standard deviations: two modes
_SHARE = 0.01  # of a posterior, from which on it is said


def require_proper(belief: Belief, marginal: Marginal, known: Reference) -> None:
    """Raise a ValueError where a flat law of the scales leaves the posterior improper.

    As a scale grows Σ_i log p(D_i | ψ) falls by one for each task and coordinate of its module that
    the data determine; a flat law of σ adds one, a flat θ0 one for each coordinate.
    """
    prior = belief.meta.origin
    if prior.hyperprior is not None and prior.hyperprior.scale_law != "flat":
        return
    modules = len(prior.log_scale)
    raw = belief.raw.repeat(modules, 1)
    for m, place in enumerate(belief.scales.tolist()):
        raw[m, place] += math.log(_FAR)
    points = belief.points(raw)
    found = marginal.total(points, known, gradient=True)
    assert found.gradient is not None
    _, before = belief.log_prob_and_gradient(raw)
    slopes = (found.gradient.log_scale + before[:, belief.scales]).diagonal()
    if prior.hyperprior is None:
        slopes = slopes + prior.groups.bincount(minlength=modules)
    bad = (slopes > _FALLING).nonzero()[:, 0].tolist()
    if bad:
        name = prior.modules.names[bad[0]]
        raise ValueError(
            f"hyperprior is flat in the scales, and {len(marginal.tasks)} tasks do not bound the "
            f"scale of {name!r} from above: the posterior is improper. Build the prior with "
            "scale_law='half-normal' (or 'half-cauchy'), or give more tasks"
        )


@dataclass(frozen=True, eq=False)
class Rivals:
    """Other modes of tasks than those that are followed.

    Attributes:
        share: `[T]`, the largest share of a task's posterior that is around another mode.
        better: `[T]` bool, another one has more of it, for the first ψ.
        theta: `[T, D]`, the best one found for the first ψ.
        unsolved: `[T]`, for what share of the ψ the followed mode was not found.
    """

    share: Tensor
    better: Tensor
    theta: Tensor
    unsolved: Tensor


def rivals(
    marginal: Marginal, points: Points, known: Reference, noise: torch.Generator, starts: int
) -> Rivals:
    """Modes that are found from θ0 and from `starts` − 1 draws of the prior.

    Args:
        marginal: of T tasks.
        points: S values of ψ.
        known: from which the followed modes are sought.
        noise: of the starts.
        starts: for each task and ψ.
    """
    like: dict[str, Any] = {"dtype": points.loc.dtype, "device": points.loc.device}
    share, unsolved = (torch.zeros(len(known.theta), **like) for _ in range(2))
    best, theta = torch.zeros_like(share), known.theta.clone()
    for block in marginal.blocks(points, known):
        inner, index = block.inner, block.part.index
        failed = (~inner.converged | inner.indefinite).to(share)
        unsolved[index] += failed.sum(0) / len(points)
        for k in range(starts):
            z = torch.zeros_like(inner.z)
            if k:
                z = torch.randn(z.shape, generator=noise, **like)
            other = marginal.solve(block.part, block.points, z)
            offset = inner.root.mT @ (other.z - inner.z)[..., None]
            apart = (offset.norm(dim=(-2, -1)) > _APART) & other.converged & ~other.indefinite
            gain = torch.where(apart, other.log_evidence - inner.log_evidence, -torch.inf)
            share[index] = torch.maximum(share[index], gain.sigmoid().amax(0))
            if block.draws.start == 0:
                more = gain[0] > best[index] + 1e-3
                best[index] = torch.where(more, gain[0], best[index])
                there = block.points.loc[0] + block.points.scale[0] * other.z[0]
                theta[index] = torch.where(more[:, None], there, theta[index])
    return Rivals(share, best > 0, theta, unsolved)


def warn_of_modes(name: str, tasks: tuple[str, ...], unsolved: Tensor, share: Tensor) -> None:
    """Name the tasks whose mode was not found, or is not the only one."""
    said = []
    if bool((unsolved > _SHARE).any()):
        said.append(
            f"the mode of {_some(unsolved > _SHARE, tasks)} was not found for more than 1% of the "
            "draws of θ0, scales and φ, so that their part of the evidence is not to be trusted: "
            "look for a kink in the model, or tighten its priors"
        )
    if bool((share > _SHARE).any()):
        said.append(
            f"the posterior of {_some(share > _SHARE, tasks)} has another mode with up to "
            f"{float(share.max()):.0%} of it, which is left out: use JointVariational or PyroNUTS "
            "to compare, or a model whose parameters cannot be exchanged"
        )
    if said:
        warnings.warn(f"{name}: {'; '.join(said)}", RuntimeWarning, stacklevel=3)


def _some(bad: Tensor, names: tuple[str, ...]) -> str:
    found = [repr(n) for n, yes in zip(names, bad.tolist(), strict=True) if yes]
    more = f" and {len(found) - 3} more" * (len(found) > 3)
    return f"{len(found)} of {len(names)} tasks ({', '.join(found[:3])}{more})"
