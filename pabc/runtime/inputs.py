"""From the arguments of a call to the inputs of a program's graphs, and back to the arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from pabc import passes
from pabc.base.arguments import pack
from pabc.passes import user_inputs
from pabc.runtime.arguments import delete_arguments
from pabc.runtime.strides import Strides


class ProgramInputs:
    """The inputs of one program's graphs.

    Args:
        guarded: the guarded graph and what is known of it.
        lifted: positions among the flattened arguments of numbers that are inputs.
        conditions: positions of the inputs of which copies are worth keeping.

    Attributes:
        names: the names of the inputs.
        lifted: as given.
        tensors: the tensors among the inputs, by name: dtype, device, and shape as captured.
    """

    def __init__(
        self, guarded: passes.Guarded, *, lifted: Collection[int], conditions: Collection[int]
    ) -> None:
        captured = guarded.captured
        self.names, self.lifted = captured.signature.inputs, frozenset(lifted)
        self._sizes, self._writes = captured.sizes, captured.writes
        self._deleted = captured.deleted
        self._strides = Strides(guarded, conditions)
        inputs = user_inputs(guarded.graph.graph)[1 : 1 + len(self.names)]
        vals = [node.meta.get("val") for node in inputs]
        self.tensors: Mapping[str, tuple[Any, ...]] = {
            name: (x.dtype, x.device, tuple(map(str, x.shape)))
            for name, x in zip(self.names, vals, strict=True)
            if isinstance(x, torch.Tensor)
        }

    def pack(self, leaves: Sequence[Any], only: Collection[int] | None = None) -> list[Any]:
        """Returns the inputs from the flattened arguments, with the strides of the capture.

        `only`: positions of those that are needed; the others may keep other strides.
        """
        return self._strides.fit(pack(leaves, self.lifted), only)

    def serve(self, leaves: Sequence[Any]) -> bool:
        """Returns whether graphs with dynamic shapes hold for these flattened arguments."""
        return self._sizes is not None and self._sizes.bind(pack(leaves, self.lifted)) is not None

    @property
    def has_dynamic_shapes(self) -> bool:
        """Returns True if the graphs leave sizes open."""
        return self._sizes is not None

    @property
    def writes_to_arguments(self) -> bool:
        """Returns True if the model writes to what it is passed."""
        return bool(self._writes or self._deleted)

    def write(self, inputs: Sequence[Any], values: Sequence[Any]) -> None:
        """Writes the values that the graph computed for written inputs to them. Equal ones are left
        alone: what was computed from an input that stays the same is kept for a generation."""
        for position, value in zip(self._writes, values, strict=True):
            if not torch.equal(inputs[position], value):
                inputs[position].copy_(value)

    def write_to_arguments(
        self,
        bound: tuple[Sequence[Any], Mapping[str, Any]],
        leaves: Sequence[Any],
        inputs: Sequence[Any],
    ) -> None:
        """Does to the user's arguments, bound and flattened, what the model's forward does."""
        for position in self._writes:
            if inputs[position] is not leaves[position]:  # a copy with other strides
                leaves[position].copy_(inputs[position])
        delete_arguments(self._deleted, *bound)
