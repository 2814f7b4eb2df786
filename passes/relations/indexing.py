"""Relations of ops that pick, or write to, positions that an index tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ..ir import MASKS, aten, is_call, is_tensor, value
from .arguments import argument, dim_of
from .groups import ALIASES, CASTS, COPIES
from .terms import (
    Across,
    Keep,
    Mix,
    Narrow,
    New,
    Pick,
    Relation,
    Source,
    Term,
    Unknown,
    Write,
    broadcast,
    keep,
    keep_all,
    sources_of,
)

_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def _find_range(index: Any) -> range | None:
    """Returns the positions that an index made by `torch.arange` names, as those of a slice."""
    while is_call(index, (*CASTS, *ALIASES, *COPIES)):
        index = index.args[0]
    if not is_call(index, _RANGES) or not all(type(n) is int for n in index.args):
        return None
    bounds: Sequence[int] = index.args
    positions = range(*bounds)
    return positions if positions and positions[0] >= 0 and positions.step > 0 else None


def relate_index(node: Node) -> Relation:
    """x[:, i, j]: each index names positions of one dimension; all indices are broadcast.

    The picked dimensions stand where the first of them stood, or in front if they were apart.
    """
    shape = tuple(value(node).shape)
    tensor, indices = node.args
    assert isinstance(tensor, Node) and isinstance(indices, Sequence)
    picked: dict[int, Node] = {d: i for d, i in enumerate(indices) if i is not None}
    if not all(is_tensor(i) and value(i).dtype not in MASKS for i in picked.values()):
        return Relation(tuple(map(Unknown, shape)))  # a mask covers several dimensions at once
    rest = [keep(s) for s in sources_of(tensor) if s.dim not in picked]
    first = min(picked) if max(picked) - min(picked) == len(picked) - 1 else 0
    positions = _find_range(picked[first]) if len(picked) == 1 else None
    if positions is not None:
        found: list[Term] = [_narrow(Source(tensor, first), positions)]
    else:
        sizes = shape[first : len(shape) - len(rest) + first]
        found = [_pick(tensor, picked, n, i - len(sizes)) for i, n in enumerate(sizes)]
    terms = (*rest[:first], *found, *rest[first:])
    return Relation(terms, is_exact=positions is not None)


def _narrow(source: Source, positions: range) -> Narrow:
    return Narrow(len(positions), source, positions.start, positions.step, is_indexed=True)


def _pick(tensor: Node, picked: dict[int, Node], size: int, from_end: int) -> Term:
    """Returns a dimension of broadcast indices, with the dimensions whose index varies along it."""
    aligned = {
        d: Source(i, value(i).ndim + from_end)
        for d, i in picked.items()
        if value(i).ndim >= -from_end
    }
    varying = {d: index for d, index in aligned.items() if index.size == size}
    return Pick(size, tuple(varying.values()), tuple(Source(tensor, d) for d in varying))


def relate_index_select(node: Node) -> Relation:
    """index_select(x, dim, index)."""
    tensor, dim, index = node.args
    assert isinstance(tensor, Node) and isinstance(index, Node)
    terms: list[Term] = list(keep_all(tensor))
    source = Source(tensor, int(dim) % len(terms))
    positions = _find_range(index)
    if positions is not None:
        terms[source.dim] = _narrow(source, positions)
    else:
        size = value(node).shape[source.dim]
        terms[source.dim] = Pick(size, tuple(sources_of(index)), (source,))
    return Relation(tuple(terms), is_exact=positions is not None)


def relate_gather(node: Node) -> Relation:
    """gather(x, dim, index): shaped as the index; only along `dim` are positions picked."""
    tensor, dim, index = node.args
    assert isinstance(tensor, Node) and isinstance(index, Node)
    terms: list[Term] = []
    for source, named in zip(sources_of(tensor), sources_of(index), strict=True):
        if source.dim == int(dim) % value(tensor).ndim:
            terms.append(Pick(named.size, (named,), (source,)))
        elif source.size == named.size:
            terms.append(Keep(named.size, (named, source)))
        else:
            terms.append(Mix(named.size, (keep(named), keep(source))))
    return Relation(tuple(terms))


def relate_embedding(node: Node) -> Relation:
    """embedding(weight, index): features have positions of their own."""
    return Relation((*keep_all(node.args[1]), New(value(node).shape[-1])))


def relate_one_hot(node: Node) -> Relation:
    """one_hot(index, num_classes)."""
    return Relation((*keep_all(node.args[0]), New(value(node).shape[-1])))


def relate_argsort(node: Node) -> Relation:
    """argsort(x, dim)."""
    terms: list[Term] = list(keep_all(node.args[0]))
    dim = dim_of(node, 1, -1, len(terms))
    terms[dim] = Mix(terms[dim].size, (terms[dim],))
    return Relation(tuple(terms))


def relate_index_add(node: Node) -> Relation:
    """index_add, index_copy(x, dim, index, source): rows are written along `dim`."""
    whole, dim, _, written = node.args[:4]
    if value(written).ndim != value(whole).ndim:
        return _written_somewhere(whole, written)
    return _written_along(whole, int(dim) % value(whole).ndim, written)


def relate_scatter(node: Node) -> Relation:
    """scatter(x, dim, index, source): the index names a position along `dim` for each element.

    Where it has fewer positions than `x`, the rest of these are as they were.
    """
    whole, dim, index, written = node.args[:4]
    if not isinstance(written, Node):  # a number, where the index says
        return _written_somewhere(whole, index)
    terms: list[Term] = []
    for source, named in zip(sources_of(whole), sources_of(index), strict=True):
        part = Source(written, source.dim)
        if source.dim == int(dim) % value(whole).ndim:
            terms.append(Write(source, written, source.dim))
        elif source.size == named.size == part.size:
            terms.append(Keep(source.size, (source, part), (named,)))
        else:
            terms.append(Across(source.size, (source,)))
    return Relation(tuple(terms))


def relate_index_put(node: Node) -> Relation:
    """x[:, i] = y, with y broadcast to the place that it is written to."""
    whole, indices, written = node.args[:3]
    assert isinstance(whole, Node) and isinstance(written, Node) and isinstance(indices, Sequence)
    picked = [d for d, index in enumerate(indices) if index is not None]
    if len(picked) != 1 or value(written).ndim != value(whole).ndim:
        return _written_somewhere(whole, written)
    return _written_along(whole, picked[0], written)


def relate_masked_scatter(node: Node) -> Relation:
    """masked_scatter(x, mask, source)."""
    return _written_somewhere(node.args[0], node.args[-1])


def relate_slice_scatter(node: Node) -> Relation:
    """x[:, a:b] = y."""
    whole, written = node.args[:2]
    assert isinstance(whole, Node) and isinstance(written, Node)
    source = Source(whole, dim_of(node, 2, 0, value(whole).ndim))
    start, stop = argument(node, 3, None, "start"), argument(node, 4, None, "end")
    step = argument(node, 5, 1, "step")
    span = range(source.size)[slice(start, stop, step)]
    return _written_along(whole, source.dim, written, span)


def relate_select_scatter(node: Node) -> Relation:
    """x[i] = y."""
    whole, written = node.args[:2]
    assert isinstance(whole, Node) and isinstance(written, Node)
    dims = sources_of(whole)
    dim = dim_of(node, 2, 0, len(dims))
    index = argument(node, 3, 0, "index")
    span = range(dims[dim].size)[index : index + 1 or None] if isinstance(index, int) else None
    rest = [s for s in dims if s.dim != dim]
    terms = [Write(source, written, i) for i, source in enumerate(rest)]
    return Relation((*terms[:dim], Write(dims[dim], written, None, span), *terms[dim:]))


def _written_along(whole: Node, dim: int, written: Node, span: range | None = None) -> Relation:
    """Returns the relation of a write along `dim`; elsewhere, `written` is broadcast."""
    sources = [sources_of(whole), sources_of(written)]
    terms: list[Term] = list(broadcast(value(whole).shape, sources))
    terms[dim] = Write(Source(whole, dim), written, dim, span)
    return Relation(tuple(terms))


def _written_somewhere(whole: Any, written: Any) -> Relation:
    return Relation(tuple(Write(source, written) for source in sources_of(whole)))
