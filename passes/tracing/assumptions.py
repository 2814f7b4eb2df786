"""assumptions: what a graph takes for granted of data, and whether it holds for other inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from ..ir import copy_into, make_module, user_inputs
from .records import Checked, Read


class Reads:
    """What a graph assumes of data: reads, and a graph that computes the tensors they came from.

    Attributes:
        entries: the reads.
        inputs: per read, the names of the model's inputs that its value follows from.
        graph: the model's inputs -> nothing; run node by node by :meth:`difference`.
    """

    def __init__(
        self,
        graph: GraphModule,
        checked: Sequence[Checked],
        inputs: Sequence[frozenset[str]],
        used: Sequence[int],
    ) -> None:
        """`checked` holds nodes of `graph` in the place of tensors; `used`: positions of the inputs
        that it reads."""
        self.graph = graph
        self.checked = tuple(checked)
        self.entries = tuple(c.read for c in checked)
        self.inputs = tuple(inputs)
        self.used = tuple(used)
        self.weights = tuple(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
        order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self._checks: dict[Node, list[Checked]] = {}
        for c in checked:
            self._checks.setdefault(max(c.tensors, key=order.__getitem__), []).append(c)

    @classmethod
    def of(cls, gm: GraphModule, checked: Sequence[Checked]) -> Reads:
        """The reads that follow from inputs or weights; `checked` holds nodes of `gm`."""
        sources = _sources(gm.graph)
        kept = [c for c in checked if any(sources[node] for node in c.tensors)]
        needed = _needed_by(node for c in kept for node in c.tensors)
        graph, mapping = Graph(), dict[Node, Node]()
        inputs = user_inputs(gm.graph)
        copy_into(graph, inputs, mapping)
        copy_into(graph, [n for n in gm.graph.nodes if n in needed and n not in inputs], mapping)
        graph.output(())
        return cls(
            make_module(gm, graph),
            [replace(c, tensors=tuple(mapping[node] for node in c.tensors)) for c in kept],
            [_inputs_among(n for node in c.tensors for n in sources[node]) for c in kept],
            [i for i, n in enumerate(inputs) if mapping[n].users or n in needed],
        )

    def __bool__(self) -> bool:
        return bool(self.entries)

    def difference(self, inputs: Sequence[Any]) -> tuple[Read, Any] | None:
        """The first read that gives another value for these inputs, with that value."""
        try:
            with torch.no_grad():
                _Checker(self.graph, self._checks).run(*inputs)
        except _Differs as found:
            return found.read, found.value
        return None

    def follow(self, denoised: Collection[str]) -> dict[str, str]:
        """Modules (not the model itself) that read values which follow from the latents, and why
        that keeps them out of a graph."""
        reads = zip(self.entries, self.inputs, strict=True)
        return {
            read.path: f"it reads values that follow from the latents ({read.site})"
            for read, inputs in reads
            if read.path and not inputs.isdisjoint(denoised)
        }


class _Differs(Exception):
    def __init__(self, read: Read, value: Any) -> None:
        self.read, self.value = read, value


class _Checker(Interpreter):
    """Runs a graph and stops at the first read that differs: what follows assumes its value."""

    def __init__(
        self,
        gm: GraphModule,
        checks: Mapping[Node, Sequence[Checked]],
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._checks = checks

    def run_node(self, n: Node) -> Any:
        self.env[n] = result = super().run_node(n)
        for checked in self._checks.get(n, ()):
            value = checked.again([self.env[node] for node in checked.tensors])
            if not _same(value, checked.read.value):
                raise _Differs(checked.read, value)
        return result


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "shape") and hasattr(b, "shape"):
        return bool(a.shape == b.shape and (a == b).all())
    return bool(a == b) or (a != a and b != b)


def _inputs_among(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset(node.name for node in nodes if node.op == "placeholder")


def _needed_by(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    needed: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _sources(graph: Graph) -> dict[Node, frozenset[Node]]:
    """Per node, the inputs and weights that it is computed from."""
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node] = frozenset([node])
        else:
            parts = (found[n] for n in node.all_input_nodes)
            found[node] = frozenset().union(*parts)
    return found
