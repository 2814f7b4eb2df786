"""What each op does to shards: which ops a rank computes on its positions alone, and how.

A rule says of an op whose result has the axis in a place: with what arguments a rank computes its
positions of it; or None, where it cannot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import GETITEM, aten, is_pointwise, is_tensor, value
from .joint import item, join, scatter, some, split
from .operands import Arguments, Operands, Rule, align, along, first_sharded
from .places import Place


def pointwise(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Each operand by positions, where it has more than one."""
    num_dims = value(node).ndim
    made: dict[Node, Node] = {}
    for operand in node.all_input_nodes:
        found = align(operand, place, num_dims, have)
        if found is None:
            return None
        made[operand] = found
    return map_arg(node.args, made.__getitem__), map_arg(dict(node.kwargs), made.__getitem__)


def view(node: Node, place: Place, have: Operands) -> Arguments | None:
    """The same order of elements, with fewer positions of the axis."""
    source = node.args[0]
    own = have.place(source)
    if own is None or own.num_before != place.num_before or own.size != place.size:
        return None
    return (have.shard(source), place.together(have.ranks.share(place.size))), {}


def expand(node: Node, place: Place, have: Operands) -> Arguments | None:
    """To as many positions as the rank has."""
    source = node.args[0]
    assert isinstance(source, Node)
    own = have.place(source)
    if own is None or place.from_right(0) != own.from_right(0) or not own.is_like(place):
        return None
    return (have.shard(source), place.together(have.ranks.share(place.size))), dict(node.kwargs)


def rearrange(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Dimensions in another order, or ones of size 1 more or less: the same arguments."""
    return first_sharded(node, have)


def linear(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Rows by themselves."""
    source = node.args[0]
    own = have.place(source)
    if own is None or own.dim == len(own.sizes) - 1:
        return None
    return first_sharded(node, have)


def norm(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Rows by themselves, of the last dimensions."""
    source, sizes = node.args[:2]
    own = have.place(source)
    if own is None or own.dim >= len(own.sizes) - len(sizes):
        return None
    return first_sharded(node, have)


def by_sample(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Samples of a batch by themselves."""
    source = node.args[0]
    own = have.place(source) if isinstance(source, Node) else None
    return first_sharded(node, have) if own is not None and own.dim == 0 else None


def product(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Rows of the first operand by themselves, or products of each position by themselves."""
    first, second = node.args[:2]
    assert isinstance(first, Node) and isinstance(second, Node)
    own = have.place(first)
    if own is None or own.dim == len(own.sizes) - 1:
        return None
    if own.dim == len(own.sizes) - 2:
        return first_sharded(node, have)
    both = [align(x, place, value(node).ndim, have) for x in (first, second)]
    return None if None in both else (tuple(both), dict(node.kwargs))


def einsum(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Positions of an index that the result has."""
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


def attention(node: Node, place: Place, have: Operands) -> Arguments | None:
    """Sequences by themselves; or queries by themselves, of keys that are whole."""
    query, key, values, *rest = node.args
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(values, Node)
    own = have.place(query)
    if own is None or own.dim == len(own.sizes) - 1:
        return None
    num_dims = len(own.sizes)
    if own.dim == num_dims - 2:
        if True in (*rest[2:3], node.kwargs.get("is_causal")):  # which counts positions
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


RULES: dict[Any, Rule] = {
    aten.view.default: view,
    aten._unsafe_view.default: view,
    aten.reshape.default: view,
    aten.expand.default: expand,
    aten.permute.default: rearrange,
    aten.transpose.int: rearrange,
    aten.unsqueeze.default: rearrange,
    aten.squeeze.default: rearrange,
    aten.squeeze.dim: rearrange,
    aten.squeeze.dims: rearrange,
    aten.view_as_complex.default: rearrange,
    aten.view_as_real.default: rearrange,
    aten.empty_like.default: rearrange,
    aten.zeros_like.default: rearrange,
    aten.ones_like.default: rearrange,
    aten.full_like.default: rearrange,
    aten.alias.default: rearrange,
    aten.detach.default: rearrange,
    aten.clone.default: rearrange,
    aten.contiguous.default: rearrange,
    aten._to_copy.default: rearrange,
    aten.copy.default: pointwise,
    aten.linear.default: linear,
    aten.layer_norm.default: norm,
    aten.rms_norm.default: norm,
    aten.convolution.default: by_sample,
    aten.conv1d.default: by_sample,
    aten.conv2d.default: by_sample,
    aten.conv3d.default: by_sample,
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
"""Rules that may give tokens of others alone, which every rank has."""


def find_rule(node: Node) -> Rule | None:
    """The rule of an op, if there is one."""
    if node.op != "call_function":
        return None
    known = RULES.get(node.target)
    return pointwise if known is None and is_pointwise(node) else known
