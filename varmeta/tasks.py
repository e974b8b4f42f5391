"""Tasks: small related data sets as padded tensors, each with a support and a query part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta import lengths
from varmeta.csv_files import read_csv
from varmeta.design import Design, Rows
from varmeta.digest import digests_of
from varmeta.pickling import require_picklable
from varmeta.raw_data import Missing, Table, check_pair, pad
from varmeta.seeds import generator

_log = logging.getLogger("varmeta")
# What a message says to those who give something else in place of tasks.
HOW_TASKS = "make them by vm.Tasks.from_frame(frame, task=..., inputs=[...], target=...)"


@dataclass(frozen=True, eq=False)
class Tasks:
    """T related data sets, ragged groups padded to a common number of rows N.

    Build one with `from_frame`, `from_csv` or `from_list`; the constructor itself takes tensors
    that are padded already. Padding is a row of the same task, or whatever keeps the model finite;
    `mask` says which rows exist, and every loss in varmeta counts those alone.

    Attributes:
        inputs: `[T, N, *input_shape]`, what the model of one task receives as `x`.
        targets: `[T, N, *target_shape]`, what it receives as `y`.
        mask: `[T, N]` bool, True where a row exists.
        is_query: `[T, N]` bool, True where an existing row belongs to the query part; all False
            when the tasks have not been split.
        names: one name per task; they become coordinates in ArviZ.
        task_name: what a task is (`"county"`).
        input_names: column names of the inputs, if they have any.
        target_name: column name of the target.
        row_ids: `[T, N]` int, the row's number in the data it comes from; -1 for padding.
        is_split: whether there are a support and a query part. So it is when `is_query` holds a
            True; tasks selected from split ones stay split though none has a query row.
        first_line: line of the file where row 0 stands, for messages; None where none is known.
        design: how they were made of a table; `from_frame(new, design=tasks.design)` makes others.

    Raises:
        ValueError: shapes that do not fit together, repeated names, no tasks.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    is_query: Tensor
    names: tuple[str, ...]
    task_name: str = "task"
    input_names: tuple[str, ...] = ()
    target_name: str = "target"
    row_ids: Tensor | None = None
    is_split: bool = False
    first_line: int | None = None
    design: Design | None = None

    def __post_init__(self) -> None:
        rows = tuple(self.mask.shape)
        for name in ("inputs", "targets", "is_query"):
            got = tuple(getattr(self, name).shape)
            if len(rows) != 2 or got[:2] != rows:
                raise ValueError(
                    f"{name} has shape {got}, mask {rows}; wanted the same [tasks, rows]"
                )
        if len(self.names) != rows[0]:
            raise ValueError(
                f"names has {len(self.names)} entries for {rows[0]} tasks; give one each"
            )
        if rows[0] == 0:
            raise ValueError("there are no tasks; give at least one")
        if len(set(self.names)) != len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise ValueError(f"names holds {twice!r} twice; every task needs a name of its own")
        if bool(self.is_query.any()):
            object.__setattr__(self, "is_split", True)
        if self.row_ids is None:
            ids = torch.full(rows, -1, dtype=torch.long, device=self.mask.device)
            ids[self.mask] = torch.arange(int(self.mask.sum()), device=self.mask.device)
            object.__setattr__(self, "row_ids", ids)

    # -- building ---------------------------------------------------------------------------------

    @classmethod
    def from_list(
        cls,
        pairs: Sequence[tuple[Tensor | np.ndarray, Tensor | np.ndarray]],
        *,
        names: Sequence[str] | None = None,
        task_name: str = "task",
        input_names: Sequence[str] = (),
        target_name: str = "target",
    ) -> Tasks:
        """Tasks from `[(x, y), ...]`, x of shape `[n_i, *input_shape]`, y `[n_i, *target_shape]`.

        Data types are kept as they are given. A target of NaN is one to be predicted
        (`fit.predict`); of a target of several entries some may be NaN, which count for nothing.

        Example:
            >>> tasks = Tasks.from_list(
            ...     [(torch.ones(3, 1), torch.ones(3)), (torch.ones(2, 1), torch.ones(2))]
            ... )
            >>> tasks.inputs.shape, tasks.num_rows.tolist()
            (torch.Size([2, 3, 1]), [3, 2])
        """
        if not pairs:
            raise ValueError("pairs is empty; give at least one (x, y)")
        labels = [str(i) for i in range(len(pairs))] if names is None else [str(n) for n in names]
        if len(labels) != len(pairs):
            raise ValueError(f"names has {len(labels)} entries for {len(pairs)} tasks")
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for label, (x_raw, y_raw) in zip(labels, pairs, strict=True):
            x, y = torch.as_tensor(x_raw), torch.as_tensor(y_raw)
            check_pair(label, x, y, *(xs[0], ys[0]) if xs else (x, y))
            xs.append(x)
            ys.append(y)
        width = max(len(y) for y in ys)
        count = torch.tensor([len(y) for y in ys], device=ys[0].device)
        mask = torch.arange(width, device=ys[0].device) < count[:, None]
        return cls(
            inputs=torch.stack([pad(x, width) for x in xs]),
            targets=torch.stack([pad(y, width) for y in ys]),
            mask=mask,
            is_query=torch.zeros_like(mask),
            names=tuple(labels),
            task_name=task_name,
            input_names=tuple(input_names),
            target_name=target_name,
        )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        task: str | None = None,
        inputs: Sequence[str] | None = None,
        target: str | None = None,
        dtype: torch.dtype = torch.float64,
        integers: Sequence[str] = (),
        query: str | None = None,
        missing: Missing = "error",
        design: Design | None = None,
    ) -> Tasks:
        """Tasks from a data frame with one row per datum; tasks keep their order of appearance.

        Args:
            frame: the data.
            task: column that says which task a row belongs to.
            inputs: columns, in the order in which the model reads `x[..., k]`; may be empty.
                Numbers (also as text) and truths are taken as they are. Texts and categories become
                an indicator for each level but the first, `soil[sand]` in `input_names`, and so do
                numbers as `"C(year)"`; dates become days since the earliest one.
            target: column of numbers or truths.
            dtype: of inputs and targets; tables are small, and curvature is more exact in float64.
            integers: `"inputs"`, `"target"` or both: these stay whole numbers (`torch.int64`), for
                an embedding or counts, and their levels are numbered from 0 in place of indicators.
            query: column of truths (or 0 and 1): which rows are query rows.
            missing: `"drop"` leaves out rows with a missing value, and says which in the log.
            design: `tasks.design` of other tasks, in place of all that names columns: these data
                are coded as those were.

        Raises:
            ValueError: a column that does not exist, has two uses, or holds what it cannot: with
                the row and its value; with `design`, a level that its data did not have.
        """
        named = {"task": task, "inputs": inputs, "target": target, "query": query}
        return cls._from_table(Table.of(frame), named, dtype, integers, missing, design)

    @classmethod
    def from_csv(
        cls,
        path: str | PathLike[str],
        *,
        task: str | None = None,
        inputs: Sequence[str] | None = None,
        target: str | None = None,
        dtype: torch.dtype = torch.float64,
        integers: Sequence[str] = (),
        query: str | None = None,
        missing: Missing = "error",
        design: Design | None = None,
    ) -> Tasks:
        """`from_frame` on a CSV file; names of tasks are taken as they are written (007, NA).

        The file has a first line of column names, in UTF-8 (or with a byte order mark of UTF-16);
        gzip may have packed it. Columns are separated by commas, semicolons, tabs or bars; where
        it is not by commas, decimals may be. Columns that are not named may hold anything.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no CSV file, or as `from_frame` does, with the line of the file.
        """
        named = {"task": task, "inputs": inputs, "target": target, "query": query}
        return cls._from_table(read_csv(path), named, dtype, integers, missing, design)

    @classmethod
    def _from_table(
        cls,
        table: Table,
        named: dict[str, Any],
        dtype: torch.dtype,
        integers: Sequence[str],
        missing: Missing,
        design: Design | None,
    ) -> Tasks:
        given = [name for name, value in named.items() if value is not None]
        if design is not None:
            if given:
                raise ValueError(f"design names the columns; leave {', '.join(given)} out")
        else:
            for name in ("task", "inputs", "target"):
                if name not in given:
                    raise ValueError(f"{name} is missing; name its column, or give a design")
            named = {**named, "query": named["query"] or ""}
            design = Design.of_columns(
                table, **named, dtype=dtype, integers=integers, missing=missing
            )
        return cls.from_rows(design.read(table, missing=missing), design, table.first_line)

    @classmethod
    def from_rows(cls, rows: Rows, design: Design, first_line: int | None = None) -> Tasks:
        """Tasks from a table that a design has read (`Design.read`)."""
        if rows.said:
            _log.warning("%s", rows.said)
        order = np.argsort(rows.codes, kind="stable")
        ends = np.bincount(rows.codes).tolist()
        where = torch.as_tensor(order)
        pairs = zip(rows.inputs[where].split(ends), rows.targets[where].split(ends), strict=True)
        tasks = cls.from_list(
            list(pairs),
            names=rows.labels,
            task_name=":".join(design.task),
            input_names=design.inputs.names,
            target_name=design.target.names[0],
        )
        ids = torch.full(tasks.mask.shape, -1, dtype=torch.long)
        ids[tasks.mask] = torch.as_tensor(rows.rows[order])
        tasks = replace(tasks, row_ids=ids, first_line=first_line, design=design)
        if rows.is_query is None:
            return tasks
        is_query = torch.zeros_like(tasks.mask)
        is_query[tasks.mask] = torch.as_tensor(rows.is_query[order])
        return replace(tasks, is_query=is_query, is_split=True)

    # -- looking ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        rows = self.num_rows
        split = f", {int(self.is_query.sum())} query" if self.is_split else ""
        return (
            f"Tasks({len(self)} × {self.task_name!r}, {int(rows.sum())} rows{split}, "
            f"{int(rows.min())} to {int(rows.max())} each)"
        )

    @property
    def num_rows(self) -> Tensor:
        """`[T]` int, how many rows each task has (support and query together)."""
        return self.mask.sum(-1)

    @cached_property
    def support(self) -> Tasks:
        """The support parts as tasks of their own; all rows when not split."""
        return self._part(self.mask & ~self.is_query) if self.is_split else self

    @cached_property
    def query(self) -> Tasks:
        """The query parts as tasks of their own; all rows when not split (f and g coincide)."""
        return self._part(self.mask & self.is_query) if self.is_split else self

    @cached_property
    def unsplit(self) -> Tasks:
        """The same rows with the split forgotten."""
        return replace(self, is_query=torch.zeros_like(self.is_query), is_split=False)

    @cached_property
    def buckets(self) -> lengths.Buckets | None:
        """The tasks by their length, where most of these tensors is padding; None elsewhere."""
        return lengths.buckets(self)

    @property
    def padded_rows(self) -> int:
        """Rows that sums over rows go through, padding included."""
        groups = (self,) if self.buckets is None else self.buckets.groups
        return sum(group.mask.numel() for group in groups)

    def place(self, task: int, row: int) -> str:
        """Where a row is to be found, in words; all but lines of a file are counted from 0."""
        assert self.row_ids is not None
        where, name = int(self.row_ids[task, row]), self.names[task]
        if self.first_line is not None:
            return f"task {name!r}, line {where + self.first_line}"
        return f"task {name!r}, row {row} of the task (row {where} of the data)"

    def require_rows(self, argument: str) -> None:
        """Raise a ValueError that names the first task without support rows, if there is one."""
        empty = (self.support.num_rows == 0).nonzero()
        if len(empty):
            raise ValueError(
                f"{argument}: task {self.names[int(empty[0])]!r} has no support rows; "
                "leave it out, or move some of its query rows to the support part"
            )

    def require_no_query(self, argument: str, otherwise: str) -> None:
        """Raise a ValueError if rows are held out: whether they count here has to be said."""
        if bool(self.is_query.any()):
            raise ValueError(
                f"{argument} has {int(self.is_query.sum())} query rows, which are held out: pass "
                f"tasks.support to leave them out, or tasks.unsplit {otherwise}"
            )

    # -- splitting --------------------------------------------------------------------------------

    def split(
        self,
        query: float | Tensor | Sequence[Tensor | np.ndarray | Sequence[bool]] = 0.3,
        *,
        seed: int = 0,
    ) -> Tasks:
        """Move rows of each task to its query part: a random share, or those that masks name.

        A share is rounded to whole rows; at least one row stays in the support part, so that a
        task with one row has no query row.

        Args:
            query: the share; or masks, one for each task with a truth for each of its rows in
                their order, as a list or as `[T, N]` bool.
            seed: of the random rows.

        Raises:
            ValueError: a share outside (0, 1), or masks of other shapes.

        Example:
            >>> tasks = Tasks.from_list([(torch.ones(3, 1), torch.ones(3))] * 2)
            >>> tasks.split([[False, False, True], [True, False, False]]).query.num_rows.tolist()
            [1, 1]
        """
        if not isinstance(query, (int, float)):
            return replace(self, is_query=self._from_masks(query), is_split=True)
        if not 0.0 < query < 1.0:
            raise ValueError(f"query must lie strictly between 0 and 1, got {query}")
        count = (self.num_rows.double() * query).round().long().minimum(self.num_rows - 1)
        rank = self._shuffled_rank(generator(seed))
        return replace(self, is_query=rank < count[:, None], is_split=True)

    def folds(self, count: int = 5, *, seed: int = 0) -> Tasks:
        """Cross-validation within each task: every row is a query row exactly once.

        Returns one task per (task, fold) with rows in that fold: fold k's rows are its query part,
        the task's other rows its support part, which is empty for a task with a single row (there,
        adapting leaves θ0 as it is).
        """
        if count < 2:
            raise ValueError(f"count must be at least 2, got {count}")
        fold = torch.where(self.mask, self._shuffled_rank(generator(seed)) % count, -1)
        wanted = fold[None] == torch.arange(count, device=fold.device)[:, None, None]  # [K, T, N]
        keep = wanted.any(-1).T.nonzero()  # rows (task, fold), tasks together
        task, k = keep[:, 0], keep[:, 1]
        names = tuple(f"{self.names[t]} [{f}]" for t, f in keep.tolist())
        return replace(self._take(task, names), is_query=wanted[k, task], is_split=True)

    def hold_out(self, count: int, *, seed: int = 0) -> tuple[Tasks, Tasks]:
        """Set `count` random whole tasks aside: `(the rest, those)`, each in the original order."""
        if not 0 < count < len(self):
            raise ValueError(f"count must lie between 1 and {len(self) - 1} tasks, got {count}")
        order = torch.randperm(len(self), generator=generator(seed))
        return self.select(order[count:].sort().values), self.select(order[:count].sort().values)

    def minibatch(self, rows: int, generator: torch.Generator) -> tuple[Tasks, Tensor]:
        """Random rows of each task, without replacement, as tasks of at most so many rows.

        Also, `[T]`, how many of a task's rows each drawn one stands for: weighted by it, a sum over
        the drawn rows is an unbiased estimate of the sum over all.
        """
        rank = self._shuffled_rank(generator)
        count = self.num_rows.clamp(max=rows)
        part = self._part(rank < count[:, None], is_split=self.is_split)
        return part, self.num_rows.clamp(min=1).double() / count.clamp(min=1)

    def select(self, index: Tensor | Sequence[int]) -> Tasks:
        """The tasks at these positions (or where a bool is True), re-padded to the longest."""
        index = torch.as_tensor(index, device=self.mask.device)
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        return self._part(self.mask[index], is_split=self.is_split, index=index)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tasks:
        """Floating tensors to `dtype`, all tensors to `device`."""
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    # -- private ----------------------------------------------------------------------------------

    def _map(self, change: Callable[[Tensor], Tensor], **fields: Any) -> Tasks:
        for name in ("inputs", "targets", "mask", "is_query", "row_ids"):
            fields[name] = change(getattr(self, name))
        return replace(self, **fields)

    def _take(self, index: Tensor, names: tuple[str, ...]) -> Tasks:
        return self._map(lambda t: t[index], names=names)

    def _part(self, mask: Tensor, is_split: bool = False, index: Tensor | None = None) -> Tasks:
        """Only the rows in `mask`, to the front and re-padded; of the tasks `index`, or of all."""
        count = mask.sum(-1)
        width = max(int(count.max()), 1) if len(count) else 1
        # Existing rows first, in their order; then repeat the first of them as padding. A task with
        # no row left pads with whatever row it has: masked, but finite.
        task, column = mask.nonzero(as_tuple=True)
        place = torch.arange(len(task), device=mask.device) - (count.cumsum(0) - count)[task]
        order = column.new_zeros(len(mask), width).index_put_((task, place), column)
        kept = torch.arange(width, device=mask.device) < count[:, None]
        order = torch.where(kept, order, order[:, :1])
        rows = torch.arange(len(self), device=mask.device) if index is None else index
        names = self.names if index is None else tuple(self.names[i] for i in index.tolist())
        part = self._map(lambda t: t[rows[:, None], order], names=names)
        assert part.row_ids is not None
        return replace(
            part,
            mask=kept,
            is_query=part.is_query & kept if is_split else torch.zeros_like(kept),
            row_ids=part.row_ids.where(kept, -1),
            is_split=is_split,
        )

    def _from_masks(self, masks: Any) -> Tensor:
        """`[T, N]` bool from a mask for each task."""
        if isinstance(masks, Tensor) and masks.shape == self.mask.shape:
            masks = [row[kept] for row, kept in zip(masks, self.mask.to(masks.device), strict=True)]
        if not hasattr(masks, "__len__") or len(masks) != len(self):
            got = len(masks) if hasattr(masks, "__len__") else repr(masks)
            raise ValueError(f"query: wanted a share, or {len(self)} masks, one a task; got {got}")
        out = torch.zeros_like(self.mask)
        for k, mask in enumerate(masks):
            row = torch.as_tensor(np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask))
            wanted = int(self.num_rows[k])
            if tuple(row.shape) != (wanted,) or not bool(((row == 0) | (row == 1)).all()):
                raise ValueError(
                    f"query: the mask of task {self.names[k]!r} has shape {tuple(row.shape)} and "
                    f"type {row.dtype}; wanted {wanted} truths, one for each of its rows"
                )
            out[k, self.mask[k]] = row.bool().to(out.device)
        return out

    def _shuffled_rank(self, source: torch.Generator) -> Tensor:
        """`[T, N]` int: a random order of each task's existing rows, padding last."""
        like: Any = {"dtype": torch.float32, "device": source.device}  # whatever the default is
        existing = self.mask.to(source.device)  # so that padding does not change the order
        task = existing.nonzero()[:, 0]
        order = torch.rand(len(task), generator=source, **like).argsort(stable=True)
        order = order[task[order].argsort(stable=True)]  # task after task
        count = existing.sum(-1)
        first = (count.cumsum(0) - count)[task]
        place = torch.arange(len(task), device=task.device) - first
        rank = torch.full_like(existing, existing.shape[1], dtype=torch.long)
        rank[existing] = torch.empty_like(place).index_put_((order,), place)
        return rank.to(self.mask.device)


class TaskSource:
    """An endless, seeded stream of task batches.

    Args:
        draw: makes one batch of (usually split) tasks from a `torch.Generator`.
        seed: of the stream; batch k is always the same, so that interrupted runs can be resumed.
        device: where batches are moved once they are drawn; None leaves them where they are.

    Example:
        >>> from varmeta.models import sinusoids
        >>> source = TaskSource(sinusoids(num_tasks=4, support=5, query=10), seed=0)
        >>> source.batch(0)
        Tasks(4 × 'sinusoid', 60 rows, 40 query, 15 to 15 each)
    """

    def __init__(
        self,
        draw: Callable[[torch.Generator], Tasks],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.draw = draw
        self.digests = digests_of(draw)  # now, since it may change what it reads when it runs
        self.seed = seed
        self.device = device

    def __repr__(self) -> str:
        name = getattr(self.draw, "__name__", type(self.draw).__name__)
        return f"TaskSource({name}, seed={self.seed})"

    def __getstate__(self) -> dict[str, Any]:
        require_picklable("the stream's draw", self.draw)
        return vars(self)

    def batch(self, step: int) -> Tasks:
        """Batch number `step`."""
        drawn = self.draw(generator(self.seed, step))
        return drawn if self.device is None else drawn.to(device=self.device)
