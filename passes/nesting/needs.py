"""needs: what a guarded graph still computes where a region is reused."""

from __future__ import annotations

from torch.fx import Graph, Node

from ..guard_ops import compute_unless, encode_unless, resume, slot_of, stash_unless
from ..ir import is_effect, output_node

_FRESH = {compute_unless: slice(2, None), encode_unless: slice(2, 3), stash_unless: slice(2, 3)}
"""Guard op -> which of its operands it reads only where its region is computed."""


def find_needed(graph: Graph, slot: int) -> set[Node]:
    """Returns the nodes of a guarded graph that run at a step that reuses a slot."""
    needed: set[Node] = set()
    stack = [output_node(graph), *filter(is_effect, graph.nodes)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            unread = _unread(node) if slot_of(node) == slot else ()
            stack += [n for n in node.all_input_nodes if n not in unread]
    return needed


def _unread(node: Node) -> tuple[object, ...]:
    """Returns the operands that a guard op does not read where its region is reused."""
    if node.target is resume:
        return tuple(n for n in node.args[1:2] if n not in node.args[2:])
    return node.args[_FRESH[node.target]] if node.target in _FRESH else ()
