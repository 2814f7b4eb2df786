"""skips: what a guarded graph does not run where a region is reused."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, Node

from ..guard_ops import cache_write, compute_unless, encode_unless, resume, slot_of, stash_unless
from ..ir import is_effect

_FRESH = {compute_unless: slice(2, None), encode_unless: slice(2, 3), stash_unless: slice(2, 3)}
"""Guard op -> which of its operands it reads only where its region is computed."""
_STORES = (cache_write, encode_unless, stash_unless)


def find_skipped(graph: Graph, slots: Collection[int]) -> dict[int, set[Node]]:
    """Returns, for each of these slots, the nodes that a step that reuses it does not run.

    Visits only these nodes, and each guard op.
    """
    stores: set[Node] = set()  # what only stores values is run for no result
    guards: dict[int, list[Node]] = {slot: [] for slot in slots}
    for node in reversed(graph.nodes):
        if node.target in _STORES and stores.issuperset(node.users):
            stores.add(node)
        slot = slot_of(node)
        if slot in guards:
            guards[slot].append(node)
    return {slot: _find_dead(guards[slot], stores) for slot in slots}


def _find_dead(guards: Collection[Node], stores: Collection[Node]) -> set[Node]:
    unread = {node: _unread(node) for node in guards}
    dead: set[Node] = set()
    stack = [n for operands in unread.values() for n in operands]
    while stack:
        node = stack.pop()
        if node in dead or node.op == "placeholder" or is_effect(node):
            continue
        if all(u in dead or u in stores or node in unread.get(u, ()) for u in node.users):
            dead.add(node)
            stack += node.all_input_nodes
    return dead


def _unread(node: Node) -> tuple[Node, ...]:
    """Returns the operands that a guard op does not read where its region is reused."""
    if node.target is resume:
        return tuple(n for n in node.args[1:2] if n not in node.args[2:])
    return tuple(node.args[_FRESH[node.target]]) if node.target in _FRESH else ()
