"""Seeds: every random draw comes from a `torch.Generator` made here, never from global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one `stream` of one `seed`.

    The pair is hashed (NumPy's `SeedSequence`), so that step 7 of seed 0 draws the same numbers in
    a resumed run as in an uninterrupted one, and neighbouring streams are independent.
    """
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
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
