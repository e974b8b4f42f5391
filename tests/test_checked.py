"""Nonsense in any setting is refused when it is made, in one sentence.

The settings are found by reflection, in every strategy and part of the package: a field that is
added without a check fails here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from catalogue import CATALOGUE

import varmeta as vm
from varmeta.checked import Checked, Within, check
from varmeta.seeds import generator

# Parts that cannot be made without arguments.
NEEDED: dict[str, dict[str, Any]] = {
    "GradientDescent": {"step_size": 0.1},
    "ProximalDescent": {"step_size": 0.1},
    "OneStep": {"step_size": 0.1},
    "Neumann": {"terms": 3, "step_size": 0.1},
    "Nystrom": {"rank": 2, "shift": 1.0},
    "Reset": {"every": 3},
}
RESULTS = {"density", "table", "names"}  # a dataclass with one of these is no setting
NONSENSE: list[Any] = [-3, float("nan"), float("inf"), "10", "laplac", [1, 2, 3], object()]


def settings() -> dict[str, type]:
    """Every public class of settings."""
    found = {name: getattr(vm, name) for name in vm.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        and not RESULTS & {f.name for f in dataclasses.fields(kind)}
        and kind not in (vm.Design, vm.FormulaModel, vm.GaussianPrior, vm.Modules, vm.Tasks)
    }


def options(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from options(part)
    else:
        yield hint


def fields() -> list[tuple[str, type, dataclasses.Field[Any], tuple[Any, ...]]]:
    return [
        (f"{name}.{f.name}", kind, f, tuple(options(get_type_hints(kind)[f.name])))
        for name, kind in settings().items()
        for f in dataclasses.fields(kind)
        if f.init and f.name != "guide"
    ]


every_field = pytest.mark.parametrize(
    ("name", "kind", "field", "hints"), fields(), ids=[entry[0] for entry in fields()]
)


def test_all_parts_of_the_catalogue_are_among_them() -> None:
    def parts(value: Any) -> Iterator[type]:
        if dataclasses.is_dataclass(value):
            yield type(value)
            for f in dataclasses.fields(value):
                yield from parts(getattr(value, f.name))

    used = {kind for entry in CATALOGUE.values() for kind in parts(entry.strategy)}
    assert used <= set(settings().values()) and len(fields()) > 200
    assert all(issubclass(kind, Checked) for kind in settings().values())


@every_field
def test_nonsense_is_refused(
    name: str, kind: type, field: dataclasses.Field[Any], hints: tuple[Any, ...]
) -> None:
    """With the field's name, what it got, and what was wanted; the choices where it is one."""
    nonsense = list(NONSENSE)
    if int in hints:
        nonsense += [2.5, True, -1]
        nonsense += [np.float64(2.0)]
    if float in hints:
        nonsense += [True, -0.5]
    if bool in hints:
        nonsense += [1, 0, "yes"]
    for value in nonsense:
        with pytest.raises(ValueError, match=rf"^{field.name} must be .*, got ") as caught:
            kind(**{**NEEDED.get(kind.__name__, {}), field.name: value})
        said = str(caught.value)
        assert "\n" not in said and len(said) < 400
        for hint in hints:
            if get_origin(hint) is Literal:
                assert all(repr(choice) in said for choice in get_args(hint))


@every_field
def test_what_a_field_has_by_itself_is_accepted(
    name: str, kind: type, field: dataclasses.Field[Any], hints: tuple[Any, ...]
) -> None:
    made = kind(**NEEDED.get(kind.__name__, {}))
    dataclasses.replace(made)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vm.IMAML(steps=-3), "steps must be a whole number of at least 1, got -3"),
        (lambda: vm.IMAML(steps=2.5), "steps must be a whole number of at least 1, got 2.5"),
        (lambda: vm.IMAML(learning_rate=-1.0), "learning_rate must be positive and finite, got -1"),
        (lambda: vm.IMAML(tolerance=float("nan")), "tolerance must be .* or None, got nan"),
        (lambda: vm.IMAML(posterior_kind="laplac"), "'laplac'; did you mean 'laplace'?"),
        (lambda: vm.IMAML(minimiser="newton"), "minimiser must be a Minimiser, got 'newton'"),
        (lambda: vm.IMAML(minimiser=vm.NewtonCG), r"got the class NewtonCG; write NewtonCG\(\)"),
        (lambda: vm.JointVariational(q="ful"), "q must be one of .*; did you mean 'full'?"),
        (lambda: vm.JointVariational(samples=0), "samples must be a whole number of at least 2"),
        (lambda: vm.PyroNUTS(target_accept=0), "target_accept must be above 0 and below 1, got 0"),
        (lambda: vm.PyroNUTS(target_accept=1), "target_accept must be above 0 and below 1, got 1"),
        (lambda: vm.PyroNUTS(target_accept=2), "target_accept must be above 0 and below 1, got 2"),
        (lambda: vm.Langevin(temperature=[1.0, -1.0], run_length=2), "temperature must be "),
        (lambda: vm.Adam(betas=(0.9, 1.0)), "betas must be a pair of numbers, each at least 0 and"),
        (
            lambda: vm.Diagonal(seed=2**64),
            "seed must be a whole number from 0 to 1844674407",
        ),
    ],
)
def test_what_is_said(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        make()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_a_seed_is_a_whole_number_of_64_bits(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 184"):
        generator(seed)
    generator(2**64 - 1)
    generator(np.int64(3))  # type: ignore[arg-type]


def test_a_range_says_what_lies_in_it() -> None:
    assert 0.5 in Within(0, 1) and 1 in Within(0, 1) and 1 not in Within(0, 1, below=True)
    assert 0 not in Within(0, above=True) and float("inf") not in Within(0)
    check("x", torch.ones(2), torch.Tensor)
    with pytest.raises(ValueError, match="x must be a Tensor, got 'a'"):
        check("x", "a", torch.Tensor)
