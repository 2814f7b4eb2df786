"""Norms over the last dimension, however they are written, with what follows them."""

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
"""Ops from the end of a norm with all that follows it back to the norm itself, casts included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """norm(input) * weight + bias, then * (offset + scale) + shift; each of these may be None.

    Attributes:
        kind: `"layer"` or `"rms"`.
        eps: None where it follows from a dtype.
        nodes: all that is computed, from the norm itself to its end.
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
        """The same, ending in another node."""
        return replace(self, nodes=(*self.nodes, node))

    def times(self, by: Node) -> Norm | None:
        """Its product with something, if that is still of this form."""
        if self.scale is not None or self.shift is not None:
            return None
        if self.weight is None and self.bias is None and self._is_learned(by):
            return replace(self, weight=by)
        scale, offset = _split_offset(by)
        return replace(self, scale=scale, offset=offset)

    def plus(self, by: Node) -> Norm | None:
        """Its sum with something, if that is still of this form."""
        if self.shift is not None:
            return None
        if self.bias is None and self.scale is None and self._is_learned(by):
            return replace(self, bias=by)
        return replace(self, shift=by)

    def _is_learned(self, by: Node) -> bool:
        return value(by).shape == value(self.input).shape[-1:]


def find_norm(node: Node, depth: int = DEPTH) -> Norm | None:
    """The norm that ends in a node, with all that follows it; nothing else reads what is between.

    # before                                           # found
    %n = layer_norm(%x, [C], None, None, eps)          Norm(input=%x, scale=%a, offset=1, shift=%b)
    %s = add(%a, 1)
    %m = mul(%n, %s)
    %o = add(%m, %b)
    """
    found = _find_plain(node)
    if found is not None or depth == 0:
        return found
    source = cast_source(node)
    if source is not None:
        inner = find_norm(source, depth - 1) if only_user(source) is node else None
        return None if inner is None else inner.then(node)
    return _find_longer(node, depth)


def _find_longer(node: Node, depth: int) -> Norm | None:
    """The norm whose product or sum with something a node is."""
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
    """The two tensors that a node computes `op` of, in both orders."""
    given = operands(node, op)
    if given is None or len(given) != 2 or not all(map(is_tensor, given)) or given[0] is given[1]:
        return []
    return [(given[0], given[1]), (given[1], given[0])]


def cast_source(node: Node) -> Node | None:
    """What a node is of another dtype, which a kernel may read; None: it is no such cast."""
    if not is_call(node, (aten._to_copy.default,)) or not is_tensor(node):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    is_known = value(source).dtype in (*FLOATS, FP8) and value(node).dtype in FLOATS
    return source if is_known and value(source).device == value(node).device else None


def exact_source(node: Node) -> Node:
    """What a node is a wider form of, of the same values; else itself."""
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
    """The norm that a node itself is."""
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
    """x * rsqrt(mean(x * x) + eps)."""
    found = find_written_out(node)
    for x, inverse in pairs(node, aten.mul.Tensor) if found is not None else ():
        if found is not None and is_call(inverse, (aten.rsqrt.default,)):
            inner = _inner(node, inverse)
            if inner is not None:
                nodes = (*reversed(inner), node)
                return Norm(kind="rms", input=exact_source(x), eps=found.eps, nodes=nodes)
    return None


def _inner(node: Node, inverse: Node) -> list[Node] | None:
    """The root, the sum, the mean, the square and what is cast for it; None where something else
    reads one of them."""
    found = [node]
    current: Any = inverse
    while len(found) <= 4 or (cast_source(current) is not None and only_user(current) is found[-1]):
        if only_user(current) is not found[-1]:
            return None
        found.append(current)
        current = current.args[0]
    return found[1:]


def _split_offset(node: Node) -> tuple[Node, float]:
    """A sum with a number as its two parts; anything else as it is, and 0."""
    given = operands(node, aten.add.Tensor)
    if given is None or len(given) != 2 or not is_tensor(given[0]):
        return node, 0.0
    added = given[1]
    return (given[0], float(added)) if isinstance(added, (int, float)) else (node, 0.0)
