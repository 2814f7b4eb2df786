"""emit: a phase as a flat function of weights, inputs and cuts, compiled for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from .ir import attribute, copy_into, output_node

Flat = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a flat graph's results one of the model's outputs is."""

    index: int


def inline_regions_pass(gm: GraphModule) -> GraphModule:
    """Copies every called region into the graph that calls it.

    Requires: a phase (:func:`specialize_phase_pass`).
    Ensures: no `call_module` node; outputs bitwise as before, so that fusion may cross regions.

        # before                                # after
        %r = call_module[cross_0](%x)           %q = aten.linear(%x, %w)
        %c = getitem(%r, 0)                     %o = aten.scaled_dot_product_attention(%q, ...)
    """
    graph = Graph()
    mapping: dict[Node, Any] = {}
    root: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            assert isinstance(body, GraphModule)
            mapping[node] = _inline(graph, body, [mapping[n] for n in node.args], root)
        elif node.op == "call_function" and isinstance(mapping.get(node.args[0]), tuple):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        else:
            copy_into(graph, [node], mapping)
            if node.op == "get_attr":
                root[str(node.target)] = attribute(gm, str(node.target))
    result = GraphModule(root, graph)
    result.meta.update(gm.meta)
    return result


def _inline(graph: Graph, body: GraphModule, inputs: list[Node], root: dict[str, Any]) -> Any:
    nodes = list(body.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    inner: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    copy_into(graph, [n for n in nodes if n.op not in ("placeholder", "output")], inner)
    root.update(
        {str(n.target): attribute(body, str(n.target)) for n in nodes if n.op == "get_attr"}
    )
    return tuple(inner[n] for n in output_node(body.graph).args[0])


def lift_weights_pass(gm: GraphModule) -> GraphModule:
    """Turns attribute reads into leading inputs and packs the results into one flat tuple.

    Requires: a flat graph (:func:`inline_regions_pass`) that returns (outputs, stored cuts).
    Ensures: no tensor is read by `get_attr`; `gm.meta["weights"]` names the leading inputs in
    order; every result is a tensor, the model's outputs first, and `gm.meta["outputs"]` says how to
    put them back: per output its place among the results, or the constant it is.

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
    result = GraphModule(graphs, graph)
    result.meta.update(gm.meta)
    result.meta["weights"] = tuple(reads)
    result.meta["outputs"] = tuple(
        Place(next(places)) if isinstance(n, Node) else n for n in outputs
    )
    return result


def compile_flat(gm: GraphModule, example_inputs: Sequence[Any]) -> Flat:
    """Compiles a lifted graph with Inductor for the shapes of `example_inputs`.

    There is no Dynamo in between, hence no guard per call and no recompile: weights are inputs, and
    the caller checks shapes once a call.
    """
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad():
        return cast(Flat, compile_fx(gm, list(example_inputs)))
