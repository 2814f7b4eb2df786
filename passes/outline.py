"""outline: moves every marked residual branch to a submodule that returns its cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch.fx import Graph, GraphModule, Node

from .facts import Marked, Regions
from .ir import (
    GETITEM,
    Region,
    attribute,
    copy_into,
    is_contraction,
    make_module,
    module_path,
    value,
)
from .tag import tagged
from .tracing.sizes import hint


@dataclass(frozen=True)
class _MarkedBranch:
    """The nodes of a region, in graph order, and the cuts among them."""

    kind: str
    attentions: tuple[str, ...]
    nodes: tuple[Node, ...]
    cuts: tuple[Node, ...]


def outline_regions_pass(gm: GraphModule, marked: Marked) -> tuple[GraphModule, Regions]:
    """Replaces the nodes of each region by one call.

    Requires: marks (:func:`mark_regions_pass`).
    Ensures: outputs bitwise as before; region i, in execution order, is one `call_module` node that
    returns the tuple of its cuts.

        # before                                # after
        %n = layer_norm(%x)                     %r = call_module[spatial_0](%x, %shift, %scale)
        %o = sdpa(linear(%n), ...)              %c = getitem(%r, 0)
        %p = linear(%o)                         %g = mul(%gate, %c)
        %g = mul(%gate, %p)                     %y = add(%x, %g)
        %y = add(%x, %g)
    """
    return _outline(gm, _collect(gm, marked))


def verify_outline(gm: GraphModule, regions: Regions) -> None:
    """Checks that each region is called once, and that no attention is left outside its region."""
    calls = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert sorted(calls) == sorted(r.name for r in regions.all), (calls, regions)
    inside = {name for region in regions.all for name in region.attentions}
    for node in tagged(gm):
        assert node.meta["attention"].name not in inside, f"{node.name} is alive outside its region"


def _collect(gm: GraphModule, marked: Marked) -> list[_MarkedBranch]:
    nodes: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        if "region" in node.meta:
            nodes.setdefault(node.meta["region"], []).append(node)
    branches = []
    for i, (kind, attentions) in enumerate(marked.branches):
        cuts = sorted((n for n in nodes[i] if "cut" in n.meta), key=lambda n: n.meta["cut"])
        branches.append(_MarkedBranch(kind, attentions, tuple(nodes[i]), tuple(cuts)))
    return branches


def _outline(gm: GraphModule, branches: Sequence[_MarkedBranch]) -> tuple[GraphModule, Regions]:
    owner = {node: branch for branch in branches for node in branch.nodes}
    counts: dict[str, int] = {}
    root: dict[str, object] = {}
    regions: list[Region] = []
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for item in _in_order(gm.graph, owner):
        if not isinstance(item, _MarkedBranch):
            copy_into(graph, [item], mapping)
            continue
        layer = counts[item.kind] = counts.get(item.kind, -1) + 1
        region = _describe(item, layer)
        regions.append(region)
        root[region.name] = _body(gm, item)
        inputs = _region_inputs(item)
        assert all(n in mapping for n in inputs), f"{region.name} is called before its inputs"
        call = graph.call_module(region.name, tuple(mapping[n] for n in inputs))
        for i, node in enumerate(item.cuts):
            mapping[node] = graph.call_function(GETITEM, (call, i))
            facts = ("val", "hint", "axes")
            mapping[node].meta.update({k: node.meta[k] for k in facts if k in node.meta})
    reads = (str(n.target) for n in graph.nodes if n.op == "get_attr")
    root.update((name, attribute(gm, name)) for name in reads)
    return make_module(root, graph), Regions(tuple(regions))


def _in_order(graph: Graph, owner: dict[Node, _MarkedBranch]) -> list[Node | _MarkedBranch]:
    """Returns nodes and branches in topological order, which keeps the graph's order if it can."""
    order: list[Node | _MarkedBranch] = []
    done: set[int] = set()

    def visit(item: Node | _MarkedBranch) -> None:
        stack: list[tuple[Node | _MarkedBranch, bool]] = [(item, False)]
        while stack:
            current, expanded = stack.pop()
            if id(current) in done:
                continue
            if expanded:
                done.add(id(current))
                order.append(current)
                continue
            stack.append((current, True))
            inputs = (
                _region_inputs(current)
                if isinstance(current, _MarkedBranch)
                else current.all_input_nodes
            )
            stack.extend((owner.get(n, n), False) for n in reversed(inputs))

    for node in graph.nodes:
        if node in owner and node not in owner[node].cuts:
            continue
        visit(owner.get(node, node))
    return order


def _region_inputs(branch: _MarkedBranch) -> list[Node]:
    inside = set(branch.nodes)
    inputs = [n for node in branch.nodes for n in node.all_input_nodes if n not in inside]
    return list(dict.fromkeys(inputs))


def _body(gm: GraphModule, branch: _MarkedBranch) -> GraphModule:
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in _region_inputs(branch):
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta.update(node.meta)
    copy_into(graph, branch.nodes, mapping)
    graph.output(tuple(mapping[n] for n in branch.cuts))
    return make_module(gm, graph)


def _describe(branch: _MarkedBranch, layer: int) -> Region:
    return Region(
        name=f"{branch.kind}_{layer}",
        kind=branch.kind,
        layer=layer,
        path=_common_path(branch),
        attentions=branch.attentions,
        cuts=tuple(n.name for n in branch.cuts),
        shapes=tuple(tuple(hint(n).shape) for n in branch.cuts),
        dtypes=tuple(value(n).dtype for n in branch.cuts),
    )


def _common_path(branch: _MarkedBranch) -> str:
    """Returns the innermost user module that contains the attentions; for messages.

    Without attentions, it is the one that contains the products.
    """
    attentions = [n for n in branch.nodes if "attention" in n.meta]
    anchors = attentions or [n for n in branch.nodes if is_contraction(n)]
    levels = zip(*(module_path(n).split(".") for n in anchors), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
