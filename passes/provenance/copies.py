"""Which positions of a dimension hold copies of one value, whatever the inputs hold.

A dimension is a product of factors, as in :mod:`pabc.passes.axes`. Some were put there by an
expansion or a repetition, and stay copies through every op that treats rows alike. Unlike there, a
rule must be right about every element, and an op without one ends what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

from ..ir import GETITEM, MASKS, aten, is_pointwise, is_tensor, value
from .operands import argument, dim_of

Factor = tuple[int, bool]
"""A size, and whether its positions hold copies of one value."""
Product = tuple[Factor, ...]
Copies = tuple[Product, ...]
"""Per dimension its factors, none of one, whose sizes multiply to its own."""


def find_copies(graph: Graph) -> dict[Node, Copies]:
    """The dimensions of every tensor of a graph of fixed sizes.

    What an op without a rule gives has no copies, as far as is known.
    """
    known: dict[Node, Copies] = {}
    for node in graph.nodes:
        if is_tensor(node):
            known[node] = _infer(node, known)
    return known


def _infer(node: Node, known: Mapping[Node, Copies]) -> Copies:
    shape = tuple(value(node).shape)
    if node.op != "call_function":
        return _single(shape)
    if node.target is GETITEM:
        return _part(node, known) or _single(shape)
    operands = [known[n] for n in _flat_nodes(node) if n in known]
    if is_pointwise(node):
        return _broadcast(shape, operands)
    rule = RULES.get(node.target)
    dims = rule(node, operands) if rule is not None else None
    return _single(shape) if dims is None else tuple(map(_merged, dims))


def _flat_nodes(node: Node) -> list[Node]:
    flat: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), flat.append)
    return flat


def _single(shape: Sequence[int]) -> Copies:
    return tuple(((size, False),) if size != 1 else () for size in shape)


def _merged(product: Product) -> Product:
    """The same with neighbors of one sort as one factor, and without factors of one."""
    merged: list[Factor] = []
    for size, is_copy in product:
        if size == 1:
            continue
        if merged and merged[-1][1] == is_copy:
            size *= merged.pop()[0]
        merged.append((size, is_copy))
    return tuple(merged)


def _broadcast(shape: Sequence[int], operands: Sequence[Copies]) -> Copies:
    """Copies along a dimension are copies in the result if they are in all that have it."""
    result: list[Product] = []
    for from_end in range(-len(shape), 0):
        found = {dims[from_end] for dims in operands if len(dims) >= -from_end}
        found.discard(())
        single = _single(shape[from_end:])[:1]
        result.append(found.pop() if len(found) == 1 else single[0])
    return tuple(result)


def _part(node: Node, known: Mapping[Node, Copies]) -> Copies | None:
    """One of several parts along a dimension."""
    call = node.args[0]
    shape = tuple(value(node).shape)
    if not isinstance(call, Node):
        return None
    if call.target is aten.unbind.int:
        dims = known[call.args[0]]
        dim = dim_of(call, 1, 0, len(dims))
        return dims[:dim] + dims[dim + 1 :]
    if call.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        dims = known[call.args[0]]
        return _alone(dims, (dim_of(call, 2, 0, len(dims)),), shape)
    return None


def _alone(dims: Copies, chosen: Sequence[int], shape: Sequence[int]) -> Copies:
    """`dims` with no copies along the chosen dimensions, whose sizes may be others now."""
    gone = {dim % len(dims) for dim in chosen}
    single = _single(shape)
    return tuple(single[i] if i in gone else product for i, product in enumerate(dims))


def _view(node: Node, operands: list[Copies]) -> Copies | None:
    """Factors in row-major order, cut anew; one that a boundary falls into is split in two."""
    queue = [factor for product in operands[0] for factor in product][::-1]
    result = []
    for size in value(node).shape:
        product: list[Factor] = []
        while size > 1:
            if not queue:
                return None
            inner, is_copy = queue.pop()
            outer = min(inner, size)
            if inner % outer or size % outer:
                return None
            product.append((outer, is_copy))
            queue.append((inner // outer, is_copy)) if inner > outer else None
            size //= outer
        result.append(tuple(product))
    return tuple(result)


def _permute(node: Node, operands: list[Copies]) -> Copies:
    return tuple(operands[0][d] for d in node.args[1])


def _transpose(node: Node, operands: list[Copies]) -> Copies:
    dims = list(operands[0])
    a, b = (int(d) for d in node.args[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def _unsqueeze(node: Node, operands: list[Copies]) -> Copies:
    dims = list(operands[0])
    dims.insert(int(node.args[1]) % (len(dims) + 1), ())
    return tuple(dims)


def _select(node: Node, operands: list[Copies]) -> Copies:
    dim = int(node.args[1]) % len(operands[0])
    return operands[0][:dim] + operands[0][dim + 1 :]


def _slice(node: Node, operands: list[Copies]) -> Copies:
    dims, shape = operands[0], value(node).shape
    dim = dim_of(node, 1, 0, len(dims))
    if shape[dim] == prod(size for size, _ in dims[dim]):
        return dims
    if all(is_copy for _, is_copy in dims[dim]):
        return (*dims[:dim], ((shape[dim], True),), *dims[dim + 1 :])
    return _alone(dims, (dim,), shape)


def _index(node: Node, operands: list[Copies]) -> Copies | None:
    """x[:, i]: rows that are picked at equal positions are equal."""
    given = [d for d, index in enumerate(node.args[1]) if index is not None]
    if len(given) != 1 or value(node.args[1][given[0]]).dtype in MASKS:
        return None
    dims, index = operands
    return (*dims[: given[0]], *index, *dims[given[0] + 1 :])


def _index_select(node: Node, operands: list[Copies]) -> Copies | None:
    dims, index = operands
    dim = int(node.args[1]) % len(dims)
    return (*dims[:dim], *index, *dims[dim + 1 :]) if len(index) == 1 else None


def _expand(node: Node, operands: list[Copies]) -> Copies:
    shape = value(node).shape
    dims = ((),) * (len(shape) - len(operands[0])) + operands[0]
    return tuple(product or ((size, True),) for size, product in zip(shape, dims, strict=True))


def _repeat(node: Node, operands: list[Copies]) -> Copies:
    counts: Sequence[int] = node.args[1]
    dims = ((),) * (len(counts) - len(operands[0])) + operands[0]
    return tuple(((n, True), *product) for n, product in zip(counts, dims, strict=True))


def _repeat_interleave(node: Node, operands: list[Copies]) -> Copies:
    dims, copies = list(operands[0]), (int(node.args[1]), True)
    dim = argument(node, 2, node.kwargs.get("dim"))
    if dim is None:  # of all elements in order
        return ((*(factor for product in dims for factor in product), copies),)
    dims[dim] = (*dims[dim], copies)
    return tuple(dims)


def _cat(node: Node, operands: list[Copies]) -> Copies:
    dim, shape = dim_of(node, 1, 0, value(node).ndim), value(node).shape
    if len(set(node.args[0])) == 1:
        copies = ((len(operands), True), *operands[0][dim])
        return operands[0][:dim] + (copies,) + operands[0][dim + 1 :]
    return _alone(_broadcast(shape, operands), (dim,), shape)


def _stack(node: Node, operands: list[Copies]) -> Copies:
    dim, shape = dim_of(node, 1, 0, value(node).ndim), list(value(node).shape)
    is_copy = len(set(node.args[0])) == 1
    rest = _broadcast(shape[:dim] + shape[dim + 1 :], operands)
    return (*rest[:dim], ((shape[dim], is_copy),), *rest[dim:])


def _norm(node: Node, operands: list[Copies]) -> Copies:
    return _alone(operands[0], range(-len(node.args[1]), 0), value(node).shape)


def _softmax(node: Node, operands: list[Copies]) -> Copies:
    return _alone(operands[0], (int(node.args[1]),), value(node).shape)


def _reduce(node: Node, operands: list[Copies]) -> Copies | None:
    chosen = argument(node, 1, node.kwargs.get("dim"))
    if chosen is None or chosen == []:  # over all of them
        return None
    chosen = (chosen,) if isinstance(chosen, int) else chosen
    gone = {dim % len(operands[0]) for dim in chosen}
    keeps = value(node).ndim == len(operands[0])
    return tuple(
        () if i in gone else product
        for i, product in enumerate(operands[0])
        if keeps or i not in gone
    )


def _linear(node: Node, operands: list[Copies]) -> Copies:
    return operands[0][:-1] + _single(value(node).shape[-1:])


def _multiply(node: Node, operands: list[Copies]) -> Copies | None:
    a, b = operands
    if len(a) < 2 or len(b) < 2:
        return None
    return (*_broadcast(value(node).shape[:-2], [a[:-2], b[:-2]]), a[-2], b[-1])


def _attend(node: Node, operands: list[Copies]) -> Copies | None:
    """Every query alone, unless its place tells it which keys it may see."""
    if argument(node, 5, node.kwargs.get("is_causal")) or node.kwargs.get("enable_gqa"):
        return None
    query, _, values, *mask = operands
    shape = tuple(value(node).shape)
    leading = _broadcast(shape[:-2], [dims[:-2] for dims in operands])
    rows = _broadcast(shape[-2:-1], [dims[-2:-1] for dims in (query, *mask)])
    return (*leading, *rows, values[-1])


def _embedding(node: Node, operands: list[Copies]) -> Copies:
    return operands[1] + _single(value(node).shape[-1:])


def _same(node: Node, operands: list[Copies]) -> Copies:
    return operands[0]


def _squeeze(node: Node, operands: list[Copies]) -> Copies:
    rank = len(operands[0])
    chosen = argument(node, 1, tuple(range(rank)))
    chosen = (chosen,) if isinstance(chosen, int) else chosen
    gone = {d % rank for d in chosen if not operands[0][d % rank]}
    return tuple(product for d, product in enumerate(operands[0]) if d not in gone)


RULES: Mapping[Any, Callable[[Node, list[Copies]], Copies | None]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten._to_copy.default,
        ),
        _same,
    ),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda node, operands: operands[0][::-1],
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.linear.default: _linear,
    aten.matmul.default: _multiply,
    aten.mm.default: _multiply,
    aten.bmm.default: _multiply,
    aten.scaled_dot_product_attention.default: _attend,
    aten.embedding.default: _embedding,
}
"""How copies pass through ops; an op may have a rule only if it treats rows alike."""
