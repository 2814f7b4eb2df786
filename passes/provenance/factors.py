"""Arithmetic on factors: what splitting, merging, slicing and joining do to provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, prod

from ..ir import Dims, Factor

Product = tuple[Factor, ...]


def anonymous(size: int, reason: str = "") -> Product:
    """A dimension along no axis of an input."""
    return (Factor(size, reason=reason),)


def unknown(shape: Sequence[int], reason: str = "") -> Dims:
    """Dimensions along no axis of an input."""
    return tuple(anonymous(size, reason) for size in shape)


def learned(shape: Sequence[int]) -> Dims:
    """Dimensions of a weight or a constant."""
    return tuple((Factor(size, learned=True),) for size in shape)


def length(product: Product) -> int:
    """The size of a dimension."""
    return prod(factor.size for factor in product)


def is_named(product: Product) -> bool:
    """Whether a dimension lies along any axis of an input."""
    return any(True for factor in product for _ in factor.axes())


def blur(product: Product, size: int, reason: str) -> Product:
    """A dimension of `size` that draws on `product` in an order that is no longer known."""
    axes = {axis for factor in product for axis in factor.axes()}
    if not axes:
        return anonymous(size, reason)
    if len(axes) == 1:
        return (Factor(size, axis=axes.pop()),)
    parts = tuple((Factor(1, axis=axis),) for axis in sorted(axes, key=str))
    return (Factor(size, parts=parts, reason=reason),)


def regroup(dims: Dims, shape: Sequence[int], reason: str) -> Dims:
    """Provenance after a view: the row-major sequence of factors, cut anew into `shape`.

    A factor that a boundary falls into is split into an outer and an inner one along the same axis.
    Factors of size one go to a dimension of size one where there is one, else to the dimension
    that ends before them, unless that has features alone and tokens follow.

        ((B 2, T 8), (S 16,), (C 64,)) -> [2, 128, 64] gives ((B 2,), (T 8, S 16), (C 64,))
    """
    queue = [(factor, origin) for origin, product in enumerate(dims) for factor in product]
    result: list[Product] = []
    for i, size in enumerate(shape):
        taken = _take(queue, size)
        if taken is None:
            return tuple(
                _blurred(dims, n, reason) if n > 1 else anonymous(1, reason) for n in shape
            )
        next_is_one = i + 1 < len(shape) and shape[i + 1] == 1
        while not next_is_one and queue and queue[0][0].size == 1:
            if _starts_next(taken, queue):
                break
            taken.append(queue.pop(0))
        factors = [factor for factor, _ in taken]
        if size == 1 and not taken and queue and queue[0][0].axis is not None:
            factors.append(Factor(1, queue[0][0].axis))  # an axis of one patch: (1, patch)
        result.append(tuple(factors) or anonymous(1))
    if result:
        result[-1] += tuple(factor for factor, _ in queue)
    return tuple(result)


_Queue = list[tuple[Factor, int]]
"""Factors with the dimension that each was in."""


def _starts_next(taken: _Queue, queue: _Queue) -> bool:
    """Whether a factor of size one lies with what follows rather than with what comes before.

    It does where it shared a dimension with what follows and not with what comes before; where
    features come before it and tokens follow; or where tokens come before it and its axis is
    followed by the next of the same input: rows go with columns.
    """
    if len(queue) < 2 or not taken:
        return False
    (unit, origin), (after, after_origin) = queue[:2]
    before, before_origin = taken[-1]
    if not is_named((after,)):
        return False
    if (origin == after_origin) != (origin == before_origin):
        return origin == after_origin
    if before.axis is None or unit.axis is None or after.axis is None:
        return before.axis is None
    same_input = unit.axis.source == after.axis.source
    return same_input and before.axis.dim > 0 and unit.axis.dim + 1 == after.axis.dim


def _take(queue: _Queue, size: int) -> _Queue | None:
    """Pops factors whose sizes multiply to `size`, splitting the last one; None if they cannot."""
    taken: _Queue = []
    rest = size
    if size == 1:
        return [queue.pop(0)] if queue and queue[0][0].size == 1 else []
    while rest > 1:
        if not queue:
            return None
        factor, origin = queue.pop(0)
        if rest % factor.size == 0:
            taken.append((factor, origin))
            rest //= factor.size
        elif factor.size % rest == 0:
            inner = factor.size // rest
            taken.append((replace(factor, size=rest), origin))
            queue.insert(0, (replace(factor, size=inner), origin))
            rest = 1
        else:
            return None
    return taken


def _blurred(dims: Dims, size: int, reason: str) -> Product:
    return blur(tuple(f for product in dims for f in product), size, reason)


def join(products: Sequence[Product]) -> Product:
    """The dimension of a concatenation; joins of joins are flattened."""
    parts: list[Product] = []
    for product in products:
        single = product[0] if len(product) == 1 else None
        parts.extend(single.parts if single is not None and is_join(single) else (product,))
    if not any(is_named(part) for part in parts):
        return anonymous(sum(length(part) for part in parts))
    return (Factor(sum(length(part) for part in parts), parts=tuple(parts)),)


def is_join(factor: Factor) -> bool:
    """Whether the parts lie one after another, so that a slice can tell them apart."""
    return bool(factor.parts) and sum(length(part) for part in factor.parts) == factor.size


def narrow(product: Product, start: int, stop: int, reason: str) -> Product:
    """The positions `start` to `stop` of a dimension: whole parts of a join are taken exactly."""
    size = stop - start
    if size == length(product):
        return product
    single = product[0] if len(product) == 1 else None
    if single is None or not is_join(single):
        return blur(product, size, reason)
    kept: list[Product] = []
    offset = 0
    for part in single.parts:
        low, high = max(start - offset, 0), min(stop - offset, length(part))
        if low < high:
            kept.append(narrow(part, low, high, reason))
        offset += length(part)
    return kept[0] if len(kept) == 1 else join(kept)


def combine(shape: Sequence[int], operands: Sequence[Dims]) -> Dims:
    """Provenance of a broadcast: per dimension the operand that knows most.

    That is the one along an axis of lowest rank, in an order that is known, the earlier one of
    several.
    """
    result: list[Product] = []
    for i, size in enumerate(shape):
        candidates = []
        for dims in operands:
            j = i - (len(shape) - len(dims))
            if j >= 0 and length(dims[j]) == size:
                candidates.append(dims[j])
        result.append(min(candidates, key=_rank, default=anonymous(size)))
    return tuple(result)


def _rank(product: Product) -> tuple[float, bool]:
    rank = min((axis.rank for factor in product for axis in factor.axes()), default=inf)
    return rank, any(factor.parts and not is_join(factor) for factor in product)
