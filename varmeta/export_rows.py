"""What an export says of rows: predictions, log densities and deterministic sites, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from varmeta import parts
from varmeta.models.density import Density
from varmeta.models.observed import Observed, derived_sites
from varmeta.tasks import Tasks


def by_row(
    values: Iterable[tuple[parts.Part, Mapping[str, Tensor]]], rows: Tasks
) -> dict[str, Tensor]:
    """`[S, t, n, ...]` of parts, as `[S, rows, ...]` of the rows that exist, task after task."""
    place = rows.mask.flatten().cumsum(0).reshape(rows.mask.shape) - 1
    out: dict[str, Tensor] = {}
    for part, found in values:
        where = place[part.places]
        for name, value in found.items():
            shape = (len(value), int(rows.mask.sum()), *value.shape[3:])
            out.setdefault(name, value.new_empty(shape))[:, where] = value[:, part.tasks.mask]
    return out


def log_likelihoods(
    density: Density, theta: Tensor, rows: Tasks, shared: Tensor
) -> dict[str, Tensor]:
    """Of each observed site, and of several their sum; `[S, rows]`, or `[S, T]` of joint rows."""
    sites: dict[str, str | None] = {name: name for name in density.observed}
    total = rows.target_name if rows.target_name not in sites else "total"
    sites = {total: None, **sites} if len(sites) > 1 else dict.fromkeys(sites)
    if density.joint:
        totals = parts.total_log_likelihood
        return {n: totals(density, theta, rows, shared, site) for n, site in sites.items()}
    found: dict[str, Tensor] = {}
    for name, site in sites.items():
        each = parts.log_likelihood(density, theta, rows, shared, site)
        found |= by_row(((part, {name: value}) for part, value in each), rows)
    return found


def derived(
    density: Density, theta: Tensor, rows: Tasks, shared: Tensor
) -> dict[str, tuple[str, Tensor]]:
    """Deterministic sites, each with the dimension behind those of draws, `"row"` or `"task"`."""
    kinds = derived_sites(density, rows)
    each, by_task = [], dict[str, Tensor]()
    for part, found in parts.derived(density, kinds, theta, rows, shared):
        each.append((part, {n: v for n, v in found.items() if kinds[n] is not None}))
        for name, value in ((n, v) for n, v in found.items() if kinds[n] is None):
            shape = (len(value), len(rows), *value.shape[2:])
            by_task.setdefault(name, value.new_empty(shape))[:, part.index] = value
    out = {name: ("row", value) for name, value in by_row(each, rows).items()}
    return out | {name: ("task", value) for name, value in by_task.items()}


def counted(site: Observed) -> Tensor:
    """An observed site's value, NaN where it does not count."""
    if bool(site.seen.all()):
        return site.value
    value = site.value if site.value.is_floating_point() else site.value.double()
    return value.where(site.seen, torch.nan)
