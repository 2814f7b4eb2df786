"""Cutting tensors into shards, gathering them, and switching shards from one axis to another.

P  ranks; each has ceil(size / P) positions of an axis, padded with zeros at the end
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from pabc.internals.collectives import ALL_GATHER, ALL_TO_ALL, WAIT

from ..ir import aten, value
from .places import AxisPlace, Ranks

UNPACKS = (
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.transpose.int,
)
"""Ops that may stand between a collective and what reads it."""
_PACKS = (*UNPACKS, aten.clone.default, aten.constant_pad_nd.default)
"""Ops that may stand between a tensor and the collective that sends it."""

EmitCall = Callable[..., Node]
"""(op, *args, **kwargs) -> a call of it, added to the graph that is being written."""


def cut(call: EmitCall, x: Node, place: AxisPlace, ranks: Ranks) -> Node:
    """Returns this rank's positions of an axis of a whole tensor."""
    if place.low or place.high:
        return _within(call, x, place, place.size, lambda y: cut(call, y, place.inner, ranks))
    share = ranks.share(place.size)
    start = min(ranks.rank * share, place.size)
    stop = min(start + share, place.size)
    apart = call(aten.reshape.default, x, place.apart(place.size))
    mine = call(aten.slice.Tensor, apart, place.at, start, stop)
    return call(aten.reshape.default, _pad(call, mine, place.at, share), place.together(share))


def gather(call: EmitCall, x: Node, place: AxisPlace, ranks: Ranks) -> Node:
    """Returns all positions of a tensor of which each rank has a shard."""
    share = ranks.share(place.size)
    if place.low or place.high:
        return _within(call, x, place, share, lambda y: gather(call, y, place.inner, ranks))
    apart = call(aten.reshape.default, x, place.apart(share))
    num_dims = value(apart).ndim
    first = [place.at, *(d for d in range(num_dims) if d != place.at)]
    sent = _contiguous(call, call(aten.permute.default, apart, first))
    received = _wait(call, call(ALL_GATHER, sent, ranks.size, ranks.group))
    whole = call(aten.slice.Tensor, received, 0, 0, place.size)
    back = [first.index(d) for d in range(num_dims)]
    ordered = call(aten.permute.default, whole, back)
    return call(aten.reshape.default, ordered, place.together(place.size))


def switch(call: EmitCall, x: Node, old: AxisPlace, new: AxisPlace, ranks: Ranks) -> Node:
    """Returns shards of the `new` axis, made from shards of the `old` one by one all-to-all.

    Each rank sends every other rank the positions of the new axis that belong to it.
    """
    if any(place.low or place.high for place in (old, new)):
        return cut(call, gather(call, x, old, ranks), new, ranks)
    share, part = ranks.share(old.size), ranks.share(new.size)
    product, at_old, at_new = _both(old, new)
    sizes = list(product)
    sizes[at_old] = share
    apart = _pad(call, call(aten.reshape.default, x, sizes), at_new, ranks.size * part)
    sizes[at_new : at_new + 1] = [ranks.size, part]
    by_rank = call(aten.reshape.default, apart, sizes)
    order = [at_new, *(d for d in range(len(sizes)) if d != at_new)]
    sent = _contiguous(call, call(aten.permute.default, by_rank, order))
    even = [1] * ranks.size
    received = _wait(call, call(ALL_TO_ALL, sent, even, even, ranks.group))
    # (P, ...): dimension 0 is the rank that sent, and becomes the outer part of the old axis
    to = list(range(1, len(sizes)))
    to.insert(at_old, 0)
    merged = list(product)
    merged[at_new], merged[at_old] = part, ranks.size * share
    whole = call(aten.permute.default, received, to)
    whole = call(aten.reshape.default, whole, merged)
    whole = call(aten.slice.Tensor, whole, at_old, 0, old.size)
    return call(aten.reshape.default, whole, new.together(part))


def split_heads(call: EmitCall, x: Node, place: AxisPlace, heads: AxisPlace, ranks: Ranks) -> Node:
    """Returns shards of heads, made from shards of a sequence.

    Of the tokens that every rank has (`place.low`, `place.high`), a rank takes its heads: nothing
    is sent for them.
    """
    share = ranks.share(place.size)
    if not (place.low or place.high):
        return switch(call, x, place, heads, ranks)
    return _apart(
        call, x, place, share,
        lambda y: cut(call, y, _resized(heads, y), ranks),
        lambda y: switch(call, y, place.inner, replace(heads, sizes=place.inner.sizes), ranks),
    )  # fmt: skip


def join_heads(call: EmitCall, x: Node, place: AxisPlace, heads: AxisPlace, ranks: Ranks) -> Node:
    """Returns shards of a sequence, made from shards of heads.

    The tokens that every rank has are gathered over all heads.
    """
    if not (place.low or place.high):
        return switch(call, x, heads, place, ranks)
    return _apart(
        call, x, place, place.size,
        lambda y: gather(call, y, _resized(heads, y), ranks),
        lambda y: switch(call, y, replace(heads, sizes=place.inner.sizes), place.inner, ranks),
    )  # fmt: skip


def _resized(heads: AxisPlace, x: Node) -> AxisPlace:
    """Returns the place of all heads in a tensor with the other dimensions of `x`."""
    sizes = list(value(x).shape)
    sizes[heads.dim] = heads.size
    return replace(heads, sizes=tuple(sizes))


def _within(
    call: EmitCall, x: Node, place: AxisPlace, size: int, by: Callable[[Node], Node]
) -> Node:
    """Applies `by` to the tokens of an axis of `size` positions; the others stay as they are."""
    return _apart(call, x, place, size, lambda y: y, by)


def _apart(
    call: EmitCall,
    x: Node,
    place: AxisPlace,
    size: int,
    others: Callable[[Node], Node],
    own: Callable[[Node], Node],
) -> Node:
    """Applies `own` to the tokens of an axis of `size` positions, `others` to those beside them."""
    first, last = place.low, place.low + place.count(size)
    parts = []
    spans = (0, first, others), (first, last, own), (last, last + place.high, others)
    for start, stop, by in spans:
        if start < stop:
            parts.append(by(call(aten.slice.Tensor, x, place.dim, start, stop)))
    return call(aten.cat.default, parts, place.dim)


def _both(old: AxisPlace, new: AxisPlace) -> tuple[list[int], int, int]:
    """Returns the sizes of a whole tensor viewed with both axes as dimensions of their own, and the
    two dimensions."""
    if old.dim != new.dim:
        first, second = sorted((old, new), key=lambda place: place.dim)
        sizes = [
            *first.sizes[: first.dim], first.before, first.size, first.after,
            *first.sizes[first.dim + 1 : second.dim], second.before, second.size, second.after,
            *first.sizes[second.dim + 1 :],
        ]  # fmt: skip
        ats = {first: first.dim + 1, second: second.dim + 3}
        return sizes, ats[old], ats[new]
    first, second = sorted((old, new), key=lambda place: place.before)
    if first.before * first.size > second.before:  # an axis of one position
        first, second = second, first
    between = second.before // (first.before * first.size)
    dim = first.dim
    sizes = [
        *first.sizes[:dim], first.before, first.size, between, second.size, second.after,
        *first.sizes[dim + 1 :],
    ]  # fmt: skip
    ats = {first: dim + 1, second: dim + 3}
    return sizes, ats[old], ats[new]


def _pad(call: EmitCall, x: Node, dim: int, size: int) -> Node:
    missing = size - value(x).shape[dim]
    if not missing:
        return x
    pads = [0] * (2 * (value(x).ndim - dim))
    pads[-1] = missing
    if value(x).dtype is torch.bool:  # of a mask: padded rows of False alone would give NaN
        return call(aten.constant_pad_nd.default, x, pads, True)
    return call(aten.constant_pad_nd.default, x, pads)


def _contiguous(call: EmitCall, x: Node) -> Node:
    return call(aten.clone.default, x, memory_format=torch.contiguous_format)


def _wait(call: EmitCall, x: Node) -> Node:
    return call(WAIT, x)


def overlap(graph: Graph) -> None:
    """Lets communication and computation overlap.

    Each collective, with the ops that pack its tensor, moves to right after the tensor is computed;
    each wait, with the ops that unpack, to right before its result is read.
    """
    for node in list(graph.nodes):
        if node.target in (ALL_TO_ALL, ALL_GATHER):
            _launch_early(node)
    waiting: set[Node] = set()
    for node in graph.nodes:
        if node.target is WAIT or (
            node.target in UNPACKS and all(n in waiting for n in node.all_input_nodes)
        ):
            waiting.add(node)
    for node in reversed(list(graph.nodes)):
        if node in waiting and node.users:
            min(node.users).prepend(node)  # nodes compare by their order in the graph


def _launch_early(collective: Node) -> None:
    chain, source = [collective], collective.args[0]
    while isinstance(source, Node) and source.target in _PACKS:
        chain.append(source)
        source = source.args[0]
    if not isinstance(source, Node) or source.op != "call_function":
        return
    for node in reversed(chain):
        source.append(node)
        source = node


@dataclass(frozen=True, slots=True)
class Collective:
    """A call in which processes exchange data.

    Attributes:
        op: `"all_to_all"` or `"all_gather"`.
        ranks: the number of processes that take part.
        nbytes: the bytes that each of them sends to others.
    """

    op: str
    ranks: int
    nbytes: int


def find_collective(node: Node) -> Collective | None:
    """Returns the collective that a node calls, or None."""
    if node.target is ALL_TO_ALL:
        ranks = len(node.args[1])
        return Collective("all_to_all", ranks, value(node.args[0]).nbytes * (ranks - 1) // ranks)
    if node.target is ALL_GATHER:
        ranks = node.args[1]
        return Collective("all_gather", ranks, value(node.args[0]).nbytes * (ranks - 1))
    return None


def find_collectives(graph: Graph) -> tuple[Collective, ...]:
    """Returns the collectives of a graph, in its order."""
    return tuple(found for found in map(find_collective, graph.nodes) if found is not None)
