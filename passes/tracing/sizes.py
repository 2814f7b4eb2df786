"""sizes: graphs with dynamic shapes, and the sizes that passes see.

A graph captured with `dynamic=True` has symbols for the sizes of its inputs; its shapes, and the
numbers among the arguments of its ops, are expressions of them. That graph is what runs. Passes see
the sizes of the captured call, the hints: :func:`hinted` puts them in place while a pass looks, and
the facts that it leaves on nodes stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from pabc.internals.fakes import FakeTensorMode

from ..ir import make_module, user_inputs

SizeBinding = Mapping[sympy.Symbol, int]
"""The size that each symbol stands for in one call."""
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Sizes:
    """The sizes of inputs that a graph serves.

    Attributes:
        inputs: per graph input its shape and strides, in symbols, or None if it is no tensor; a
            graph serves inputs of other strides once they are copied to these.
        ranges: the least and the largest value of each symbol.
        guards: the other conditions that the trace is specialized on.
        hints: the sizes of the captured call.
    """

    inputs: tuple[tuple[Any, ...] | None, ...]
    ranges: Mapping[sympy.Symbol, tuple[float, float]]
    guards: tuple[Any, ...]
    hints: SizeBinding

    def bind(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int] | None:
        """Returns the sizes of these inputs, or None if the graph does not serve them."""
        known = [(s, x) for s, x in zip(self.inputs, inputs, strict=True) if s is not None]
        pairs = [pair for s, x in known for pair in zip(s, x.shape, strict=False)]
        binding = {size: found for size, found in pairs if isinstance(size, sympy.Symbol)}
        strides = [pair for s, x in known for pair in zip(s[x.ndim :], x.stride(), strict=True)]
        for stride, found in strides:
            if isinstance(stride, sympy.Symbol):  # follows from no size: as it is
                binding.setdefault(stride, found)
        fits = (
            all(_evaluate(size, binding) == found for size, found in pairs)
            and all(low <= binding.get(s, low) <= high for s, (low, high) in self.ranges.items())
            and all(_evaluate(guard, binding) is True for guard in self.guards)
        )
        return binding if fits else None

    def strides(self, inputs: Sequence[Any]) -> list[tuple[int, ...]]:
        """Returns the strides that the graph needs for the tensors among these inputs.

        Requires: the graph serves the inputs.
        """
        binding = self.bind(inputs)
        assert binding is not None
        known = [(s, x) for s, x in zip(self.inputs, inputs, strict=True) if s is not None]
        return [tuple(_evaluate(size, binding) for size in s[x.ndim :]) for s, x in known]


def read_sizes(graph: Graph, inputs: Sequence[Any], ranges: Mapping[Any, Any]) -> Sizes:
    """Returns the sizes that a graph, traced with `inputs`, serves.

    Raises: ValueError where a size within the graph does not follow from the inputs' sizes alone.
    """
    placeholders = user_inputs(graph)
    vals = [node.meta.get("val") for node in placeholders]
    shapes = tuple(
        tuple(map(_expression, (*val.shape, *val.stride())))
        if isinstance(val, torch.Tensor)
        else None
        for val in vals
    )
    for node in graph.nodes:
        if is_size(node) and any(
            n.op != "placeholder" and not is_size(n) for n in node.all_input_nodes
        ):
            raise ValueError(f"{node.name} is a size that does not follow from the inputs' sizes")
    environments = {
        id(env): env
        for val in vals
        if isinstance(val, torch.Tensor)
        and (env := getattr(getattr(val, "fake_mode", None), "shape_env", None)) is not None
    }
    # Earlier guards have separate symbols for sizes that turned out to be equal, or numbers.
    guards = tuple(
        dict.fromkeys(env.replace(g.expr) for env in environments.values() for g in env.guards)
    )
    bounds = {symbol: (float(r.lower), float(r.upper)) for symbol, r in ranges.items()}
    known = Sizes(shapes, bounds, (), {})
    hints = known.bind(inputs)
    if hints is None:
        raise ValueError("the sizes of the captured call are not among those that it serves")
    result = Sizes(shapes, bounds, guards, hints)
    if result.bind(inputs) is None:
        raise ValueError("the guards of the captured call do not hold for it")
    return result


def has_free_sizes(graph: Graph) -> bool:
    """Returns True for a graph with dynamic shapes."""
    vals = [n.meta.get("val") for n in user_inputs(graph)]
    shapes = (val.shape for val in vals if isinstance(val, torch.Tensor))
    return any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def same_sizes(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Returns True if sizes are equal whatever their symbols stand for; it adds no guard."""
    return [_expression(s) for s in sizes] == [_expression(s) for s in others]


def hint(node: Node) -> Any:
    """Returns the fake value of a node at the sizes of the captured call."""
    return node.meta.get("hint", node.meta.get("val"))


def is_size(node: Node) -> bool:
    """Returns True for a node that computes a number from sizes."""
    return isinstance(node.meta.get("val"), _SYMBOLIC)


def concrete(val: Any, binding: SizeBinding) -> Any:
    """Returns a size, or (a list of) fake tensors, with numbers in place of symbols."""
    if isinstance(val, _SYMBOLIC):
        return _evaluate(val.node.expr, binding)
    if isinstance(val, (tuple, list)):
        return type(val)(concrete(item, binding) for item in val)
    if not isinstance(val, torch.Tensor):
        return val
    shape, strides = ([concrete(s, binding) for s in sizes] for sizes in (val.shape, val.stride()))
    with _FAKE:
        return torch.empty_strided(shape, strides, dtype=val.dtype, device=val.device)


def fold_sizes(gm: GraphModule, binding: SizeBinding) -> GraphModule:
    """Returns the graph for these sizes: numbers in place of symbols and of nodes that are sizes.

    A graph without symbols is returned as it is.
    """
    if not binding:
        return gm
    graph = Graph()
    mapping: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if is_size(node) and node.op != "placeholder":
            mapping[node] = concrete(node.meta["val"], binding)
            continue
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if "val" in node.meta:
            mapping[node].meta["val"] = concrete(node.meta["val"], binding)
    return make_module(gm, graph)


_FAKE = FakeTensorMode()


@contextmanager
def hinted(gm: GraphModule, sizes: Sizes | None) -> Iterator[None]:
    """Makes `gm` show the shapes and arguments of the captured call while active.

    A pass that looks at them may mark nodes, but not change the graph. `sizes`: those that the
    graph serves; None: it has fixed shapes.
    """
    if sizes is None:
        yield
        return
    before = [(node, node.args, node.kwargs, node.meta.get("val")) for node in gm.graph.nodes]
    for node, args, kwargs, val in before:
        if is_size(node) or val is None:
            continue
        if "hint" not in node.meta:
            node.meta["hint"] = concrete(val, sizes.hints)
        numbers = {
            n: concrete(n.meta["val"], sizes.hints) for n in node.all_input_nodes if is_size(n)
        }
        node.args = map_arg(args, lambda n, numbers=numbers: numbers.get(n, n))
        node.kwargs = map_arg(kwargs, lambda n, numbers=numbers: numbers.get(n, n))
        node.meta["val"] = node.meta["hint"]
    try:
        yield
    finally:
        for node, args, kwargs, val in before:
            node.args, node.kwargs = args, kwargs
            if val is not None:
                node.meta["val"] = val


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, _SYMBOLIC) else int(size)


def _evaluate(expression: Any, binding: SizeBinding) -> Any:
    """Returns the value of an expression, or None if it has symbols without a value."""
    if isinstance(expression, (int, float)):
        return expression
    result = expression.xreplace({s: sympy.Integer(v) for s, v in binding.items()})
    if result in (sympy.true, sympy.false):
        return bool(result)
    if result.free_symbols:
        return None
    return int(result) if result.is_integer else float(result)
