"""Layers of PyTorch that `vmap` cannot batch, or that have no second derivative, by ones that do.

Recurrent layers and fused attention are single operations of PyTorch, made for one set of weights.
Here they are the same mathematics in plain products, so that tasks with weights of their own run
together, and gradients of gradients exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Drop = Callable[[Tensor, float], Tensor]


def recurrent(
    kind: str,
    x: Tensor,
    start: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    drop: Drop,
) -> tuple[Tensor, ...]:
    """What `torch.gru`, `torch.lstm`, `torch.rnn_tanh` and `torch.rnn_relu` return.

    Args:
        kind: the name of one of these.
        x: `[N, S, I]`, or `[S, N, I]` unless `batch_first`.
        start: h `[L, N, H]`, or of an LSTM (h, c), L being layers times directions.
        weights: of each layer and direction, one after another.
        has_bias: whether these have biases.
        layers: how many.
        dropout: the share that is dropped between layers while `training`.
        training: whether it is.
        bidirectional: whether a second cell goes from the end to the start.
        batch_first: whether the first dimension is that of rows.
        drop: values and a share p to values of which this share is 0.
    """
    ways, states = 1 + bidirectional, [start] if isinstance(start, Tensor) else list(start)
    size = len(weights) // (layers * ways)
    x = x.transpose(0, 1) if batch_first else x
    ends: list[list[Tensor]] = []
    for layer in range(layers):
        x = drop(x, dropout) if layer and training and dropout else x
        outs = []
        for way in range(ways):
            w_in, w, *rest = weights[len(ends) * size : (len(ends) + 1) * size]
            b_in, b = rest[:2] if has_bias else (None, None)
            project = rest[-1] if size == 3 + 2 * has_bias else None
            state, out, steps = [s[len(ends)] for s in states], [], F.linear(x, w_in, b_in)
            for t in range(len(x))[:: 1 - 2 * way]:
                state = _CELLS[kind](steps[t], F.linear(state[0], w, b), state)
                if project is not None:
                    state[0] = F.linear(state[0], project)
                out.append(state[0])
            outs.append(torch.stack(out[:: 1 - 2 * way]))
            ends.append(state)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
    x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.stack(parts) for parts in zip(*ends, strict=True))


def _gru(from_x: Tensor, from_h: Tensor, state: list[Tensor]) -> list[Tensor]:
    reset, update, new = from_x.chunk(3, -1)
    reset_h, update_h, new_h = from_h.chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    return [new + torch.sigmoid(update + update_h) * (state[0] - new)]


def _lstm(from_x: Tensor, from_h: Tensor, state: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


_CELLS: dict[str, Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]] = {
    "gru": _gru,
    "lstm": _lstm,
    "rnn_tanh": lambda from_x, from_h, state: [torch.tanh(from_x + from_h)],
    "rnn_relu": lambda from_x, from_h, state: [torch.relu(from_x + from_h)],
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    drop: Drop,
) -> Tensor:
    """What `F.scaled_dot_product_attention` returns; `[..., L, E]`, `[..., S, E]`, `[..., S, V]`.

    `drop` is as in `recurrent`.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        shape, device = logits.shape[-2:], logits.device
        attn_mask = torch.ones(shape, dtype=torch.bool, device=device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = torch.where(attn_mask, logits, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    weights = logits.softmax(-1)
    return (drop(weights, dropout_p) if dropout_p else weights) @ value


def multi_head(args: Sequence[Any], kwargs: dict[str, Any], drop: Drop) -> Any:
    """`F.multi_head_attention_forward` with `attention` and `drop` in place of PyTorch's own.

    It is PyTorch's own function, which looks these names up in other globals: its masks and
    projections are many, and none of them needs to be another.
    """
    names = {
        "has_torch_function": lambda tensors: False,
        "scaled_dot_product_attention": lambda *given: attention(*given, drop=drop),
        "dropout": drop,
    }
    whole: Any = F.multi_head_attention_forward
    own = FunctionType(whole.__code__, {**whole.__globals__, **names})
    own.__defaults__, own.__kwdefaults__ = whole.__defaults__, whole.__kwdefaults__
    return own(*args, **kwargs)


def equivalent(func: Any, args: Sequence[Any], kwargs: dict[str, Any], drop: Drop) -> Any:
    """What `func` returns, by plain products; `NotImplemented` if it is none of these layers."""
    name = getattr(func, "__name__", "")
    if name in _CELLS and isinstance(args[3], bool):  # else of packed sequences
        return recurrent(name, *args, drop=drop)
    if name == "scaled_dot_product_attention":
        return attention(*args, **kwargs, drop=drop)
    if func is F.multi_head_attention_forward:
        return multi_head(args, kwargs, drop)
    if name == "_weight_norm":
        v, g, dim = args
        others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
        return v * (g / v.square().sum(others, keepdim=True).sqrt())
    return NotImplemented


def no_drop(x: Tensor, p: float) -> Tensor:
    """What dropout is to a model that has not said how it wants it.

    Raises:
        RuntimeError: in the words of `vmap`.
    """
    raise RuntimeError("random operation: dropout in a recurrent or attention layer")


class Dropout(TorchFunctionMode):
    """Within it dropout is decided by a number: the same number, the same masks.

    A mask is a hash of the number, of how many masks came before, and of a value's place (the
    mixing steps of SplitMix64: Steele, Lea and Flood 2014). Nothing is kept between calls of the
    model, so that under `vmap` each task may have a number of its own, and a recording is right.

    Args:
        key: an int64 scalar; None for values as they are, without dropout.
    """

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key, self.drawn = key, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _KINDS:
            return self._layer(*args, kind=name, **kwargs)
        out = equivalent(func, args, kwargs, self.drop)
        return func(*args, **kwargs) if out is NotImplemented else out

    def drop(self, x: Tensor, p: float, dims: int | None = None) -> Tensor:
        """x with the share p of its values 0, the rest larger; whole slices beyond `dims`."""
        if self.key is None or p == 0:
            return x
        dims = x.dim() if dims is None else dims
        keep = self._keep((*x.shape[:dims], *[1] * (x.dim() - dims)), p)
        return torch.where(keep, x / max(1 - p, 1e-30), 0.0)

    def _layer(
        self, input: Tensor, p: float, training: bool = True, inplace: bool = False, *, kind: str
    ) -> Tensor:
        if not training:
            return input
        if kind == "alpha_dropout":
            return self._alpha(input, p)
        whole = {"dropout1d": 1, "dropout2d": 2, "dropout3d": 3}.get(kind)
        # Of three dimensions, dropout2d takes the first for that of rows.
        dims = None if whole is None else max(input.dim() - whole, 2 if kind == "dropout2d" else 1)
        return self.drop(input, p, dims)

    def _alpha(self, x: Tensor, p: float) -> Tensor:
        """Klambauer et al. 2017, of SELU: mean and variance stay."""
        if self.key is None or p == 0:
            return x
        low = -1.7580993408473766
        scale = ((1 - p) * (1 + p * low**2)) ** -0.5
        return torch.where(self._keep(x.shape, p), x, low) * scale - scale * low * p

    def _keep(self, shape: Sequence[int], p: float) -> Tensor:
        """`shape` bool, each True with probability 1 − p."""
        assert self.key is not None
        self.drawn += 1
        place = torch.arange(math.prod(shape), device=self.key.device).reshape(tuple(shape))
        bits = mixed(self.key + place * _STEP + self.drawn * _STREAM)
        return (bits & (2**31 - 1)) >= round(p * 2**31)


_KINDS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
# Odd numbers of 64 bits, as Python's int64 sees them: of places (the golden ratio), and of masks.
_STEP, _STREAM = 0x9E3779B97F4A7C15 - 2**64, 0x2545F4914F6CDD1D


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 to int64, every bit of which hangs on every bit of `z`."""
    z = (z ^ _right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _right(z, 31)


def _right(z: Tensor, by: int) -> Tensor:
    """The bits moved to the right, 0 coming in from the left."""
    return (z >> by) & (2 ** (64 - by) - 1)
