"""offload: keeps the slots of regions on an accelerator in host memory, by copies in the graph.

Each cut is copied to the host right after its region is computed, and back right before it is used.
Copies between steps would free no device memory: a phase takes all cuts that it reuses at its
start, returns all that it stores at its end, and a cut may be reused from the next step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.fx import Graph, GraphModule, Node

from .guard_ops import (
    Devices,
    cache_read,
    cache_write,
    decode_cached,
    fetch_cached,
    forecast_cached,
    slot_of,
    stash_unless,
)
from .ir import copy_into, make_module
from .transfers import fetch, stash


def offload_cuts_pass(gm: GraphModule, *, accelerators: Sequence[str] = ("cuda",)) -> GraphModule:
    """Copies operands of cache writes to host memory, and results of cache reads to the device.

    Requires: a guarded graph (:func:`insert_cache_pass`), encoded or not.
    Ensures: slots hold no tensor on a device whose type is among `accelerators`; if none would, the
    graph is returned unchanged; outputs bitwise as before.

        # before                                # after
        %h = cache_read(%trajectory, 0)         %h = cache_read(%trajectory, 0)
        %c = forecast_cached(%h)                %f = fetch_cached(%h, (cuda:0,))
        %u = compute_unless(%c, spatial_0, %x)  %c = forecast_cached(%f)
        %r = cache_write(%trajectory, 0,        %u = compute_unless(%c, spatial_0, %x)
                         %c, %u)                %s = stash_unless(%c, (cuda:0,), %u)
        %v = getitem(%r, 0)                     %w = cache_write(%trajectory, 0, %c, %s)
                                                %v = getitem(%u, 0)
    """
    moved = {
        slot_of(node): _devices(node.meta["val"], accelerators)
        for node in gm.graph.nodes
        if node.target is cache_read
    }
    moved = {slot: devices for slot, devices in moved.items() if any(devices)}
    if not moved:
        return gm
    readers = (decode_cached, forecast_cached)
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        devices = moved.get(slot_of(node))
        if devices is not None and node.target is cache_write:
            trajectory, slot, cached, cuts = (mapping.get(n, n) for n in node.args)
            stashed = graph.call_function(stash_unless, (cached, devices, cuts))
            graph.call_function(cache_write, (trajectory, slot, cached, stashed))
            mapping[node] = cuts
            continue
        copy_into(graph, [node], mapping)
        if devices is not None and node.target is cache_read:
            pairs = zip(node.meta["val"], devices, strict=True)
            mapping[node].meta["val"] = tuple(v if d is None else stash(v) for v, d in pairs)
        elif devices is not None and node.target in readers and node.args[0].target is cache_read:
            with graph.inserting_before(mapping[node]):
                fetched = graph.call_function(fetch_cached, (mapping[node.args[0]], devices))
            mapping[node].update_arg(0, fetched)
    return make_module(gm, graph)


def _devices(vals: Sequence[torch.Tensor], accelerators: Sequence[str]) -> Devices:
    return tuple(val.device if val.device.type in accelerators else None for val in vals)


def link_fetches(graph: Graph) -> None:
    """Passes to each fetch the tensor to fetch next, so that the copies overlap with compute."""
    fetches = [node for node in graph.nodes if node.target is fetch]
    for node, following in pairwise(fetches):
        if node.args[1] == following.args[1]:
            node.args = (*node.args, following.args[0])
