"""Checks, for the inputs of a call, the values read from data that a graph is specialized on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from pabc.passes import Checked, Read, Reads
from pabc.runtime.versions import TensorVersions
from pabc.runtime.weights import Weights


class ReadCheck:
    """Reads again what a graph is specialized on, where what that follows from has changed.

    Args:
        reads: the values, and the graph that computes the tensors that they are read from.
        weights: the tensors of the model that this graph reads, and others.
    """

    def __init__(self, reads: Reads, weights: Weights) -> None:
        self._graph = reads.graph
        self._used = reads.used
        self._weights = weights.live(reads.weights)
        self._unchanged: TensorVersions | None = None
        order = {node: i for i, node in enumerate(reads.graph.graph.nodes)}
        self._checks: dict[Node, list[Checked]] = {}
        for c in reads.checked:
            self._checks.setdefault(max(c.tensors, key=order.__getitem__), []).append(c)

    def difference(self, inputs: Sequence[Any]) -> tuple[Read, Any] | None:
        """Returns the first read that gives another value for these inputs, with that value."""
        sources = [*[inputs[i] for i in self._used], *self._weights]
        if self._unchanged is not None and self._unchanged.hold_for(sources):
            return None
        try:
            with torch.no_grad():
                _Rerun(self._graph, self._checks).run(*inputs)
        except _Differs as found:
            return found.read, found.value
        self._unchanged = TensorVersions.of(sources)
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
