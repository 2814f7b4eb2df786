"""Which ops a rank computes on its shard alone, and with which arguments.

A rule takes an op and the place of the axis in its result. It returns the arguments with which a
rank computes its positions of the result, or None if it cannot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import GETITEM, aten, is_pointwise, is_tensor, value
from ..relations.groups import ALIASES, CASTS, CONVOLUTIONS, COPIES, SQUEEZES, VIEWS
from .joint import item, join, scatter, some, split
from .operands import Operands, ShardArguments, ShardRule, align, along, first_sharded
from .places import AxisPlace


def pointwise(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Takes each operand by positions, if it has more than one."""
    num_dims = value(node).ndim
    made: dict[Node, Node] = {}
    for operand in node.all_input_nodes:
        found = align(operand, place, num_dims, have)
        if found is None:
            return None
        made[operand] = found
    return map_arg(node.args, made.__getitem__), map_arg(dict(node.kwargs), made.__getitem__)


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


def rearrange(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Permutes dimensions, or adds or removes ones of size 1: the arguments stay as they are."""
    return first_sharded(node, have)


def linear(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Projects each row by itself."""
    source = node.args[0]
    own = have.place(source)
    if own is None or own.dim == len(own.sizes) - 1:
        return None
    return first_sharded(node, have)


def norm(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Normalizes the last dimensions of each row by itself."""
    source, sizes = node.args[:2]
    own = have.place(source)
    if own is None or own.dim >= len(own.sizes) - len(sizes):
        return None
    return first_sharded(node, have)


def by_sample(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Computes each sample of a batch by itself."""
    source = node.args[0]
    own = have.place(source) if isinstance(source, Node) else None
    return first_sharded(node, have) if own is not None and own.dim == 0 else None


def product(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Multiplies rows of the first operand by the whole second one, or a product per position."""
    first, second = node.args[:2]
    assert isinstance(first, Node) and isinstance(second, Node)
    own = have.place(first)
    if own is None or own.dim == len(own.sizes) - 1:
        return None
    if own.dim == len(own.sizes) - 2:
        return first_sharded(node, have)
    both = [align(x, place, value(node).ndim, have) for x in (first, second)]
    return None if None in both else (tuple(both), dict(node.kwargs))


def einsum(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Computes positions of an index that the result has."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "->" not in equation or "..." in equation:
        return None
    terms, result = equation.split("->")
    index = result[place.dim]
    made: list[Node] = []
    for term, operand in zip(terms.split(","), operands, strict=True):
        own, dim = have.place(operand), term.find(index)
        if own is not None and (own.dim != dim or not own.is_like(place)):
            return None
        if own is not None:
            made.append(have.shard(operand))
        elif dim < 0:
            made.append(have.whole(operand))
        else:
            sizes = tuple(value(operand).shape)
            made.append(have.cut(operand, replace(place, sizes=sizes, dim=dim)))
    return (node.args[0], made), dict(node.kwargs)


def attention(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Attends within each sequence; or from each query to keys that are whole."""
    query, key, values, *rest = node.args
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(values, Node)
    own = have.place(query)
    if own is None or own.dim == len(own.sizes) - 1:
        return None
    num_dims = len(own.sizes)
    if own.dim == num_dims - 2:
        if True in (*rest[2:3], node.kwargs.get("is_causal")):  # masks by position
            return None
        others = [key, values]
        if any(have.place(x) is not None for x in others):
            return None
        found: list[Node | None] = [have.whole(x) for x in others]
    else:
        found = [align(x, own, num_dims, have) for x in (key, values)]
    mask, *rest = rest or [node.kwargs.get("attn_mask")]
    kwargs = {name: by for name, by in node.kwargs.items() if name != "attn_mask"}
    made = align(mask, own, num_dims, have) if isinstance(mask, Node) else None
    if None in found or (isinstance(mask, Node) and made is None):
        return None
    if is_tensor(mask):
        return (have.shard(query), *found, made, *rest), kwargs
    return (have.shard(query), *found, *((None, *rest) if rest else ())), kwargs


RULES: dict[Any, ShardRule] = {
    **dict.fromkeys(VIEWS, view),
    aten.expand.default: expand,
    aten.permute.default: rearrange,
    aten.transpose.int: rearrange,
    aten.unsqueeze.default: rearrange,
    **dict.fromkeys((*SQUEEZES, *ALIASES, *COPIES, *CASTS), rearrange),
    aten.view_as_complex.default: rearrange,
    aten.view_as_real.default: rearrange,
    aten.empty_like.default: rearrange,
    aten.zeros_like.default: rearrange,
    aten.ones_like.default: rearrange,
    aten.full_like.default: rearrange,
    aten.copy.default: pointwise,
    aten.linear.default: linear,
    aten.layer_norm.default: norm,
    aten.rms_norm.default: norm,
    **dict.fromkeys(CONVOLUTIONS, by_sample),
    aten.native_group_norm.default: by_sample,
    aten.group_norm.default: by_sample,
    aten.softmax.int: along(1),
    aten._softmax.default: along(1),
    aten.mean.dim: along(1),
    aten.sum.dim_IntList: along(1),
    aten.amax.default: along(1),
    aten.linalg_vector_norm.default: along(2),
    aten.slice.Tensor: some,
    aten.slice_scatter.default: scatter,
    aten.repeat_interleave.self_int: along(2),
    aten.select.int: along(1),
    aten.split.Tensor: along(2, 0),
    aten.split_with_sizes.default: split,
    aten.chunk.default: along(2, 0),
    aten.unbind.int: along(1, 0),
    aten.cat.default: join,
    aten.stack.default: join,
    aten.einsum.default: einsum,
    aten.matmul.default: product,
    aten.bmm.default: product,
    GETITEM: item,
    aten.scaled_dot_product_attention.default: attention,
}


MAY_BE_WHOLE = (some, item)
"""Rules whose results may hold only tokens that every rank has."""


def find_rule(node: Node) -> ShardRule | None:
    """Returns the rule of an op, if there is one."""
    if node.op != "call_function":
        return None
    known = RULES.get(node.target)
    return pointwise if known is None and is_pointwise(node) else known
