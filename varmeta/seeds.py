"""Seeds: every random draw comes from a `torch.Generator` made here, never from global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from varmeta.checked import Seed, check
from varmeta.process import ALONE

_AT_ONCE = 32
# PyTorch's operations that draw, by name: those that take a generator, and those that do not.
_TAKING = """
    rand randn randint randperm normal normal_ uniform_ random_ bernoulli bernoulli_ binomial
    poisson multinomial exponential_ geometric_ cauchy_ log_normal_ _standard_gamma
    _sample_dirichlet
"""
_GLOBAL = """
    randint_like dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout
    alpha_dropout_ feature_dropout feature_dropout_ feature_alpha_dropout feature_alpha_dropout_
    native_dropout rrelu rrelu_ rrelu_with_noise rrelu_with_noise_ gumbel_softmax
    fractional_max_pool2d fractional_max_pool2d_with_indices fractional_max_pool3d
    fractional_max_pool3d_with_indices multi_head_attention_forward scaled_dot_product_attention
    gru lstm rnn_relu rnn_tanh miopen_rnn pca_lowrank svd_lowrank
"""
TAKE_A_GENERATOR = frozenset(_TAKING.split())
AS_ANOTHER = {"rand_like": torch.rand, "randn_like": torch.randn}  # which take a generator
DRAW_FROM_GLOBAL_STATE = frozenset(_GLOBAL.split())


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


def global_rng(source: torch.Generator) -> OwnDraws:
    """Run code that only knows PyTorch's global random state (Pyro's samplers) from `source`.

    The global state is left as it was found, and other threads' draws from it are theirs.
    """
    return OwnDraws(int(torch.randint(2**62, (), generator=source, device=source.device)))


class OwnDraws(TorchFunctionMode):
    """Within it, on this thread alone, operations that draw take their numbers from one seed.

    Those that can be given a generator are given one, and the global state is not touched. The few
    that cannot (dropout, a recurrent layer's) run with the global state exchanged for that
    operation: a draw of another thread in these microseconds is disturbed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._own: dict[torch.device, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in TAKE_A_GENERATOR and kwargs.get("generator") is None:
            like = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            device = kwargs.get("device") or (like.device if like is not None else None)
            return func(*args, **kwargs | {"generator": self._generator(device)})
        if name in AS_ANOTHER:
            return self._like(AS_ANOTHER[name], *args, **kwargs)
        if getattr(func, "__module__", "") == "torch.nn.init":
            if "generator" in signature(func).parameters and kwargs.get("generator") is None:
                device = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).device
                kwargs = kwargs | {"generator": self._generator(device)}
            return func(*args, **kwargs)
        if name in DRAW_FROM_GLOBAL_STATE:
            with self._exchanged(), torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _like(self, draw: Any, input: Tensor, *, memory_format: Any = None, **given: Any) -> Any:
        given = {name: value for name, value in given.items() if value is not None}
        given = {"dtype": input.dtype, "device": input.device, **given}
        return draw(input.shape, **given, generator=self._generator(given["device"]))

    def _generator(self, device: torch.device | str | int | None) -> torch.Generator:
        where = torch.get_default_device() if device is None else torch.device(device)
        if where.index is None and where.type == "cuda":
            where = torch.device("cuda", torch.cuda.current_device())
        if where not in self._own:
            self._own[where] = torch.Generator(device=where).manual_seed(self._seed)
        return self._own[where]

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """The global states are this one's, then again what they were."""
        pairs = [(torch.default_generator, self._generator("cpu"))]
        if torch.cuda.is_initialized():
            for index, there in enumerate(torch.cuda.default_generators):
                pairs.append((there, self._generator(torch.device("cuda", index))))
        with ALONE:
            before = [there.get_state() for there, _ in pairs]
            try:
                for there, own in pairs:
                    there.set_state(own.get_state())
                yield
            finally:
                for (there, own), state in zip(pairs, before, strict=True):
                    own.set_state(there.get_state())
                    there.set_state(state)
