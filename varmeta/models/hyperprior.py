"""What is believed of θ0 and of the prior's scales before any task is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor

ScaleLaw = Literal["half-normal", "half-cauchy", "log-cauchy", "exponential", "flat"]


@dataclass(frozen=True, eq=False)
class Hyperprior:
    """θ0_j ~ N(loc_j, width_j²), and a law of each scale with its typical size scale_width_m.

    Both come from the prior that the user wrote for one task: a task's parameter can lie as far out
    as that prior says, be it because θ0 does or because the task does.

    The laws of a scale σ with w = scale_width, as densities over σ itself: `"half-normal"`, that of
    |N(0, w²)|; `"half-cauchy"`, with the heavy tail of |Cauchy(0, w)| (Gelman, 2006, Prior
    distributions for variance parameters in hierarchical models); `"exponential"` of mean w; and
    `"log-cauchy"`, log σ ~ Cauchy(log w, 1), with so much mass near 0 that modules collapse readily
    (its density over log σ is bounded, that over σ is not). `"flat"` says nothing of the scales.

    Attributes:
        loc: `[D]`.
        width: `[D]`, positive.
        scale_width: `[M]`, positive, one per learned scale.
        scale_law: of the scales.

    Raises:
        ValueError: no such law.
    """

    loc: Tensor
    width: Tensor
    scale_width: Tensor
    scale_law: ScaleLaw = "half-normal"

    def __post_init__(self) -> None:
        if self.scale_law not in get_args(ScaleLaw):
            raise ValueError(
                f"scale_law must be one of {', '.join(map(repr, get_args(ScaleLaw)))}, "
                f"got {self.scale_law!r}"
            )

    def log_prob(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Scalar, nats: log p(θ0 = loc) + log p(scales), normalised; a flat law adds 0."""
        normal = -0.5 * ((loc - self.loc) / self.width) ** 2 - self.width.log()
        total = (normal - 0.5 * math.log(2 * math.pi)).sum()
        if self.scale_law == "flat":
            return total
        return total + self.scales().log_prob(scale).sum()

    def scales(self) -> Any:
        """The law of the scales, a Pyro distribution of batch shape `[M]`.

        Raises:
            ValueError: the law is flat, which is no distribution.
        """
        w = self.scale_width
        # Whether a scale is positive would be asked of a device at every step.
        if self.scale_law == "half-normal":
            return dist.HalfNormal(w, validate_args=False)
        if self.scale_law == "half-cauchy":
            return dist.HalfCauchy(w, validate_args=False)
        if self.scale_law == "exponential":
            return dist.Exponential(1 / w, validate_args=False)
        if self.scale_law == "log-cauchy":
            law = dist.Cauchy(w.log(), torch.ones_like(w), validate_args=False)
            exp = dist.transforms.ExpTransform()
            return dist.TransformedDistribution(law, exp, validate_args=False)
        raise ValueError(
            "scale_law is 'flat', which is no distribution; choose another one to draw from it"
        )
