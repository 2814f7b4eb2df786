"""Matches residual adds with the norm after them.

:mod:`pabc.kernels.residual_norm` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from pabc.kernels.dtypes import FLOATS, FP8

from ..ir import GETITEM, aten, value
from .copies import RowCopy, find_row_copy
from .match import Match, first_reason, insert, only_user, operands, steps
from .match import replace as substitute
from .norms import Norm, exact_source, find_norm
from .residuals import Sum, SumTerm, find_sum, insert_gate

KERNEL = "residual_norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualNorm:
    """A sum and the norm after it, as one call of the kernel; at most one of the two is missing.

    Attributes:
        x, terms: the operands of the sum; without terms, the norm is that of `x`.
        norm: None if there is only a sum.
        y: the node of the sum, if it has other users than the norm.
        n: the node at the end of the norm.
        before: where to insert the call: all that it reads is before this node, and no user of y
            or n is.
        nodes: the nodes that the kernel computes, y and n included.
        y_copy, n_copy: the copies of y and n to another order that the kernel makes, each the only
            use of its operand; both have the same split.
    """

    x: Node
    terms: tuple[SumTerm, ...]
    norm: Norm | None
    y: Node | None
    n: Node | None
    before: Node
    nodes: tuple[Node, ...]
    y_copy: RowCopy | None = None
    n_copy: RowCopy | None = None

    @property
    def copies(self) -> tuple[RowCopy, ...]:
        """The copies that the kernel makes."""
        return tuple(copy for copy in (self.y_copy, self.n_copy) if copy is not None)

    @property
    def reads(self) -> list[Node]:
        """All tensors that the kernel reads."""
        parts = [(t.cut, t.cut_scale, t.gate, t.weight) for t in self.terms]
        norm = self.norm
        after = () if norm is None else (norm.weight, norm.bias, norm.scale, norm.shift)
        return [n for n in (self.x, *(n for each in parts for n in each), *after) if n is not None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of rows, of channels, and of bytes read and written per element."""
        *rows, channels = value(self.x).shape
        whole = (self.x, *(term.cut for term in self.terms), self.y, self.n)
        return prod(rows), channels, sum(value(n).itemsize for n in whole if n is not None)

    def is_like_x(self, node: Node | None) -> bool:
        """Returns True if a result is laid out as `empty_like(x)`, and that is not contiguously."""
        if node is None or value(node).is_contiguous():
            return False
        return steps(value(node)) == steps(torch.empty_like(value(self.x)))


def match_residual_norm(node: Node) -> Match | None:
    """Matches a norm with the sum before it, a norm alone, or a sum that has a product in it.

    # before                                           # after
    %y = add(%x, mul(%gate, %cut))                     %y, %o = pabc.residual_norm(%x, [%cut],
    %n = layer_norm(%y, [C], None, None, eps)                [None], [%gate], [1.0], "layer",
    %o = add(mul(%n, add(%scale, 1)), %shift)                scale=%scale, shift=%shift, ...)
    """
    norm = find_norm(node)
    fused = _find_sum_alone(node) if norm is None else find_with_sum(node, norm)
    if fused is None:
        return None
    fused = _with_copies(fused)
    copied = [n for copy in fused.copies for n in copy.nodes]
    covers = tuple(n for n in (*reversed(copied), *fused.nodes) if n is not node)
    return Match(KERNEL, fused.shape, why_not(fused), lambda: _rewrite(fused), covers)


def _find_sum_alone(node: Node) -> ResidualNorm | None:
    """Returns the sum that ends in a node, if a term is a product and the stream is none."""
    from pabc.kernels.residual_norm import MAX_TERMS

    total = find_sum(node, MAX_TERMS)
    if total is None or not any(term.is_product for term in total.terms):
        return None
    if any(len(inner.users) > 1 for inner in total.path[:-1]) or _is_lone_product(total.x):
        return None
    nodes = (*total.nodes, *total.path)
    return ResidualNorm(
        x=total.x, terms=total.terms, norm=None, y=node, n=None, before=node, nodes=nodes
    )


def _is_lone_product(node: Node) -> bool:
    """Returns True for a product with one user: a sum of two such may be a rotary embedding."""
    return only_user(node) is not None and operands(node, aten.mul.Tensor) is not None


def find_with_sum(node: Node, norm: Norm) -> ResidualNorm:
    """Returns the norm that ends in a node with the sum before it, if one call can compute both."""
    from pabc.kernels.residual_norm import MAX_TERMS

    total = find_sum(norm.input, MAX_TERMS)
    together = None if total is None else _join(node, norm, total)
    if together is not None:
        return together
    x = exact_source(norm.input)
    return ResidualNorm(x=x, terms=(), norm=norm, y=None, n=node, before=node, nodes=norm.nodes)


def _join(node: Node, norm: Norm, total: Sum) -> ResidualNorm | None:
    """Returns a norm with the sum before it.

    None if the sum has users that come before an operand of the norm.
    """
    inner = {*total.path, *norm.nodes}
    y = _find_read(total.path, inner)
    after = total.path[total.path.index(y) + 1 :] if y is not None else ()
    kept = _find_kept(after, inner)
    users = [] if y is None else [n for n in y.users if n in kept or n not in inner]
    joined = ResidualNorm(
        x=total.x,
        terms=total.terms,
        norm=norm,
        y=y,
        n=node,
        before=min([node, *users]),
        nodes=(*total.nodes, *(n for n in total.path if n not in kept), *norm.nodes),
    )
    is_there = all(n < joined.before for n in joined.reads)
    return joined if is_there and _can_lay_out(joined) else None


def _find_read(path: tuple[Node, ...], inner: set[Node]) -> Node | None:
    """Returns the node of a path that the kernel must write for users outside of `inner`, if any.

    Of the sum and its casts, up to the first with such users, it is the one of the smallest dtype:
    what follows is cast from it.
    """
    for i, node in enumerate(path):
        if not inner.issuperset(node.users):
            return min(reversed(path[: i + 1]), key=lambda n: value(n).itemsize)
    return None


def _find_kept(path: tuple[Node, ...], inner: set[Node]) -> set[Node]:
    """Returns the casts of a sum that users outside of `inner` need, directly or by other casts."""
    kept: set[Node] = set()
    for node in reversed(path):
        if any(user in kept or user not in inner for user in node.users):
            kept.add(node)
    return kept


def _can_lay_out(fused: ResidualNorm) -> bool:
    return fused.y is None or value(fused.y).is_contiguous() or fused.is_like_x(fused.y)


def _with_copies(fused: ResidualNorm) -> ResidualNorm:
    """Adds the copies of its results to another order of rows, if the kernel can make them."""
    from pabc.kernels.rows import MAX_ROW_DIMS

    inner = set(fused.nodes)

    def find(node: Node | None) -> RowCopy | None:
        users = [] if node is None else [user for user in node.users if user not in inner]
        return find_row_copy(node, users[0]) if len(users) == 1 else None

    y_copy, n_copy = find(fused.y), find(fused.n)
    if y_copy is not None and n_copy is not None and y_copy.split != n_copy.split:
        y_copy = None
    longer = replace(fused, y_copy=y_copy, n_copy=n_copy)
    return longer if _count_dimensions(longer) <= MAX_ROW_DIMS else fused


def _count_dimensions(fused: ResidualNorm) -> int:
    """Returns the number of dimensions of rows, after merging."""
    from pabc.kernels.rows import merge_rows

    x, results = value(fused.x), []
    for node, copy in ((fused.y, fused.y_copy), (fused.n, fused.n_copy)):
        if copy is not None:
            made = torch.empty([copy.split[d] for d in copy.order], device="meta")
            results.append(made.permute([copy.order.index(d) for d in range(made.ndim)]))
        elif node is not None:
            format = torch.preserve_format if fused.is_like_x(node) else torch.contiguous_format
            results.append(torch.empty_like(x, memory_format=format))
    split = fused.copies[0].split if fused.copies else ()
    return len(merge_rows(x.shape, [*map(value, fused.reads), *results], split)[0])


def why_not(fused: ResidualNorm) -> str | None:
    """Returns why the kernel can't compute it; None if it can."""
    from pabc.kernels.rows import MAX_CHANNELS, MAX_ROW_DIMS

    made = [n for n in (fused.y, fused.n) if n is not None]
    cuts = [term.cut for term in fused.terms]
    vals = [value(n) for n in (*fused.reads, *made)]
    dtypes = {value(n).dtype for n in fused.reads if n not in cuts} | {value(n).dtype for n in made}
    dtypes |= {value(n).dtype for n in cuts} - {FP8}
    channels = value(fused.x).shape[-1]
    others = sorted(str(dtype) for dtype in dtypes.difference(FLOATS))
    num_rows = _count_dimensions(fused)
    return first_reason(
        {
            ", ".join(others): bool(others),
            f"{channels} channels: at most {MAX_CHANNELS}": channels > MAX_CHANNELS,
            f"{num_rows} dimensions of rows: at most {MAX_ROW_DIMS}": num_rows > MAX_ROW_DIMS,
            "more than one device": len({val.device for val in vals}) > 1,
            "an epsilon of its dtype": fused.norm is not None and fused.norm.eps is None,
        }
    )


def _rewrite(fused: ResidualNorm) -> None:
    from pabc.kernels.residual_norm import OP

    norm, terms = fused.norm, fused.terms
    call = insert(
        fused.before,
        OP,
        fused.x,
        [term.cut for term in terms] or None,
        [term.cut_scale for term in terms] or None,
        [insert_gate(fused.before, term) for term in terms] or None,
        [float(term.factor) for term in terms] or None,
        norm="none" if norm is None else norm.kind,
        **_find_keywords(fused),
    )
    results = ((fused.y, fused.y_copy), (fused.n, fused.n_copy))
    made = [(node, copy) for node, copy in results if node is not None]
    for i, (node, copy) in enumerate(made):
        by = insert(fused.before, GETITEM, call, i)
        substitute(node if copy is None else copy.nodes[-1], by)


def _find_keywords(fused: ResidualNorm) -> dict[str, Any]:
    """Returns the keywords of the call that say what follows the sum, and how to return results."""
    y, n, y_copy, n_copy = fused.y, fused.n, fused.y_copy, fused.n_copy
    keywords: dict[str, Any] = {
        "y_dtype": None if y is None else value(y).dtype,
        "n_dtype": None if n is None else value(n).dtype,
        "y_like_x": (y_copy is None and fused.is_like_x(y)) or None,
        "n_like_x": (n_copy is None and fused.is_like_x(n)) or None,
        "split": list(fused.copies[0].split) if fused.copies else None,
        "y_order": None if y_copy is None else list(y_copy.order),
        "n_order": None if n_copy is None else list(n_copy.order),
    }
    if fused.norm is not None:
        for name in ("weight", "bias", "scale", "shift", "offset", "eps"):
            keywords[name] = getattr(fused.norm, name)
    return {name: given for name, given in keywords.items() if given is not None}
