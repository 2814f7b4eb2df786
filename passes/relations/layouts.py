"""Relations of ops that move elements without computing: views, parts, joins, repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch.fx import Node

from ..ir import aten, is_pointwise, is_random, is_tensor, value
from .arguments import argument, dim_of, dims_of, nodes_in
from .terms import (
    Across,
    Join,
    Keep,
    Like,
    Merge,
    Narrow,
    New,
    Relation,
    Roll,
    Select,
    Source,
    Stack,
    Term,
    Unknown,
    broadcast,
    keep,
    keep_all,
    regroup,
    sources_of,
    tensors_of,
)


def relate_pointwise(node: Node) -> Relation | None:
    """Pointwise ops: each element is computed from one of each operand, broadcast."""
    tensors = tensors_of(nodes_in((node.args, node.kwargs)))
    if not tensors or is_random(node):
        return None
    return Relation(tuple(broadcast(value(node).shape, map(sources_of, tensors))))


def relate_copy(node: Node) -> Relation:
    """clone, contiguous, alias, detach, and casts."""
    return Relation(keep_all(node.args[0]), is_exact=True)


def relate_copy_into(node: Node) -> Relation:
    """copy(x, y): y in the shape of x."""
    terms = broadcast(value(node).shape, [sources_of(node.args[1])])
    return Relation(tuple(terms), is_exact=True)


def relate_view(node: Node) -> Relation:
    """view, reshape."""
    shape = tuple(value(node).shape)
    return Relation(regroup(sources_of(node.args[0]), shape), is_exact=True)


def relate_permute(node: Node) -> Relation:
    """permute(x, dims)."""
    dims = keep_all(node.args[0])
    return Relation(tuple(dims[d] for d in node.args[1]), is_exact=True)


def relate_transpose(node: Node) -> Relation:
    """transpose(x, a, b)."""
    dims = list(keep_all(node.args[0]))
    a, b = (int(d) for d in node.args[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return Relation(tuple(dims), is_exact=True)


def relate_t(node: Node) -> Relation:
    """t(x), of at most two dimensions."""
    return Relation(keep_all(node.args[0])[::-1], is_exact=True)


def relate_unsqueeze(node: Node) -> Relation:
    """unsqueeze(x, dim)."""
    dims = list(keep_all(node.args[0]))
    dims.insert(int(node.args[1]) % (len(dims) + 1), Keep(1))
    return Relation(tuple(dims), is_exact=True)


def relate_squeeze(node: Node) -> Relation:
    """squeeze(x), squeeze(x, dim), squeeze(x, dims)."""
    dims = keep_all(node.args[0])
    gone = {d for d in dims_of(node, 1, len(dims)) if dims[d].size == 1}
    return Relation(tuple(t for d, t in enumerate(dims) if d not in gone), is_exact=True)


def relate_expand(node: Node) -> Relation:
    """expand(x, sizes)."""
    terms = broadcast(value(node).shape, [sources_of(node.args[0])])
    return Relation(tuple(terms), is_exact=True)


def relate_slice(node: Node) -> Relation:
    """slice(x, dim, start, end, step)."""
    dims: list[Term] = list(keep_all(node.args[0]))
    dim = dim_of(node, 1, 0, len(dims))
    source = Source(node.args[0], dim)
    start = argument(node, 2, None, "start") or 0
    start = max(min(start + source.size if start < 0 else start, source.size), 0)
    step = argument(node, 4, 1, "step")
    dims[dim] = Narrow(value(node).shape[dim], source, start, step)
    return Relation(tuple(dims), is_exact=True)


def relate_select(node: Node) -> Relation:
    """select(x, dim, index)."""
    tensor, dim, index = node.args
    assert isinstance(tensor, Node)
    return _select(tensor, int(dim), index if isinstance(index, int) else None)


def _select(tensor: Node, dim: int, index: int | None) -> Relation:
    dims = keep_all(tensor)
    source = Source(tensor, dim % len(dims))
    if index is not None and index < 0:
        index += source.size
    terms = (*dims[: source.dim], *dims[source.dim + 1 :])
    return Relation(terms, (Select(source, index),), is_exact=True)


def relate_split(node: Node) -> tuple[Relation, ...]:
    """split(x, size or sizes, dim), chunk(x, count, dim): one relation per part."""
    dims = keep_all(node.args[0])
    dim = dim_of(node, 2, 0, len(dims))
    source = Source(node.args[0], dim)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    parts = [
        Narrow(size, source, start)
        for size, start in zip(sizes, accumulate(sizes, initial=0), strict=False)
    ]
    return tuple(Relation((*dims[:dim], p, *dims[dim + 1 :]), is_exact=True) for p in parts)


def relate_unbind(node: Node) -> tuple[Relation, ...]:
    """unbind(x, dim): one relation per position."""
    dim = dim_of(node, 1, 0, value(node.args[0]).ndim)
    return tuple(_select(node.args[0], dim, i) for i in range(len(node.meta["val"])))


def relate_cat(node: Node) -> Relation:
    """cat(tensors, dim); tensors without elements may have any number of dimensions."""
    shape = value(node).shape
    dim = dim_of(node, 1, 0, len(shape))
    given = [sources_of(n) for n in node.args[0]]
    given = [dims for dims in given if len(dims) == len(shape) and dims[dim].size]
    terms: list[Term] = list(broadcast(shape, given))
    terms[dim] = Join(tuple(dims[dim] for dims in given))
    return Relation(tuple(terms), is_exact=True)


def relate_stack(node: Node) -> Relation:
    """stack(tensors, dim)."""
    shape = list(value(node).shape)
    dim = dim_of(node, 1, 0, len(shape))
    tensors: Sequence[Node] = node.args[0]
    terms: list[Term] = list(broadcast(shape[:dim] + shape[dim + 1 :], map(sources_of, tensors)))
    terms.insert(dim, Stack(tuple(tensors)))
    return Relation(tuple(terms), is_exact=True)


def relate_repeat(node: Node) -> Relation:
    """repeat(x, counts)."""
    counts: Sequence[int] = node.args[1]
    dims = (Keep(1),) * (len(counts) - value(node.args[0]).ndim) + keep_all(node.args[0])
    terms = tuple(Merge((Keep(n), t)) if n > 1 else t for n, t in zip(counts, dims, strict=True))
    return Relation(terms, is_exact=True)


def relate_repeat_interleave(node: Node) -> Relation:
    """repeat_interleave(x, times, dim); without a dimension, of all elements in order."""
    times = Keep(int(node.args[1]))
    dim = argument(node, 2, None, "dim")
    terms: list[Term] = list(keep_all(node.args[0]))
    if dim is None:
        return Relation((Merge((*terms, times)),), is_exact=True)
    terms[dim] = Merge((terms[dim], times))
    return Relation(tuple(terms), is_exact=True)


def relate_roll(node: Node) -> Relation:
    """roll(x, shifts, dims); without dimensions, of all elements in order."""
    shifts, dims = node.args[1], argument(node, 2, (), "dims")
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    if not dims:
        return Relation(tuple(Across(s.size, (s,)) for s in sources_of(tensor)))
    terms: list[Term] = list(keep_all(tensor))
    for shift, dim in zip(shifts, dims, strict=True):
        source = Source(tensor, dim % len(terms))
        earlier = terms[dim]
        moved = earlier.shift if isinstance(earlier, Roll) else 0
        terms[dim] = Roll(source.size, source, (moved + shift) % max(source.size, 1))
    return Relation(tuple(terms), is_exact=True)


def relate_flip(node: Node) -> Relation:
    """flip(x, dims)."""
    gone = dims_of(node, 1, value(node.args[0]).ndim) if node.args[1] else set()
    terms: list[Term] = [
        Roll(s.size, s, is_reversed=True) if s.dim in gone else keep(s)
        for s in sources_of(node.args[0])
    ]
    return Relation(tuple(terms), is_exact=True)


def relate_new(node: Node) -> Relation:
    """new_zeros and the like: constants of sizes of their own, on the device of an operand."""
    return Relation(tuple(New(size, is_constant=True) for size in value(node).shape))


def relate_like(node: Node) -> Relation:
    """zeros_like and the like: a constant in place of each value of an operand."""
    return Relation(tuple(Like(s.size, s) for s in sources_of(node.args[0])))


def relate_as_complex(node: Node) -> Relation:
    """view_as_complex(x): real and imaginary parts make one number."""
    return Relation(keep_all(node.args[0])[:-1])


def relate_as_real(node: Node) -> Relation:
    """view_as_real(z): real and imaginary parts, along the dimension that they were made from.

    Each draws on both, since arithmetic with complex numbers may lie between.
    """
    made = node.args[0]
    while is_pointwise(made) and is_tensor(made.args[0]):
        made = made.args[0]
    if made.op == "call_function" and made.target is aten.view_as_complex.default:
        pair = Source(made.args[0], value(made.args[0]).ndim - 1)
        return Relation((*keep_all(node.args[0]), Across(2, (pair,))))
    return Relation((*keep_all(node.args[0]), New(2)))


def relate_unknown(node: Node) -> Relation:
    """take, as_strided: any position may go anywhere."""
    return Relation(tuple(map(Unknown, value(node).shape)))
