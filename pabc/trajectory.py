"""The state of one generation: which step comes next, and what its slots hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pabc.passes.cache import Cuts
from pabc.plan import Action, Plan


@dataclass(frozen=True)
class Hoisted:
    """A prologue's results, and the tensors (with their versions) that they were computed from."""

    sources: tuple[torch.Tensor, ...]
    versions: tuple[tuple[int, int] | None, ...]
    values: tuple[torch.Tensor, ...]

    def holds_for(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, unchanged; never so for inference tensors."""
        return all(
            new is old and version is not None and version == version_of(new)
            for new, old, version in zip(sources, self.sources, self.versions, strict=True)
        )


def version_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """What changes when a tensor's values do: its version and memory; None: cannot be told."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


class Trajectory:
    """A step counter and one place per slot; what to do with a slot is the plan's to say.

    A slot holds the cuts of one region between the step that stored them and their last read.
    `layout`: the shapes of the calls whose values it keeps, where a program serves several.
    """

    def __init__(self, plan: Plan, layout: object = ()) -> None:
        self.plan = plan
        self.layout = layout
        self.step = 0
        self.slots: list[Cuts | None] = [None] * len(plan.slots)
        self.hoisted: Hoisted | None = None

    def read(self, slot: int) -> Cuts | None:
        """The stored cuts where the plan reuses the slot at this step; None: compute."""
        if self.plan.actions[self.step, slot] != Action.REUSE:
            return None
        return self.slots[slot]

    def write(self, slot: int, cuts: Cuts) -> None:
        """Keeps freshly computed cuts if a later step reads them."""
        if self.keeps(slot):
            self.slots[slot] = cuts

    def keeps(self, slot: int) -> bool:
        """Whether a value computed now is read later: it was to be stored, or stands in for a
        value that was to be reused and is missing, while later steps still read that one."""
        step, plan = self.step, self.plan
        if plan.actions[step, slot] == Action.REUSE:
            return bool((plan.sources[step + 1 :, slot] == plan.sources[step, slot]).any())
        return bool(plan.actions[step, slot] == Action.STORE)

    def advance(self) -> None:
        """Frees what no later step reads; after the last step a new generation starts."""
        for slot in self.plan.frees[self.step]:
            self.slots[slot] = None
        self.step += 1
        if self.step == self.plan.num_steps:
            self.reset()

    def reset(self) -> None:
        """Starts a new generation: step 0, all slots empty, nothing hoisted."""
        self.step = 0
        self.hoisted = None
        self.slots = [None] * len(self.plan.slots)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots hold now."""
        return sum(t.numel() * t.element_size() for cuts in self.slots if cuts for t in cuts)
