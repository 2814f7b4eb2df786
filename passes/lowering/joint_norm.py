"""Matches concatenated norms, which :mod:`pabc.kernels.joint_norm` computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ..ir import GETITEM, aten, is_call, value
from .match import Match, insert, only_user, replace
from .norms import Norm, find_norm
from .residual_norm import ResidualNorm, find_with_sum, why_not
from .residuals import insert_gate

KERNEL = "joint_norm"


def match_joint_norm(node: Node) -> Match | None:
    """Matches a concatenation of norms, as of text and latents.

    # before                                           # after
    %a = layer_norm(%text) * (1 + %s0) + %t0           %c = pabc.joint_norm([%text, %latents], ...)
    %b = layer_norm(%latents) * (1 + %s1) + %t1
    %c = cat([%a, %b], 1)
    """
    if not is_call(node, (aten.cat.default,)) or node.kwargs:
        return None
    tensors, dim = (*node.args, 0)[:2]
    dim %= value(node).ndim
    parts = [_find_part(part, node) for part in tensors]
    norms = [part for part in parts if part is not None]
    if len(norms) < len(parts) or dim == value(node).ndim - 1 or not _fit(norms):
        return None
    before = min([node, *(part.before for part in norms if part.before is not part.n)])
    if not all(read < before for part in norms for read in part.reads):
        return None
    covers = tuple(n for part in norms for n in part.nodes)
    return Match(KERNEL, _shape(norms), None, lambda: _rewrite(node, dim, norms, before), covers)


def _find_part(part: Node, user: Node) -> ResidualNorm | None:
    norm = find_norm(part) if only_user(part) is user else None
    return None if norm is None else find_with_sum(part, norm)


def _norm(part: ResidualNorm) -> Norm:
    assert part.norm is not None
    return part.norm


def _fit(parts: Sequence[ResidualNorm]) -> bool:
    """Returns True if the kernel can compute each of the norms, and all of them in one call."""
    sums = [part for part in parts if part.y is not None]
    norms = {(_norm(part).kind, _norm(part).eps, value(part.n).dtype) for part in parts if part.n}
    return (
        len(norms) == 1
        and all(why_not(part) is None for part in parts)
        and all(value(part.y).is_contiguous() for part in sums if part.y)
        and all(value(part.y).dtype == value(part.x).dtype for part in sums if part.y)
    )


def _shape(parts: Sequence[ResidualNorm]) -> tuple[int, int, int]:
    """Returns rows, channels, and bytes per element of all parts, on average."""
    rows = sum(part.shape[0] for part in parts)
    nbytes = sum(part.shape[0] * part.shape[2] for part in parts)
    return rows, parts[0].shape[1], round(nbytes / rows)


def _rewrite(node: Node, dim: int, parts: Sequence[ResidualNorm], before: Node) -> None:
    from pabc.kernels.joint_norm import OP

    terms = [term for part in parts for term in part.terms]
    norms = [_norm(part) for part in parts]
    after: list[list[Any]] = [
        [getattr(norm, name) for norm in norms]
        for name in ("weight", "bias", "scale", "shift", "offset")
    ]
    call = insert(
        before,
        OP,
        [part.x for part in parts],
        [term.cut for term in terms] or None,
        [term.cut_scale for term in terms] or None,
        [insert_gate(before, term) for term in terms] or None,
        [float(term.factor) for term in terms] or None,
        [len(part.terms) for part in parts],
        norms[0].kind,
        *after,
        norms[0].eps,
        dim=dim,
        writes_y=[part.y is not None for part in parts],
        dtype=value(node).dtype,
    )
    made = [*(part.y for part in parts if part.y is not None), node]
    for i, each in enumerate(made):
        replace(each, insert(before, GETITEM, call, i))
