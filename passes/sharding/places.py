"""Where an axis is in a tensor, and what a rank has of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir import Axis, Dims, Factor


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes among which tokens are divided: how many, which one this is, their group."""

    size: int
    rank: int
    group: str

    def share(self, size: int) -> int:
        """The positions of an axis that each rank has; the last ones' may be padding."""
        return -(-size // self.size)


@dataclass(frozen=True, slots=True)
class AxisPlace:
    """An axis of `size` positions in dimension `dim` of a tensor, which is before x size x after.

    `sizes`: those of the whole tensor. `low` and `high`: how many tokens of others, which every
    rank has, lie in that dimension before those of the axis and after them (text in one sequence
    with latents).
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
        """The place in what is left without the tokens of others."""
        sizes = list(self.sizes)
        sizes[self.dim] -= self.low + self.high
        return replace(self, sizes=tuple(sizes), low=0, high=0)

    def count(self, size: int) -> int:
        """Tokens of `size` positions of the axis."""
        return self.before * size * self.after

    @property
    def at(self) -> int:
        """The dimension of the axis, where it is one of its own."""
        return self.dim + 1

    def apart(self, size: int) -> list[int]:
        """Sizes with the axis as a dimension of its own, of which there are `size` positions."""
        lead, rest = self.sizes[: self.dim], self.sizes[self.dim + 1 :]
        return [*lead, self.before, size, self.after, *rest]

    def together(self, size: int) -> list[int]:
        """Sizes of the tensor with `size` positions of the axis."""
        lead, rest = self.sizes[: self.dim], self.sizes[self.dim + 1 :]
        return [*lead, self.low + self.count(size) + self.high, *rest]

    @property
    def num_before(self) -> int:
        """Elements from one position of what is before the axis to the next: their number."""
        return math.prod(self.sizes[: self.dim]) * self.before

    def is_like(self, other: AxisPlace) -> bool:
        """Whether the axis is cut in the same way."""
        mine, others = ((p.before, p.size, p.after, p.low, p.high) for p in (self, other))
        return mine == others

    def from_right(self, num_dims: int) -> int:
        """Its dimension in a tensor of so many dimensions that is broadcast with this one."""
        return num_dims - len(self.sizes) + self.dim


def find_place(sizes: Sequence[int], dims: Dims | None, axis: Axis) -> AxisPlace | None:
    """Where an axis is in a tensor; None where it is nowhere, or in more than one place."""
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
    """The same dimensions with another number of positions of an axis, where they can be told."""

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
