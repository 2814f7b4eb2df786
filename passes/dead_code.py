"""dead_code: finds and erases the nodes of a graph that nothing needs."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from .ir import is_effect


def dead_without(cuts: Iterable[Node]) -> set[Node]:
    """Returns the nodes, cuts included, that are dead code once the values of the cuts are inputs.

    Nodes with side effects are never dead. Visits only the dead nodes and their inputs.

    Requires: a graph without dead code.
    """
    dead = set(cuts)
    stack = list(dead)
    while stack:
        for node in stack.pop().all_input_nodes:
            is_free = node.op != "placeholder" and not is_effect(node)
            if node not in dead and is_free and dead.issuperset(node.users):
                dead.add(node)
                stack.append(node)
    return dead


def remove_dead_code(graph: Graph) -> None:
    """Erases calls and attribute reads without users, except calls that have side effects.

    Inputs stay, since they are the signature.
    """
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and not is_effect(node):
            graph.erase_node(node)


def erase_unneeded(nodes: Iterable[Node]) -> set[Node]:
    """Erases those of `nodes` without users, and what only they needed; returns what it erased."""
    erased: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in erased or node.users or node.op in ("placeholder", "output"):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
        stack += inputs
    return erased
