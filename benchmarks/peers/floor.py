"""The bare arithmetic: batched gradients written by hand, in matrix products, nothing around them.

A meta-step costs 16 gradients for θ*, 5 products with the Hessian at two gradients each, the
gradient at θ* and the query gradient: 28 with the budgets of the paper. This does just that many
plain gradients (all but the last on support rows), so that it is a price, not a meta-gradient.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import FILTERS, NOISE, URANIUM, Workload, split

Weights = list[Tensor]


class Model(Protocol):
    """A model with its data laid out for matrix products; weights carry a leading T."""

    def pack(self, theta: Tensor) -> Weights:
        """Flat `[D]` to its layers."""
        ...

    def unpack(self, weights: Weights) -> Tensor:
        """`[T, D]`."""
        ...

    def gradient(self, weights: Weights) -> Weights:
        """Of Σ_n −log p(y_n | θ_t), by hand."""
        ...


class Linear:
    """Rows `[T, N, D]` of a linear-Gaussian model: two products.

    Vectors lie as rows: PyTorch's batched product with a column is ten times slower.
    """

    def __init__(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        self.x = torch.where(mask[..., None], x, 0.0)
        self.y = torch.where(mask, y, 0.0)[:, None]
        self.xt = self.x.transpose(1, 2).contiguous()

    def pack(self, theta: Tensor) -> Weights:
        return [theta[None]]

    def unpack(self, weights: Weights) -> Tensor:
        return weights[0][:, 0]

    def gradient(self, weights: Weights) -> Weights:
        residual = torch.baddbmm(self.y, weights[0], self.xt, beta=-1)
        return [torch.bmm(residual, self.x)]


class Line:
    """Intercept and slope `[T, 2]`: too thin for matrix products, elementwise is faster."""

    def __init__(self, x: Tensor, y: Tensor, mask: Tensor, variance: float) -> None:
        weight = mask.to(x.dtype) / variance**0.5
        self.ones, self.x, self.y = weight, weight * x, weight * y

    def pack(self, theta: Tensor) -> Weights:
        return [theta[:1], theta[1:]]

    def unpack(self, weights: Weights) -> Tensor:
        return torch.cat(weights, dim=1)

    def gradient(self, weights: Weights) -> Weights:
        residual = torch.addcmul(-self.y, self.ones, weights[0]).addcmul_(self.x, weights[1])
        return [
            (self.ones * residual).sum(1, keepdim=True),
            (self.x * residual).sum(1, keepdim=True),
        ]


class MLP:
    """1-40-40-1 with ReLU."""

    def __init__(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        self.x, self.y, self.xt = x, y[..., None], x.transpose(1, 2)

    def pack(self, theta: Tensor) -> Weights:
        w1, b1, w2, b2, w3, b3 = split("sinusoid", theta)
        return [w1.T, b1[None], w2.T, b2[None], w3.T, b3[None]]

    def unpack(self, weights: Weights) -> Tensor:
        return torch.cat([w.transpose(1, 2).flatten(1) for w in weights], dim=1)

    def gradient(self, weights: Weights) -> Weights:
        w1, b1, w2, b2, w3, b3 = weights
        h1 = torch.baddbmm(b1, self.x, w1).relu_()
        h2 = torch.baddbmm(b2, h1, w2).relu_()
        d3 = torch.baddbmm(b3, h2, w3).sub_(self.y)
        d2 = torch.bmm(d3, w3.transpose(1, 2)).mul_(h2 > 0)
        d1 = torch.bmm(d2, w2.transpose(1, 2)).mul_(h1 > 0)
        return [
            *(torch.bmm(self.xt, d1), d1.sum(1, keepdim=True)),
            *(torch.bmm(h1.transpose(1, 2), d2), d2.sum(1, keepdim=True)),
            *(torch.bmm(h2.transpose(1, 2), d3), d3.sum(1, keepdim=True)),
        ]


class Conv:
    """Four 3x3 convolutions of stride 2, channels last: windows as a matrix, one product each."""

    def __init__(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        self.count, self.rows = x.shape[:2]
        self.onehot = torch.nn.functional.one_hot(y, 5).to(x.dtype)
        self.first = self._windows(x.movedim(2, -1))[0]

    def pack(self, theta: Tensor) -> Weights:
        *convs, w, b = split("omniglot", theta)
        out = []
        for weight, bias in zip(convs[::2], convs[1::2], strict=True):
            out += [weight.permute(2, 3, 1, 0).reshape(-1, FILTERS), bias[None]]
        return [*out, w.T, b[None]]

    def unpack(self, weights: Weights) -> Tensor:
        *convs, w, b = weights
        out = []
        for weight, bias in zip(convs[::2], convs[1::2], strict=True):
            kernel = weight.reshape(self.count, 3, 3, -1, FILTERS).permute(0, 4, 3, 1, 2)
            out += [kernel.flatten(1), bias.flatten(1)]
        return torch.cat([*out, w.transpose(1, 2).flatten(1), b.flatten(1)], dim=1)

    def gradient(self, weights: Weights) -> Weights:
        *convs, w, b = weights
        columns, hidden, side = self.first, [], 14
        matrices = [columns]
        for layer in range(4):
            h = torch.baddbmm(convs[2 * layer + 1], columns, convs[2 * layer]).relu_()
            hidden.append(h)
            if layer < 3:
                image = h.view(self.count, self.rows, side, side, FILTERS)
                columns, side = self._windows(image)
                matrices.append(columns)
        pooled = hidden[3].view(self.count, self.rows, side * side, FILTERS).mean(2)
        d = torch.baddbmm(b, pooled, w).softmax(-1).sub_(self.onehot)
        out = [torch.bmm(pooled.transpose(1, 2), d), d.sum(1, keepdim=True)]
        d = torch.bmm(d, w.transpose(1, 2)).div_(side * side)
        d = d[:, :, None].expand(-1, -1, side * side, -1).reshape(self.count, -1, FILTERS)
        for layer in (3, 2, 1, 0):
            d = d * (hidden[layer] > 0)
            bias = d.sum(1, keepdim=True)
            out = [torch.bmm(matrices[layer].transpose(1, 2), d), bias, *out]
            if layer:
                d = self._fold(torch.bmm(d, convs[2 * layer].transpose(1, 2)), side)
                side = d.shape[2]
                d = d.reshape(self.count, -1, FILTERS)
        return out

    def _windows(self, image: Tensor) -> tuple[Tensor, int]:
        """`[T, N, S, S, C]` to `[T, N·side², 9C]` and the side of the next image."""
        side = (image.shape[2] + 1) // 2
        padded = torch.nn.functional.pad(image, (0, 0, 1, 1, 1, 1))
        t, n, r, c, k = padded.stride()
        shape = (self.count, self.rows, side, side, 3, 3, image.shape[-1])
        windows = padded.as_strided(shape, (t, n, 2 * r, 2 * c, r, c, k))
        return windows.reshape(self.count, self.rows * side * side, -1), side

    def _fold(self, columns: Tensor, side: int) -> Tensor:
        """The transpose of `_windows`: sums what overlaps."""
        before = {2: 4, 4: 7, 7: 14}[side]
        windows = columns.view(self.count, self.rows, side, side, 3, 3, FILTERS)
        shape = (self.count, self.rows, 2 * side + 2, 2 * side + 2, FILTERS)
        padded = columns.new_zeros(shape)
        for i in range(3):
            for j in range(3):
                padded[:, :, i : i + 2 * side : 2, j : j + 2 * side : 2] += windows[..., i, j, :]
        return padded[:, :, 1 : 1 + before, 1 : 1 + before]


def model_of(name: str, x: Tensor, y: Tensor, mask: Tensor) -> Model:
    """The hand-written model on these rows."""
    if name == "radon":
        return Line(x[..., 0], y - URANIUM * x[..., 1], mask, NOISE**2)
    if name == "linear":
        return Linear(x, y, mask)
    return (Conv if name == "omniglot" else MLP)(x, y, mask)


class Floor:
    """`inner_steps + 2·cg_steps + 2` batched gradients."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        data = workload.tensors()
        with torch.no_grad():
            self.support = model_of(workload.name, *data.support)
            self.query = model_of(workload.name, *data.query)
            self.start = self._packed(data.theta0)

    def _packed(self, theta: Tensor) -> Weights:
        count = self.workload.tasks
        return [w.expand(count, *w.shape).contiguous() for w in self.support.pack(theta)]

    def _slope(self, weights: Weights) -> Weights:
        lam = self.workload.precision
        slopes = self.support.gradient(weights)
        return [
            g.add_(w - w0, alpha=lam) for g, w, w0 in zip(slopes, weights, self.start, strict=True)
        ]

    def probe(self, theta: np.ndarray) -> np.ndarray:
        """∇(f_i + prox) at a flat θ `[D]`, `[T, D]`, for the check."""
        with torch.no_grad():
            packed = self._packed(torch.as_tensor(theta, dtype=torch.float32))
            return self.support.unpack(self._slope(packed)).numpy()

    def step(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The price of a meta-step; returns nothing of interest."""
        w = self.workload
        with torch.no_grad():
            theta = self.start
            for _ in range(w.inner_steps):
                slopes = self._slope(theta)
                theta = [t.sub(g, alpha=w.step_size) for t, g in zip(theta, slopes, strict=True)]
            for _ in range(2 * w.cg_steps + 1):
                self._slope(theta)
            out = self.query.gradient(theta)[0].flatten(1).mean(0)
        return 0.0, out.numpy()
