"""fingerprint: what identifies a run, topic by topic, so that none goes on from another's state.

An entry is a text to read, where there is one, and a hash: `"batch_size": "20"`,
`"the targets": "float64, 919 values #3fa81c22d01b"`. Topics are words that a user knows, since a
refusal names those that differ.
"""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from os import PathLike
from typing import Any

import pyro
import torch
from torch import Tensor

from varmeta.digest import LENGTH, digest, digest_of_class, digests_of, unseen
from varmeta.inference.base import Strategy
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import Tasks, TaskSource

Fingerprint = dict[str, str]
_VERSIONS = {
    "varmeta": version("varmeta-ppl"),
    "torch": str(torch.__version__),  # not its own kind of text
    "pyro": pyro.__version__,
    "Python": ".".join(platform.python_version_tuple()[:2]),
}
_ROUNDING = {"torch", "pyro"}  # whose versions differ in the last digits of what they compute
_NEW, _GONE = " (new)", " (gone)"
_SHOWN = 60  # characters of a text that is shown beside another
_MOST = 8  # topics in a message


def fingerprint(
    strategies: Mapping[str, Strategy],
    density: Density,
    tasks: Mapping[str, Tasks | TaskSource | None],
    prior: GaussianPrior,
    **settings: Any,
) -> Fingerprint:
    """What identifies a run, in plain texts.

    Data, prior, sites, strategies and settings count by their values; the model, a stream and
    callables in a strategy by their code and what it reads, as far as these can be had (see
    `digest`); varmeta, PyTorch, Pyro and Python by their versions. The prior's numbers are rounded
    to a 2^-26th of its scales (2^-14 in single precision): two kinds of processor agree on these.

    Args:
        strategies: by name; the name "" goes without saying.
        density: the model.
        tasks: data or a stream, by argument; the name "" goes without saying.
        prior: where learning starts.
        settings: whatever else there is, with a `repr` that says it all.

    Raises:
        ValueError: a strategy holds a function whose code cannot be seen.
    """
    found: Fingerprint = {}
    for argument, given in tasks.items():
        topics = {"the tasks": "none"} if given is None else _of_data(given)
        found |= {f"{argument}: {k}" if argument else k: text for k, text in topics.items()}
    found |= _of_model(density) | _of_prior(prior)
    for name, strategy in strategies.items():
        found[f"the strategy {name!r}" if name else "the strategy"] = _of_strategy(strategy)
    found |= {name: repr(value) for name, value in settings.items()}
    found["torch's default dtype"] = _dtype(torch.get_default_dtype())
    return found | _VERSIONS


def fingerprint_of_model(density: Density) -> Fingerprint:
    """Its part of a run's fingerprint: model, sites and versions."""
    return _of_model(density) | _VERSIONS


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """The topics in which two fingerprints differ, each with how, in words.

    Args:
        there: of what was kept.
        here: of what is asked for.
    """
    found = {}
    for topic in {**here, **there}:
        if topic not in there:
            found[topic] = topic + _NEW
        elif topic not in here:
            found[topic] = topic + _GONE
        elif there[topic] != here[topic]:
            found[topic] = topic + _change(str(there[topic]), str(here[topic]))
    return {topic: words for topic, words in found.items() if not _goes_without(topic, found)}


def _goes_without(topic: str, found: Mapping[str, str]) -> bool:
    """Whether another topic says as much: with other names an order is another, and so on."""
    other = found[topic].endswith((_NEW, _GONE))
    if topic.endswith("the order of the tasks"):
        return topic.replace("the order", "the names") in found
    if topic == "the order of the sites":
        return any(words.endswith((_NEW, _GONE)) for words in found.values())
    return other and f"{topic.rpartition(' ')[0]} code" in found  # what other code reads


def in_words(found: Mapping[str, str]) -> str:
    """What `differences` found, the first few, to come after "it differs in"."""
    shown = list(found.values())[:_MOST]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def check_same(
    there: Fingerprint | None, here: Fingerprint, path: PathLike[str], done: bool
) -> None:
    """Refuse a checkpoint of another run than this one.

    Versions count too: only the same ones take the same steps. A run that is done under another
    version of PyTorch or Pyro has no step left, and is taken up with a warning.

    Args:
        there: what the checkpoint says; None if it says nothing.
        here: the run that is asked for.
        path: the checkpoint.
        done: whether no step of it is left.

    Raises:
        ValueError: with the topics that differ.
    """
    remedy = "for another run name another file, or remove this one"
    if there is None:
        raise ValueError(
            f"checkpoint {path} does not say what it belongs to: an earlier version of varmeta "
            f"wrote it; {remedy}"
        )
    found = differences(there, here)
    if done and found and found.keys() <= _ROUNDING:
        warnings.warn(
            f"checkpoint {path} is of a finished run under other versions: {in_words(found)}; it "
            "is taken as it is, and what is computed from it may differ in its last digits",
            RuntimeWarning,
            stacklevel=4,
        )
    elif found:
        longer = _differ_in_steps(there, here) if found.keys() == {"the strategy"} else False
        raise ValueError(
            f"checkpoint {path} is of another run; it differs in {in_words(found)}. Give the same "
            f"arguments to go on with it; {remedy}"
            + ". A run is not made longer afterwards: its learning rates depend on steps"
            * longer
        )


def _differ_in_steps(there: Fingerprint, here: Fingerprint) -> bool:
    def rest(of: Fingerprint) -> str:
        return re.sub(r"\bsteps=\d+", "", _readable(of["the strategy"]))

    return there["the strategy"] != here["the strategy"] and rest(there) == rest(here)


def _change(there: str, here: str) -> str:
    """From what to what, where that can be read; of two long texts the parts that differ."""
    before, after = _readable(there), _readable(here)
    if before == after or not (before and after):
        return ""
    if max(len(before), len(after)) > _SHOWN:
        parts = [re.split(r"(?<=[,(]) ?", text) for text in (before, after)]
        if len(parts[0]) != len(parts[1]):
            return ""
        pairs = [(a, b) for a, b in zip(*parts, strict=True) if a != b]
        before, after = (", ".join(p[k].strip(",() ") for p in pairs) for k in (0, 1))
        if max(len(before), len(after)) > _SHOWN:
            return ""
    return f" ({before}, now {after})"


def _readable(text: str) -> str:
    return re.sub(f" ?#[0-9a-f]{{{LENGTH}}}$", "", text)


# -- the parts of a run ----------------------------------------------------------------------------


def _of_data(tasks: Tasks | TaskSource) -> Fingerprint:
    if isinstance(tasks, Tasks):
        return _of_tasks(tasks)
    batches = [_of_tasks(tasks.batch(k)) for k in range(2)]
    return {
        "the stream's seed": str(tasks.seed),
        "the stream's device": str(tasks.device),
        **_of_code("the stream's", tasks.draw, tasks.digests),
        "the stream's first batches": f"#{digest(batches)}",
    }


def _of_tasks(tasks: Tasks) -> Fingerprint:
    """Padding does not count; values go by the tasks' names, so that their order is one topic."""
    order = sorted(range(len(tasks)), key=tasks.names.__getitem__)
    mask = tasks.mask[order]
    names = sorted(tasks.names)
    values = {name: getattr(tasks, name)[order][mask] for name in ("inputs", "targets", "is_query")}
    split = values["is_query"]
    return {
        "the names of the tasks": f"{len(names)} × {tasks.task_name} #{digest(names)}",
        "the order of the tasks": f"#{digest(tasks.names)}",
        "the numbers of rows": f"{len(split)} #{digest(tasks.num_rows[order])}",
        "the inputs": f"{_dtype(values['inputs'].dtype)} #{digest(values['inputs'])}",
        "the targets": f"{_dtype(values['targets'].dtype)} #{digest(values['targets'])}",
        "the names of inputs and target": ", ".join((*tasks.input_names, tasks.target_name)),
        "the split": f"{int(split.sum())} query rows #{digest(split)}"
        if tasks.is_split
        else "none",
        "the kind of device": tasks.mask.device.type,
    }


def _of_model(density: Density) -> Fingerprint:
    found = _of_code("the model's", density.model, density.digests)
    sites = (*density.sites, *density.shared_sites)
    for site in sites:
        what = site.description()
        kind = {"adapted": "latent", "shared": "shared latent", "param": "parameter"}[site.role]
        start = site.prior if site.prior is not None else site.loc
        found[f"the {kind} {site.name!r}"] = (
            f"{what['prior']} on {what['support']}, shape {tuple(site.shape)} "
            f"#{digest(what['support'], site.shape, start)}"
        )
    found["the order of the sites"] = f"#{digest([site.name for site in sites])}"
    found["the observed sites"] = ", ".join(density.observed)
    found["compiled"] = str(density._compiled)
    return found


def _of_prior(prior: GaussianPrior) -> Fingerprint:
    """Locations in units of their scales and scales as logarithms, so that rounding is fair."""
    modules, belief, scale = prior.modules, prior.hyperprior, prior.scale
    factor = None if prior.factor is None else _rounded(prior.factor / scale[:, None])
    bounds = None if prior.bounds is None else _rounded(prior.bounds.log())
    numbers: list[Tensor] = []
    if belief is not None:
        widths = belief.width.log(), belief.scale_width.log()
        numbers = [_rounded(n) for n in (belief.loc / belief.width, *widths)]
    return {
        "the prior's location": f"#{digest(_rounded(prior.loc / scale))}",
        "the prior's scales": f"#{digest(_rounded(prior.log_scale))}",
        "the prior's modules": f"{len(modules)} #{digest(modules.names, prior.groups)}",
        "the prior's low-rank part": "none" if factor is None else f"#{digest(factor)}",
        "the prior's bounds": "none" if bounds is None else f"#{digest(bounds)}",
        "the hyperprior": f"{belief.scale_law} scales #{digest(numbers)}" if belief else "none",
    }


def _of_strategy(strategy: Strategy) -> str:
    """Its settings, with the code of those that are callables, and its own where it is a user's."""
    settings = dict(getattr(strategy, "__dict__", {}))
    if is_dataclass(strategy):
        settings = {f.name: getattr(strategy, f.name) for f in fields(strategy)}
    hidden = unseen(settings)
    if hidden is not None:
        raise ValueError(
            f"{strategy.name}: the code of {hidden} cannot be seen, so that a run with it could "
            "not be told from another; give a Python function, or leave checkpoint (folder) out"
        )
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(strategy))
    return f"{text} #{digest(digest_of_class(type(strategy)), settings)}"


def _of_code(whose: str, thing: Any, before: Mapping[str, str]) -> Fingerprint:
    """As it is now, with the contents of what it reads as they were before it ran."""
    now = digests_of(thing, contents=False)
    return {
        f"{whose} {name or 'code'}": f"#{digest(text, before.get(name))}"
        for name, text in now.items()
    }


def _rounded(numbers: Tensor) -> Tensor:
    """Numbers near 1 to some 8 digits (4 in single precision), which all processors agree on."""
    parts = 2.0**26 if numbers.dtype == torch.float64 else 2.0**14
    return (numbers.detach() * parts).round() + 0.0  # no -0.0


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
