"""Whether every target can come from its law: the supports of the observed sites, task by task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from varmeta.models.gaps import without_gaps
from varmeta.models.laws import tensors_in
from varmeta.models.sites import reason
from varmeta.seeds import generator
from varmeta.tasks import Tasks

if TYPE_CHECKING:
    from varmeta.models.density import Density

_ROWS_AT_ONCE = 200_000
_WORDS = {
    constraints.boolean: "0 or 1",
    constraints.nonnegative_integer: "whole numbers from 0",
    constraints.positive_integer: "whole numbers from 1",
    constraints.unit_interval: "numbers from 0 to 1",
    constraints.positive: "positive numbers",
    constraints.nonnegative: "numbers from 0",
    constraints.simplex: "positive numbers that sum to 1",
    constraints.one_hot: "one 1 and else 0",
    constraints.real: "finite numbers",
}
_FORMS = {
    "IntegerInterval": "whole numbers from {lower_bound} to {upper_bound}",
    "IntegerGreaterThan": "whole numbers from {lower_bound}",
    "Interval": "numbers from {lower_bound} to {upper_bound}",
    "HalfOpenInterval": "numbers from {lower_bound} to below {upper_bound}",
    "GreaterThan": "numbers above {lower_bound}",
    "GreaterThanEq": "numbers from {lower_bound}",
    "LessThan": "numbers below {upper_bound}",
    "Multinomial": "counts that sum to {upper_bound}",
}


class FailedOnABatch(ValueError):
    """What a model raised on a batch of tasks; the cause says what."""


@contextmanager
def on_a_batch() -> Iterator[None]:
    """What the model raises within is said to have come from a batch of tasks."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise FailedOnABatch(f"model failed on a batch of tasks: {reason(error)}") from error


def check_targets(density: Density, tasks: Tasks) -> None:
    """Every existing row's targets against the laws that the model says, all tasks at once.

    A support that depends on data or constants (the total count of a binomial, say) is taken row by
    row. One that moves with a latent or a parameter says nothing before these are known, and is
    left to the likelihood, which is 0 outside it.

    Raises:
        ValueError: inputs or targets that are not finite, or a target outside its law's support,
            with task, row and value.
    """
    _check_finite(tasks)
    loc, scale = density.prior_loc, density.prior_scale
    phi, spread = density.shared_init, density.shared_scale
    here = _inside(density, loc, phi, tasks)
    if any(bounds for _, bounds in here.values()):
        noise = torch.randn(
            len(loc) + len(phi),
            generator=generator(0, device=loc.device),
            dtype=loc.dtype,
            device=loc.device,
        ).split([len(loc), len(phi)])
        there = _inside(density, loc + scale * noise[0], phi + spread * noise[1], tasks)
    else:
        there = here
    for name, (inside, bounds) in here.items():
        if all(torch.equal(a, b) for a, b in zip(bounds, there[name][1], strict=True)):
            bad = (~inside & tasks.mask).nonzero()
            if len(bad):
                task, row = bad[0].tolist()
                raise ValueError(_sentence(density, tasks, name, task, row, len(bad)))


def finite_tasks(tasks: Tasks) -> Tasks:
    """Those whose data are finite: of a stream's tasks the others may be skipped. All, if none."""
    good = torch.ones_like(tasks.mask[:, 0])
    for values in (tasks.inputs, tasks.targets):
        if values.is_floating_point():
            rows = _finite_rows(values, gaps=values is tasks.targets)
            good = good & (rows | ~tasks.mask).all(-1)
    return tasks if bool(good.all()) or not bool(good.any()) else tasks.select(good)


def _finite_rows(values: Tensor, gaps: bool) -> Tensor:
    """`[T, N, ...]` to `[T, N]` bool; with `gaps` some entries of a row may be NaN, but not all."""
    finite = values.isfinite().reshape(*values.shape[:2], -1)
    if not gaps:
        return finite.all(-1)
    missing = values.isnan().reshape(finite.shape)
    return (finite | missing).all(-1) & ~(missing.all(-1) & (values[0, 0].numel() > 0))


def _check_finite(tasks: Tasks) -> None:
    for name, values in (("x", tasks.inputs), ("y", tasks.targets)):
        if values.is_floating_point():
            bad = (~_finite_rows(values, gaps=name == "y") & tasks.mask).nonzero()
            if len(bad):
                also = ", or predict it: fit.predict(data)" if name == "y" else ""
                raise ValueError(
                    f"{tasks.place(*bad[0].tolist())}: {name} holds NaN or infinity "
                    f"({_count(len(bad))}); drop or fill that row{also}"
                )


def _inside(
    density: Density, theta: Tensor, shared: Tensor, tasks: Tasks
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """By observed site: `[T, N]`, whether a row's values are in the support, and its bounds.

    Where most rows are padding, tasks of like length at a time.
    """
    if tasks.buckets is not None:
        groups = [_inside(density, theta, shared, group) for group in tasks.buckets.groups]
        indices = tasks.buckets.order.split([len(group) for group in tasks.buckets.groups])
        out = {}
        for name in density.observed:
            inside, bounds = torch.ones_like(tasks.mask), list[Tensor]()
            for index, found in zip(indices, groups, strict=True):
                part, more = found[name]
                inside[index, : part.shape[1]] = part
                bounds += more
            out[name] = inside, bounds
        return out

    def one(x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, list[Tensor]]]:
        nodes = density._trace(theta, shared, x, y).nodes
        return {name: rows_inside(nodes[name], len(y)) for name in density.observed}

    size = max(1, _ROWS_AT_ONCE // tasks.mask.shape[1])
    with on_a_batch(), torch.no_grad():
        parts = [
            density._mapped(one, (0, 0))(x, y)
            for x, y in zip(tasks.inputs.split(size), tasks.targets.split(size), strict=True)
        ]
    return {
        name: (
            torch.cat([part[name][0] for part in parts]),
            [torch.cat(bound) for bound in zip(*(part[name][1] for part in parts), strict=True)],
        )
        for name in density.observed
    }


def rows_inside(node: Any, rows: int) -> tuple[Tensor, list[Tensor]]:
    """Of one task's observed site: `[rows]`, whether each is in the support; the support's bounds.

    True throughout where a law does not know its support.
    """
    law, value = node["fn"], node["value"]
    dims = law.event_dim
    value = without_gaps(law, value)
    inside = (
        value.isfinite() if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)
    )
    inside = inside.flatten(inside.dim() - dims).all(-1) if dims else inside
    bounds: list[Tensor] = []
    try:
        support = law.support
        exact = value.double() if _base(support) is constraints.simplex else value  # of many parts
        found = support.check(exact)
    except (NotImplementedError, AttributeError, ValueError):  # unknown, or a dependent one
        pass
    else:
        extra = dims - support.event_dim
        found = found.flatten(found.dim() - extra).all(-1) if extra > 0 else found
        bounds = [bound.to(value.device) for bound in tensors_in(support)]
        inside = inside & found
    seen = not_masked(node)
    if seen is not None:  # a row of which the model leaves out a part is its own affair
        seen = seen.flatten(seen.dim() - dims).all(-1) if dims else seen
        inside = inside | ~seen
    inside = inside.expand(*inside.shape[:-1], rows) if inside.dim() else inside.expand(rows)
    return inside.reshape(-1, rows).all(0), bounds


def not_masked(node: Any) -> Tensor | None:
    """Which entries of an observed site's value count, of the value's shape; None for all.

    The others the model itself leaves out: by `poutine.mask`, or by a law's own `mask`.
    """
    law, value = node["fn"], node["value"]
    masks = [(node.get("mask"), len(law.event_shape))]
    while law is not None:
        masks.append((vars(law).get("_mask"), len(law.event_shape)))
        law = vars(law).get("base_dist")
    seen = None
    for mask, dims in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device).bool()
            mask = mask.reshape(tuple(mask.shape) + (1,) * dims)
            seen = torch.ones_like(value).bool() & mask if seen is None else seen & mask
    return seen


def _base(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _sentence(density: Density, tasks: Tasks, name: str, task: int, row: int, count: int) -> str:
    x, y = tasks.inputs[task], tasks.targets[task]
    node = density._trace(density.prior_loc, density.shared_init, x, y).nodes[name]
    law, value = node["fn"], node["value"]
    shown = _row_of(value, row, law.event_dim)
    given = y[row].tolist()
    also = f", from the target {_short(given)}" if given != shown else ""
    while "base_dist" in vars(law) and not hasattr(law, "transforms"):
        law = law.base_dist
    if density.gaps and bool(y[row].isnan().any()):
        return (
            f"{tasks.place(task, row)}: the observed site {name!r} gets {_short(shown)}, and "
            f"{type(law).__name__} has one density for all entries ({_count(count)}). Fill the "
            "gaps, drop the row, or use a law for gaps: dist.NanMaskedMultivariateNormal, or one "
            "law for each entry with .to_event(1)"
        )
    return (
        f"{tasks.place(task, row)}: the observed site {name!r} gets {_short(shown)}{also}, and its "
        f"law, {type(law).__name__}, wants {_words(law, row)} ({_count(count)}). Mend or drop that "
        "row, or give the site a law that allows it"
    )


def _row_of(value: Tensor, row: int, event_dim: int) -> Any:
    dim = value.dim() - event_dim - 1
    return (value.select(dim, row) if dim >= 0 else value).tolist()


def _words(law: Any, row: int) -> str:
    base = _base(law.support)
    if base in _WORDS:
        return _WORDS[base]
    form = _FORMS.get(type(base).__name__.lstrip("_"), "")
    if not form:
        return f"values in {str(base).removesuffix('()')}"
    numbers = {}
    for key, bound in vars(base).items():
        if isinstance(bound, Tensor):
            bound = bound.select(-1, row) if bound.dim() and bound.shape[-1] > row else bound
            bound = bound.flatten()[0].item()
        numbers[key] = f"{bound:g}" if isinstance(bound, (int, float)) else bound
    return form.format(**numbers)


def _short(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _count(rows: int) -> str:
    return "this row alone" if rows == 1 else f"{rows} rows in all"
