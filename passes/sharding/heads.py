"""Attention over all positions, with some of the heads on each rank (Ulysses).

(..., H, T, D)  queries; of keys and values, one head may serve a group of query heads (GQA)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from ..ir import aten, value
from . import moves
from .operands import Operands
from .places import AxisPlace


def place_of_heads(sizes: Sequence[int]) -> AxisPlace:
    """Returns where the heads lie in queries, keys or values of these sizes."""
    return AxisPlace(tuple(sizes), len(sizes) - 3, 1, sizes[-3], 1)


def split_heads(call: moves.EmitCall, x: Node, count: int, have: Operands) -> Node:
    """Returns this rank's heads of queries, keys or values.

    Fewer than `count` heads are repeated if they do not divide among the ranks.
    """
    own, ranks = have.place(x), have.ranks
    made = have.whole(x) if own is None else have.shard(x)
    sizes = list(value(x).shape)
    if sizes[-3] != count and sizes[-3] % ranks.size:
        repeat = aten.repeat_interleave.self_int
        made = call(repeat, made, count // sizes[-3], len(sizes) - 3)
        sizes[-3] = count
    if own is None:
        return moves.cut(call, made, place_of_heads(sizes), ranks)
    own = replace(own, sizes=tuple(sizes))
    return moves.split_heads(call, made, own, place_of_heads(sizes), ranks)


def mask_of_heads(mask: Node, heads: AxisPlace, have: Operands) -> Node:
    """Returns the mask of this rank's heads."""
    sizes = value(mask).shape
    at = len(sizes) - 3
    if at < 0 or sizes[at] == 1:
        return have.whole(mask)
    return have.cut(mask, AxisPlace(tuple(sizes), at, 1, heads.size, 1))
