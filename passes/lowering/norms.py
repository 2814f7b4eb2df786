"""Norms over the last dimension, however they are written, with the modulation after them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from pabc.kernels.dtypes import FLOATS, FP8

from ..ir import aten, is_call, is_tensor, value
from .match import only_user, operands
from .rms import find_written_out

DEPTH = 8
"""Ops, casts included, that are followed backwards from a node to find a norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A norm with what follows it: `(norm(input) * weight + bias) * (offset + scale) + shift`.

    Attributes:
        kind: `"layer"` or `"rms"`.
        eps: None if it is that of a dtype other than float32.
        nodes: all nodes that compute it, the last one at the end.
        weight, bias, scale, shift: None where there are none.
    """

    kind: str
    input: Node
    eps: float | None
    nodes: tuple[Node, ...]
    weight: Node | None = None
    bias: Node | None = None
    scale: Node | None = None
    offset: float = 0.0
    shift: Node | None = None

    def then(self, node: Node) -> Norm:
        """Returns the norm with one more node at its end."""
        return replace(self, nodes=(*self.nodes, node))

    def times(self, by: Node) -> Norm | None:
        """Returns the product with another node; None if that does not have this form."""
        if self.scale is not None or self.shift is not None:
            return None
        if self.weight is None and self.bias is None and self._is_learned(by):
            return replace(self, weight=by)
        scale, offset = _split_offset(by)
        return replace(self, scale=scale, offset=offset)

    def plus(self, by: Node) -> Norm | None:
        """Returns the sum with another node; None if that does not have this form."""
        if self.shift is not None:
            return None
        if self.bias is None and self.scale is None and self._is_learned(by):
            return replace(self, bias=by)
        return replace(self, shift=by)

    def _is_learned(self, by: Node) -> bool:
        return value(by).shape == value(self.input).shape[-1:]


def find_norm(node: Node, depth: int = DEPTH) -> Norm | None:
    """Returns the norm that ends in a node, whose inner nodes have no other users.

    # before                                           # found
    %n = layer_norm(%x, [C], None, None, eps)          Norm(input=%x, scale=%a, offset=1, shift=%b)
    %s = add(%a, 1)
    %m = mul(%n, %s)
    %o = add(%m, %b)
    """
    norm = _find_plain(node)
    if norm is not None or depth == 0:
        return norm
    source = cast_source(node)
    if source is not None:
        inner = find_norm(source, depth - 1) if only_user(source) is node else None
        return None if inner is None else inner.then(node)
    return _find_longer(node, depth)


def _find_longer(node: Node, depth: int) -> Norm | None:
    """Returns the norm that a node ends in by multiplying by something or adding something."""
    for op, extend in ((aten.mul.Tensor, Norm.times), (aten.add.Tensor, Norm.plus)):
        for branch, by in pairs(node, op):
            inner = find_norm(branch, depth - 1) if only_user(branch) is node else None
            if inner is None or value(node).shape != value(inner.input).shape:
                continue
            longer = extend(inner, by)
            if longer is not None:
                return longer.then(node)
    return None


def pairs(node: Node, op: object) -> list[tuple[Node, Node]]:
    """Returns the two tensors that a node applies `op` to, in both orders; empty for others."""
    given = operands(node, op)
    if given is None or len(given) != 2 or not all(map(is_tensor, given)) or given[0] is given[1]:
        return []
    return [(given[0], given[1]), (given[1], given[0])]


def cast_source(node: Node) -> Node | None:
    """Returns what a node casts, if kernels can read it; None if a node is no such cast."""
    if not is_call(node, (aten._to_copy.default,)) or not is_tensor(node):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    is_known = value(source).dtype in (*FLOATS, FP8) and value(node).dtype in FLOATS
    return source if is_known and value(source).device == value(node).device else None


def exact_source(node: Node) -> Node:
    """Returns what a node casts to a wider dtype, without changing values; else the node."""
    source = cast_source(node)
    while source is not None and _is_wider(value(node).dtype, value(source).dtype):
        node, source = source, cast_source(source)
    return node


def _is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    return dtype == torch.float32 and other in FLOATS


_ARGUMENTS: dict[object, dict[str, Any]] = {
    aten.layer_norm.default: {"x": 0, "sizes": 0, "weight": None, "bias": None, "eps": 1e-5},
    aten.rms_norm.default: {"x": 0, "sizes": 0, "weight": None, "eps": None},
}


def _find_plain(node: Node) -> Norm | None:
    """Returns the norm that a node computes by itself, without what follows."""
    if not is_call(node, _ARGUMENTS):
        return _find_written_out(node)
    defaults = _ARGUMENTS[node.target]
    given = {**defaults, **dict(zip(defaults, node.args, strict=False))}
    x, sizes, eps = given.pop("x"), given.pop("sizes"), given.pop("eps")
    if eps is None and value(x).dtype == torch.float32:
        eps = torch.finfo(torch.float32).eps
    kind = "layer" if "bias" in given else "rms"
    is_last = len(sizes) == 1 and not node.kwargs
    return Norm(kind=kind, input=x, eps=eps, nodes=(node,), **given) if is_last else None


def _find_written_out(node: Node) -> Norm | None:
    """Returns the norm that ends in a node as `x * rsqrt(mean(x * x) + eps)`."""
    written = find_written_out(node)
    for x, inverse in pairs(node, aten.mul.Tensor) if written is not None else ():
        if written is not None and is_call(inverse, (aten.rsqrt.default,)):
            inner = _inner(node, inverse)
            if inner is not None:
                nodes = (*reversed(inner), node)
                return Norm(kind="rms", input=exact_source(x), eps=written.eps, nodes=nodes)
    return None


def _inner(node: Node, inverse: Node) -> list[Node] | None:
    """Returns the root, the sum, the mean, the square and its casts.

    None if one of them has another user.
    """
    nodes = [node]
    current: Any = inverse
    while len(nodes) <= 4 or (cast_source(current) is not None and only_user(current) is nodes[-1]):
        if only_user(current) is not nodes[-1]:
            return None
        nodes.append(current)
        current = current.args[0]
    return nodes[1:]


def _split_offset(node: Node) -> tuple[Node, float]:
    """Returns the tensor and the number that a node adds; the node and 0 if it adds no number."""
    given = operands(node, aten.add.Tensor)
    if given is None or len(given) != 2 or not is_tensor(given[0]):
        return node, 0.0
    added = given[1]
    return (given[0], float(added)) if isinstance(added, (int, float)) else (node, 0.0)
