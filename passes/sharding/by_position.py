"""The rule for ops that compute each position of an axis from the same position of their operands.

A rank calls them on its shard with their other arguments unchanged.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import value
from ..relations.arguments import nodes_in
from ..relations.table import relate_results
from ..relations.terms import Keep, Like, Mix, Pad, Pick, Relation, Roll, Source, Term, Write
from .operands import Operands, ShardArguments
from .places import AxisPlace

_BY_PLACE = (Mix, Pad, Pick, Roll, Write)
"""Terms of ops that every rank computes on whole tensors, whichever dimension is sharded: they move
positions, and few models have them on their way."""


def compute_by_position(
    node: Node, place: AxisPlace | None, have: Operands
) -> ShardArguments | None:
    """Returns the arguments for a rank's positions; None if the op mixes positions of the axis.

    With several results there is no place: each has to keep the axis of the sharded operand.
    """
    relations = relate_results(node)
    if relations is None:
        return None
    several = relations if isinstance(relations, tuple) else (relations,)
    if any(isinstance(term, _BY_PLACE) for each in several for term in each.terms):
        return None
    if isinstance(relations, Relation):
        assert place is not None
        return _compute(node, place, _kept(relations.terms[place.dim]), have)
    sharded = [n for n in node.all_input_nodes if have.place(n) is not None]
    own = have.place(sharded[0]) if sharded else None
    if own is None:
        return None
    source = Source(sharded[0], own.dim)
    if not all(any(source in _kept(term) for term in each.terms) for each in several):
        return None
    return _compute(node, own, (source,), have)


def _kept(term: Term) -> tuple[Source, ...]:
    """Returns the dimensions of operands of which a rank needs no positions but its own."""
    if isinstance(term, Like):
        return (term.source,)
    return term.operands if isinstance(term, Keep) else ()


def _compute(
    node: Node, place: AxisPlace, kept: tuple[Source, ...], have: Operands
) -> ShardArguments | None:
    counts = Counter(nodes_in((node.args, node.kwargs)))
    made: dict[Node, Node] = {}
    for operand, count in counts.items():
        dims = [source.dim for source in kept if source.tensor is operand]
        found = _take(operand, dims, count, place, have)
        if found is None:
            return None
        made[operand] = found
    return map_arg(node.args, made.__getitem__), map_arg(dict(node.kwargs), made.__getitem__)


def _take(
    operand: Node, dims: list[int], count: int, place: AxisPlace, have: Operands
) -> Node | None:
    """Returns an operand that is given `count` times, by positions along `dims`.

    It is whole where it does not vary along them; None where it would have to be both.
    """
    own = have.place(operand)
    if own is not None:
        is_kept = dims == [own.dim] * count and own.is_like(place)
        return have.shard(operand) if is_kept else None
    sizes = tuple(value(operand).shape)
    varying = [dim for dim in dims if sizes[dim] != 1]
    if not varying:
        return have.whole(operand)
    dim = varying[0]
    if varying != [dim] * count or sizes[dim] != place.sizes[place.dim]:
        return None
    return have.cut(operand, replace(place, sizes=sizes, dim=dim))
