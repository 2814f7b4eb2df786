"""Matches cross attention to short text, which :mod:`pabc.kernels.text_attention` computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..ir import aten, is_call, value
from .match import Match, first_reason, insert, replace
from .order import without_order
from .sdpa import SdpaCall, find_sdpa


def match_text_attention(node: Node) -> Match | None:
    """Matches attention to few keys. Where frames share a text, its copies are left out.

    # before                                           # after
    %r = expand(%k, [2, 16, S, H, D]), as 32 rows
    %o = scaled_dot_product_attention(%q, %r, ...)     %o = pabc.text_attention(%q, %k, ...)
    """
    call = find_sdpa(node)
    if call is None:
        return None
    return Match("text_attention", call.shape, _why_not(call), lambda: _rewrite(call))


def _why_not(call: SdpaCall) -> str | None:
    from pabc.kernels.gpus import target_of
    from pabc.kernels.text_attention import fits

    q, k, _ = call.vals
    others = first_reason(call.reasons())
    if others is not None:
        return others
    S, D = k.shape[-2:]
    if not fits(S, D, k.element_size(), target_of(q.device)):
        return f"{S} keys of {D} channels: more than stays on the chip"
    return None


def _rewrite(call: SdpaCall) -> None:
    from pabc.kernels.text_attention import OP

    k, v = (_find_repeated(x) for x in (call.key, call.value))
    keys, values = call.key, call.value
    if k is not None and v is not None and k.repeats == v.repeats:
        keys, values = k.insert(call.node), v.insert(call.node)
    tensors = (call.query, keys, values, call.insert_mask())
    replace(call.node, insert(call.node, OP, *tensors, None, call.scale))


@dataclass(frozen=True, slots=True)
class _Repeated:
    """Keys or values that repeat each row of `source`.

    Attributes:
        order: which dimensions of `source` are (M, repeats, H, S, D); that of repeats has size 1.
        repeats: how often each row is repeated.
    """

    source: Node
    order: tuple[int, ...]
    repeats: int

    def insert(self, before: Node) -> Node:
        """Inserts the rows, each once, (M, H, S, D), before a node and returns them."""
        once = insert(before, aten.permute.default, self.source, list(self.order))
        return insert(before, aten.select.int, once, 1, 0)


def _find_repeated(node: Node) -> _Repeated | None:
    """Returns what `view(permute(clone(expand(x))))` repeats; clone and permutes may be missing."""
    if not is_call(node, (aten.view.default, aten._unsafe_view.default)):
        return None
    inner = node.args[0]
    assert isinstance(inner, Node)
    shape = value(inner).shape
    if len(shape) != 5 or shape[2:] != value(node).shape[1:]:
        return None
    copied, order = without_order(inner, tuple(range(5)))
    if is_call(copied, (aten.clone.default,)):
        copied, order = without_order(copied.args[0], order)
    if not is_call(copied, (aten.expand.default,)):
        return None
    source = copied.args[0]
    assert isinstance(source, Node)
    once = [*value(copied).shape]
    once[order[1]] = 1
    return _Repeated(source, order, shape[1]) if [*value(source).shape] == once else None
