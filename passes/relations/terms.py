"""The terms in which a relation states where the positions of a result come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch.fx import Node

from ..ir import is_tensor, value


class Source(NamedTuple):
    """One dimension of a tensor."""

    tensor: Node
    dim: int

    @property
    def size(self) -> int:
        """The number of positions."""
        return value(self.tensor).shape[self.dim]


@dataclass(frozen=True, slots=True)
class Keep:
    """Position i is computed from position i of each source, in the same way for every i.

    Of all other operands and dimensions, every position reads the same. An operand that is given
    twice is a source twice if it is kept each time. A source of size one is broadcast; without any
    source of `size` positions, all positions hold the same.

    Attributes:
        sources: the dimensions that say what the positions are: a query's, say.
        modifiers: further ones that are read position by position: a mask's, a bias's.
    """

    size: int
    sources: tuple[Source, ...] = ()
    modifiers: tuple[Source, ...] = ()

    @property
    def operands(self) -> tuple[Source, ...]:
        """All dimensions that vary along this one."""
        return self.sources + self.modifiers


@dataclass(frozen=True, slots=True)
class Regroup:
    """One of the dimensions that a run of dimensions is viewed as, in row-major order.

    Attributes:
        run: the dimensions viewed, adjacent ones of one tensor.
        sizes: of all the dimensions that they are viewed as.
        index: which of those this is.
    """

    run: tuple[Source, ...]
    sizes: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        """The number of positions."""
        return self.sizes[self.index]


@dataclass(frozen=True, slots=True)
class Narrow:
    """Position i comes from position `start + i * step` of the source.

    `is_indexed`: an index tensor says so, made by `torch.arange`.
    """

    size: int
    source: Source
    start: int
    step: int = 1
    is_indexed: bool = False

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + (self.size - 1) * self.step + 1


@dataclass(frozen=True, slots=True)
class Join:
    """The positions of several dimensions, one after another."""

    parts: tuple[Source, ...]

    @property
    def size(self) -> int:
        """The number of positions."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Stack:
    """Position i comes from the i-th tensor, none of which has this dimension."""

    tensors: tuple[Node, ...]

    @property
    def size(self) -> int:
        """The number of positions."""
        return len(self.tensors)


@dataclass(frozen=True, slots=True)
class Merge:
    """Several terms as one dimension, the outer one first: a repetition, a shuffled pixel."""

    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        """The number of positions."""
        return prod(term.size for term in self.terms)


@dataclass(frozen=True, slots=True)
class Roll:
    """The positions of the source in another order: shifted in a circle, or reversed."""

    size: int
    source: Source
    shift: int = 0
    is_reversed: bool = False


@dataclass(frozen=True, slots=True)
class Pad:
    """The positions of the source after `before` constants and followed by `after` of them.

    A negative number crops instead.
    """

    size: int
    source: Source
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Across:
    """Positions in the order of the sources', each computed from several or all of those.

    Softmax, norms and windows do that. Where no source has as many positions, they are spread
    evenly over the sources.
    """

    size: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """Position i is the position of the sources that the indices name at i.

    With several sources, indices into each of them vary along this dimension.
    """

    size: int
    indices: tuple[Source, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """The positions of `whole`, some of which hold values of `written` instead.

    Attributes:
        whole: the dimension written into.
        written: the tensor that is written.
        dim: its dimension along this one, if it has one.
        span: the positions that are replaced, in order, where the arguments say so.
    """

    whole: Source
    written: Node
    dim: int | None = None
    span: range | None = None

    @property
    def size(self) -> int:
        """The number of positions."""
        return self.whole.size


@dataclass(frozen=True, slots=True)
class Mix:
    """Positions that draw on those of the terms in an order that the arguments do not tell."""

    size: int
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Like:
    """Constants in place of the source's values, one for each of its positions."""

    size: int
    source: Source


@dataclass(frozen=True, slots=True)
class New:
    """Positions that no operand has: the features of a projection, one that was reduced.

    `is_constant`: their values depend on no operand either.
    """

    size: int
    is_constant: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """Positions of which nothing is known."""

    size: int


Term = (
    Keep
    | Regroup
    | Narrow
    | Join
    | Stack
    | Merge
    | Roll
    | Pad
    | Across
    | Pick
    | Write
    | Mix
    | Like
    | New
    | Unknown
)


class Select(NamedTuple):
    """A dimension of which one position was taken: which one, if the arguments tell."""

    source: Source
    position: int | None


@dataclass(frozen=True, slots=True)
class Relation:
    """The effect of an op on dimensions.

    Attributes:
        terms: one per dimension of the result. What no term draws on was summed or reduced over.
        selected: dimensions of which the result has one position.
        is_exact: each element of the result is one of an operand, or a constant, and the terms say
            which; otherwise it is computed from those that the terms name.
    """

    terms: tuple[Term, ...]
    selected: tuple[Select, ...] = ()
    is_exact: bool = False


def sources_of(tensor: Node) -> list[Source]:
    """Returns the dimensions of a tensor."""
    return [Source(tensor, dim) for dim in range(value(tensor).ndim)]


def keep(source: Source) -> Keep:
    """Returns a term for a dimension that is as in the operand."""
    return Keep(source.size, (source,))


def keep_all(tensor: Node) -> tuple[Keep, ...]:
    """Returns terms for dimensions that are all as in the operand."""
    return tuple(map(keep, sources_of(tensor)))


def broadcast(shape: Sequence[int], operands: Iterable[Sequence[Source]]) -> list[Keep]:
    """Returns terms for dimensions of several operands that are aligned at the last one."""
    given = [list(dims)[::-1] for dims in operands]
    terms = [
        Keep(size, tuple(dims[i] for dims in given if len(dims) > i))
        for i, size in enumerate(reversed(shape))
    ]
    return terms[::-1]


def regroup(run: Sequence[Source], sizes: Sequence[int]) -> tuple[Regroup, ...]:
    """Returns the dimensions that a run of dimensions is viewed as."""
    return tuple(Regroup(tuple(run), tuple(sizes), i) for i in range(len(sizes)))


def tensors_of(nodes: Iterable[object]) -> list[Node]:
    """Returns the nodes that yield one tensor."""
    return [node for node in nodes if isinstance(node, Node) and is_tensor(node)]
