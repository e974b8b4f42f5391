"""Whether a model can be a model of one task: tried on a batch when a `Density` is built."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta.models.blame import is_own
from varmeta.models.laws import tensors_in
from varmeta.models.sites import reason
from varmeta.models.support import FailedOnABatch, check_targets, on_a_batch
from varmeta.seeds import generator
from varmeta.tasks import Tasks

if TYPE_CHECKING:
    from varmeta.models.density import Density

_FLAT = {"round", "floor", "ceil", "trunc", "sign", "argmax", "argmin", "gt", "lt", "ge", "le"}
_FEW = 8  # tasks whose data are changed, to see whether a prior follows
_RANDOM, _BATCH_NORM = "random(ness)? (operation|error)", "Batch norm|running_mean"
_ADVICE = {  # by what PyTorch says: where a loop over the tasks would be no answer
    _RANDOM: "It draws random numbers outside of pyro.sample, with "
    "dropout perhaps: switch that off with module.eval(), or by network(..., dropout=...), and "
    "draw with pyro.sample only",
    _BATCH_NORM: "Batch norm keeps averages over the rows of all tasks: switch it to "
    "the averages that it has with module.eval(), take those of each task by network(..., "
    "batch_norm='task'), or take nn.LayerNorm or nn.GroupNorm",
    "out of (bounds|range)|num_classes": "An index is out of range, of a label or of an "
    "embedding: they count from 0 to the number of classes less 1, in every task. Where tasks "
    "have different numbers of classes, give the network as many outputs as the largest task "
    "needs, and hide the others with varmeta.models.mask_classes",
}
_log = logging.getLogger("varmeta")
_TRIES = 3  # draws at which a site may be silent by chance (a ReLU that is off)


def check_model(density: Density, tasks: Tasks) -> None:
    """Try the model on a batch: it must run, keep its priors and rows apart, and hear every site.

    Its targets must be possible, too.
    """
    density.check_data(tasks, density.shared_init)
    sites = (*density.sites, *density.shared_sites)
    index = torch.cat([torch.full((s.size,), k) for k, s in enumerate(sites)])
    loc = torch.cat([density.prior_loc, density.shared_init])
    scale = torch.cat([density.prior_scale, density.shared_scale])
    noise, index = generator(0, device=loc.device), index.to(loc.device)

    def rows(flat: Tensor, tasks: Tasks) -> Tensor:
        theta = flat[: density.dim].expand(len(tasks), -1)
        with on_a_batch():
            return density.log_likelihood(theta, tasks, flat[density.dim :])

    like: Any = {"generator": noise, "dtype": loc.dtype, "device": loc.device}
    _choose_how(density, tasks, partial(rows, loc + scale * torch.randn(len(loc), **like)))
    if density.joint:
        said, remedy = density.likelihood.together(), density.likelihood.taken_apart()
        if getattr(density.model, "transductive", False):
            remedy = (
                "Its batch norm takes averages over them; batch_norm='frozen' and group norm do not"
            )
        _log.warning("%s: a task is the unit of scoring. %s", said, remedy)
    deaf, groups = set(range(len(sites))), _groups(tasks)
    for _ in range(_TRIES):
        here, there = loc + scale * torch.randn(2, len(loc), **like)
        before = [rows(here, group) for group in groups]
        more = 0 if density.joint else 1  # the rows of one draw are no matter of one another
        for group, nats in zip(groups, before, strict=True):
            wide = group._map(lambda t, more=more: torch.cat([t, t[:, :more]], dim=1))  # type: ignore[misc]
            after = rows(here, wide)[:, : group.mask.shape[1]]
            if not torch.allclose(nats, after, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    "model changes the log-likelihood of a row when another row is added, or from "
                    "call to call. Rows must be independent given the latents (tasks are padded to "
                    "a common length): compute means over rows and the like before, as inputs"
                )
        others = {k: torch.where(index == k, there, here) for k in deaf}
        deaf = {
            k
            for k, other in others.items()
            if all(torch.equal(b, rows(other, g)) for b, g in zip(before, groups, strict=True))
            and not _feeds(density, sites[k].name, here[density.dim :], other[density.dim :])
        }
        if not deaf:
            return _check_gradient(density, groups, here)
        if tasks.inputs.is_floating_point():  # other inputs may show more than zeros, say
            groups = [
                replace(g, inputs=g.inputs + torch.randn(g.inputs.shape, **like)) for g in groups
            ]
    site = sites[min(deaf)]
    raise ValueError(
        f"{site.role} site {site.name!r} does not reach the observed site "
        f"{density.observed[0]!r}. A latent that only feeds another latent's prior "
        "has no place in a model of one task (the learned prior takes it). For "
        "parameters of a module to be learned, the module itself must be the model "
        "(with forward(x, y)), or be lifted by varmeta.models.network"
    )


def _feeds(density: Density, name: str, here: Tensor, there: Tensor) -> bool:
    """Whether the prior of another shared latent is not the same at these two φ `[P]`."""
    if not any(site.depends for site in density.shared_sites if site.name != name):
        return False
    before, after = density.shared_laws(here), density.shared_laws(there)
    pairs = [
        pair
        for site in density.shared_sites
        if site.depends and site.name != name
        for pair in zip(tensors_in(before[site.name]), tensors_in(after[site.name]), strict=True)
    ]
    return not all(torch.equal(a, b) for a, b in pairs)


def _groups(tasks: Tasks) -> Sequence[Tasks]:
    """The tasks, by their length where one padded tensor would be mostly padding."""
    return (tasks,) if tasks.buckets is None else tasks.buckets.groups


def _check_priors(density: Density, tasks: Tasks) -> None:
    """A latent's prior is one for all tasks: it must not change with a task's data.

    It is asked of data that are changed as well, since the tasks at hand may all be alike.
    """
    with on_a_batch():
        each = [_priors(density, group) for group in _groups(tasks)]
    here = {
        name: [torch.cat(parts) for parts in zip(*(e[name] for e in each), strict=True)]
        for name in each[0]
    }
    few = tasks.select(range(min(len(tasks), _FEW)))
    before = _priors(density, few)
    for what, changed in _changes(few):
        try:
            after = _priors(density, changed)
        except Exception:  # the model is not made for such data
            continue
        _compare_priors(before, after, what)
    first = {name: [t[:1].expand_as(t) for t in found] for name, found in here.items()}
    _compare_priors(here, first, "the task")


def _priors(density: Density, tasks: Tasks) -> dict[str, list[Tensor]]:
    """By latent: the numbers that its prior is made of, `[T, ...]` each."""
    names = [s.name for s in (*density.sites, *density.shared_sites) if s.prior is not None]

    def one(x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
        nodes = density._trace(density.prior_loc, density.shared_init, x, y).nodes
        return {name: tensors_in(nodes[name]["fn"]) for name in names}

    with torch.no_grad():
        found: dict[str, list[Tensor]] = density._mapped(one, (0, 0))(tasks.inputs, tasks.targets)
    return found


def _changes(tasks: Tasks) -> Iterator[tuple[str, Tasks]]:
    """The tasks with other inputs, with other targets, and with one more row."""
    for what, name in (("x", "inputs"), ("y", "targets")):
        old = getattr(tasks, name)
        noise = 0.2 * torch.rand(old.shape, generator=generator(0), dtype=torch.float32)
        noise = noise.to(old.device)
        if old.is_floating_point():  # the first keeps what is positive so, and what is 0
            new = [old * (1 + noise).to(old), old + noise.to(old)]
        else:
            new = [(old + 1).to(old.dtype), old + (noise > 0.1).to(old.dtype)]
        for changed in (*new, old.flip(0, 1)):
            yield what, replace(tasks, **{name: changed})
    yield "the number of rows", tasks._map(lambda t: torch.cat([t, t[:, :1]], dim=1))


def _compare_priors(
    here: dict[str, list[Tensor]], there: dict[str, list[Tensor]], what: str
) -> None:
    for name, mine in here.items():
        pairs = zip(mine, there[name], strict=True)
        if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"the prior of latent {name!r} changes with {what}; varmeta learns one Gaussian "
                "prior over each latent for all tasks, so write a plain prior there and put the "
                f"data into the likelihood's mean, such as {name} + slope * x[..., 0] with a "
                "latent slope of its own"
            )


def _choose_how(density: Density, tasks: Tasks, rows: Callable[[Tasks], Tensor]) -> None:
    """Have the density run all tasks together if that can be, else their laws apart, else a loop.

    Raises:
        ValueError: none of these works; with advice that fits the cause.
    """
    try:
        _check_data(density, tasks)
        for group in _groups(tasks):
            rows(group)
        return
    except FailedOnABatch as error:
        first = error.__cause__
    assert isinstance(first, Exception)
    if _advice(first) is None and not is_own(first):
        few = tasks.select(list(range(min(2, len(tasks)))))
        density._run_as("one by one")
        try:
            _check_data(density, tasks)
            wanted = rows(few)
            density._run_as("apart")
            if _same(rows, few, wanted):
                return
            density._run_as("one by one")
            for group in _groups(tasks):
                rows(group)
        except FailedOnABatch as error:
            first = error.__cause__
            assert isinstance(first, Exception)
        else:
            _log.warning(
                "the model cannot run for all tasks at once and is run task by task, which takes "
                "longer the more tasks there are: %s",
                _short(first),
            )
            return
    harmless = not re.search(f"{_RANDOM}|{_BATCH_NORM}", str(first))
    culprit = _culprit(tasks, rows, density) if harmless else ""
    raise ValueError(
        f"model failed on a batch of tasks{culprit}: {_short(first)}. "
        + (_advice(first) or "It ran on the first task alone: compare the two")
    ) from first


def _check_data(density: Density, tasks: Tasks) -> None:
    _check_priors(density, tasks)
    check_targets(density, tasks)


def _same(rows: Callable[[Tasks], Tensor], tasks: Tasks, wanted: Tensor) -> bool:
    try:
        got = rows(tasks)
    except Exception:
        return False
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def _advice(error: Exception) -> str | None:
    """What to do where running the tasks one by one would be no answer; None where it may be one.

    Batch norm would change the user's module, and random numbers differ from call to call.
    """
    text = str(error)
    return next((advice for sign, advice in _ADVICE.items() if re.search(sign, text)), None)


def _culprit(tasks: Tasks, rows: Callable[[Tasks], Tensor], density: Density) -> str:
    """The first task on which the model fails by itself, in words; nothing if there is none."""
    density._run_as("one by one")
    for i, name in enumerate(tasks.names):
        try:
            rows(tasks.select([i]))
        except Exception:
            density._run_as("together")
            return f" in task {name!r}"
    density._run_as("together")
    return ""


def _short(error: Exception) -> str:
    """What went wrong, without the remarks that PyTorch and Pyro append."""
    return reason(error).splitlines()[0].split(". ")[0].rstrip(".")


def _check_gradient(density: Density, groups: Sequence[Tasks], flat: Tensor) -> None:
    """A site that changes the likelihood in steps, by rounding say, cannot be adapted."""
    sites = (*density.sites, *density.shared_sites)
    leaf = flat.detach().requires_grad_()
    with torch.enable_grad(), _OperationNames() as names:
        theta, phi = leaf.split([density.dim, density.shared_dim])
        each = [density.log_likelihood(theta.expand(len(g), -1), g, phi) for g in groups]
        total = reduce(add, [nats.sum() for nats in each]) + _of_priors(density, phi)
    grad = torch.zeros_like(leaf)
    try:
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total, leaf)
    except RuntimeError as error:
        if is_own(error):
            raise
        raise ValueError(
            f"the model is not differentiable: {reason(error)}. Write that operation with others"
        ) from error
    for site, part in zip(sites, grad.split([s.size for s in sites]), strict=True):
        if not bool(part.any()):
            flat_ones = ", ".join(sorted(names.seen & _FLAT)) or "an operation without a derivative"
            raise ValueError(
                f"{site.role} site {site.name!r} changes the log-likelihood, but its gradient is 0 "
                f"everywhere ({flat_ones}); varmeta adapts by gradients: use a smooth operation"
            )


def _of_priors(density: Density, shared: Tensor) -> Tensor:
    """What the shared latents' priors say of other shared latents, and not of their own values."""
    total = shared.new_zeros(())
    if any(site.depends for site in density.shared_sites):
        laws, values = density.shared_laws(shared), density.constrain_shared(shared.detach())
        for site in density.shared_sites:
            if site.depends:
                total = total + laws[site.name].log_prob(values[site.name]).sum()
    return total


class _OperationNames(TorchDispatchMode):
    """The names of the operations that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
