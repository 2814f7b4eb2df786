"""Runs one step: a phase op by op, as linked blocks or as CUDA graphs, or the guarded graph.

An :class:`Executable` takes what it needs from a step (:class:`StepValues`) and leaves there the
cuts that later steps read. A :class:`CompiledPhase` makes executables: one for each choice of the
slots whose cuts are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from pabc import passes
from pabc.passes import Cuts, Reused
from pabc.runtime.bindings import InputShapes
from pabc.runtime.chain import BlockChain
from pabc.runtime.cudagraphs import WEIGHTS, LinkedPiece, Recordable, ReusedPlace, Workspaces

SlotIndices = tuple[int, ...]
"""Ascending indices of slots."""
Spans = tuple[tuple[int, slice], ...]
"""Slots, each with where its cuts are in a flat sequence of cuts."""
PhaseFunction = Callable[..., tuple[Sequence[Any], Sequence[torch.Tensor]]]
"""(inputs, hoisted values, the reused values) -> (outputs, the stored cuts), as flat sequences."""


class StepValues(Protocol):
    """The part of a step that executables read and write."""

    inputs: list[Any]
    reused: SlotIndices

    @property
    def branch(self) -> object:
        """The branch that the step belongs to."""

    @property
    def layout(self) -> InputShapes:
        """The inputs' shapes, where one program serves several; else empty."""

    def hoisted(self) -> tuple[torch.Tensor, ...]:
        """Returns the values of the prologue; see :class:`pabc.runtime.hoisted.Prologue`."""

    def replace_hoisted(self, values: tuple[torch.Tensor, ...]) -> None:
        """Keeps these tensors in place of the hoisted ones, which they equal."""

    def reused_values(self) -> list[torch.Tensor]:
        """Returns the weights of forecasts, if there are any, and what the reused slots hold."""

    def read(self, slot: int) -> Reused | None:
        """Returns what the step reuses of one slot; None where it computes it."""

    def keeps_history(self, slot: int) -> bool:
        """Returns True if a slot may keep values of several steps."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Notes the cuts that the step computed for one slot."""

    def keep(self, spans: Spans, cuts: Sequence[torch.Tensor]) -> None:
        """Notes the cuts that the step computed for several slots."""


class Executable(Protocol):
    """Runs steps of one phase that keep the same slots."""

    def run(self, step: StepValues) -> Sequence[Any]:
        """Runs a step; returns the model's outputs, flat, then the new values of written inputs."""


@dataclass(frozen=True, slots=True)
class GuardedGraph:
    """Runs any step: the graph itself asks the step for each slot. The reference for the others."""

    guarded: GraphModule
    prologue: GraphModule

    def run(self, step: StepValues) -> Sequence[Any]:
        """Runs the prologue, and then the graph with the step as its state."""
        outputs: Sequence[Any] = self.guarded(step, *step.inputs, *self.prologue(*step.inputs))
        return outputs


@dataclass(frozen=True, slots=True)
class PhaseExecutable:
    """Runs a phase as a function that returns the cuts of the slots in `spans`."""

    function: PhaseFunction
    spans: Spans

    def run(self, step: StepValues) -> Sequence[Any]:
        """Runs the function on the inputs, the hoisted values and the reused values."""
        outputs, cuts = self.function(*step.inputs, *step.hoisted(), *step.reused_values())
        if self.spans:
            step.keep(self.spans, cuts)
        return outputs


@dataclass(frozen=True, slots=True)
class RecordedExecutable:
    """Runs a phase on the memory of the step's branch, which holds what is hoisted and kept."""

    phase: Recordable
    spans: Spans
    workspaces: Workspaces

    def run(self, step: StepValues) -> Sequence[Any]:
        """Copies what moved to the addresses of the workspace, and runs the phase there."""
        workspace = self.workspaces.of(step.branch, step.layout)
        workspace.take_inputs(step.inputs)
        step.replace_hoisted(workspace.take_hoisted(step.hoisted()))
        outputs, cuts = workspace.run(self.phase, step.reused_values())
        step.keep(self.spans, self._own(step, cuts))
        return outputs

    def _own(self, step: StepValues, cuts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the kept cuts, copied out of the workspace for slots that keep a history."""
        for slot, span in self.spans:
            if step.keeps_history(slot):
                cuts[span] = [cut.clone() for cut in cuts[span]]
        return cuts


@dataclass(frozen=True, slots=True)
class LoweredPhase:
    """A phase as a chain of blocks; its inputs are weights, inputs, hoisted values and cuts.

    Attributes:
        chain: the calls of the blocks.
        blocks: what it calls; empty where only their code is known (loaded files).
        lifted: the weights that its first inputs take, and the model's outputs among its results.
    """

    chain: BlockChain
    blocks: tuple[passes.Block, ...]
    lifted: passes.Lifted


@dataclass(frozen=True, slots=True, eq=False)
class CompiledPhase(ABC):
    """A phase that can return the cuts of the slots that it stores, of which a step keeps some.

    A cut that a step does not keep is released as soon as the step itself no longer needs it.

    Attributes:
        slots: what the phase reuses and stores.
        widths: how many cuts each slot has.
    """

    slots: passes.PhaseSlots
    widths: Sequence[int]

    @abstractmethod
    def link(self, kept: SlotIndices) -> Executable:
        """Returns what runs steps that keep the slots in `kept`, a subset of those it stores."""

    def _spans(self, kept: SlotIndices) -> Spans:
        stops = list(accumulate(self.widths[slot] for slot in kept))
        return tuple(
            (slot, slice(stop - self.widths[slot], stop))
            for slot, stop in zip(kept, stops, strict=True)
        )

    def _indices(self, kept: SlotIndices) -> list[int]:
        """Returns where the cuts of `kept` are among those of all slots in `stored`."""
        order = [slot for slot in self.slots.stored for _ in range(self.widths[slot])]
        return [index for index, slot in enumerate(order) if slot in kept]


@dataclass(frozen=True, slots=True, eq=False)
class PhaseGraph(CompiledPhase):
    """A phase whose graph is run op by op."""

    gm: GraphModule

    def link(self, kept: SlotIndices) -> PhaseExecutable:
        """Returns a function that calls the graph and drops the cuts that are not kept."""
        gm, indices = self.gm, self._indices(kept)

        def execute(*args: Any) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
            outputs, cuts = gm(*args)
            return outputs, [cuts[index] for index in indices]

        return PhaseExecutable(execute, self._spans(kept))


@dataclass(frozen=True, slots=True, eq=False)
class PhaseChain(CompiledPhase):
    """A phase as a chain of blocks whose code is there.

    Attributes:
        code: of each block.
        weights: the tensors that the chain takes first, kept in step with the model.
        workspaces: where CUDA graphs of it are recorded; None: nothing is recorded.
        unrecordable: the blocks that cannot be part of a CUDA graph.
    """

    lowered: LoweredPhase
    code: Sequence[passes.CompiledBlock]
    weights: list[torch.Tensor]
    workspaces: Workspaces | None = None
    unrecordable: frozenset[int] = frozenset()

    def link(self, kept: SlotIndices) -> PhaseExecutable | RecordedExecutable:
        """Returns what runs the chain with no results but the outputs and the kept cuts."""
        chain, outputs = self.lowered.chain, self.lowered.lifted.outputs
        num_tensors = sum(isinstance(place, passes.ResultIndex) for place in outputs)
        tensors, stored = chain.outputs[:num_tensors], chain.outputs[num_tensors:]
        cuts = tuple(stored[index] for index in self._indices(kept))
        shorter = replace(chain, outputs=tensors + cuts)
        if self.workspaces is not None:
            return self._record(shorter, tensors, cuts, kept)
        run, weights = shorter.link(self._functions), self.weights

        def execute(*args: Any) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
            results = run([*weights, *args])
            packed = [
                results[out.index] if isinstance(out, passes.ResultIndex) else out
                for out in outputs
            ]
            return packed, results[num_tensors:]

        return PhaseExecutable(execute, self._spans(kept))

    @property
    def _functions(self) -> list[passes.BlockFunction]:
        return [block.run for block in self.code]

    def _record(
        self,
        chain: BlockChain,
        tensors: tuple[int, ...],
        cuts: tuple[int, ...],
        kept: SlotIndices,
    ) -> RecordedExecutable:
        assert self.workspaces is not None
        rest, functions = iter(cuts), self._functions
        pieces = chain.split(self.unrecordable)
        phase = Recordable(
            tuple(LinkedPiece(piece, piece.chain.link(functions)) for piece in pieces),
            self.weights,
            self.lowered.lifted.outputs,
            tensors,
            {slot: tuple(islice(rest, self.widths[slot])) for slot in kept},
            tuple(self._reused_places()),
        )
        return RecordedExecutable(phase, self._spans(kept), self.workspaces)

    def _reused_places(self) -> Iterator[ReusedPlace]:
        """Yields where each reused value is put, in the order of the phase's inputs."""
        if num := sum(self.slots.depths):
            yield ReusedPlace(WEIGHTS, num, 0)
        for slot, depth in zip(self.slots.reused, self.slots.depths, strict=True):
            for age in range(max(depth, 1)):
                for i in range(self.widths[slot]):
                    yield ReusedPlace(slot, age, i)
