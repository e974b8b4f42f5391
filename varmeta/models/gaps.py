"""Gaps: rows whose targets are known in part, NaN where they are not, count by the part that is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints


class NanMasked(TorchDistribution):
    """The same law, for which a value of NaN says nothing: a log density of 0.

    `NanMaskedNormal` of Pyro for any law of single numbers, without indexing by booleans, which
    `vmap` cannot batch.

    Args:
        base_dist: a law without event dimensions.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the values that are known."""
        return self.base_dist.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> NanMasked:
        """To another batch shape."""
        return NanMasked(self.base_dist.expand(batch_shape))

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """All of the values."""
        drawn: Tensor = self.base_dist.sample(*args, **kwargs)
        return drawn

    def filled(self, value: Tensor) -> Tensor:
        """A possible value in place of NaN: its density is not used, but must have a gradient."""
        law = self.base_dist
        if law.support.is_discrete or law.support is constraints.real:
            return value.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        return torch.where(value.isnan(), law.mean.detach().to(value), value)

    def log_prob(self, value: Tensor) -> Tensor:
        """That of the law, 0 where the value is NaN."""
        nats: Tensor = self.base_dist.log_prob(self.filled(value))
        return torch.where(value.isnan(), 0.0, nats)


class PartlyObserved(Messenger):
    """Have each observed site of single numbers pass over NaN."""

    def _pyro_sample(self, msg: Any) -> None:
        value, law = msg["value"], msg["fn"]
        if not (msg["is_observed"] and isinstance(value, Tensor) and value.is_floating_point()):
            return
        if msg["infer"].get("_deterministic"):
            return
        dims = 0
        while type(law).__name__ == "Independent":
            dims += law.reinterpreted_batch_ndims
            law = law.base_dist
        if not law.event_shape and not type(law).__name__.startswith("NanMasked"):
            masked = NanMasked(law)
            msg["fn"] = masked.to_event(dims) if dims else masked


def without_gaps(law: Any, value: Tensor) -> Tensor:
    """A value with something possible in place of what its law passes over."""
    while law is not None:
        if isinstance(law, NanMasked):
            return law.filled(value)
        if type(law).__name__.startswith("NanMasked"):  # Pyro's own
            return value.nan_to_num()
        law = vars(law).get("base_dist")
    return value


def has_gaps(targets: Tensor, mask: Tensor) -> bool:
    """Whether a row `[T, N, *target_shape]` that exists is known in part."""
    if not targets.is_floating_point() or targets[0, 0].numel() < 2:
        return False
    missing = targets.reshape(*mask.shape, -1).isnan()
    return bool((missing.any(-1) & ~missing.all(-1) & mask).any())
