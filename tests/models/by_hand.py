"""The cache written by hand: what compiled models are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Point(nn.Identity):
    """A value that is kept for `kind` where the cut is one of `cuts`.

    `num_points`: how many points one region has, one per stream.
    """

    def __init__(self, kind: str, *cuts: str, num_points: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.cuts = cuts or ("attention", "branch")
        self.num_points = num_points


Masks = Mapping[tuple[str, int], Sequence[bool]]
"""(kind, layer) -> one bool per step, True where it reuses."""


def run_by_hand(
    model: nn.Module, calls: Iterable[Mapping[str, Any]], masks: Masks, cut: str
) -> list[Any]:
    """Runs the calls in order; where its mask says so, a point gives the value it last had."""
    kept: dict[Point, Tensor] = {}
    layers: dict[Point, int] = {}
    step = 0

    def keep(point: nn.Module, _: Any, output: Tensor) -> Tensor:
        assert isinstance(point, Point)
        earlier = sum(other.kind == point.kind for other in layers)
        layer = layers.setdefault(point, earlier // point.num_points)
        if (point.kind, layer) in masks and masks[point.kind, layer][step]:
            return kept[point]
        kept[point] = output
        return output

    points = [m for m in model.modules() if isinstance(m, Point) and cut in m.cuts]
    handles = [point.register_forward_hook(keep) for point in points]
    results = []
    try:
        with torch.no_grad():
            for call in calls:
                results.append(model(**call))
                step += 1
    finally:
        for handle in handles:
            handle.remove()
    return results
