"""guards: the values read from data that a graph is specialized on, and how to read them again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, GraphModule, Node

from ..ir import copy_into, make_module, user_inputs
from .records import Checked, Read


@dataclass(frozen=True, eq=False)
class Reads:
    """The values read from tensor data that a graph is specialized on.

    :class:`pabc.runtime.reads.ReadCheck` reads them again for the inputs of a call.

    Attributes:
        graph: computes, from the model's inputs, the tensors that the values were read from; it
            returns nothing.
        checked: the reads, with nodes of `graph` in the place of tensors.
        inputs: per read, the names of the model's inputs that its value follows from.
        used: the positions of the inputs that `graph` reads.
    """

    graph: GraphModule
    checked: tuple[Checked, ...]
    inputs: tuple[frozenset[str], ...]
    used: tuple[int, ...]

    @classmethod
    def of(cls, gm: GraphModule, checked: Sequence[Checked]) -> Reads:
        """Returns those of the reads `checked`, which hold nodes of `gm`, that follow from inputs
        or weights."""
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
            tuple(replace(c, tensors=tuple(mapping[node] for node in c.tensors)) for c in kept),
            tuple(_inputs_among(n for node in c.tensors for n in sources[node]) for c in kept),
            tuple(i for i, n in enumerate(inputs) if mapping[n].users or n in needed),
        )

    @property
    def entries(self) -> tuple[Read, ...]:
        """The reads alone."""
        return tuple(c.read for c in self.checked)

    @property
    def weights(self) -> tuple[str, ...]:
        """The qualified names of the model's tensors that `graph` reads."""
        return tuple(str(n.target) for n in self.graph.graph.nodes if n.op == "get_attr")

    def __bool__(self) -> bool:
        return bool(self.checked)

    def follow(self, denoised: Collection[str]) -> dict[str, str]:
        """Returns the modules, except the model itself, that read values which follow from what is
        denoised, each with why that makes it opaque."""
        reads = zip(self.entries, self.inputs, strict=True)
        return {
            read.path: f"it reads values that follow from the latents ({read.site})"
            for read, inputs in reads
            if read.path and not inputs.isdisjoint(denoised)
        }


def _inputs_among(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset(node.name for node in nodes if node.op == "placeholder")


def _needed_by(nodes: Iterable[Node]) -> set[Node]:
    """Returns the nodes and all that they are computed from."""
    needed: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _sources(graph: Graph) -> dict[Node, frozenset[Node]]:
    """Returns, for each node, the inputs and weights that it is computed from."""
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node] = frozenset([node])
        else:
            parts = (found[n] for n in node.all_input_nodes)
            found[node] = frozenset().union(*parts)
    return found
