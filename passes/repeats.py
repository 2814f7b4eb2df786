"""repeats: keeps one of the equal copies that a hoisted value consists of.

Models repeat a text over frames before they project it to keys and values. The dataflow tells which
positions of a dimension are copies of one another (:mod:`.provenance.copies`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .facts import Captured, PrologueGraph
from .ir import aten, copy_into, make_module, output_node, user_inputs, value
from .provenance.copies import Copies, find_copies


def keep_one(whole: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Returns the first of the copies along `dims`, whose size becomes 1.

    Returns `whole` if the copies are not equal bit for bit, as happens if a kernel computes a row
    differently at another position.
    """
    first = whole
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return first.clone() if torch.equal(whole, first.expand_as(whole)) else whole


def keep_unrepeated_pass(
    gm: GraphModule, captured: Captured, prologue: PrologueGraph
) -> tuple[GraphModule, PrologueGraph]:
    """Keeps one of the copies in each hoisted value, and expands it where it is read.

    The prologue still computes all copies, as the model does, since a product with fewer rows may
    round differently. Once per generation, it compares the copy that it keeps with the others.

    Requires: a prologue (:func:`hoist_invariants_pass`).
    Ensures: outputs bitwise as before. A hoisted value with copies that is read in one region has
    size 1 along the copies, or is whole if the copies differ in some bit; the region expands it to
    the layout that it had. Unchanged are values that several regions read (masks, tables), since
    they are stored once for all layers and would be expanded at every step; values whose memory
    has gaps; and graphs with dynamic shapes.

        # before                                # after
        %o = sdpa(%q, %hoisted_0, %v)           %e = expand(%hoisted_0, [B, T, L, D])
                                                %c = clone(%e)
                                                %k = view(%c, [B*T, L, D])
                                                %o = sdpa(%q, %k, %v)
        # prologue: return (%k,)                # prologue: return (keep_one(%k as [B, T, L, D]),)
    """
    if captured.sizes is not None:
        return gm, prologue
    known = find_copies(prologue.graph.graph)
    found = {}
    for i, (output, node) in enumerate(_hoisted(gm, prologue)):
        layout = _RepeatedLayout.of(output, known[output])
        region = _reading_region(node)
        if layout is not None and region is not None:
            found[i] = _Kept(node, layout, region)
    result = _with_reads(gm, {kept.node: kept for kept in found.values()})
    keeps = _with_keeps(prologue.graph, {i: k.layout for i, k in found.items()})
    return result, replace(prologue, graph=keeps)


def verify_repeats(gm: GraphModule, captured: Captured, prologue: PrologueGraph) -> None:
    """Checks that the prologue's results have the shapes of the graph's hoisted inputs."""
    if captured.sizes is not None:
        return
    for output, node in _hoisted(gm, prologue):
        assert value(output).shape == value(node).shape, (output.name, node.name)


def _hoisted(gm: GraphModule, prologue: PrologueGraph) -> list[tuple[Node, Node]]:
    """Returns the prologue's results, each with the input of the graph that takes it."""
    outputs: Sequence[Node] = output_node(prologue.graph.graph).args[0]
    inputs = user_inputs(gm.graph)
    return list(zip(outputs, inputs[len(inputs) - len(outputs) :], strict=True))


def _reading_region(node: Node) -> int | None:
    """Returns the region that contains all users of a node, or None."""
    regions = {user.meta.get("region") for user in node.users}
    return regions.pop() if len(regions) == 1 else None


@dataclass(frozen=True)
class _RepeatedLayout:
    """The memory layout of a value that contains copies.

    Attributes:
        shape: the shape of the value.
        sizes: the sizes of the factors of its dimensions, in the order of the dimensions.
        order: the indices of the factors, the outermost in memory first.
        copies: positions in `order` of the factors that count copies.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(cls, node: Node, dims: Copies) -> _RepeatedLayout | None:
        """Returns the layout of a node; None if it has no copies, or gaps or overlaps in memory."""
        factors = [factor for product in dims for factor in product]
        strides = [
            stride * prod(size for size, _ in product[i + 1 :])
            for product, stride in zip(dims, value(node).stride(), strict=True)
            for i in range(len(product))
        ]
        order = sorted(range(len(factors)), key=lambda i: -strides[i])
        copies = tuple(place for place, i in enumerate(order) if factors[i][1])
        sizes = tuple(size for size, _ in factors)
        inner = [prod(sizes[i] for i in order[place + 1 :]) for place in range(len(order))]
        if not copies or inner != [strides[i] for i in order]:
            return None
        return cls(tuple(value(node).shape), sizes, tuple(order), copies)

    def keep(self, graph: Graph, node: Node) -> Node:
        """Appends ops to `graph` that keep the first copy in `node`; returns the kept value."""
        split = _call(graph, aten.view.default, node, list(self.sizes))
        ordered = _call(graph, aten.permute.default, split, list(self.order))
        kept = graph.call_function(keep_one, (ordered, self.copies))
        kept.meta["val"] = self.first(value(node))
        return kept

    def read(self, graph: Graph, kept: Node) -> list[Node]:
        """Appends ops to `graph` that rebuild the value from `kept`, the result of :meth:`keep`.

        Returns the new nodes; the last one is the value.
        """
        sizes = [self.sizes[i] for i in self.order]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        expanded = _call(graph, aten.expand.default, kept, sizes)
        whole = _call(graph, aten.clone.default, expanded, memory_format=torch.contiguous_format)
        split = _call(graph, aten.permute.default, whole, back)
        return [expanded, whole, split, _call(graph, aten.view.default, split, list(self.shape))]

    def first(self, whole: torch.Tensor) -> torch.Tensor:
        """Returns an uninitialized tensor with the layout of the first copy in `whole`."""
        sizes = [self.sizes[i] for i in self.order]
        return whole.new_empty([1 if i in self.copies else n for i, n in enumerate(sizes)])


@dataclass(frozen=True)
class _Kept:
    """An input that takes a hoisted value with copies, and the region that reads it."""

    node: Node
    layout: _RepeatedLayout
    region: int

    def read(self, graph: Graph, kept: Node) -> Node:
        """Appends ops to `graph` that rebuild the value, as a part of the region that reads it.

        A step that reuses the region does not run them.
        """
        nodes = self.layout.read(graph, kept)
        for node in nodes:
            node.meta["region"] = self.region
        if "axes" in self.node.meta:
            nodes[-1].meta["axes"] = self.node.meta["axes"]
        return nodes[-1]


def _call(graph: Graph, target: Any, source: Node, *args: Any, **kwargs: Any) -> Node:
    node = graph.call_function(target, (source, *args), kwargs)
    node.meta["val"] = target(value(source), *args, **kwargs)
    return node


def _with_keeps(prologue: GraphModule, layouts: Mapping[int, _RepeatedLayout]) -> GraphModule:
    graph = Graph()
    mapping: dict[Node, Node] = {}
    outputs: Sequence[Node] = output_node(prologue.graph).args[0]
    places = {node: i for i, node in enumerate(outputs) if i in layouts}
    kept: dict[Node, Node] = {}
    for node in prologue.graph.nodes:
        if node.op == "output":
            continue
        copy_into(graph, [node], mapping)
        if node in places:  # immediately, so that the whole value can be freed
            kept[node] = layouts[places[node]].keep(graph, mapping[node])
    graph.output(tuple(kept.get(n) or mapping[n] for n in outputs))
    return make_module(prologue, graph)


def _with_reads(gm: GraphModule, found: Mapping[Node, _Kept]) -> GraphModule:
    graph = Graph()
    mapping: dict[Node, Node] = {}
    pending = dict(found)
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            if (kept := pending.pop(source, None)) is not None:  # right before the first use
                mapping[source] = kept.read(graph, mapping[source])
        copy_into(graph, [node], mapping)
        if node in found:
            mapping[node].meta["val"] = found[node].layout.first(value(node))
            mapping[node].meta.pop("axes", None)
    return make_module(gm, graph)
