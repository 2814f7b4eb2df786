"""Operands of an op as a rule takes them: in shards or whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch.fx import Node

from ..ir import value
from .places import AxisPlace, Ranks

ShardArguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments, and those by keyword, with which a rank calls an op."""


class Operands(Protocol):
    """The operands of an op, in a graph that is being written for one rank."""

    ranks: Ranks

    def place(self, node: Node) -> AxisPlace | None:
        """Returns where the axis lies in an operand that is in shards; None if it is whole."""

    def shard(self, node: Node) -> Node:
        """Returns the rank's positions of an operand that is in shards."""

    def whole(self, node: Node) -> Node:
        """Returns all positions of an operand; they are gathered if it is in shards."""

    def cut(self, node: Node, place: AxisPlace) -> Node:
        """Returns the rank's positions of a whole operand in which the axis lies at `place`."""


ShardRule = Callable[[Node, Any, Operands], ShardArguments | None]
"""(op, place of the axis in its result, operands) -> the arguments for a rank's positions.

None where a rank cannot compute them. With several results, there is no place.
"""


def align(operand: Node, place: AxisPlace, num_dims: int, have: Operands) -> Node | None:
    """Returns an operand that is broadcast with shards of `num_dims` dimensions.

    None where the operand is in shards in another way.
    """
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
