"""specialize: the guarded graph for one phase, its guards decided and its dead code gone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .attention_ops import is_attention_op
from .cache import (
    cache_read,
    cache_write,
    compute_unless,
    decode_cached,
    encode_unless,
    fetch_cached,
    slot_of,
    stash_unless,
)
from .ir import (
    GETITEM,
    Region,
    copy_into,
    derived,
    output_node,
    remove_dead_code,
)
from .offload import Devices, insert_fetches, insert_stashes, link_fetches


def specialize_phase_pass(
    gm: GraphModule, *, reused: Collection[int], stored: Collection[int]
) -> GraphModule:
    """Decides every guard: slots in `reused` become inputs, cuts of slots in `stored` outputs.

    Requires: a guarded graph (:func:`insert_cache_pass`); no slot both reused and stored.
    Ensures: inputs are the model's, then what each reused slot holds in slot order; the output is
    (the model's outputs, what each stored slot is to hold in slot order); nothing that only a
    reused region needed is left; equal, bit for bit, to the guarded graph at a step of this phase.

        # before                                # after (slot 0 reused)
        %c = cache_read(%trajectory, 0)         %spatial_0_cut0 = placeholder
        %u = compute_unless(%c, spatial_0, %x)
        %r = cache_write(%trajectory, 0, %c, %u)
        %v = getitem(%r, 0)
    """
    both = sorted(set(reused) & set(stored))
    if both:
        raise ValueError(f"specialize: slots {both} are both reused and stored")
    graph = Graph()
    mapping: dict[Node, Any] = {}
    copy_into(graph, [n for n in gm.graph.nodes if n.op == "placeholder"][1:], mapping)
    guards = _Guards(graph, gm.meta["regions"], reused)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target in guards.rules:
            operands = [mapping.get(n) if isinstance(n, Node) else n for n in node.args]
            mapping[node] = guards.rules[node.target](node, *operands)
        elif node.target is GETITEM and isinstance(mapping[node.args[0]], tuple):
            mapping[node] = mapping[node.args[0]][node.args[1]]
            mapping[node].meta.update(node.meta)
        else:
            copy_into(graph, [node], mapping)
    kept = [node for slot in sorted(stored) for node in guards.written(slot)]
    outputs = map_arg(output_node(gm.graph).args[0], lambda n: mapping[n])
    graph.output((outputs, tuple(kept)))
    remove_dead_code(graph)
    link_fetches(graph)
    return derived(gm, graph)


Values: TypeAlias = "tuple[Node, ...] | Node"
"""What a guard yields: the nodes themselves, or the call that returns them."""


class _Guards:
    """What each guard of a guarded graph comes to once it is known which slots are reused.

    A rule takes the guard's node and what its operands came to; None: there is nothing to reuse.
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
        self._written: dict[int, Values] = {}
        self.rules: dict[Any, Callable[..., Values | None]] = {
            cache_read: self._read,
            fetch_cached: self._fetch,
            decode_cached: self._decode,
            compute_unless: self._compute,
            encode_unless: self._encode,
            stash_unless: self._stash,
            cache_write: self._write,
        }

    def written(self, slot: int) -> tuple[Node, ...]:
        """What a slot is to hold."""
        return self._items(self._written[slot], len(self._regions[slot].kept))

    def _read(self, node: Node, trajectory: None, slot: int) -> Values | None:
        held = self._held.get(slot, ())
        for tensor, val in zip(held, node.meta.get("val", ()), strict=False):
            tensor.meta["val"] = val
        return held or None

    def _fetch(self, node: Node, held: Values | None, devices: Devices) -> Values | None:
        return None if held is None else insert_fetches(self._graph, held, devices)

    def _decode(self, node: Node, held: Values | None, decoder: None) -> Values | None:
        return None if held is None else self._call(node, held)

    def _compute(self, node: Node, held: Values | None, region: None, *inputs: Node) -> Values:
        return self._call(node, inputs) if held is None else held

    def _encode(self, node: Node, held: Values | None, encoder: None, cuts: Values) -> Values:
        if held is not None:
            return held
        return self._call(node, self._items(cuts, len(self._region(node).cuts)))

    def _stash(self, node: Node, held: Values | None, devices: Devices, cuts: Values) -> Values:
        if held is not None:
            return held
        kept = self._items(cuts, len(self._region(node).kept))
        return insert_stashes(self._graph, kept, devices)

    def _write(
        self, node: Node, trajectory: None, slot: int, held: Values | None, cuts: Values
    ) -> Values:
        self._written[slot] = cuts
        return cuts

    def _region(self, node: Node) -> Region:
        slot = slot_of(node)
        assert slot is not None
        return self._regions[slot]

    def _call(self, node: Node, inputs: Sequence[Node]) -> Node:
        """The call of the module that is a guard's second operand."""
        return self._graph.call_module(str(node.args[1].target), tuple(inputs))

    def _items(self, values: Values, num: int) -> tuple[Node, ...]:
        if isinstance(values, tuple):
            return values
        return tuple(self._graph.call_function(GETITEM, (values, i)) for i in range(num))


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
