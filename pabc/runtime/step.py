"""The step that is under way.

A call becomes a step in three moves: :meth:`Branch.begin` says what it reuses and returns an
:class:`ActiveStep`; :meth:`ActiveStep.run` computes; :meth:`ActiveStep.commit` keeps what later
steps read, frees what none reads, and counts the step. A step that raises is never committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from pabc.passes import Cuts, Reused
from pabc.runtime.bindings import Binding, InputShapes, PlannedStep
from pabc.runtime.executables import Executable, SlotIndices, Spans
from pabc.runtime.hoisted import Hoisted, Prologue
from pabc.runtime.slots import FreshCuts, HeldSlots
from pabc.runtime.source import Source


class StepRunners(Protocol):
    """Finds what runs a step: :class:`Phases`, or the program of a model that is not captured."""

    def executable(
        self, binding: Binding, reused: SlotIndices, step: int, inputs: Sequence[Any]
    ) -> Executable:
        """Returns what runs a step that reuses these slots."""


class ServedCall(NamedTuple):
    """A call, packed for the program that serves it, and bound to a plan.

    Attributes:
        inputs: the inputs of the program's graphs.
        binding: the schedule bound to the program's slots.
        source: what the values of the call are computed from.
        prologue: what computes the hoisted values; None: there are none.
        phases: what runs the steps of the plan.
        doubt: why the call must compute, whatever the plan says, a key of
            :attr:`pabc.Stats.fallbacks`; empty: it need not.
    """

    inputs: list[Any]
    binding: Binding
    source: Source
    prologue: Prologue | None
    phases: StepRunners
    doubt: str = ""


class StepSequence(Protocol):
    """The part of a branch that its steps use; see :class:`Branch`."""

    slots: HeldSlots
    hoisted: Hoisted | None
    is_scheduled: bool

    def finish(self, step: ActiveStep, planned: PlannedStep, fresh: Sequence[FreshCuts]) -> None:
        """Keeps what a step computed, and counts it."""


class ActiveStep:
    """A step between its begin and its commit; the state that executables run with.

    Attributes:
        branch: the branch that the step belongs to.
        index: which step of the plan it is.
        binding: the plan that it follows, bound to the program's slots.
        inputs: the inputs of the program's graphs.
        reused: ascending indices of the slots that it reuses.
        weights: the weights of its forecasts; None: what it reuses is held.
    """

    __slots__ = (
        "_executable",
        "_fresh",
        "_planned",
        "_prologue",
        "_source",
        "binding",
        "branch",
        "index",
        "inputs",
        "reused",
        "weights",
    )

    def __init__(
        self,
        branch: StepSequence,
        call: ServedCall,
        index: int,
        reused: SlotIndices,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.branch, self.index, self.reused, self.weights = branch, index, reused, weights
        self.binding, self.inputs = call.binding, call.inputs
        self._planned: PlannedStep = call.binding.steps[index]
        self._prologue, self._source = call.prologue, call.source
        self._executable = call.phases.executable(call.binding, reused, index, call.inputs)
        self._fresh: list[FreshCuts] = []

    def run(self) -> Sequence[Any]:
        """Computes; returns the model's outputs, flat, then the new values of written inputs."""
        return self._executable.run(self)

    def commit(self) -> None:
        """Keeps what later steps read, frees what none reads any more, and counts the step."""
        self.branch.finish(self, self._planned, self._fresh)

    @property
    def layout(self) -> InputShapes:
        """The inputs' shapes, where one program serves several; else empty."""
        return self._source.layout

    def hoisted(self) -> tuple[torch.Tensor, ...]:
        """Returns the prologue's values, recomputed where what they follow from has changed."""
        assert self._prologue is not None
        hoisted = self.branch.hoisted = self._prologue.update(self.branch.hoisted, self.inputs)
        return hoisted.values

    def replace_hoisted(self, values: tuple[torch.Tensor, ...]) -> None:
        """Keeps these tensors in place of the hoisted ones, which they equal."""
        assert self.branch.hoisted is not None
        self.branch.hoisted = self.branch.hoisted._replace(values=values)

    def reused_values(self) -> list[torch.Tensor]:
        """Returns what a phase takes of the slots that the step reuses: the weights of forecasts,
        if there are any, and the values of one slot after the other, each the newest first."""
        depths = self.binding.phase(self.index, self.reused).depths
        held = self.branch.slots.read_flat(self.reused, depths)
        return held if self.weights is None else [self.weights, *held]

    def read(self, slot: int) -> Reused | None:
        """Returns what the step reuses of a slot; None: compute it."""
        if slot not in self.reused:
            return None
        depth = self.binding.depths[slot]
        history = self.branch.slots.read(slot, depth)
        if self.weights is None or not depth:
            return Reused(history)
        first = self.binding.phase(self.index, self.reused).first_weights[slot]
        return Reused(history, self.weights[first : first + depth])

    def keeps_history(self, slot: int) -> bool:
        """Returns True if a slot may keep values of several steps."""
        return self.binding.depths[slot] > 0

    def write(self, slot: int, cuts: Cuts) -> None:
        """Notes freshly computed cuts of a slot, if a later step reads them.

        What lies within a reused region is none of the step's, though a guarded graph computes it.
        """
        phase = self.binding.phase(self.index, self.reused)
        if slot in phase.stored:
            self._note(slot, cuts)

    def keep(self, spans: Spans, cuts: Sequence[torch.Tensor]) -> None:
        """Notes freshly computed cuts of several slots; `spans` tells which are whose."""
        for slot, span in spans:
            self._note(slot, tuple(cuts[span]))

    def _note(self, slot: int, cuts: Cuts) -> None:
        until = self._planned.until[slot]
        if until >= 0:
            self._fresh.append(FreshCuts(slot, cuts, until))
