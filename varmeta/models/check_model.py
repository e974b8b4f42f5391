"""Whether a model can be a model of one task: tried on a batch when a `Density` is built."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta.models.blame import is_own
from varmeta.models.sites import reason
from varmeta.seeds import generator
from varmeta.tasks import Tasks

if TYPE_CHECKING:
    from varmeta.models.density import Density

_FLAT = {"round", "floor", "ceil", "trunc", "sign", "argmax", "argmin", "gt", "lt", "ge", "le"}
_TRIES = 3  # draws at which a site may be silent by chance (a ReLU that is off)


def check_model(density: Density, tasks: Tasks) -> None:
    """Try the model on a batch: it must run, keep rows apart, and listen to every site."""
    sites = (*density.sites, *density.shared_sites)
    index = torch.cat([torch.full((s.size,), k) for k, s in enumerate(sites)])
    loc = torch.cat([density.prior_loc, density.shared_init])
    scale = torch.cat([density.prior_scale, density.shared_scale])
    noise, index = generator(0, device=loc.device), index.to(loc.device)

    def rows(flat: Tensor, tasks: Tasks) -> Tensor:
        theta = flat[: density.dim].expand(len(tasks), -1)
        try:
            return density.log_likelihood(theta, tasks, flat[density.dim :])
        except Exception as error:
            raise ValueError(
                f"model failed on a batch of tasks (torch.vmap): {reason(error)}. Replace "
                "Python branches on values by torch.where, and draw random numbers with "
                "pyro.sample only"
            ) from error

    like: Any = {"generator": noise, "dtype": loc.dtype, "device": loc.device}
    deaf = set(range(len(sites)))
    for _ in range(_TRIES):
        here, there = loc + scale * torch.randn(2, len(loc), **like)
        wide = tasks._map(lambda t: torch.cat([t, t[:, :1]], dim=1))
        before, after = rows(here, tasks), rows(here, wide)[:, :-1]
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                "model changes the log-likelihood of a row when another row is added, or from "
                "call to call. Rows must be independent given the latents (tasks are padded to "
                "a common length): compute means over rows and the like before, as inputs"
            )
        deaf = {
            k
            for k in deaf
            if torch.equal(before, rows(torch.where(index == k, there, here), tasks))
        }
        if not deaf:
            return _check_gradient(density, tasks, here)
        if tasks.inputs.is_floating_point():  # other inputs may show more than zeros, say
            tasks = replace(tasks, inputs=tasks.inputs + torch.randn(tasks.inputs.shape, **like))
    site = sites[min(deaf)]
    raise ValueError(
        f"{site.role} site {site.name!r} does not reach the observed site "
        f"{density.observed[0]!r}. A latent that only feeds another latent's prior "
        "has no place in a model of one task (the learned prior takes it). For "
        "parameters of a module to be learned, the module itself must be the model "
        "(with forward(x, y)), or be lifted by varmeta.models.network"
    )


def _check_gradient(density: Density, tasks: Tasks, flat: Tensor) -> None:
    """A site that changes the likelihood in steps, by rounding say, cannot be adapted."""
    sites = (*density.sites, *density.shared_sites)
    leaf = flat.detach().requires_grad_()
    with torch.enable_grad(), _OperationNames() as names:
        theta = leaf[: density.dim].expand(len(tasks), -1)
        total = density.log_likelihood(theta, tasks, leaf[density.dim :]).sum()
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


class _OperationNames(TorchDispatchMode):
    """The names of the operations that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
