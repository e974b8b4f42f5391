"""Where a prior lies on the unconstrained scale and how wide it is there, in closed form.

What a law is on that scale is known for most of those in use: the log of a log-normal is normal;
that of a gamma has moments ψ(a) and ψ′(a); the logit of a beta has ψ(a) − ψ(b) and ψ′(a) + ψ′(b),
which also holds for the sticks of a Dirichlet and the partial correlations of an LKJ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transforms as t

Moments = tuple[Tensor, Tensor]
_GAMMA = 0.5772156649015329  # Euler's
_WRAPPERS = ("Independent", "ExpandedDistribution", "MaskedDistribution")


def unconstrained_moments(law: Any, transform: Any) -> Moments | None:
    """Mean and standard deviation of `transform.inv(X)`, X ~ law, in float64.

    They broadcast to the unconstrained value's shape. None where no closed form is known, or where
    there is none (a Cauchy).
    """
    steps, found = _shortened(_flat(transform.inv)), None
    while found is None:
        if type(law).__name__ not in _WRAPPERS:
            found = _through(law, steps)
            if found is not None or not hasattr(law, "transforms"):
                break
            steps = _shortened([*(p for step in law.transforms for p in _flat(step)), *steps])
        if not hasattr(law, "base_dist"):
            break
        law = law.base_dist
    if found is None:
        return None
    mean, sd = found
    fine = mean.isfinite().all() and (sd.isfinite() & (sd > 0)).all()
    return (mean.detach(), sd.detach()) if bool(fine) else None


def unconstrained_range(law: Any, transform: Any) -> Moments | None:
    """Median and half the central 68% range of `transform.inv(X)`; None without exact quantiles."""
    while type(law).__name__ in _WRAPPERS:
        law = law.base_dist
    if len(law.event_shape):
        return None
    while isinstance(transform, t.IndependentTransform):
        transform = transform.base_transform
    if transform.domain.event_dim:
        return None
    q = torch.tensor([0.158655254, 0.5, 0.841344746]).reshape(3, *[1] * len(law.batch_shape))
    try:
        low, mid, high = transform.inv(law.icdf(q)).detach().double().sort(dim=0).values
    except NotImplementedError:
        return None
    width = 0.5 * (high - low)
    return (mid, width) if bool((width.isfinite() & (width > 0)).all()) else None


def _through(law: Any, steps: list[Any]) -> Moments | None:
    """Of a law after some steps, none of which undoes the one before."""
    name, kinds = type(law).__name__, [_kind(step) for step in steps]
    if all(kind == "affine" for kind in kinds):
        return _linear(_own(law), steps)
    if kinds == ["stick"] and name == "Dirichlet":
        return _sticks(_wide(law.concentration))
    if kinds == ["correlation"] and name == "LKJCholesky":
        return _partial_correlations(law)
    if kinds[-1] == "logit" and all(kind == "affine" for kind in kinds[:-1]):
        if name == "Uniform":
            low, high = _ends(law, steps[:-1])
            if bool((low.abs() < 1e-6).all() and ((high - 1).abs() < 1e-6).all()):
                return torch.zeros_like(low), torch.full_like(low, math.pi / 3**0.5)
        if name == "Beta" and len(steps) == 1:
            return _logit(_wide(law.concentration1), _wide(law.concentration0))
        return None
    if name == "Pareto" and kinds == ["affine", "log"]:  # less its least value, a beta prime
        mean, sd = _logit(torch.ones_like(_wide(law.alpha)), _wide(law.alpha))
        return mean + _wide(law.scale).log(), sd
    if kinds[-1] == "log" and name in _LOG:
        return _log(_LOG[name](law), steps[:-1])
    return None


# -- laws ------------------------------------------------------------------------------------------


def _own(law: Any) -> Moments | None:
    try:
        return _wide(law.mean), _wide(law.stddev)
    except NotImplementedError:
        return None


def _logit(a: Tensor, b: Tensor) -> Moments:
    """Of log X/(1 − X), X ~ Beta(a, b)."""
    return a.digamma() - b.digamma(), (_trigamma(a) + _trigamma(b)).sqrt()


def _sticks(a: Tensor) -> Moments:
    """Of a Dirichlet by stick-breaking: what is broken off the rest is Beta(a_k, Σ_{j>k} a_j)."""
    rest = a.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    mean, sd = _logit(a[..., :-1], rest)
    left = torch.arange(rest.shape[-1], 0, -1, dtype=a.dtype, device=a.device)
    return mean + left.log(), sd


def _partial_correlations(law: Any) -> Moments:
    """Of an LKJ's factor: those of column k are 2 Beta(b, b) − 1 with b = η + (d − 2 − k)/2."""
    eta, column = _wide(law.concentration), torch.tril_indices(law.dim, law.dim, -1)[1]
    b = eta[..., None] + 0.5 * (law.dim - 2 - column.to(eta))
    mean, sd = _logit(b, b)
    return mean, 0.5 * sd


def _gamma(a: Tensor, rate: Tensor) -> Moments:
    return a.digamma() - rate.log(), _trigamma(a).sqrt()


def _negative(moments: Moments) -> Moments:
    return -moments[0], moments[1]


def _constant(centre: Tensor, shift: float, sd: float) -> Moments:
    return centre.log() + shift, torch.full_like(centre, sd)


def _fisher(law: Any) -> Moments:
    a, b = 0.5 * _wide(law.df1), 0.5 * _wide(law.df2)
    mean, sd = _logit(a, b)
    return mean + b.log() - a.log(), sd


def _weibull(law: Any) -> Moments:
    k = _wide(law.concentration)
    return _wide(law.scale).log() - _GAMMA / k, math.pi / (6**0.5 * k)


def _uniform_log(law: Any) -> Moments:
    """Of a uniform from 0."""
    low, high = _wide(law.low), _wide(law.high)
    return torch.where(low == 0, high.log() - 1, math.nan), torch.ones_like(high)


_LOG: dict[str, Callable[[Any], Moments]] = {  # of log X
    "HalfNormal": lambda law: _constant(
        _wide(law.scale), -0.5 * (_GAMMA + math.log(2)), math.pi / 8**0.5
    ),
    "HalfCauchy": lambda law: _constant(_wide(law.scale), 0.0, math.pi / 2),
    "Exponential": lambda law: _constant(1 / _wide(law.rate), -_GAMMA, math.pi / 6**0.5),
    "Gamma": lambda law: _gamma(_wide(law.concentration), _wide(law.rate)),
    "Chi2": lambda law: _gamma(_wide(law.concentration), _wide(law.rate)),
    "InverseGamma": lambda law: _negative(_gamma(_wide(law.concentration), _wide(law.rate))),
    "FisherSnedecor": _fisher,
    "Weibull": _weibull,
    "Uniform": _uniform_log,
}


# -- transforms ------------------------------------------------------------------------------------


def _flat(transform: Any) -> list[Any]:
    """Its parts, in order, wrappers looked through."""
    if isinstance(transform, t.ComposeTransform):
        return [part for step in transform.parts for part in _flat(step)]
    if isinstance(transform, t.IndependentTransform):
        return _flat(transform.base_transform)
    if isinstance(transform, t._InverseTransform):
        inner = transform.inv
        if isinstance(inner, (t.ComposeTransform, t.IndependentTransform)):
            return [part.inv for part in reversed(_flat(inner))]
    return [] if transform == t.identity_transform else [transform]


_NOTHING = (t.AffineTransform(0.0, 1.0), t.AffineTransform(0.0, 1.0).inv)


def _shortened(steps: list[Any]) -> list[Any]:
    """Without steps that undo the one before."""
    out: list[Any] = []
    for step in steps:
        if isinstance(step, t.AffineTransform | t._InverseTransform) and step in _NOTHING:
            continue
        if out and out[-1].inv == step:
            out.pop()
        else:
            out.append(step)
    return out


def _kind(step: Any) -> str:
    inner = step.inv if isinstance(step, t._InverseTransform) else step
    if isinstance(inner, t.AffineTransform):
        return "affine"
    if isinstance(inner, t.PowerTransform):
        return "power"
    names = {t.ExpTransform: "log", t.SigmoidTransform: "logit"}
    names |= {t.StickBreakingTransform: "stick", t.CorrCholeskyTransform: "correlation"}
    return names.get(type(inner), "other") if inner is not step else "other"


def _linear(moments: Moments | None, steps: list[Any]) -> Moments | None:
    if moments is None:
        return None
    mean, sd = moments
    for step in steps:
        at_zero = _wide(step(torch.zeros_like(mean)))
        sd = sd * (_wide(step(torch.ones_like(mean))) - at_zero).abs()
        mean = _wide(step(mean))
    return mean, sd


def _ends(law: Any, steps: list[Any]) -> Moments:
    low, high = _wide(law.low), _wide(law.high)
    for step in steps:
        low, high = _wide(step(low)), _wide(step(high))
    return low, high


def _log(moments: Moments, steps: list[Any]) -> Moments | None:
    """Of log X from those of log X₀, where X is X₀ scaled and raised to powers."""
    mean, sd = moments
    for step in steps:
        inner = step.inv if isinstance(step, t._InverseTransform) else step
        if isinstance(inner, t.PowerTransform):
            power = _wide(inner.exponent)
            power = power if inner is step else 1 / power
            mean, sd = power * mean, power.abs() * sd
        elif isinstance(inner, t.AffineTransform) and not bool(torch.as_tensor(inner.loc).any()):
            factor = _wide(inner.scale)
            mean = mean + (factor.log() if inner is step else -factor.log())
        else:
            return None
    return mean, sd


def _wide(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().double()


def _trigamma(x: Tensor) -> Tensor:
    return torch.polygamma(1, x)
