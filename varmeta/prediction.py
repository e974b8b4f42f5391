"""Predictions: what a fit says of rows whose targets are not known, in known tasks and in new ones.

What is known of a task is what its posterior is given: the rows that the fit learned from, and the
rows of the data that have a target. A row that both have counts once, so that one table may hold
everything: rows learned from, further rows, and rows to predict.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varmeta.checked import require_kind
from varmeta.columns import Column, Columns
from varmeta.design import Design
from varmeta.models.observed import predicted_sites
from varmeta.posterior import DRAWS, TaskPosterior
from varmeta.raw_data import Table
from varmeta.seeds import generator
from varmeta.tasks import Tasks, TaskSource

if TYPE_CHECKING:
    from varmeta.inference.fitted import Fit

QUANTILES = (0.05, 0.5, 0.95)
TRAINED, UPDATED, ADAPTED, PRIOR = "training", "training and its rows", "its rows", "prior"
_HOW_DATA = "give a data frame with the columns of the training tasks, or vm.Tasks"
_WHICH = (
    "Split the tasks: query rows are predicted, given the support rows. Or let rows to predict "
    "have NaN as targets"
)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a fit says of rows whose targets are not known.

    Attributes:
        table: a row for each of them, in the order of the data: the columns of the data;
            `known_by`, what its task is known by (`"training"`, `"its rows"`, both, or the
            `"prior"` alone); and of each observed site, by its name, `.mean`, `.sd` and quantiles
            (`.q5`, …) of the prediction, which include the noise. Of a site with several entries
            `name[0].mean` and so on; of classes the probability `.p[k]` of each, and the likeliest,
            `.mode`.
        draws: by observed site `[S, rows, *event]`, as many as were asked to be kept.
    """

    table: pd.DataFrame
    draws: Mapping[str, np.ndarray]

    def with_draws(self) -> pd.DataFrame:
        """The table with a column for each draw that was kept, `name.draw[k]` from 0."""
        more = {}
        for site, values in self.draws.items():
            for index in np.ndindex(values.shape[2:]):
                for k in range(len(values)):
                    more[f"{site}{_entry(index)}.draw[{k}]"] = values[(k, slice(None), *index)]
        return pd.concat([self.table, pd.DataFrame(more, index=self.table.index)], axis=1)

    def __str__(self) -> str:
        return self.table.to_string(max_rows=20, float_format="{:.5g}".format)


def predict(
    fit: Fit,
    data: pd.DataFrame | Table | Tasks,
    draws: int = DRAWS,
    quantiles: Sequence[float] = QUANTILES,
    keep: int = 0,
    seed: int = 0,
) -> Predictions:
    """What `Fit.predict` returns; of a `Table`, too, which says what rows are called."""
    _require(draws, quantiles, keep)
    require_kind("data", data, (pd.DataFrame, Table, Tasks), _HOW_DATA)
    frame = data.frame if isinstance(data, Table) else data
    if isinstance(data, Tasks):
        tasks = _marked(fit, data)
    else:
        tasks = _tasks_of(fit, data if isinstance(data, Table) else Table.of(data))
    wanted = _to_predict(fit, tasks)
    rows = int(wanted.mask.sum())
    like = wanted.mask.device
    places = torch.full(wanted.mask.shape, -1, dtype=torch.long, device=like)
    places[wanted.mask] = torch.arange(rows, device=like)  # of the order in which draws come
    assert wanted.row_ids is not None
    ids = wanted.row_ids[wanted.mask].cpu().numpy()
    wanted, columns = replace(wanted, row_ids=places), _Columns(fit, wanted, quantiles, keep, rows)
    known_by = np.empty(rows, dtype=object)
    for k, (posterior, source) in enumerate(_posteriors(fit, tasks, wanted)):
        some = wanted.select([wanted.names.index(name) for name in posterior.names])
        noise = generator(seed, k, device=like)
        for part, found in posterior.predictions(some, draws, noise):
            assert part.row_ids is not None
            place = part.row_ids[part.mask].cpu().numpy()
            known_by[place] = source
            columns.put(place, {name: value[:, part.mask] for name, value in found.items()})
    order = np.argsort(ids, kind="stable")
    if isinstance(frame, pd.DataFrame):
        given = frame.iloc[ids[order]]
    else:
        names = np.array(wanted.names)[wanted.mask.nonzero()[:, 0].cpu().numpy()]
        given = pd.DataFrame({tasks.task_name: names[order], "row": ids[order]})
    made = {"known_by": known_by, **columns.columns}
    fresh = pd.DataFrame({n: v[order] for n, v in made.items()}, index=given.index)
    twice = [name for name in fresh if name in given]
    table = pd.concat([given.drop(columns=twice), fresh], axis=1)
    return Predictions(table, {name: value[:, order] for name, value in columns.draws.items()})


def _require(draws: int, quantiles: Sequence[float], keep: int) -> None:
    for name, value, least in (("draws", draws, 1), ("keep", keep, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if keep > draws:
        raise ValueError(f"keep must be at most draws, {draws}, got {keep}")
    if any(not 0 < q < 1 for q in quantiles):
        raise ValueError(f"quantiles must lie strictly between 0 and 1, got {list(quantiles)}")


# -- which rows ------------------------------------------------------------------------------------


def _tasks_of(fit: Fit, table: Table) -> Tasks:
    """The table as tasks of the fit's kind, in which query rows are those without a target."""
    like = fit.tasks
    if isinstance(like, TaskSource):
        raise ValueError("data: the fit learned from a stream, which has no columns; give vm.Tasks")
    shape = tuple(like.inputs.shape[2:])
    if shape != (len(like.input_names),) or like.targets.dim() > 2:
        raise ValueError(
            f"data: the training tasks have inputs of shape {shape} with the names "
            f"{list(like.input_names)}, so that no columns belong to them; give vm.Tasks, or learn "
            "from tasks that Tasks.from_frame made"
        )
    numbers = partial(Column, kind="number")
    design = like.design or Design(  # of tasks from pairs of tensors with names
        (like.task_name,),
        Columns(tuple(map(numbers, like.input_names))),
        Columns((numbers(like.target_name),)),
    )
    made = Tasks.from_rows(design.read(table, optional_target=True), design, table.first_line)
    inputs, targets = made.inputs.to(like.inputs.dtype), made.targets.to(like.targets.dtype)
    return replace(made, inputs=inputs, targets=targets).to(device=like.mask.device)


def _marked(fit: Fit, tasks: Tasks) -> Tasks:
    """Tasks in which query rows are those to predict: as they are split, or by NaN."""
    if tasks.is_split:
        return tasks
    empty = torch.zeros_like(tasks.mask)
    if tasks.targets.is_floating_point():
        empty = tasks.targets.isnan().reshape(*tasks.mask.shape, -1).all(-1) & tasks.mask
    if bool(empty.any()):
        return replace(tasks, is_query=empty, is_split=True)
    new = [name for name in tasks.names if name not in set(_known(fit))]
    if new:
        raise ValueError(
            f"data: task {new[0]!r} is new, and which of its rows are to be predicted is not said "
            f"({len(new)} such tasks). {_WHICH}"
        )
    return replace(tasks, is_query=tasks.mask, is_split=True)


def _known(fit: Fit) -> tuple[str, ...]:
    return () if isinstance(fit.tasks, TaskSource) else fit.tasks.names


def _to_predict(fit: Fit, tasks: Tasks) -> Tasks:
    """The rows to predict, of the tasks that have some; with targets that say nothing."""
    if not bool(tasks.is_query.any()):
        raise ValueError(
            "data: every row has a target, so that none is to be predicted. Empty the cells to "
            "predict, or leave the target's column out to predict all rows"
        )
    fit.density.check_data(tasks, fit.shared)
    wanted = tasks.query.select(tasks.query.num_rows > 0)
    _check_names(tasks.names, _known(fit))
    finite = wanted.inputs.isfinite().reshape(*wanted.mask.shape, -1).all(-1) | ~wanted.mask
    if not bool(finite.all()):
        place = wanted.place(*(~finite).nonzero()[0].tolist())
        raise ValueError(f"data: {place}: x holds NaN or infinity; drop or fill that row")
    first = fit.tasks.batch(0) if isinstance(fit.tasks, TaskSource) else fit.tasks
    possible = first.targets[0, 0]  # some law may look at it
    return replace(wanted, targets=possible.expand_as(wanted.targets).clone())


# -- what is known ---------------------------------------------------------------------------------


def _posteriors(fit: Fit, tasks: Tasks, wanted: Tasks) -> Iterator[tuple[TaskPosterior, str]]:
    """Of all tasks with rows to predict, by what they are known by."""
    known, names = set(_known(fit)), list(wanted.names)
    seen = tasks.support.select(tasks.support.num_rows > 0) if _some_support(tasks) else None
    with_rows = set() if seen is None else set(seen.names)
    updated: set[str] = set()
    if seen is not None and known & with_rows & set(names):
        again = [name for name in names if name in known & with_rows]
        assert isinstance(fit.tasks, Tasks)
        joined = _joined(fit.tasks, _named(seen, again))
        if joined is not None:
            updated = set(joined.names)
            yield fit.adapt(joined), UPDATED
    trained = [name for name in names if name in known - updated]
    if trained:
        whole = fit.posterior()
        place = {name: k for k, name in enumerate(whole.names)}
        yield whole.select([place[name] for name in trained]), TRAINED
    new = [name for name in names if name in with_rows - known]
    if new:
        assert seen is not None
        yield fit.adapt(_named(seen, new)), ADAPTED
    nothing = [name for name in names if name not in known | with_rows]
    if nothing:
        _warn_of_scales(fit, nothing)
        yield fit.unseen(nothing), PRIOR


def _warn_of_scales(fit: Fit, names: Sequence[str]) -> None:
    """Where Σ is what the model said before any data, so are the widths for tasks without rows."""
    if not bool(fit.state.meta.raw["log_scale"].any()):
        warnings.warn(
            f"{fit.strategy.name} has not learned Σ, so that the predictions for {len(names)} new "
            f"tasks without rows ({names[0]!r}, …) are as wide as the prior that the model states; "
            "learn it by LaplaceEvidence or JointVariational, or give these tasks rows",
            RuntimeWarning,
            stacklevel=5,
        )


def _some_support(tasks: Tasks) -> bool:
    return bool((tasks.mask & ~tasks.is_query).any())


def _named(tasks: Tasks, names: Sequence[str]) -> Tasks:
    place = {name: k for k, name in enumerate(tasks.names)}
    return tasks.select([place[name] for name in names])


def _joined(trained: Tasks, seen: Tasks) -> Tasks | None:
    """The rows learned from and those of `seen`, each once, of tasks where `seen` has others.

    A row that stands twice in one of them counts twice. None if there is no such task.
    """
    trained = _named(trained.unsplit, seen.names)
    first, second = _flat(trained), _flat(seen)
    _, code = np.unique(np.concatenate([first, second]), axis=0, return_inverse=True)
    code, there = code.reshape(-1)[len(first) :], code.reshape(-1)[: len(first)]
    before = pd.Series(code).groupby(code).cumcount().to_numpy()  # of equal rows
    other = before >= np.bincount(there, minlength=int(code.max()) + 1)[code]
    if not other.any():
        return None
    mask = torch.zeros_like(seen.mask)
    mask[seen.mask] = torch.as_tensor(other, device=mask.device)
    fields: dict[str, Any] = {
        name: torch.cat([getattr(trained, name), getattr(seen, name)], 1)
        for name in ("inputs", "targets", "is_query", "row_ids")
    }
    both = replace(trained, mask=torch.cat([trained.mask, mask], 1), first_line=None, **fields)
    return both.select(mask.any(-1))


def _flat(tasks: Tasks) -> np.ndarray:
    """`[rows, ...]`: the number of each row's task, its inputs and its targets."""
    task = tasks.mask.nonzero()[:, :1].double()
    values = [v[tasks.mask].reshape(len(task), -1).double() for v in (tasks.inputs, tasks.targets)]
    found: np.ndarray = torch.cat([task, *values], 1).cpu().numpy()
    return found


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ValueError if a new task has the name of a known one in another spelling."""
    plain = {_plain(name): name for name in known}
    for name in set(names) - set(known):
        near = plain.get(_plain(name))
        if near is not None:
            raise ValueError(
                f"data: task {name!r} is new, and the fit knows {near!r}: are they one task? Write "
                "its name as the training tasks have it (whole numbers become 1.0 where a column "
                "has empty cells: read it as text, dtype=str)"
            )


def _plain(name: str) -> str:
    text = name.strip().casefold()
    whole, point, zeros = text.partition(".")
    return whole if point and whole.lstrip("-").isdigit() and not zeros.strip("0") else text


# -- what is said of a row -------------------------------------------------------------------------


def _entry(index: tuple[int, ...]) -> str:
    """Of a value with several, in the name of its columns."""
    return f"[{','.join(map(str, index))}]" if index else ""


class _Columns:
    """Columns of the table, filled some rows at a time.

    Args:
        fit: whose observed sites they are of.
        tasks: any of those that are predicted.
        quantiles: of the predictions.
        keep: how many draws are kept.
        rows: how many there are.
    """

    def __init__(
        self, fit: Fit, tasks: Tasks, quantiles: Sequence[float], keep: int, rows: int
    ) -> None:
        self.columns: dict[str, np.ndarray] = {}
        self.draws: dict[str, np.ndarray] = {}
        self._classes = predicted_sites(fit.density, tasks)
        self._quantiles, self._keep, self._rows = list(quantiles), keep, rows

    def put(self, place: np.ndarray, drawn: Mapping[str, Tensor]) -> None:
        """Draws `[S, n, *event]` of each observed site, of the rows at these n places."""
        for site in self._classes:
            values = drawn[site].cpu().numpy()
            if self._keep:
                shape = self._keep, self._rows, *values.shape[2:]
                kept = self.draws.setdefault(site, np.empty(shape, values.dtype))
                kept[:, place] = values[: self._keep]
            classes = self._classes[site]
            if classes and values.ndim == 2:
                shares = [(values == k).mean(0) for k in range(classes)]
                self._set(f"{site}.mode", place, np.argmax(shares, 0))
                for k, share in enumerate(shares):
                    self._set(f"{site}.p[{k}]", place, share)
                continue
            flat = values.reshape(*values.shape[:2], -1).astype(float)
            for k, index in enumerate(np.ndindex(values.shape[2:])):
                if classes:  # one of them is 1
                    self._set(f"{site}.p[{index[-1]}]", place, flat[..., k].mean(0))
                else:
                    self._summary(f"{site}{_entry(index)}", place, flat[..., k])

    def _summary(self, name: str, place: np.ndarray, values: np.ndarray) -> None:
        self._set(f"{name}.mean", place, values.mean(0))
        self._set(f"{name}.sd", place, values.std(0, ddof=1) if len(values) > 1 else np.nan)
        if self._quantiles:
            for q, found in zip(
                self._quantiles, np.quantile(values, self._quantiles, axis=0), strict=True
            ):
                self._set(f"{name}.q{100 * q:g}", place, found)

    def _set(self, name: str, place: np.ndarray, values: Any) -> None:
        if name not in self.columns:
            whole = isinstance(values, np.ndarray) and values.dtype.kind == "i"
            self.columns[name] = np.full(self._rows, 0 if whole else np.nan)
            if whole:
                self.columns[name] = self.columns[name].astype(int)
        self.columns[name][place] = values
