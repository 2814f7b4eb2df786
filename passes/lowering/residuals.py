"""Sums that end residual branches: the residual stream plus cuts times their gates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from pabc.kernels.dtypes import FP8

from ..ir import aten, is_tensor, value
from .match import only_user, operands
from .norms import cast_source, exact_source, pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class SumTerm:
    """One term of a sum: `factor * gate * cut`.

    Attributes:
        cut_scale: the scales of the rows of a cut in fp8; None for other cuts.
        nodes: the nodes that compute the term and have no other use.
    """

    cut: Node
    cut_scale: Node | None = None
    gate: Node | None = None
    factor: float = 1.0
    nodes: tuple[Node, ...] = ()

    @property
    def is_product(self) -> bool:
        """True if the term is more than a cut."""
        return bool(self.gate or self.cut_scale) or self.factor != 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """The sum of `x` and of terms.

    Attributes:
        path: the node that adds the last term, and its casts, up to the node that was asked for.
        nodes: the nodes before `path` that compute it and have no other use.
    """

    x: Node
    terms: tuple[SumTerm, ...]
    path: tuple[Node, ...]
    nodes: tuple[Node, ...]


def find_sum(node: Node, room: int) -> Sum | None:
    """Returns the sum, of up to `room` terms, that a node computes or casts; None for other nodes.

    # before                                           # found
    %c = mul(_to_copy(%values, float32), %scale)       Sum(x=%x, terms=(SumTerm(cut=%values,
    %t = mul(%gate, %c)                                    cut_scale=%scale, gate=%gate)))
    %y = add(%t, %x)
    """
    path = [node]
    while (source := cast_source(path[-1])) is not None:
        path.append(source)
    total = _collect(path[-1], room)
    return None if total is None else replace(total, path=tuple(reversed(path)))


def _collect(node: Node, room: int) -> Sum | None:
    chosen = _choose(node) if room else None
    if chosen is None:
        return None
    term, stream = chosen
    own = Sum(x=exact_source(stream), terms=(term,), path=(node,), nodes=term.nodes)
    casts = _lone_casts(stream, node)
    inner = _collect(casts[-1], room - 1) if casts else None
    if inner is None:
        return own
    nodes = (*inner.nodes, *casts, *own.nodes)
    return replace(own, x=inner.x, terms=(*inner.terms, term), nodes=nodes)


def _choose(node: Node) -> tuple[SumTerm, Node] | None:
    """Decides which operand of a sum is the term and which is the stream.

    The term is the product. If both operands are products, or none is, the stream is the one that
    is a sum itself.
    """
    both = pairs(node, aten.add.Tensor)
    if not both or not value(node).is_floating_point():
        return None
    if any(value(x).shape != value(node).shape for x in both[0]):
        return None
    ranked = [(_find_term(term, node), stream, _is_lone_sum(stream, node)) for stream, term in both]
    term, stream, _ = max(ranked, key=lambda each: (each[0].is_product, each[2]))
    return term, stream


def _is_lone_sum(node: Node, user: Node) -> bool:
    casts = _lone_casts(node, user)
    return bool(casts and pairs(casts[-1], aten.add.Tensor))


def _lone_casts(node: Node, user: Node) -> list[Node]:
    """Returns a node and what it casts, in turn; empty if one of these has another user."""
    casts: list[Node] = []
    source: Node | None = node
    while source is not None:
        if only_user(source) is not user:
            return []
        casts.append(source)
        user, source = source, cast_source(source)
    return casts


def _find_term(node: Node, user: Node) -> SumTerm:
    """Returns the term that a node is: the factors of a product, else a cut alone."""
    plain = SumTerm(cut=exact_source(node))
    casts = _lone_casts(node, user)
    given = operands(casts[-1], aten.mul.Tensor) if casts else None
    if given is None or len(given) != 2:
        return plain
    decoded = _find_decoded(node, user)
    if decoded is not None:
        return decoded
    if isinstance(given[1], (int, float)) and is_tensor(given[0]):
        inner = _find_term(given[0], casts[-1])
        factor = inner.factor * given[1]
        return replace(inner, factor=factor, nodes=(*inner.nodes, *reversed(casts)))
    for gate, cut in pairs(casts[-1], aten.mul.Tensor):
        if value(gate).numel() < value(cut).numel() and value(cut).shape == value(node).shape:
            inner = _find_decoded(cut, casts[-1]) or SumTerm(cut=exact_source(cut))
            nodes = (*inner.nodes, *reversed(casts))
            return replace(inner, gate=exact_source(gate), nodes=nodes)
    return plain


def _find_decoded(node: Node, user: Node) -> SumTerm | None:
    """Returns the term of a cut in fp8: values cast to float32, times a scale for each row."""
    casts = _lone_casts(node, user)
    for wide, scale in pairs(casts[-1], aten.mul.Tensor) if casts else []:
        values = cast_source(wide)
        if values is None or value(values).dtype != FP8 or value(wide).dtype != torch.float32:
            continue
        fits = value(scale).shape[-1:] == (1,) and value(values).shape == value(node).shape
        if fits and only_user(wide) is casts[-1]:
            return SumTerm(cut=values, cut_scale=scale, nodes=(wide, *reversed(casts)))
    return None
