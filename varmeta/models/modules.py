"""Modules: a partition of a model's coordinates, one prior scale for each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

if TYPE_CHECKING:
    from varmeta.models.density import Density

Partition = Literal["site", "layer", "coordinate", "all"]


@dataclass(frozen=True, eq=False)
class Modules:
    """Which of M modules each of D coordinates belongs to; printed with their sizes.

    Any partition can be given; `Modules.of` has the usual ones.

    Attributes:
        names: M of them, all different.
        groups: `[D]` int, the module's position in `names`; each has a coordinate at least.

    Raises:
        ValueError: a number out of range, a module without coordinates, two of the same name.
    """

    names: tuple[str, ...]
    groups: Tensor

    def __post_init__(self) -> None:
        if self.groups.dim() != 1 or self.groups.dtype != torch.long:
            raise ValueError(
                f"groups must be [D] of integers (torch.long), got {list(self.groups.shape)} of "
                f"{self.groups.dtype}"
            )
        count = len(self.names)
        if int(self.groups.min()) < 0 or int(self.groups.max()) >= count:
            raise ValueError(
                f"groups holds numbers from {int(self.groups.min())} to {int(self.groups.max())}, "
                f"and there are {count} names"
            )
        empty = [n for n, size in zip(self.names, self.sizes, strict=True) if not size]
        if empty:
            raise ValueError(f"module {empty[0]!r} has no coordinates; leave it out")
        if len(set(self.names)) < count:
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise ValueError(f"two modules are called {twice!r}")

    @classmethod
    def of(cls, density: Density, by: Partition | Callable[[str], str] = "site") -> Modules:
        """The modules of a model.

        Args:
            density: the model.
            by: `"site"` (default); `"layer"`: sites whose names are alike up to the last dot, as
                `conv.weight` and `conv.bias`; `"coordinate"`; `"all"` coordinates in one; or a
                function from a site's name to its module's.

        Example:
            >>> import pyro.distributions as dist
            >>> from torch import nn
            >>> from varmeta import Density, Tasks
            >>> from varmeta.models import network
            >>> mlp = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            >>> tasks = Tasks.from_list([(torch.zeros(5, 1), torch.zeros(5))])
            >>> model = network(mlp, lambda out: dist.Normal(out[:, 0], 0.1))
            >>> print(Modules.of(Density(model, tasks), by="layer"))
            module  size
                 0    16
                 2     9
        """
        if by == "coordinate":
            return cls(coordinate_names(density), torch.arange(density.dim))
        if by == "all":
            return cls(("all",), torch.zeros(density.dim, dtype=torch.long))
        if callable(by):
            labels = [by(site.name) for site in density.sites]
        elif by == "site":
            labels = [site.name for site in density.sites]
        elif by == "layer":
            labels = [site.name.rpartition(".")[0] or site.name for site in density.sites]
        else:
            raise ValueError(
                f"by (scales, of a prior) must be {', '.join(map(repr, get_args(Partition)))} or a "
                f"function of a site's name, got {by!r}"
            )
        wrong = [label for label in labels if not isinstance(label, str)]
        if wrong:
            raise ValueError(f"by must return a module's name, a str, got {wrong[0]!r}")
        names = tuple(dict.fromkeys(labels))
        index = torch.tensor([names.index(label) for label in labels])
        return cls(names, index[density.site_index.cpu()])

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each module."""
        return [int(n) for n in self.groups.bincount(minlength=len(self.names))]

    def table(self) -> pd.DataFrame:
        """Columns `module` and `size`."""
        return pd.DataFrame({"module": self.names, "size": self.sizes})

    def select(self, names: Iterable[str]) -> Tensor:
        """`[D]` bool: the coordinates of these modules.

        Raises:
            ValueError: no module of that name.
        """
        chosen = list(names)
        unknown = [n for n in chosen if n not in self.names]
        if unknown:
            raise ValueError(f"no module {unknown[0]!r}; there are: {', '.join(self.names)}")
        wanted = torch.tensor([n in chosen for n in self.names])
        return wanted[self.groups.cpu()]

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return self.table().to_string(index=False)


def coordinate_names(density: Density) -> tuple[str, ...]:
    """A name of each of the D coordinates: the site's, with its index where there are several."""
    return tuple(
        site.name + (f"[{', '.join(map(str, index))}]" if index else "")
        for site in density.sites
        for index in np.ndindex(*site.unconstrained_shape)
    )
