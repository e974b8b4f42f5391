"""Seeds: every random draw comes from a `torch.Generator` made here, never from global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from varmeta.checked import Seed, check

_AT_ONCE = 32


def generator(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one `stream` of one `seed`.

    The pair is hashed (NumPy's `SeedSequence`), so that step 7 of seed 0 draws the same numbers in
    a resumed run as in an uninterrupted one, and neighbouring streams are independent.

    Raises:
        ValueError: a seed that is no whole number from 0 to 2^64 − 1.
    """
    check("seed", seed, Seed)
    return _seeded(np.random.SeedSequence(seed, spawn_key=stream), device)


def generators(
    seed: int, *stream: int, first: int = 0, device: torch.device | str = "cpu"
) -> Iterator[torch.Generator]:
    """`generator(seed, *stream, first)`, then that of `first + 1`, and so on without end.

    Hashing many at once costs a fraction each of hashing one between other work.
    """
    check("seed", seed, Seed)
    source = np.random.SeedSequence(seed, spawn_key=stream, n_children_spawned=first)
    while True:
        yield from [_seeded(child, device) for child in source.spawn(_AT_ONCE)]


def _seeded(hashed: np.random.SeedSequence, device: torch.device | str) -> torch.Generator:
    state = hashed.generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & (2**63 - 1))


@contextmanager
def global_rng(source: torch.Generator) -> Iterator[None]:
    """Run code that only knows PyTorch's global random state (Pyro's samplers) from `source`.

    The global state is left as it was found.
    """
    seed = int(torch.randint(2**62, (), generator=source, device=source.device))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed: also what was not forked
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
