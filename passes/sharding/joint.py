"""Rules for sequences that hold tokens which every rank has beside the sharded ones.

Text and latents in one sequence: the latents' tokens are sharded, the text's are on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from torch.fx import Node

from ..ir import aten, value
from .by_position import compute_first_by_position
from .operands import Operands, ShardArguments, align
from .places import AxisPlace, Ranks


def join(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Concatenates or stacks: along the dimension of the axis, or another one."""
    parts, dim = (*node.args, 0)[:2]
    num_dims = value(node).ndim
    dim = int(dim) % num_dims
    if dim == place.dim:
        return _join_tokens(parts, place, have)
    inner, adds = place, node.target is aten.stack.default
    if adds:
        at = place.dim - (place.dim > dim)
        sizes = tuple(n for d, n in enumerate(place.sizes) if d != dim)
        inner = replace(place, sizes=sizes, dim=at)
    made = [align(part, inner, num_dims - adds, have) for part in parts]
    return None if None in made else ((made, dim), {})


def _join_tokens(parts: Sequence[Node], place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Concatenates tokens in shards with others that every rank has."""
    made: list[Node] = []
    low = 0
    for part in parts:
        own = have.place(part)
        if own is not None:
            if own.dim != place.dim or low + own.low != place.low:
                return None
            made.append(have.shard(part))
        else:
            made.append(have.whole(part))
        low += value(part).shape[place.dim]
    return (made, place.dim), {}


def some(node: Node, place: AxisPlace | None, have: Operands) -> ShardArguments | None:
    """Slices: along another dimension; or takes the sharded tokens alone, or the others alone."""
    source, dim, start, stop, step = _slice_of(node, 1)
    own = have.place(source)
    if own is None or dim % len(own.sizes) != own.dim:
        return None if place is None else compute_first_by_position(node, place, have)
    size = own.sizes[own.dim]
    start, stop = (min(n + size if n < 0 else n, size) for n in (start, stop))
    cuts = _local_bounds(own, (start, stop), have.ranks)
    is_own = place is not None and start <= own.low and stop >= size - own.high
    is_others = place is None and (stop <= own.low or start >= size - own.high)
    if step != 1 or not (is_own or is_others):
        return None
    return (have.shard(source), dim, *cuts), {}


def _slice_of(node: Node, num_tensors: int) -> tuple[Any, ...]:
    """Returns the arguments of a slice: `num_tensors` tensors, dimension, start, stop, step."""
    defaults = (0, None, None, 1)
    given = (*node.args, *defaults[len(node.args) - num_tensors :])
    tensors, (dim, start, stop, step) = given[:num_tensors], given[num_tensors:]
    return (*tensors, dim, start or 0, sys.maxsize if stop is None else stop, step)


def _local_bounds(own: AxisPlace, bounds: Sequence[int], ranks: Ranks) -> list[int]:
    """Returns where bounds, none of which lies among the axis's tokens, are in a shard."""
    last = own.low + own.count(own.size)
    less = own.count(own.size) - own.count(ranks.share(own.size))
    return [n if n < last else n - less for n in bounds]


def split(node: Node, place: AxisPlace | None, have: Operands) -> ShardArguments | None:
    """Splits: along another dimension; or the sharded tokens from the others."""
    source, sizes, dim = (*node.args, 0)[:3]
    own = have.place(source)
    if own is None or dim % len(own.sizes) != own.dim:
        return compute_first_by_position(node, place, have)
    if isinstance(sizes, int):
        return None
    bounds = [0, *accumulate(sizes)]
    first, last = own.low, own.sizes[own.dim] - own.high
    if [n for n in bounds if first <= n <= last] != [first, last]:  # not all in one part
        return None
    cuts = _local_bounds(own, bounds, have.ranks)
    return (have.shard(source), [b - a for a, b in pairwise(cuts)], dim), {}


def scatter(node: Node, place: AxisPlace, have: Operands) -> ShardArguments | None:
    """Writes a slice: along another dimension; or all of the sharded tokens."""
    into, source, dim, start, stop, step = _slice_of(node, 2)
    num_dims = len(place.sizes)
    if dim % num_dims != place.dim:
        both = [align(x, place, num_dims, have) for x in (into, source)]
        return None if None in both else ((*both, dim, start, stop, step), {})
    own = have.place(into)
    size = place.sizes[place.dim]
    if own is None or not own.is_like(place):
        return None
    if (start, min(stop, size), step) != (place.low, size - place.high, 1):
        return None
    made = align(source, place.inner, len(own.sizes), have)
    cuts = _local_bounds(own, (place.low, size - place.high), have.ranks)
    return None if made is None else ((have.shard(into), made, dim, *cuts), {})


def item(node: Node, place: AxisPlace | None, have: Operands) -> ShardArguments | None:
    """Takes one of several results: a shard; or, of a split, tokens that every rank has."""
    source, index = node.args
    assert isinstance(source, Node) and isinstance(index, int)
    if place is None and not _is_of_others(source, index, have):
        return None
    return (have.shard(source), index), {}


def _is_of_others(split: Node, index: int, have: Operands) -> bool:
    """Returns whether a part of a split holds only tokens that every rank has."""
    if split.target is not aten.split_with_sizes.default:
        return False
    source, sizes, dim = (*split.args, 0)[:3]
    own = have.place(source)
    if own is None or dim % len(own.sizes) != own.dim:
        return False
    start, stop = [0, *accumulate(sizes)][index:][:2]
    return stop <= own.low or start >= own.sizes[own.dim] - own.high
