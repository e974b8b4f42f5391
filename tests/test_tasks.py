"""Tasks: padding changes nothing, every row keeps its place, splits are partitions."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise

import helpers
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varmeta.models.density import Density
from varmeta.seeds import generator, generators, global_rng
from varmeta.tasks import Tasks, TaskSource

FLOAT = torch.float64
SIZES = (4, 1, 6, 3)
sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def pairs(sizes, seed=0, dtype=FLOAT):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, generator=g, dtype=dtype), torch.randn(n, generator=g, dtype=dtype))
        for n in sizes
    ]


def make(sizes=SIZES, seed=0):
    return Tasks.from_list(pairs(sizes, seed), names=[f"t{i}" for i in range(len(sizes))])


def rows(tasks, i):
    """The rows of task i that exist, as numbers from the original data."""
    return tasks.row_ids[i][tasks.mask[i]].tolist()


def parts(tasks):
    """Row numbers per task name: all, support, query."""
    views = (tasks, tasks.support, tasks.query)
    return {n: [set(rows(v, i)) for v in views] for i, n in enumerate(tasks.names)}


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, s), obs=y)


# -- padding --------------------------------------------------------------------------------------


def test_from_list_keeps_every_row_and_its_type():
    data = [
        (torch.arange(2 * n).reshape(n, 2), torch.arange(n, dtype=torch.float32)) for n in SIZES
    ]
    tasks = Tasks.from_list(data)
    assert tasks.inputs.dtype == torch.int64 and tasks.targets.dtype == torch.float32
    assert tasks.num_rows.tolist() == list(SIZES) and tasks.names == ("0", "1", "2", "3")
    for i, (x, y) in enumerate(data):
        assert torch.equal(tasks.inputs[i][tasks.mask[i]], x)
        assert torch.equal(tasks.targets[i][tasks.mask[i]], y)
    ids = tasks.row_ids[tasks.mask].tolist()
    assert ids == list(range(sum(SIZES))), "rows are numbered task after task"
    assert (tasks.row_ids[~tasks.mask] == -1).all()


def test_padding_repeats_a_row_of_the_same_task():
    tasks = make()
    for i in range(len(tasks)):
        for row in tasks.inputs[i][~tasks.mask[i]]:
            assert (tasks.inputs[i][tasks.mask[i]] == row).all(-1).any()


@few
@given(sizes, st.integers(0, 4), st.integers(0, 100))
def test_padding_changes_neither_likelihood_nor_gradient(sizes, extra, seed):
    tasks = make(sizes, seed)
    density = Density(regression, tasks, shared=["s"])
    noise = torch.Generator().manual_seed(seed)
    theta = torch.randn(len(sizes), 2, generator=noise, dtype=FLOAT, requires_grad=True)
    shared = torch.randn(1, generator=noise, dtype=FLOAT, requires_grad=True)
    out = []
    for t in (tasks, helpers.widened(tasks, extra)):
        value = density.negative_log_likelihood(theta, t, shared)
        out.append((value, *torch.autograd.grad(value.sum(), (theta, shared))))
    for a, b in zip(*out, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # float64 rounding of matmuls


def test_padded_rows_have_likelihood_and_gradient_zero():
    tasks = make()
    density = Density(regression, tasks, shared=["s"])
    out = density.log_likelihood(torch.zeros(4, 2, dtype=FLOAT), tasks)
    assert torch.equal(out == 0, ~tasks.mask)


def test_a_task_without_support_rows_is_finite_with_gradient_zero():
    tasks = make().folds(3)  # the task with a single row has an empty support part
    support = tasks.support
    empty = support.num_rows == 0
    assert empty.sum() == 1
    density = Density(regression, make())
    theta = torch.zeros(len(tasks), density.dim, dtype=FLOAT, requires_grad=True)
    value = density.negative_log_likelihood(theta, support)
    (grad,) = torch.autograd.grad(value.sum(), theta)
    assert grad.isfinite().all() and (value[empty] == 0).all() and (grad[empty] == 0).all()
    assert (grad[~empty] != 0).all()


# -- building -------------------------------------------------------------------------------------

frames = st.lists(
    st.tuples(st.sampled_from("cab"), st.integers(-9, 9), st.integers(-9, 9)), min_size=1
)


@few
@given(frames, st.integers(0, 1000))
def test_frame_round_trip(data, start):
    frame = pd.DataFrame(data, columns=["group", "z", "y"]).assign(x=lambda f: 2 * f["y"])
    frame.index = range(start, start + len(frame))  # an index of its own is of no consequence
    tasks = Tasks.from_frame(frame, task="group", inputs=["y", "z"], target="x")
    assert list(tasks.names) == list(frame["group"].unique()), "order of appearance"
    assert tasks.task_name == "group" and tasks.input_names == ("y", "z")
    assert tasks.target_name == "x" and tasks.inputs.dtype == FLOAT
    for i, name in enumerate(tasks.names):
        mine = frame.iloc[rows(tasks, i)]
        assert (mine["group"] == name).all()
        assert rows(tasks, i) == np.flatnonzero(frame["group"] == name).tolist()
        np.testing.assert_array_equal(tasks.inputs[i][tasks.mask[i]], mine[["y", "z"]])
        np.testing.assert_array_equal(tasks.targets[i][tasks.mask[i]], mine["x"])


@pytest.mark.parametrize(
    "column", [["b", "a", "b"], pd.Categorical(["b", "a", "b"], ["a", "b", "c"]), [10, 2, 10]]
)
def test_names_are_in_order_of_appearance_whatever_the_column(column):
    frame = pd.DataFrame({"g": column, "y": [True, False, True]})
    tasks = Tasks.from_frame(frame, task="g", inputs=[], target="y", dtype=torch.float32)
    assert tasks.names == tuple(map(str, dict.fromkeys(column)))
    assert tasks.inputs.shape == (2, 2, 0) and tasks.targets.dtype == torch.float32
    assert rows(tasks, 0) == [0, 2]


def test_csv_is_the_frame_with_names_as_they_are_written(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('county,x,y\nNA,1,2.5\nNone,2,\n007,3,4\nNA,4,0.1\n"a, b",5,6\nnan,6,7\n')
    tasks = Tasks.from_csv(path, task="county", inputs=[], target="x")
    assert tasks.names == ("NA", "None", "007", "a, b", "nan")
    assert rows(tasks, 0) == [0, 3] and tasks.targets[0].tolist() == [1.0, 4.0]
    with pytest.raises(ValueError, match="'y' holds '' in line 3, which is a missing value;"):
        Tasks.from_csv(path, task="county", inputs=["x"], target="y")
    with pytest.raises(ValueError, match="no column 'country'; the data have: county, x, y"):
        Tasks.from_csv(path, task="country", inputs=[], target="y")
    path.write_text("county,y\na,1\n,2\n")
    with pytest.raises(ValueError, match="'county' is empty in line 3"):
        Tasks.from_csv(path, task="county", inputs=[], target="y")


def test_csv_and_frame_agree(tmp_path):
    frame = pd.DataFrame({"id": [3, 1, 3], "x": [0.1, 0.2, 1 / 3], "y": [1.0, 2.0, 3.0]})
    frame.to_csv(tmp_path / "f.csv", index=False)
    kwargs = {"task": "id", "inputs": ["x"], "target": "y"}
    one, two = Tasks.from_frame(frame, **kwargs), Tasks.from_csv(tmp_path / "f.csv", **kwargs)
    assert one.names == two.names == ("3", "1")
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.row_ids, two.row_ids)


# -- splitting ------------------------------------------------------------------------------------


@few
@given(sizes, st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_split_is_a_partition_of_stated_size(sizes, share, seed):
    tasks = make(sizes, seed % 17)
    split = tasks.split(share, seed=seed)
    whole = parts(tasks)
    for (name, (every, support, query)), n in zip(parts(split).items(), sizes, strict=True):
        assert support | query == every == whole[name][0] and not support & query
        assert len(query) == min(round(n * share), n - 1) and support
    assert torch.equal(split.is_query, tasks.split(share, seed=seed).is_query), "seed determinism"


def test_split_depends_on_the_seed_and_takes_every_row_alike():
    tasks = make((8,))
    chosen = torch.stack([tasks.split(0.25, seed=s).is_query[0] for s in range(400)])
    # 400 splits, each row drawn with probability 1/4: z = 5 in 8 rows, false alarm 5e-6
    assert ((chosen.double().mean(0) - 0.25).abs() < 5 * (0.25 * 0.75 / 400) ** 0.5).all()


@few
@given(sizes, st.integers(2, 6), st.integers(0, 100))
def test_in_folds_every_row_is_a_query_row_once(sizes, count, seed):
    tasks = make(sizes)
    folds = tasks.folds(count, seed=seed)
    whole, seen = parts(tasks), {n: [] for n in tasks.names}
    for name, (every, support, query) in parts(folds).items():
        origin = name.split(" [")[0]
        assert query and support | query == every == whole[origin][0] and not support & query
        seen[origin] += sorted(query)
    for name, queried in seen.items():
        assert sorted(queried) == sorted(whole[name][0])
    assert len(set(folds.names)) == len(folds)
    sizes_of_folds = folds.is_query.sum(-1)
    for n in tasks.names:  # folds of one task differ by one row at most
        mine = [int(s) for m, s in zip(folds.names, sizes_of_folds, strict=True) if f"{n} [" in m]
        assert max(mine) - min(mine) <= 1 and len(mine) == min(count, len(seen[n]))
    assert torch.equal(folds.is_query, tasks.folds(count, seed=seed).is_query)


@few
@given(sizes.filter(lambda s: len(s) > 1), st.integers(0, 100), st.data())
def test_hold_out_is_a_partition_of_tasks_in_order(sizes, seed, data):
    tasks = make(sizes).split(0.5)
    count = data.draw(st.integers(1, len(sizes) - 1))
    rest, out = tasks.hold_out(count, seed=seed)
    assert len(out) == count and sorted(rest.names + out.names) == sorted(tasks.names)
    whole = parts(tasks)
    for piece in (rest, out):
        assert list(piece.names) == sorted(piece.names, key=tasks.names.index)
        assert parts(piece) == {n: whole[n] for n in piece.names}
        assert piece.mask.shape[1] == piece.num_rows.max(), "re-padded to the longest"
    assert tasks.hold_out(count, seed=seed)[1].names == out.names


# -- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), [-2, -4]])
def test_select_takes_tasks_in_the_order_asked_for(index):
    tasks = make().split(0.4, seed=3)
    chosen = tasks.select(index)
    assert chosen.names == ("t2", "t0") and chosen.mask.shape == (2, 6)
    assert parts(chosen) == {n: parts(tasks)[n] for n in ("t2", "t0")}
    assert chosen.select([1]).mask.shape == (1, 4)


def test_select_takes_a_bool_index():
    tasks = make()
    assert tasks.select(tasks.num_rows > 3).names == ("t0", "t2")


def test_a_selection_without_query_rows_stays_split():
    """Else the support rows would be scored as query rows, or the query rows adapted to."""
    split = make().split(0.3).select([1])  # one row, in the support part
    assert split.is_split and split.support.num_rows == 1 and split.query.num_rows == 0
    single = make().folds(2)
    lonely = single.select([single.names.index("t1 [0]")])  # one row, in the query part
    assert lonely.is_split and lonely.support.num_rows == 0 and lonely.query.num_rows == 1
    assert not lonely.unsplit.is_split and lonely.unsplit.support.num_rows == 1


def test_support_and_query_are_compact_and_unsplit():
    tasks = make().split(0.5, seed=1)
    for part in (tasks.support, tasks.query):
        assert not part.is_split and not part.is_query.any()
        width = part.num_rows.max()
        assert part.mask.shape == (4, width)
        assert torch.equal(part.mask, torch.arange(width) < part.num_rows[:, None])
        for i in range(4):
            ids = rows(part, i)
            assert ids == sorted(ids), "rows keep their order"
            at = [rows(tasks, i).index(k) for k in ids]
            assert torch.equal(part.inputs[i][part.mask[i]], tasks.inputs[i][at])
            assert torch.equal(part.targets[i][part.mask[i]], tasks.targets[i][at])
        assert (part.row_ids[~part.mask] == -1).all()


def test_tasks_that_are_not_split_are_their_own_support_and_query():
    tasks = make()
    assert tasks.support is tasks and tasks.query is tasks and not tasks.is_split
    assert parts(tasks.split(0.5).unsplit) == parts(tasks)


def test_marking_query_rows_splits():
    tasks = make()
    first = torch.arange(6) == 0
    marked = replace(tasks, is_query=tasks.mask & first)
    assert marked.is_split and (marked.query.num_rows == 1).all()


def test_rows_outside_the_front_are_masked_too():
    """The constructor takes any mask; the views bring the rows to the front."""
    tasks = make((4, 4))
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    targets = torch.where(mask, tasks.targets, torch.nan)
    holes = Tasks(tasks.inputs, targets, mask, torch.zeros_like(mask), ("a", "b"))
    front = holes.select([0, 1])
    assert front.mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(front.targets[0], tasks.targets[0, [0, 2]])
    assert front.targets[1, 0] == tasks.targets[1, 3]
    assert front.targets.isfinite().all(), "padding is made of rows that exist"


def test_to_changes_floating_tensors_alone():
    tasks = make().split().to(torch.float32)
    assert tasks.inputs.dtype == tasks.targets.dtype == torch.float32
    assert tasks.mask.dtype == tasks.is_query.dtype == torch.bool
    assert tasks.row_ids.dtype == torch.int64
    assert torch.equal(tasks.inputs, make().inputs.float())
    labels = Tasks.from_list([(torch.ones(2, 1), torch.tensor([0, 1]))]).to(FLOAT)
    assert labels.targets.dtype == torch.int64 and labels.inputs.dtype == FLOAT
    assert make().to(device="cpu").inputs.dtype == FLOAT


def test_repr_counts():
    assert repr(make().split(0.5, seed=0)) == "Tasks(4 × 'task', 14 rows, 7 query, 1 to 6 each)"


# -- seeds ----------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_batch_however_often_and_in_whatever_order():
    def draw(g):
        x = torch.randn(3, 5, 1, generator=g)
        mask = torch.ones(3, 5, dtype=torch.bool)
        return Tasks(x, x[..., 0], mask, torch.zeros_like(mask), ("a", "b", "c"))

    one, two = TaskSource(draw, seed=4), TaskSource(draw, seed=4)
    forward = [one.batch(k).inputs for k in range(4)]
    backward = [two.batch(k).inputs for k in reversed(range(4))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert not any(torch.equal(a, b) for a, b in pairwise(forward))
    assert not torch.equal(TaskSource(draw, seed=5).batch(0).inputs, forward[0])


def test_streams_of_a_seed_are_all_different():
    streams = [(), (0,), (0, 0), (0, 0, 0), (1,), (0, 1), (1, 0)]
    seeds = {generator(s, *stream).initial_seed() for s in range(3) for stream in streams}
    assert len(seeds) == 3 * len(streams)
    assert generator(2, 5).initial_seed() == generator(2, 5).initial_seed()


@pytest.mark.parametrize("first", [0, 3, 40])
def test_many_generators_are_those_made_one_by_one(first: int):
    many = islice(generators(2, 5, 1, first=first), 70)
    one_by_one = [generator(2, 5, 1, first + k) for k in range(70)]
    assert [g.initial_seed() for g in many] == [g.initial_seed() for g in one_by_one]


def test_global_rng_is_seeded_by_the_generator_and_then_restored():
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with global_rng(generator(7)):
            draws.append(torch.rand(3))
    with pytest.raises(KeyError), global_rng(generator(7)):
        torch.rand(3)
        raise KeyError
    assert torch.equal(*draws) and torch.equal(torch.get_rng_state(), before)
