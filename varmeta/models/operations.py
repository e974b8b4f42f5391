"""Operations of a model that are better done another way, once tasks are batched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, torch.mv, Tensor.matmul, Tensor.__matmul__, Tensor.mv}


class BatchedOperations(TorchFunctionMode):
    """Within it a model runs the same mathematics by operations that batch and record well.

    - x @ w with a vector w becomes, over tasks, a product with a column, which takes PyTorch three
      to eight times as long on a CPU as the same with a row.
    - `binary_cross_entropy_with_logits` writes in place under `vmap`, and could not be recorded;
      it is softplus(l) − y·l.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func in _PRODUCTS and not given and args[0].dim() == 2 and args[1].dim() == 1:
            return _row(args[0], args[1])
        if func is binary_cross_entropy_with_logits and given == {"reduction": "none"}:
            logits, target = args
            return softplus(logits) - target * logits
        return func(*args, **(kwargs or {}))


def _row(matrix: Tensor, vector: Tensor) -> Tensor:
    """`matrix @ vector` as a product with a row: `[N, D]`, `[D]` to `[N]`."""
    return (vector[None] @ matrix.mT)[0]
