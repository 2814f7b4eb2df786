"""specialize: decides the guards of a guarded graph for one phase, and removes dead code."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .attention_calls import is_attention_op
from .dead_code import remove_dead_code
from .facts import PhaseSlots, Regions
from .guard_ops import GUARD_OPS, Decisions
from .ir import (
    GETITEM,
    copy_into,
    is_contraction,
    make_module,
    output_node,
)
from .nesting.order import note_position, restore_order
from .offload import link_fetches


def specialize_phase_pass(gm: GraphModule, regions: Regions, slots: PhaseSlots) -> GraphModule:
    """Decides every guard: reused slots become inputs, and the contents of stored slots outputs.

    Requires: a guarded graph (:func:`insert_cache_pass`); no slot both reused and stored.
    Ensures: inputs are the model's, followed by the weights of forecasts if there are any (float32,
    in slot order, that of the newest value first), and by the contents of the reused slots in slot
    order, the newest first; the output is (the model's outputs, the new contents of the stored
    slots in slot order); nothing that only a reused region needed is left; equal, bit for bit, to
    the guarded graph at a step of this phase.

        # before                                # after (slot 0 reused)
        %h = cache_read(%trajectory, 0)         %spatial_0_cut0 = placeholder
        %c = forecast_cached(%h)
        %u = compute_unless(%c, spatial_0, %x)
        %r = cache_write(%trajectory, 0, %c, %u)
        %v = getitem(%r, 0)
    """
    both = sorted(set(slots.reused) & set(slots.stored))
    if both:
        raise ValueError(f"slots: expected none that is both reused and stored, found {both}")
    graph = Graph()
    mapping: dict[Node, Any] = {}
    copy_into(graph, [n for n in gm.graph.nodes if n.op == "placeholder"][1:], mapping)
    decisions = Decisions(graph, regions.all, slots)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target in GUARD_OPS:
            operands = [mapping.get(n) if isinstance(n, Node) else n for n in node.args]
            mapping[node] = GUARD_OPS[node.target](decisions, node, *operands)
        elif node.target is GETITEM and isinstance(mapping[node.args[0]], tuple):
            mapping[node] = mapping[node.args[0]][node.args[1]]
            mapping[node].meta.update(node.meta)
        else:
            copy_into(graph, [node], mapping)
        note_position(graph, node)
    kept = [node for slot in slots.stored for node in decisions.written(slot)]
    outputs = map_arg(output_node(gm.graph).args[0], lambda n: mapping[n])
    graph.output((outputs, tuple(kept)))
    remove_dead_code(graph)
    ordered = restore_order(graph)
    link_fetches(ordered)
    return make_module(gm, ordered)


def runs_nothing(gm: GraphModule) -> bool:
    """Returns True if a phase runs nothing of the model but sums of what is kept."""
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    bodies = [gm, *map(gm.get_submodule, called)]
    nodes = (n for body in bodies if isinstance(body, GraphModule) for n in body.graph.nodes)
    return not any(is_contraction(node) or is_attention_op(node) for node in nodes)


def verify_phase(gm: GraphModule, regions: Regions, slots: PhaseSlots) -> None:
    """Checks that no reused region is called, and that none of its attentions is left."""
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    reused = [regions.all[slot] for slot in slots.reused]
    for region in reused:
        assert region.name not in called, f"{region.name} is reused and still called"
    gone = {name for region in reused for name in region.attentions}
    for node in gm.graph.nodes:
        attention = node.meta.get("attention") if is_attention_op(node) else None
        assert attention is None or attention.name not in gone, attention
