"""Matches attention over short sequences, which :mod:`pabc.kernels.short_attention` computes.

The kernel also computes the RMS norm and the rotary embedding of queries and keys. These are
followed backwards from attention, as far as queries and keys are treated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.fx import Node

from ..ir import aten, value
from .match import Match, first_reason, insert, replace
from .order import without_order
from .rms import RmsNorm, find_rms_norm, without_casts
from .rotary import RotaryEmbedding, find_rotary
from .sdpa import SdpaCall, find_sdpa


def match_short_attention(node: Node) -> Match | None:
    """Matches attention of few queries to few keys.

    # before                                           # after
    %n = rms_norm(%q, %w)
    %o = scaled_dot_product_attention(%n, %k, %v)      %o = pabc.short_attention(%q, %k, %v, %w)
    """
    call = find_sdpa(node)
    if call is None:
        return None
    return Match("short_attention", call.shape, _why_not(call), partial(_rewrite, call))


def _why_not(call: SdpaCall) -> str | None:
    from pabc.kernels.short_attention import MAX_LENGTH

    q, k, _ = call.vals
    length = max(q.shape[-2], k.shape[-2])
    reason = f"{length} tokens: at most {MAX_LENGTH}"
    return first_reason({reason: length > MAX_LENGTH, **call.reasons()})


def _rewrite(call: SdpaCall) -> None:
    from pabc.kernels.short_attention import OP

    node = call.node
    q, k = _find_inputs(call)
    norms = [None if x.norm is None else _insert_weight(node, x.norm) for x in (q, k)]
    tables = [None, None] if q.rotary is None else [q.rotary.cos, q.rotary.sin]
    result = insert(
        node,
        OP,
        *(_insert_ordered(node, x) for x in (q, k)),
        call.value,
        call.insert_mask(),
        *norms,
        *(None if table is None else table.insert(node) for table in tables),
        call.scale,
        1e-6 if q.norm is None else q.norm.eps,
        "none" if q.rotary is None else q.rotary.pairs,
    )
    replace(node, result)


def _insert_weight(before: Node, norm: RmsNorm) -> Node:
    if norm.weight is not None:
        return norm.weight
    return insert(before, aten.new_ones.default, norm.source, [value(norm.source).shape[-1]])


def _insert_ordered(before: Node, x: _KernelInput) -> Node:
    if x.order == tuple(range(len(x.order))):
        return x.source
    return insert(before, aten.permute.default, x.source, list(x.order))


@dataclass(frozen=True, slots=True)
class _KernelInput:
    """Queries or keys as the kernel may read them, with the norm and the embedding it then applies.

    Attributes:
        order: which dimensions of `source` are (N, H, T, D).
        tables_order: the same for the operand of the rotary embedding.
    """

    source: Node
    order: tuple[int, ...]
    norm: RmsNorm | None = None
    rotary: RotaryEmbedding | None = None
    tables_order: tuple[int, ...] = ()


def _find_inputs(call: SdpaCall) -> tuple[_KernelInput, _KernelInput]:
    """Returns queries and keys as far back as the kernel can do what is done to both."""
    levels = zip(_find_levels(call.query), _find_levels(call.key), strict=False)
    return [(q, k) for q, k in levels if _are_alike(q, k, call)][-1]


def _find_levels(node: Node) -> list[_KernelInput]:
    """Returns what attention reads, then that before the embedding, then that before the norm."""
    levels = [_KernelInput(node, tuple(range(value(node).ndim)))]
    source, order = without_order(node, levels[0].order)
    rotary = find_rotary(source)
    if rotary is not None:
        levels.append(_KernelInput(_of_dtype(rotary.source, node), order, None, rotary, order))
        source, order = without_order(rotary.source, order)
    norm = find_rms_norm(source)
    if norm is not None:
        last = levels[-1]
        levels.append(
            _KernelInput(_of_dtype(norm.source, node), order, norm, last.rotary, last.tables_order)
        )
    return levels


def _of_dtype(source: Node, wanted: Node) -> Node:
    """Returns what `source` is a cast of, if that has the dtype of `wanted`; else `source`."""
    before = without_casts(source)
    return before if value(before).dtype == value(wanted).dtype else source


def _are_alike(q: _KernelInput, k: _KernelInput, call: SdpaCall) -> bool:
    """Returns True if queries and keys have equal norms, embeddings, and the dtype of the call."""
    dtype = value(call.query).dtype
    if {value(x.source).dtype for x in (q, k)} != {dtype}:
        return False
    if (q.norm and q.norm.eps) != (k.norm and k.norm.eps):
        return False
    if q.rotary is None or k.rotary is None:
        return q.rotary is k.rotary
    if q.rotary.pairs != k.rotary.pairs:
        return False
    are_equal = q.rotary.cos.equals(k.rotary.cos) and q.rotary.sin.equals(k.rotary.sin)
    return are_equal and all(_is_by_token(x, call) for x in (q, k))


def _is_by_token(x: _KernelInput, call: SdpaCall) -> bool:
    """Returns True if the tables of the embedding vary along the tokens of a sequence."""
    assert x.rotary is not None
    length = call.vals[0].shape[2]
    dims = [table.tokens for table in (x.rotary.cos, x.rotary.sin)]
    return all(length == 1 if d is None else x.tables_order.index(d) == 2 for d in dims)
