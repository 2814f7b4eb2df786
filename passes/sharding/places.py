"""Places of an axis in a tensor, and the share of it that a rank has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir import Axis, Dims, Factor


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes among which tokens are sharded.

    Attributes:
        size: their number.
        rank: which one this is.
        group: the name of their process group.
    """

    size: int
    rank: int
    group: str

    def share(self, size: int) -> int:
        """Returns how many of `size` positions each rank has; the last ones may be padding."""
        return -(-size // self.size)


@dataclass(frozen=True, slots=True)
class AxisPlace:
    """The place of an axis: dimension `dim` is low + (before x size x after) + high.

    Attributes:
        sizes: of the whole tensor.
        dim: the dimension that the axis lies in.
        before: the product of the factors outside of the axis.
        size: the number of positions of the axis.
        after: the product of the factors inside of it.
        low: the number of tokens before those of the axis that every rank has: text in one
            sequence with latents, say.
        high: the number of such tokens after those of the axis.
    """

    sizes: tuple[int, ...]
    dim: int
    before: int
    size: int
    after: int
    low: int = 0
    high: int = 0

    @property
    def inner(self) -> AxisPlace:
        """The place in the tensor without the tokens that every rank has."""
        sizes = list(self.sizes)
        sizes[self.dim] -= self.low + self.high
        return replace(self, sizes=tuple(sizes), low=0, high=0)

    def count(self, size: int) -> int:
        """Returns the number of tokens at `size` positions of the axis."""
        return self.before * size * self.after

    @property
    def at(self) -> int:
        """The dimension of the axis in a view that has it apart (:meth:`apart`)."""
        return self.dim + 1

    def apart(self, size: int) -> list[int]:
        """Returns sizes with the axis, of `size` positions, as a dimension of its own."""
        lead, rest = self.sizes[: self.dim], self.sizes[self.dim + 1 :]
        return [*lead, self.before, size, self.after, *rest]

    def together(self, size: int) -> list[int]:
        """Returns the sizes of the tensor with `size` positions of the axis."""
        lead, rest = self.sizes[: self.dim], self.sizes[self.dim + 1 :]
        return [*lead, self.low + self.count(size) + self.high, *rest]

    @property
    def num_before(self) -> int:
        """The number of positions of everything outside of the axis, in row-major order."""
        return math.prod(self.sizes[: self.dim]) * self.before

    def is_like(self, other: AxisPlace) -> bool:
        """Returns whether the axis divides its dimension in the same way."""
        mine, others = ((p.before, p.size, p.after, p.low, p.high) for p in (self, other))
        return mine == others

    def from_right(self, num_dims: int) -> int:
        """Returns the dimension of the axis in a tensor that is broadcast with this one."""
        return num_dims - len(self.sizes) + self.dim


def find_place(sizes: Sequence[int], dims: Dims | None, axis: Axis) -> AxisPlace | None:
    """Returns where an axis lies in a tensor; None if nowhere, or in more than one place."""
    found: list[AxisPlace | None] = []
    for dim, product in enumerate(dims or ()):
        for i, factor in enumerate(product):
            if axis not in factor.axes():
                continue
            if factor.reason:
                found.append(None)
            elif factor.parts:
                rest = math.prod(f.size for f in product) // max(factor.size, 1)
                found.append(_in_parts(sizes, dim, factor, axis) if rest == 1 else None)
            else:
                before, after = (_count(part) for part in (product[:i], product[i + 1 :]))
                found.append(AxisPlace(tuple(sizes), dim, before, factor.size, after))
    return found[0] if len(found) == 1 else None


def resize(dims: Dims, axis: Axis, to: Callable[[int], int]) -> Dims:
    """Returns dimensions with another number of positions of an axis, where these can be told
    apart."""

    def resized(factor: Factor) -> Factor:
        if factor.reason or axis not in factor.axes():
            return factor
        if not factor.parts:
            return replace(factor, size=to(factor.size))
        parts = tuple(tuple(map(resized, part)) for part in factor.parts)
        return replace(factor, size=sum(map(_count, parts)), parts=parts)

    return tuple(tuple(map(resized, product)) for product in dims)


def _in_parts(sizes: Sequence[int], dim: int, factor: Factor, axis: Axis) -> AxisPlace | None:
    counts = [_count(part) for part in factor.parts]
    having = [i for i, part in enumerate(factor.parts) if any(axis in f.axes() for f in part)]
    if len(having) != 1:
        return None
    part = factor.parts[having[0]]
    own = [i for i, f in enumerate(part) if f.axis == axis and not f.parts]
    if len(own) != 1 or sum(axis in f.axes() for f in part) != 1:
        return None
    before, after = _count(part[: own[0]]), _count(part[own[0] + 1 :])
    low, high = sum(counts[: having[0]]), sum(counts[having[0] + 1 :])
    return AxisPlace(tuple(sizes), dim, before, part[own[0]].size, after, low, high)


def _count(factors: Sequence[Factor]) -> int:
    return math.prod(f.size for f in factors)
