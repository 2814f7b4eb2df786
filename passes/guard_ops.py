"""guard_ops: the ops by which a guarded graph reads, computes and stores the cuts of a region.

A guarded graph takes the state of a step as its first input, and queries it at every region. Each
op has one entry in :data:`GUARD_OPS`: the function that runs it in a guarded graph, and the method
that decides it for a phase, in which the reused slots are known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node

from .ir import GETITEM, Region
from .transfers import fetch, stash

Devices = tuple[torch.device | None, ...]
"""The device of each tensor that a slot keeps in host memory; None: the tensor is not moved."""


Cuts = tuple[torch.Tensor, ...]


class StepState(Protocol):
    """The state of a step, which a guarded graph queries; slots are region ordinals."""

    def read(self, slot: int) -> Cuts | None:
        """Returns what the slot holds if this step reuses it; None if it computes the region."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Stores freshly computed cuts if a later step reads them."""


def cache_read(state: StepState, slot: int) -> Cuts | None:
    """Returns what the slot holds if the plan reuses it at this step, else None."""
    return state.read(slot)


def compute_unless(cached: Cuts | None, region: GraphModule, *inputs: torch.Tensor) -> Cuts:
    """Returns the cuts to reuse, or runs the region if there are none."""
    return region(*inputs) if cached is None else cached


def cache_write(state: StepState, slot: int, cached: Cuts | None, cuts: Cuts) -> Cuts:
    """Stores freshly computed cuts if the plan says so; returns `cuts`."""
    if cached is None:
        state.write(slot, cuts)
    return cuts


def fetch_cached(cached: Cuts | None, devices: tuple[torch.device | None, ...]) -> Cuts | None:
    """Copies what a slot holds back to the devices; a tensor with device None was not moved."""
    if cached is None:
        return None
    pairs = zip(cached, devices, strict=True)
    return tuple(fetch(kept, device) if device is not None else kept for kept, device in pairs)


def decode_cached(cached: Cuts | None, decoder: GraphModule) -> Cuts | None:
    """Decodes the cuts that a slot holds; returns None if there is nothing to reuse."""
    return None if cached is None else decoder(*cached)


def encode_unless(cached: Cuts | None, encoder: GraphModule, cuts: Cuts) -> Cuts:
    """Returns freshly computed cuts in encoded form, or what is reused."""
    return encoder(*cuts) if cached is None else cached


def stash_unless(cached: Cuts | None, devices: tuple[torch.device | None, ...], cuts: Cuts) -> Cuts:
    """Copies what a slot is to hold to host memory, except tensors with device None."""
    if cached is not None:
        return cached
    pairs = zip(cuts, devices, strict=True)
    return tuple(stash(cut) if device is not None else cut for cut, device in pairs)


GuardResult: TypeAlias = "tuple[Node, ...] | Node"
"""The result of a guard op in a phase: nodes, or a call that returns them as a tuple."""


class Decisions:
    """Decides the guard ops of a guarded graph for one phase, writing to the phase's graph.

    Each method takes the node of a guard op and the results of its operands in the phase (None:
    nothing is reused), and returns the result of the op.
    """

    def __init__(self, graph: Graph, regions: Sequence[Region], reused: Collection[int]) -> None:
        self._graph = graph
        self._regions = regions
        self._held = {
            slot: tuple(
                graph.placeholder(f"{regions[slot].name}_cut{i}")
                for i in range(len(regions[slot].kept))
            )
            for slot in sorted(reused)
        }
        self._written: dict[int, GuardResult] = {}

    def written(self, slot: int) -> tuple[Node, ...]:
        """Returns the nodes that a slot is to hold."""
        return self._items(self._written[slot], len(self._regions[slot].kept))

    def read(self, node: Node, state: None, slot: int) -> GuardResult | None:
        """Returns the inputs that hold the slot's cuts if it is reused, else None."""
        held = self._held.get(slot, ())
        for tensor, val in zip(held, node.meta.get("val", ()), strict=False):
            tensor.meta["val"] = val
        return held or None

    def fetch(self, node: Node, held: GuardResult | None, devices: Devices) -> GuardResult | None:
        """Appends fetches of what is reused."""
        return None if held is None else insert_fetches(self._graph, held, devices)

    def decode(self, node: Node, held: GuardResult | None, decoder: None) -> GuardResult | None:
        """Appends a call of the decoder on what is reused."""
        return None if held is None else self._call(node, held)

    def compute(
        self, node: Node, held: GuardResult | None, region: None, *inputs: Node
    ) -> GuardResult:
        """Appends a call of the region, unless it is reused."""
        return self._call(node, inputs) if held is None else held

    def encode(
        self, node: Node, held: GuardResult | None, encoder: None, cuts: GuardResult
    ) -> GuardResult:
        """Appends a call of the encoder on freshly computed cuts."""
        if held is not None:
            return held
        return self._call(node, self._items(cuts, len(self._region(node).cuts)))

    def stash(
        self, node: Node, held: GuardResult | None, devices: Devices, cuts: GuardResult
    ) -> GuardResult:
        """Appends copies to host memory of what a slot is to hold."""
        if held is not None:
            return held
        kept = self._items(cuts, len(self._region(node).kept))
        return insert_stashes(self._graph, kept, devices)

    def write(
        self, node: Node, state: None, slot: int, held: GuardResult | None, cuts: GuardResult
    ) -> GuardResult:
        """Records what the slot is to hold."""
        self._written[slot] = cuts
        return cuts

    def _region(self, node: Node) -> Region:
        slot = slot_of(node)
        assert slot is not None
        return self._regions[slot]

    def _call(self, node: Node, inputs: Sequence[Node]) -> Node:
        """Appends a call of the module that is the guard op's second operand."""
        return self._graph.call_module(str(node.args[1].target), tuple(inputs))

    def _items(self, values: GuardResult, num: int) -> tuple[Node, ...]:
        if isinstance(values, tuple):
            return values
        return tuple(self._graph.call_function(GETITEM, (values, i)) for i in range(num))


def insert_fetches(graph: Graph, held: Sequence[Node], devices: Devices) -> tuple[Node, ...]:
    """Appends fetches of what slots hold, except of tensors with device None."""
    pairs = zip(held, devices, strict=True)
    return tuple(
        node if device is None else graph.call_function(fetch, (node, device))
        for node, device in pairs
    )


def insert_stashes(graph: Graph, cuts: Sequence[Node], devices: Devices) -> tuple[Node, ...]:
    """Appends stashes of cuts, except of tensors with device None."""
    pairs = zip(cuts, devices, strict=True)
    return tuple(
        node if device is None else graph.call_function(stash, (node,)) for node, device in pairs
    )


GUARD_OPS: Mapping[Callable[..., Any], Callable[..., GuardResult | None]] = {
    cache_read: Decisions.read,
    fetch_cached: Decisions.fetch,
    decode_cached: Decisions.decode,
    compute_unless: Decisions.compute,
    encode_unless: Decisions.encode,
    stash_unless: Decisions.stash,
    cache_write: Decisions.write,
}
"""The function that runs a guard op -> the method that decides it for a phase."""


def slot_of(node: Node) -> int | None:
    """Returns the slot of a guard op's node; None for any other node."""
    if node.target in (cache_read, cache_write):
        return int(node.args[1])
    return slot_of(node.args[0]) if node.target in GUARD_OPS else None
