"""Matches attention of any length, which :mod:`pabc.kernels.attention` computes."""

from __future__ import annotations

from torch.fx import Node

from .match import Match, first_reason, insert, replace
from .sdpa import SdpaCall, find_sdpa


def match_attention(node: Node) -> Match | None:
    """Matches any attention.

    # before                                           # after
    %o = scaled_dot_product_attention(%q, %k, %v)      %o = pabc.attention(%q, %k, %v)
    """
    call = find_sdpa(node)
    if call is None:
        return None
    return Match("attention", call.shape, first_reason(call.reasons()), lambda: _rewrite(call))


def _rewrite(call: SdpaCall) -> None:
    from pabc.kernels.attention import OP

    tensors = (call.query, call.key, call.value, call.insert_mask())
    replace(call.node, insert(call.node, OP, *tensors, None, call.scale))
