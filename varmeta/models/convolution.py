"""Convolutions as matrix products of windows, which compile into few kernels over a batch of tasks.

Tasks with weights of their own make a grouped convolution, whose derivatives PyTorch's library
takes slowly, and second ones group by group. A batch of products has none of that, and a compiler
fuses the copying of the windows with what stands before it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pair = tuple[int, ...]
COPIES = 3.0  # of a pixel, on average; where windows overlap more, copying them costs too much


def windows_overlap_little(weight: Tensor, stride: Pair) -> bool:
    """Whether windows as large as `weight` `[F, C, k, l]` copy a pixel `COPIES` times at most."""
    return math.prod(weight.shape[2:]) <= COPIES * math.prod(stride)


def product_conv2d(
    image: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
) -> Tensor:
    """`torch.conv2d` in one product: `[N, C, H, W]` and `[F, C, k, l]` to `[N, F, H', W']`.

    Has derivatives of any order, and is made of operations that write nowhere.
    """
    rows, filters = len(image), len(weight)
    out_size, *places = _places(tuple(image.shape[2:]), tuple(weight.shape[2:]), stride, padding)
    # Channels last: a window is made of whole rows of them.
    pixels = image.flatten(2).mT
    windows = _Sums.apply(pixels, *(torch.tensor(p, device=image.device) for p in places))
    taps = weight.flatten(2)
    # Either way the derivative in the weights is a product that ends long, in filters or in taps:
    # with the few taps of one channel last, PyTorch's library takes four times as long.
    if taps[0].numel() < filters:
        matrix = taps.permute(2, 1, 0).reshape(-1, filters)
    else:
        matrix = taps.mT.reshape(filters, -1).mT
    out = windows.reshape(rows * math.prod(out_size), -1) @ matrix
    out = out if bias is None else out + bias
    # Laid out as by `torch.conv2d`, for a model that asks for a view of it.
    return out.reshape(rows, -1, filters).mT.contiguous().unflatten(2, out_size)


class _Sums(torch.autograd.Function):
    """Each row of the result is a sum of rows: Σ_j x[index[j, r]], −1 for no row.

    No row is 0 · x[0]: one that is infinite makes NaN there, in its own image alone.

    Args of `apply`:
        x: `[..., P, C]`.
        index: `[J, R]`, rows of x.
        back: `[K, P]`, the same map the other way: which rows of the result x's rows are in.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        total: Tensor | None = None
        # As wide as the rows: inductor lays the result out as most of what is read lies, and were
        # they a column each, it would run down the columns, six times slower.
        chosen = (index >= 0).to(x.dtype)[..., None].expand(-1, -1, x.shape[-1]).contiguous()
        for rows, wanted in zip(index.clamp(min=0), chosen, strict=True):
            term = wanted * x.index_select(-2, rows)
            total = term if total is None else total + term
        assert total is not None
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        return _Sums.apply(grads[0], back, index), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *places: Tensor) -> tuple[Tensor, int]:
        return _Sums.apply(x.movedim(in_dims[0], 0), *places), 0


@lru_cache(maxsize=128)
def _places(
    size: Pair, window: Pair, stride: Pair, padding: Pair
) -> tuple[Pair, np.ndarray, np.ndarray]:
    """How many windows there are each way, the pixel at each of their places, and the converse."""
    pixels = np.arange(math.prod(size)).reshape(size)
    padded = np.pad(pixels, [(p, p) for p in padding], constant_values=-1)
    every = tuple(slice(None, None, s) for s in stride)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[every]
    place = windows.reshape(-1)
    inside = np.flatnonzero(place >= 0)
    inside = inside[np.argsort(place[inside], kind="stable")]  # places of pixel 0, of pixel 1, …
    owner = place[inside]
    nth = np.arange(len(owner)) - np.searchsorted(owner, owner)  # among the places of its pixel
    back = np.full((nth.max(initial=0) + 1, pixels.size), -1)
    back[nth, owner] = inside
    return windows.shape[: len(size)], place[None], back
