"""Arithmetic on factors: what splitting, merging, slicing and joining do to provenance."""

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
    """A dimension along no axis of an input."""
    return (Factor(size, reason=reason),)


def unknown(shape: Sequence[int], reason: str = "") -> Dims:
    """Dimensions along no axis of an input."""
    return tuple(anonymous(size, reason) for size in shape)


def learned(shape: Sequence[int]) -> Dims:
    """Dimensions of a weight or a constant."""
    return tuple((Factor(size, learned=True),) for size in shape)


def is_learned(product: Dimension) -> bool:
    """Whether all positions of a dimension are those of a weight or a constant."""
    return all(factor.learned for factor in product)


def unlearned(product: Dimension) -> Dimension:
    """The same dimension, holding values that are no constants."""
    return tuple(replace(factor, learned=False) for factor in product)


def length(product: Dimension) -> int:
    """The size of a dimension."""
    return prod(factor.size for factor in product)


def is_named(product: Dimension) -> bool:
    """Whether a dimension lies along any axis of an input."""
    return any(True for factor in product for _ in factor.axes())


def blur(product: Dimension, size: int, reason: str) -> Dimension:
    """A dimension of `size` that draws on `product` in an order that is no longer known."""
    axes = {axis for factor in product for axis in factor.axes()}
    constant = bool(product) and is_learned(product)
    if not axes:
        return (Factor(size, reason="" if constant else reason, learned=constant),)
    if len(axes) == 1:
        return (Factor(size, axis=axes.pop(), learned=constant),)
    parts = tuple((Factor(1, axis=axis),) for axis in sorted(axes, key=str))
    return (Factor(size, parts=parts, reason=reason, learned=constant),)


def regroup(dims: Dims, shape: Sequence[int], reason: str) -> Dims:
    """Provenance after a view: the row-major sequence of factors, cut anew into `shape`.

    A factor that a boundary falls into is split into an outer and an inner one along the same axis.
    Where boundaries of the two shapes cut across each other, the order is lost between the nearest
    boundaries that both have, and kept elsewhere.
    Factors of size one go to a dimension of size one where there is one, else to the dimension
    that ends before them, unless that has features alone and tokens follow.

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
"""Factors with the dimension that each was in."""


def _align(queue: _Queue, shape: Sequence[int], reason: str) -> _Queue:
    """The factors, with those that `shape` cuts across blurred into one for each of its sizes.

    Positions are counted from the last dimension: a boundary is the number of elements after it.
    Both shapes share one that lies on or evenly within a factor of each.
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
    """Whether a boundary is one of these, or splits what lies between two of them evenly."""
    low = max((n for n in boundaries if n <= place), default=1)
    high = min((n for n in boundaries if n >= place), default=place)
    return place % low == 0 and high % place == 0


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


def _take(queue: _Queue, size: int) -> _Queue:
    """Pops factors whose sizes multiply to `size`, splitting the last one where it is larger."""
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
    """The dimension of a concatenation; joins of joins are flattened."""
    parts: list[Dimension] = []
    for product in products:
        single = product[0] if len(product) == 1 else None
        parts.extend(single.parts if single is not None and is_join(single) else (product,))
    if not any(is_named(part) for part in parts):
        return (Factor(sum(map(length, parts)), learned=all(map(is_learned, parts))),)
    return (Factor(sum(length(part) for part in parts), parts=tuple(parts)),)


def is_join(factor: Factor) -> bool:
    """Whether the parts lie one after another, so that a slice can tell them apart."""
    in_order = bool(factor.parts) and not factor.reason
    return in_order and sum(length(part) for part in factor.parts) == factor.size


def narrow(product: Dimension, start: int, stop: int, reason: str, step: int = 1) -> Dimension:
    """The positions `start` to `stop` of a dimension.

    Of a concatenation those of each part, of a product those of its factors where they form one
    again: a slice that lies within one position of the outer factors has the inner ones alone.

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
    """The outer factors of which the positions `start` to `stop` have one alone, and which.

    Of a single position that is all of them.
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
    """Provenance of a broadcast: per dimension the operand that knows most.

    That is the one along an axis of lowest rank, in an order that is known, with values that are no
    constants, the earlier one of several.
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
