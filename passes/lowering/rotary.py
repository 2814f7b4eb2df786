"""Rotary embeddings, however they are written: recognized by what they do to each channel.

An embedding turns pairs of channels: out[i] = x[i] * cos[i] -+ x[p(i)] * sin[i]. Models write it in
many ways (halves, neighbors, stacked, concatenated, with tables of D or D / 2 channels). So its ops
are run on a probe: D tokens, of which token j is 1 in channel j and 0 in all others, and tables of
random numbers. Which numbers come out where shows the pairs, and the tables that turn them.

    D = 2, tables c and s of random numbers, tokens [[1, 0], [0, 1]]:
        out [[c0, s1], [-s0, c1]], so channel 0 is x0 * c0 - x1 * s0, channel 1 x1 * c1 + x0 * s1
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import aten, is_call, is_tensor, value
from ..relations.groups import CASTS, SPLITS, VIEWS
from .match import are_same, insert

LEAD = 3
"""Dimensions before the channels; tables vary along one of them, the tokens."""
MOST_OPS = 64
"""Ops of an embedding at most."""

_COPIES = (*CASTS, aten.clone.default)
_ARITHMETIC = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
_ALONG = {
    aten.unbind.int: 1,
    aten.stack.default: 1,
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    **dict.fromkeys(SPLITS, 2),
    aten.unsqueeze.default: 1,
    aten.squeeze.dim: 1,
}
"""Ops along one dimension -> the index of the argument that is this dimension."""


@dataclass(frozen=True, slots=True)
class AngleTable:
    """The cosines or the sines of an embedding.

    Attributes:
        shape: that of the node, with as many dimensions as what it is multiplied by.
        channels: for each channel of the embedding, the channel of the table that turns it.
    """

    node: Node
    shape: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def tokens(self) -> int | None:
        """The dimension along which the table varies; None if it is the same for all tokens."""
        return next((d for d, size in enumerate(self.shape[:LEAD]) if size != 1), None)

    def equals(self, other: AngleTable) -> bool:
        """Returns True if two tables have the same values in the same places."""
        places = self.shape, self.channels
        return places == (other.shape, other.channels) and are_same(self.node, other.node)

    def insert(self, before: Node) -> Node:
        """Inserts the table as (tokens, channels) before a node and returns it."""
        length, width = math.prod(self.shape[:LEAD]), math.prod(self.shape[LEAD:])
        table = insert(before, aten.reshape.default, self.node, [length, width])
        places = range(len(self.channels))
        if self.channels == tuple(places):
            return table
        if self.channels == tuple(i % width for i in places):
            return insert(before, aten.repeat.default, table, [1, len(places) // width])
        apart = insert(before, aten.unsqueeze.default, table, -1)
        twice = insert(before, aten.expand.default, apart, [length, width, len(places) // width])
        return insert(before, aten.reshape.default, twice, [length, len(places)])


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    """An embedding of `source`.

    Attributes:
        pairs: `"halves"` or `"neighbors"`, see :mod:`pabc.kernels.short_attention`.
    """

    source: Node
    cos: AngleTable
    sin: AngleTable
    pairs: str


def find_rotary(node: Node) -> RotaryEmbedding | None:
    """Returns the embedding that ends in a node of four dimensions, channels last."""
    if value(node).ndim != LEAD + 1 or value(node).shape[-1] % 2:
        return None
    for source, ops in _sources(node):
        rotary = _probe(source, ops)
        if rotary is not None:
            return rotary
    return None


def _sources(node: Node) -> Iterator[tuple[Node, list[Node]]]:
    """Yields nodes from which alone a node follows, nearest first, with the ops in between.

    Tables do not count: only nodes with tokens of every sequence and head are followed.
    """
    nodes = list(node.graph.nodes)
    place = {each: i for i, each in enumerate(nodes)}
    heap, ops = [-place[node]], list[Node]()
    while heap and len(ops) <= MOST_OPS:
        last = nodes[-heappop(heap)]
        if not heap and ops and is_tensor(last) and value(last).shape == value(node).shape:
            yield last, ops[::-1]
        if not _is_known(last, node):
            return
        ops.append(last)
        for source in last.all_input_nodes:
            if _is_wide(source, node) and -place[source] not in heap:
                heappush(heap, -place[source])


def _is_wide(node: Node, root: Node) -> bool:
    """Returns True if a node has tokens of every sequence and head, as `root` has."""
    val = node.meta.get("val")
    first = val[0] if isinstance(val, (list, tuple)) and val else val
    return isinstance(first, Tensor) and first.shape[:LEAD] == value(root).shape[:LEAD]


def _is_known(node: Node, root: Node) -> bool:
    """Returns True if a node does the same to every token, by an op that can run on the probe."""
    if is_call(node, VIEWS):
        return _is_wide(node, root)
    if is_call(node, _COPIES):
        return value(node).is_floating_point()
    if is_call(node, tuple(_ALONG)):
        return _dim(node) >= LEAD
    return is_call(node, (operator.getitem, *_ARITHMETIC))


def _dim(node: Node) -> int:
    """Returns the dimension along which an op works, as a number that is not negative."""
    index = _ALONG[node.target]
    dim: Any = node.args[index] if len(node.args) > index else 0
    source: Any = node.args[0]
    first = source[0] if isinstance(source, (list, tuple)) else source
    adds_one = node.target in (aten.stack.default, aten.unsqueeze.default)
    return int(dim) % (value(first).ndim + adds_one)


def _probe(source: Node, ops: Sequence[Node]) -> RotaryEmbedding | None:
    """Runs the ops on unit vectors and random tables, and returns the embedding they compute."""
    D = value(source).shape[-1]
    tables = _ProbeTables()
    results: dict[Node, Any] = {source: torch.eye(D, dtype=torch.float64).reshape(D, 1, 1, D)}
    for op in ops:
        rank = value(op).ndim if is_tensor(op) else 0
        given = {
            n: results[n] if n in results else tables.give(n, rank) for n in op.all_input_nodes
        }
        if any(each is None for each in given.values()):
            return None
        results[op] = _run(op, given)
    out = results[ops[-1]]
    return _read(source, out.reshape(D, D), tables) if out.shape == (D, 1, 1, D) else None


def _run(op: Node, given: Mapping[Node, Any]) -> Any:
    args = map_arg(op.args, lambda n: given[n])
    if is_call(op, VIEWS):
        return args[0].reshape(*args[0].shape[:LEAD], *value(op).shape[LEAD:])
    if is_call(op, _COPIES):
        return args[0]
    return op.target(*args, **op.kwargs)


@dataclass(slots=True)
class _ProbeTables:
    """One row of random numbers in place of each table.

    Attributes:
        rows: (node, shape) of a table -> its row.
        owners: number -> the node, the shape and the channel that it stands for.
    """

    rows: dict[tuple[Node, tuple[int, ...]], Tensor] = field(default_factory=dict)
    owners: dict[float, tuple[Node, tuple[int, ...], int]] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def give(self, node: Node, rank: int) -> Tensor | None:
        """Returns the row of a table that an op of `rank` dimensions reads.

        None if the node can't be a table: it varies along several dimensions, say.
        """
        if not is_tensor(node):
            return None
        shape = (1,) * (rank - value(node).ndim) + tuple(value(node).shape)
        if len(shape) <= LEAD or sum(size != 1 for size in shape[:LEAD]) > 1:
            return None
        if (node, shape) not in self.rows:
            row = torch.rand(shape[LEAD:], generator=self.generator, dtype=torch.float64) + 1
            self.rows[node, shape] = row.reshape(1, 1, 1, *shape[LEAD:])
            for i, number in enumerate(row.flatten().tolist()):
                self.owners[number] = (node, shape, i)
        return self.rows[node, shape]

    def find(self, numbers: Tensor) -> AngleTable | None:
        """Returns the table that all of these numbers come from; None if there is no such one."""
        owners = [self.owners.get(number) for number in numbers.tolist()]
        named = {owner and owner[:2] for owner in owners}
        first = owners[0]
        if len(named) != 1 or first is None:
            return None
        table = AngleTable(*first[:2], tuple(owner[2] for owner in owners if owner is not None))
        D, width = len(owners), math.prod(table.shape[LEAD:])
        if D % width:
            return None
        ways = (tuple(i % width for i in range(D)), tuple(i * width // D for i in range(D)))
        return table if table.channels in ways else None


def _read(source: Node, out: Tensor, tables: _ProbeTables) -> RotaryEmbedding | None:
    """Returns the embedding that gave `out`: `out[j, i]` is what channel j adds to channel i."""
    D = len(out)
    i = torch.arange(D)
    for pairs, partner, is_first in (
        ("halves", (i + D // 2) % D, i < D // 2),
        ("neighbors", i ^ 1, i % 2 == 0),
    ):
        sines = torch.where(is_first, -1, 1) * out[partner, i]
        if int(torch.count_nonzero(out)) == 2 * D:
            cos, sin = tables.find(out.diagonal()), tables.find(sines)
            if cos is not None and sin is not None:
                return RotaryEmbedding(source, cos, sin, pairs)
    return None
