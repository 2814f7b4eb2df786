"""Attention over short sequences, which `pabc.kernels.short_attention` computes."""

from __future__ import annotations

from torch.fx import Node

from .match import Match, first_reason, insert, replace
from .sdpa import Attention, find_attention


def match_short_attention(node: Node) -> Match | None:
    """Attention of few queries and keys.

    # before                                           # after
    %o = scaled_dot_product_attention(%q, %k, %v)      %o = pabc.short_attention(%q, %k, %v)
    """
    found = find_attention(node)
    if found is None:
        return None
    return Match("short_attention", found.shape, _why_not(found), lambda: _rewrite(found))


def _why_not(found: Attention) -> str | None:
    from pabc.kernels.short_attention import MAX_HEAD_DIM, MAX_LENGTH

    q, k, _ = found.vals
    length, head_dim = max(q.shape[-2], k.shape[-2]), q.shape[-1]
    reasons = {
        f"{length} tokens: at most {MAX_LENGTH}": length > MAX_LENGTH,
        f"head dim {head_dim}: at most {MAX_HEAD_DIM}": head_dim > MAX_HEAD_DIM,
    }
    return first_reason({**reasons, **found.reasons()})


def _rewrite(found: Attention) -> None:
    from pabc.kernels.short_attention import OP

    tensors = (found.query, found.key, found.value, found.mask_of_4())
    call = insert(found.node, OP, *tensors, None, None, None, None, found.scale)
    replace(found.node, call)
