"""Attention of any length, which `pabc.kernels.attention` computes."""

from __future__ import annotations

from torch.fx import Node

from .match import Match, first_reason, insert, replace
from .sdpa import Attention, find_attention


def match_attention(node: Node) -> Match | None:
    """Attention of any queries and keys.

    # before                                           # after
    %o = scaled_dot_product_attention(%q, %k, %v)      %o = pabc.attention(%q, %k, %v)
    """
    found = find_attention(node)
    if found is None:
        return None
    return Match("attention", found.shape, first_reason(found.reasons()), lambda: _rewrite(found))


def _rewrite(found: Attention) -> None:
    from pabc.kernels.attention import OP

    tensors = (found.query, found.key, found.value, found.mask_of_4())
    replace(found.node, insert(found.node, OP, *tensors, None, found.scale))
