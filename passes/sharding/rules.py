"""Rules of the ops that a rank computes on its shard alone: with which arguments.

A rule takes an op and the place of the axis in its result. It returns the arguments with which a
rank computes its positions of the result, or None if it cannot.

For most ops this follows from the relation (:mod:`pabc.passes.relations`): the dimension of the
axis has to be kept, and all other arguments stay as they are. Only ops whose arguments name sizes
or positions, which differ for a shard, have rules of their own.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..ir import GETITEM, aten, is_pointwise, value
from ..relations.groups import ALIASES, CASTS, CONVOLUTIONS, COPIES, SQUEEZES, VIEWS
from .by_position import compute_by_position, compute_first_by_position
from .joint import item, join, scatter, some, split
from .operands import Operands, ShardArguments, ShardRule, align
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


def copy(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Copies a shard into a shard: the first operand gives no values, but the sizes."""
    both = [align(x, place, value(node).ndim, have) for x in node.args[:2]]
    return None if None in both else ((*both, *node.args[2:]), dict(node.kwargs))


RULES: dict[Any, ShardRule] = {
    **dict.fromkeys(VIEWS, view),
    aten.expand.default: expand,
    aten.copy.default: copy,
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

BY_POSITION = frozenset(
    {
        *ALIASES,
        *CASTS,
        *CONVOLUTIONS,
        *COPIES,
        *SQUEEZES,
        aten._softmax.default,
        aten.amax.default,
        aten.bmm.default,
        aten.chunk.default,
        aten.empty_like.default,
        aten.full_like.default,
        aten.group_norm.default,
        aten.layer_norm.default,
        aten.linalg_vector_norm.default,
        aten.linear.default,
        aten.matmul.default,
        aten.mean.dim,
        aten.ones_like.default,
        aten.permute.default,
        aten.repeat_interleave.self_int,
        aten.rms_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.select.int,
        aten.softmax.int,
        aten.split.Tensor,
        aten.sum.dim_IntList,
        aten.transpose.int,
        aten.unbind.int,
        aten.unsqueeze.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
        aten.zeros_like.default,
    }
)
"""Ops, beside pointwise ones, that are computed on shards where their relation keeps the axis.

This says only which ops; along which dimensions follows from the relation. An op that is in neither
table is computed whole by every rank.
"""


def find_rule(node: Node) -> ShardRule | None:
    """Returns the rule of an op, if there is one."""
    if node.op != "call_function":
        return None
    if node.target in RULES:
        return RULES[node.target]
    if node.target in BY_POSITION:
        return compute_first_by_position
    return compute_by_position if is_pointwise(node) or _is_plain_einsum(node) else None


def _is_plain_einsum(node: Node) -> bool:
    """Returns whether a node is an einsum that names all indices, those of its result too."""
    equation = str(node.args[0]) if node.target is aten.einsum.default else ""
    return "->" in equation and "..." not in equation
