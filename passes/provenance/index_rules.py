"""Axis rules of ops that pick or write positions named by an index tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ..ir import MASKS, Dims, Factor, aten, is_call, is_tensor, value
from .factors import (
    anonymous,
    blur,
    combine,
    is_learned,
    join,
    length,
    narrow,
    unknown,
    unlearned,
)
from .operands import Rule, argument, dim_of, lost

Product = tuple[Factor, ...]

_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def _axes_of(product: Product) -> set[object]:
    return {axis for factor in product for axis in factor.axes()}


def _drawn(index: Product, source: Product, size: int, node: Node) -> Product:
    """Positions of `source` picked by an index: those of the index, where they are known."""
    (product,) = combine((size,), [(index,), (blur(source, size, lost(node)),)])
    return product


def _find_range(index: Any) -> range | None:
    """The positions that an index made of `torch.arange` picks, where they are a slice's."""
    while is_call(index, (aten._to_copy.default, aten.alias.default, aten.clone.default)):
        index = index.args[0]
    if not is_call(index, _RANGES) or not all(type(n) is int for n in index.args):
        return None
    bounds: Sequence[int] = index.args
    positions = range(*bounds)
    return positions if positions and positions[0] >= 0 and positions.step > 0 else None


def _taken(product: Product, positions: range, node: Node) -> Product:
    return narrow(product, positions[0], positions[-1] + 1, lost(node), positions.step)


def _index(node: Node, operands: list[Dims]) -> Dims:
    """x[:, i, j]: a dimension of the index draws on each dimension of x whose index varies there.

    The picked dimensions stand where the first of them stood, or in front if they were apart.
    """
    dims, shape = operands[0], tuple(value(node).shape)
    given = [d for d, index in enumerate(node.args[1]) if index is not None]
    if any(not is_tensor(node.args[1][d]) for d in given):
        return unknown(shape, lost(node))
    if any(value(node.args[1][d]).dtype in MASKS for d in given):
        return unknown(shape, lost(node))  # a mask covers several dimensions at once
    picked = dict(zip(given, operands[1:], strict=True))
    rest = [product for d, product in enumerate(dims) if d not in picked]
    rank = len(shape) - len(rest)
    adjacent = max(picked) - min(picked) == len(picked) - 1
    place = min(picked) if adjacent else 0
    if len(given) == 1 and (taken := _find_range(node.args[1][place])) is not None:
        return (*rest[:place], _taken(dims[place], taken, node), *rest[place:])
    result = []
    for i, size in enumerate(shape[place : place + rank]):
        from_end = i - rank
        varying = {
            d: index[from_end]
            for d, index in picked.items()
            if len(index) >= -from_end and length(index[from_end]) == size
        }
        (index,) = combine((size,), [(product,) for product in varying.values()])
        source = tuple(factor for d in varying for factor in dims[d])
        result.append(_drawn(index, source, size, node))
    return (*rest[:place], *result, *rest[place:])


def _index_select(node: Node, operands: list[Dims]) -> Dims:
    dims, index = operands
    dim = int(node.args[1]) % len(dims)
    if (taken := _find_range(node.args[2])) is not None:
        picked = _taken(dims[dim], taken, node)
    else:
        one = index[0] if index else anonymous(1)
        picked = _drawn(one, dims[dim], value(node).shape[dim], node)
    return (*dims[:dim], picked, *dims[dim + 1 :])


def _gather(node: Node, operands: list[Dims]) -> Dims:
    """Shaped as the index; only along `dim` are positions picked."""
    dims, index = operands
    dim = int(node.args[1]) % len(dims)
    return tuple(
        _drawn(product, dims[d], length(product), node)
        if d == dim or length(dims[d]) != length(product)
        else combine((length(product),), [(product,), (dims[d],)])[0]
        for d, product in enumerate(index)
    )


def _write(node: Node, operands: list[Dims]) -> Dims:
    """Parts written into a whole along `dim`: the dimension draws on both."""
    whole, part = operands[0], operands[-1]
    if len(operands) < 3 or len(part) != len(whole):
        return _written(whole, part)
    dim = int(node.args[1]) % len(whole)
    rest = combine(tuple(map(length, whole)), [whole, part])
    return (*rest[:dim], _merged(whole[dim], part[dim], node), *rest[dim + 1 :])


def _merged(whole: Product, part: Product, node: Node) -> Product:
    if _axes_of(part) <= _axes_of(whole):
        return whole if is_learned(part) else unlearned(whole)
    if length(whole) == length(part) and not _axes_of(whole):
        return part
    return blur(whole + part, length(whole), lost(node))


def _written(whole: Dims, part: Dims) -> Dims:
    """A whole in which something was written somewhere."""
    return whole if all(map(is_learned, part)) else tuple(map(unlearned, whole))


def _put(node: Node, operands: list[Dims]) -> Dims:
    """x[:, i] = y, with y broadcast to the place it is written to."""
    whole, part = operands[0], operands[-1]
    picked = [d for d, index in enumerate(node.args[1]) if index is not None]
    if len(picked) != 1 or len(part) != len(whole):
        return _written(whole, part)
    (dim,) = picked
    rest = combine(tuple(map(length, whole)), [whole, part])
    return (*rest[:dim], _merged(whole[dim], part[dim], node), *rest[dim + 1 :])


def _put_slice(node: Node, operands: list[Dims]) -> Dims:
    """x[:, a:b] = y: a new sequence has y's positions where they were written."""
    whole, part = operands[:2]
    dim = dim_of(node, 2, 0, len(whole))
    size = length(whole[dim])
    start, stop = (min(i + size if i < 0 else i, size) for i in _bounds(node, size))
    written = _merged(whole[dim], part[dim], node)
    if argument(node, 5, 1) == 1 and written != whole[dim]:
        pieces = [(0, start, whole[dim]), (start, stop, None), (stop, size, whole[dim])]
        written = join(
            [
                part[dim] if source is None else narrow(source, low, high, lost(node))
                for low, high, source in pieces
                if low < high
            ]
        )
    rest = combine(tuple(map(length, whole)), [whole, part])
    return (*rest[:dim], written, *rest[dim + 1 :])


def _bounds(node: Node, size: int) -> tuple[int, int]:
    start, stop = argument(node, 3, None), argument(node, 4, None)
    return (0 if start is None else start, size if stop is None else stop)


def _put_one(node: Node, operands: list[Dims]) -> Dims:
    """x[i] = y"""
    whole, part = operands[:2]
    dim = dim_of(node, 2, 0, len(whole))
    rest = [product for d, product in enumerate(whole) if d != dim]
    merged = [_merged(a, b, node) for a, b in zip(rest, part, strict=True)]
    return (*merged[:dim], *_written((whole[dim],), part), *merged[dim:])


def _put_masked(node: Node, operands: list[Dims]) -> Dims:
    return _written(operands[0], operands[-1])


def _one_hot(node: Node, operands: list[Dims]) -> Dims:
    return (*operands[0], anonymous(value(node).shape[-1]))


def _sorted(node: Node, operands: list[Dims]) -> Dims:
    dims = operands[0]
    dim = dim_of(node, 1, -1, len(dims))
    mixed = blur(dims[dim], length(dims[dim]), lost(node))
    return (*dims[:dim], mixed, *dims[dim + 1 :])


def _embedding(node: Node, operands: list[Dims]) -> Dims:
    return (*operands[1], anonymous(value(node).shape[-1]))


INDEX_RULES: dict[object, Rule] = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.embedding.default: _embedding,
    aten.one_hot.default: _one_hot,
    aten.argsort.default: _sorted,
    aten.index_put.default: _put,
    aten.slice_scatter.default: _put_slice,
    aten.select_scatter.default: _put_one,
    aten.masked_scatter.default: _put_masked,
    **dict.fromkeys(
        (
            aten.index_add.default,
            aten.index_copy.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter_add.default,
            aten.scatter_reduce.two,
        ),
        _write,
    ),
}
