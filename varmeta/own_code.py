"""Which code is the user's own, and which belongs to Python, to a library or to varmeta."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch

OURS = str(Path(__file__).parent) + os.sep
LIBRARIES = tuple(
    {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(torch.__file__).parent.parent)}  # where an environment's base has its packages
)
