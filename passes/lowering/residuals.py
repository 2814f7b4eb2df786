"""Sums that end residual branches: the residual stream plus cuts times their gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from pabc.kernels.dtypes import FP8

from ..ir import aten, is_tensor, value
from .match import insert, only_user, operands
from .norms import cast_source, exact_source, pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class SumTerm:
    """One term of a sum: `factor * gate * weight * cut`.

    Attributes:
        cut_scale: the scales of the rows of a cut in fp8; None for other cuts.
        weight: the number by which a forecast multiplies the cut, a tensor; None: there is none.
        nodes: the nodes that compute the term and have no other use.
    """

    cut: Node
    cut_scale: Node | None = None
    gate: Node | None = None
    weight: Node | None = None
    factor: float = 1.0
    nodes: tuple[Node, ...] = ()

    @property
    def is_product(self) -> bool:
        """True if the term is more than a cut."""
        return bool(self.gate or self.weight or self.cut_scale) or self.factor != 1


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
    chosen = _choose(node, room) if room else None
    if chosen is None:
        return None
    terms, stream = chosen
    nodes = tuple(n for term in terms for n in term.nodes)
    own = Sum(x=exact_source(stream), terms=terms, path=(node,), nodes=nodes)
    casts = _lone_casts(stream, node)
    inner = _collect(casts[-1], room - len(terms)) if casts else None
    if inner is None:
        return own
    return replace(
        own, x=inner.x, terms=(*inner.terms, *terms), nodes=(*inner.nodes, *casts, *nodes)
    )


def _choose(node: Node, room: int) -> tuple[tuple[SumTerm, ...], Node] | None:
    """Decides which operand of a sum is the term, or several terms, and which is the stream.

    The term is the product. If both operands are products, or none is, the stream is the one that
    is a sum itself, and no forecast.
    """
    both = pairs(node, aten.add.Tensor)
    if not both or not value(node).is_floating_point():
        return None
    if any(value(x).shape != value(node).shape for x in both[0]):
        return None
    ranked = [
        (_find_terms(term, node, room), stream, _is_lone_sum(stream, node)) for stream, term in both
    ]
    terms, stream, _ = max(ranked, key=lambda each: (each[0][0].is_product, each[2]))
    return terms, stream


def _is_lone_sum(node: Node, user: Node) -> bool:
    casts = _lone_casts(node, user)
    is_sum = bool(casts and pairs(casts[-1], aten.add.Tensor))
    return is_sum and not _find_forecast(node, user)


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


def _find_terms(node: Node, user: Node, room: int) -> tuple[SumTerm, ...]:
    """Returns the terms that a node is: cuts with the factors of their product, or a cut alone."""
    casts = _lone_casts(node, user)
    found = _find_cuts(node, user, room)
    given = operands(casts[-1], aten.mul.Tensor) if casts else None
    if found[0].is_product or given is None or len(given) != 2:
        return found
    if isinstance(given[1], (int, float)) and is_tensor(given[0]):
        inner = _find_terms(given[0], casts[-1], room)
        return _then((replace(t, factor=t.factor * given[1]) for t in inner), casts)
    for gate, cut in pairs(casts[-1], aten.mul.Tensor):
        if value(gate).numel() < value(cut).numel() and value(cut).shape == value(node).shape:
            inner = _find_cuts(cut, casts[-1], room)
            return _then((replace(t, gate=exact_source(gate)) for t in inner), casts)
    return found


def _find_cuts(node: Node, user: Node, room: int) -> tuple[SumTerm, ...]:
    """Returns the terms of a forecast if there is room for all of them, else a cut alone."""
    terms = _find_forecast(node, user)
    return terms if 0 < len(terms) <= room else (_find_cut(node, user),)


def _find_cut(node: Node, user: Node) -> SumTerm:
    return _find_decoded(node, user) or SumTerm(cut=exact_source(node))


def _then(terms: Iterable[SumTerm], casts: Sequence[Node]) -> tuple[SumTerm, ...]:
    """Returns terms with the nodes that follow them; `casts`: these, the last one first."""
    *others, last = terms
    return (*others, replace(last, nodes=(*last.nodes, *reversed(casts))))


def _find_forecast(node: Node, user: Node) -> tuple[SumTerm, ...]:
    """Returns the terms of a sum of cuts, each times a number in a tensor; empty for other nodes.

    # before                                           # found
    %a = mul(_to_copy(%cut0, float32), %w0)            SumTerm(cut=%cut0, weight=%w0),
    %b = mul(_to_copy(%cut1, float32), %w1)            SumTerm(cut=%cut1, weight=%w1)
    %c = _to_copy(add(%a, %b), bfloat16)
    """
    casts = _lone_casts(node, user)
    if not casts:
        return ()
    for wide, weight in pairs(casts[-1], aten.mul.Tensor):
        is_number = value(weight).ndim == 0 and value(weight).dtype == torch.float32
        if is_number and value(wide).ndim > 0:
            return _then((replace(_find_cut(wide, casts[-1]), weight=weight),), casts)
    for first, last in pairs(casts[-1], aten.add.Tensor)[:1]:
        after = _find_forecast(last, casts[-1])
        before = _find_forecast(first, casts[-1]) if after else ()
        return _then((*before, *after), casts) if before else ()
    return ()


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


def insert_gate(before: Node, term: SumTerm) -> Node | None:
    """Returns what a term multiplies its cut by; inserts the product of a gate and a weight."""
    gate, weight = term.gate, term.weight
    if gate is None or weight is None:
        return gate or weight
    if value(gate).dtype != torch.float32:
        gate = insert(before, aten._to_copy.default, gate, dtype=torch.float32)
    return insert(before, aten.mul.Tensor, gate, weight)
