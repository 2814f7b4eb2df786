"""The rule of ops that compute each position of the axis from the same position of their operands.

It reads the op's relation (:mod:`pabc.passes.relations`). A rank calls the op on its shards, with
all other arguments unchanged.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import value
from ..relations.arguments import nodes_in
from ..relations.table import relate_results
from ..relations.terms import Keep, Like, Relation, Source, Term
from .operands import Operands, ShardArguments
from .places import AxisPlace


def compute_by_position(
    node: Node, place: AxisPlace | None, have: Operands
) -> ShardArguments | None:
    """Returns the arguments for a rank's positions; None if the op does not keep the axis."""
    relations = relate_results(node)
    if relations is None:
        return None
    if isinstance(relations, Relation):
        assert place is not None
        return _take_all(node, place, _kept(relations.terms[place.dim]), have)
    return _compute_several(node, relations, have)


def compute_first_by_position(
    node: Node, place: AxisPlace | None, have: Operands
) -> ShardArguments | None:
    """Returns the arguments for a rank's positions; None also if the first operand is whole.

    It is not cut to meet shards of another operand: that one is gathered instead.
    """
    first = node.args[0]
    if not isinstance(first, Node) or have.place(first) is None:
        return None
    return compute_by_position(node, place, have)


def _compute_several(
    node: Node, relations: tuple[Relation, ...], have: Operands
) -> ShardArguments | None:
    """Returns the arguments of an op with several results, which all keep the sharded dimension."""
    source = node.args[0]
    own = have.place(source) if isinstance(source, Node) else None
    if own is None:
        return None
    kept = Source(source, own.dim)
    if not all(any(kept in _kept(term) for term in each.terms) for each in relations):
        return None
    return _take_all(node, own, (kept,), have)


def _kept(term: Term) -> tuple[Source, ...]:
    """Returns the dimensions of operands of which a rank needs its own positions only."""
    if isinstance(term, Like):
        return (term.source,)
    return term.operands if isinstance(term, Keep) else ()


def _take_all(
    node: Node, place: AxisPlace, kept: tuple[Source, ...], have: Operands
) -> ShardArguments | None:
    """Returns the arguments with each operand by positions along the dimensions that are kept."""
    made: dict[Node, Node] = {}
    for operand, count in Counter(nodes_in((node.args, node.kwargs))).items():
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

    It is whole where it does not vary along them. None where its shards do not fit, or where it
    would have to be both.
    """
    own = have.place(operand)
    if own is not None:
        is_kept = dims == [own.dim] * count and own.is_like(place)
        return have.shard(operand) if is_kept else None
    sizes = tuple(value(operand).shape) if dims else ()
    varying = [dim for dim in dims if sizes[dim] != 1]
    if not varying:
        return have.whole(operand)
    dim = varying[0]
    if varying != [dim] * count or sizes[dim] != place.sizes[place.dim]:
        return None
    return have.cut(operand, replace(place, sizes=sizes, dim=dim))
