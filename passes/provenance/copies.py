"""Finds positions of a dimension that hold copies of one value, whatever the inputs hold.

A dimension is a product of factors, as in :mod:`pabc.passes.axes`. Some were put there by an
expansion or a repetition, and stay copies through every op that treats positions alike. Unlike
axes, copies are never guessed: an op that is not in the table ends what is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.fx import Graph, Node

from ..ir import is_tensor, value
from ..relations.table import find_relation
from ..relations.terms import (
    Join,
    Keep,
    Merge,
    Narrow,
    Pick,
    Regroup,
    Roll,
    Source,
    Stack,
    Term,
)


class CopyFactor(NamedTuple):
    """A factor of a dimension, and whether its positions hold copies of one value."""

    size: int
    is_copy: bool


CopyFactors = tuple[CopyFactor, ...]
"""The factors of one dimension, none of them of one position."""
Copies = tuple[CopyFactors, ...]
"""Per dimension of a tensor its factors, whose sizes multiply to its own."""


def find_copies(graph: Graph) -> dict[Node, Copies]:
    """Returns the dimensions of every tensor of a graph of fixed sizes."""
    known: dict[Node, Copies] = {}
    for node in graph.nodes:
        if is_tensor(node):
            known[node] = _infer(node, known)
    return known


def _infer(node: Node, known: Mapping[Node, Copies]) -> Copies:
    relation = find_relation(node)
    if relation is None:
        return tuple(map(_single, value(node).shape))
    follower = _CopyFollower(known)
    return tuple(_merged(follower.follow(term)) for term in relation.terms)


def _single(size: int) -> CopyFactors:
    """A dimension without copies."""
    return (CopyFactor(size, False),) if size != 1 else ()


def _merged(factors: CopyFactors) -> CopyFactors:
    """Merges neighboring factors of one sort, and drops factors of size 1."""
    merged: list[CopyFactor] = []
    for size, is_copy in factors:
        if size == 1:
            continue
        if merged and merged[-1].is_copy == is_copy:
            size *= merged.pop().size
        merged.append(CopyFactor(size, is_copy))
    return tuple(merged)


@dataclass(slots=True)
class _CopyFollower:
    """Follows the terms of one relation."""

    known: Mapping[Node, Copies]
    views: dict[tuple[tuple[Source, ...], tuple[int, ...]], Copies] = field(default_factory=dict)
    """Runs of dimensions that were regrouped already."""

    def follow(self, term: Term) -> CopyFactors:
        """Returns the factors of one dimension."""
        match term:
            case Keep(size):
                return self._shared(size, term.operands)
            case Pick(size, indices):  # equal indices pick equal values
                return self._shared(size, indices)
            case Regroup(run, sizes, index):
                return self._view(run, sizes)[index]
            case Merge(terms):
                return tuple(factor for inner in terms for factor in self.follow(inner))
            case Join(parts) if len(set(parts)) == 1:
                return (CopyFactor(len(parts), True), *self._at(parts[0]))
            case Stack(tensors):
                return (CopyFactor(len(tensors), len(set(tensors)) == 1),)
            case Narrow(size, source) | Roll(size, source):
                factors = self._at(source)
                is_whole = isinstance(term, Narrow) and size == source.size
                is_copy = all(factor.is_copy for factor in factors)
                return factors if is_whole else (CopyFactor(size, is_copy),)
            case _:
                return _single(term.size)

    def _at(self, source: Source) -> CopyFactors:
        return self.known[source.tensor][source.dim]

    def _shared(self, size: int, sources: Sequence[Source]) -> CopyFactors:
        """Copies in all that vary along a dimension are copies in the result."""
        found = {self._at(source) for source in sources} - {()}
        if not found:
            return (CopyFactor(size, True),)
        return found.pop() if len(found) == 1 else _single(size)

    def _view(self, run: tuple[Source, ...], sizes: tuple[int, ...]) -> Copies:
        if (run, sizes) not in self.views:
            found = _regroup(list(map(self._at, run)), sizes)
            self.views[run, sizes] = found or tuple(map(_single, sizes))
        return self.views[run, sizes]


def _regroup(dims: Sequence[CopyFactors], sizes: Sequence[int]) -> Copies | None:
    """Factors in row-major order, cut anew; one that a boundary falls into is split in two."""
    queue = [factor for factors in dims for factor in factors][::-1]
    result = []
    for size in sizes:
        taken: list[CopyFactor] = []
        while size > 1:
            if not queue:
                return None
            inner, is_copy = queue.pop()
            outer = min(inner, size)
            if inner % outer or size % outer:
                return None
            taken.append(CopyFactor(outer, is_copy))
            if inner > outer:
                queue.append(CopyFactor(inner // outer, is_copy))
            size //= outer
        result.append(tuple(taken))
    return tuple(result)
