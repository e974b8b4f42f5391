"""What a result was measured with: the processor and the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

_CPU = Path("/proc/cpuinfo")


def processor() -> str:
    """Its name, as the system tells it."""
    for line in _CPU.read_text().splitlines() if _CPU.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The first digits of the commit that is checked out; '' outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
