"""What a rule has to do with: an op's operands in shards, or whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import value
from .places import Place, Ranks

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Operands(Protocol):
    """What a rule may ask for of an op's operands, in a graph that is being written."""

    ranks: Ranks

    def place(self, node: Node) -> Place | None:
        """Where the axis is in an operand that is in shards; None: it is whole."""

    def shard(self, node: Node) -> Node:
        """The rank's positions, of an operand that is in shards."""

    def whole(self, node: Node) -> Node:
        """An operand that is whole as it is, or gathered."""

    def cut(self, node: Node, place: Place) -> Node:
        """The rank's positions of a whole operand that has the axis in this place."""


Rule = Callable[[Node, Any, Operands], Arguments | None]
"""(op, the place of the axis in its result, operands); of several results, there is no place."""


def align(operand: Node, place: Place, num_dims: int, have: Operands) -> Node | None:
    """An operand as it is broadcast with shards of `place`, a place of `num_dims` dimensions."""
    sizes = tuple(value(operand).shape)
    dim = place.dim - num_dims + len(sizes)
    own = have.place(operand)
    if own is not None:
        return have.shard(operand) if own.dim == dim and own.is_like(place) else None
    if dim < 0 or sizes[dim] == 1:
        return have.whole(operand)
    if sizes[dim] != place.sizes[place.dim]:
        return None
    return have.cut(operand, replace(place, sizes=sizes, dim=dim))


def first_sharded(node: Node, have: Operands) -> Arguments | None:
    """The first operand by positions, all others whole."""
    first, *rest = node.args
    if not isinstance(first, Node) or have.place(first) is None:
        return None
    if any(have.place(n) is not None for n in node.all_input_nodes if n is not first):
        return None
    others = map_arg((tuple(rest), dict(node.kwargs)), have.whole)
    return (have.shard(first), *others[0]), others[1]


def along(index: int, default: Any = None) -> Rule:
    """An op along dimensions that an argument names, none of which is that of the axis."""

    def rule(node: Node, place: Place, have: Operands) -> Arguments | None:
        source = node.args[0]
        own = have.place(source) if isinstance(source, Node) else None
        named = node.args[index] if len(node.args) > index else default
        if own is None or named is None:
            return None
        dims = named if isinstance(named, (list, tuple)) else [named]
        num_dims = len(own.sizes)
        if not dims or own.dim in [int(d) % num_dims for d in dims]:
            return None
        return first_sharded(node, have)

    return rule
