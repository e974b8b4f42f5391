"""Operations done another way under vmap give what the model's own would have given."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from helpers import FLOAT
from torch import Tensor

from varmeta.models.operations import BatchedOperations


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


X, W, Y = numbers(5, 3), numbers(3, seed=1), numbers(5, seed=2)

CASES = {
    "@": lambda: X @ W,
    "matmul": lambda: torch.matmul(X, W),
    "mv": lambda: X.mv(W),
    "a matrix": lambda: X @ X.mT,
    "a batch": lambda: X[None] @ W,
    "Bernoulli": lambda: dist.Bernoulli(logits=Y).log_prob((X[:, 0] > 0).to(FLOAT)),
    "far out": lambda: dist.Bernoulli(logits=1000 * Y).log_prob(torch.ones(5, dtype=FLOAT)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_value(name: str) -> None:
    wanted = CASES[name]()
    with BatchedOperations():
        got = CASES[name]()
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_no_column_is_multiplied() -> None:
    """That is what it is for: a batch of products with columns is slow on a CPU."""

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        columns = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.bmm.default and args[1].shape[-1] == 1:
                self.columns += 1
            return func(*args, **(kwargs or {}))

    x, w = numbers(4, 5, 3), numbers(4, 3, seed=1).requires_grad_()

    def columns() -> int:
        with Shapes() as seen:
            out = torch.vmap(lambda a, b: a @ b)(x, w)
            torch.autograd.grad(out.square().sum(), w)
        return seen.columns

    assert columns() > 0
    with BatchedOperations():
        assert columns() == 0
