"""cache: guards every region with a cache read and a cache write, driven by the step index.

The guarded graph can run as it is. It takes the trajectory as its first input and queries it at
every region. It is the oracle that each specialized module is compared with.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .capture import CONSTANTS
from .facts import Captured, Regions
from .guard_ops import (
    cache_read,
    cache_write,
    compute_unless,
    forecast_cached,
    rejoin,
    resume,
)
from .ir import aten, copy_into, make_module, output_node, user_inputs, value, viewed


def insert_cache_pass(gm: GraphModule, captured: Captured, regions: Regions) -> GraphModule:
    """Replaces the call of every region by a cache read, a guarded call and a cache write.

    Requires: regions (:func:`outline_regions_pass`).
    Ensures: the first input is the trajectory; with one that never reuses, outputs bitwise as
    before; region i is touched only through slot i; no output shares memory with a cut or with a
    hoisted value, since users may write to what a model returns (:func:`resume` sees to the
    outputs that are cuts of the whole model).

        # before                                # after
        %r = call_module[spatial_0](%x)         %h = cache_read(%trajectory, 0)
                                                %c = forecast_cached(%h)
                                                %u = compute_unless(%c, spatial_0, %x)
                                                %r = cache_write(%trajectory, 0, %c, %u)
        %j = rejoin(%z, %x, %d)                 %j = resume(%c, %z, %x, %d)
    """
    slots = {region.name: slot for slot, region in enumerate(regions.all)}
    graph = Graph()
    trajectory = graph.placeholder("trajectory")
    mapping: dict[Node, Node] = {}
    reads: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.target is rejoin:
            call = node.args[2].args[0]
            operands = map_arg(node.args, lambda n: mapping[n])
            mapping[node] = graph.call_function(resume, (reads[call], *operands))
            mapping[node].meta.update(node.meta)
            continue
        if node.op != "call_module":
            copy_into(graph, [node], mapping)
            continue
        slot = slots[str(node.target)]
        held = graph.call_function(cache_read, (trajectory, slot))
        reads[node] = cached = graph.call_function(forecast_cached, (held,))
        for each in (held, cached):
            each.meta["val"] = tuple(map(value, _cuts(gm, node)))
        region = graph.get_attr(str(node.target))
        inputs = tuple(mapping[n] for n in node.args)
        computed = graph.call_function(compute_unless, (cached, region, *inputs))
        mapping[node] = graph.call_function(cache_write, (trajectory, slot, cached, computed))
        mapping[node].meta.update(node.meta)
    hoisted = user_inputs(gm.graph)[len(captured.signature.inputs) :]
    _copy_kept_outputs(graph, {mapping[node] for node in hoisted})
    return make_module(gm, graph)


def _cuts(gm: GraphModule, call: Node) -> tuple[Node, ...]:
    region = gm.get_submodule(str(call.target))
    assert isinstance(region, GraphModule)
    return output_node(region.graph).args[0]


def _copy_kept_outputs(graph: Graph, hoisted: Collection[Node]) -> None:
    """Makes the graph return copies of cuts, hoisted values, constants and their views.

    Later steps read these again, and a caller may write to what it gets.
    """
    output = output_node(graph)

    def copy(node: Node) -> Node:
        if node.target is resume and node.args[2] is None:  # an output of the whole model
            node.update_arg(1, copy_before(node, node.args[1]))
            return node
        return copy_before(output, node)

    def copy_before(place: Node, node: Node) -> Node:
        root = viewed(node)
        is_constant = root.op == "get_attr" and str(root.target).startswith(CONSTANTS)
        if root.target is not cache_write and root not in hoisted and not is_constant:
            return node
        with graph.inserting_before(place):
            result = graph.call_function(aten.clone.default, (node,))
        result.meta.update({name: node.meta[name] for name in ("val", "axes") if name in node.meta})
        return result

    output.args = map_arg(output.args, copy)


def verify_cache(gm: GraphModule, regions: Regions) -> None:
    """Checks that every region has exactly one read and one write."""
    for target in (cache_read, cache_write):
        slots = [n.args[1] for n in gm.graph.nodes if n.target is target]
        assert sorted(slots) == list(range(len(regions.all))), (target.__name__, slots)
