"""The phases of a captured model: specialized, lowered, compiled, each when it is first needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pabc import passes
from pabc.kernels.gains import find_gain
from pabc.options import Options
from pabc.passes import is_collective, is_effect, is_opaque, user_inputs, value
from pabc.runtime.bindings import Binding, Layout
from pabc.runtime.chain import BlockCode, Chain
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
from pabc.runtime.slots import without_spare_memory
from pabc.runtime.stats import Recorder
from pabc.runtime.weights import Weights

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
        guarded: GraphModule,
        weights: Weights,
        options: Options,
        recorder: Recorder,
        code: BlockCode,
        workspaces: Workspaces | None,
    ) -> None:
        self.compile_seconds = 0.0
        self.lowered: dict[SlotIndices, tuple[passes.Lowering, ...]] = {}
        self._guarded = guarded
        self._weights = weights
        self._recorder = recorder
        self._code = code
        self._workspaces = workspaces
        self._reference = GuardedGraph(guarded, guarded.meta["prologue"])
        self._options = options
        self.backend = options.backend
        self._sizes: passes.Sizes | None = guarded.meta.get("sizes")
        self._modules: dict[PhaseKey, GraphModule] = {}
        self._compiled: dict[tuple[SlotIndices, Layout], list[CompiledPhase]] = {}
        self._executables: dict[tuple[PhaseKey, SlotIndices, Layout], Executable] = {}
        self._widths = [len(region.kept) for region in guarded.meta["regions"]]

    @property
    def modules(self) -> tuple[GraphModule, ...]:
        """Those that were specialized so far."""
        return tuple(self._modules.values())

    def layout(self, inputs: Sequence[Any]) -> Layout:
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
        phase = PhaseKey(reused, binding.stored[reused])
        readable = binding.steps[step].readable
        key = phase, readable, self.layout(inputs)
        known = self._executables.get(key)
        if known is None:
            compiled = self._find(phase, inputs) or self._compile([phase], inputs)[0]
            kept = tuple(slot for slot in phase[1] if slot in readable)
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
        key = PhaseKey(reused, stored)
        if key not in self._modules:
            gm = passes.specialize_phase_pass(self._guarded, reused=reused, stored=stored)
            gm.graph.lint()
            passes.verify_phase(gm, reused=reused)
            self._modules[key] = gm
        return self._modules[key]

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
    ) -> Iterator[GraphModule]:
        """The blocks of one phase after the other, each lowered when its blocks are asked for."""
        for phase in phases:
            lowered.append(self.lower(*phase, inputs))
            yield from lowered[-1].blocks

    def lower(
        self, reused: SlotIndices, stored: SlotIndices, inputs: Sequence[Any] | None = None
    ) -> LoweredPhase:
        """A phase for the sizes of these inputs; by default, of the call that was captured."""
        gm = self.specialize(reused, stored)
        flat = passes.lift_weights_pass(passes.inline_regions_pass(gm))
        if self._sizes is not None:
            binding = self._sizes.hints if inputs is None else self._sizes.bind(inputs)
            assert binding is not None
            flat = passes.fold_sizes(flat, binding)
        if self.backend == "inductor":
            flat = passes.use_onednn_pass(passes.rewrite_formulas_pass(flat))
        flat = passes.lower_pass(flat, kernels=self._options.kernels, gains=find_gain)
        self.lowered[reused] = flat.meta.get("lowered", ())
        num_cuts = sum(len(self._guarded.meta["regions"][slot].kept) for slot in reused)
        for node in user_inputs(flat.graph)[-num_cuts:] if num_cuts else ():
            node.meta["val"] = _as_held(value(node))
        apart = _cannot_be_recorded if self._options.cudagraphs else is_effect
        split = passes.split_blocks_pass(flat, apart=apart)
        split.graph.lint()
        chain, blocks = Chain.of(split)
        return LoweredPhase(chain, blocks, split.meta["weights"], split.meta["outputs"])

    def add_code(self, phase: PhaseKey, lowered: LoweredPhase, code: Sequence[passes.Code]) -> None:
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
        self, stored: SlotIndices, lowered: LoweredPhase, code: Sequence[passes.Code]
    ) -> PhaseChain:
        """Returns a phase of compiled code, given the weights as they are now."""
        unrecordable = frozenset(
            i for i, b in enumerate(lowered.blocks) if any(map(_cannot_be_recorded, b.graph.nodes))
        )
        weights = self._weights.live(lowered.weights)
        return PhaseChain(
            stored, self._widths, lowered, code, weights, self._workspaces, unrecordable
        )


def _cannot_be_recorded(node: Node) -> bool:
    """Whether an op may wait for the device, or for other processes."""
    return is_opaque(node) or is_collective(node)


def _as_held(val: torch.Tensor) -> torch.Tensor:
    """What a slot holds of a value laid out like this one."""
    computed = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return val.new_empty_strided(val.shape, without_spare_memory(computed).stride())
