"""units: finds the sequences of regions that a model repeats, its blocks, by their structure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from ..ir import Region
from ..tracing.sizes import hint


@dataclass(frozen=True)
class Look:
    """The look of a region.

    Attributes:
        kind: its kind.
        shapes: the shapes of its cuts.
        ops: the ops of its graph, with the shapes of their results.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    ops: tuple[Hashable, ...]

    @classmethod
    def of(cls, region: Region, body: GraphModule) -> Look:
        """Returns the look of a region, of which `body` is the graph."""
        nodes = (n for n in body.graph.nodes if n.op == "call_function")
        ops = tuple((n.target, str(getattr(hint(n), "shape", ""))) for n in nodes)
        return cls(region.kind, region.shapes, ops)

    def is_like(self, other: Look) -> bool:
        """Returns True for regions of one kind of which one has all streams of the other."""
        mine, theirs = set(self.shapes), set(other.shapes)
        return self.kind == other.kind and (mine <= theirs or theirs <= mine)


def find_units(looks: Sequence[Look]) -> list[range]:
    """Returns the blocks of a model, as ranges of indices of its regions, in order.

    A block is the shortest sequence of regions that looks like the one after it. A block that is
    unlike its neighbors, such as a last one that lacks a stream, is one if its regions are like
    some of a neighbor's, in the same order, or the other way round. Regions that are in no block
    are left out; without repetition, all are.

        regions                                   blocks
        full cross mlp full cross mlp             [0, 3), [3, 6)
        joint mlp mlp joint mlp mlp joint mlp     [0, 3), [3, 6), [6, 8)
    """
    units: list[range] = []
    stop = 0
    for run in _find_runs(looks):
        units += _find_odd(looks, range(stop, run[0].start), [run[0], *units[-1:]])
        units += run
        stop = run[-1].stop
    return units + _find_odd(looks, range(stop, len(looks)), units[-1:])


def _find_runs(looks: Sequence[Look]) -> list[list[range]]:
    """Returns the runs of equal consecutive sequences, each as early as possible."""
    numbers: dict[Look, int] = {}
    series = [numbers.setdefault(look, len(numbers)) for look in looks]
    runs: list[list[range]] = []
    start = done = 0
    while start < len(series):
        size = _find_period(series, start)
        if not size:
            start += 1
            continue
        stop = start + size
        while stop < len(series) and series[stop] == series[stop - size]:
            stop += 1
        first = _align(looks, done, start, stop, size)
        runs.append([range(i, i + size) for i in range(first, stop - size + 1, size)])
        start = done = runs[-1][-1].stop
    return runs


def _find_period(series: Sequence[int], start: int) -> int:
    """Returns the length of the sequence from `start` that is repeated at once, or 0.

    It is the one whose repetitions reach furthest, and the shortest of these.
    """
    best, reach = 0, 0
    for size in range(1, (len(series) - start) // 2 + 1):
        stop = start + size
        while stop < len(series) and series[stop] == series[stop - size]:
            stop += 1
        whole = (stop - start) // size * size
        if whole > max(size, reach):
            best, reach = size, whole
    return best


def _align(looks: Sequence[Look], done: int, start: int, stop: int, size: int) -> int:
    """Returns where the first unit of a run begins.

    If other regions stand before the run, the first of them begins a block as well: a unit begins
    with a region like it, if it may without a repetition less.
    """
    spare = (stop - start) % size
    for first in range(start, start + spare + 1):
        if start > done and looks[first].is_like(looks[done]):
            return first
    return start


def _find_odd(looks: Sequence[Look], rest: range, neighbors: Sequence[range]) -> list[range]:
    """Returns the blocks among regions that do not repeat: like neighboring ones, or one another.

    Those that are hoisted in part, as the text's of a first block, look unlike the others.
    """
    for unit in neighbors if rest else ():
        chunks = _split(looks, rest, looks[unit.start])
        if all(_is_part(looks, c, unit) or _is_part(looks, unit, c) for c in chunks):
            return chunks
    chunks = _split(looks, rest, looks[rest.start]) if rest else []
    longest = max(chunks, key=len, default=range(0))
    is_found = len(chunks) > 1 and all(_is_part(looks, c, longest) for c in chunks)
    return chunks if is_found else []


def _split(looks: Sequence[Look], rest: range, first: Look) -> list[range]:
    """Splits a range before each region that is like the one that begins a block."""
    begins = [i for i in rest if first.is_like(looks[i])]
    starts = sorted({rest.start, *begins})
    return [range(a, b) for a, b in zip(starts, [*starts[1:], rest.stop], strict=True)]


def _is_part(looks: Sequence[Look], part: range, whole: range) -> bool:
    """Returns True if the regions of `part` are like some of `whole`, in the same order."""
    rest = iter(whole)
    return all(any(looks[i].is_like(looks[j]) for j in rest) for i in part)
