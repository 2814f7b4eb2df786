"""Loops over an axis: single positions that are taken one by one and put together again.

What a loop over frames or samples computes has no dimension for them. Each value follows from one
position instead, and where all positions of a dimension are stacked or concatenated, it is back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch.fx import Node

from ..ir import GETITEM, Dims, aten, is_call, value
from .factors import Product, find_position, is_named, length
from .operands import argument, dim_of

Positions = Mapping[Product, int | None]
"""The dimensions, now gone, of which a value follows from one position; None: from several."""

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def find_positions(node: Node) -> Positions:
    """Those of the operands, and the one that `node` itself takes; the latest last."""
    found = _merge([n.meta["positions"] for n in node.all_input_nodes if "positions" in n.meta])
    taken = _take_one(node)
    if taken is None:
        return found
    product, position = taken
    return {**{p: i for p, i in found.items() if p != product}, product: position}


def _merge(operands: Sequence[Positions]) -> Positions:
    known = [positions for positions in operands if positions]
    if all(positions is known[0] for positions in known):
        return known[0] if known else {}
    merged: dict[Product, int | None] = {}
    for positions in known:
        for product, position in positions.items():
            same = merged.get(product, position) == position
            merged[product] = position if same else None
    return merged


def _take_one(node: Node) -> tuple[Product, int] | None:
    """The dimension that `node` takes one position of, and which."""
    source = node.args[0] if node.args else None
    if is_call(node, (GETITEM,)) and isinstance(source, Node):
        return _take_part(source, int(node.args[1]))
    if not isinstance(source, Node) or not is_call(node, (aten.select.int, aten.slice.Tensor)):
        return None
    dims: Dims = source.meta["axes"]
    dim = dim_of(node, 1, 0, len(dims))
    start = argument(node, 2, None) or 0
    if not isinstance(start, int):  # data says which
        return None
    size, step = length(dims[dim]), argument(node, 4, 1)
    start = start + size if start < 0 else start
    if is_call(node, (aten.select.int,)):
        return _named(dims[dim], start, start + 1)
    return _named(dims[dim], start, start + (value(node).shape[dim] - 1) * step + 1)


def _take_part(call: Node, part: int) -> tuple[Product, int] | None:
    """Of what is split into single positions."""
    source = call.args[0] if is_call(call, (aten.unbind.int, *_SPLITS)) else None
    if not isinstance(source, Node):
        return None
    dims: Dims = source.meta["axes"]
    if is_call(call, (aten.unbind.int,)):
        return _named(dims[dim_of(call, 1, 0, len(dims))], part, part + 1)
    dim = dim_of(call, 2, 0, len(dims))
    stops = list(accumulate((val.shape[dim] for val in call.meta["val"]), initial=0))
    return _named(dims[dim], stops[part], stops[part + 1])


def _named(product: Product, start: int, stop: int) -> tuple[Product, int] | None:
    """Of what is taken, the dimension or outer part of it that one position is left of."""
    found = find_position(product, start, stop)
    return found if found is not None and is_named(found[0]) else None


def rejoin(node: Node, dims: Dims) -> tuple[Dims, Positions]:
    """The dimensions of a stack, a concatenation or a write, with the one that a loop ran over, and
    the positions of those that are still gone.

        # frames x_BTSD[:, i], each (B, S, D), concatenated: ((T 3, B 2), (S 4,), (D 8,))
    """
    positions: Positions = node.meta["positions"]
    if not positions:
        return dims, positions
    looped = None
    if (dim := _rejoined_dim(node)) is not None:
        dim %= len(dims)
        looped, inner = _find_looped(node, positions, dims[dim], dim)
        if looped is not None:
            dims = (*dims[:dim], looped + inner, *dims[dim + 1 :])
    left = {p: i for p, i in positions.items() if p != looped and p not in dims}
    return dims, positions if len(left) == len(positions) else left


def _rejoined_dim(node: Node) -> int | None:
    if is_call(node, (aten.stack.default, aten.cat.default)):
        return int(argument(node, 1, node.kwargs.get("dim", 0)))
    if is_call(node, (aten.select_scatter.default,)):
        return int(argument(node, 2, node.kwargs.get("dim", 0)))
    return None


def _find_looped(
    node: Node, positions: Positions, whole: Product, dim: int
) -> tuple[Product | None, Product]:
    """The dimension that a loop ran over, the innermost of several, and what each part adds."""
    inner: Product | None = ()
    if is_call(node, (aten.select_scatter.default,)):
        found = [p for p in positions if _is_written(node, whole, p)]
    else:
        parts: Sequence[Node] = node.args[0]
        found = [p for p in positions if _are_all_of(parts, p)]
        inner = _shared(parts, dim) if is_call(node, (aten.cat.default,)) else ()
    return (found[-1], inner) if found and inner is not None else (None, ())


def _are_all_of(parts: Sequence[Node], product: Product) -> bool:
    """Whether each position of a dimension is that of one part."""
    found = [part.meta["positions"].get(product) for part in parts]
    every = set(range(length(product)))
    return len(found) == len(every) > 1 and set(found) == every


def _is_written(node: Node, whole: Product, product: Product) -> bool:
    """Whether what is written to one position of a new dimension is from the same of another."""
    part, index = node.args[1], argument(node, 3, node.kwargs.get("index"))
    same = part.meta["positions"].get(product) == index
    return same and length(whole) == length(product) > 1 and not is_named(whole)


def _shared(parts: Sequence[Node], dim: int) -> Product | None:
    """The dimension of each part, where all have the same; nothing if it is one position."""
    dims: list[Product] = [part.meta["axes"][dim] for part in parts if value(part).ndim > dim]
    if len(dims) < len(parts):  # an empty tensor of one dimension
        return None
    if length(dims[0]) == 1:
        return () if all(length(product) == 1 for product in dims) else None
    return dims[0] if all(product == dims[0] for product in dims) else None
