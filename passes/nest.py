"""nest: adds regions that contain others: blocks, the stack of all blocks, the whole model.

What is reused of a block or a stack is what its branches add up to, on each stream. So the stream
that enters it, which is computed at every step, passes through a step that reuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Any

from torch.fx import Graph, GraphModule, Node

from pabc.base.kinds import COARSE

from .facts import Captured, Regions
from .guard_ops import rejoin
from .ir import (
    GETITEM,
    Reach,
    Region,
    aten,
    attribute,
    copy_into,
    is_effect,
    is_tensor,
    make_module,
    output_node,
    value,
    viewed,
)
from .nesting.order import POSITION, CycleError, sort_nodes
from .nesting.parts import CannotPart, Part, find_part
from .nesting.units import Look, find_units
from .tracing.sizes import hint

_DESCRIBES = ("val", "hint", "axes")
_MARKS = ("attention", "region", "cut", "joins")


@dataclass(frozen=True)
class _Found:
    """A part that can be reused as a whole, and the regions that it is made of."""

    kind: str
    regions: tuple[Region, ...]
    part: Part


def nest_regions_pass(
    gm: GraphModule, captured: Captured, regions: Regions
) -> tuple[GraphModule, Regions]:
    """Adds a region for each repeated block, one for the stack of all blocks, one for the model.

    The cuts of a block or stack are what its branches add to each stream that leaves it; the cuts
    of the model are its outputs.

    Requires: an outlined graph (:func:`outline_regions_pass`) with the marks of residual adds.
    Ensures: outputs bitwise as before; with the cuts of a coarser region given, all that it covers
    (:attr:`Region.covers`) is dead code. What cannot be had is left out, with the reason.

        # before                                # after
        %y = add(%x, ...)  # first branch       %y, %z as before
        %z = add(%y, ...)  # last branch        %r = call_module[stack_0](%z, %x)  # (%z - %x,)
        return (%z,)                            %d = getitem(%r, 0)
                                                %j = rejoin(%z, %x, %d)            # %z
                                                %m = call_module[model_0](%j)      # (%j,)
                                                %o = getitem(%m, 0)
                                                %k = rejoin(%j, None, %o)          # %j
                                                return (%k,)
    """
    left_out: tuple[str, ...] = ()
    for kinds in (("block", "stack"), ("stack",), ()):
        writer = _Writer(gm)
        found, missing = _find_parts(writer.graph, gm, regions, kinds)
        try:
            writer.add(found)
            left_out += (*missing, *writer.add_model(captured))
            return writer.finish(regions, left_out)
        except CycleError as error:
            if not kinds:
                raise
            left_out += (f"{kinds[0]}: streams that leave it are computed from others, {error}",)
    raise AssertionError("without blocks and stack, there is no cycle")


def verify_nest(gm: GraphModule, regions: Regions) -> None:
    """Checks that coarser regions are called once, and are dead code together with all they cover.

    The stack covers every branch; each part rejoins the stream with each of its cuts.
    """
    calls = {str(n.target): n for n in gm.graph.nodes if n.op == "call_module"}
    names = [r.name for r in regions.all]
    assert sorted(calls) == sorted(names), (sorted(calls), names)
    for i, region in enumerate(regions.all):
        items = [n for n in calls[region.name].users if n.target is GETITEM]
        if region.kind not in COARSE:
            assert not region.covers, region
            continue
        joins = [user for item in items for user in item.users]
        assert len(joins) == len(region.cuts), (region.name, joins)
        assert all(n.target is rejoin for n in joins), (region.name, joins)
        assert i not in region.covers, region.name
    fine = {i for i, r in enumerate(regions.all) if r.kind not in COARSE}
    for region in regions.all:
        assert region.kind != "stack" or fine <= set(region.covers), region.covers
        assert region.kind != "block" or fine & set(region.covers), region.name


def _find_parts(
    graph: Graph, gm: GraphModule, regions: Regions, kinds: Sequence[str]
) -> tuple[list[_Found], list[str]]:
    """Returns the blocks and the stack, and a message for each that is left out.

    `graph` is a copy of that of `gm`; `kinds` are the kinds to find.
    """
    reach = Reach(graph)
    nodes = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
    calls = [nodes[region.name] for region in regions.all]
    found: list[_Found] = []
    left_out: list[str] = []
    candidates = [*_candidates(gm, regions, kinds)]
    if "block" in kinds:
        left_out += _describe_others(
            regions, [unit for kind, unit in candidates if kind == "block"]
        )
    for kind, unit in candidates:
        members = [regions.all[i] for i in unit]
        try:
            part = find_part(reach, [calls[i] for i in unit])
        except CannotPart as reason:
            where = f" of {_describe(members)}" if kind == "block" else ""
            left_out.append(f"{kind}{where}: {reason}")
        else:
            found.append(_Found(kind, tuple(members), part))
    if "stack" in kinds and not calls:
        left_out.append("stack: there are no branches")
    return found, left_out


def _candidates(
    gm: GraphModule, regions: Regions, kinds: Sequence[str]
) -> Iterator[tuple[str, range]]:
    if "block" in kinds:
        bodies = [gm.get_submodule(region.name) for region in regions.all]
        pairs = zip(regions.all, bodies, strict=True)
        looks = [Look.of(r, body) for r, body in pairs if isinstance(body, GraphModule)]
        yield from (("block", unit) for unit in find_units(looks))
    if "stack" in kinds and regions.all:
        yield "stack", range(len(regions.all))


def _describe_others(regions: Regions, units: Sequence[range]) -> list[str]:
    """Returns messages for the branches that are in none of these blocks."""
    if not units:
        return ["block: no sequence of branches is repeated"] if regions.all else []
    starts, stops = [unit.start for unit in units], [unit.stop for unit in units]
    gaps = zip([0, *stops], [*starts, len(regions.all)], strict=True)
    return [
        f"block of {_describe(regions.all[a:b])}: no other is like it" for a, b in gaps if a < b
    ]


def _describe(members: Sequence[Region]) -> str:
    return f"{members[0].name} to {members[-1].name}" if len(members) > 1 else members[0].name


class _Writer:
    """Adds coarser regions to a copy of a graph."""

    def __init__(self, gm: GraphModule) -> None:
        self.graph = Graph()
        copy_into(self.graph, gm.graph.nodes, {})
        self._gm = gm
        self._before = list(self.graph.nodes)
        self._output = output_node(self.graph)
        self._inner: set[Node] = set()  # nodes of blocks that were added
        self._now: dict[Node, Node] = {}  # stream -> what its later readers read
        self._out: dict[Node, Node] = {}  # the other way round
        self._places: dict[Node, Node] = {}  # node that was added -> the one that it follows
        self._bodies: dict[str, GraphModule] = {}
        self._regions: list[Region] = []

    def add(self, found: Sequence[_Found]) -> None:
        """Adds blocks and a stack, in this order."""
        for each in found:
            layer = sum(r.kind == each.kind for r in self._regions)
            pairs = self._write_bases(each.part)
            inside = {*each.part.inside, *(self._inner if each.kind == "stack" else ())}
            self._call(each.kind, layer, _common_path(each.regions), pairs, inside)

    def add_model(self, captured: Captured) -> list[str]:
        """Adds the whole model; returns a message if it cannot be reused."""
        effects = [n for n in self.graph.nodes if is_effect(n)]
        if effects:
            paths = [str(each.path) for each in captured.calls]
            return [f"model: {', '.join(dict.fromkeys(paths))} must run at every call"]
        if captured.writes:
            names = [captured.signature.inputs[i] for i in captured.writes]
            return [f"model: every call writes to {', '.join(names)}"]
        outputs = [n for n in self._output.args[0] if is_tensor(n)]
        computed = [n for n in outputs if viewed(n).op not in ("placeholder", "get_attr")]
        if not computed:
            return ["model: it computes no output"]
        inside = set(self.graph.nodes) - {self._output}  # one output may follow from another
        self._call("model", 0, "", [(n, None) for n in dict.fromkeys(computed)], inside)
        return []

    def finish(self, regions: Regions, left_out: tuple[str, ...]) -> tuple[GraphModule, Regions]:
        """Returns the graph, sorted, and its regions. Raises: CycleError."""
        order = sort_nodes(list(self.graph.nodes))
        if [n for n in order if n not in self._places] != self._before:
            self._note_positions()
        graph = Graph()
        copy_into(graph, order, {})
        names = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        root: dict[str, Any] = {
            name: attribute(self._gm, name) for name in names if name not in self._bodies
        }
        calls = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
        slots = {r.name: i for i, r in enumerate((*regions.all, *self._regions))}
        added = tuple(
            replace(r, covers=tuple(sorted(slots[name] for name in _find_covered(calls[r.name]))))
            for r in self._regions
        )
        found = Regions((*regions.all, *added), left_out)
        return make_module({**root, **self._bodies}, graph), found

    def _note_positions(self) -> None:
        index = {node: i for i, node in enumerate(self._before)}
        for node in self.graph.nodes:
            node.meta[POSITION] = index[self._places.get(node, node)]

    def _write_bases(self, part: Part) -> list[tuple[Node, Node | None]]:
        """Appends what computes each stream without the branches; returns pairs of both."""
        written: dict[Node, Node] = {}

        def base(node: Node) -> Node:
            while True:
                out = self._out.get(node, node)  # blocks have been added, for the stack
                if out in part.streams:
                    node = part.streams[out]
                elif out in part.inside:
                    return written[out]
                else:
                    return self._now.get(node, node)

        for node in part.copies:
            with self.graph.inserting_before(self._output):
                written[node] = self.graph.node_copy(node, base)
            for mark in _MARKS:
                written[node].meta.pop(mark, None)
            self._note(written[node], part.outs[-1])
        return [(out, base(part.starts.get(out, out))) for out in part.outs]

    def _call(
        self,
        kind: str,
        layer: int,
        path: str,
        pairs: Sequence[tuple[Node, Node | None]],
        inside: set[Node],
    ) -> None:
        """Appends a region that returns the difference of each pair, and rejoins both."""
        name = self._name(kind, layer)
        body, cuts = _write_body(self._gm, pairs)
        self._bodies[name] = body
        wholes = [self._now.get(out, out) for out, _ in pairs]
        given = chain(*zip(wholes, (b for _, b in pairs), strict=True))
        with self.graph.inserting_before(self._output):
            call = self.graph.call_module(name, tuple(n for n in given if n is not None))
            self._note(call, pairs[-1][0])
            for i, ((out, base), whole, cut) in enumerate(zip(pairs, wholes, cuts, strict=True)):
                item = self.graph.call_function(GETITEM, (call, i))
                item.meta.update(cut.meta)
                joined = self.graph.call_function(rejoin, (whole, base, item))
                joined.meta.update({k: out.meta[k] for k in _DESCRIBES if k in out.meta})
                for node in (item, joined):
                    self._note(node, pairs[-1][0])
                for user in list(whole.users):
                    if user not in inside and user not in (call, joined):
                        user.replace_input_with(whole, joined)
                self._now[out], self._out[joined] = joined, out
        self._regions.append(
            Region(
                name=name,
                kind=kind,
                layer=layer,
                path=path,
                attentions=(),
                cuts=tuple(out.name for out, _ in pairs),
                shapes=tuple(tuple(hint(cut).shape) for cut in cuts),
                dtypes=tuple(value(cut).dtype for cut in cuts),
            )
        )

    def _note(self, node: Node, place: Node) -> None:
        self._inner.add(node)
        self._places[node] = self._places.get(place, place)

    def _name(self, kind: str, layer: int) -> str:
        """Returns a name that no attribute of the model has."""
        taken = {str(n.target).split(".")[0] for n in self._before if n.op == "get_attr"}
        name = f"{kind}_{layer}"
        while name in taken:
            name += "_"
        return name


def _write_body(
    gm: GraphModule, pairs: Sequence[tuple[Node, Node | None]]
) -> tuple[GraphModule, tuple[Node, ...]]:
    """Returns the graph of a region that returns differences, or values as they are; its cuts."""
    graph = Graph()

    def take(node: Node) -> Node:
        result = graph.placeholder(f"arg_{len(graph.nodes)}")
        result.meta.update({k: node.meta[k] for k in _DESCRIBES if k in node.meta})
        return result

    cuts: list[Node] = []
    for out, base in pairs:
        whole = take(out)
        cuts.append(whole if base is None else _subtract(graph, whole, take(base)))
    graph.output(tuple(cuts))
    return make_module(gm, graph), tuple(cuts)


def _subtract(graph: Graph, whole: Node, base: Node) -> Node:
    result = graph.call_function(aten.sub.Tensor, (whole, base))
    for name in ("val", "hint"):
        if name in whole.meta and name in base.meta:
            result.meta[name] = aten.sub.Tensor(whole.meta[name], base.meta[name])
    if "axes" in whole.meta:
        result.meta["axes"] = whole.meta["axes"]
    return result


def _common_path(regions: Sequence[Region]) -> str:
    """Returns the innermost user module that contains the regions; for messages."""
    levels = zip(*(region.path.split(".") for region in regions), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _find_covered(call: Node) -> list[str]:
    """Returns the names of the regions that are dead code where a coarser one is reused.

    Then its stream is rejoined from what it starts from and the cuts alone.
    """
    joins = {user for item in call.users for user in item.users}
    dead = {call}
    stack = [call]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in dead or node.op == "placeholder" or is_effect(node):
                continue
            if all(u in dead or (u in joins and u.args[1] is not node) for u in node.users):
                dead.add(node)
                stack.append(node)
    return [str(n.target) for n in dead if n.op == "call_module" and n is not call]
