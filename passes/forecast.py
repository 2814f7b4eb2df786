"""forecast: weighted sums of what a slot kept at several steps.

A slot that is reused holds the values of one step or of several, the newest first. Hold takes the
newest; a forecast adds them up, each with a weight. Weights are an input of a phase, so that one
phase serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from .ir import aten

Cuts = tuple[torch.Tensor, ...]


class Reused(NamedTuple):
    """The values of one slot that a step reuses.

    Attributes:
        history: the cuts of several steps, the newest first.
        weights: one float32 number for each of these steps; None: the newest cuts are held.
    """

    history: tuple[Cuts, ...]
    weights: torch.Tensor | None = None


def forecast(values: Sequence[torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the weighted sum of values of one cut, the newest first.

    The sum is computed in float32, or in the values' own dtype if that is wider, and rounded once.
    Values that are no floating-point or complex numbers are held: the newest one is returned.
    """
    if weights is None or not _has_sums(values[0]):
        return values[0]
    wide = _wide(values[0].dtype)
    terms = [each.to(wide) * weights[i] for i, each in enumerate(values)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(values[0].dtype)


def insert_forecast(
    graph: Graph, values: Sequence[Node], weights: Node, first: int, cut: torch.Tensor
) -> Node:
    """Appends the ops of :func:`forecast` to a graph.

    Args:
        graph: the graph of a phase.
        values: the values of one cut, the newest first.
        weights: a vector that has the weights of these values, and of others.
        first: the position of the first of these weights.
        cut: the fake tensor of the cut.
    """
    if not _has_sums(cut):
        return values[0]
    wide = _wide(cut.dtype)
    total: Node | None = None
    for i, each in enumerate(values):
        weight = graph.call_function(aten.select.int, (weights, 0, first + i))
        term = graph.call_function(aten.mul.Tensor, (_cast(graph, each, cut.dtype, wide), weight))
        total = term if total is None else graph.call_function(aten.add.Tensor, (total, term))
    assert total is not None
    return _cast(graph, total, wide, cut.dtype)


def _has_sums(cut: torch.Tensor) -> bool:
    return cut.is_floating_point() or cut.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which values of `dtype` are summed."""
    return torch.promote_types(dtype, torch.float32)


def _cast(graph: Graph, node: Node, given: torch.dtype, wanted: torch.dtype) -> Node:
    if given == wanted:
        return node
    return graph.call_function(aten._to_copy.default, (node,), {"dtype": wanted})
