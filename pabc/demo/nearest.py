"""Recognizes generated pictures by the nearest of the pictures that the model knows."""

from __future__ import annotations

import torch

from pabc.demo.emoji import PLACES, Caption, Pictures


def accuracy(known: Pictures, samples: torch.Tensor, captions: list[Caption]) -> dict[str, float]:
    """Returns the shares of `samples` (N, 3, H, W) in [-1, 1] that are what their caption says.

    "picture": of all pictures, mirrored and placed as the caption says, that of the caption is the
    nearest (by mean squared error). "placement": of all ways to mirror and to place the picture
    of the caption, that of the caption is the nearest; equal ones count as one.
    """
    if len(captions) != len(samples):
        raise ValueError(
            f"captions: expected one per sample ({len(samples)}), found {len(captions)}"
        )
    pairs = list(zip(samples, captions, strict=True))
    right_picture = [_is_nearest(known, *pair, _all_pictures(known, pair[1])) for pair in pairs]
    right_place = [_is_nearest(known, *pair, _all_placements(pair[1])) for pair in pairs]
    return {
        "picture": sum(right_picture) / len(pairs),
        "placement": sum(right_place) / len(pairs),
    }


def _all_pictures(known: Pictures, caption: Caption) -> list[Caption]:
    return [
        Caption(picture, caption.mirrored, caption.place) for picture in range(len(known.images))
    ]


def _all_placements(caption: Caption) -> list[Caption]:
    return [
        Caption(caption.picture, mirrored, place) for mirrored in (False, True) for place in PLACES
    ]


def _is_nearest(
    known: Pictures, sample: torch.Tensor, caption: Caption, candidates: list[Caption]
) -> bool:
    errors = (known.render(candidates) - sample).square().mean((1, 2, 3))
    return bool(errors[candidates.index(caption)] <= errors.min())
