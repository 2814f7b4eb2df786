"""Hoisted values: what a program computes once a generation, and again where a source changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pabc.passes import PrologueGraph
from pabc.runtime.prologue import ProloguePart, first_copies, part_of_prologue, whole_prologue
from pabc.runtime.versions import TensorVersions
from pabc.runtime.weights import Weights


class Hoisted(NamedTuple):
    """Values of a prologue, and the tensors that they were computed from."""

    sources: TensorVersions
    values: tuple[torch.Tensor, ...]


class Prologue:
    """Computes the hoisted values of a program.

    Args:
        prologue: the graph, and the positions of the inputs that it reads.
        weights: the tensors of the model that it reads, and others.
        narrows_copies: whether repeated copies are returned as the first of them, as compiled
            phases expect them.

    Attributes:
        graph: (inputs) -> hoisted values.
        steady: ascending positions of the inputs that the graph reads.
    """

    def __init__(
        self,
        prologue: PrologueGraph,
        weights: Weights,
        *,
        narrows_copies: bool,
    ) -> None:
        graph = prologue.graph
        self.graph, self.steady = graph, prologue.steady
        self._weights = weights.live(
            str(node.target) for node in graph.graph.nodes if node.op == "get_attr"
        )
        self._narrows_copies = narrows_copies
        self._whole = whole_prologue(graph)
        self._parts: dict[tuple[int, ...], ProloguePart] = {}

    def update(self, held: Hoisted | None, inputs: Sequence[Any]) -> Hoisted:
        """Returns the values for these inputs. Those in `held` that follow from nothing that
        changed since are kept, the others recomputed; all of them, where a weight changed."""
        sources = [*[inputs[i] for i in self.steady], *self._weights]
        if held is not None and held.sources.hold_for(sources):
            return held
        versions = TensorVersions.of(sources)
        part = self._whole if held is None else self._part(held.sources.changed(sources))
        fresh = part.graph(*inputs)
        if self._narrows_copies:
            fresh = first_copies(part.graph, fresh)
        values = list(fresh if held is None else held.values)
        for place, tensor in zip(part.places, fresh, strict=True):
            values[place] = tensor
        return Hoisted(versions, tuple(values))

    def follow_weights(self) -> None:
        """Drops what was derived from the graph before weights in it were replaced."""
        self._parts = {}  # not cleared: a step in another thread may add to the old one

    def _part(self, changed: tuple[int, ...]) -> ProloguePart:
        """Returns what to run where these of the sources changed; steady inputs come first."""
        num_steady = len(self.steady)
        if len(changed) == num_steady or any(i >= num_steady for i in changed):
            return self._whole
        parts = self._parts
        part = parts.get(changed)
        if part is None:
            positions = [self.steady[i] for i in changed]
            part = parts[changed] = part_of_prologue(self.graph, positions)
        return part
