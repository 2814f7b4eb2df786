"""parts: what consecutive branches add up to, on each residual stream that leaves them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.fx import Node

from ..ir import (
    GETITEM,
    Reach,
    aten,
    is_call,
    is_effect,
    is_opaque,
    is_pointwise,
    module_path,
    value,
)
from ..relations.groups import LAYOUTS, SPLITS
from ..tracing.sizes import same_sizes

_MOVES = (
    aten.cat.default,
    aten.stack.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    aten.expand.default,
    aten.constant_pad_nd.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.index_put.default,
    aten.gather.default,
    aten.scatter.src,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.roll.default,
    aten.flip.default,
    aten.repeat.default,
    aten.copy.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
)
"""Ops, besides those that lay out or split, whose result has elements of their operands, or
constants."""


@dataclass(frozen=True)
class Part:
    """The part of a graph between a stream's first and last branch among some regions.

    Attributes:
        inside: its nodes: all that is dead code where the part is reused, at least.
        outs: the values that leave it, one per stream.
        starts: of some outs, the value to start from, where it is not `copies` of what is inside.
        streams: residual add -> the operand that carries the stream on.
        copies: the ops inside that are computed once more, from the stream without the branches.
    """

    inside: frozenset[Node]
    outs: tuple[Node, ...]
    starts: dict[Node, Node]
    streams: dict[Node, Node]
    copies: tuple[Node, ...]


class CannotPart(Exception):
    """Says why a part of a graph cannot be reused as a whole."""


def find_part(reach: Reach, calls: Sequence[Node]) -> Part:
    """Returns the part that the branches of these regions make up.

    Args:
        reach: the dependencies of an outlined graph.
        calls: the calls of the regions.

    Raises: CannotPart with the reason.
    """
    mask = reach.mask(calls)
    streams = {add: _stream(add) for call in calls for add in _find_exits(call)}
    inside = _close(reach, mask, [*calls, *streams])
    order = sorted(inside, key=reach.index.__getitem__)
    _refuse_others(order, calls)
    based = _find_based(order, inside, streams)
    outs = [n for n in order if any(user not in inside for user in n.users)]
    if not outs:
        raise CannotPart("nothing that it adds to a stream is read")
    entries = [s for s in streams.values() if s not in inside]
    starts = {out: _find_start(out, streams, entries) for out in outs if out not in based}
    wanted = _needed(based, streams, [out for out in outs if out in based])
    copies = tuple(n for n in order if n in wanted and n not in streams)
    return Part(frozenset(inside), tuple(outs), starts, streams, copies)


def _stream(add: Node) -> Node:
    node = add.args[add.meta["joins"]]
    assert isinstance(node, Node)
    return node


def _find_exits(call: Node) -> list[Node]:
    """Returns the residual adds that a region's cuts are added by."""
    found: list[Node] = []
    seen: set[Node] = set()
    stack = [call]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or user.op != "call_function":
                continue
            if "joins" in user.meta:
                if _stream(user) is not node:
                    seen.add(user)
                    found.append(user)
            else:
                seen.add(user)
                stack.append(user)
    return found


def _close(reach: Reach, mask: int, ends: Sequence[Node]) -> set[Node]:
    """Returns `ends` and what they follow from, as far as that follows from a node in `mask`."""
    inside: set[Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in inside:
            inside.add(node)
            stack += [n for n in node.all_input_nodes if reach.touches(n, mask)]
    return inside


def _refuse_others(inside: Sequence[Node], calls: Collection[Node]) -> None:
    for node in inside:
        if is_effect(node):
            raise CannotPart(f"{module_path(node) or node.name} has effects, so it always runs")
        if node.op == "call_module" and node not in calls:
            raise CannotPart(f"{node.target}, which is no part of it, runs in between")


def _find_based(
    order: Sequence[Node], inside: Collection[Node], streams: dict[Node, Node]
) -> set[Node]:
    """Returns the nodes inside that can be computed from the streams without the branches."""
    based: set[Node] = set()
    for node in order:
        if node in streams:
            needed = [streams[node]]
        elif _is_rebuilt(node):
            needed = node.all_input_nodes
        else:
            continue
        if all(n in based or n not in inside for n in needed):
            based.add(node)
    return based


def _is_rebuilt(node: Node) -> bool:
    """Returns True for an op that only lays out, casts, joins or scales what it is given."""
    if node.op != "call_function" or is_opaque(node):
        return False
    if node.target is GETITEM:
        return is_call(node.args[0], (*SPLITS, aten.unbind.int))
    return is_pointwise(node) or is_call(node, (*LAYOUTS, *SPLITS, *_MOVES))


def _find_start(out: Node, streams: Collection[Node], entries: Sequence[Node]) -> Node:
    """Returns the stream where the part begins, for a value that other ops than sums lead to."""
    for entry in entries if out in streams else ():
        if _same_layout(out, entry):
            return entry
    where = module_path(out) or out.name
    raise CannotPart(f"what {where} reads is no sum of a stream and branches")


def _same_layout(a: Node, b: Node) -> bool:
    one, other = value(a), value(b)
    return (
        same_sizes(one.shape, other.shape)
        and (one.dtype, one.device) == (other.dtype, other.device)
        and a.meta.get("axes") == b.meta.get("axes")
    )


def _needed(based: Collection[Node], streams: dict[Node, Node], outs: Sequence[Node]) -> set[Node]:
    """Returns what the streams without branches are computed by, for these outs."""
    needed: set[Node] = set()
    stack = list(outs)
    while stack:
        node = stack.pop()
        if node in based and node not in needed:
            needed.add(node)
            stack += [streams[node]] if node in streams else node.all_input_nodes
    return needed
