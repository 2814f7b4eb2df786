"""Runs a prologue, or the part of it that follows from the inputs that changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from pabc.passes import (
    Reach,
    copy_into,
    keep_one,
    make_module,
    needed_by,
    output_node,
    user_inputs,
    value,
)


@dataclass(frozen=True)
class ProloguePart:
    """A graph that computes some of a prologue's results: those at the positions `places`."""

    graph: GraphModule
    places: tuple[int, ...]


def whole_prologue(prologue: GraphModule) -> ProloguePart:
    """Returns the part that computes all results."""
    outputs: Sequence[Node] = output_node(prologue.graph).args[0]
    return ProloguePart(prologue, tuple(range(len(outputs))))


def part_of_prologue(prologue: GraphModule, changed: Collection[int]) -> ProloguePart:
    """Returns the part that computes the results that follow from the inputs at these positions.

    Without it, a timestep of several dimensions would recompute the text's keys at every step.
    """
    inputs = user_inputs(prologue.graph)
    outputs: Sequence[Node] = output_node(prologue.graph).args[0]
    reach = Reach(prologue.graph)
    mask = reach.mask(inputs[i] for i in changed)
    places = tuple(i for i, node in enumerate(outputs) if reach.touches(node, mask))
    graph = Graph()
    mapping: dict[Node, Node] = {}
    copy_into(graph, inputs, mapping)
    copy_into(graph, needed_by([outputs[i] for i in places]), mapping)
    graph.output(tuple(mapping[outputs[i]] for i in places))
    return ProloguePart(make_module(prologue, graph), places)


def first_copies(prologue: GraphModule, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Returns a prologue's results with only the first of their copies, even if those differ.

    Compiled code expects the shapes that it was compiled for, and may itself round differently.
    """
    outputs: Sequence[Node] = output_node(prologue.graph).args[0]
    return tuple(
        _narrowed(given, value(output)) if output.target is keep_one else given
        for given, output in zip(values, outputs, strict=True)
    )


def _narrowed(given: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return given if given.shape == like.shape else given[tuple(map(slice, like.shape))].clone()
