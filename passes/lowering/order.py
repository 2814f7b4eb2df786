"""Permutations of all dimensions but the last."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir import aten, is_call, value


def without_order(node: Any, order: tuple[int, ...]) -> tuple[Node, tuple[int, ...]]:
    """Looks through permutes and transposes that leave the last dimension in place.

    Args:
        order: the dimensions of `node` that are wanted, in turn.

    Returns:
        The node before these, and which of its dimensions are wanted, in turn.
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
