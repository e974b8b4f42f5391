"""varmeta with `density.compiled()`: the same calls, its programs compiled by inductor."""

from __future__ import annotations

import varmeta as vm
from benchmarks.peers.varmeta_eager import VarmetaEager


class VarmetaCompiled(VarmetaEager):
    """As `VarmetaEager`; compiling happens in the first steps."""

    def prepare(self, density: vm.Density) -> vm.Density:
        """The compiled density."""
        compiled: vm.Density = density.compiled()
        return compiled
