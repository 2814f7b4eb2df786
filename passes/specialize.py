"""specialize: the guarded graph for one phase, its guards decided and its dead code gone."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .attention_ops import is_attention_op
from .cache import cache_read, cache_write, compute_unless
from .ir import (
    GETITEM,
    Region,
    copy_into,
    derived,
    output_node,
    remove_dead_code,
)


def specialize_phase_pass(
    gm: GraphModule, *, reused: Collection[int], stored: Collection[int]
) -> GraphModule:
    """Decides every guard: slots in `reused` become inputs, cuts of slots in `stored` outputs.

    Requires: a guarded graph (:func:`insert_cache_pass`); no slot both reused and stored.
    Ensures: inputs are the model's, then the cuts of each reused slot in slot order; the output is
    (the model's outputs, the cuts of each stored slot in slot order); nothing that only a reused
    region needed is left; equal, bit for bit, to the guarded graph at a step of this phase.

        # before                                # after (slot 0 reused)
        %c = cache_read(%trajectory, 0)         %spatial_0_cut0 = placeholder
        %u = compute_unless(%c, spatial_0, %x)
        %r = cache_write(%trajectory, 0, %c, %u)
        %v = getitem(%r, 0)
    """
    both = sorted(set(reused) & set(stored))
    if both:
        raise ValueError(f"specialize: slots {both} are both reused and stored")
    regions: tuple[Region, ...] = gm.meta["regions"]
    graph = Graph()
    mapping: dict[Node, Node] = {}
    calls: dict[int, Node] = {}
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"][1:]
    copy_into(graph, inputs, mapping)
    cuts = {
        slot: [graph.placeholder(f"{regions[slot].name}_cut{i}") for i in _cuts(regions[slot])]
        for slot in sorted(reused)
    }
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or node.target in (cache_read, compute_unless):
            continue
        if node.target is cache_write:
            slot = int(node.args[1])
            if slot not in cuts:
                region, *operands = node.args[3].args[1:]
                calls[slot] = mapping[node] = graph.call_module(
                    str(region.target), tuple(mapping[n] for n in operands)
                )
        elif node.target is GETITEM and getattr(node.args[0], "target", None) is cache_write:
            slot = int(node.args[0].args[1])
            if slot in cuts:
                mapping[node] = cuts[slot][node.args[1]]
                mapping[node].meta.update(node.meta)
            else:
                copy_into(graph, [node], mapping)
        elif not _is_region(node, regions):
            copy_into(graph, [node], mapping)
    kept = [
        graph.call_function(GETITEM, (calls[slot], i))
        for slot in sorted(stored)
        for i in _cuts(regions[slot])
    ]
    outputs = map_arg(output_node(gm.graph).args[0], lambda n: mapping[n])
    graph.output((outputs, tuple(kept)))
    remove_dead_code(graph)
    return derived(gm, graph)


def verify_phase(gm: GraphModule, *, reused: Collection[int]) -> None:
    """No attention of a reused region is called, here or in a called region."""
    regions: tuple[Region, ...] = gm.meta["regions"]
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for slot in reused:
        assert regions[slot].name not in called, f"{regions[slot].name} is reused and still called"
    gone = {name for slot in reused for name in regions[slot].attentions}
    for node in gm.graph.nodes:
        attention = node.meta.get("attention") if is_attention_op(node) else None
        assert attention is None or attention.name not in gone, attention


def _cuts(region: Region) -> range:
    return range(len(region.cuts))


def _is_region(node: Node, regions: tuple[Region, ...]) -> bool:
    return node.op == "get_attr" and node.target in {region.name for region in regions}
