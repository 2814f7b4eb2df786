"""Attention over short sequences, which `pabc.kernels.short_attention` computes, with the norm and
the rotary embedding of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.fx import Node

from ..ir import aten, value
from .match import Match, first_reason, insert, replace
from .order import without_order
from .rms import RmsNorm, find_rms_norm, without_casts
from .rotary import Rotary, find_rotary
from .sdpa import Attention, find_attention


def match_short_attention(node: Node) -> Match | None:
    """Attention of few queries and keys.

    # before                                           # after
    %n = rms_norm(%q, %w)
    %o = scaled_dot_product_attention(%n, %k, %v)      %o = pabc.short_attention(%q, %k, %v, %w)
    """
    found = find_attention(node)
    if found is None:
        return None
    reason = _why_not(found)
    return Match("short_attention", found.shape, reason, partial(_rewrite, found))


def _why_not(found: Attention) -> str | None:
    from pabc.kernels.short_attention import MAX_LENGTH

    q, k, _ = found.vals
    length = max(q.shape[-2], k.shape[-2])
    reason = f"{length} tokens: at most {MAX_LENGTH}"
    return first_reason({reason: length > MAX_LENGTH, **found.reasons()})


def _rewrite(found: Attention) -> None:
    from pabc.kernels.short_attention import OP

    node = found.node
    q, k = _prepared(found)
    norms = [None if x.norm is None else _weight(node, x.norm) for x in (q, k)]
    tables = [None, None] if q.rotary is None else [q.rotary.cos, q.rotary.sin]
    call = insert(
        node,
        OP,
        *(_ordered(node, x) for x in (q, k)),
        found.value,
        found.mask_of_4(),
        *norms,
        *(None if table is None else table.insert(node) for table in tables),
        found.scale,
        1e-6 if q.norm is None else q.norm.eps,
        "none" if q.rotary is None else q.rotary.pairs,
    )
    replace(node, call)


def _weight(before: Node, norm: RmsNorm) -> Node:
    if norm.weight is not None:
        return norm.weight
    return insert(before, aten.new_ones.default, norm.source, [value(norm.source).shape[-1]])


def _ordered(before: Node, x: _Prepared) -> Node:
    if x.order == tuple(range(len(x.order))):
        return x.source
    return insert(before, aten.permute.default, x.source, list(x.order))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Queries or keys before they are normalized, and then turned.

    `order`: the dimensions of `source` that are (N, H, T, D); `tables_order`: those of what is
    turned.
    """

    source: Node
    order: tuple[int, ...]
    norm: RmsNorm | None = None
    rotary: Rotary | None = None
    tables_order: tuple[int, ...] = ()


def _prepared(found: Attention) -> tuple[_Prepared, _Prepared]:
    """Queries and keys as far back as what is done to both is what the kernel does."""
    levels = zip(_levels(found.query), _levels(found.key), strict=False)
    return [(q, k) for q, k in levels if _are_alike(q, k, found)][-1]


def _levels(node: Node) -> list[_Prepared]:
    """From what attention reads to what is neither normalized nor turned."""
    levels = [_Prepared(node, tuple(range(value(node).ndim)))]
    source, order = without_order(node, levels[0].order)
    rotary = find_rotary(source)
    if rotary is not None:
        levels.append(_Prepared(_of_dtype(rotary.source, node), order, None, rotary, order))
        source, order = without_order(rotary.source, order)
    norm = find_rms_norm(source)
    if norm is not None:
        last = levels[-1]
        levels.append(
            _Prepared(_of_dtype(norm.source, node), order, norm, last.rotary, last.tables_order)
        )
    return levels


def _of_dtype(source: Node, wanted: Node) -> Node:
    before = without_casts(source)
    return before if value(before).dtype == value(wanted).dtype else source


def _are_alike(q: _Prepared, k: _Prepared, found: Attention) -> bool:
    """Whether the kernel does the same to both, and to values of their dtype."""
    dtype = value(found.query).dtype
    if {value(x.source).dtype for x in (q, k)} != {dtype}:
        return False
    if (q.norm and q.norm.eps) != (k.norm and k.norm.eps):
        return False
    if q.rotary is None or k.rotary is None:
        return q.rotary is k.rotary
    if q.rotary.pairs != k.rotary.pairs:
        return False
    are_equal = q.rotary.cos.equals(k.rotary.cos) and q.rotary.sin.equals(k.rotary.sin)
    return are_equal and all(_is_by_token(x, found) for x in (q, k))


def _is_by_token(x: _Prepared, found: Attention) -> bool:
    """Whether tables differ along the tokens of a sequence."""
    assert x.rotary is not None
    length = found.vals[0].shape[2]
    dims = [table.tokens for table in (x.rotary.cos, x.rotary.sin)]
    return all(length == 1 if d is None else x.tables_order.index(d) == 2 for d in dims)
