"""Copies that put rows in another order: frames of a video beside one another, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..ir import aten, is_call, value
from .match import only_user


@dataclass(frozen=True, slots=True)
class Copy:
    """A contiguous copy of a value, its rows split and in another order.

    Attributes:
        split: the value's shape, with dimensions of rows split.
        order: of the dimensions of `split`; the last one stays the last.
        nodes: what is computed, the copy last.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    nodes: tuple[Node, ...]


def find_copy(node: Node, user: Node) -> Copy | None:
    """The copy that all that reads a node begins with `user` and ends in.

    # before                                           # found
    %a = view(%x, [B, T, S, C])                        Copy(split=(B, T, S, C), order=(0, 2, 1, 3))
    %b = permute(%a, [0, 2, 1, 3])
    %c = clone(%b, memory_format=contiguous_format)
    """
    from pabc.kernels.rows import is_split

    nodes: list[Any] = [user]
    split = tuple(value(node).shape)
    if is_call(user, (aten.view.default, aten._unsafe_view.default)):
        split = tuple(value(user).shape)
        nodes.append(only_user(user))
    order = _find_order(nodes[-1])
    if order is None or order[-1] != len(split) - 1 or not is_split(split, value(node).shape):
        return None
    nodes.append(only_user(nodes[-1]))
    return Copy(split, order, tuple(nodes)) if _is_contiguous_copy(nodes[-1]) else None


def _find_order(node: Any) -> tuple[int, ...] | None:
    """Which dimension of its operand each of a node's is, where that is all it does."""
    if is_call(node, (aten.permute.default,)):
        return tuple(d % len(node.args[1]) for d in node.args[1])
    if not is_call(node, (aten.transpose.int,)):
        return None
    order = list(range(value(node).ndim))
    a, b = node.args[1:]
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _is_contiguous_copy(node: Any) -> bool:
    is_copy = is_call(node, (aten.clone.default,))
    return is_copy and node.kwargs == {"memory_format": torch.contiguous_format}
