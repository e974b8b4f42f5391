"""Any `nn.Module` as a Pyro model of one task: its parameters become latent sites."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from varmeta.checked import Positive, check, require_kind
from varmeta.models.layers import Dropout

Likelihood = Callable[[Any], dist.TorchDistribution]


def network(
    module: nn.Module,
    likelihood: Likelihood,
    *,
    prior_scale: float = 1.0,
    observed: str = "y",
    dropout: Literal["off", "train"] | None = None,
    batch_norm: Literal["frozen", "task"] | None = None,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A Pyro model whose latents are the module's parameters.

    Each parameter has the prior N(its value now, prior_scale²), so that θ0 starts at the module's
    own initialisation. A parameter with `requires_grad=False` stays as it is, the same for all
    tasks; weights that two layers share are one latent. The module is copied as it is now, and
    never changed; what happens to it later is not seen.
    It runs in the data type and on the device of the inputs; where these are whole numbers, as
    for embeddings, in its own data type (in float32 if that is of half precision).

    Args:
        module: maps `[N, *input_shape]` to outputs with N rows.
        likelihood: outputs to a distribution with batch shape `[N]`, for example
            `lambda out: dist.Normal(out[:, 0], 0.1)` or `lambda out: dist.Categorical(logits=out)`.
        prior_scale: standard deviation of the prior over every parameter.
        observed: name of the observed site.
        dropout: `"off"`; or `"train"`: other masks for each task in each step of a fit, the same
            again for the same seed, and none where tasks are adapted to, scored or predicted. It
            is for strategies that learn from the gradient of a query loss (`IMAML`, `MAML`,
            `Reptile` and their kin). None: there is none in the module, or it is in `eval()`.
        batch_norm: `"frozen"`: by the running averages that the module has; or `"task"`: by the
            rows of the task at hand, support and query each by its own, as is usual with MAML
            (transductive). Rows then hang on one another: they are scored as one draw for each
            task, and all tasks must have the same number of rows. None: there is none in the
            module, or it is in `eval()`.

    Raises:
        TypeError: a module that is none.
        ValueError: nothing in it that could adapt; dropout or batch norm in training mode without
            a choice of what it shall do; a lazy layer that has not seen an input yet.

    Example:
        >>> import pyro.distributions as dist
        >>> from varmeta import Density, Tasks
        >>> mlp = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> model = network(mlp, lambda out: dist.Normal(out[:, 0], 0.1))
        >>> tasks = Tasks.from_list([(torch.zeros(5, 1), torch.zeros(5))])
        >>> Density(model, tasks).dim
        25
    """
    require_kind("module", module, nn.Module, "give a network, such as nn.Linear(2, 1)")
    check("prior_scale", prior_scale, Positive)
    check("dropout", dropout, Literal["off", "train"] | None)
    check("batch_norm", batch_norm, Literal["frozen", "task"] | None)
    _check_parameters(module)
    _check_choices(module, dropout, batch_norm)
    return _Network(
        _prepared(module, dropout, batch_norm),
        likelihood,
        float(prior_scale),
        observed,
        dropout,
        batch_norm == "task" and any(isinstance(m, _BatchNorm) for m in module.modules()),
    )


@dataclass(frozen=True, eq=False)
class _Network:
    """A model that, unlike a function within a function, can be pickled."""

    module: nn.Module
    likelihood: Likelihood
    prior_scale: float
    observed: str
    dropout: Literal["off", "train"] | None = None
    transductive: bool = False
    key: Tensor | None = field(default=None, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The data type that it runs in where inputs are whole numbers."""
        kinds = [p.dtype for p in self.module.parameters() if p.is_floating_point()]
        return torch.float32 if kinds[0].itemsize < 4 else kinds[0]

    @property
    def takes_keys(self) -> bool:
        """Whether a step of a fit gives it a number for each task (`keyed`)."""
        return self.dropout == "train"

    def keyed(self, key: Tensor) -> _Network:
        """Itself with the dropout of this number, an int64 scalar."""
        return replace(self, key=key)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        like = x if x.is_floating_point() else torch.empty((), dtype=self.dtype, device=x.device)
        given = {name: _cast(value, like) for name, value in _fixed(self.module)}
        for name, value in self.module.named_parameters():
            if value.requires_grad:
                prior = dist.Normal(value.detach().to(like), self.prior_scale)
                given[name] = pyro.sample(name, prior.to_event(value.dim()))
        with Dropout(self.key) if self.takes_keys else nullcontext():
            out = torch.func.functional_call(self.module, given, (x,))
        law = self.likelihood(out)
        if self.transductive:
            return pyro.sample(self.observed, law.to_event(1), obs=y)
        with pyro.plate("rows", len(x)):
            return pyro.sample(self.observed, law, obs=y)


def mask_classes(logits: Tensor, count: Tensor) -> Tensor:
    """Logits whose classes from `count` on have probability 0: tasks with fewer classes than most.

    Args:
        logits: `[N, C]`, C the number of classes of the largest task.
        count: `[N]` or a scalar, from 1 to C: how many classes there are in the row's task. Give it
            to the model as a column of x.

    Example:
        >>> from varmeta import Density, Tasks
        >>> class Ways(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(2, 5)
        ...
        ...     def forward(self, x):  # x[:, 0] is the task's number of classes
        ...         return mask_classes(self.net(x[:, 1:]), x[:, 0])
        >>> three, five = (
        ...     torch.cat([torch.full((9, 1), k), torch.randn(9, 2)], 1) for k in (3.0, 5.0)
        ... )
        >>> tasks = Tasks.from_list([(three, torch.arange(9) % 3), (five, torch.arange(9) % 5)])
        >>> model = network(Ways(), lambda out: dist.Categorical(logits=out))
        >>> Density(model, tasks).dim
        15
    """
    absent = torch.arange(logits.shape[-1], device=logits.device) >= count[..., None]
    return torch.where(absent, float("-inf"), logits)


def _fixed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are frozen, and buffers."""
    frozen = ((n, p) for n, p in module.named_parameters() if not p.requires_grad)
    return itertools.chain(frozen, module.named_buffers())


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """A copy, since a layer may write into it."""
    kind = like.dtype if value.is_floating_point() else value.dtype
    return value.detach().to(like.device, kind, copy=True)


def _check_parameters(module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    lazy = [n for n, p in parameters.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"module has a lazy layer whose {lazy[0]} has no shape yet; call the module once on "
            "inputs of one task before"
        )
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "module has no parameter that could adapt to a task: "
            + ("all have requires_grad=False; thaw a layer's" if parameters else "it has none")
        )


def _check_choices(module: nn.Module, dropout: str | None, batch_norm: str | None) -> None:
    if dropout == "train" and not any(layer.training for layer in module.modules()):
        raise ValueError(
            "dropout='train', and module is in eval mode, which has none; call module.train() "
            "before, or leave dropout out"
        )
    for name, layer in module.named_modules():
        said = f"layer {name!r} ({type(layer).__name__})" if name else type(layer).__name__
        if dropout is None and layer.training and _drops(layer):
            raise ValueError(
                f"module has dropout in training mode, in {said}; say what it shall do: "
                "network(..., dropout='off'), or dropout='train' for other masks in each step of "
                "a fit and none in predictions"
            )
        if not isinstance(layer, _NormBase) or batch_norm == "task":
            continue
        if batch_norm is None and _averages(layer):
            raise ValueError(
                f"module has batch norm in training mode, in {said}; say what it shall do: "
                "network(..., batch_norm='task') takes mean and variance over the rows of the "
                "task at hand, batch_norm='frozen' the running averages that the layer has"
            )
        if batch_norm == "frozen" and isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ValueError(
                f"batch_norm='frozen' needs running averages, and {said} keeps none "
                "(track_running_stats=False); use batch_norm='task'"
            )


def _drops(layer: Any) -> bool:
    """Whether it is a layer of PyTorch with dropout that would be at work in training mode."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout > 0
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0 and layer.num_layers > 1
    return isinstance(layer, _DropoutNd) and layer.p > 0


def _averages(layer: _NormBase) -> bool:
    """Whether it would mix the rows of a task, or write running averages."""
    if isinstance(layer, _BatchNorm):
        return layer.training or layer.running_mean is None
    return layer.training and layer.track_running_stats


def _prepared(module: nn.Module, dropout: str | None, batch_norm: str | None) -> nn.Module:
    """A copy that does what was chosen, and nothing in place, be it to the inputs."""
    try:
        own = copy.deepcopy(module)
    except RuntimeError as error:
        raise ValueError(
            f"module cannot be copied: {str(error).splitlines()[0]}. Weight norm and the like "
            "can, from torch.nn.utils.parametrizations"
        ) from error
    if dropout == "off":
        own.eval()
    for layer in own.modules():
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False  # type: ignore[assignment]
        if isinstance(layer, _NormBase):
            if batch_norm is not None:
                layer.eval()
            if batch_norm == "task":
                # Without averages it takes those of the rows, in eval mode as well.
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
    return own
