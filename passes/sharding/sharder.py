"""Rewriting a graph for one rank: each node is computed whole, or as a shard of an axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..ir import Axis, aten, is_tensor, make_module, output_node, user_inputs, value
from ..relations.groups import STRICT_VIEWS
from . import moves
from .heads import mask_of_heads, place_of_heads, split_heads
from .places import AxisPlace, Ranks, find_place, resize
from .rules import MAY_BE_WHOLE, find_rule

Output = Literal["full", "sharded"]


def attentions_by_region(gm: GraphModule) -> dict[int, list[Node]]:
    """Returns the attentions of each region that has any."""
    found: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        if "attention" in node.meta and "region" in node.meta:
            found.setdefault(node.meta["region"], []).append(node)
    return found


def mix(attentions: Iterable[Node], axis: Axis) -> bool:
    """Returns whether queries attend to keys at other positions of the axis."""
    return any(
        axis in factor.axes() for node in attentions for factor in node.meta["attention"].key
    )


class Sharder:
    """Rewrites a graph for one rank.

    Each node is computed once, whole or as a shard of an axis. Other versions of it (gathered, cut,
    a shard of another axis) are made where they are needed.
    """

    def __init__(
        self,
        gm: GraphModule,
        streams: Collection[str],
        ranks: Ranks,
        axes: Sequence[Axis],
        axis: Axis,
        output: Output,
        *,
        early: bool,
    ) -> None:
        """Prepares to rewrite `gm`.

        Args:
            gm: the graph of one process.
            streams: the inputs that are denoised.
            ranks: the processes, and which one the graph is for.
            axes: those that can be sharded, the best first.
            axis: the one that is sharded outside of regions.
            output: whether outputs are gathered.
            early: whether to shard from the inputs on, not only from the first region.
        """
        self.ranks = ranks
        self.gathered: set[int] = set()
        """The regions whose attention every rank computes whole."""
        self._gm = gm
        self._axes = axes
        self._axis = axis
        self._output = output
        self._early = early
        self._graph = Graph()
        self._first: dict[Node, Axis | None] = {}
        """The axis of which a node was computed as a shard; None: whole."""
        self._versions: dict[tuple[Node, Axis | None], Node] = {}
        self._inside: dict[tuple[Node, Any, int], Node] = {}
        """Versions made in a region, which nothing outside of it may read."""
        self._follows = _find_following(gm, streams)
        self._run_axis = {
            region: self._choose_axis(attentions)
            for region, attentions in attentions_by_region(gm).items()
        }
        self._region: int | None = None
        self._current: Axis | None = None

    def run(self) -> GraphModule:
        """Returns the graph for one rank."""
        for node in self._gm.graph.nodes:
            self._region = node.meta.get("region")
            self._current = self._run_axis.get(self._region, self._axis)
            if node.op == "output":
                self._return(node)
            elif not self._compute_shard(node):
                self._copy(node)
            if "cut" in node.meta:
                self._leave(node)
        moves.overlap(self._graph)
        return make_module(self._gm, self._graph)

    def _choose_axis(self, attentions: Sequence[Node]) -> Axis:
        """Returns the axis to shard in a region: as outside, or the best that nothing mixes."""
        if not mix(attentions, self._axis):
            return self._axis
        others = [axis for axis in self._axes if not mix(attentions, axis)]
        return others[0] if others else self._axis

    # Operands, for rules.

    def place(self, node: Node) -> AxisPlace | None:
        """Returns where the current axis lies in an operand; None if it is whole."""
        return self._place(node, self._current) if self._is_sharded(node) else None

    def shard(self, node: Node) -> Node:
        """Returns a node's shard of the current axis."""
        return self._version(node, self._current)

    def whole(self, node: Node) -> Node:
        """Returns a node with all positions."""
        return self._version(node, None)

    def cut(self, node: Node, place: AxisPlace) -> Node:
        """Returns this rank's positions of a node in which the axis, though not named, lies at
        `place`."""
        inside = self._region if node.meta.get("region") == self._region else None
        key = (node, (place, self._current), -1 if inside is None else inside)
        if key not in self._inside:
            self._inside[key] = moves.cut(self._call(inside), self.whole(node), place, self.ranks)
        return self._inside[key]

    # Versions.

    def _is_sharded(self, node: Node) -> bool:
        """Returns whether a node is read as a shard: it was computed as one, or follows from the
        latents and enters a region."""
        if self._first[node] is not None:
            return True
        enters = self._region is not None and node.meta.get("region") != self._region
        if not (enters or self._early) or node not in self._follows:
            return False
        return self._place(node, self._current) is not None

    def _place(self, node: Node, axis: Axis | None) -> AxisPlace | None:
        if axis is None or not is_tensor(node):
            return None
        return find_place(value(node).shape, node.meta.get("axes"), axis)

    def _version(self, node: Node, axis: Axis | None) -> Node:
        """Returns a node as a shard of an axis, or whole."""
        first = self._first[node]
        if axis == first:
            return self._versions[node, first]
        known = self._versions.get((node, axis)) or self._inside.get(
            (node, axis, -1 if self._region is None else self._region)
        )
        if known is not None:
            return known
        sends = first is not None
        region = self._region if sends or node.meta.get("region") == self._region else None
        if axis is None and not is_tensor(node):
            args = map_arg(node.args, self.whole)
            made = self._call(region)(node.target, *args, **node.kwargs)
        else:
            made = self._convert(node, axis, region)
            self._describe(made, node, axis)
        self._inside[node, axis, -1 if region is None else region] = made
        if region is None:
            self._versions[node, axis] = made
        return made

    def _convert(self, node: Node, axis: Axis | None, region: int | None) -> Node:
        first, call = self._first[node], self._call(region)
        source = self._versions[node, first]
        old, new = self._place(node, first), self._place(node, axis)
        if first is None and new is not None:
            return moves.cut(call, source, new, self.ranks)
        assert old is not None, (node, first, axis)
        if axis is None:
            return moves.gather(call, source, old, self.ranks)
        if new is not None:
            return moves.switch(call, source, old, new, self.ranks)
        raise AssertionError(f"{node.name} has no place for {axis}")

    def _describe(self, made: Node, node: Node, axis: Axis | None) -> None:
        """Notes the dimensions of a version of a node that is a shard of an axis."""
        dims = node.meta.get("axes")
        if dims is not None and is_tensor(node):
            made.meta["axes"] = dims if axis is None else resize(dims, axis, self.ranks.share)

    def _call(self, region: int | None) -> moves.EmitCall:
        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            made = self._graph.call_function(target, args, kwargs)
            given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
            made.meta["val"] = target(*given, **named)
            if region is not None:
                made.meta["region"] = region
            return made

        return call

    # Nodes.

    def _compute_shard(self, node: Node) -> bool:
        """Computes an op on shards, if one of its operands is in shards and a rule allows it."""
        if not any(self._is_sharded(n) for n in node.all_input_nodes):
            return False
        rule = find_rule(node)
        if rule is None:
            return False
        place = self._place(node, self._current)
        if place is None and is_tensor(node) and rule not in MAY_BE_WHOLE:
            return False
        arguments = rule(node, place, self)
        if arguments is None:
            return place is not None and self._compute_heads(node, place)
        is_whole = place is None and is_tensor(node)
        self._write(node, arguments[0], dict(arguments[1]), self._current, is_whole=is_whole)
        return True

    def _compute_heads(self, node: Node, place: AxisPlace) -> bool:
        """Computes attention that mixes the axis over all positions, for the rank's heads."""
        if node.target is not aten.scaled_dot_product_attention.default or len(place.sizes) < 3:
            return False
        places = [place, *(self.place(x) for x in node.args[:3])]
        if any(p is not None and p.dim != len(p.sizes) - 2 for p in places):
            return False
        call = self._call(self._region)
        heads = place_of_heads(place.sizes)
        tensors = [split_heads(call, x, heads.size, self) for x in node.args[:3]]
        mask, *rest = node.args[3:] or (node.kwargs.get("attn_mask"),)
        kwargs = {name: by for name, by in node.kwargs.items() if name != "attn_mask"}
        if isinstance(mask, Node):
            mask = mask_of_heads(mask, heads, self)
        self._write(node, (*tensors, mask, *rest), kwargs, self._current)
        inner = self._versions[node, self._current]
        outer = moves.join_heads(call, inner, place, heads, self.ranks)
        self._describe(outer, node, self._current)
        self._versions[node, self._current] = outer
        return True

    def _copy(self, node: Node) -> None:
        """Computes an op on whole operands."""
        if "attention" in node.meta and "region" in node.meta and node in self._follows:
            self.gathered.add(node.meta["region"])
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self.whole)
        self._write(node, args, kwargs, None)

    def _write(
        self, node: Node, args: Any, kwargs: Any, axis: Axis | None, *, is_whole: bool = False
    ) -> None:
        made = self._graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        made.meta.update(node.meta)
        if node.op == "call_function" and node in self._follows:
            made.meta["val"] = self._find_val(made)
        axis = None if is_whole else axis
        self._describe(made, node, axis)
        self._first[node] = axis
        self._versions[node, axis] = made

    def _find_val(self, made: Node) -> Any:
        """Returns the fake tensors that a call yields for its new operands.

        A view that the layout of a shard does not allow becomes a copy.
        """
        given, named = map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
        target: Any = made.target
        try:
            return target(*given, **named)
        except (RuntimeError, ValueError):
            if target not in STRICT_VIEWS:
                raise
            made.target = aten.reshape.default
            return aten.reshape.default(*given, **named)

    def _leave(self, node: Node) -> None:
        """Turns a region's cut into a shard of the axis that is sharded outside."""
        first, region = self._first[node], node.meta["region"]
        inner = self._versions[node, first]
        if first == self._axis or self._place(node, self._axis) is None:
            return
        self._current = self._axis
        outer = self._convert(node, self._axis, region)
        outer.meta["cut"] = inner.meta.pop("cut")
        self._describe(outer, node, self._axis)
        self._inside[node, first, region] = self._versions.pop((node, first))
        self._first[node] = self._axis
        self._versions[node, self._axis] = outer

    def _return(self, node: Node) -> None:
        form = self.whole if self._output == "full" else self._own
        self._graph.output(map_arg(node.args[0], form))
        output_node(self._graph).meta.update(node.meta)

    def _own(self, node: Node) -> Node:
        """Returns a node as a shard if the axis lies in it, else whole."""
        has_some = self._place(node, self._axis) is not None
        return self._version(node, self._axis if has_some else None)


def _find_following(gm: GraphModule, streams: Collection[str]) -> set[Node]:
    """Returns the nodes that follow from what is denoised."""
    found = {node for node in user_inputs(gm.graph) if node.name in streams}
    for node in gm.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
