"""What a rank computes on its positions alone, and with which arguments.

Whether it can follows from the op's relation (:mod:`pabc.passes.relations`): the sharded dimension
has to be kept. Most ops then take the same arguments as before. Those whose arguments name sizes or
positions have a rule of their own here.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir import GETITEM, aten
from ..relations.groups import VIEWS
from .by_position import compute_by_position
from .joint import item, join, scatter, some, split
from .operands import Operands, ShardArguments, ShardRule
from .places import AxisPlace


def view(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Views a shard in the sizes of a shard."""
    source = node.args[0]
    own = have.place(source)
    if own is None or own.num_before != place.num_before or own.size != place.size:
        return None
    return (have.shard(source), place.together(have.ranks.share(place.size))), {}


def expand(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Expands a shard to the sizes of a shard."""
    source = node.args[0]
    assert isinstance(source, Node)
    own = have.place(source)
    if own is None or place.from_right(0) != own.from_right(0) or not own.is_like(place):
        return None
    return (have.shard(source), place.together(have.ranks.share(place.size))), dict(node.kwargs)


RULES: dict[Any, ShardRule] = {
    **dict.fromkeys(VIEWS, view),
    aten.expand.default: expand,
    aten.slice.Tensor: some,
    aten.slice_scatter.default: scatter,
    aten.split_with_sizes.default: split,
    aten.cat.default: join,
    aten.stack.default: join,
    GETITEM: item,
}
"""Ops whose arguments differ for a shard."""

MAY_BE_WHOLE = (some, item)
"""Rules whose results may hold only tokens that every rank has."""


def find_rule(node: Node) -> ShardRule | None:
    """Returns the rule of an op, if there is one."""
    if node.op != "call_function":
        return None
    return RULES.get(node.target, compute_by_position)
