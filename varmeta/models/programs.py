"""Programs: a task energy's derivatives as recorded tensor programs, without Pyro in them.

An energy E(θ; p) maps `[T, D]` and further tensors p to `[T]` nats, row i depending on θ_i alone.
Four derivatives serve every minimiser, solver and adjoint:

- `gradient`: ∇E, and `first`, any first derivatives of a weighted sum over tasks;
- `linearise`: ∇E and the product v ↦ ∇²E v at a fixed θ, so that what depends on θ alone is
  computed once for all products;
- `pullback`: x ↦ xᵀ ∂∇E/∂(θ, p): what is left to do after the solve of an implicit derivative,
  and one step back through an unrolled one.

Each is first run as it stands; after some calls with the same shapes its tensor operations are
recorded (`torch.fx`) and replayed, on request compiled by inductor. A recording is used only where
it gives what the function gives, here and close by; what was chosen, and why, is in `report`.

Several steps of an algorithm over a compiled gradient or product are one program
(`Derivative.repeat`): calling many small ones costs as much as their arithmetic.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from varmeta.models.capture import (
    CALLS_BEFORE_CAPTURE,
    KEPT_SHAPES,
    Unrecordable,
    agree,
    compile_graph,
    trace,
)
from varmeta.models.derivatives import (
    EnergyFunction,
    first_derivatives,
    pullback_of,
    second,
    value_and_gradient,
)
from varmeta.models.simplify import direct, free_layout, split_linear, turn_products
from varmeta.process import ALONE

Product = Callable[[Tensor], Tensor]
Step = Callable[..., Sequence[Tensor]]
Grads = list[Tensor | None]
AT_ONCE = 5  # steps in one program; more gain little, and take longer to compile
LARGE = 500_000  # numbers in θ: beside a step on more of them, calling a program is little
_log = logging.getLogger("varmeta")


@dataclass(frozen=True, eq=False)
class Linearised:
    """An energy at a fixed θ, to first and second order.

    Attributes:
        value: `[T]` nats.
        grad: `[T, D]`, differentiable in what the energy depends on beside θ.
        product: v ↦ ∇²E v, both `[T, D]`.
    """

    value: Tensor
    grad: Tensor
    product: Product


@dataclass(frozen=True, eq=False)
class Derivative:
    """A compiled gradient θ ↦ ∇E, or product v ↦ ∇²E v, everything else being given.

    Attributes:
        programs: keep what is compiled.
        name: for the report.
        key: tells it, its shapes and types from others.
        call: the derivative itself.
        graph: records it, as a program of (x, *given).
        given: tensors.
    """

    programs: Programs
    name: str
    key: Any
    call: Product
    graph: Callable[[], Callable[..., Sequence[Tensor]]]
    given: Sequence[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        return self.call(x)

    def repeat(self, step: Step, state: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """`state = step(derivative, *state)`, `count` times; several at once in one program.

        Args:
            step: asks no tensor for its values and writes in none; what it does depends on its
                arguments alone. Kept by identity, with the programs made of it.
            state: its first tensor is what the steps are for; the others may hang on rounding.
            count: is cut into equal parts of at most `AT_ONCE` steps, or of one where they are
                `LARGE`; all the same program.
        """
        most = AT_ONCE if state[0].numel() <= LARGE else 1
        at_once = max(n for n in range(1, most + 1) if count % n == 0)
        key, size = (f"{at_once} x {self.name}", self.key, step), len(state)

        def record() -> Any:
            graph = self.graph()

            def steps(*tensors: Tensor) -> list[Tensor]:
                state, given = tensors[:size], tensors[size:]
                for _ in range(at_once):
                    state = tuple(step(lambda x: graph(x, *given)[0], *state))
                return list(state)

            tensors = [*_plain(state), *self.given]
            return self.programs._record(steps, tensors, compared=1, many=at_once > 1)

        for _ in range(count // at_once):
            program = self.programs._lookup(key, record)
            if program is None:
                for _ in range(at_once):
                    state = step(self, *state)
            else:
                with torch.no_grad():
                    state = program(*_plain(state), *self.given)
        return state


@dataclass(eq=False)
class Programs:
    """The derivatives of one energy function.

    Args:
        function: `function(theta, *parameters)` to `[T]` nats; pure, no random numbers.
        name: for the report.
        gauss_newton: `gauss_newton(theta, *parameters)` to the product with the generalised
            Gauss–Newton matrix at θ, which has a graph; None if there is none.
        compiled: compile each recording with inductor, at its first call (seconds each).
        looped: the function is a loop over tasks, of which no recording is made: it would hold the
            model once for each task, and take minutes.
    """

    function: EnergyFunction
    name: str
    gauss_newton: Callable[..., Product] | None = None
    compiled: bool = False
    looped: bool = False
    report: dict[str, str] = field(default_factory=dict)
    _calls: OrderedDict[Any, int] = field(default_factory=OrderedDict)
    _kept: dict[Any, Any] = field(default_factory=dict)

    def gradient(self, theta: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """E `[T]` and ∇E `[T, D]`, detached."""
        plain = _plain([theta, *parameters])
        key = _key("gradient", plain)
        value, grad = self._run(key, value_and_gradient(self.function), plain)
        return value, grad

    def slope(self, theta: Tensor, parameters: Sequence[Tensor]) -> Derivative | None:
        """∇E for tensors of these shapes, if it is compiled."""
        if not self.compiled or self.looped:
            return None
        tensors = _plain([theta, *parameters])
        both = value_and_gradient(self.function)

        def slope(theta: Tensor, *parameters: Tensor) -> list[Tensor]:
            return both(theta, *parameters)[1:]

        def graph() -> torch.fx.GraphModule:
            recorded = trace(slope, tensors)
            agree(recorded, slope, tensors, exact=False)
            return recorded

        def call(theta: Tensor) -> Tensor:
            return self.gradient(theta, parameters)[1]

        return Derivative(self, "gradient", _key("slope", tensors), call, graph, tensors[1:])

    def linearise(
        self, theta: Tensor, parameters: Sequence[Tensor], *, gauss_newton: bool = False
    ) -> Linearised:
        """E, ∇E (detached here) and the product with ∇²E, or its Gauss–Newton part, at a fixed θ.

        Raises:
            ValueError: gauss_newton, and there is no such product.
        """
        if gauss_newton and self.gauss_newton is None:
            raise ValueError("this energy has no Gauss–Newton product; use curvature='hessian'")
        tensors = _plain([theta, *parameters])
        key = _key("gauss_newton" if gauss_newton else "linearise", tensors)
        kept = self._lookup(key, lambda: self._record_linear(tensors, gauss_newton))
        if kept is None:
            return self._graph(key, gauss_newton, *tensors)
        prologue, product = kept
        with torch.no_grad():
            value, grad, *residuals = prologue(*tensors)
        if not self.compiled:
            return Linearised(value, grad, lambda v: _call(product, *_plain([v]), *residuals))

        name = "gauss_newton product" if gauss_newton else "product"

        def call(v: Tensor) -> Tensor:
            return self._run((name, key), product, [*_plain([v]), *residuals])[0]

        curve = Derivative(self, name, key, call, lambda: product, residuals)
        return Linearised(value, grad, curve)

    def pullback(self, x: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Grads:
        """Gradient of Σ xᵀ∇E in those of `tensors`, θ and the parameters, that are wanted."""
        plain = _plain([x, *tensors])
        key = _key(_named("pullback", wanted), plain)
        return _spread(self._run(key, pullback_of(self.function, wanted), plain), wanted)

    def first(
        self, seed: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, Grads]:
        """E `[T]`, and the gradient of Σ seed_i E_i in those of `tensors` that are wanted."""
        plain = _plain([seed, *tensors])
        key = _key(_named("first", wanted), plain)
        value, *grads = self._run(key, first_derivatives(self.function, wanted), plain)
        return value, _spread(grads, wanted)

    # -- private ----------------------------------------------------------------------------------

    def _run(
        self, key: Any, function: Callable[..., list[Tensor]], plain: Sequence[Tensor]
    ) -> list[Tensor]:
        program = self._lookup(key, lambda: self._record(function, plain)) or function
        with torch.no_grad(), _unseen():
            return list(program(*plain))

    def _lookup(self, key: Any, record: Callable[[], Any]) -> Any:
        """The program kept for these shapes; recorded when they have come often enough."""
        if self.looped:
            self.report[key[0]] = "as written: the model is run task by task"
            return None
        with ALONE:
            return self._seen(key, record)

    def _seen(self, key: Any, record: Callable[[], Any]) -> Any:
        if key in self._kept:
            self._calls.move_to_end(key)
            return self._kept[key]
        self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > KEPT_SHAPES:
            oldest, _ = self._calls.popitem(last=False)
            self._kept.pop(oldest, None)
        if self.compiled or self._calls[key] >= CALLS_BEFORE_CAPTURE:
            try:
                with _unseen():
                    self._kept[key] = record()
                self.report[key[0]] = "compiled" if self.compiled else "recorded"
            except Unrecordable as error:
                self._kept[key] = None
                self.report[key[0]] = f"as written: {error}"
                _log.warning("%s: %s is run as written: %s", self.name, key[0], error)
        return self._kept.get(key)

    def _record(
        self,
        function: Callable[..., list[Tensor]],
        tensors: Sequence[Tensor],
        *,
        compared: int | None = None,
        many: bool = False,
    ) -> Any:
        """A program that returns the same; its first so many results are compared, None for all."""

        def check(program: Any) -> Any:
            both = [lambda *given, f=f: list(f(*given))[:compared] for f in (program, function)]
            agree(both[0], both[1], tensors, exact=not self.compiled)
            return program

        graph = trace(function, tensors)
        if not self.compiled:
            # Saves copies, and with many shapes does not change a bit.
            with suppress(Unrecordable):
                return check(direct(turn_products(deepcopy(graph))))
        return check(self._finish(graph, tensors, many=many))

    def _record_linear(self, tensors: Sequence[Tensor], gauss_newton: bool) -> Any:
        v = torch.ones_like(tensors[0])

        def second_order(v: Tensor, theta: Tensor, *parameters: Tensor) -> list[Tensor]:
            at = self._graph(None, gauss_newton, theta, *parameters)
            return [at.value, at.grad, at.product(v)]

        graph = trace(second_order, [v, *tensors])
        before, after = split_linear(graph)
        before = free_layout(before) if self.compiled else before
        prologue = self._finish(before, tensors)
        # Compiled when it is used, alone or within the steps of a solver.
        product = after if self.compiled else direct(after)

        def both(v: Tensor, *tensors: Tensor) -> list[Tensor]:
            value, grad, *residuals = prologue(*tensors)
            return [value, grad, _call(product, v, *residuals)]

        agree(both, second_order, [v, *tensors], exact=not self.compiled)
        return prologue, product

    def _finish(
        self, graph: torch.fx.GraphModule, tensors: Sequence[Tensor], *, many: bool = False
    ) -> Any:
        """The graph as it will be run; `many` small operations are called from C++."""
        if not self.compiled:
            return direct(graph)
        return compile_graph(graph, tensors, many=many)

    def _graph(
        self, key: Any, gauss_newton: bool, theta: Tensor, *parameters: Tensor
    ) -> Linearised:
        """One gradient graph, gone through once per product; each product counts as a call."""
        with torch.enable_grad(), _unseen():
            leaf = theta.detach().requires_grad_()
            value = self.function(leaf, *parameters)
            (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=not gauss_newton)
            curve = self.gauss_newton(leaf, *parameters) if gauss_newton else None  # type: ignore[misc]

        def product(v: Tensor) -> Tensor:
            with ALONE:
                if key in self._calls:
                    self._calls[key] += 1
            return second(grad, leaf, v) if curve is None else curve(v)

        return Linearised(value.detach(), grad.detach(), product)


def _spread(grads: Sequence[Tensor], wanted: Sequence[bool]) -> Grads:
    rest = iter(grads)
    return [next(rest) if w else None for w in wanted]


def _named(name: str, wanted: Sequence[bool]) -> str:
    return name + " " + "".join("01"[w] for w in wanted)


def _unseen() -> saved_tensors_hooks:
    """What autograd saves within a program is no business of a checkpoint around it."""
    return saved_tensors_hooks(lambda t: t, lambda t: t)


def _call(program: Any, *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = program(*tensors)[0]
    return out


def _key(name: str, tensors: Sequence[Tensor]) -> Any:
    rest = tuple([(t.shape, t.dtype, t.device) for t in tensors])
    return name, torch.is_autocast_enabled(tensors[0].device.type), rest


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Without history, and laid out as a compiled program has to assume."""
    return [
        t if not t.requires_grad and t.is_contiguous() else t.detach().contiguous() for t in tensors
    ]
