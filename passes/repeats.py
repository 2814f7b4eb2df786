"""repeats: of what a prologue computes for each of many equal copies, one copy is kept.

Models repeat a text over frames before they project it to keys and values. Which positions of a
dimension are copies of one another follows from the dataflow (:mod:`.provenance.copies`).
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
    """The first of the copies along `dims`, with dimensions of one in their place.

    The whole, where these are no copies bit for bit: a kernel may compute a row otherwise at
    another place.
    """
    first = whole
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return first.clone() if torch.equal(whole, first.expand_as(whole)) else whole


def keep_unrepeated_pass(
    gm: GraphModule, captured: Captured, prologue: PrologueGraph
) -> tuple[GraphModule, PrologueGraph]:
    """Makes the prologue give one of the copies that hoisted values hold, and repeats it at reads.

    The prologue still computes all of them, as the model does, since a product with fewer rows may
    have other bits; what it keeps is compared with what it drops, once a generation.

    Requires: a prologue (:func:`hoist_invariants_pass`).
    Ensures: outputs bitwise as before; a hoisted value that holds copies and is read in one region
    has dimensions of one in their place, or is whole where the copies differ in some bit; that
    region repeats it into the layout that it had. Left as they are: values that several regions
    read (masks, tables), which are kept once for all layers and would be repeated at every step;
    values whose memory has gaps; and graphs with dynamic shapes.

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
    """Checks that what the prologue returns has the shape that the graph reads."""
    if captured.sizes is not None:
        return
    for output, node in _hoisted(gm, prologue):
        assert value(output).shape == value(node).shape, (output.name, node.name)


def _hoisted(gm: GraphModule, prologue: PrologueGraph) -> list[tuple[Node, Node]]:
    """Returns what the prologue returns, with the inputs of the graph that take it."""
    outputs: Sequence[Node] = output_node(prologue.graph.graph).args[0]
    inputs = user_inputs(gm.graph)
    return list(zip(outputs, inputs[len(inputs) - len(outputs) :], strict=True))


def _reading_region(node: Node) -> int | None:
    """The region that all readers of a node are in."""
    regions = {user.meta.get("region") for user in node.users}
    return regions.pop() if len(regions) == 1 else None


@dataclass(frozen=True)
class _RepeatedLayout:
    """How a value with copies lies in memory.

    Attributes:
        shape: its shape.
        sizes: of all factors of its dimensions.
        order: the factors, outermost in memory first.
        copies: which of them, in that order, are copies.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(cls, node: Node, dims: Copies) -> _RepeatedLayout | None:
        """None where there are no copies, or not each in memory of its own without gaps."""
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
        """Of a value in `graph`: the first of its copies."""
        split = _call(graph, aten.view.default, node, list(self.sizes))
        ordered = _call(graph, aten.permute.default, split, list(self.order))
        kept = graph.call_function(keep_one, (ordered, self.copies))
        kept.meta["val"] = self.first(value(node))
        return kept

    def read(self, graph: Graph, kept: Node) -> list[Node]:
        """Of what :meth:`keep` gave, in `graph`: what makes the value of it; the value is last."""
        sizes = [self.sizes[i] for i in self.order]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        expanded = _call(graph, aten.expand.default, kept, sizes)
        whole = _call(graph, aten.clone.default, expanded, memory_format=torch.contiguous_format)
        split = _call(graph, aten.permute.default, whole, back)
        return [expanded, whole, split, _call(graph, aten.view.default, split, list(self.shape))]

    def first(self, whole: torch.Tensor) -> torch.Tensor:
        """A tensor laid out as what is kept of `whole`."""
        sizes = [self.sizes[i] for i in self.order]
        return whole.new_empty([1 if i in self.copies else n for i, n in enumerate(sizes)])


@dataclass(frozen=True)
class _Kept:
    """An input that takes a hoisted value with copies, and the region that reads it."""

    node: Node
    layout: _RepeatedLayout
    region: int

    def read(self, graph: Graph, kept: Node) -> Node:
        """The value with its copies, in `graph`: not made where the region is reused."""
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
        if node in places:  # at once, so that the whole need not live on
            kept[node] = layouts[places[node]].keep(graph, mapping[node])
    graph.output(tuple(kept.get(n) or mapping[n] for n in outputs))
    return make_module(prologue, graph)


def _with_reads(gm: GraphModule, found: Mapping[Node, _Kept]) -> GraphModule:
    graph = Graph()
    mapping: dict[Node, Node] = {}
    waiting = dict(found)
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            if (kept := waiting.pop(source, None)) is not None:  # not before it is needed
                mapping[source] = kept.read(graph, mapping[source])
        copy_into(graph, [node], mapping)
        if node in found:
            mapping[node].meta["val"] = found[node].layout.first(value(node))
            mapping[node].meta.pop("axes", None)
    return make_module(gm, graph)
