"""Loops over an axis: positions that are taken one by one, and joined again.

The values that a loop over frames or samples computes have no dimension for these. Each follows
from one position instead. Where all positions are stacked or concatenated, the dimension is back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch.fx import Node

from ..ir import Dims
from ..relations.terms import Join, Narrow, Relation, Source, Stack, Write
from .factors import Dimension, find_position, is_named, length

Positions = Mapping[Dimension, int | None]
"""Dimensions that a value no longer has -> the position it is from; None: several."""


def find_positions(node: Node, relation: Relation | None) -> Positions:
    """Returns the positions that a node's operands follow from, and last the one that it takes."""
    found = _merge([n.meta["positions"] for n in node.all_input_nodes if "positions" in n.meta])
    for product, position in _taken(relation) if relation is not None else ():
        found = {**{p: i for p, i in found.items() if p != product}, product: position}
    return found


def _merge(operands: Sequence[Positions]) -> Positions:
    known = [positions for positions in operands if positions]
    if all(positions is known[0] for positions in known):
        return known[0] if known else {}
    merged: dict[Dimension, int | None] = {}
    for positions in known:
        for product, position in positions.items():
            same = merged.get(product, position) == position
            merged[product] = position if same else None
    return merged


def _taken(relation: Relation) -> Iterator[tuple[Dimension, int]]:
    """Yields the dimensions, or outer parts of them, of which one position is left, and which."""
    taken = ((s.source, s.position) for s in relation.selected)
    spans = [(source, at, at + 1) for source, at in taken if at is not None]
    narrowed = (t for t in relation.terms if isinstance(t, Narrow) and not t.is_indexed)
    spans += [(t.source, t.start, t.stop) for t in narrowed]
    for source, start, stop in spans:
        found = find_position(_dimension(source), start, stop)
        if found is not None and is_named(found[0]):
            yield found


def _dimension(source: Source) -> Dimension:
    dims: Dims = source.tensor.meta["axes"]
    return dims[source.dim]


def rejoin(node: Node, relation: Relation | None, dims: Dims) -> tuple[Dims, Positions]:
    """Returns the dimensions of a stack, a concatenation or a write with the one that a loop ran
    over, and the positions of those that are still gone.

        # frames x_BTSD[:, i], each (B, S, D), concatenated: ((T 3, B 2), (S 4,), (D 8,))
    """
    positions: Positions = node.meta["positions"]
    if not positions:
        return dims, positions
    looped = None
    for dim, term in enumerate(relation.terms if relation is not None else ()):
        if isinstance(term, (Join, Stack, Write)):
            looped, inner = _find_looped(term, positions, dims[dim])
        if looped is not None:
            dims = (*dims[:dim], looped + inner, *dims[dim + 1 :])
            break
    left = {p: i for p, i in positions.items() if p != looped and p not in dims}
    return dims, positions if len(left) == len(positions) else left


def _find_looped(
    term: Join | Stack | Write, positions: Positions, whole: Dimension
) -> tuple[Dimension | None, Dimension]:
    """Returns the dimension that a loop ran over, the innermost of several, and what each part
    adds to it."""
    inner: Dimension | None = ()
    match term:
        case Write():
            found = [p for p in positions if _is_written(term, whole, p)]
        case Stack(tensors):
            found = [p for p in positions if _are_all_of(tensors, p)]
        case Join(parts):
            found = [p for p in positions if _are_all_of([part.tensor for part in parts], p)]
            inner = _shared(parts)
    return (found[-1], inner) if found and inner is not None else (None, ())


def _are_all_of(parts: Sequence[Node], product: Dimension) -> bool:
    """Returns whether each position of a dimension is that of one part."""
    found = [part.meta["positions"].get(product) for part in parts]
    every = set(range(length(product)))
    return len(found) == len(every) > 1 and set(found) == every


def _is_written(term: Write, whole: Dimension, product: Dimension) -> bool:
    """Returns whether what is written to one position of a new dimension is from the same position
    of another."""
    if term.dim is not None or term.span is None or len(term.span) != 1:
        return False
    same = term.written.meta["positions"].get(product) == term.span[0]
    return same and length(whole) == length(product) > 1 and not is_named(whole)


def _shared(parts: Sequence[Source]) -> Dimension | None:
    """Returns the dimension of each part where all have the same; nothing if it is one position."""
    dims = list(map(_dimension, parts))
    if length(dims[0]) == 1:
        return () if all(length(product) == 1 for product in dims) else None
    return dims[0] if all(product == dims[0] for product in dims) else None
