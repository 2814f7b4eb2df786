"""regions: finds every residual branch and its cuts, the values to cache between steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node

from .attention_calls import attention_result
from .dead_code import dead_without
from .facts import Denoised, Marked, Tagged
from .ir import (
    Attention,
    Reach,
    is_call,
    is_contraction,
    is_opaque,
    is_pointwise,
    user_inputs,
    value,
)
from .relations.groups import LAYOUTS
from .residuals import Residual, find_exits, find_merges, find_residuals, find_shares
from .tag import find_inner_attentions, tagged

Cut = Literal["attention", "branch"]


@dataclass(frozen=True)
class _ResidualBranch:
    """A residual branch that becomes a region: its kind, its cuts and its attentions.

    `exits` are the residual adds that it ends in. `adds` are residual adds inside the branch, which
    belong to it rather than to the stream.
    """

    kind: str
    cuts: tuple[Node, ...]
    exits: tuple[Node, ...]
    attentions: tuple[Node, ...] = ()
    adds: frozenset[Node] = frozenset()


def mark_regions_pass(
    gm: GraphModule, denoised: Denoised, tags: Tagged, *, cut: Cut = "attention"
) -> tuple[GraphModule, Marked]:
    """Marks the nodes of every residual branch, up to its cut.

    `cut="attention"`: the cut is the last value before the gate, so that the gate, which depends on
    the timestep, is computed at every step. `cut="branch"`: the cut is the value that is added to
    the residual stream.

    Requires: tags (:func:`tag_attention_pass`).
    Ensures: a node that only region i needs has `meta["region"] == i`; a cut has its ordinal in
    `meta["cut"]` as well; no node is in two regions. A residual add in which regions end has
    `meta["joins"]`, the position of the stream among its operands.

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
    _mark_exits(reach, branches, residuals)
    kinds = tuple((b.kind, tuple(n.meta["attention"].name for n in b.attentions)) for b in branches)
    return gm, Marked(kinds, (*outside, *find_inner_attentions(gm), *tags.unclaimed))


def _mark_exits(
    reach: Reach, branches: Sequence[_ResidualBranch], residuals: Sequence[Residual]
) -> None:
    """Marks the residual adds that regions end in, with the position of their stream.

    A region without an add of its own, such as attention in a chain, ends where its chain does: an
    add around another one that it reaches is not marked for its sake. Where another product follows
    before what was added is added to the same stream again, x + f(x + g(x)), the outer add is
    marked.
    """
    exits = {add for branch in branches for add in branch.exits}
    marked: dict[Node, None] = {}
    for branch in branches:
        for add in branch.exits:
            inner = (n for cut in branch.cuts for n in reach.between(cut, add)[:-1])
            if exits.isdisjoint(inner):
                marked[add] = None
    by_add = {r.add: r for r in residuals}
    for outer in residuals:
        nested = [n for n in reach.between(outer.stream, outer.branch) if n in marked]
        if nested and all(by_add[n].stream is outer.stream for n in nested):
            for add in nested:
                del marked[add]
            marked[outer.add] = None
    for add in marked:
        is_branch = [n is by_add[add].branch for n in add.all_input_nodes]
        add.meta["joins"] = is_branch.index(False)


def verify_marks(gm: GraphModule, marked: Marked) -> None:
    """Checks the marks of regions.

    Every region has a cut and can be outlined to one call; every attention on the latents is in a
    region, or `marked.outside` names it.
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
    """Groups the attentions on the latents by the residual adds that they reach.

    An attention that reaches none is a group by itself.
    """
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
    """Returns branches for the attentions on the latents, and a message for each without one."""
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
            raw = _cut_raw(attention, [add for add in exits if add in by_add])
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
    """Returns the branch with cuts before the residual adds.

    Returns None if reusing these cuts would not make the attentions dead code.
    """
    mask = reach.mask(attentions)
    cuts = []
    for residual in exits:
        end = _before_merge(reach, residual, attentions, mask)
        if end is None:
            return None
        cuts.append(end if cut == "branch" else _before_gate(reach, end, mask))
    kind = attentions[0].meta["attention"].kind
    adds = tuple(r.add for r in exits)
    branch = _ResidualBranch(kind, tuple(cuts), adds, tuple(attentions))
    ((_, nodes),) = _own(reach, [branch], residuals)
    return branch if set(attentions) <= set(nodes) else None


def _before_merge(
    reach: Reach, residual: Residual, attentions: Sequence[Node], mask: int
) -> Node | None:
    """Returns the end of the attention's own part of a branch.

    It is the end of the branch, or the operand of the first sum or concatenation that merges it
    with another projection of the stream. Returns None if several operands of the merge depend on
    the attention.
    """
    for node, _ in find_merges(reach, residual, attentions, mask):
        carried = [n for n in node.all_input_nodes if reach.touches(n, mask)]
        return carried[0] if len(carried) == 1 else None
    return residual.branch


def _fresh_operands(reach: Reach, node: Node, mask: int) -> list[Node]:
    """Returns the operands that depend on an input, but not on the attention: gates, branches."""
    inputs = reach.mask(user_inputs(reach.nodes[0].graph))
    return [
        n for n in node.all_input_nodes if not reach.touches(n, mask) and reach.touches(n, inputs)
    ]


def _before_gate(reach: Reach, node: Node, mask: int) -> Node:
    """Walks back from a branch's end over gates, sums with other branches, and layout changes."""
    best = node
    while node.op == "call_function" and (is_pointwise(node) or node.target in LAYOUTS):
        carried = [n for n in node.all_input_nodes if reach.touches(n, mask)]
        if len(carried) != 1 or value(carried[0]).numel() != value(node).numel():
            break
        if _fresh_operands(reach, node, mask):
            best = carried[0]
        node = carried[0]
    return best


def _cut_raw(attention: Node, exits: Sequence[Node]) -> _ResidualBranch | None:
    """Returns a branch that is cut at the attention's output, for want of a usable residual add.

    Returns None if reusing that cut would not make the attention dead code.
    """
    node = attention_result(attention)
    if node is None:
        return None
    while len(node.users) == 1 and is_call(next(iter(node.users)), LAYOUTS):
        node = next(iter(node.users))
    if attention not in dead_without([node]):
        return None
    kind = attention.meta["attention"].kind
    return _ResidualBranch(kind, (node,), tuple(exits), (attention,))


def _find_mlp_branches(
    streams: Collection[str],
    reach: Reach,
    residuals: Sequence[Residual],
    shares: Sequence[Residual],
    attention_branches: Sequence[_ResidualBranch],
    cut: Cut,
) -> list[_ResidualBranch]:
    """Returns the residual branches with two consecutive products and without attention.

    Exits that share the same products make one branch. A branch with one product is no MLP: it may
    be a convolution for positions, or a projection at either end of the model under a skip over all
    blocks. For a share of a branch that is merged with others, products after the merge count
    towards the two; only the share becomes the region.
    """
    owned = _own(reach, attention_branches, residuals)
    claimed = {node for _, nodes in owned for node in nodes}
    by_branch = {r.branch: r for r in residuals}
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
        exits = tuple(by_branch[r.later or r.branch].add for r in group)
        own = frozenset(adds & {r.add for r in residuals})
        branch = _ResidualBranch("mlp", cuts, exits, adds=own)
        ((_, nodes),) = _own(reach, [branch], residuals)
        if shared <= set(nodes):
            branches.append(branch)
    return branches


def _later(reach: Reach, residual: Residual) -> frozenset[Node]:
    """Returns the products between a share and the residual add."""
    if residual.later is None:
        return frozenset()
    return frozenset(n for n in reach.between(residual.add, residual.later) if is_contraction(n))


def _is_deep(reach: Reach, products: Collection[Node]) -> bool:
    """Returns True if one product depends on another; an opaque module may contain both."""
    return any(is_opaque(a) or any(reach.depends(a, b) for b in products) for a in products)


def _split_around_others(
    reach: Reach,
    branches: Sequence[_ResidualBranch],
    residuals: Sequence[Residual],
    outside: list[str],
) -> list[_ResidualBranch]:
    """Replaces each branch that is not convex, such as one that contains another branch.

    One call cannot return the cuts of such a branch, since an input of the call would depend on its
    results. Its attentions are cut at their own outputs instead.
    """
    kept = list(branches)
    while True:
        owned = _own(reach, kept, residuals)
        broken = next((b for b, nodes in owned if not _is_convex(reach, nodes)), None)
        if broken is None:
            return kept
        kept.remove(broken)
        for attention in broken.attentions:
            raw = _cut_raw(attention, broken.exits)
            if raw is not None and raw != broken:
                kept.append(raw)
            else:
                outside.append(_refusal(attention))


def _is_convex(reach: Reach, nodes: Sequence[Node]) -> bool:
    """Returns True if no input of these nodes depends on one of them."""
    mask, inside = reach.mask(nodes), set(nodes)
    inputs = {n for node in nodes for n in node.all_input_nodes if n not in inside}
    return not any(reach.touches(n, mask) for n in inputs)


def _own(
    reach: Reach, branches: Sequence[_ResidualBranch], residuals: Sequence[Residual]
) -> list[tuple[_ResidualBranch, tuple[Node, ...]]]:
    """Returns each branch with its nodes: those that only its cuts need.

    They end at the residual stream and at other branches' cuts. Residual adds that only the branch
    needs are not included: they belong to the stream, and dead code elimination removes them in
    phases that reuse the cuts.
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
