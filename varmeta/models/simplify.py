"""Simplify a recorded program without changing a bit of what it returns.

Recordings of `vmap` over Pyro are half bookkeeping: views of the same shape, products with 1,
constants computed anew. Each costs a dispatch, which for a small model is as much as arithmetic.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

_aten = torch.ops.aten
_FILLED = {_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default}
_ONES = {_aten.mul.Scalar, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar}
_T = _aten.transpose.int
_ZEROS = {_aten.add.Tensor, _aten.sub.Tensor}


def simplify(program: GraphModule, tensors: Sequence[Tensor]) -> GraphModule:
    """The same program with fewer operations, for arguments of these shapes.

    Args:
        program: operations on tensors, nothing in place; changed.
        tensors: arguments of the shapes and types that it was recorded with.

    Returns:
        `program`: without operations that change nothing, with what depends on no argument
        computed once, and with equal operations shared.
    """
    values = _Values(program)
    with torch.no_grad():
        values.run(*tensors)
    _fold_constants(program, values.seen)
    _drop_identities(program, values.seen)
    _share_equals(program)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def direct(program: GraphModule) -> Callable[..., Any]:
    """The program as a plain function, whose operations skip a layer of Python each.

    A fifth of the time of a small program is spent in `torch.ops`' Python wrappers.
    """
    code = program.graph.python_code("self")
    space, operations = dict(code.globals), dict[str, Any]()

    def named(match: re.Match[str]) -> str:
        name = f"{match[1]}__{match[2]}"
        operations[name] = getattr(getattr(_aten, match[1]), match[2])._op
        return name

    source = re.sub(r"torch\.ops\.aten\.(\w+)\.(\w+)", named, code.src)
    exec(compile(source, "<varmeta program>", "exec"), space | operations, space)
    # PyTorch looks for the built-in names where a mode of the user's is on, `torch.device` say.
    names = space | operations | {"__builtins__": builtins}
    forward = FunctionType(space["forward"].__code__, names)
    return lambda *tensors: forward(program, *tensors)


def turn_products(program: GraphModule) -> GraphModule:
    """(AB)ᵀ becomes BᵀAᵀ, and (AB + CD)ᵀ likewise: `program`, changed.

    May round differently. The derivatives of a layer are transposes of products: these are copied
    to lie in order, and where both factors are transposes themselves PyTorch's library takes six
    times longer.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if _is_transpose(node) and _is_product(node.args[0]):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_turned(graph, node.args[0]))
        elif node.target is _aten.view.default:  # of what may lie in another order now
            node.target = _aten.reshape.default
        elif node.target is _aten._unsafe_view.default and _is_copy(node.args[0]):
            # Of what may lie in order now, and need not be copied.
            node.target = _aten.reshape.default
            node.args = (node.args[0].args[0], *node.args[1:])
    graph.eliminate_dead_code()
    program.recompile()
    return program


def accumulate(program: GraphModule) -> GraphModule:
    """AB + CD becomes one product that is added to another in place: `program`, changed.

    Rounds differently, so only for what will be compiled. Left to itself, inductor adds the two
    wherever the sum is read, and where windows are gathered from it that is many times.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if _is_product(node) and node.target is _aten.add.Tensor:
            first, second = node.args
            if second.target is _aten.bmm.default:
                with graph.inserting_before(node):
                    both = graph.call_function(_aten.baddbmm.default, (first, *second.args))
                node.replace_all_uses_with(both)
    graph.eliminate_dead_code()
    program.recompile()
    return program


def free_layout(program: GraphModule) -> GraphModule:
    """What a model makes contiguous may lie as it comes: `program`, changed.

    For what will be compiled and hands on what it computes: images whose channels lie last would
    be copied to lie first, and what reads them would run along the wrong dimension. A copy that is
    part of a `reshape` is left, since products want their matrices so.
    """
    for node in list(program.graph.nodes):
        if node.target is _aten.view.default:
            node.target = _aten.reshape.default
        elif (
            node.target is _aten.clone.default
            and node.args[0].op == "call_function"
            and all(user.target is not _aten._unsafe_view.default for user in node.users)
        ):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.recompile()
    return program


def _is_copy(node: Any) -> bool:
    return bool(node.target is _aten.clone.default)


def _is_transpose(node: Any) -> bool:
    return node.target is _T and set(node.args[1:]) in ({1, 2}, {-2, -1})


def _is_product(node: Any) -> bool:
    """A batch of matrix products, or a sum of such, that is used once."""
    if node.target is _aten.add.Tensor and not node.kwargs and len(node.users) == 1:
        return all(isinstance(a, Node) and _is_product(a) for a in node.args)
    return node.target is _aten.bmm.default and len(node.users) == 1


def _turned(graph: Graph, node: Any) -> Node:
    if _is_product(node):
        parts = [_turned(graph, a) for a in node.args]
        parts = parts[::-1] if node.target is _aten.bmm.default else parts
        return graph.call_function(node.target, tuple(parts))
    return node.args[0] if _is_transpose(node) else graph.call_function(_T, (node, 1, 2))


def split_linear(graph: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Cut a program of (v, *rest) to (a, b, Lv), a and b free of v, into two.

    The first maps rest to (a, b, *residuals), the second (v, *residuals) to Lv: what does not
    depend on v is not computed again for the next v.
    """
    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    (*fixed, linear) = next(n for n in nodes if n.op == "output").args[0]
    moving = {inputs[0]}
    for node in nodes:
        if node.op != "output" and any(a in moving for a in node.all_input_nodes):
            moving.add(node)
    needed = {a for n in moving for a in n.all_input_nodes if a not in moving}
    if linear not in moving:
        needed.add(linear)
    # A constant of the module is fetched where it is used: no need to hand it over.
    residuals = [n for n in nodes if n in needed and n.op != "get_attr"]
    before, after = Graph(), Graph()
    first: dict[Node, Node] = {}
    for node in nodes:
        if node not in moving and node.op != "output":
            first[node] = before.node_copy(node, first.__getitem__)
    before.output([first[n] for n in (*fixed, *residuals)])
    then = {inputs[0]: after.placeholder("v")}
    for index, node in enumerate(residuals):
        then[node] = after.placeholder(f"residual_{index}")
    for node in nodes:
        if (node in moving and node.op != "placeholder") or (
            node in needed and node.op == "get_attr"
        ):
            then[node] = after.node_copy(node, then.__getitem__)
    after.output([then[linear]])
    modules = [GraphModule(graph, g) for g in (before, after)]
    for module in modules:
        module.graph.eliminate_dead_code()
        module.recompile()
    return modules[0], modules[1]


class _Values(Interpreter):
    """Runs a program and keeps every value."""

    def __init__(self, program: GraphModule) -> None:
        super().__init__(program)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _fold_constants(program: GraphModule, values: dict[Node, Any]) -> None:
    graph, constant = program.graph, set[Node]()
    for node in list(graph.nodes):
        if node.op == "get_attr" or (
            node.op == "call_function"
            and (_is_number(node, values) or all(a in constant for a in node.all_input_nodes))
        ):
            constant.add(node)
    for index, node in enumerate(graph.nodes):
        used = any(user not in constant for user in node.users)
        if node in constant and used and isinstance(values[node], Tensor):
            name = f"_folded_{index}"
            program.register_buffer(name, _own(values[node].detach()), persistent=False)
            with graph.inserting_before(node):
                fetched = graph.get_attr(name)
            values[fetched] = values[node]
            node.replace_all_uses_with(fetched)
    graph.eliminate_dead_code()


def _is_number(node: Node, values: dict[Node, Any]) -> bool:
    """The 1 that autograd begins with, say; to keep more would cost memory."""
    return node.target in _FILLED and bool(values[node].numel() == 1)


def _own(value: Tensor) -> Tensor:
    """A copy that is expanded where the value is."""
    once = value
    for dim, step in enumerate(value.stride()):
        once = once.narrow(dim, 0, min(1, value.shape[dim])) if step == 0 else once
    return once.clone().expand(value.shape)


def _drop_identities(program: GraphModule, values: dict[Node, Any]) -> None:
    """Views of what there is already, and arithmetic that changes nothing."""
    views: dict[Any, Node] = {}
    for node in list(program.graph.nodes):
        value = values.get(node)
        if not isinstance(value, Tensor):
            continue
        # All values are alive and nothing is written in place: what lies at the same place in the
        # same way is the same tensor.
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        same = views.setdefault(place, node)
        source = _unchanged(node, values) if same is node else None
        if source is not None:
            same = views[place] = source
        if same is not node and node.op == "call_function":
            node.replace_all_uses_with(same)
            program.graph.erase_node(node)


def _unchanged(node: Node, values: dict[Node, Any]) -> Node | None:
    """What x · 1, 1 · x, x / 1, x¹, x + 0 or x − 0 is, of numbers and of what is full of them."""
    if node.op != "call_function" or len(node.args) != 2 or node.kwargs:
        return None
    wanted = 1 if node.target in _ONES else 0 if node.target in _ZEROS else None
    either = node.target in (_aten.mul.Tensor, _aten.add.Tensor)
    for source, number in (node.args, node.args[::-1]) if either else (node.args,):
        if wanted is None or not isinstance(source, Node) or not _is_full(number, wanted, values):
            continue
        value, before = values[node], values[source]
        if value.shape == before.shape and value.dtype == before.dtype:
            return source
    return None


def _is_full(number: Any, wanted: int, values: dict[Node, Any]) -> bool:
    if isinstance(number, Node):
        known = number.op == "get_attr" or number.target in _FILLED
        return (
            known and isinstance(values[number], Tensor) and bool((values[number] == wanted).all())
        )
    return isinstance(number, (int, float)) and number == wanted


def _share_equals(program: GraphModule) -> None:
    seen: dict[Any, Node] = {}
    for node in list(program.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            program.graph.erase_node(node)
        else:
            seen[key] = node


def _frozen(value: Any) -> Any:
    """Hashable; 1, 1.0 and True stay apart."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return value if isinstance(value, Node) else (type(value).__name__, str(value))
