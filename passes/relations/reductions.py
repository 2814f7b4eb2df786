"""Relations of ops that compute over dimensions: reductions, norms, products, attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from torch.fx import Node

from ..attention_calls import attention_call, check_result
from ..ir import aten, is_random, is_tensor, value
from .arguments import argument, dim_of, dims_of, nodes_in
from .einsums import as_einsum
from .terms import (
    Across,
    Keep,
    New,
    Relation,
    Source,
    Term,
    Unknown,
    broadcast,
    keep_all,
    sources_of,
)


def relate_reduction(node: Node, dim_argument: int = 1) -> Relation:
    """sum, mean, amax: reduced dimensions have one position left, or none."""
    dims: list[Term] = list(keep_all(node.args[0]))
    gone = dims_of(node, dim_argument, len(dims))
    if value(node).ndim == len(dims):
        return Relation(tuple(New(1) if d in gone else t for d, t in enumerate(dims)))
    return Relation(tuple(t for d, t in enumerate(dims) if d not in gone))


relate_vector_norm = partial(relate_reduction, dim_argument=2)


def relate_softmax(node: Node) -> Relation:
    """softmax(x, dim)."""
    return _across(node.args[0], [dim_of(node, 1, -1, value(node).ndim)])


def relate_layer_norm(node: Node) -> Relation:
    """layer_norm, rms_norm(x, normalized_shape): over the last dimensions."""
    rank, sizes = value(node).ndim, node.args[1]
    assert isinstance(sizes, Sequence)
    return _across(node.args[0], range(rank - len(sizes), rank))


def relate_sample_norm(node: Node) -> Relation:
    """group_norm, instance_norm: within each sample."""
    return _across(node.args[0], range(1, value(node).ndim))


def relate_batch_norm(node: Node) -> Relation:
    """batch_norm: in training over the batch, too; each channel has its own weight."""
    return _across(node.args[0], range(value(node).ndim))


def _across(tensor: Node, dims: Sequence[int]) -> Relation:
    terms: list[Term] = list(keep_all(tensor))
    for dim in dims:
        source = Source(tensor, dim)
        terms[dim] = Across(source.size, (source,))
    return Relation(tuple(terms))


def relate_linear(node: Node) -> Relation:
    """linear(x, weight, bias): features have positions of their own."""
    return Relation((*keep_all(node.args[0])[:-1], New(value(node).shape[-1])))


def relate_product(node: Node) -> Relation:
    """matmul, bmm, einsum: the dimensions that the result keeps, in each operand that has them.

    What is added to a product is aligned at the last dimension.
    """
    shape = value(node).shape
    product = as_einsum(node)
    if product is None:
        return Relation(tuple(map(Unknown, shape)))
    added = nodes_in(node.args)[: -len(product.operands)]
    biases = broadcast(shape, map(sources_of, added))
    terms = (
        Keep(bias.size, tuple(product.sources(label)), bias.sources)
        for label, bias in zip(product.result, biases, strict=True)
    )
    return Relation(tuple(terms))


def relate_vecdot(node: Node) -> Relation:
    """vecdot(a, b, dim)."""
    shape = list(value(node).shape)
    dim = dim_of(node, 2, -1, len(shape) + 1)
    whole = broadcast([*shape[:dim], 1, *shape[dim:]], map(sources_of, node.args[:2]))
    return Relation((*whole[:dim], *whole[dim + 1 :]))


def relate_mv(node: Node) -> Relation:
    """mv(a, b)."""
    return Relation(keep_all(node.args[0])[:1])


def relate_distances(node: Node) -> Relation:
    """cdist(a, b): of each row of `a` to each of `b`."""
    a, b = (sources_of(n) for n in node.args[:2])
    batch = broadcast(value(node).shape[:-2], [a[:-2], b[:-2]])
    return Relation((*batch, Keep(a[-2].size, (a[-2],)), Keep(b[-2].size, (b[-2],))))


def relate_attention(node: Node, shape: Sequence[int]) -> Relation:
    """Attention: the query's dimensions, with the features of the values.

    Of other ops than PyTorch's own, and with dropout, any position may depend on its place.

    Raises: ValueError where the result is not laid out as the query.
    """
    check_result(node, shape)
    call = attention_call(node)
    masks = [n for n in nodes_in((node.args[3:], node.kwargs)) if is_tensor(n)]  # not graphs
    is_known = node.target is aten.scaled_dot_product_attention.default and not is_random(node)
    terms: list[Term] = []
    for dim in range(-len(shape), 0):
        is_row = dim == call.layout.sequence
        if dim == call.layout.features:
            named, others = [call.value], []
        elif is_row:
            named, others = [call.query], masks
        else:
            named, others = [call.query, call.key], [call.value, *masks]
        sources, modifiers = _aligned(named, dim), _aligned(others, dim)
        is_alike = {source.size for source in sources + modifiers} <= {1, shape[dim]}
        if is_known and is_alike and not (is_row and _is_causal(node)):
            terms.append(Keep(shape[dim], sources, modifiers))
        else:
            terms.append(Across(shape[dim], sources))
    return Relation(tuple(terms))


def _aligned(tensors: Iterable[Node], dim: int) -> tuple[Source, ...]:
    ranks = [(n, value(n).ndim) for n in tensors]
    return tuple(Source(n, dim + rank) for n, rank in ranks if rank >= -dim)


def _is_causal(node: Node) -> bool:
    """Returns whether a query sees no keys after its own position."""
    return bool(argument(node, 5, False, "is_causal"))
