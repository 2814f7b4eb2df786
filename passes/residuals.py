"""residuals: where branches are added to a residual stream, and what joins them before that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from .ir import Reach, aten, is_call, is_contraction, is_tensor, value
from .relations.groups import LAYOUTS
from .relations.table import find_relation
from .relations.terms import Keep, Narrow, Regroup, Source, Term

_ADDS = (aten.add.Tensor,)


@dataclass(frozen=True)
class Residual:
    """An addition to a residual stream: stream + branch, where the branch reads the stream.

    Or a share of a branch, which is joined with another one before the addition.

    Attributes:
        add: the addition; of a share, the sum or concatenation that joins it.
        stream: the stream that the branch reads and is added to.
        branch: the branch, or the share of one.
        later: of a share, the branch that it is a part of.
    """

    add: Node
    stream: Node
    branch: Node
    later: Node | None = None


def find_residuals(graph: Graph, reach: Reach) -> list[Residual]:
    """Returns the additions of equal shapes of which one operand is computed from the other by a
    product."""
    streams: dict[Node, Node] = {}
    found = []
    for node in graph.nodes:
        if not is_call(node, _ADDS) or len(node.all_input_nodes) != 2:
            continue
        a, b = node.all_input_nodes
        if not value(a).shape == value(b).shape == value(node).shape:
            continue
        for branch, other in ((a, b), (b, a)):
            stream = _shared_stream(reach, streams, branch, other)
            if stream is not None:
                streams[node] = stream
                found.append(Residual(node, stream, branch))
                break
    return found


def _shared_stream(
    reach: Reach, streams: dict[Node, Node], branch: Node, other: Node
) -> Node | None:
    """Returns the stream that `branch` reads and `other` carries on: `other`, or an earlier sum in
    it.

    A part of the stream counts as the stream: some models add to each part with its own gate.
    """
    candidate: Node | None = _through_layouts(other)
    if candidate is not None and not reach.depends(branch, candidate):
        candidate = _whole(candidate)
    while candidate is not None and not reach.depends(branch, candidate):
        candidate = streams.get(candidate)
    if candidate is None or reach.depends(other, branch):
        return None
    crossed = any(is_contraction(n) for n in reach.between(candidate, branch))
    return candidate if crossed else None


def _through_layouts(node: Node) -> Node:
    while is_call(node, LAYOUTS) and is_tensor(node.args[0]):
        node = node.args[0]
    return node


def _whole(node: Node) -> Node:
    """Returns what a node is a part, or another layout, of."""
    while (source := _source_of(node)) is not None:
        node = source
    return node


def _source_of(node: Node) -> Node | None:
    """Returns the tensor that each element of a node comes from, in the order that it has there."""
    relation = find_relation(node)
    if relation is None or not relation.is_exact or relation.selected:
        return None
    found = {s.tensor for term in relation.terms for s in _drawn_from(term) or ()}
    is_part = all(_drawn_from(term) is not None for term in relation.terms)
    return found.pop() if is_part and len(found) == 1 else None


def _drawn_from(term: Term) -> tuple[Source, ...] | None:
    """Returns the dimensions that a term has positions of, in order and once; None if it has not
    just those."""
    match term:
        case Keep(size, sources) if all(source.size == size for source in sources):
            return sources if sources or size == 1 else None
        case Regroup(run):
            return run
        case Narrow(source=source):
            return (source,)
    return None


def find_exits(reach: Reach, residuals: Sequence[Residual], attention: Node) -> list[Residual]:
    """Returns the innermost residual additions that an attention reaches, one per stream."""
    exits: list[Residual] = []
    for residual in residuals:
        reached = residual.branch is attention or reach.depends(residual.branch, attention)
        if not reached or not _projects(reach, residual.stream, attention):
            continue
        if not any(reach.depends(residual.add, earlier.add) for earlier in exits):
            exits.append(residual)
    return exits


def _projects(reach: Reach, stream: Node, attention: Node) -> bool:
    """Returns whether an attention reads a stream through a product: a query is not a stream."""
    return reach.depends(attention, stream) and any(
        is_contraction(n) for n in reach.between(stream, attention)[:-1]
    )


def find_merges(
    reach: Reach, residual: Residual, attentions: Sequence[Node], mask: int
) -> Iterator[tuple[Node, list[Node]]]:
    """Yields where other branches join the attention's, in order, with what joins there."""
    read = {_through_layouts(n) for attention in attentions for n in attention.all_input_nodes}
    read = {n for n in read if reach.depends(n, residual.stream)}  # not masks, which others share
    owned = mask | reach.mask(read)  # what follows from its values belongs to the attention
    for node in reach.between(residual.stream, residual.branch):
        if not is_call(node, (*_ADDS, aten.cat.default)) or not reach.touches(node, mask):
            continue
        others = [n for n in node.all_input_nodes if not reach.touches(n, owned)]
        joining = [n for n in others if _is_projected(reach, residual.stream, n)]
        if joining:
            yield node, joining


def find_shares(
    reach: Reach,
    groups: Mapping[tuple[Node, ...], Sequence[Node]],
    residuals: Sequence[Residual],
) -> list[Residual]:
    """Returns what joins attentions before their residual addition, such as a parallel MLP."""
    by_add = {r.add: r for r in residuals}
    return [
        Residual(node, residual.stream, share, residual.branch)
        for exits, attentions in groups.items()
        for residual in (by_add[add] for add in exits if add in by_add)
        for node, joining in find_merges(reach, residual, attentions, reach.mask(attentions))
        for share in joining
    ]


def _is_projected(reach: Reach, stream: Node, node: Node) -> bool:
    return reach.depends(node, stream) and any(map(is_contraction, reach.between(stream, node)))
