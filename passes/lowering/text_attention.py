"""Cross attention to short text, which `pabc.kernels.text_attention` computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..ir import aten, is_call, value
from .match import Match, first_reason, insert, replace
from .order import without_order
from .sdpa import Attention, find_attention


def match_text_attention(node: Node) -> Match | None:
    """Attention to few keys; where frames share them, each text is read once for all of them.

    # before                                           # after
    %r = expand(%k, [2, 16, S, H, D]), as 32 rows
    %o = scaled_dot_product_attention(%q, %r, ...)     %o = pabc.text_attention(%q, %k, ...)
    """
    found = find_attention(node)
    if found is None:
        return None
    return Match("text_attention", found.shape, _why_not(found), lambda: _rewrite(found))


def _why_not(found: Attention) -> str | None:
    from pabc.kernels.gpus import target_of
    from pabc.kernels.text_attention import fits

    q, k, _ = found.vals
    others = first_reason(found.reasons())
    if others is not None:
        return others
    S, D = k.shape[-2:]
    if not fits(S, D, k.element_size(), target_of(q.device)):
        return f"{S} keys of {D} channels: more than stays on the chip"
    return None


def _rewrite(found: Attention) -> None:
    from pabc.kernels.text_attention import OP

    k, v = (_find_repeated(x) for x in (found.key, found.value))
    keys, values = found.key, found.value
    if k is not None and v is not None and k.repeats == v.repeats:
        keys, values = k.insert(found.node), v.insert(found.node)
    tensors = (found.query, keys, values, found.mask_of_4())
    replace(found.node, insert(found.node, OP, *tensors, None, found.scale))


@dataclass(frozen=True, slots=True)
class _Repeated:
    """Keys or values whose rows are those of `source`, each so many times.

    `order`: the dimensions of `source` that are (M, repeats, H, S, D); that of repeats is 1.
    """

    source: Node
    order: tuple[int, ...]
    repeats: int

    def insert(self, before: Node) -> Node:
        """Writes (M, H, S, D) before a node."""
        once = insert(before, aten.permute.default, self.source, list(self.order))
        return insert(before, aten.select.int, once, 1, 0)


def _find_repeated(node: Node) -> _Repeated | None:
    """Looks through the copy that repeats rows: view(permute(clone(expand(x))))."""
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
