"""Arithmetic on factors: the provenance of split, merged, sliced and joined dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import inf, prod
from operator import mul

from ..ir import Dims, Factor

Dimension = tuple[Factor, ...]
"""The factors of one dimension, the outermost first."""


def anonymous(size: int, reason: str = "") -> Dimension:
    """Returns a dimension along no axis of an input."""
    return (Factor(size, reason=reason),)


def unknown(shape: Sequence[int], reason: str = "") -> Dims:
    """Returns dimensions along no axis of an input."""
    return tuple(anonymous(size, reason) for size in shape)


def learned(shape: Sequence[int]) -> Dims:
    """Returns the dimensions of a weight or a constant."""
    return tuple((Factor(size, learned=True),) for size in shape)


def is_learned(product: Dimension) -> bool:
    """Returns whether all positions of a dimension are those of a weight or a constant."""
    return all(factor.learned for factor in product)


def unlearned(product: Dimension) -> Dimension:
    """Returns the same dimension, of a tensor whose values are not constant."""
    return tuple(replace(factor, learned=False) for factor in product)


def length(product: Dimension) -> int:
    """Returns the size of a dimension."""
    return prod(factor.size for factor in product)


def is_named(product: Dimension) -> bool:
    """Returns whether a dimension lies along any axis of an input."""
    return any(True for factor in product for _ in factor.axes())


def blur(product: Dimension, size: int, reason: str) -> Dimension:
    """Returns a dimension of `size` positions that draws on `product` in an unknown order."""
    axes = {axis for factor in product for axis in factor.axes()}
    constant = bool(product) and is_learned(product)
    if not axes:
        return (Factor(size, reason="" if constant else reason, learned=constant),)
    if len(axes) == 1:
        return (Factor(size, axis=axes.pop(), learned=constant),)
    parts = tuple((Factor(1, axis=axis),) for axis in sorted(axes, key=str))
    return (Factor(size, parts=parts, reason=reason, learned=constant),)


def regroup(dims: Dims, shape: Sequence[int], reason: str) -> Dims:
    """Returns the dimensions of a view: the row-major sequence of factors, regrouped into `shape`.

    A factor that a boundary falls into is split into an outer and an inner one along the same axis.
    Where boundaries of the two shapes cut across each other, the order is lost between the nearest
    boundaries that both have, and kept elsewhere. A factor of size one goes to a dimension of size
    one if there is one, else to the dimension that ends before it, unless that has only features
    and tokens follow.

        ((B 2, T 8), (S 16,), (C 64,)) -> [2, 128, 64] gives ((B 2,), (T 8, S 16), (C 64,))
    """
    queue = [(factor, origin) for origin, product in enumerate(dims) for factor in product]
    queue = _align(queue, shape, reason)
    result: list[Dimension] = []
    for i, size in enumerate(shape):
        taken = _take(queue, size)
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
"""Factors, each with the dimension that it was in."""


def _align(queue: _Queue, shape: Sequence[int], reason: str) -> _Queue:
    """Returns the factors, with those that `shape` cuts across blurred into one per size.

    A boundary between dimensions is identified by the number of elements after it. Two shapes share
    a boundary that lies on, or divides evenly, a factor of each.
    """
    old, new = _boundaries([factor.size for factor, _ in queue]), _boundaries(shape)
    if all(_fits(place, old) for place in new):
        return queue
    shared = [n for n in old if _fits(n, new)] + [n for n in new if _fits(n, old)]
    rest, aligned = list(queue), []
    for high, low in pairwise(sorted(set(shared), reverse=True)):
        while rest[0][0].size == 1:
            aligned.append(rest.pop(0))
        taken = _take(rest, high // low)
        inside = sorted({high, low, *(n for n in new if low < n < high)}, reverse=True)
        sizes = [a // b for a, b in pairwise(inside)]
        if len(sizes) > 1 and sum(factor.size > 1 for factor, _ in taken) > 1:
            product = tuple(factor for factor, _ in taken)
            taken = [(blur(product, size, reason)[0], taken[0][1]) for size in sizes]
        aligned += taken
    return aligned + rest


def _boundaries(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(reversed(sizes), mul, initial=1))


def _fits(place: int, boundaries: Sequence[int]) -> bool:
    """Returns whether a boundary is one of these, or evenly divides what lies between two."""
    low = max((n for n in boundaries if n <= place), default=1)
    high = min((n for n in boundaries if n >= place), default=place)
    return place % low == 0 and high % place == 0


def _starts_next(taken: _Queue, queue: _Queue) -> bool:
    """Returns whether a factor of size one belongs with what follows it, not with what precedes it.

    It does if it shared a dimension with what follows and not with what precedes; if features
    precede it and tokens follow; or if tokens precede it and the next axis of the same input
    follows: rows go with columns.
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


def _take(queue: _Queue, size: int) -> _Queue:
    """Pops factors whose sizes multiply to `size`; splits the last one if it is larger."""
    taken: _Queue = []
    rest = size
    if size == 1:
        return [queue.pop(0)] if queue and queue[0][0].size == 1 else []
    while rest > 1:
        factor, origin = queue.pop(0)
        if rest % factor.size:
            inner, uneven = divmod(factor.size, rest)
            assert not uneven, (factor, size)
            queue.insert(0, (replace(factor, size=inner), origin))
            factor = replace(factor, size=rest)
        taken.append((factor, origin))
        rest //= factor.size
    return taken


def join(products: Sequence[Dimension]) -> Dimension:
    """Returns the dimension of a concatenation; joins of joins are flattened."""
    parts: list[Dimension] = []
    for product in products:
        single = product[0] if len(product) == 1 else None
        parts.extend(single.parts if single is not None and is_join(single) else (product,))
    if not any(is_named(part) for part in parts):
        return (Factor(sum(map(length, parts)), learned=all(map(is_learned, parts))),)
    return (Factor(sum(length(part) for part in parts), parts=tuple(parts)),)


def is_join(factor: Factor) -> bool:
    """Returns whether a factor is a concatenation whose parts a slice can tell apart."""
    in_order = bool(factor.parts) and not factor.reason
    return in_order and sum(length(part) for part in factor.parts) == factor.size


def narrow(product: Dimension, start: int, stop: int, reason: str, step: int = 1) -> Dimension:
    """Returns the positions `start` to `stop` of a dimension.

    A slice of a concatenation is one of its parts. A slice of a product is a product again where
    it can be: within one position of the outer factors, it has only the inner ones.

        (B 2, S 24)[0:24] gives (S 24,), (T 4, S 24)[24:72] gives (T 2, S 24)
    """
    picked = _pick(product, range(start, stop, step), reason)
    return picked or anonymous(1)


def _pick(product: Dimension, positions: range, reason: str) -> Dimension:
    if not product or positions == range(length(product)):
        return product
    first, rest = product[0], product[1:]
    if not rest:
        return _pick_one(first, positions, reason)
    inner, step, size = length(rest), positions.step, len(positions)
    if inner == 1:
        return _pick_one(first, positions, reason) + rest
    start, last = positions[0], positions[-1]
    outer = range(start // inner, last // inner + 1)
    if len(outer) == 1:
        return _pick(rest, range(start % inner, last % inner + 1, step), reason)
    if step % inner == 0:  # one position of the inner factors
        return _pick_one(first, range(outer.start, outer.stop, step // inner), reason)
    within = range(start % inner, inner, step)
    if start % inner < step and inner % step == 0 and size == len(outer) * len(within):
        return _pick_one(first, outer, reason) + _pick(rest, within, reason)
    return blur(product, size, reason)


def _pick_one(factor: Factor, positions: range, reason: str) -> Dimension:
    if positions == range(factor.size):
        return (factor,)
    if not is_join(factor):
        return blur((factor,), len(positions), reason)
    kept: list[Dimension] = []
    offset = 0
    for part in factor.parts:
        size = length(part)
        inside = [n - offset for n in positions if offset <= n < offset + size]
        if inside:
            kept.append(_pick(part, range(inside[0], inside[-1] + 1, positions.step), reason))
        offset += size
    return kept[0] if len(kept) == 1 else join(kept)


def find_position(product: Dimension, start: int, stop: int) -> tuple[Dimension, int] | None:
    """Returns the outer factors of which the slice `start:stop` has one position, and which one.

    For a slice of one position, these are all factors.
    """
    if stop - start == 1:
        return product, start
    found = None
    for i in range(1, len(product)):
        inner = length(product[i:])
        if start // inner != (stop - 1) // inner:
            break
        found = product[:i], start // inner
    return found


def combine(shape: Sequence[int], operands: Sequence[Dims]) -> Dims:
    """Returns the dimensions of a broadcast: each from the operand that says most about it.

    That is the one along the axis of lowest rank; among these, one in a known order, then one whose
    values are not constant, then the first.
    """
    result: list[Dimension] = []
    for i, size in enumerate(shape):
        candidates = []
        for dims in operands:
            j = i - (len(shape) - len(dims))
            if j >= 0 and length(dims[j]) == size:
                candidates.append(dims[j])
        result.append(min(candidates, key=_rank, default=anonymous(size)))
    return tuple(result)


def _rank(product: Dimension) -> tuple[float, bool, bool]:
    rank = min((axis.rank for factor in product for axis in factor.axes()), default=inf)
    is_lost = any(factor.parts and not is_join(factor) for factor in product)
    return rank, is_lost, is_named(product) and is_learned(product)
