"""Copies that permute rows: from frames by frames to places by places, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..ir import aten, is_call, is_tensor, value
from ..relations.groups import STRICT_VIEWS
from ..relations.table import find_relation
from ..relations.terms import Keep
from .match import only_user


@dataclass(frozen=True, slots=True)
class RowCopy:
    """A contiguous copy of a value with its rows permuted.

    Attributes:
        split: the value's shape, viewed with more dimensions of rows.
        order: the permutation of the dimensions of `split`; the last one stays the last.
        nodes: the ops that make the copy, the copy last.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    nodes: tuple[Node, ...]


def find_row_copy(node: Node, user: Node) -> RowCopy | None:
    """Returns the copy that the only reader of a node, `user`, begins.

    # before                                         # found
    %a = view(%x, [B, T, S, C])                      RowCopy(split=(B, T, S, C), order=(0, 2, 1, 3))
    %b = permute(%a, [0, 2, 1, 3])
    %c = clone(%b, memory_format=contiguous_format)
    """
    from pabc.kernels.rows import is_split

    nodes: list[Any] = [user]
    split = tuple(value(node).shape)
    if is_call(user, STRICT_VIEWS):
        split = tuple(value(user).shape)
        nodes.append(only_user(user))
    order = _find_order(nodes[-1])
    if order is None or order[-1] != len(split) - 1 or not is_split(split, value(node).shape):
        return None
    nodes.append(only_user(nodes[-1]))
    return RowCopy(split, order, tuple(nodes)) if _is_contiguous_copy(nodes[-1]) else None


def _find_order(node: Any) -> tuple[int, ...] | None:
    """Returns which dimension of its operand each of a node's is, where it only permutes them."""
    relation = find_relation(node) if is_tensor(node) else None
    if relation is None or not relation.is_exact:
        return None
    kept = [term.sources for term in relation.terms if isinstance(term, Keep)]
    order = tuple(sources[0].dim for sources in kept if len(sources) == 1)
    plain = tuple(range(value(node).ndim))
    return order if sorted(order) == list(plain) and order != plain else None


def _is_contiguous_copy(node: Any) -> bool:
    is_copy = is_call(node, (aten.clone.default,))
    return is_copy and node.kwargs == {"memory_format": torch.contiguous_format}
