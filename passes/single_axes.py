"""single_axes: names kinds if axes of the latents have one position.

The shapes do not tell if such an axis lies in the batch or in a sequence. If a larger call does not
tell either (:mod:`pabc.passes.enlarge`), all possible places of the axes are tried; if the
attention has the same kind in all of them, that is its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch.fx import GraphModule

from pabc.base.kinds import KINDS

from .facts import Denoised
from .ir import Axis, Factor, user_inputs, value
from .kinds import FoundAttention, TokenAxes, find_token_axes, name_kind, undecided
from .provenance.factors import Dimension, is_join, is_named, length


def find_single_axes(gm: GraphModule, denoised: Denoised, found: list[FoundAttention]) -> list[int]:
    """Returns the dimensions of the latents that may be token axes of one position, or channels.

    Returns an empty list if all axes except the batch and the channels have several positions.
    """
    shape, positions = _latent_positions(gm, denoised.latents, found)
    single = [dim for dim in range(1, len(shape)) if positions.get(dim, 1) == 1]
    return single if len(single) > 1 else []


def hinges_on_single_axes(found: FoundAttention, latents: str) -> bool:
    """Returns True if the kind depends on where an axis of the latents of one position lies.

    It does for self-attention among the latents only.
    """
    sources = {axis.source for factor in (*found.query, *found.key) for axis in factor.axes()}
    joined = any(map(is_join, (*found.query, *found.key)))
    elsewhere = bool(sources) and latents not in sources
    on_latents = found.query_on_latents and found.key_on_latents
    return on_latents and not (elsewhere or joined or found.packed)


@dataclass(frozen=True)
class SingleAxes:
    """The axes of the latents that have one position, and the token axes of the streams.

    `choices`: for each axis that may be the channels, the other axes of one position, and the
    token axes of the streams in that case.
    """

    latents: str
    streams: list[TokenAxes]
    choices: list[tuple[list[Axis], list[TokenAxes]]]

    @classmethod
    def of(cls, gm: GraphModule, denoised: Denoised, found: list[FoundAttention]) -> SingleAxes:
        """Finds the axes of one position in a graph with these attentions."""
        latents = denoised.latents
        shape, positions = _latent_positions(gm, latents, found)
        single = find_single_axes(gm, denoised, found)
        open_axes = [Axis(latents, d) for d in single if shape[d] == 1 or d in positions]
        has_channels = len(open_axes) < len(single)
        choices = []
        for channels in [None] if has_channels else open_axes:
            tokens = [axis for axis in open_axes if axis != channels]
            seen = [_place(f, open_axes, outside=tokens) for f in found]
            choices.append((tokens, _find_streams(gm, denoised, seen)))
        return cls(latents, _find_streams(gm, denoised, found), choices if open_axes else [])

    def name_kind(self, found: FoundAttention) -> str:
        """Returns the kind of an attention, if it is the same wherever these axes lie.

        Raises: ValueError if it is not, and as :func:`pabc.passes.kinds.name_kind` does.
        """
        if not self.choices or not hinges_on_single_axes(found, self.latents):
            return name_kind(found, self.streams)
        kinds = {name_kind(placed, streams) for placed, streams in self._placements(found)}
        if len(kinds) == 1:
            return kinds.pop()
        axes = sorted({str(axis) for tokens, _ in self.choices for axis in tokens})
        raise undecided(
            found,
            f"{', '.join(axes)} {'has' if len(axes) == 1 else 'have'} one position, which may lie "
            "in the batch or in the sequence, and the model takes no larger input that would show "
            "it",
            [kind for kind in KINDS if kind in kinds],
        )

    def _placements(
        self, found: FoundAttention
    ) -> Iterator[tuple[FoundAttention, list[TokenAxes]]]:
        """Yields the attention with each axis in its sequence or in its other dimensions.

        Skips placements that leave nothing in the sequence of an attention that has tokens there.
        """
        every = {axis for tokens, _ in self.choices for axis in tokens}
        for tokens, streams in self.choices:
            for inside in product((True, False), repeat=len(tokens)):
                chosen = [axis for axis, is_in in zip(tokens, inside, strict=True) if is_in]
                others = [axis for axis in tokens if axis not in chosen]
                placed = _place(found, every, inside=chosen, outside=others)
                is_empty = length(placed.query) == 1 and not is_named(placed.query)
                if not (is_empty and is_named(found.query)):
                    yield placed, streams


def _find_streams(
    gm: GraphModule, denoised: Denoised, found: list[FoundAttention]
) -> list[TokenAxes]:
    streams = dict.fromkeys(denoised.streams.values())  # the latents first
    return [find_token_axes(gm, found, name) for name in streams]


def _place(
    found: FoundAttention,
    axes: Iterable[Axis],
    *,
    inside: Sequence[Axis] = (),
    outside: Sequence[Axis] = (),
) -> FoundAttention:
    """Returns the attention as if axes had several positions: in the sequence, outside, or gone."""
    gone = set(axes)
    query, key, outer = (_without(p, gone) for p in (found.query, found.key, found.outer))
    more, apart = (tuple(Factor(2, axis) for axis in some) for some in (inside, outside))
    return replace(found, query=query + more, key=key + more, outer=outer + apart)


def _without(dimension: Dimension, axes: set[Axis]) -> Dimension:
    kept = [
        replace(factor, parts=tuple(filter(None, (_without(p, axes) for p in factor.parts))))
        for factor in dimension
        if factor.axis not in axes
    ]
    return tuple(kept)


def _latent_positions(
    gm: GraphModule, latents: str, found: list[FoundAttention]
) -> tuple[torch.Size, dict[int, int]]:
    """Returns the latents' shape, and dimension -> number of positions along it in attentions."""
    shape = next(value(n).shape for n in user_inputs(gm.graph) if n.name == latents)
    positions: dict[int, int] = {}
    for attention in found:
        for dim, count in _count_positions((*attention.query, *attention.outer), latents).items():
            positions[dim] = max(count, positions.get(dim, 1))
    return shape, positions


def _count_positions(dimension: Dimension, latents: str) -> dict[int, int]:
    """Returns dimension of the latents -> number of positions along it in `dimension`.

    It has all dimensions along which `dimension` lies, those of its concatenated parts included.
    """
    counts: dict[int, int] = {}
    for factor in dimension:
        if is_join(factor):
            for part in factor.parts:
                counts.update(_count_positions(part, latents))
            continue
        for axis in factor.axes():
            if axis.source == latents:
                counts[axis.dim] = counts.get(axis.dim, 1) * factor.size
    return counts
