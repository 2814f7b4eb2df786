"""tag: finds every attention and names its kind from the axes that its softmax mixes."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch.fx import GraphModule, Node

from pabc.base.kinds import FINE

from .attention_calls import attention_call, is_attention_op
from .attention_chains import AttentionChain, find_chains, find_unclaimed_softmaxes
from .facts import Denoised, Enlarged, Tagged
from .ir import (
    Attention,
    Dims,
    Reach,
    attribute,
    is_call,
    module_path,
    user_inputs,
)
from .kinds import FoundAttention, name_in_kinds
from .relations.groups import SOFTMAXES
from .single_axes import SingleAxes


def tag_attention_pass(
    gm: GraphModule,
    denoised: Denoised,
    enlarged: Enlarged = Enlarged(),  # noqa: B008  (frozen)
    *,
    kinds: Mapping[str, str] | None = None,
) -> tuple[GraphModule, Tagged]:
    """Puts an :class:`Attention` into `meta["attention"]` of every attention's output node.

    `kinds` maps patterns (fnmatch, on the qualified module name) to kinds that the user states.

    Requires: axes (:func:`name_axes_pass`); if a token axis has one position, the graph, with axes,
    of a larger call (:func:`pabc.passes.enlarge_call`) if there is one.
    Ensures: every fused attention op, and every product-softmax-product chain, is tagged.
    Raises: ValueError that names the node if the axes do not determine a kind; ValueError for an
    unknown kind, or a pattern that matches no attention.

        # before                                # after
        %o = sdpa(%q, %k, %v)                   %o.meta["attention"] = Attention("blocks.0.attn",
        # axes of q, k: ((B, S), heads, T, C)       kind="temporal", ...)
    """
    stated = dict(kinds or {})
    for key, wanted in stated.items():
        if wanted not in FINE:
            raise ValueError(f"kinds[{key!r}]: expected one of {FINE}, found {wanted!r}")
    found, chains = _find(gm, denoised)
    unclaimed = tuple(
        f"{node.name} ({module_path(node)}): a softmax over tokens that is part of no attention"
        for node in find_unclaimed_softmaxes(gm, chains)
    )
    graph, inputs, telling = _find_in_larger(gm, denoised, found, enlarged)
    axes = SingleAxes.of(graph, inputs, telling)
    names: dict[str, int] = {}
    used: set[str] = set()
    for attention, same in zip(found, telling, strict=True):
        path = name_in_kinds(attention)
        names[path] = names.get(path, -1) + 1
        name = path if not names[path] else f"{path}#{names[path]}"
        pattern = stated_by(attention, stated)
        used.update([pattern] if pattern is not None else [])
        kind = stated[pattern] if pattern is not None else axes.name_kind(same)
        attention.node.meta["attention"] = Attention(
            name, kind, attention.node.name, attention.query, attention.key, attention.linear
        )
    if unused := set(stated) - used:
        paths = sorted(names)
        raise ValueError(
            f"kinds: expected patterns that match attentions {paths}, found {sorted(unused)}"
        )
    return gm, Tagged(unclaimed)


def stated_by(found: FoundAttention, kinds: Mapping[str, str]) -> str | None:
    """Returns the first pattern that matches an attention's module, or None."""
    path = name_in_kinds(found)
    return next((pattern for pattern in kinds if fnmatchcase(path, pattern)), None)


def _find_in_larger(
    gm: GraphModule, denoised: Denoised, found: list[FoundAttention], enlarged: Enlarged
) -> tuple[GraphModule, Denoised, list[FoundAttention]]:
    """Returns the graph from which to name kinds, its denoised inputs and its attentions.

    It is the graph of the larger call if it has the same attentions: the same modules and ops, in
    the same order.
    """
    if enlarged.graph is not None and enlarged.denoised is not None:
        others = find_attentions(enlarged.graph, enlarged.denoised)
        if list(map(_identity, others)) == list(map(_identity, found)):
            return enlarged.graph, enlarged.denoised, others
    return gm, denoised, found


def _identity(found: FoundAttention) -> tuple[str, object]:
    return module_path(found.node), found.node.target


def verify_tags(gm: GraphModule) -> None:
    """Checks that every fused attention op has a tag."""
    for node in gm.graph.nodes:
        assert not is_attention_op(node) or "attention" in node.meta, node.name


def tagged(gm: GraphModule) -> list[Node]:
    """Returns the output nodes of all tagged attentions, in graph order."""
    return [node for node in gm.graph.nodes if "attention" in node.meta]


def find_inner_attentions(gm: GraphModule) -> list[str]:
    """Returns a message for each op that runs inner graphs with attention, such as torch.cond."""
    lines = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_attention_op(node):
            continue
        reads = [n for n in node.all_input_nodes if n.op == "get_attr"]
        graphs = [g for g in (attribute(gm, str(n.target)) for n in reads) if _is_graph(g)]
        inner = [
            n for graph in graphs for m in graph.modules() if _is_graph(m) for n in m.graph.nodes
        ]
        count = sum(is_attention_op(n) or is_call(n, SOFTMAXES) for n in inner)
        if count:
            lines.append(
                f"{node.name} ({module_path(node)}): runs inner graphs ({node.target}) with "
                f"{count} attentions, which are not reused"
            )
    return lines


def _is_graph(value: object) -> bool:
    return isinstance(value, GraphModule)


def find_attentions(gm: GraphModule, denoised: Denoised) -> list[FoundAttention]:
    """Returns the fused attentions, and those written out as products, in graph order."""
    return _find(gm, denoised)[0]


def _find(gm: GraphModule, denoised: Denoised) -> tuple[list[FoundAttention], list[AttentionChain]]:
    reach = Reach(gm.graph)
    chains = find_chains(gm, reach)
    latents = reach.mask(n for n in user_inputs(gm.graph) if n.name in denoised.streams)
    written = [
        FoundAttention(
            chain.node,
            chain.query,
            chain.key,
            chain.features,
            chain.outer,
            query_on_latents=reach.touches(chain.query_source, latents),
            key_on_latents=reach.touches(chain.key_source, latents),
            linear=chain.linear,
        )
        for chain in chains
    ]
    fused = [_describe_fused(n, reach, latents) for n in gm.graph.nodes if is_attention_op(n)]
    found = [*fused, *written]
    return sorted(found, key=lambda f: reach.index[f.node]), chains


def _describe_fused(node: Node, reach: Reach, latents: int) -> FoundAttention:
    call = attention_call(node)
    query: Dims = call.query.meta["axes"]
    features = len(query) + call.layout.features
    inner = {len(query) + call.layout.sequence, features}
    return FoundAttention(
        node,
        query=query[call.layout.sequence],
        key=call.key.meta["axes"][call.layout.sequence],
        features=query[features],
        outer=tuple(f for d, product in enumerate(query) if d not in inner for f in product),
        query_on_latents=reach.touches(call.query, latents),
        key_on_latents=reach.touches(call.key, latents),
        packed=call.packed,
    )
