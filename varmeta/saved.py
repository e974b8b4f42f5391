"""Saved: what a fit is made of beside what it learned, as plain containers, and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyro.infer import autoguide

from varmeta.checked import Checked
from varmeta.design import KINDS
from varmeta.fingerprint import Fingerprint, differences, fingerprint_of_model, in_words
from varmeta.inference.base import Strategy
from varmeta.models.density import Density
from varmeta.models.hyperprior import Hyperprior
from varmeta.models.prior import GaussianPrior
from varmeta.models.sites import Model
from varmeta.packing import packed, unpacked
from varmeta.tasks import Tasks, TaskSource

_DATA = KINDS | {kind.__name__: kind for kind in (Tasks, GaussianPrior, Hyperprior)}


def packed_data(
    density: Density, tasks: Tasks | TaskSource, prior: GaussianPrior, batch_size: int | None = None
) -> dict[str, Any]:
    """Tasks, sites and the prior at the start. A stream's tasks are left out."""
    sites = [
        {"name": s.name, "role": s.role, "loc": s.loc, "scale": s.scale}
        for s in (*density.sites, *density.shared_sites)
    ]
    return {
        "tasks": None if isinstance(tasks, TaskSource) else packed(tasks, _DATA),
        "prior": packed(prior, _DATA),
        "sites": sites,
        "compiled": density._compiled,
        "batch_size": batch_size,
    }


def packed_strategy(strategy: Strategy) -> Any:
    """Its settings; None where they are more than numbers, texts and varmeta's own parts."""
    try:
        return packed(strategy, _settings())
    except TypeError:
        return None


def strategy_from(saved: Any, called: str) -> Strategy:
    """The strategy of `packed_strategy`.

    Raises:
        ValueError: nothing was saved of it, or settings that this version does not have.
    """
    remedy = "give it by strategy=, as it was"
    if saved is None:
        raise ValueError(
            f"the settings of {called} hold code of your own, which is not saved; {remedy}"
        )
    try:
        found = unpacked(saved, _settings())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the settings of {called} are those of another version of varmeta ({error}); {remedy}"
        ) from None
    assert isinstance(found, Strategy)
    return found


def tasks_from(data: Mapping[str, Any], given: Tasks | TaskSource | None) -> Tasks | TaskSource:
    """The training tasks.

    Raises:
        ValueError: those of a stream, which are not saved.
    """
    if given is not None:
        return given
    if data["tasks"] is None:
        raise ValueError("the fit learned from a stream, which is not saved; give it by tasks=")
    found: Tasks = unpacked(data["tasks"], _DATA)
    return found


def prior_from(data: Mapping[str, Any]) -> GaussianPrior:
    """Where learning started."""
    found: GaussianPrior = unpacked(data["prior"], _DATA)
    return found


def density_from(
    data: Mapping[str, Any], model: Model, tasks: Tasks | TaskSource, there: Fingerprint | None
) -> Density:
    """The density of the model, its sites in the units that they had.

    Args:
        data: what `packed_data` made.
        model: as it was.
        tasks: any of the training tasks.
        there: the fingerprint of the run; None for none.

    Raises:
        ValueError: the model has other sites.
    """
    saved = list(data["sites"])
    density = Density(model, tasks, shared=[s["name"] for s in saved if s["role"] == "shared"])
    found = [(s.name, s.role, s.size) for s in (*density.sites, *density.shared_sites)]
    wanted = [(s["name"], s["role"], len(s["loc"])) for s in saved]
    if found != wanted:
        theirs, ours = (", ".join(f"{n} ({r}, {k})" for n, r, k in x) for x in (wanted, found))
        raise ValueError(
            f"model: the fit is of a model with the sites {theirs}; this one has {ours}. Give the "
            "model that it learned with"
        )
    # A module that is made anew has other parameters: what was learned counts from the old ones.
    moved = [
        replace(site, loc=s["loc"].to(site.loc), scale=s["scale"].to(site.scale))
        for site, s in zip((*density.sites, *density.shared_sites), saved, strict=True)
    ]
    density.sites, density.shared_sites = (
        tuple(moved[: len(density.sites)]),
        tuple(moved[len(density.sites) :]),
    )
    if there is not None:
        _warn_of_other_code(there, density)
    return density.compiled() if data["compiled"] else density


def _warn_of_other_code(there: Fingerprint, density: Density) -> None:
    here = fingerprint_of_model(density)
    code = {t: words for t, words in there.items() if t.startswith("the model's ")}
    if there.get("Python") != here["Python"]:
        return  # whose bytecode is another
    found = differences(code, {t: w for t, w in here.items() if t.startswith("the model's ")})
    if found:
        warnings.warn(
            f"model: it is not what the fit learned with; it differs in {in_words(found)}. What "
            "was learned is taken all the same, and means what this model makes of it",
            RuntimeWarning,
            stacklevel=4,
        )


def _settings() -> dict[str, type]:
    """varmeta's own classes of settings, and Pyro's guides, by name."""
    found: dict[str, type] = {name: vars(autoguide)[name] for name in autoguide.__all__}
    todo: list[type] = [Checked]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__.startswith("varmeta."):
            found[kind.__name__] = kind
    return found
