"""Attention over all positions, by some of its heads on each rank (Ulysses).

(..., H, T, D)  queries; keys and values may have fewer heads, each for a group of queries' heads
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
    """Where heads are in queries, keys, values of these sizes."""
    return AxisPlace(tuple(sizes), len(sizes) - 3, 1, sizes[-3], 1)


def split_heads(call: moves.EmitCall, x: Node, count: int, have: Operands) -> Node:
    """This rank's heads of queries, keys or values; of fewer than `count` heads, as many times each
    as it takes for a rank to have whole groups."""
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
    """The mask that this rank's heads have, whole but for the others' heads."""
    sizes = value(mask).shape
    at = len(sizes) - 3
    if at < 0 or sizes[at] == 1:
        return have.whole(mask)
    return have.cut(mask, AxisPlace(tuple(sizes), at, 1, heads.size, 1))
