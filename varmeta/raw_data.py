"""What tasks are built from: pairs of tensors and tables, checked and padded."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def pad(rows: Tensor, width: int) -> Tensor:
    """`[n, ...]` to `[width, ...]`, with copies of the first row."""
    return torch.cat([rows, rows[:1].expand(width - len(rows), *rows.shape[1:])])


def check_pair(label: str, x: Tensor, y: Tensor, first_x: Tensor, first_y: Tensor) -> None:
    """Raise a ValueError unless x and y of a task fit each other and the first task's."""
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(
            f"task {label!r}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; "
            "wanted the same number of rows in both"
        )
    if len(y) == 0:
        raise ValueError(f"task {label!r} is empty; drop it or give it at least one row")
    for name, value, first in (("x", x, first_x), ("y", y, first_y)):
        if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
            raise ValueError(
                f"task {label!r}: {name} has rows of shape {tuple(value.shape[1:])} and type "
                f"{value.dtype}, the first task {tuple(first.shape[1:])} and {first.dtype}; "
                "wanted the same for all tasks"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            row = int((~value.isfinite()).nonzero()[0, 0])
            raise ValueError(
                f"task {label!r}: {name} holds NaN or infinity in row {row}; drop or fill that row"
            )


def numeric(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """The columns as a float64 array, or an error that names the column and the row."""
    values = np.empty((len(frame), len(columns)))
    for k, column in enumerate(columns):
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise ValueError(
                f"column {column!r} is not numeric (it holds {frame[column].iloc[0]!r}); "
                "encode it as numbers"
            )
        values[:, k] = frame[column].to_numpy(dtype=float, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(values[:, k]))
        if len(bad):
            raise ValueError(
                f"column {column!r} holds NaN or infinity in row {bad[0]} "
                f"({len(bad)} in all); drop or fill these rows"
            )
    return values
