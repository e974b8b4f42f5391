"""file_names: a file name for every name, no two alike, on any file system."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256

_LONGEST = 60  # characters; a file system allows some 255 bytes, with endings
# Windows' devices; and `part_`, which begins the name of a file while it is written.
_TAKEN = re.compile(r"con|prn|aux|nul|com\d|lpt\d|part_.*", re.IGNORECASE)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """By name, the stem of a file name: ASCII letters, digits and underscores.

    So that a folder shows what is whose, a stem is the name with "_" for all else, as long as no
    other name has it (capital and small letters taken for one, as some file systems do) and no
    system takes it for something else. Otherwise a hash of the name follows, after a "-".

    Args:
        names: all that need files in one folder.

    Example:
        >>> file_names(["IMAML", "PyroSVI (AutoNormal)"])
        {'IMAML': 'IMAML', 'PyroSVI (AutoNormal)': 'PyroSVI_AutoNormal'}
        >>> list(file_names(["svi (tight)", "svi-tight"]).values())
        ['svi_tight-27804e65a5cd2279', 'svi_tight-a23033239682232b']
    """
    stems = {name: _stem(name) for name in names}
    times = Counter(stem.lower() for stem in stems.values())
    return {
        name: stem
        if stem and times[stem.lower()] == 1 and not _TAKEN.fullmatch(stem)
        else f"{stem or 'strategy'}-{_hash(name)}"
        for name, stem in stems.items()
    }


def _stem(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name, flags=re.ASCII).strip("_")[:_LONGEST].rstrip("_")


def _hash(name: str) -> str:
    return sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
