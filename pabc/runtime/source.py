"""Tells values apart by what they were computed from: program, shapes, state of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pabc.runtime.bindings import InputShapes
from pabc.runtime.weights import Weights


class Source(Protocol):
    """The source of computed values; values of a source that differs are not valid."""

    @property
    def layout(self) -> InputShapes:
        """The sizes of the inputs, where one program serves several; else empty."""

    def difference(self, earlier: Source) -> str:
        """Returns what tells calls of this source from those of an earlier one: a key of
        :attr:`pabc.Stats.fallbacks`."""


@dataclass(frozen=True, slots=True)
class ValueSource:
    """A program, shapes and weights that values were computed from; others' values are not valid.

    Attributes:
        weights: the tensors that the program reads, which tell programs apart.
        state: how often some of them were replaced.
        layout: the sizes of the inputs that the program leaves open.
        tensors: the tensors among the inputs, by name: dtype, device, and shape as captured.
    """

    weights: Weights
    state: int
    layout: InputShapes
    tensors: Mapping[str, tuple[Any, ...]] = field(compare=False)

    def difference(self, earlier: Source) -> str:
        """Returns what tells calls of this source from those of an earlier one."""
        assert isinstance(earlier, ValueSource)
        if earlier.weights is self.weights:
            return "shape" if self.layout != earlier.layout else "weights"
        if not earlier.weights.are_of_this_state:
            return "model"
        if earlier.tensors.keys() != self.tensors.keys():
            return "arguments"  # of another structure, or no tensors where there were
        pairs = [(self.tensors[name], earlier.tensors[name]) for name in self.tensors]
        for i, reason in enumerate(("dtype", "device", "shape")):
            if any(mine[i] != theirs[i] for mine, theirs in pairs):
                return reason
        return "arguments"
