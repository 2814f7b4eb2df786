"""hoist: moves values that do not change during a generation to a prologue that runs once.

Values that depend on the timestep, but not on the latents, stay in the phases. They cost less than
1 % of a step of Latte and CogVideoX, and of a layer of image models 1 % to 3 % at 256 pixels, less
than 1 % at 512. Computing them for all steps at once would change bits, since products with more
rows may round differently. Caching them across generations would help only if the text and the
timesteps are the same again: where they cost most, they also depend on the pooled text or the class
(`bench/time_hoisting.py`, `bench/results/hoisting.json`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .dead_code import dead_without
from .facts import Captured, Denoised, PrologueGraph
from .ir import (
    copy_into,
    is_opaque,
    is_random,
    is_tensor,
    make_module,
    user_inputs,
    value,
)
from .relations.groups import LAYOUTS
from .tracing.sizes import is_size


@dataclass(frozen=True)
class _Invariants:
    """The nodes that depend on no varying input, and the frontier: those that others read."""

    nodes: tuple[Node, ...]
    frontier: tuple[Node, ...]


def hoist_invariants_pass(gm: GraphModule, denoised: Denoised) -> tuple[GraphModule, PrologueGraph]:
    """Splits off the ops that depend on weights, constants and steady inputs alone: text
    projections, cross attention's keys and values, position and rotary tables, masks.

    An input counts as steady if it is not denoised and has two dimensions or more (timesteps have
    at most one). A wrong guess costs time, but never changes results: the prologue runs again when
    a steady input or a weight has changed (:class:`pabc.runtime.program.Program`).

    Requires: marked regions, since a residual stream could not be found once it is hoisted.
    Ensures: the prologue maps the model's inputs to a tuple of tensors, which are the last inputs
    of the graph; outputs bitwise as before. Views of weights and constants are not hoisted, nor is
    the unpacking of quantized weights: the unpacked weights, kept for a generation, would take the
    memory that quantization saves.

        # before                                # after
        %e = linear(%text, %w)                  %hoisted_0 = placeholder
        %k = linear(%e, %wk)                    %o = sdpa(%q, %hoisted_0, %v)
        %o = sdpa(%q, %k, %v)                   # prologue: %e, %k; return (%k,)
    """
    inputs = user_inputs(gm.graph)
    steady = [n for n in inputs if _is_steady(n, denoised.streams)]
    found = find_invariants(gm.graph, steady)
    prologue = _build_prologue(gm, inputs, found)
    graph = Graph()
    mapping: dict[Node, Node] = {}
    copy_into(graph, inputs, mapping)
    for i, node in enumerate(found.frontier):
        mapping[node] = graph.placeholder(f"hoisted_{i}")
        mapping[node].meta.update(node.meta)
        for mark in ("attention", "region", "cut", "joins"):
            mapping[node].meta.pop(mark, None)
    stays = _needed_without(gm.graph, found.frontier)
    copy_into(graph, [n for n in gm.graph.nodes if n in stays], mapping)
    used = {n.name for n in user_inputs(prologue.graph) if _is_read(n)}
    reads = tuple(i for i, n in enumerate(inputs) if n.name in used)
    attentions = tuple(n.meta["attention"] for n in found.nodes if "attention" in n.meta)
    return make_module(gm, graph), PrologueGraph(prologue, reads, attentions)


def hoist_nothing(gm: GraphModule) -> tuple[GraphModule, PrologueGraph]:
    """Returns the graph as it is, with a prologue that computes nothing."""
    return gm, PrologueGraph(_build_prologue(gm, user_inputs(gm.graph), _Invariants((), ())))


def verify_hoist(
    gm: GraphModule, captured: Captured, denoised: Denoised, prologue: PrologueGraph
) -> None:
    """Checks that the prologue reads steady inputs only, and that its results are the graph's last
    inputs."""
    for node in user_inputs(prologue.graph.graph):
        assert not _is_read(node) or _is_steady(node, denoised.streams), f"{node.name} varies"
    hoisted = [n for n in user_inputs(gm.graph) if n.name.startswith("hoisted_")]
    assert user_inputs(gm.graph)[len(captured.signature.inputs) :] == hoisted


def _is_read(node: Node) -> bool:
    """Returns True if the values of an input are read, not only its sizes."""
    return any(not is_size(user) for user in node.users)


def _is_steady(node: Node, denoised: Collection[str]) -> bool:
    return is_tensor(node) and node.name not in denoised and value(node).ndim >= 2


def find_invariants(graph: Graph, steady: list[Node]) -> _Invariants:
    """Finds the nodes to hoist: computations on weights, constants and steady inputs alone.

    Constants that an op makes from sizes alone (`arange`, `zeros`) stay where they are read, as
    weights do; random ops stay as well.
    """
    invariant: set[Node] = set(steady)
    computed: set[Node] = set()  # nodes whose value is not just a view
    weights: dict[Node, frozenset[Node]] = {}  # node that depends on weights alone -> the weights
    for node in graph.nodes:
        if node.op == "get_attr":
            invariant.add(node)
            weights[node] = frozenset([node])
        elif is_size(node):  # sizes do not change within a generation
            invariant.add(node)
        elif node.op == "call_function" and not is_opaque(node) and not is_random(node):
            sources = [n for n in node.all_input_nodes if not is_size(n)]
            if not invariant.issuperset(sources):
                continue
            invariant.add(node)
            if all(n in weights for n in sources):
                weights[node] = frozenset().union(*(weights[n] for n in sources))
                if not sources or _is_unpacked(node, weights[node]):
                    continue
            if node.target not in LAYOUTS or not computed.isdisjoint(sources):
                computed.add(node)
    for node in reversed(graph.nodes):
        users = node.users
        if node in computed and users and all(_is_left(u, weights, computed) for u in users):
            computed.remove(node)
    frontier = [
        node
        for node in graph.nodes
        if node in computed and is_tensor(node) and any(u not in computed for u in node.users)
    ]
    return _Invariants(needed_by(frontier), tuple(frontier))


def _is_left(node: Node, weights: Collection[Node], computed: Collection[Node]) -> bool:
    """Returns True if a value that depends on weights alone is not hoisted.

    Then its operands, such as copies of quantized bytes, are not hoisted for its sake either: that
    would save little time, and take as much memory as the weights.
    """
    return node in weights and node not in computed


def _is_unpacked(node: Node, weights: Collection[Node]) -> bool:
    """Returns True if a value is an unpacked form of quantized weights.

    Such a value takes more bytes than the weights that it is computed from, the largest of which
    has elements of one byte.
    """
    tensors = [value(n) for n in weights if is_tensor(n)]
    if not tensors or not is_tensor(node):
        return False
    largest = max(tensors, key=_num_bytes)
    is_quantized = largest.itemsize == 1 and largest.dtype != torch.bool
    return is_quantized and _num_bytes(value(node)) > sum(map(_num_bytes, tensors))


def _num_bytes(tensor: torch.Tensor) -> Any:
    return tensor.numel() * tensor.itemsize


def needed_by(frontier: list[Node]) -> tuple[Node, ...]:
    """Returns the frontier and its ancestors, inputs excluded, in graph order."""
    needed: set[Node] = set()
    stack = list(frontier)
    while stack:
        node = stack.pop()
        if node not in needed and node.op != "placeholder":
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph = frontier[0].graph if frontier else Graph()
    return tuple(node for node in graph.nodes if node in needed)


def _needed_without(graph: Graph, frontier: tuple[Node, ...]) -> set[Node]:
    """Returns the nodes, except inputs, that outputs need once the frontier is an input."""
    dead = dead_without(frontier)
    return {n for n in graph.nodes if n not in dead and n.op != "placeholder"}


def _build_prologue(gm: GraphModule, inputs: list[Node], found: _Invariants) -> GraphModule:
    graph = Graph()
    mapping: dict[Node, Node] = {}
    copy_into(graph, inputs, mapping)
    copy_into(graph, found.nodes, mapping)
    graph.output(tuple(mapping[n] for n in found.frontier))
    return make_module(gm, graph)
