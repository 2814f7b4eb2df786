"""blocks: splits a flat phase into a chain of blocks; equal blocks are compiled once.

A block ends right before the first product of a residual branch, where no fusion is lost. The
residual stream and the normed input of the product, which cross there, are materialized however the
graph is compiled, since products are kernels of their own. The sum that ends one branch and the
norm that begins the next stay in one block, and are fused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pabc.internals.ops import OpOverload, schema_of
from pabc.internals.tensors import storage_address

from .facts import Block, Blocks
from .ir import (
    GETITEM,
    attribute,
    is_contraction,
    make_module,
    output_node,
    user_inputs,
    value,
)
from .keys import arguments_key, layout_key


def split_blocks_pass(
    gm: GraphModule, *, apart: Callable[[Node], bool] = lambda node: False, whole: bool = False
) -> tuple[GraphModule, Blocks]:
    """Splits a flat graph into blocks, and calls one submodule for all equal blocks.

    An op for which `apart` is true becomes a block of its own. `whole`: all ops between two of
    these are one block.

    Requires: a flat graph without attribute reads (:func:`lift_weights_pass`), with the slots that
    its nodes are from (:func:`inline_regions_pass`), and with fixed shapes.
    Ensures: the same inputs and results, bitwise as before; nothing but `call_module` nodes and
    their items; each distinct block is one submodule, a flat graph of its own whose inputs are in
    the order of their first use. No view is passed between blocks: a block that reads a view takes
    its base as an input, and makes the view again.

        # before                                # after
        %y = add(%x, %g)                        %b = call_module[block_0](%x, %g, ...)
        %n = layer_norm(%y)                     %y, %n = getitem(%b, 0), getitem(%b, 1)
        %h = linear(%n, %w)                     %c = call_module[block_1](%n, %w, %y, ...)
    """
    ordinals = _ordinals(gm.graph, apart, whole)
    blocks: dict[int, list[Node]] = {}
    for node, ordinal in ordinals.items():
        blocks.setdefault(ordinal, []).append(node)
    results = _crossing(gm.graph, ordinals)
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in user_inputs(gm.graph):
        mapping[node] = graph.node_copy(node)
    distinct: dict[Hashable, str] = {}
    named: dict[str, Block] = {}
    for ordinal in sorted(blocks):
        given = [n for n in blocks[ordinal] if n in results]
        body, inputs = _build(gm, blocks[ordinal], given)
        key = block_key(body)
        if key not in distinct:
            distinct[key] = f"block_{len(distinct)}"
            named[distinct[key]] = Block(body, key)
        call = graph.call_module(distinct[key], tuple(mapping[n] for n in inputs))
        for i, node in enumerate(given):
            mapping[node] = graph.call_function(GETITEM, (call, i))
            mapping[node].meta["val"] = node.meta["val"]
    graph.output(tuple(mapping[n] for n in output_node(gm.graph).args[0]))
    root: dict[str, Any] = {name: block.graph for name, block in named.items()}
    return make_module(root, graph), Blocks(named)


def verify_blocks(gm: GraphModule, blocks: Blocks) -> None:
    """Checks that the graph only calls blocks and takes their results."""
    for node in gm.graph.nodes:
        is_item = node.target is GETITEM and node.args[0].op == "call_module"
        is_call = node.op == "call_module" and node.target in blocks.by_name
        assert node.op in ("placeholder", "output") or is_item or is_call, node.name


def _ordinals(graph: Graph, apart: Callable[[Node], bool], whole: bool) -> dict[Node, int]:
    """Returns the ordinal of the block that each op is in.

    Blocks follow the order of the graph, except that the ops of a branch before its first product
    belong to the previous block.
    """
    ordinals: dict[Node, int] = {}
    block, current = 0, None
    begun: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        source = node.args[0] if node.target is GETITEM else None
        if isinstance(source, Node) and source in ordinals:
            ordinals[node] = ordinals[source]
            if source in begun:
                begun.add(node)
            continue
        if apart(node):
            ordinals[node] = block + 1 + bool(begun)
            block, begun = ordinals[node] + 1, set()
            continue
        slot = None if whole else node.meta.get("slot")
        if slot != current:
            block += bool(begun)
            begun, current = set(), slot
        if slot is not None and (
            is_contraction(node) or not begun.isdisjoint(node.all_input_nodes)
        ):
            begun.add(node)
        ordinals[node] = block + (node in begun)
    return ordinals


def _crossing(graph: Graph, ordinals: dict[Node, int]) -> set[Node]:
    """Returns the ops whose results other blocks, or the output, read."""
    crossing = {n for n in output_node(graph).all_input_nodes if n in ordinals}
    for node, ordinal in ordinals.items():
        for source in node.all_input_nodes:
            if ordinals.get(source, ordinal) != ordinal:
                crossing.add(_base(source))
    return {n for n in crossing if n in ordinals}


def _build(
    gm: GraphModule, nodes: Iterable[Node], results: Sequence[Node]
) -> tuple[GraphModule, list[Node]]:
    """Builds the graph of a block; returns it with the values that are its inputs."""
    members = set(nodes)
    body = Graph()
    inner: dict[Node, Node] = {}
    inputs: list[Node] = []
    root: dict[str, Any] = {}

    def take(node: Node) -> Node:
        """Adds to the body an input for `node`, or the view that it is of an input."""
        if node in inner:
            return inner[node]
        base = _base(node)
        if node is base or base in members:
            if node.op == "get_attr":  # a graph that an op takes as its argument
                root[str(node.target)] = attribute(gm, str(node.target))
                inner[node] = body.node_copy(node)
            else:
                inputs.append(node)
                inner[node] = body.placeholder(f"arg_{len(inputs)}")
                inner[node].meta["val"] = node.meta["val"]
        else:
            inner[node] = body.node_copy(node, take)
        return inner[node]

    for node in nodes:
        for source in node.all_input_nodes:
            if source not in members:
                take(source)
        inner[node] = body.node_copy(node, lambda n: inner[n])
    body.output(tuple(inner[n] for n in results))
    return make_module(root, body), inputs


def _base(node: Node) -> Node:
    """Returns the node that `node` is a view of; `node` itself if it is no view."""
    while _is_view(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _is_view(node: Node) -> bool:
    """Returns True if a node shares the memory of its operand.

    An op that may copy is tried on a meta tensor with the strides of the operand.
    """
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is GETITEM:
        return _is_view(node.args[0])
    if not isinstance(node.target, OpOverload):
        return False
    aliases = [r.alias_info for r in schema_of(node.target).returns]
    if len(aliases) != 1 or aliases[0] is None or aliases[0].is_write:
        return False
    operand = value(node.args[0])
    given = torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device="meta")
    viewed = node.target(given, *node.args[1:], **node.kwargs)
    first = viewed[0] if isinstance(viewed, (tuple, list)) else viewed
    return storage_address(first) == storage_address(given)


def block_key(gm: GraphModule) -> Hashable:
    """Returns a key of a flat graph, independent of the names of its nodes and inputs."""
    index: dict[Node, int] = {}
    entries: list[Hashable] = []
    for node in gm.graph.nodes:
        index[node] = len(index)
        if node.op == "placeholder":
            entries.append(layout_key(node.meta.get("val")))
        elif node.op == "get_attr":
            entries.append(_attribute_key(attribute(gm, str(node.target))))
        else:
            entries.append((node.target, arguments_key((node.args, node.kwargs), index)))
    return tuple(entries)


def _attribute_key(value: Any) -> Hashable:
    return block_key(value) if isinstance(value, GraphModule) else id(value)
