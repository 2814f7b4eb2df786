"""Axis provenance: the factors of a result's dimensions, by the terms of an op's relation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from ..ir import Dims
from ..relations.terms import (
    Across,
    Join,
    Keep,
    Like,
    Merge,
    Mix,
    Narrow,
    New,
    Pad,
    Pick,
    Regroup,
    Relation,
    Roll,
    Source,
    Stack,
    Term,
    Unknown,
    Write,
)
from .factors import (
    Dimension,
    anonymous,
    blur,
    combine,
    is_join,
    is_learned,
    is_named,
    join,
    learned,
    length,
    narrow,
    regroup,
    unlearned,
)

Known = Callable[[Node], Dims]
"""Node -> the dimensions of the tensor that it yields."""


def follow(relation: Relation, known: Known, reason: str) -> Dims:
    """Returns the dimensions of a result, given those of the operands.

    Args:
        relation: what the op does.
        known: the operands' dimensions.
        reason: what a factor says whose provenance the op loses.
    """
    follower = _Follower(known, reason)
    return tuple(map(follower.follow, relation.terms))


@dataclass(slots=True)
class _Follower:
    """Follows the terms of one relation."""

    known: Known
    reason: str
    views: dict[tuple[tuple[Source, ...], tuple[int, ...]], Dims] = field(default_factory=dict)
    """Runs of dimensions that were regrouped already."""

    def follow(self, term: Term) -> Dimension:
        """Returns the factors of one dimension."""
        match term:
            case Keep(size, sources):
                return self._best(size, sources)
            case Regroup(run, sizes, index):
                return self._view(run, sizes)[index]
            case Narrow(source=source, start=start, step=step):
                return narrow(self._at(source), start, term.stop, self.reason, step)
            case Join(parts):
                return join(list(map(self._at, parts)))
            case Stack():
                return anonymous(term.size, self.reason)
            case Merge(terms):
                return tuple(factor for inner in terms for factor in self.follow(inner))
            case Roll(source=source):
                return self._at(source)
            case Pad():
                return self._pad(term)
            case Across(size, sources):
                return self._across(size, sources)
            case Pick(size, indices, sources):
                drawn = self._blur(size, sources)
                return combine((size,), [(self._best(size, indices),), (drawn,)])[0]
            case Write():
                return self._write(term)
            case Mix(size, terms):
                product = tuple(factor for inner in terms for factor in self.follow(inner))
                return blur(product, size, self.reason)
            case Like(source=source):
                return tuple(replace(factor, learned=True) for factor in self._at(source))
            case New(size, is_constant):
                return learned((size,))[0] if is_constant else anonymous(size)
            case Unknown(size):
                return anonymous(size, self.reason)

    def _at(self, source: Source) -> Dimension:
        return self.known(source.tensor)[source.dim]

    def _best(self, size: int, sources: Sequence[Source]) -> Dimension:
        """The source that knows most."""
        return combine((size,), [(self._at(source),) for source in sources])[0]

    def _blur(self, size: int, sources: Sequence[Source]) -> Dimension:
        product = tuple(factor for source in sources for factor in self._at(source))
        return blur(product, size, self.reason)

    def _view(self, run: tuple[Source, ...], sizes: tuple[int, ...]) -> Dims:
        if (run, sizes) not in self.views:
            self.views[run, sizes] = regroup(tuple(map(self._at, run)), sizes, self.reason)
        return self.views[run, sizes]

    def _across(self, size: int, sources: Sequence[Source]) -> Dimension:
        if any(source.size == size for source in sources):
            return self._best(size, sources)
        return self._blur(size, sources)

    def _pad(self, term: Pad) -> Dimension:
        """Makes the padding a part of its own, or of the tokens' axis if they have only one."""
        product = self._at(term.source)
        if len(product) == 1 and not is_join(product[0]):
            return self._across(term.size, (term.source,))
        start, stop = max(-term.before, 0), length(product) - max(-term.after, 0)
        product = narrow(product, start, stop, self.reason)
        ends = [learned((n,))[0] if n > 0 else () for n in (term.before, term.after)]
        parts = [part for part in (ends[0], product, ends[1]) if part]
        return join(parts) if len(parts) > 1 else product

    def _write(self, term: Write) -> Dimension:
        whole, written = self._at(term.whole), self.known(term.written)
        if term.dim is None:
            return whole if all(map(is_learned, written)) else unlearned(whole)
        part = written[term.dim]
        merged = self._overlay(whole, part)
        if not term.span or term.span.step != 1 or merged == whole:
            return merged
        start, stop = term.span.start, term.span.stop
        ends = [(0, start), (stop, length(whole))]
        before, after = (
            narrow(whole, low, high, self.reason) if low < high else () for low, high in ends
        )
        return join([product for product in (before, part, after) if product])

    def _overlay(self, whole: Dimension, part: Dimension) -> Dimension:
        """A dimension with another's positions in some places, which are not known."""
        if _axes_of(part) <= _axes_of(whole):
            return whole if is_learned(part) else unlearned(whole)
        if length(whole) == length(part) and not is_named(whole):
            return part
        return blur(whole + part, length(whole), self.reason)


def _axes_of(product: Dimension) -> set[object]:
    return {axis for factor in product for axis in factor.axes()}
