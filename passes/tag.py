"""tag: finds every attention and names its kind from the axes that its softmax mixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.fx import GraphModule, Node

from pabc.plan import KINDS

from .ir import (
    FUSED_ATTENTION,
    LAYOUTS,
    SOFTMAXES,
    Attention,
    Axis,
    Factor,
    aten,
    is_call,
    is_pointwise,
    is_tensor,
    module_path,
    user_inputs,
    value,
)

_PRODUCTS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.baddbmm.default,
)


@dataclass(frozen=True)
class _Found:
    """An attention's output node and the factors of its query and key sequence dimensions."""

    node: Node
    query: tuple[Factor, ...]
    key: tuple[Factor, ...]
    outer: tuple[Factor, ...]


@dataclass(frozen=True)
class TokenAxes:
    """Which axes of the latents are frames, and which lie within a frame."""

    latents: str
    batch: Axis
    time: Axis | None
    space: tuple[Axis, ...]


def tag_attention_pass(gm: GraphModule, *, kinds: Mapping[str, str] | None = None) -> GraphModule:
    """Puts an :class:`Attention` into `meta["attention"]` of every attention's output node.

    `kinds` maps patterns (fnmatch, on the qualified module name) to kinds the user states.

    Requires: axes (:func:`name_axes_pass`).
    Ensures: every fused attention op, and every product-softmax-product chain, is tagged.
    Raises: ValueError that names the node where a kind cannot be told from the axes, and for an
    unknown kind or a pattern that matches no attention.

        # before                                # after
        %o = sdpa(%q, %k, %v)                   %o.meta["attention"] = Attention("blocks.0.attn",
        # axes of q, k: ((B, S), heads, T, C)       kind="temporal", ...)
    """
    stated = dict(kinds or {})
    for key, wanted in stated.items():
        if wanted not in KINDS:
            raise ValueError(f"kinds[{key!r}]: expected one of {KINDS}, found {wanted!r}")
    found = [*_find_fused(gm), *_find_chains(gm)]
    tokens = find_token_axes(gm, found)
    names: dict[str, int] = {}
    used: set[str] = set()
    for attention in sorted(found, key=lambda f: _position(gm)[f.node]):
        path = module_path(attention.node) or attention.node.name
        names[path] = names.get(path, -1) + 1
        name = path if not names[path] else f"{path}#{names[path]}"
        pattern = next((p for p in stated if fnmatchcase(path, p)), None)
        used.update([pattern] if pattern is not None else [])
        kind = stated[pattern] if pattern is not None else name_kind(attention, tokens)
        attention.node.meta["attention"] = Attention(
            name, kind, attention.node.name, attention.query, attention.key
        )
    if unused := set(stated) - used:
        paths = sorted(names)
        raise ValueError(f"kinds: no attention matches {sorted(unused)}; found {paths}")
    return gm


def verify_tags(gm: GraphModule) -> None:
    """No fused attention op is left without a tag."""
    for node in gm.graph.nodes:
        assert not is_call(node, FUSED_ATTENTION) or "attention" in node.meta, node.name


def tagged(gm: GraphModule) -> list[Node]:
    """The output nodes of all tagged attentions, in graph order."""
    return [node for node in gm.graph.nodes if "attention" in node.meta]


def _position(gm: GraphModule) -> dict[Node, int]:
    return {node: i for i, node in enumerate(gm.graph.nodes)}


def _find_fused(gm: GraphModule) -> list[_Found]:
    return [
        _Found(
            node,
            query=node.args[0].meta["axes"][-2],
            key=node.args[1].meta["axes"][-2],
            outer=tuple(f for product in node.args[0].meta["axes"][:-2] for f in product),
        )
        for node in gm.graph.nodes
        if is_call(node, FUSED_ATTENTION)
    ]


def _find_chains(gm: GraphModule) -> list[_Found]:
    """softmax(Q K^T) V written out: a softmax whose input and output go through products."""
    found = []
    for node in gm.graph.nodes:
        if not is_call(node, SOFTMAXES):
            continue
        scores = _walk(node.args[0], lambda n: [a for a in n.all_input_nodes if is_tensor(a)])
        mixed = _walk(next(iter(node.users), None), lambda n: list(n.users))
        if scores is None or mixed is None:
            continue
        query, key = (n.meta["axes"] for n in _factors_of(scores))
        found.append(
            _Found(
                mixed,
                query=query[-2],
                key=key[-1],
                outer=tuple(f for product in query[:-2] for f in product),
            )
        )
    return found


def _factors_of(product: Node) -> tuple[Node, Node]:
    """The two operands that a product multiplies."""
    start = 1 if product.target is aten.baddbmm.default else 0
    a, b = product.args[start : start + 2]
    assert isinstance(a, Node) and isinstance(b, Node)
    return a, b


def _walk(node: Node | None, following: object) -> Node | None:
    """Through casts, scales, masks and views to the next product of two computed tensors."""
    for _ in range(32):
        if node is None or node.op != "call_function":
            return None
        if node.target in _PRODUCTS:
            return node
        if not (is_pointwise(node) or node.target in LAYOUTS or node.target is aten.expand.default):
            return None
        options = [n for n in following(node) if _has_rank_of(n, node)]  # type: ignore[operator]
        node = options[0] if options else None
    return None


def _has_rank_of(node: Node, other: Node) -> bool:
    return is_tensor(node) and is_tensor(other) and value(node).numel() >= value(other).numel()


def find_token_axes(gm: GraphModule, found: list[_Found]) -> TokenAxes:
    """The latents' axes that tokens are made of: all but the batch and the contracted channels.

    Of three such axes the first is time (B, C, T, H, W and B, T, C, H, W both occur); of two or one
    all lie within a frame.
    """
    latents: str = gm.meta["latents"]
    rank = next(value(n).ndim for n in user_inputs(gm.graph) if n.name == latents)
    seen = {
        axis.dim
        for attention in found
        for factor in (*attention.query, *attention.outer)
        for axis in factor.axes()
        if axis.source == latents and axis.dim > 0
    }
    rest = [dim for dim in range(1, rank) if dim in seen]
    if rank == 5 and len(rest) != 3:
        rest = [d for d in range(1, 5) if d != (1 if 1 not in seen else 2)]
    axes = [Axis(latents, dim) for dim in rest]
    time = axes[0] if len(axes) == 3 else None
    return TokenAxes(latents, Axis(latents, 0), time, tuple(a for a in axes if a != time))


def name_kind(found: _Found, tokens: TokenAxes) -> str:
    """The kind from the axes of Q and K alone.

    Raises: ValueError where the query lies on the latents but its sequence has lost its axes.
    """
    q_latent = _latent_axes(found.query, tokens)
    k_latent = _latent_axes(found.key, tokens)
    on_stream = bool(q_latent) or any(_latent_axes((f,), tokens) for f in found.outer)
    if not on_stream:
        return "other"
    if not q_latent:
        return _degenerate(found, tokens)
    if not k_latent:
        return "cross"
    if _has_other_tokens(found.query, tokens) or _has_other_tokens(found.key, tokens):
        return "joint"
    if tokens.time is None:
        covers = set(tokens.space) <= q_latent and not _latent_space(found.outer, tokens)
        return "full" if covers else "spatial"
    if q_latent == {tokens.time}:
        return "temporal"
    return "full" if tokens.time in q_latent else "spatial"


def _degenerate(found: _Found, tokens: TokenAxes) -> str:
    """A query whose sequence names no latent axis although its batch does."""
    reasons = [f.reason for f in (*found.query, *found.key) if f.reason]
    if reasons:
        raise ValueError(
            f"attention {found.node.name} ({module_path(found.node)}): cannot tell its kind, since "
            f"{reasons[0]}; state it with kinds={{{module_path(found.node)!r}: 'spatial'}} "
            f"(one of {KINDS})"
        )
    return "other"


def _latent_axes(product: tuple[Factor, ...], tokens: TokenAxes) -> set[Axis]:
    named = {axis for factor in product for axis in factor.axes()}
    return named & {*tokens.space, *([tokens.time] if tokens.time else [])}


def _latent_space(product: tuple[Factor, ...], tokens: TokenAxes) -> set[Axis]:
    return {axis for axis in _latent_axes(product, tokens) if axis in tokens.space}


def _has_other_tokens(product: tuple[Factor, ...], tokens: TokenAxes) -> bool:
    """Whether some part of a joined sequence is not made of latent tokens."""
    return any(
        not _latent_axes(part, tokens)
        for factor in product
        if factor.parts
        for part in factor.parts
    )
