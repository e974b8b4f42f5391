"""A rewritten program returns what it returned, in the operations that were wanted."""

from __future__ import annotations

import torch
from density_cases import numbers
from torch import Tensor

from varmeta.models.capture import trace
from varmeta.models.simplify import accumulate, free_layout, turn_products


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
