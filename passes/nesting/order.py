"""order: sorts nodes so that each follows what it is computed from."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from torch.fx import Graph, Node

from ..ir import copy_into

POSITION = "position"
"""The `meta` entry of a node that was moved by :func:`sort_graph`: where it, or what it follows,
stood before."""


class CycleError(Exception):
    """Says that nodes are computed from one another."""


def sort_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Returns nodes so that each follows its inputs, and in the order given as far as it can.

    Raises: CycleError.
    """
    order: list[Node] = []
    begun: set[Node] = set()
    done: set[Node] = set()
    for first in nodes:
        stack = [first]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in done]
            if node in done or not missing:
                stack.pop()
                if node not in done:
                    done.add(node)
                    order.append(node)
            elif node in begun:
                raise CycleError(node.name)
            else:
                begun.add(node)
                stack += reversed(missing)
    return order


def note_position(graph: Graph, source: Node) -> None:
    """Gives the last nodes of `graph` without a position that of `source`, if it has one."""
    if POSITION not in source.meta:
        return
    for node in reversed(graph.nodes):
        if POSITION in node.meta or node.op == "placeholder":
            return
        node.meta[POSITION] = source.meta[POSITION]


def restore_order(graph: Graph) -> Graph:
    """Returns a graph with its nodes at their former positions, as far as what they read allows.

    A graph in which no node has a position is returned as it is.
    """
    if not any(POSITION in node.meta for node in graph.nodes):
        return graph
    result = Graph()
    copy_into(result, _by_position(graph), {})
    return result


def _by_position(graph: Graph) -> Iterator[Node]:
    nodes = list(graph.nodes)
    waits = {node: len(node.all_input_nodes) for node in nodes}
    keys: dict[Node, tuple[int, int]] = {}
    last = -1
    for i, node in enumerate(nodes):
        last = node.meta.get(POSITION, last)
        keys[node] = (len(nodes) if node.op == "output" else last, i)
    by_key = {key: node for node, key in keys.items()}
    ready = [keys[node] for node in nodes if not waits[node]]
    heapq.heapify(ready)
    while ready:
        node = by_key[heapq.heappop(ready)]
        yield node
        for user in node.users:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, keys[user])
