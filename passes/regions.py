"""regions: finds every residual branch and its cut, the value to keep between steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node

from .attention_ops import attention_result
from .facts import Denoised, Marked, Tagged
from .ir import (
    LAYOUTS,
    Attention,
    Reach,
    dead_without,
    is_call,
    is_contraction,
    is_opaque,
    is_pointwise,
    user_inputs,
    value,
)
from .residuals import Residual, find_exits, find_merges, find_residuals, find_shares
from .tag import find_inner_attentions, tagged

Cut = Literal["attention", "branch"]


@dataclass(frozen=True)
class _ResidualBranch:
    """What becomes one region: its kind, its cut nodes, the attentions that go with it.

    `adds` are the residual adds within it, which belong to it rather than to the stream.
    """

    kind: str
    cuts: tuple[Node, ...]
    attentions: tuple[Node, ...] = ()
    adds: frozenset[Node] = frozenset()


def mark_regions_pass(
    gm: GraphModule, denoised: Denoised, tags: Tagged, *, cut: Cut = "attention"
) -> tuple[GraphModule, Marked]:
    """Marks the nodes of every residual branch, up to its cut.

    `cut="attention"`: the last value before the gate, so that what follows from the timestep stays
    fresh. `cut="branch"`: the value that is added to the residual stream.

    Requires: tags (:func:`tag_attention_pass`).
    Ensures: a node that only region i needs has `meta["region"] == i`, its cuts `meta["cut"]` as
    well, their ordinal; no node is in two regions.

        # before                                # after
        %n = layer_norm(%x)                     %n: region 0
        %o = sdpa(linear(%n), ...)              %o: region 0
        %p = linear(%o)                         %p: region 0, cut 0
        %y = add(%x, mul(%gate, %p))            %y: the residual stream
    """
    if cut not in ("attention", "branch"):
        raise ValueError(f"cut: expected 'attention' or 'branch', found {cut!r}")
    reach = Reach(gm.graph)
    residuals = find_residuals(gm.graph, reach)
    groups = _group_by_exits(reach, tagged(gm), residuals)
    branches, outside = _find_attention_branches(reach, groups, residuals, cut)
    shares = find_shares(reach, groups, residuals)
    streams = set(denoised.streams.values())
    branches += _find_mlp_branches(streams, reach, residuals, shares, branches, cut)
    branches = _split_around_others(reach, branches, residuals, outside)
    branches.sort(key=lambda b: reach.index[b.cuts[0]])
    for i, (branch, nodes) in enumerate(_own(reach, branches, residuals)):
        for node in nodes:
            assert "region" not in node.meta, f"{node.name} is in two regions"
            node.meta["region"] = i
        for ordinal, node in enumerate(branch.cuts):
            node.meta["cut"] = ordinal
    kinds = tuple((b.kind, tuple(n.meta["attention"].name for n in b.attentions)) for b in branches)
    return gm, Marked(kinds, (*outside, *find_inner_attentions(gm), *tags.unclaimed))


def verify_marks(gm: GraphModule, marked: Marked) -> None:
    """Checks the marks of regions.

    Every region has a cut and can be called at once; every attention on the latents is in a region,
    or named outside.
    """
    cuts = {node.meta["region"] for node in gm.graph.nodes if "cut" in node.meta}
    assert cuts == set(range(len(marked.branches))), cuts
    for node in tagged(gm):
        attention: Attention = node.meta["attention"]
        held = "region" in node.meta or attention.kind == "other"
        assert held or any(attention.name in line for line in marked.outside), attention.name
    reach = Reach(gm.graph)
    for i in cuts:
        nodes = [n for n in gm.graph.nodes if n.meta.get("region") == i]
        assert _is_convex(reach, nodes), f"region {i} needs what is computed from it"


def _group_by_exits(
    reach: Reach, attentions: Sequence[Node], residuals: Sequence[Residual]
) -> dict[tuple[Node, ...], list[Node]]:
    """The attentions on the latents by the adds that they reach; one without an add by itself."""
    groups: dict[tuple[Node, ...], list[Node]] = {}
    for attention in attentions:
        if attention.meta["attention"].kind != "other":
            exits = tuple(r.add for r in find_exits(reach, residuals, attention))
            groups.setdefault(exits or (attention,), []).append(attention)
    return groups


def _find_attention_branches(
    reach: Reach,
    groups: Mapping[tuple[Node, ...], Sequence[Node]],
    residuals: Sequence[Residual],
    cut: Cut,
) -> tuple[list[_ResidualBranch], list[str]]:
    """Branches for all attentions on the latents, and a line for each that none can hold."""
    by_add = {r.add: r for r in residuals}
    branches: list[_ResidualBranch] = []
    outside: list[str] = []
    for exits, group in groups.items():
        branch = None
        if exits[0] in by_add and len({n.meta["attention"].kind for n in group}) == 1:
            branch = _cut_at(reach, [by_add[add] for add in exits], group, cut, residuals)
        if branch is not None:
            branches.append(branch)
            continue
        for attention in group:
            raw = _cut_raw(attention)
            if raw is not None:
                branches.append(raw)
            else:
                outside.append(_refusal(attention))
    return branches, outside


def _refusal(attention: Node) -> str:
    fact: Attention = attention.meta["attention"]
    return f"{fact.name}: its output cannot be separated from its inputs"


def _cut_at(
    reach: Reach,
    exits: Sequence[Residual],
    attentions: Sequence[Node],
    cut: Cut,
    residuals: Sequence[Residual],
) -> _ResidualBranch | None:
    """The branch with its cuts before the residual adds, or None where they would not free it."""
    mask = reach.mask(attentions)
    cuts = []
    for residual in exits:
        end = _before_merge(reach, residual, attentions, mask)
        if end is None:
            return None
        cuts.append(end if cut == "branch" else _before_gate(reach, end, mask))
    branch = _ResidualBranch(attentions[0].meta["attention"].kind, tuple(cuts), tuple(attentions))
    ((_, nodes),) = _own(reach, [branch], residuals)
    return branch if set(attentions) <= set(nodes) else None


def _before_merge(
    reach: Reach, residual: Residual, attentions: Sequence[Node], mask: int
) -> Node | None:
    """The attention's own share of a branch: all of it, or up to where another branch joins in.

    That is a sum or concatenation with something else that is projected from the stream. None if
    the attention is in more than one of the operands.
    """
    for node, _ in find_merges(reach, residual, attentions, mask):
        carried = [n for n in node.all_input_nodes if reach.touches(n, mask)]
        return carried[0] if len(carried) == 1 else None
    return residual.branch


def _fresh_operands(reach: Reach, node: Node, mask: int) -> list[Node]:
    """Operands not computed from the attention but from an input: gates, other branches."""
    inputs = reach.mask(user_inputs(reach.nodes[0].graph))
    return [
        n for n in node.all_input_nodes if not reach.touches(n, mask) and reach.touches(n, inputs)
    ]


def _before_gate(reach: Reach, node: Node, mask: int) -> Node:
    """Walks back from a branch's end over gates and other branches added; layouts go with them."""
    best = node
    while node.op == "call_function" and (is_pointwise(node) or node.target in LAYOUTS):
        carried = [n for n in node.all_input_nodes if reach.touches(n, mask)]
        if len(carried) != 1 or value(carried[0]).numel() != value(node).numel():
            break
        if _fresh_operands(reach, node, mask):
            best = carried[0]
        node = carried[0]
    return best


def _cut_raw(attention: Node) -> _ResidualBranch | None:
    """The attention's own output as the cut, where no residual add can serve."""
    node = attention_result(attention)
    if node is None:
        return None
    while len(node.users) == 1 and is_call(next(iter(node.users)), LAYOUTS):
        node = next(iter(node.users))
    if attention not in dead_without([node]):
        return None
    return _ResidualBranch(attention.meta["attention"].kind, (node,), (attention,))


def _find_mlp_branches(
    streams: Collection[str],
    reach: Reach,
    residuals: Sequence[Residual],
    shares: Sequence[Residual],
    attention_branches: Sequence[_ResidualBranch],
    cut: Cut,
) -> list[_ResidualBranch]:
    """Residual branches with two products, one after the other, and without attention.

    Several exits of the same products join. A single product is no MLP: a convolution for
    positions, a projection at either end of the model under a skip over all blocks. Of a share of
    a branch, a product after the merge counts; the share is the region.
    """
    owned = _own(reach, attention_branches, residuals)
    claimed = {node for _, nodes in owned for node in nodes}
    groups: dict[frozenset[Node], list[Residual]] = {}
    for residual in (*residuals, *shares):
        inner = reach.between(residual.stream, residual.branch)
        products = frozenset(n for n in inner if is_contraction(n))
        free = not any(n in claimed or "attention" in n.meta for n in inner)
        if (
            free
            and _is_deep(reach, products | _later(reach, residual))
            and _on_streams(residual.add, streams)
        ):
            groups.setdefault(products, []).append(residual)
    branches: list[_ResidualBranch] = []
    for shared, group in groups.items():
        if any(shared > other for other in groups):
            continue
        mask = reach.mask(shared)
        cuts = tuple(
            _before_gate(reach, r.branch, mask) if cut == "attention" else r.branch for r in group
        )
        adds = {n for r in group for n in reach.between(r.stream, r.branch)}
        branch = _ResidualBranch("mlp", cuts, adds=frozenset(adds & {r.add for r in residuals}))
        ((_, nodes),) = _own(reach, [branch], residuals)
        if shared <= set(nodes):
            branches.append(branch)
    return branches


def _later(reach: Reach, residual: Residual) -> frozenset[Node]:
    """The products between a share and the residual add."""
    if residual.later is None:
        return frozenset()
    return frozenset(n for n in reach.between(residual.add, residual.later) if is_contraction(n))


def _is_deep(reach: Reach, products: Collection[Node]) -> bool:
    """Whether a product reads another's result; a module that runs as it is may hold both."""
    return any(is_opaque(a) or any(reach.depends(a, b) for b in products) for a in products)


def _split_around_others(
    reach: Reach,
    branches: Sequence[_ResidualBranch],
    residuals: Sequence[Residual],
    outside: list[str],
) -> list[_ResidualBranch]:
    """Replaces each branch that something leaves and enters again, such as one within another.

    No call could give that branch's cuts at once: its attentions are cut at their own outputs.
    """
    kept = list(branches)
    while True:
        owned = _own(reach, kept, residuals)
        broken = next((b for b, nodes in owned if not _is_convex(reach, nodes)), None)
        if broken is None:
            return kept
        kept.remove(broken)
        for attention in broken.attentions:
            raw = _cut_raw(attention)
            if raw is not None and raw != broken:
                kept.append(raw)
            else:
                outside.append(_refusal(attention))


def _is_convex(reach: Reach, nodes: Sequence[Node]) -> bool:
    """Whether no input of these nodes is computed from one of them."""
    mask, inside = reach.mask(nodes), set(nodes)
    inputs = {n for node in nodes for n in node.all_input_nodes if n not in inside}
    return not any(reach.touches(n, mask) for n in inputs)


def _own(
    reach: Reach, branches: Sequence[_ResidualBranch], residuals: Sequence[Residual]
) -> list[tuple[_ResidualBranch, tuple[Node, ...]]]:
    """The nodes that only a branch's cuts need, back to the stream or another branch's cut.

    Residual adds that nothing else needs stay outside: they belong to the stream, and dead code
    elimination finds them where the cuts are reused.
    """
    stops = {r.add for r in residuals} | {cut for branch in branches for cut in branch.cuts}
    result = []
    for branch in branches:
        dead = dead_without(branch.cuts)
        owned: set[Node] = set()
        stack = list(branch.cuts)
        while stack:
            node = stack.pop()
            inside = node in branch.cuts or node in branch.adds or node not in stops
            if node in dead and node not in owned and inside:
                owned.add(node)
                stack.extend(node.all_input_nodes)
        result.append((branch, tuple(sorted(owned, key=reach.index.__getitem__))))
    return result


def _on_streams(node: Node, streams: Collection[str]) -> bool:
    return any(
        axis.source in streams
        for product in node.meta["axes"]
        for factor in product
        for axis in factor.axes()
    )
