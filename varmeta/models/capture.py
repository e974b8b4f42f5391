"""Capture: replay a batched Pyro model as a plain tensor program, once it has been seen often."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varmeta.models.blame import is_own
from varmeta.models.simplify import accumulate, simplify, turn_products
from varmeta.process import ALONE, ignoring
from varmeta.seeds import generator

Program = Callable[..., Any]
CALLS_BEFORE_CAPTURE = 20  # tracing costs as much as a few hundred calls save; one-offs never pay
KEPT_SHAPES = 32
LARGEST = 2_000_000  # numbers of a result: beyond, Pyro's share is small, and checking takes memory
# Of inductor. The sum of the windows that a pixel is in (`varmeta.models.convolution`) reads more
# tensors than it lets one loop do on a CPU; of two, the first would write images along columns.
OPTIONS = {"realize_cpu_acc_reads_threshold": 24}


class Captured:
    """A pure tensor function that drops its Python overhead after some calls of the same shapes.

    Pyro's handlers cost as much as the arithmetic of a small model. The tensor operations below
    them are recorded once per shape; the recording is then replayed without Pyro. It is used only
    where it reproduces the function's value and gradient exactly (one that draws random numbers
    would not); otherwise the function itself goes on being called. Python state that the function
    reads must not change after that.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._calls: OrderedDict[Any, int] = OrderedDict()
        self._programs: dict[Any, Program] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's value, differentiable in `tensors`."""
        key = tuple((t.shape, t.dtype, t.device) for t in tensors)
        program = self._programs.get(key)
        if program is None:
            with ALONE:
                program = self._seen(key, tensors)
        out: Tensor = program(*tensors)
        if out.numel() > LARGEST:
            self._programs[key] = self.function
        return out

    def _seen(self, key: Any, tensors: Sequence[Tensor]) -> Program:
        """Count the call; the function, or its recording once it was called often enough."""
        if key in self._programs:  # another thread has just put it there
            return self._programs[key]
        self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > KEPT_SHAPES:
            oldest, _ = self._calls.popitem(last=False)
            self._programs.pop(oldest, None)
        if self._calls[key] < CALLS_BEFORE_CAPTURE:
            return self.function
        self._programs[key] = program = self._capture(tensors)
        return program

    def _capture(self, tensors: Sequence[Tensor]) -> Program:
        recorded = record(self.function, tensors)
        if recorded is None:
            return self.function
        try:
            near = _nearby(tensors)
            same = _equal(_gradients(recorded, near), _gradients(self.function, near))
        except RuntimeError as error:  # within torch.func or inference mode there is no autograd
            if is_own(error):
                raise
            same = False
        return recorded if same else self.function


class CapturedGradient:
    """A scalar function and its gradient as one recorded program (first derivatives only).

    Args:
        function: tensors to a scalar.
        tensors: arguments of the shapes that will be used.
    """

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
        def both(*arguments: Tensor) -> list[Tensor]:
            return _gradients(function, arguments)

        self._program = record(both, tensors) or both

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's value, with the recorded gradient attached."""
        value: Tensor = _Attach.apply(self._program, *tensors)
        return value


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> Tensor:
        value, *grads = program(*tensors)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seed: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(seed[0] * grad for grad in ctx.saved_tensors))


class Unrecordable(RuntimeError):
    """A function whose tensor operations cannot be replayed; the message says why."""


def record(function: Program, tensors: Sequence[Tensor]) -> Program | None:
    """The function's tensor operations as a program.

    None if they cannot be recorded, or return something else here or close by, bit for bit.
    """
    plain = [t.detach() for t in tensors]
    try:
        # As it is: what is shared would add up its gradients in another order.
        program = trace(function, plain, simpler=False)
        agree(program, function, plain, exact=True)
    except Unrecordable:
        return None

    def replay(*given: Tensor) -> Any:
        with torch._C.DisableTorchFunction():  # nothing of interest to a mode, which costs time
            return program(*given)

    return replay


def trace(
    function: Program, tensors: Sequence[Tensor], *, simpler: bool = True
) -> torch.fx.GraphModule:
    """The function's tensor operations as a graph, nothing in it done in place.

    `simpler` leaves out what changes nothing (`simplify`).

    Raises:
        Unrecordable: they depend on values, or write in place.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # a second to import: only when used

    try:
        # In the same memory, two arguments would be taken for one here, and for ever.
        tensors = [_apart(t) for t in tensors]
        with ignoring():  # alone: a tracer patches classes and counts modes for all threads
            # A bare function of any arguments: a wrapped method's signature counts `self` too.
            program: torch.fx.GraphModule = make_fx(lambda *given: function(*given))(*tensors)
            if _written_in_place(program):  # the same with copies: laws of Pyro do it
                program = make_fx(torch.func.functionalize(program))(*tensors)
    except Exception as error:  # an operation that cannot be recorded fails in many ways
        if is_own(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise Unrecordable(f"{type(error).__name__}: {first}") from error
    program.graph.eliminate_dead_code()
    if (written := _written_in_place(program)) is not None:
        raise Unrecordable(f"{written} writes in place")
    if not simpler:
        program.recompile()
        return program
    try:
        return simplify(program, tensors)
    except RuntimeError as error:  # within torch.func tensors lie nowhere
        if is_own(error):
            raise
        raise Unrecordable(str(error).splitlines()[0]) from error


def _written_in_place(program: torch.fx.GraphModule) -> Any:
    """The first operation that writes into a tensor, if there is one."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return node.target
    return None


def compile_graph(
    graph: torch.fx.GraphModule, tensors: Sequence[Tensor], *, many: bool = False
) -> Program:
    """The graph, changed, compiled by inductor for arguments like these, which takes seconds.

    Args:
        graph: operations on tensors, nothing in place.
        tensors: on one device.
        many: it is many small operations, which on a CPU it pays to call from C++ and not from
            Python: a fifth of the time of a small network, for a fifth more of compiling.

    Raises:
        Unrecordable: it fails; without a C++ compiler, say.
    """
    import torch._inductor.config  # seconds to import: only when asked for

    graph = accumulate(turn_products(graph))
    for node in graph.graph.nodes:
        node.meta.pop("val", None)  # of the recording: inductor would take it for its own
    options = {k: v for k, v in OPTIONS.items() if hasattr(torch._inductor.config, k)}
    attempts: list[dict[str, Any]] = [options]
    if tensors[0].device.type == "cpu":
        attempts = [options | {"cpp_wrapper": True}] * many + [options]
        # Sums into few places at once, as of scales, fail with several threads (PyTorch 2.13).
        attempts += [options | {"cpp.threads": 1}] * (torch.get_num_threads() > 1)
    errors = []
    for attempt in attempts:
        try:
            program: Program = torch._inductor.compile(graph, list(tensors), attempt or None)
        except Exception as error:  # it fails in many ways
            if is_own(error):
                raise
            errors.append(error)
        else:
            return program
    first = (str(errors[0]).splitlines() or [""])[0]
    raise Unrecordable(f"{type(errors[0]).__name__}: {first}") from errors[0]


def agree(program: Program, function: Program, tensors: Sequence[Tensor], *, exact: bool) -> None:
    """Compare a recording with its function, on these tensors and on others close by.

    Exactly, or (a compiled program adds up in another order) within 100 ε^(2/3) of each output's
    norm: 2e-3 in float32, 4e-9 in float64.

    Raises:
        Unrecordable: they differ.
    """
    for near in (False, True):
        try:
            arguments = _nearby(tensors) if near else list(tensors)
            got, wanted = program(*arguments), function(*arguments)
            same = _equal(got, wanted) if exact else _close(got, wanted)
        except Exception as error:  # inductor fails in many ways, and within vmap nothing compares
            if is_own(error):
                raise
            raise Unrecordable(f"{type(error).__name__}: {error}") from error
        if not same:
            raise Unrecordable("the recording gives another result; does the model draw numbers?")


def _equal(a: Any, b: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    first, second = ([x] if isinstance(x, Tensor) else list(x) for x in (a, b))
    return all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(first, second, strict=True)
    )


def _close(a: Any, b: Any) -> bool:
    """Relative to the norm of each output; NaN equals NaN."""
    first, second = ([x] if isinstance(x, Tensor) else list(x) for x in (a, b))
    for x, y in zip(first, second, strict=True):
        if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
            return False
        x, y = x[x.isfinite()], y[y.isfinite()]
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
        if float((x - y).norm()) > 100 * eps ** (2 / 3) * float(y.norm()) + eps:
            return False
    return True


def _nearby(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Other arguments: at 0, say, a wrong gradient may vanish just as the right one does."""
    out = []
    for index, t in enumerate(tensors):
        source = generator(index, device=t.device)  # two that are equal here must not stay so
        out.append(_apart(t, source if t.is_floating_point() else None))
    return out


def _apart(t: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """A copy in memory of its own, laid out in the same way, as a compiled program insists."""
    size, stride = t.shape, t.stride()
    if not t.is_contiguous():
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        t = t.as_strided((last + 1,), (1,))
    if noise is None:
        t = t.clone()
    else:
        t = t + 1e-3 * torch.rand(t.shape, generator=noise, dtype=t.dtype, device=t.device)
    return t if t.shape == size else t.as_strided(size, stride)


def _gradients(function: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum of the values, and its gradient in every floating argument (0 where there is none)."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        value = function(*leaves).sum()
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(value, wanted, allow_unused=True)
    return [
        value.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)),
    ]
