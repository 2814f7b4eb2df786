"""cache: guards every region with a cache read and a cache write, driven by the step index.

The graph that comes out runs as it is. It takes the trajectory as its first input, asks it at every
region, and is the oracle that each specialized module is compared with.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .ir import GETITEM, Region, aten, copy_into, derived, output_node, user_inputs, value
from .transfers import fetch, stash

Cuts = tuple[torch.Tensor, ...]


class Slots(Protocol):
    """What a guarded graph asks of the state of one generation; slots are region ordinals."""

    def read(self, slot: int) -> Cuts | None:
        """The cuts to reuse at the current step, or None if the region must be computed."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Offers freshly computed cuts; the trajectory keeps them if a later step reads them."""


def cache_read(trajectory: Slots, slot: int) -> Cuts | None:
    """The guard and the read: cuts where the plan reuses the slot at this step, else None."""
    return trajectory.read(slot)


def compute_unless(cached: Cuts | None, region: GraphModule, *inputs: torch.Tensor) -> Cuts:
    """Runs the region only where there is nothing to reuse."""
    return region(*inputs) if cached is None else cached


def cache_write(trajectory: Slots, slot: int, cached: Cuts | None, cuts: Cuts) -> Cuts:
    """Stores freshly computed cuts where the plan says so; passes the cuts on."""
    if cached is None:
        trajectory.write(slot, cuts)
    return cuts


def fetch_cached(cached: Cuts | None, devices: tuple[torch.device | None, ...]) -> Cuts | None:
    """What a slot holds, each tensor on its device; None: it was never moved."""
    if cached is None:
        return None
    pairs = zip(cached, devices, strict=True)
    return tuple(fetch(kept, device) if device is not None else kept for kept, device in pairs)


def decode_cached(cached: Cuts | None, decoder: GraphModule) -> Cuts | None:
    """The cuts whose encoded form a slot holds; None where there is nothing to reuse."""
    return None if cached is None else decoder(*cached)


def encode_unless(cached: Cuts | None, encoder: GraphModule, cuts: Cuts) -> Cuts:
    """The encoded form of freshly computed cuts; where there is one to reuse, that."""
    return encoder(*cuts) if cached is None else cached


def stash_unless(cached: Cuts | None, devices: tuple[torch.device | None, ...], cuts: Cuts) -> Cuts:
    """What a slot is to hold, moved to host memory if it has a device; else what it holds."""
    if cached is not None:
        return cached
    pairs = zip(cuts, devices, strict=True)
    return tuple(stash(cut) if device is not None else cut for cut, device in pairs)


_GUARDS = (fetch_cached, decode_cached, compute_unless, encode_unless, stash_unless)


def slot_of(node: Node) -> int | None:
    """The slot of a guard in a guarded graph; None of any other node."""
    if node.target in (cache_read, cache_write):
        return int(node.args[1])
    if node.target in _GUARDS:
        return slot_of(node.args[0])
    return None


def insert_cache_pass(gm: GraphModule) -> GraphModule:
    """Puts a read, a guarded call and a write in place of every region's call.

    Requires: regions (:func:`outline_regions_pass`).
    Ensures: the first input is the trajectory; with one that never reuses, outputs bitwise as
    before; region i is touched only through slot i; no output shares memory with a cut or with a
    hoisted value, since users may write to what a model returns.

        # before                                # after
        %r = call_module[spatial_0](%x)         %c = cache_read(%trajectory, 0)
                                                %u = compute_unless(%c, spatial_0, %x)
                                                %r = cache_write(%trajectory, 0, %c, %u)
    """
    slots = {region.name: slot for slot, region in enumerate(gm.meta["regions"])}
    graph = Graph()
    trajectory = graph.placeholder("trajectory")
    mapping: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            copy_into(graph, [node], mapping)
            continue
        slot = slots[str(node.target)]
        cached = graph.call_function(cache_read, (trajectory, slot))
        cached.meta["val"] = tuple(map(value, _cuts(gm, node)))
        region = graph.get_attr(str(node.target))
        inputs = tuple(mapping[n] for n in node.args)
        computed = graph.call_function(compute_unless, (cached, region, *inputs))
        mapping[node] = graph.call_function(cache_write, (trajectory, slot, cached, computed))
        mapping[node].meta.update(node.meta)
    hoisted = user_inputs(gm.graph)[len(gm.meta["signature"].inputs) :]
    _copy_kept_outputs(graph, {mapping[node] for node in hoisted})
    return derived(gm, graph)


def _cuts(gm: GraphModule, call: Node) -> tuple[Node, ...]:
    region = gm.get_submodule(str(call.target))
    assert isinstance(region, GraphModule)
    return output_node(region.graph).args[0]


def _copy_kept_outputs(graph: Graph, hoisted: Collection[Node]) -> None:
    """Returns copies of what later steps read again: cuts, hoisted values, and views of these."""
    output = output_node(graph)

    def copy(node: Node) -> Node:
        root = _viewed(node)
        if root.target is not cache_write and root not in hoisted:
            return node
        with graph.inserting_before(output):
            result = graph.call_function(aten.clone.default, (node,))
        result.meta.update({name: node.meta[name] for name in ("val", "axes") if name in node.meta})
        return result

    output.args = map_arg(output.args, copy)


def _viewed(node: Node) -> Node:
    """The value that `node` is, or may be, a view of."""
    while node.target is GETITEM or _may_be_view(node):
        node = node.args[0]
    return node


def _may_be_view(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is not None for r in returns) and isinstance(node.args[0], Node)


def verify_cache(gm: GraphModule) -> None:
    """Every region has exactly one read and one write."""
    regions: tuple[Region, ...] = gm.meta["regions"]
    for target in (cache_read, cache_write):
        slots = [n.args[1] for n in gm.graph.nodes if n.target is target]
        assert sorted(slots) == list(range(len(regions))), (target.__name__, slots)
