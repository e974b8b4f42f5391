"""A rewritten program returns what it returned, in the operations that were wanted."""

from __future__ import annotations

import torch
from density_cases import FLOAT, numbers
from torch import Tensor

from varmeta.models.capture import trace
from varmeta.models.simplify import accumulate, free_layout, turn_products


def test_what_changes_nothing_is_left_out() -> None:
    """Of numbers, and of tensors that are full of them; what changes type or shape stays."""
    ones, column, zeros = (
        torch.ones(2, 3, dtype=FLOAT),
        torch.ones(2, 1, dtype=FLOAT),
        torch.zeros(3),
    )

    def nothing(x: Tensor) -> Tensor:
        x = (x.exp() * 1 * ones / column + zeros - 0) ** 1
        x = torch.zeros_like(x) + column * x
        return (x - zeros.expand(2, 3)).tanh()

    def something(x: Tensor) -> list[Tensor]:
        narrow = x[:, :1]
        first = torch.cat([ones[:1], 2 * ones[:1]]), torch.tensor([0.0, -0.1, 0.0])
        return [
            *(ones / x, zeros - x, column.expand(2, 3) - x, x * first[0], x + first[1]),
            *(narrow * ones, narrow + zeros, x.int() * 1.0, x.float() + zeros.to(FLOAT)),
            *(x * 0, x / 2, x**0, 1 - x, torch.add(x, ones, alpha=0), torch.full_like(x, 3.0) * x),
        ]

    x = numbers(2, 3)
    graph = trace(nothing, [x])
    assert torch.equal(graph(x), nothing(x))
    left = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert left == [torch.ops.aten.exp.default, torch.ops.aten.tanh.default]
    for got, wanted in zip(trace(something, [x])(x), something(x), strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype


def test_constants_take_no_more_memory_than_they_did() -> None:
    one = torch.ones((), dtype=FLOAT)

    def function(x: Tensor) -> Tensor:
        large = torch.zeros_like(x)  # may be as large as θ: not kept
        return x.sum() * torch.ones_like(x.sum()) + (one * 3).expand(1000, 3) * x[:1] + large[:1]

    x = numbers(1000, 3)
    graph = trace(function, [x])
    assert torch.equal(graph(x), function(x))
    kept = list(graph.buffers())
    assert kept and sum(t.untyped_storage().nbytes() for t in kept) <= 8 * len(kept)


def test_transposes_of_products_are_products_of_transposes() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        left, right = a.mT @ c, (a @ b).mT
        whole = (left + right.mT @ right).mT  # of a sum of products
        twice = a @ b  # needed as it is, too
        return [whole.reshape(2, 9), right, twice, twice.mT + 1, (a @ b @ c).transpose(1, 2)]

    tensors = [numbers(2, 3, 3, seed=s) for s in range(3)]
    graph = turn_products(trace(function, tensors, simpler=False))
    for got, wanted in zip(graph(*tensors), function(*tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    transposes = [n for n in graph.graph.nodes if n.target is torch.ops.aten.transpose.int]
    of = [n.args[0] for n in transposes]
    once = [n for n in of if n.target is torch.ops.aten.bmm.default and len(n.users) == 1]
    assert of and not once


def test_sums_of_products_are_added_in_place() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        ab, bc, ca = a.bmm(b), b.bmm(c), c.bmm(a)
        alone = a.bmm(c) + c.bmm(b)
        return [ab + bc + ca, alone, ab, ca + c, torch.add(b.bmm(a), c.bmm(c), alpha=2)]

    tensors = [numbers(2, 3, 3, seed=s) for s in range(3)]
    graph = accumulate(trace(function, tensors, simpler=False))
    for got, wanted in zip(graph(*tensors), function(*tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert sum(n.target is torch.ops.aten.baddbmm.default for n in graph.graph.nodes) == 1


def test_a_layout_that_was_asked_for_is_not_kept() -> None:
    """But a copy that is part of a `reshape` is, and so is a copy of an argument."""

    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        turned = a.exp().mT
        return [
            turned.contiguous().relu(),
            turned.contiguous().view(2, 12),
            turned.reshape(24),
            b.clone(),
        ]

    tensors = numbers(2, 3, 4), numbers(2, seed=1)
    graph = free_layout(trace(function, tensors, simpler=False))
    got = graph(*tensors)
    for a, wanted in zip(got, function(*tensors), strict=True):
        torch.testing.assert_close(a, wanted)
    assert got[0].stride() == tensors[0].mT.stride() and got[3] is not tensors[1]
