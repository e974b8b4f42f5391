"""What a process has once and its threads share: Pyro's handlers, params and checks, warnings.

Pyro keeps its stack of handlers, its parameter store and its plates in module variables, Pyro and
PyTorch the switch for their checks, Python its filters of warnings, and a tracer of operations
patches classes while it runs. Whoever uses any of these in varmeta holds `ALONE`, for one run of a
model, one step of Pyro's own or one recording, and puts everything back; so fits in several threads
take turns there, and each gets what it gets by itself. What has been recorded runs without it.

Code of the user's own does not hold it: Pyro run in another thread must (`with pyro_untouched():`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.runtime import _DIM_ALLOCATOR

# A thread that holds it must not wait for autograd's threads (a GPU's backward pass runs in them)
# unless what these run is plain tensor operations.
ALONE = RLock()


@contextmanager
def pyro_untouched() -> Iterator[None]:
    """Run Pyro code with an empty parameter store and as if in no plate; then all is as it was.

    Other threads wait. (The store's own `scope` cuts the links that an SVI around it needs. A
    plate's dimension is taken for all code that runs within it, however its sites are blocked.)
    """
    with ALONE:
        store, plates = vars(pyro.get_param_store()), vars(_DIM_ALLOCATOR)
        kept, dims = store.copy(), plates.copy()
        store.update(vars(ParamStoreDict()))
        plates.update(vars(type(_DIM_ALLOCATOR)()))
        try:
            yield
        finally:
            store.update(kept)
            plates.update(dims)


@contextmanager
def validation_off() -> Iterator[None]:
    """Pyro's and PyTorch's checks off (they cannot run inside `vmap`), then as they were.

    Other threads wait; checks of a thread that runs code of the user's own are off meanwhile.
    """
    with ALONE:
        torch_flag = torch.distributions.Distribution._validate_args
        try:
            with pyro.validation_enabled(False):
                yield
        finally:
            torch.distributions.Distribution.set_default_validate_args(torch_flag)


@contextmanager
def ignoring(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Without warnings of this kind whose beginning matches; other threads wait."""
    with ALONE, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
