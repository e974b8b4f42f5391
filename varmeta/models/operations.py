"""Operations of a model that are better done another way, once tasks are batched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

from varmeta.models.convolution import product_conv2d, windows_overlap_little
from varmeta.models.layers import equivalent, no_drop

_PRODUCTS = {torch.matmul, torch.mv, Tensor.matmul, Tensor.__matmul__, Tensor.mv}
_BLANKS = {torch.zeros, torch.ones, torch.full, torch.empty}
_BLANKS |= {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.clone}
_BLANKS |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.clone}


class BatchedOperations(TorchFunctionMode):
    """Within it a model runs the same mathematics by operations that batch and record well.

    - x @ w with a vector w becomes, over tasks, a product with a column, which takes PyTorch three
      to eight times as long on a CPU as the same with a row.
    - `binary_cross_entropy_with_logits` writes in place under `vmap`, and could not be recorded;
      it is softplus(l) − y·l.
    - Convolutions with a stride become products of windows where they will be compiled; as they
      are, copying the windows costs what the products save.
    - Recurrent and attention layers are plain products (`varmeta.models.layers`).
    - With `anchor`, tensors made by `torch.zeros` and its kin are batched from the start, so that
      a model or a law can write one task's numbers into them.
    - `torch.isclose` takes two data types (PyTorch's generalised Pareto law mixes them).

    Args:
        compiled: what is recorded within will be compiled.
        anchor: any floating tensor `[D]` that `vmap` batches; None leaves blank tensors alone.
    """

    def __init__(self, compiled: bool = False, anchor: Tensor | None = None) -> None:
        super().__init__()
        self.compiled = compiled
        self.blank = None if anchor is None else anchor.detach().new_zeros(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func in _PRODUCTS and not given and args[0].dim() == 2 and args[1].dim() == 1:
            return _row(args[0], args[1])
        if func is binary_cross_entropy_with_logits and given == {"reduction": "none"}:
            logits, target = args
            return softplus(logits) - target * logits
        if func is torch.conv2d and self.compiled:
            return _convolution(*args, **(kwargs or {}))
        if func is torch.isclose:
            return func(args[0], args[1].to(args[0].dtype), *args[2:], **(kwargs or {}))
        if func in _BLANKS and self.blank is not None:
            made = func(*args, **(kwargs or {}))
            return (made + self.blank).to(made.dtype)
        out = equivalent(func, args, kwargs or {}, no_drop)
        return func(*args, **(kwargs or {})) if out is NotImplemented else out


def _convolution(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    stride = _pair(stride)
    plain = groups == 1 and _pair(dilation) == (1, 1) and not isinstance(padding, str)
    if plain and image.dim() == 4 and windows_overlap_little(weight, stride):
        return product_conv2d(image, weight, bias, stride, _pair(padding))
    return torch.conv2d(image, weight, bias, stride, padding, dilation, groups)


def _row(matrix: Tensor, vector: Tensor) -> Tensor:
    """`matrix @ vector` as a product with a row: `[N, D]`, `[D]` to `[N]`."""
    return (vector[None] @ matrix.mT)[0]
