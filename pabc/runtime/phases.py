"""The phases of a captured model: specialized, lowered, compiled, each when it is first needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch.fx import GraphModule

from pabc import passes
from pabc.options import Options
from pabc.pipeline import lower_phase, specialize_phase, trace_phase
from pabc.runtime.bindings import Binding, InputShapes
from pabc.runtime.chain import BlockChain, BlockCode
from pabc.runtime.cudagraphs import Workspaces
from pabc.runtime.executables import (
    CompiledPhase,
    Executable,
    GuardedGraph,
    LoweredPhase,
    PhaseChain,
    PhaseGraph,
    PhaseKey,
    SlotIndices,
)
from pabc.runtime.stats import Recorder
from pabc.runtime.weights import Weights
from pabc.stages import Compilation, StageRecord

FP8_CAPABILITY = (8, 9)
"""The least CUDA compute capability for which Triton converts to float8_e4m3fn."""


def compiling() -> AbstractContextManager[Any]:
    """PyTorch's own lock: it traces and compiles for one thread at a time."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def check_fp8(devices: Collection[torch.device]) -> None:
    """Raises ValueError where compiled kernels cannot convert to float8_e4m3fn."""
    for device in devices:
        if device.type != "cuda":
            continue
        found = torch.cuda.get_device_capability(device)
        if found < FP8_CAPABILITY:
            raise ValueError(
                f"cache_dtype: expected 'keep' or 'bf16' on {device} with backend='inductor', "
                f"found 'fp8': it needs CUDA compute capability {_dotted(FP8_CAPABILITY)}, and "
                f"this device has {_dotted(found)}"
            )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


class Phases:
    """One specialized module, and what runs it, per set of slots that a step reuses.

    Not to be used by two threads at once.

    Attributes:
        compile_seconds: time spent on specializing and compiling so far.
        lowered: per phase that was lowered, by the slots that it reuses: what kernels compute.
    """

    def __init__(
        self,
        guarded: passes.Guarded,
        weights: Weights,
        options: Options,
        recorder: Recorder,
        code: BlockCode,
        workspaces: Workspaces | None,
    ) -> None:
        self.compile_seconds = 0.0
        self.lowered: dict[SlotIndices, tuple[passes.KernelMatch, ...]] = {}
        self._guarded = guarded
        self._weights = weights
        self._recorder = recorder
        self._code = code
        self._workspaces = workspaces
        self._reference = GuardedGraph(guarded.graph, guarded.prologue.graph)
        self._options = options
        self.backend = options.backend
        self._sizes = guarded.captured.sizes
        self._specialized: dict[PhaseKey, Compilation] = {}
        self._compiled: dict[tuple[SlotIndices, InputShapes], list[CompiledPhase]] = {}
        self._executables: dict[
            tuple[SlotIndices, SlotIndices, SlotIndices, InputShapes], Executable
        ] = {}
        self._widths = [len(region.kept) for region in guarded.regions]

    @property
    def modules(self) -> tuple[GraphModule, ...]:
        """Those that were specialized so far."""
        return tuple(specialized.graph for specialized in self._specialized.values())

    def layout(self, inputs: Sequence[Any]) -> InputShapes:
        """What the graphs leave open of the inputs' sizes: a value kept under one fits no other."""
        if self._sizes is None:
            return ()
        return tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))

    def executable(
        self, binding: Binding, reused: SlotIndices, step: int, inputs: Sequence[Any]
    ) -> Executable:
        """What runs a step in the phase that reuses these slots, for inputs like these."""
        if self.backend == "oracle":
            return self._reference
        stored, readable = binding.stored[reused], binding.steps[step].readable
        key = reused, stored, readable, self.layout(inputs)
        known = self._executables.get(key)
        if known is None:
            phase = PhaseKey(reused, stored)
            compiled = self._find(phase, inputs) or self._compile([phase], inputs)[0]
            kept = tuple(slot for slot in stored if slot in readable)
            known = self._executables[key] = compiled.link(kept)
        return known

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Compiles every phase of the plan now, for inputs like these."""
        if self.backend == "oracle":
            return
        phases = [
            PhaseKey(phase.reused, binding.stored[phase.reused]) for phase in binding.plan.phases
        ]
        missing = [phase for phase in phases if self._find(phase, inputs) is None]
        if missing:
            self._compile(list(dict.fromkeys(missing)), inputs)

    def _find(self, phase: PhaseKey, inputs: Sequence[Any]) -> CompiledPhase | None:
        reused, stored = phase
        for known in self._compiled.get((reused, self.layout(inputs)), ()):
            if known.stored == stored or set(known.stored) >= set(stored):
                return known
        return None

    def specialize(self, reused: SlotIndices, stored: SlotIndices) -> GraphModule:
        """The graph of steps that reuse some slots and give out the cuts of others."""
        return self._specialize(PhaseKey(reused, stored)).graph

    def _specialize(self, phase: PhaseKey) -> Compilation:
        if phase not in self._specialized:
            slots = passes.PhaseSlots(*phase)
            self._specialized[phase] = specialize_phase(self._guarded, slots, self._options)
        return self._specialized[phase]

    def _compile(self, phases: Sequence[PhaseKey], inputs: Sequence[Any]) -> list[CompiledPhase]:
        start = perf_counter()
        with compiling():
            if self._runs_as_it_is:
                made: list[CompiledPhase] = [
                    PhaseGraph(phase.stored, self._widths, self.specialize(*phase))
                    for phase in phases
                ]
            else:
                lowered: list[LoweredPhase] = []
                known = len(self._code)
                blocks = self._lower_all(phases, inputs, lowered)
                self._code.compile(blocks, op_by_op=self.backend == "eager")
                self._recorder.add(blocks=len(self._code) - known)
                made = [
                    self._linkable(stored, low, [self._code.get(block) for block in low.blocks])
                    for (_, stored), low in zip(phases, lowered, strict=True)
                ]
        for compiled, (reused, _) in zip(made, phases, strict=True):
            self._compiled.setdefault((reused, self.layout(inputs)), []).append(compiled)
        self.compile_seconds += perf_counter() - start
        self._recorder.add(compiles=len(made))
        return made

    @property
    def _runs_as_it_is(self) -> bool:
        """Whether phases are run op by op, as their graphs are."""
        asked = self._options.cudagraphs or self._options.kernels == "force"
        return self.backend == "eager" and not asked

    def _lower_all(
        self, phases: Sequence[PhaseKey], inputs: Sequence[Any], lowered: list[LoweredPhase]
    ) -> Iterator[passes.Block]:
        """The blocks of one phase after the other, each lowered when its blocks are asked for."""
        for phase in phases:
            lowered.append(self.lower(*phase, inputs))
            yield from lowered[-1].blocks

    def lower(
        self, reused: SlotIndices, stored: SlotIndices, inputs: Sequence[Any] | None = None
    ) -> LoweredPhase:
        """A phase for the sizes of these inputs; by default, of the call that was captured."""
        specialized = self._specialize(PhaseKey(reused, stored))
        made = lower_phase(specialized, self._input_sizes(inputs), self._options)
        self.lowered[reused] = made.facts[passes.KernelMatches].all
        chain, blocks = BlockChain.of(made.graph, made.facts[passes.Blocks])
        return LoweredPhase(chain, blocks, made.facts[passes.Lifted])

    def _input_sizes(self, inputs: Sequence[Any] | None) -> passes.InputSizes:
        if self._sizes is None:
            return passes.InputSizes({})
        found = self._sizes.hints if inputs is None else self._sizes.bind(inputs)
        assert found is not None
        return passes.InputSizes(found)

    def trace(self, reused: SlotIndices, stored: SlotIndices) -> tuple[StageRecord, ...]:
        """Returns what each stage makes of a phase, with the graph's code after it."""
        slots = passes.PhaseSlots(reused, stored)
        return trace_phase(self._guarded, self._options, slots)

    def add_code(
        self, phase: PhaseKey, lowered: LoweredPhase, code: Sequence[passes.CompiledBlock]
    ) -> None:
        """Takes code for the blocks of a phase that were compiled elsewhere."""
        reused, stored = phase
        compiled = self._linkable(stored, lowered, code)
        self._compiled.setdefault((reused, ()), []).append(compiled)

    @property
    def compiled(self) -> list[PhaseKey]:
        """The phases that were compiled so far."""
        return [
            PhaseKey(reused, compiled.stored)
            for (reused, _), known in self._compiled.items()
            for compiled in known
        ]

    def _linkable(
        self, stored: SlotIndices, lowered: LoweredPhase, code: Sequence[passes.CompiledBlock]
    ) -> PhaseChain:
        """Returns a phase of compiled code, given the weights as they are now."""
        unrecordable = frozenset(
            i
            for i, block in enumerate(lowered.blocks)
            if any(map(passes.cannot_be_recorded, block.graph.graph.nodes))
        )
        weights = self._weights.live(lowered.lifted.weights)
        return PhaseChain(
            stored, self._widths, lowered, code, weights, self._workspaces, unrecordable
        )
