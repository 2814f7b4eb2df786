"""flatten: turns a phase into a flat function of weights, inputs and cuts."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .facts import Lifted, Regions, ResultIndex
from .ir import attribute, copy_into, make_module, output_node


def inline_regions_pass(gm: GraphModule, regions: Regions) -> GraphModule:
    """Copies every called region into the graph that calls it.

    Requires: a phase (:func:`specialize_phase_pass`).
    Ensures: no `call_module` node, so that fusion may cross regions; outputs bitwise as before;
    nodes that come from a region have its slot in `meta["slot"]`; each op has `meta["val"]`.

        # before                                # after
        %r = call_module[cross_0](%x)           %q = aten.linear(%x, %w)
        %c = getitem(%r, 0)                     %o = aten.scaled_dot_product_attention(%q, ...)
    """
    slots = {region.name: slot for slot, region in enumerate(regions.all)}
    graph = Graph()
    mapping: dict[Node, Any] = {}
    root: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            assert isinstance(body, GraphModule)
            inputs = [mapping[n] for n in node.args]
            mapping[node] = _inline(graph, body, inputs, root, slots.get(str(node.target)))
        elif node.op == "call_function" and isinstance(mapping.get(node.args[0]), tuple):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        else:
            copy_into(graph, [node], mapping)
            if node.op == "get_attr":
                root[str(node.target)] = attribute(gm, str(node.target))
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)
    return make_module(root, graph)


def verify_inline(gm: GraphModule) -> None:
    """Checks that no module is called, and that every op has its fake result."""
    for node in gm.graph.nodes:
        assert node.op != "call_module", f"{node.name} calls a module"
        assert node.op != "call_function" or "val" in node.meta, f"{node.name} has no fake result"


def _inline(
    graph: Graph, body: GraphModule, inputs: list[Node], root: dict[str, Any], slot: int | None
) -> Any:
    nodes = list(body.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    inner: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    ops = [n for n in nodes if n.op not in ("placeholder", "output")]
    copy_into(graph, ops, inner)
    if slot is not None:
        for node in ops:
            inner[node].meta["slot"] = slot
    root.update(
        {str(n.target): attribute(body, str(n.target)) for n in nodes if n.op == "get_attr"}
    )
    return tuple(inner[n] for n in output_node(body.graph).args[0])


def lift_weights_pass(gm: GraphModule) -> tuple[GraphModule, Lifted]:
    """Turns attribute reads into leading inputs and packs the results into one flat tuple.

    Requires: a flat graph (:func:`inline_regions_pass`) that returns (outputs, stored cuts).
    Ensures: no `get_attr` node reads a tensor: weights are the first inputs; every result is a
    tensor, the model's outputs first.

        # before                                # after
        %w = get_attr[blocks.0.ff.weight]       %blocks_0_ff_weight = placeholder
        return ((%y, None), (%c,))              return (%y, %c)
    """
    reads: dict[str, list[Node]] = {}
    graphs: dict[str, nn.Module] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            read = attribute(gm, str(node.target))
            if isinstance(read, nn.Module):  # a graph that an op takes as its argument
                graphs[str(node.target)] = read
            else:
                reads.setdefault(str(node.target), []).append(node)
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for name, nodes in reads.items():
        weight = graph.placeholder(name.replace(".", "_"))
        weight.meta.update(nodes[0].meta)
        mapping.update(dict.fromkeys(nodes, weight))
    rest = [n for n in gm.graph.nodes if n.op != "output" and n not in mapping]
    copy_into(graph, rest, mapping)
    outputs, stored = output_node(gm.graph).args[0]
    tensors = [n for n in outputs if isinstance(n, Node)]
    graph.output(tuple(mapping[n] for n in (*tensors, *stored)))
    places = iter(range(len(tensors)))
    packed = tuple(ResultIndex(next(places)) if isinstance(n, Node) else n for n in outputs)
    return make_module(graphs, graph), Lifted(tuple(reads), packed)


def verify_lift(gm: GraphModule, lifted: Lifted) -> None:
    """Checks that weights are the first inputs, and that all results are tensors."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    assert len(inputs) >= len(lifted.weights), (len(inputs), lifted.weights)
    for node in gm.graph.nodes:
        is_read = node.op == "get_attr"
        assert not is_read or isinstance(attribute(gm, str(node.target)), nn.Module), node.name
    assert all(isinstance(result, Node) for result in output_node(gm.graph).args[0])
