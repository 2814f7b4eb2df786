"""held: gives the inputs of a phase that take cuts the layouts in which slots hold them."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule

from pabc.base.memory import without_spare_memory

from .facts import PhaseSlots, Regions
from .ir import copy_into, make_module, user_inputs, value


def lay_out_held_pass(gm: GraphModule, regions: Regions, slots: PhaseSlots) -> GraphModule:
    """Gives each input that takes a cut the strides with which a slot holds it.

    If a cut is a view of a larger buffer, its slot holds a copy, and code is compiled for the
    strides of that copy.

    Requires: a flat graph with fixed shapes whose last inputs are the reused cuts.
    Ensures: the same function; only the fake tensors of these inputs change.

        # before                                        # after
        %cut0: [2, 8, 16], strides (384, 48, 1)         %cut0: [2, 8, 16], strides (128, 16, 1)
    """
    num_cuts = sum(
        len(regions.all[slot].kept) * max(depth, 1)
        for slot, depth in zip(slots.reused, slots.depths, strict=True)
    )
    if not num_cuts:
        return gm
    graph = Graph()
    copy_into(graph, gm.graph.nodes, {})
    for node in user_inputs(graph)[-num_cuts:]:
        node.meta["val"] = _as_held(value(node))
    return make_module(gm, graph)


def _as_held(val: torch.Tensor) -> torch.Tensor:
    """Returns a fake tensor like `val` with the strides that a slot gives it."""
    computed = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return val.new_empty_strided(val.shape, without_spare_memory(computed).stride())
