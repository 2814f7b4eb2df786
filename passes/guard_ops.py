"""guard_ops: the ops by which a guarded graph reads, computes and stores the cuts of a region.

A guarded graph takes the state of a step as its first input, and queries it at every region. Each
op has one entry in :data:`GUARD_OPS`: the function that runs it in a guarded graph, and the method
that decides it for a phase, in which the reused slots are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node

from .facts import PhaseSlots
from .forecast import Cuts, Reused, forecast, insert_forecast
from .ir import GETITEM, Region, aten
from .transfers import fetch, stash

Devices = tuple[torch.device | None, ...]
"""The device of each tensor that a slot keeps in host memory; None: the tensor is not moved."""


class StepState(Protocol):
    """The state of a step, which a guarded graph queries; slots are region ordinals."""

    def read(self, slot: int) -> Reused | None:
        """Returns what this step reuses of the slot; None if it computes the region."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Stores freshly computed cuts if a later step reads them."""


def cache_read(state: StepState, slot: int) -> Reused | None:
    """Returns what the slot holds if the plan reuses it at this step, else None."""
    return state.read(slot)


def forecast_cached(held: Reused | None) -> Cuts | None:
    """Returns the cuts that follow from what a slot holds; None if there is nothing to reuse."""
    if held is None:
        return None
    return tuple(forecast(values, held.weights) for values in zip(*held.history, strict=True))


def compute_unless(cached: Cuts | None, region: GraphModule, *inputs: torch.Tensor) -> Cuts:
    """Returns the cuts to reuse, or runs the region if there are none."""
    return region(*inputs) if cached is None else cached


def cache_write(state: StepState, slot: int, cached: Cuts | None, cuts: Cuts) -> Cuts:
    """Stores freshly computed cuts if the plan says so; returns `cuts`."""
    if cached is None:
        state.write(slot, cuts)
    return cuts


def fetch_cached(held: Reused | None, devices: Devices) -> Reused | None:
    """Copies what a slot holds back to the devices; a tensor with device None was not moved."""
    if held is None:
        return None

    def fetch_all(kept: Cuts) -> Cuts:
        pairs = zip(kept, devices, strict=True)
        return tuple(each if device is None else fetch(each, device) for each, device in pairs)

    return held._replace(history=tuple(map(fetch_all, held.history)))


def decode_cached(held: Reused | None, decoder: GraphModule) -> Reused | None:
    """Decodes the cuts that a slot holds; returns None if there is nothing to reuse."""
    if held is None:
        return None
    return held._replace(history=tuple(decoder(*kept) for kept in held.history))


def encode_unless(cached: Cuts | None, encoder: GraphModule, cuts: Cuts) -> Cuts:
    """Returns freshly computed cuts in encoded form, or what is reused."""
    return encoder(*cuts) if cached is None else cached


def stash_unless(cached: Cuts | None, devices: Devices, cuts: Cuts) -> Cuts:
    """Copies what a slot is to hold to host memory, except tensors with device None."""
    if cached is not None:
        return cached
    pairs = zip(cuts, devices, strict=True)
    return tuple(stash(cut) if device is not None else cut for cut, device in pairs)


def rejoin(whole: torch.Tensor, base: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    """Returns a stream that leaves a region; where the region is reused, it is base + delta.

    The cache pass makes it a :func:`resume`. `base` is None for an output of the model, which is
    its own cut.
    """
    return whole


def resume(
    cached: Cuts | None, whole: torch.Tensor, base: torch.Tensor | None, delta: torch.Tensor
) -> torch.Tensor:
    """Returns a stream that leaves a region: computed as `whole`, or base + what is reused.

    An output of the model (`base` None) is returned as a copy, since users may write to it.
    """
    if base is None:
        return delta.clone()
    return whole if cached is None else base + delta


GuardResult: TypeAlias = "tuple[Node, ...] | Node"
"""The result of a guard op in a phase: nodes, or a call that returns them as a tuple."""


NodeHistory: TypeAlias = tuple[tuple[Node, ...], ...]
"""The nodes of the tensors that a slot holds of each step, the newest first."""


class Decisions:
    """Decides the guard ops of a guarded graph for one phase, writing to the phase's graph.

    Each method takes the node of a guard op and the results of its operands in the phase (None:
    nothing is reused), and returns the result of the op.
    """

    def __init__(self, graph: Graph, regions: Sequence[Region], slots: PhaseSlots) -> None:
        self._graph = graph
        self._regions = regions
        self._stored = slots.stored
        self._weights = graph.placeholder("forecast_weights") if any(slots.depths) else None
        self._first_weights = slots.first_weights
        self._held: dict[int, NodeHistory] = {
            slot: tuple(self._hold(slot, age) for age in range(max(depth, 1)))
            for slot, depth in zip(slots.reused, slots.depths, strict=True)
        }
        self._written: dict[int, GuardResult] = {}

    def _hold(self, slot: int, age: int) -> tuple[Node, ...]:
        """Appends the inputs that take what a slot holds of one step."""
        region = self._regions[slot]
        suffix = f"_before{age}" if age else ""
        names = (f"{region.name}_cut{i}{suffix}" for i in range(len(region.kept)))
        return tuple(map(self._graph.placeholder, names))

    def written(self, slot: int) -> tuple[Node, ...]:
        """Returns the nodes that a slot is to hold."""
        return self._items(self._written[slot], len(self._regions[slot].kept))

    def read(self, node: Node, state: None, slot: int) -> NodeHistory | None:
        """Returns the inputs that hold the slot's values if it is reused, else None."""
        history = self._held.get(slot)
        for held in history or ():
            for tensor, val in zip(held, node.meta.get("val", ()), strict=False):
                tensor.meta["val"] = val
        return history

    def fetch(self, node: Node, held: NodeHistory | None, devices: Devices) -> NodeHistory | None:
        """Appends fetches of what is reused."""
        if held is None:
            return None
        return tuple(insert_fetches(self._graph, kept, devices) for kept in held)

    def decode(self, node: Node, held: NodeHistory | None, decoder: None) -> NodeHistory | None:
        """Appends calls of the decoder on what is reused."""
        if held is None:
            return None
        num = len(self._region(node).cuts)
        return tuple(self._items(self._call(node, kept), num) for kept in held)

    def forecast(self, node: Node, held: NodeHistory | None) -> GuardResult | None:
        """Appends the weighted sums of what is reused; takes the newest value if it is held."""
        if held is None:
            return None
        slot = slot_of(node)
        if self._weights is None or slot not in self._first_weights:
            return held[0]
        first, cuts = self._first_weights[slot], node.meta["val"]
        if "val" not in self._weights.meta:
            num = sum(len(self._held[s]) for s in self._first_weights)
            self._weights.meta["val"] = cuts[0].new_empty((num,), dtype=torch.float32)
        return tuple(
            insert_forecast(self._graph, values, self._weights, first, cut)
            for *values, cut in zip(*held, cuts, strict=True)
        )

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

    def resume(
        self,
        node: Node,
        held: GuardResult | None,
        whole: Node,
        base: Node | None,
        delta: Node,
    ) -> Node:
        """Appends the sum of the stream and what is reused; copies an output that is kept."""
        if base is None and (held is not None or slot_of(node) in self._stored):
            result = self._graph.call_function(aten.clone.default, (delta,))
        elif held is None:
            return whole
        else:
            result = self._graph.call_function(aten.add.Tensor, (base, delta))
        result.meta.update(node.meta)
        return result

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


GUARD_OPS: Mapping[Callable[..., Any], Callable[..., GuardResult | NodeHistory | None]] = {
    cache_read: Decisions.read,
    fetch_cached: Decisions.fetch,
    decode_cached: Decisions.decode,
    forecast_cached: Decisions.forecast,
    compute_unless: Decisions.compute,
    encode_unless: Decisions.encode,
    stash_unless: Decisions.stash,
    cache_write: Decisions.write,
    resume: Decisions.resume,
}
"""The function that runs a guard op -> the method that decides it for a phase."""


def slot_of(node: Node) -> int | None:
    """Returns the slot of a guard op's node; None for any other node."""
    if node.target in (cache_read, cache_write):
        return int(node.args[1])
    return slot_of(node.args[0]) if node.target in GUARD_OPS else None
