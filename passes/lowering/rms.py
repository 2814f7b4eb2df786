"""RMS norms: as PyTorch's op, or written out in simpler ops, with casts to float32 or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..ir import aten, is_call, is_tensor, value


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """The norm `source / sqrt(mean(source^2) + eps) * weight` over the last dimension."""

    source: Node
    weight: Node | None
    eps: float


def find_rms_norm(node: Node) -> RmsNorm | None:
    """Returns the norm that ends in a node; None if there is none.

    A norm that is written out may have its weight on either side, or none; the norm and the weight
    may each have another float dtype than `source`.
    """
    if is_call(node, (aten.rms_norm.default,)):
        return _read_op(node)
    node = without_casts(node)
    plain = find_written_out(node)
    if plain is not None:
        return plain
    for weight, normed in products(node):
        norm = find_written_out(without_casts(normed))
        if norm is not None and _is_weight(weight, norm.source):
            return RmsNorm(norm.source, weight, norm.eps)
    return None


def _read_op(node: Node) -> RmsNorm | None:
    x, sizes, weight, eps = (*node.args, None, None)[:4]
    if not isinstance(x, Node) or len(sizes) != 1:
        return None
    if eps is None:
        if value(x).dtype != torch.float32:
            return None
        eps = torch.finfo(torch.float32).eps
    return RmsNorm(x, weight if isinstance(weight, Node) else None, float(eps))


def _is_weight(node: Node, source: Node) -> bool:
    return is_tensor(node) and value(node).shape == value(source).shape[-1:]


def find_written_out(node: Node) -> RmsNorm | None:
    """Returns the norm that a node computes as `x * rsqrt(mean(x * x, -1, keepdim=True) + eps)`."""
    for x, inverse in products(node):
        if not is_call(inverse, (aten.rsqrt.default,)):
            continue
        mean, eps = _sum_with_number(inverse.args[0])
        square = None if mean is None else _squared(mean)
        if square is not None and without_casts(square) is without_casts(x):
            return RmsNorm(without_casts(x), None, eps)
    return None


def products(node: Any) -> Iterator[tuple[Node, Node]]:
    """Yields the two factors of a product of tensors, in both orders."""
    if is_call(node, (aten.mul.Tensor,)):
        a, b = node.args[:2]
        if isinstance(a, Node) and isinstance(b, Node):
            yield from ((a, b), (b, a))


def without_casts(node: Node) -> Node:
    """Returns what a node is a cast of, through all casts between float dtypes."""
    while is_call(node, (aten._to_copy.default,)) and set(node.kwargs) == {"dtype"}:
        source = node.args[0]
        assert isinstance(source, Node)
        if not (value(source).is_floating_point() and value(node).is_floating_point()):
            break
        node = source
    return node


def _sum_with_number(node: Any) -> tuple[Node | None, float]:
    if is_call(node, (aten.add.Tensor, aten.add.Scalar)) and not node.kwargs:
        a, b = node.args[:2]
        if isinstance(a, Node) and isinstance(b, (int, float)):
            return a, float(b)
    return None, 0.0


def _squared(mean: Node) -> Node | None:
    """Returns x if a node is `mean(x * x, -1, keepdim=True)`."""
    if not is_call(mean, (aten.mean.dim,)):
        return None
    square, dims, keepdim = (*mean.args, False)[:3]
    if not isinstance(square, Node) or not keepdim:
        return None
    if [d % value(square).ndim for d in dims] != [value(square).ndim - 1]:
        return None
    if is_call(square, (aten.pow.Tensor_Scalar,)) and square.args[1] == 2:
        x = square.args[0]
        return x if isinstance(x, Node) else None
    return next((a for a, b in products(square) if a is b), None)
