"""The implementations that are compared, one file each."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.workloads import Workload


class Implementation(Protocol):
    """Built once per process from a workload."""

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Σ_i weights_i g_i(θ_i*) and its gradient in θ0 `[D]`; `weights` `[T]` float32.

        1/T is a meta-step; a one-hot vector is one task's part of it, for the check.
        """
        ...


@dataclass(frozen=True)
class Peer:
    """Where an implementation is, and what it is.

    Attributes:
        name: in tables and on the command line.
        where: its module in this package, and the class there.
        needs: packages that may be absent.
        part: of very many tasks it times some and scales, since its cost is proportional to them.
        check: `gradient`: the meta-gradient must match the reference; `inexact`: it is another
            gradient, its error is reported; `probe`: only its inner gradients can be checked.
    """

    name: str
    where: tuple[str, str]
    needs: tuple[str, ...] = ()
    part: bool = False
    check: str = "gradient"

    def why_absent(self) -> str | None:
        """A sentence, if it cannot run here."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} not installed (pip install varmeta-ppl[bench])"
        if self.name == "varmeta compiled":
            from varmeta import Density

            if not hasattr(Density, "compiled"):
                return "this varmeta has no Density.compiled"
        return None

    def build(self, workload: Workload) -> Implementation:
        """The implementation, ready to step."""
        file, name = self.where
        kind = getattr(importlib.import_module(f"benchmarks.peers.{file}"), name)
        made: Implementation = kind(workload)
        return made


PEERS = {
    peer.name: peer
    for peer in (
        Peer("floor", ("floor", "Floor"), check="probe"),
        Peer("varmeta", ("varmeta_eager", "VarmetaEager")),
        Peer("varmeta compiled", ("varmeta_compiled", "VarmetaCompiled")),
        Peer("jax", ("jax_vmap", "JaxVmap"), needs=("jax",)),
        Peer("torchopt", ("torchopt_root", "TorchoptRoot"), needs=("torchopt",), part=True),
        Peer("loop", ("loop", "Loop"), part=True),
        Peer("unrolled", ("unrolled", "Unrolled"), part=True, check="inexact"),
    )
}
