"""What each op does to the axes of its operands: one rule per op that is not pointwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ..ir import Dims, Factor, aten, is_pointwise, is_tensor, value
from .factors import anonymous, combine, join, learned, length, narrow, regroup, unknown
from .index_rules import INDEX_RULES
from .operands import Rule, argument, dim_of, lost
from .products import as_product
from .window_rules import WINDOW_RULES


def _view(node: Node, operands: list[Dims]) -> Dims:
    return regroup(operands[0], tuple(value(node).shape), lost(node))


def _permute(node: Node, operands: list[Dims]) -> Dims:
    return tuple(operands[0][d] for d in node.args[1])


def _transpose(node: Node, operands: list[Dims]) -> Dims:
    dims = list(operands[0])
    a, b = (int(d) % len(dims) for d in node.args[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def _t(node: Node, operands: list[Dims]) -> Dims:
    return operands[0][::-1]


def _unsqueeze(node: Node, operands: list[Dims]) -> Dims:
    dims = list(operands[0])
    dims.insert(int(node.args[1]) % (len(dims) + 1), anonymous(1))
    return tuple(dims)


def _squeeze(node: Node, operands: list[Dims]) -> Dims:
    rank = len(operands[0])
    chosen = argument(node, 1, tuple(range(rank)))
    chosen = (chosen,) if isinstance(chosen, int) else chosen
    gone = {d % rank for d in chosen if length(operands[0][d % rank]) == 1}
    return tuple(product for d, product in enumerate(operands[0]) if d not in gone)


def _expand(node: Node, operands: list[Dims]) -> Dims:
    shape = tuple(value(node).shape)
    return combine(shape, operands)


def _slice(node: Node, operands: list[Dims]) -> Dims:
    dims = operands[0]
    dim = dim_of(node, 1, 0, len(dims))
    size, step = length(dims[dim]), argument(node, 4, 1)
    start = argument(node, 2, None) or 0
    start = min(start + size if start < 0 else start, size)
    stop = start + (value(node).shape[dim] - 1) * step + 1
    part = narrow(dims[dim], start, stop, lost(node), step)
    return dims[:dim] + (part,) + dims[dim + 1 :]


def _select(node: Node, operands: list[Dims]) -> Dims:
    dim = int(node.args[1]) % len(operands[0])
    return operands[0][:dim] + operands[0][dim + 1 :]


def _cat(node: Node, operands: list[Dims]) -> Dims:
    rank = value(node).ndim
    dim = dim_of(node, 1, 0, rank)
    operands = [dims for dims in operands if len(dims) == rank and length(dims[dim])]
    joined = join([dims[dim] for dims in operands])
    shape = tuple(value(node).shape)
    rest = combine(shape[:dim] + (1,) + shape[dim + 1 :], [_unit(d, dim) for d in operands])
    return rest[:dim] + (joined,) + rest[dim + 1 :]


def _unit(dims: Dims, dim: int) -> Dims:
    return dims[:dim] + (anonymous(1),) + dims[dim + 1 :]


def _stack(node: Node, operands: list[Dims]) -> Dims:
    dim = dim_of(node, 1, 0, value(node).ndim)
    shape = tuple(value(node).shape)
    dims = list(combine(shape[:dim] + shape[dim + 1 :], operands))
    dims.insert(dim, anonymous(shape[dim], lost(node)))
    return tuple(dims)


def _filled(node: Node, operands: list[Dims]) -> Dims:
    """A constant of sizes of its own, on the device of an operand."""
    return learned(tuple(value(node).shape))


def _filled_like(node: Node, operands: list[Dims]) -> Dims:
    """A constant in place of each value of an operand."""
    return tuple(tuple(replace(f, learned=True) for f in product) for product in operands[0])


def _copy(node: Node, operands: list[Dims]) -> Dims:
    return combine(tuple(value(node).shape), operands[1:2])


def _as_complex(node: Node, operands: list[Dims]) -> Dims:
    return operands[0][:-1]


def _as_real(node: Node, operands: list[Dims]) -> Dims:
    return (*operands[0], _parts_of(node.args[0]))


def _parts_of(number: Node) -> tuple[Factor, ...]:
    """The dimension that real and imaginary parts lie along where a complex tensor was made."""
    while is_pointwise(number) and is_tensor(number.args[0]):
        number = number.args[0]
    if number.target is not aten.view_as_complex.default:
        return anonymous(2)
    parts: tuple[Factor, ...] = number.args[0].meta["axes"][-1]
    return parts


def _repeat_interleave(node: Node, operands: list[Dims]) -> Dims:
    dim = argument(node, 2, node.kwargs.get("dim"))
    if dim is None:
        return unknown(tuple(value(node).shape), lost(node))
    dims = list(operands[0])
    dim = dim % len(dims)
    dims[dim] += anonymous(int(node.args[1]))
    return tuple(dims)


def _repeat(node: Node, operands: list[Dims]) -> Dims:
    repeats: Sequence[int] = node.args[1]
    dims = tuple(anonymous(1) for _ in range(len(repeats) - len(operands[0]))) + operands[0]
    return tuple(
        anonymous(n) + product if n > 1 else product
        for n, product in zip(repeats, dims, strict=True)
    )


def _same(node: Node, operands: list[Dims]) -> Dims:
    return operands[0]


def _reduce(node: Node, operands: list[Dims]) -> Dims:
    """Reductions over `dim`: reduced dimensions shrink to one position or vanish."""
    return _reduce_over(node, operands[0], argument(node, 1, node.kwargs.get("dim")))


def _reduce_over(node: Node, dims: Dims, chosen: Sequence[int] | int | None) -> Dims:
    rank = len(dims)
    chosen = range(rank) if chosen is None else (chosen,) if isinstance(chosen, int) else chosen
    gone = {d % rank for d in chosen} if rank else set()
    if value(node).ndim == rank:
        return tuple(anonymous(1) if d in gone else p for d, p in enumerate(dims))
    return tuple(p for d, p in enumerate(dims) if d not in gone)


def _norm(node: Node, operands: list[Dims]) -> Dims:
    return _reduce_over(node, operands[0], argument(node, 2, node.kwargs.get("dim")))


def _distances(node: Node, operands: list[Dims]) -> Dims:
    a, b = operands
    return (*combine(tuple(value(node).shape)[:-2], [a[:-2], b[:-2]]), a[-2], b[-2])


def _mv(node: Node, operands: list[Dims]) -> Dims:
    return operands[0][:-1]


def _vecdot(node: Node, operands: list[Dims]) -> Dims:
    shape = tuple(value(node).shape)
    dim = dim_of(node, 2, -1, len(shape) + 1)
    whole = combine(shape[:dim] + (1,) + shape[dim:], [_unit(d, dim) for d in operands])
    return whole[:dim] + whole[dim + 1 :]


def _linear(node: Node, operands: list[Dims]) -> Dims:
    return operands[0][:-1] + (anonymous(value(node).shape[-1]),)


def _multiply(node: Node, operands: list[Dims]) -> Dims:
    """Each dimension of a product takes what the operand that knows most knows."""
    shape = tuple(value(node).shape)
    product = as_product(node)
    if product is None:
        return unknown(shape, lost(node))
    factors = operands[-len(product.operands) :]  # what is added comes before them
    known = [
        dict(zip(t, dims, strict=True)) for t, dims in zip(product.terms, factors, strict=True)
    ]
    columns = [[dims[label] for dims in known if label in dims] for label in product.result]
    return tuple(
        combine((size,), [(dim,) for dim in column])[0]
        for size, column in zip(shape, columns, strict=True)
    )


def _scrambled(node: Node, operands: list[Dims]) -> Dims:
    return unknown(tuple(value(node).shape), lost(node))


RULES: dict[Any, Rule] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.copy.default: _copy,
    **dict.fromkeys(
        (
            aten.new_empty.default,
            aten.new_empty_strided.default,
            aten.new_full.default,
            aten.new_ones.default,
            aten.new_zeros.default,
        ),
        _filled,
    ),
    **dict.fromkeys(
        (
            aten.empty_like.default,
            aten.full_like.default,
            aten.ones_like.default,
            aten.zeros_like.default,
            aten.fill.Scalar,
            aten.zero.default,
        ),
        _filled_like,
    ),
    aten.view_as_complex.default: _as_complex,
    aten.view_as_real.default: _as_real,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.repeat.default: _repeat,
    aten.roll.default: _same,
    aten.flip.default: _same,
    **dict.fromkeys(
        (
            aten.sum.dim_IntList,
            aten.mean.dim,
            aten.mean.default,
            aten.var.correction,
            aten.std.correction,
            aten.amax.default,
            aten.amin.default,
            aten.argmax.default,
            aten.argmin.default,
            aten.prod.dim_int,
            aten.logsumexp.default,
            aten.any.dim,
            aten.any.dims,
            aten.all.dim,
            aten.all.dims,
        ),
        _reduce,
    ),
    aten.linear.default: _linear,
    aten.mm.default: _multiply,
    aten.bmm.default: _multiply,
    aten.matmul.default: _multiply,
    aten.addmm.default: _multiply,
    aten.baddbmm.default: _multiply,
    aten.einsum.default: _multiply,
    aten.tensordot.default: _multiply,
    aten.inner.default: _multiply,
    aten.linalg_vecdot.default: _vecdot,
    aten.linalg_vector_norm.default: _norm,
    aten.norm.ScalarOpt_dim: _norm,
    aten.cdist.default: _distances,
    aten.mv.default: _mv,
    aten.take.default: _scrambled,
    aten.as_strided.default: _scrambled,
    **dict.fromkeys(
        (
            aten.layer_norm.default,
            aten.rms_norm.default,
            aten.group_norm.default,
            aten.batch_norm.default,
            aten.instance_norm.default,
            aten.log_softmax.int,
        ),
        _same,
    ),
    **WINDOW_RULES,
    **INDEX_RULES,
}
