"""Laws taken apart: what a distribution was given, so that one is built for all tasks at once.

Within `torch.vmap` a distribution holds one task's tensors. Some cannot be drawn from there (their
samplers write in place or loop until a draw is accepted), and some cannot be asked for a density
(they index by booleans or look at values). Taken apart, such a law leaves `vmap` as tensors, and is
built again outside with the tasks and draws as leading dimensions of its batch shape.

A law is what its constructor was given; arguments are looked up by name. So it is for the classes
of Pyro and PyTorch alone: a user's own class may change what it is given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transforms

from varmeta.seeds import OwnDraws

Build = Callable[[Iterator[Tensor]], Any]

_HOMES = ("torch.distributions.", "pyro.distributions.")
_PLAIN = (int, float, bool, str, tuple, type(None))
# Of arguments that say the same in several ways, the first that the law has kept is used.
_INSTEAD = (
    ("scale_tril", "covariance_matrix", "precision_matrix"),
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("correlation", "weighted_correlation"),
)
# Dimensions of an argument's event, where `arg_constraints` do not say it, or say another number.
_EVENT_DIMS: dict[str, dict[str, int]] = {
    "LogisticNormal": {"loc": 1, "scale": 1},
    "MixtureOfDiagNormals": {"locs": 2, "coord_scale": 2, "component_logits": 1},
    "MixtureOfDiagNormalsSharedCovariance": {"locs": 2, "coord_scale": 1, "component_logits": 1},
    "CoalescentTimes": {"leaf_times": 1},
    "CoalescentTimesWithRate": {"leaf_times": 1, "rate_grid": 1},
    "VonMises3D": {"concentration": 1},
    "RelaxedBernoulli": {"temperature": 0},
    "RelaxedBernoulliStraightThrough": {"temperature": 0},
    "RelaxedOneHotCategorical": {"temperature": 1},
    "RelaxedOneHotCategoricalStraightThrough": {"temperature": 1},
    "DiscreteHMM": {"initial_logits": 1, "transition_logits": 3},
    "MaskedMixture": {"mask": 0},
    "MaskedDistribution": {"mask": 0},
}


class NotApart(RuntimeError):
    """A law that cannot be taken apart, or not be built again for all tasks."""


def take_apart(law: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor], Sequence[int]], Any]]:
    """A law's tensors, and how to build it from such tensors with more leading dimensions.

    `build(tensors, lead)` returns the law with batch shape `[*lead, *batch]`. Every tensor has the
    leading dimensions `lead` in front of those of the one that it stands for.

    Raises:
        NotApart: a class of the user's own, or one that does not keep what it was given.
    """
    if not isinstance(law, torch.distributions.Distribution):
        raise NotApart(f"{type(law).__name__} is not a distribution of tensors")  # a plate's rows
    tensors: list[Tensor] = []
    inner = _apart(law, len(law.batch_shape), tensors)
    shape, event = tuple(law.batch_shape), law.event_shape

    def build(given: Sequence[Tensor], lead: Sequence[int]) -> Any:
        built, wanted = inner(iter(given)), torch.Size((*lead, *shape))
        if built.batch_shape != wanted:
            built = built.expand(wanted)
        if built.batch_shape != wanted or built.event_shape != event:
            raise NotApart(f"{type(law).__name__} cannot be built for all tasks at once")
        return built

    return tensors, build


def _apart(law: Any, dims: int, out: list[Tensor]) -> Build:
    """Add the law's tensors to `out`, padded to `dims` batch dimensions, and say how to build it.

    `dims` are those of the law, or more, as it is about to be expanded to more.
    """
    kind = type(law)
    if not f"{kind.__module__}.".startswith(_HOMES):
        raise NotApart(f"{kind.__name__} is a class of the user's own")
    if kind.__name__ == "ExpandedDistribution":
        more = tuple(law.batch_shape)
        base = _apart(law.base_dist, dims, out)
        return lambda given: _expanded(base(given), more)
    if kind.__name__ == "Independent":
        count = law.reinterpreted_batch_ndims
        base = _apart(law.base_dist, dims + count, out)
        return lambda given: kind(base(given), count, validate_args=False)
    if kind.__name__ == "TransformedDistribution":
        size = len(law.base_dist.batch_shape) - len(law.batch_shape)
        base = _apart(law.base_dist, dims + size, out)
        value = dims + max(len(law.event_shape), size + len(law.base_dist.event_shape))
        parts = [_transform(t, value, out) for t in law.transforms]
        return lambda given: kind(base(given), [t(given) for t in parts], validate_args=False)
    if kind.__name__ == "MixtureSameFamily":
        weights = _apart(law._mixture_distribution, dims, out)
        component = _apart(law._component_distribution, dims + 1, out)
        return lambda given: _mixture(kind, weights(given), component(given))
    if kind.__name__ == "Delta":
        count = len(law.event_shape)
        out += [padded(law.v, dims + count), padded(law.log_density, dims)]
        return lambda given: _delta(next(given), next(given), count)
    return _from_arguments(law, dims, out)


def _from_arguments(law: Any, dims: int, out: list[Tensor]) -> Build:
    kind: Any = type(law)
    events = _events(law)
    names = _arguments(kind)
    for same in _INSTEAD:
        have = [n for n in same if n in names]
        kept = next((n for n in have if n in vars(law) or f"_unbroadcasted_{n}" in vars(law)), None)
        kept = kept or next(iter(have), None)
        names = [n for n in names if n not in have or n == kept]
    static: dict[str, Any] = {}
    moving: dict[str, Build] = {}
    for name in names:
        value = _kept(law, name)
        if isinstance(value, Tensor):
            if name not in events:
                raise NotApart(f"{kind.__name__} does not say of what shape {name} is")
            out.append(padded(value, dims + events[name]))
            moving[name] = next
        elif isinstance(value, torch.distributions.Distribution):
            more = len(value.batch_shape) - len(law.batch_shape)
            moving[name] = _apart(value, dims + max(more, 0), out)
        elif isinstance(value, _PLAIN):
            static[name] = value
        else:
            raise NotApart(f"{kind.__name__} was given a {type(value).__name__} as {name}")
    if _checks(kind):
        static["validate_args"] = False
    return lambda given: kind(**{name: part(given) for name, part in moving.items()}, **static)


def _transform(transform: Any, dims: int, out: list[Tensor]) -> Build:
    """As `_apart`, of a transform of values with `dims` dimensions, batch and event together."""
    kind = type(transform)
    if isinstance(transform, transforms.ComposeTransform):
        parts = [_transform(part, dims, out) for part in transform.parts]
        return lambda given: transforms.ComposeTransform([part(given) for part in parts])
    if isinstance(transform, transforms.IndependentTransform):
        base, count = (
            _transform(transform.base_transform, dims, out),
            transform.reinterpreted_batch_ndims,
        )
        return lambda given: transforms.IndependentTransform(base(given), count)
    if isinstance(transform, transforms._InverseTransform):
        forward = _transform(transform.inv, dims, out)
        return lambda given: forward(given).inv
    names = {"AffineTransform": ("loc", "scale"), "PowerTransform": ("exponent",)}.get(
        kind.__name__, ()
    )
    values = {name: getattr(transform, name) for name in names}
    moving = [name for name, value in values.items() if isinstance(value, Tensor)]
    if any(isinstance(v, Tensor) for n, v in vars(transform).items() if n not in values) or (
        isinstance(transform, torch.nn.Module)
    ):
        raise NotApart(f"{kind.__name__} holds tensors")
    if not moving:
        return lambda given: transform
    if kind.__name__ == "AffineTransform":
        values["event_dim"] = transform.event_dim
    out += [padded(values.pop(name), dims) for name in moving]
    return lambda given: kind(**{name: next(given) for name in moving}, **values)


@cache
def _arguments(kind: Any) -> list[str]:
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    if any(n in names for n in ("args", "kwargs")):
        raise NotApart(f"{kind.__name__} does not say what it is given")
    return [n for n in names if n != "validate_args"]


@cache
def _checks(kind: Any) -> bool:
    return "validate_args" in inspect.signature(kind.__init__).parameters


def _events(law: Any) -> dict[str, int]:
    """Event dimensions of the law's arguments."""
    known = {}
    for name, constraint in law.arg_constraints.items():
        try:
            known[name] = constraint.event_dim
        except NotImplementedError:  # it depends
            continue
    return known | _EVENT_DIMS.get(type(law).__name__, {})


def _kept(law: Any, name: str) -> Any:
    """The argument as the law has kept it: the value that it was given, or a property of it."""
    for key in (f"_unbroadcasted_{name}", name, f"_{name}"):
        if key in vars(law):
            return vars(law)[key]
    try:
        return getattr(law, name)
    except AttributeError:
        raise NotApart(f"{type(law).__name__} does not keep its {name}") from None


def padded(tensor: Tensor, dims: int) -> Tensor:
    """With dimensions of size 1 in front, so that `dims` are there."""
    return tensor.reshape((1,) * (dims - tensor.dim()) + tuple(tensor.shape))


def _expanded(law: Any, batch_shape: tuple[int, ...]) -> Any:
    """To `batch_shape` behind its leading dimensions."""
    lead = tuple(law.batch_shape[: len(law.batch_shape) - len(batch_shape)])
    return law.expand(torch.Size((*lead, *batch_shape)))


def _mixture(kind: Any, weights: Any, component: Any) -> Any:
    """It draws one component for each of the weights' batch."""
    return kind(weights.expand(component.batch_shape[:-1]), component, validate_args=False)


def _delta(value: Tensor, log_density: Tensor, event_dim: int) -> Any:
    shape = value.shape[: value.dim() - event_dim]
    return dist.Delta(value, log_density.expand(shape), event_dim, validate_args=False)


class _Draw(torch.autograd.Function):
    """A draw from a law that is taken apart; within `vmap`, one from the law of all tasks."""

    @staticmethod
    def forward(make: Any, lead: tuple[int, ...], anchor: Tensor, *tensors: Tensor) -> Tensor:
        value: Tensor = make(tensors, lead)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, make: Any, lead: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, int]:
        front = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims[2:], strict=True)
        ]
        return _Draw.apply(make, (info.batch_size, *lead), *front), 0


def draw(anchor: Tensor, own: OwnDraws, law: Any) -> Tensor:
    """One draw, independent for each task within `vmap`.

    Args:
        anchor: any tensor that `vmap` batches at all of its levels, as a law may have none.
        own: where random numbers come from.
        law: of one task.

    Raises:
        NotImplementedError: the law cannot be drawn from.
    """
    try:
        tensors, build = take_apart(law)
    except NotApart:
        return draw_here(law)  # which vmap can batch for many a law

    def make(tensors: Sequence[Tensor], lead: Sequence[int]) -> Tensor:
        with copy.copy(own):  # no mode is at work within an autograd.Function, nor enters twice
            value: Tensor = build(tensors, lead).sample()
        return value

    given = [t.detach() for t in (anchor[:0], *tensors)]
    try:
        value: Tensor = _Draw.apply(make, (), *given)
    except NotImplementedError as error:
        raise _no_sampler(law) from error
    return value


def draw_here(law: Any) -> Tensor:
    """One draw as the law makes it.

    Raises:
        NotImplementedError: the law cannot be drawn from.
    """
    try:
        value: Tensor = law.sample()
    except NotImplementedError as error:
        raise _no_sampler(law) from error
    return value


def _no_sampler(law: Any) -> NotImplementedError:
    while type(law).__name__ in ("ExpandedDistribution", "Independent", "MaskedDistribution"):
        law = law.base_dist
    return NotImplementedError(f"{type(law).__name__} has no sampler")
