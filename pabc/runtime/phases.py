"""The phases of a captured model: specialized, lowered, compiled, each when it is first needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch.fx import GraphModule

from pabc import passes
from pabc.internals.dynamo import compile_lock
from pabc.options import Options
from pabc.passes import PhaseSlots
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
    SlotIndices,
)
from pabc.runtime.stats import Recorder
from pabc.runtime.weights import Weights
from pabc.stages import Compilation, StageRecord

FP8_CAPABILITY = (8, 9)
"""The least CUDA compute capability for which Triton converts to float8_e4m3fn."""


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


_ReuseKey = tuple[SlotIndices, tuple[int, ...], InputShapes]
"""The slots that a phase reuses, their depths, and the inputs' shapes."""


def _reuse_key(phase: PhaseSlots, layout: InputShapes) -> _ReuseKey:
    return phase.reused, phase.depths, layout


class Phases:
    """Specializes and compiles the phases of a captured model, each when it is first needed.

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
        self._specialized: dict[PhaseSlots, Compilation] = {}
        self._compiled: dict[_ReuseKey, list[CompiledPhase]] = {}
        self._executables: dict[tuple[PhaseSlots, SlotIndices, InputShapes], Executable] = {}
        self._widths = [len(region.kept) for region in guarded.regions]

    @property
    def modules(self) -> tuple[GraphModule, ...]:
        """The phases that were specialized so far."""
        return tuple(specialized.graph for specialized in self._specialized.values())

    def layout(self, inputs: Sequence[Any]) -> InputShapes:
        """Returns the inputs' shapes if the graphs have dynamic shapes, else an empty tuple.

        What was computed for one layout is not valid for another.
        """
        if self._sizes is None:
            return ()
        return tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))

    def executable(
        self, binding: Binding, reused: SlotIndices, step: int, inputs: Sequence[Any]
    ) -> Executable:
        """Returns what runs a step in the phase that reuses these slots, for inputs like these."""
        if self.backend == "oracle":
            return self._reference
        phase, readable = binding.phase(step, reused), binding.steps[step].readable
        key = phase, readable, self.layout(inputs)
        known = self._executables.get(key)
        if known is None:
            compiled = self._find(phase, inputs) or self._compile([phase], inputs)[0]
            kept = tuple(slot for slot in phase.stored if slot in readable)
            known = self._executables[key] = compiled.link(kept)
        return known

    def prepare(self, phases: Iterable[PhaseSlots], inputs: Sequence[Any]) -> None:
        """Compiles phases now, for inputs like these, which matter for dynamic shapes alone."""
        if self.backend == "oracle":
            return
        missing = [phase for phase in phases if self._find(phase, inputs) is None]
        if missing:
            self._compile(list(dict.fromkeys(missing)), inputs)

    def _find(self, phase: PhaseSlots, inputs: Sequence[Any]) -> CompiledPhase | None:
        for known in self._compiled.get(_reuse_key(phase, self.layout(inputs)), ()):
            if set(known.slots.stored) >= set(phase.stored):
                return known
        return None

    def specialize(self, phase: PhaseSlots) -> GraphModule:
        """Returns the graph of a phase, with regions as called submodules."""
        return self._specialize(phase).graph

    def _specialize(self, phase: PhaseSlots) -> Compilation:
        if phase not in self._specialized:
            self._specialized[phase] = specialize_phase(self._guarded, phase, self._options)
        return self._specialized[phase]

    def _compile(self, phases: Sequence[PhaseSlots], inputs: Sequence[Any]) -> list[CompiledPhase]:
        start = perf_counter()
        with compile_lock():
            simple = {phase for phase in phases if self.runs_op_by_op(phase)}
            chains = self._compile_chains([p for p in phases if p not in simple], inputs)
            made = [
                PhaseGraph(phase, self._widths, self.specialize(phase))
                if phase in simple
                else chains[phase]
                for phase in phases
            ]
        for compiled, phase in zip(made, phases, strict=True):
            self._compiled.setdefault(_reuse_key(phase, self.layout(inputs)), []).append(compiled)
        self.compile_seconds += perf_counter() - start
        self._recorder.add(compiles=len(made))
        return made

    def _compile_chains(
        self, phases: Sequence[PhaseSlots], inputs: Sequence[Any]
    ) -> dict[PhaseSlots, CompiledPhase]:
        """Returns phases of compiled blocks; each block is lowered while others are compiled."""
        lowered: list[LoweredPhase] = []
        known = len(self._code)
        blocks = self._lower_all(phases, inputs, lowered)
        self._code.compile(blocks, op_by_op=self.backend == "eager")
        self._recorder.add(blocks=len(self._code) - known)
        return {
            phase: self._linkable(phase, low, [self._code.get(block) for block in low.blocks])
            for phase, low in zip(phases, lowered, strict=True)
        }

    def runs_op_by_op(self, phase: PhaseSlots) -> bool:
        """Returns True if the specialized graph is run op by op, without being lowered.

        A phase that runs nothing of the model is a few sums: not worth the time to compile it.
        """
        asked = self._options.cudagraphs or self._options.kernels == "force"
        if self.backend == "eager" and not asked:
            return True
        return bool(phase.reused) and passes.runs_nothing(self.specialize(phase))

    def _lower_all(
        self, phases: Sequence[PhaseSlots], inputs: Sequence[Any], lowered: list[LoweredPhase]
    ) -> Iterator[passes.Block]:
        """Yields the blocks of one phase after the other, lowering each in its turn."""
        for phase in phases:
            lowered.append(self.lower(phase, inputs))
            yield from lowered[-1].blocks

    def lower(self, phase: PhaseSlots, inputs: Sequence[Any] | None = None) -> LoweredPhase:
        """Returns a phase for the sizes of these inputs; by default, of the captured call."""
        sizes = self._input_sizes(inputs)
        made = lower_phase(self._specialize(phase), sizes, self._options)
        self.lowered[phase.reused] = made.facts[passes.KernelMatches].all
        chain, blocks = BlockChain.of(made.graph, made.facts[passes.Blocks])
        return LoweredPhase(chain, blocks, made.facts[passes.Lifted])

    def _input_sizes(self, inputs: Sequence[Any] | None) -> passes.InputSizes:
        if self._sizes is None:
            return passes.InputSizes({})
        found = self._sizes.hints if inputs is None else self._sizes.bind(inputs)
        assert found is not None
        return passes.InputSizes(found)

    def trace(self, phase: PhaseSlots) -> tuple[StageRecord, ...]:
        """Returns what each stage makes of a phase, with the graph's code after it."""
        return trace_phase(self._guarded, self._options, phase)

    def add_code(
        self, phase: PhaseSlots, lowered: LoweredPhase, code: Sequence[passes.CompiledBlock]
    ) -> None:
        """Adds the code of a phase's blocks, compiled elsewhere."""
        compiled = self._linkable(phase, lowered, code)
        self._compiled.setdefault(_reuse_key(phase, ()), []).append(compiled)

    @property
    def compiled(self) -> list[CompiledPhase]:
        """The phases that were compiled so far."""
        return [compiled for known in self._compiled.values() for compiled in known]

    def _linkable(
        self, phase: PhaseSlots, lowered: LoweredPhase, code: Sequence[passes.CompiledBlock]
    ) -> PhaseChain:
        """Returns a phase of compiled code, given the weights as they are now."""
        unrecordable = frozenset(
            i
            for i, block in enumerate(lowered.blocks)
            if any(map(passes.cannot_be_recorded, block.graph.graph.nodes))
        )
        weights = self._weights.live(lowered.lifted.weights)
        return PhaseChain(
            phase, self._widths, lowered, code, weights, self._workspaces, unrecordable
        )
