"""Einsums: every op that multiplies tensors and sums over dimensions, in one form.

matmul, bmm, baddbmm, einsum with or without an ellipsis, tensordot, inner, and a broadcast
multiplication followed by a sum differ in spelling only: each is a list of operands, a label for
each of their dimensions, and the labels that its result keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..ir import aten, is_call, is_tensor, value
from .groups import CASTS, LAYOUTS, MATMULS, MATMULS_WITH_BIAS
from .terms import Source

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Einsum:
    """`result[labels] = sum over the other labels of the product of operands[labels]`.

    Attributes:
        node: the op.
        operands: the tensors that are multiplied.
        terms: the labels of each operand's dimensions. One of size one that is broadcast has the
            label of the dimension that it is broadcast over.
        result: the labels of the result's dimensions.
    """

    node: Node
    operands: tuple[Node, ...]
    terms: tuple[Labels, ...]
    result: Labels

    def sources(self, label: str) -> list[Source]:
        """Returns a label's dimension in each operand that has it."""
        pairs = zip(self.operands, self.terms, strict=True)
        return [Source(n, term.index(label)) for n, term in pairs if label in term]

    def contracted(self, operand: int) -> list[str]:
        """Returns the labels that an operand shares with another and that are summed over."""
        others = {label for k, term in enumerate(self.terms) if k != operand for label in term}
        return [n for n in self.terms[operand] if n in others and n not in self.result]


def as_einsum(node: Node) -> Einsum | None:
    """Returns the product that `node` computes, or None."""
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    return reader(node) if reader is not None else None


def is_weight(node: Node) -> bool:
    """Returns whether `node` is a weight of the model, or a view or a cast of one."""
    while is_call(node, LAYOUTS) and is_tensor(node.args[0]):
        node = node.args[0]
    return node.op == "get_attr"


def _rank(node: Node) -> int:
    return value(node).ndim


def _batch(node: Node, count: int) -> Labels:
    """Returns labels of all but the last `count` dimensions, counted from the last as in
    broadcasting."""
    return tuple(f"batch{i}" for i in range(_rank(node) - count, 0, -1))


def _of_matrices(node: Node, a: Node, b: Node) -> Einsum | None:
    if _rank(a) == 0 or _rank(b) == 0:
        return None
    a_batch, a_row = (_batch(a, 2), ("i",)) if _rank(a) > 1 else ((), ())
    b_batch, b_column = (_batch(b, 2), ("j",)) if _rank(b) > 1 else ((), ())
    batch = a_batch if len(a_batch) >= len(b_batch) else b_batch
    terms = ((*a_batch, *a_row, "k"), (*b_batch, "k", *b_column))
    return Einsum(node, (a, b), terms, (*batch, *a_row, *b_column))


def _matmul(node: Node) -> Einsum | None:
    return _of_matrices(node, *node.args[:2])


def _addmm(node: Node) -> Einsum | None:
    return _of_matrices(node, *node.args[1:3])


def _linear(node: Node) -> Einsum | None:
    a, b = node.args[:2]
    if _rank(b) != 2:
        return None
    batch = tuple(f"batch{i}" for i in range(_rank(a) - 1, 0, -1))
    return Einsum(node, (a, b), ((*batch, "k"), ("j", "k")), (*batch, "j"))


def _inner(node: Node) -> Einsum | None:
    a, b = node.args[:2]
    if _rank(a) == 0 or _rank(b) == 0:
        return None
    rows = tuple(f"a{i}" for i in range(_rank(a) - 1))
    columns = tuple(f"b{i}" for i in range(_rank(b) - 1))
    return Einsum(node, (a, b), ((*rows, "k"), (*columns, "k")), (*rows, *columns))


def _tensordot(node: Node) -> Einsum | None:
    a, b, dims_a, dims_b = node.args[:4]
    rows = [f"a{i}" for i in range(_rank(a))]
    columns = [f"b{i}" for i in range(_rank(b))]
    for n, (i, j) in enumerate(zip(dims_a, dims_b, strict=True)):
        rows[i] = columns[j] = f"k{n}"
    result = tuple(label for label in (*rows, *columns) if not label.startswith("k"))
    return Einsum(node, (a, b), (tuple(rows), tuple(columns)), result)


def _einsum(node: Node) -> Einsum | None:
    operands: Sequence[Node] = node.args[1]
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    texts = left.split(",")
    spans = [_rank(n) - len(t.replace("...", "")) for n, t in zip(operands, texts, strict=True)]
    terms = tuple(_expand(text, span) for text, span in zip(texts, spans, strict=True))
    if any(len(set(term)) < len(term) for term in terms):
        return None  # a diagonal
    if arrow:
        result = _expand(right, max(spans))
    else:
        every = [label for term in terms for label in term]
        once = sorted(n for n in set(every) if every.count(n) == 1 and not n.startswith("batch"))
        result = (*(_expand("...", max(spans)) if "..." in left else ()), *once)
    return Einsum(node, tuple(operands), terms, result)


def _expand(text: str, span: int) -> Labels:
    before, dots, after = text.partition("...")
    batch = tuple(f"batch{i}" for i in range(span, 0, -1)) if dots else ()
    return (*before, *batch, *after)


def _summed(node: Node) -> Einsum | None:
    """Reads (a * b).sum(dim), where each operand is broadcast over a dimension of the other."""
    source = node.args[0]
    while is_call(source, CASTS):
        source = source.args[0]
    dims = node.args[1] if len(node.args) > 1 else None
    if not is_call(source, (aten.mul.Tensor,)) or not dims:
        return None
    operands = source.args[:2]
    if not all(map(is_tensor, operands)):
        return None
    keepdim = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim"))
    return None if keepdim else _of_broadcast(node, source, operands, dims)


def _vecdot(node: Node) -> Einsum | None:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else -1)
    return _of_broadcast(node, node, node.args[:2], [dim])


def _of_broadcast(
    node: Node, product: Node, operands: Sequence[Any], dims: Sequence[int]
) -> Einsum | None:
    rank = max(_rank(n) for n in operands)
    size = [
        max(value(n).shape[d - rank] for n in operands if _rank(n) >= rank - d) for d in range(rank)
    ]
    gone = {d % rank for d in dims}
    terms = []
    for n in operands:
        first = rank - _rank(n)
        terms.append(
            tuple(
                f"d{d}" if value(n).shape[d - first] == size[d] else f"unit{d}"
                for d in range(first, rank)
            )
        )
    result = tuple(f"d{d}" for d in range(rank) if d not in gone)
    own = [set(term) - set(other) for term, other in (terms, reversed(terms))]
    outer = all(any(label in result for label in labels) for labels in own)
    return Einsum(node, tuple(operands), tuple(terms), result) if outer else None


PRODUCTS: dict[Any, Callable[[Node], Einsum | None]] = {
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(MATMULS_WITH_BIAS, _addmm),
    aten.inner.default: _inner,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
}
"""Ops whose relation follows from the einsum that they are."""
_READERS: dict[Any, Callable[[Node], Einsum | None]] = {
    **PRODUCTS,
    aten.linear.default: _linear,
    aten.sum.dim_IntList: _summed,
    aten.linalg_vecdot.default: _vecdot,
}
