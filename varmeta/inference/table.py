"""The table of per-task numbers: one row per task, each with its own Adam, only visited rows move.

`torch.optim.SparseAdam` corrects the bias of its moments by the steps of the whole table, which
makes the first step of a rarely visited row several times too long; here each row counts its own
visits. Everything lies in plain tensors, so that a run is saved with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A q_i starts as wide as the prior, where gradients are a hundred times those at its end: with the
# usual 0.999 their squares hold it back for a thousand steps.
_BETA, _BETA_SQUARE, _EPS = 0.9, 0.95, 1e-8


def new_table(row: Tensor, count: int) -> dict[str, Tensor]:
    """`count` copies of a row `[K]`: `rows`, `momentum` and `square` `[T, K]`, `visits` `[T]`."""
    rows = row.detach().repeat(count, 1)
    return {
        "rows": rows,
        "momentum": torch.zeros_like(rows),
        "square": torch.zeros_like(rows),
        "visits": rows.new_zeros(count),
    }


def descend(table: dict[str, Tensor], index: Tensor, grad: Tensor, rate: Tensor) -> None:
    """One step of Adam (Kingma & Ba, 2015) on the rows `index` `[B]`.

    `grad` is `[B, K]`, `rate` `[B]`.
    """
    momentum = table["momentum"][index].lerp(grad, 1 - _BETA)
    square = table["square"][index].lerp(grad**2, 1 - _BETA_SQUARE)
    visits = table["visits"][index] + 1
    table["momentum"][index], table["square"][index] = momentum, square
    table["visits"][index] = visits
    mean = momentum / (1 - _BETA**visits)[:, None]
    size = (square / (1 - _BETA_SQUARE**visits)[:, None]).sqrt() + _EPS
    table["rows"][index] -= rate[:, None] * mean / size


def reset(table: dict[str, Tensor], which: Tensor, row: Tensor, amount: float) -> None:
    """Move rows, `which` `[T]` bool, a share `amount` of the way to `row` `[K]`.

    Their Adam forgets as much.
    """
    table["rows"][which] = table["rows"][which].lerp(row, amount)
    for name in ("momentum", "square"):
        table[name][which] *= 1 - amount
    if amount == 1:
        table["visits"][which] = 0
