"""Dimensions in another order, but for the last one."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir import aten, is_call, value


def without_order(node: Any, order: tuple[int, ...]) -> tuple[Node, tuple[int, ...]]:
    """What a node was before its dimensions, but for the last, were put in another order.

    `order`: which of its dimensions are wanted, in turn; what comes back is of what it was.
    """
    while is_call(node, (aten.permute.default, aten.transpose.int)):
        source, *given = node.args
        assert isinstance(source, Node)
        dims = list(range(value(source).ndim))
        moved = dims[:]
        if is_call(node, (aten.permute.default,)):
            moved = [d % len(dims) for d in given[0]]
        else:
            a, b = (d % len(dims) for d in given)
            moved[a], moved[b] = moved[b], moved[a]
        if moved[-1] != dims[-1]:
            break
        node, order = source, tuple(moved[d] for d in order)
    return node, order
