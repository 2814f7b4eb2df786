"""Checks, for the inputs of a call, the values read from data that a graph is specialized on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from pabc.passes import Checked, Read, Reads


class ReadCheck:
    """Reads again what a graph is specialized on."""

    def __init__(self, reads: Reads) -> None:
        self._graph = reads.graph
        order = {node: i for i, node in enumerate(reads.graph.graph.nodes)}
        self._checks: dict[Node, list[Checked]] = {}
        for c in reads.checked:
            self._checks.setdefault(max(c.tensors, key=order.__getitem__), []).append(c)

    def difference(self, inputs: Sequence[Any]) -> tuple[Read, Any] | None:
        """Returns the first read that gives another value for these inputs, with that value."""
        try:
            with torch.no_grad():
                _Rerun(self._graph, self._checks).run(*inputs)
        except _Differs as found:
            return found.read, found.value
        return None


class _Differs(Exception):
    def __init__(self, read: Read, value: Any) -> None:
        self.read, self.value = read, value


class _Rerun(Interpreter):
    """Runs a graph and stops at the first read that differs: later ones depend on its value."""

    def __init__(self, gm: GraphModule, checks: Mapping[Node, Sequence[Checked]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._checks = checks

    def run_node(self, n: Node) -> Any:
        """Runs one node, and then the checks whose tensors are all there."""
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
