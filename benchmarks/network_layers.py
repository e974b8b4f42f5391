"""Layers of PyTorch as networks: run for all tasks at once, recorded, and right."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call

from varmeta import Density, GaussianPrior, Tasks
from varmeta.inference.energy import TaskEnergy
from varmeta.models import network, programs
from varmeta.seeds import generator, global_rng

TASKS, ROWS = 5, 10
COLUMNS = ("tasks", "error", "as written, ms", "recorded, ms")


class Series(nn.Module):
    """A layer over series of 5 steps of 3 features, its output averaged over time."""

    def __init__(self, core: nn.Module, width: int, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.core, self.last, self.call = core, nn.Linear(width, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.core, x).mean(1))  # type: ignore[no-any-return]


def _recurrent(kind: Any, **given: Any) -> nn.Module:
    return Series(kind(3, 8, batch_first=True, **given), 8, lambda core, x: core(x)[0])


def _attention() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
    inside = nn.ModuleList([nn.Linear(3, 8), layer])
    return Series(inside, 8, lambda m, x: m[1](m[0](x), x, x)[0])


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Series(nn.Sequential(nn.Linear(3, 8), layer), 8, lambda core, x: core(x))


def _flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(15, 8), *layers, nn.Linear(8, 1))


def _image(*layers: nn.Module) -> nn.Module:
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, *ends)


_CONVOLVED: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": lambda: nn.ReLU(),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 2),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "BatchNorm2d, frozen": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d, task": lambda: nn.BatchNorm2d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "Dropout2d, train": lambda: nn.Dropout2d(0.2),
    "Upsample": lambda: nn.Upsample(scale_factor=2),
}
_PLAIN = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus, nn.PReLU)
_BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Identity(),
    **{kind.__name__: kind for kind in _PLAIN},
    "Softmax": lambda: nn.Softmax(-1),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "Dropout, off": lambda: nn.Dropout(0.2),
    "Dropout, train": lambda: nn.Dropout(0.2),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
}
LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    **{name: ("series", lambda make=make: _flat(make())) for name, make in _BETWEEN.items()},
    **{name: ("images", lambda make=make: _image(make())) for name, make in _CONVOLVED.items()},
    "Embedding": ("whole", lambda: nn.Sequential(nn.Embedding(9, 3), _flat())),
    "EmbeddingBag": ("whole", lambda: nn.Sequential(nn.EmbeddingBag(9, 3), nn.Linear(3, 1))),
    "Conv1d": ("series", lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.Flatten(), nn.Linear(8, 1))),
    "RNN": ("series", lambda: _recurrent(nn.RNN)),
    "GRU": ("series", lambda: _recurrent(nn.GRU)),
    "LSTM": ("series", lambda: _recurrent(nn.LSTM)),
    "MultiheadAttention": ("series", _attention),
    "TransformerEncoderLayer": ("series", _transformer),
}


def _tasks(kind: str) -> Tasks:
    noise = generator(0)
    shape = {"series": (5, 3), "images": (1, 6, 6), "whole": (5,)}[kind]
    y = torch.randn(TASKS, ROWS, generator=noise)
    if kind == "whole":
        x = torch.randint(9, (TASKS, ROWS, *shape), generator=noise)
    else:
        x = torch.randn(TASKS, ROWS, *shape, generator=noise)
    return Tasks.from_list(list(zip(x, y, strict=True)))


def try_layer(name: str) -> list[str]:
    """How its tasks are run, its largest error in nats a row, and a derivative's time.

    That is a gradient and a product with the Hessian, milliseconds of a processor.
    """
    kind, make = LAYERS[name]
    with global_rng(generator(0)):
        module = make()
    choice = name.partition(", ")[2]
    chosen: dict[str, Any] = {"dropout": "off"}
    if choice in ("frozen", "task"):
        chosen["batch_norm"] = choice
    elif choice == "train":
        chosen["dropout"] = choice
    tasks = _tasks(kind)
    try:
        density = Density(network(module, _normal, **chosen), tasks)
        step = density.in_step(generator(1)) if density.noisy else density
        prior = GaussianPrior.from_density(density)
        energy = TaskEnergy(step, tasks, density.shared_init, prior)
        theta = prior.loc + 0.1 * torch.randn(TASKS, density.dim, generator=generator(2))
        error = "–" if choice == "train" else f"{_error(module, density, theta, tasks):.0e}"
        times = []
        for _ in range(programs.CALLS_BEFORE_CAPTURE + 5):
            start = time.process_time()
            energy.value_and_gradient(theta)
            energy.linearise(theta).product(theta)
            times.append(1e3 * (time.process_time() - start))
    except Exception as failed:
        return [str(failed).split(";")[0].splitlines()[0].rstrip("."), "–", "–", "–"]
    why = {how for how in density.execution().values() if how != "recorded"}
    after = "; ".join(sorted(why)) or f"{min(times[-4:]):.1f}"
    return [density._how, error, f"{min(times[1:8]):.1f}", after]


def _normal(out: Tensor) -> Any:
    return dist.Normal(out[:, 0], 1.0)


def _error(module: nn.Module, density: Density, theta: Tensor, tasks: Tasks) -> float:
    """Against the plain module, one task at a time; batch norm as it is when training."""
    module.eval()
    if getattr(density.model, "transductive", False):
        module.train()
    worst = 0.0
    nats = density.negative_log_likelihood(theta, tasks).detach()
    for i in range(len(tasks)):
        out = functional_call(module, density.constrain(theta[i]), (tasks.inputs[i],)).detach()
        plain = -_normal(out).log_prob(tasks.targets[i]).sum()
        worst = max(worst, float((plain - nats[i]).abs()) / ROWS)
    return worst
