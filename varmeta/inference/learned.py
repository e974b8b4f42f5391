"""What is learned across tasks as one vector: its objective, its units, its names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varmeta.inference.base import Meta, StepInfo

EXACT, NOISY = 0.01, 0.2  # standard errors: default tolerances without noise and with it
_STREAM = 100  # tasks whose information sets the units where there is no end of them

Evaluate = Callable[[], "Evaluated"]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The objective and its gradient at the learned values as they stand.

    Attributes:
        info: loss (nats per task), gradient evaluations and diagnostics, as of a step.
        grads: d loss / d each leaf of `Meta`.
        keep: what a state's tensors of these names become if the point is kept.
    """

    info: StepInfo
    grads: list[Tensor]
    keep: dict[str, Tensor] = field(default_factory=dict)


def learned(meta: Meta) -> dict[str, Tensor]:
    """What of `meta.raw` is learned by gradients."""
    return {name: tensor for name, tensor in meta.raw.items() if tensor.requires_grad}


def units(meta: Meta, total: float, raw: Mapping[str, Tensor] | None = None) -> Tensor:
    """About one standard error of each learned number, in units of `meta.raw`, `[n]`.

    σ/√T for θ0 (and the low-rank factor), 1/√(2 T n_m) for the log scale of n_m coordinates, 1/√T
    units of its prior for φ: what T tasks would leave open if each showed its θ_i. `raw`: of which
    parts of `meta.raw`; those with a gradient if None.
    """
    tasks = total if math.isfinite(total) else _STREAM
    with torch.no_grad():
        prior, origin = meta.prior, meta.origin
        width = prior.scale / origin.scale
        if prior.factor is not None:
            width = (prior.scale**2 + prior.factor.square().sum(-1)).sqrt() / origin.scale
        width = width.clamp(min=1e-12)
        sizes = prior.groups.bincount(minlength=len(prior.log_scale))
        own = {
            "loc": width,
            "log_scale": (2.0 * sizes.clamp(min=1)).to(width).rsqrt(),
            "factor": None if prior.factor is None else width[:, None].expand_as(prior.factor),
        }
        parts = []
        for name, tensor in (learned(meta) if raw is None else raw).items():
            unit = own.get(name)
            unit = torch.ones_like(tensor) if unit is None else unit
            parts.append(unit.reshape(-1).detach())
        return torch.cat(parts) / math.sqrt(tasks)


def names(meta: Meta) -> list[str]:
    """What each learned number is: `loc[slope]`, `log_scale[slope]`, `shared[noise]`, …."""
    density, out = meta.density, list[str]()
    sites = [
        s.name if s.size == 1 else f"{s.name}.{k}" for s in density.sites for k in range(s.size)
    ]
    shared = [
        s.name if s.size == 1 else f"{s.name}.{k}"
        for s in density.shared_sites
        for k in range(s.size)
    ]
    if "effects" in meta.raw:  # what is integrated out is not learned
        apart = set(density.effects.tolist())
        shared = [label for k, label in enumerate(shared) if k not in apart]
    known = {"loc": sites, "log_scale": list(meta.origin.modules.names), "shared": shared}
    for name, tensor in learned(meta).items():
        labels = known.get(name)
        if labels is None or len(labels) != tensor.numel():
            labels = [str(k) for k in range(tensor.numel())]
        out += [f"{name}[{label}]" for label in labels]
    return out


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector, `[n]`."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def put(meta: Meta, values: Tensor) -> None:
    """Set what is learned to `values` `[n]`."""
    leaves = meta.leaves()
    with torch.no_grad():
        for leaf, part in zip(leaves, values.split([t.numel() for t in leaves]), strict=True):
            leaf.copy_(part.reshape(leaf.shape))
