"""kinds: names the kind of an attention from the denoised axes in its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from .ir import (
    Axis,
    Factor,
    module_path,
    user_inputs,
    value,
)
from .provenance.factors import is_named, length


@dataclass(frozen=True)
class FoundAttention:
    """An attention's output node and the factors of its query and key sequence dimensions.

    `features` are the factors of the dimension that the scores sum over, `outer` those of the
    query's other dimensions. `query_on_latents`, `key_on_latents`: the operand is computed from a
    denoised input. `packed`: several sequences share one dimension, and only tensor data tells
    them apart. `linear`: keys are multiplied with values first.
    """

    node: Node
    query: tuple[Factor, ...]
    key: tuple[Factor, ...]
    features: tuple[Factor, ...]
    outer: tuple[Factor, ...]
    query_on_latents: bool
    key_on_latents: bool
    packed: bool = False
    linear: bool = False


@dataclass(frozen=True)
class TokenAxes:
    """The token axes of a denoised stream: the one of the frames, and those within a frame."""

    stream: str
    time: Axis | None
    space: tuple[Axis, ...]


def find_token_axes(gm: GraphModule, found: list[FoundAttention], stream: str) -> TokenAxes:
    """Returns a stream's token axes: all of its axes except the batch and the channels.

    If there are three, the first is time (B, C, T, H, W and B, T, C, H, W both occur); if there are
    fewer, all lie within a frame. The first axis is the batch, unless some attention mixes only
    positions along it: then it counts frames (B*T, C, H, W), or tokens if there is no other token
    axis (N, C and N, B, C).
    """
    rank = next(value(n).ndim for n in user_inputs(gm.graph) if n.name == stream)
    mixed = [_dims_of(attention.query, stream) for attention in found]
    others = [f.outer if is_named(f.query) else (*f.outer, *f.features) for f in found]
    seen = set().union(*mixed, *(_dims_of(product, stream) for product in others)) - {0}
    rest = [dim for dim in range(1, rank) if dim in seen]
    if rank == 5 and len(rest) != 3:
        rest = [d for d in range(1, 5) if d != (1 if 1 not in seen else 2)]
    axes = [Axis(stream, dim) for dim in rest]
    time = axes[0] if len(axes) == 3 else None
    if time is None and {0} in mixed:
        first = Axis(stream, 0)
        if not any(dims - {0} for dims in mixed) and rank < 4:
            return TokenAxes(stream, None, (first,))
        time = first
    return TokenAxes(stream, time, tuple(a for a in axes if a != time))


def _dims_of(product: tuple[Factor, ...], source: str) -> set[int]:
    return {axis.dim for factor in product for axis in factor.axes() if axis.source == source}


def name_kind(found: FoundAttention, streams: Sequence[TokenAxes]) -> str:
    """Returns the kind of an attention, from the axes of Q and K alone.

    Raises: ValueError if Q or K is computed from a denoised input and the axes of its sequence are
    unknown.
    """
    query = found.key if _is_one_of_many(found, streams) else found.query
    queries = [t for t in streams if _known_token_axes(found, query, t)]
    keys = [t for t in streams if _known_token_axes(found, found.key, t)]
    if not queries:
        _check_other(found, streams)
        return "other"
    if not keys and found.key_on_latents:
        _check_known(found, found.key, (*_kinds_within(streams), "joint", "cross"))
    tokens = next((t for t in queries if t in keys), None)
    if tokens is None:
        return "cross"
    others = _has_other_tokens(found.query, tokens) or _has_other_tokens(found.key, tokens)
    if found.packed:
        possible = (*_kinds_within([tokens]), *(["joint"] if others else []))
        raise undecided(
            found,
            "its sequences are packed into one, and only the data says which tokens share a "
            "sequence",
            possible,
        )
    if others:
        return "joint"
    if tokens.time is None:
        covers = max(_token_sizes(found.outer, tokens).values(), default=1) == 1
        return "full" if covers else "spatial"
    mixed = _known_token_axes(found, query, tokens)
    if mixed == {tokens.time}:
        return "temporal"
    return "full" if tokens.time in mixed else "spatial"


def _is_one_of_many(found: FoundAttention, streams: Sequence[TokenAxes]) -> bool:
    """Returns True if each latent token is the only query of its own sequence.

    Neighborhood attention is such a case: the keys are the token's neighbors.
    """
    if length(found.query) > 1 or any(factor.reason for factor in found.query):
        return False
    if any(_known_token_axes(found, found.query, tokens) for tokens in streams):
        return False
    sizes = (size for tokens in streams for size in _token_sizes(found.outer, tokens).values())
    return max(sizes, default=1) > 1


def _known_token_axes(
    found: FoundAttention, product: tuple[Factor, ...], tokens: TokenAxes
) -> set[Axis]:
    """Returns the token axes of a stream that a sequence contains.

    An axis with one position in the sequence, and the others in the batch, does not count.
    """
    outer = _token_sizes(found.outer, tokens)
    sizes = _token_sizes(product, tokens)
    return {axis for axis, size in sizes.items() if size > 1 or outer.get(axis, 1) == 1}


def _check_other(found: FoundAttention, streams: Sequence[TokenAxes]) -> None:
    """Raises ValueError unless the query is known to contain no denoised tokens.

    Such queries are tokens of a condition, learned tokens, a pooled token, or channels (where the
    scores sum over tokens).
    """
    if not found.query_on_latents or any(_token_sizes(found.features, t) for t in streams):
        return
    possible = _kinds_of_lost_query(found, streams)
    _check_known(found, found.query, possible)
    learned = all(factor.learned for factor in found.query)
    if not learned and not is_named(found.query) and length(found.query) > 1:
        reason = "its queries follow from the latents and lie along no axis of an input"
        raise undecided(found, reason, possible)


def _check_known(
    found: FoundAttention, product: tuple[Factor, ...], possible: Sequence[str]
) -> None:
    """Raises ValueError if an op on the latents has lost the axes of a sequence."""
    if reason := next((factor.reason for factor in product if factor.reason), ""):
        raise undecided(found, reason, possible)


def _kinds_within(streams: Sequence[TokenAxes]) -> tuple[str, ...]:
    """Returns the kinds that attention among the tokens of one stream may have."""
    times = any(tokens.time is not None for tokens in streams)
    return ("spatial", "temporal", "full") if times else ("spatial", "full")


def _kinds_of_lost_query(found: FoundAttention, streams: Sequence[TokenAxes]) -> tuple[str, ...]:
    if not found.key_on_latents:
        return ("cross", "other")
    keys = [tokens for tokens in streams if _known_token_axes(found, found.key, tokens)]
    lost = any(factor.reason for factor in found.key)
    if not keys and not lost:
        return ("cross", "other")
    crosses = lost or len(streams) > 1
    within = _kinds_within(keys or streams)
    return (*within, "joint", *(["cross"] if crosses else []), "other")


def undecided(found: FoundAttention, reason: str, possible: Sequence[str]) -> ValueError:
    """Returns an error that asks the user to state one of the possible kinds."""
    path = module_path(found.node)
    name = f"{found.node.name} ({path})" if path else found.node.name
    return ValueError(
        f"attention {name}: cannot tell its kind, since {reason}; state it with "
        f"kinds={{{name_in_kinds(found)!r}: {possible[0]!r}}} (one of {tuple(possible)})"
    )


def name_in_kinds(found: FoundAttention) -> str:
    """Returns the name that patterns of `kinds` match: an attention's module path.

    For an attention in the model's own forward, it is the name of the node.
    """
    return module_path(found.node) or found.node.name


def _token_sizes(product: tuple[Factor, ...], tokens: TokenAxes) -> dict[Axis, int]:
    """Returns the number of positions along each of a stream's token axes in a dimension."""
    known = {*tokens.space, *([tokens.time] if tokens.time else [])}
    sizes: dict[Axis, int] = {}
    for factor in product:
        for axis in factor.axes():
            if axis in known:
                sizes[axis] = sizes.get(axis, 1) * factor.size
    return sizes


def _has_other_tokens(product: tuple[Factor, ...], tokens: TokenAxes) -> bool:
    """Returns True if a part of a concatenated sequence has tokens of another input.

    Learned tokens are of no input.
    """
    return any(
        not _token_sizes(part, tokens) and not all(inner.learned for inner in part)
        for factor in product
        if factor.parts
        for part in factor.parts
    )
