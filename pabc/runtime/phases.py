"""The phases of a captured model: specialized, lowered, compiled, each when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from pabc import passes
from pabc.kernels.gains import find_gain
from pabc.passes import (
    is_collective,
    is_effect,
    is_outside,
    user_inputs,
    value,
)
from pabc.pipeline import Config
from pabc.runtime.branch import Binding, Layout, without_spare_memory
from pabc.runtime.chain import BlockCode, Chain
from pabc.runtime.cudagraphs import Part, Recordable
from pabc.runtime.stats import Recorder
from pabc.runtime.weights import Weights

Backend = Literal["inductor", "eager", "oracle"]
FP8_CAPABILITY = (8, 9)
"""The least CUDA compute capability for which Triton converts to float8_e4m3fn."""
Slots = tuple[int, ...]
"""Ascending indices of slots."""
Phase = tuple[Slots, Slots]
"""The slots that it reuses, and those whose cuts it gives out."""
Flat = Callable[..., tuple[Sequence[Any], Sequence[torch.Tensor]]]
"""(inputs, hoisted values, the reused cuts) -> (outputs, the stored cuts), as flat sequences."""


@dataclass(frozen=True, slots=True)
class Executable:
    """What runs the steps of a phase that keep these slots, and gives out their cuts alone; what
    can be recorded is run by a workspace."""

    run: Flat | Recordable
    stored: Slots


@dataclass(frozen=True, slots=True)
class Compiled:
    """A phase that can give out the cuts of `stored`; `link` makes what runs it for some of them.

    What a step does not keep, it lets go of as soon as the step itself no longer needs it.
    """

    stored: Slots
    link: Callable[[Slots], Flat | Recordable]


@dataclass(frozen=True, slots=True)
class Lowered:
    """A phase as a chain of blocks; its inputs are weights, inputs, hoisted values and cuts.

    `weights` names its first inputs, `outputs` says where the model's outputs are among its
    results; `blocks` are what it calls.
    """

    chain: Chain
    blocks: tuple[GraphModule, ...]
    weights: tuple[str, ...]
    outputs: tuple[Any, ...]


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
        backend: Backend,
        config: Config,
        recorder: Recorder,
        code: BlockCode,
    ) -> None:
        self.compile_seconds = 0.0
        self.lowered: dict[Slots, tuple[passes.Lowering, ...]] = {}
        self._guarded = guarded
        self._weights = weights
        self._backend = backend
        self._recorder = recorder
        self._code = code
        self._config = config
        self._sizes: passes.Sizes | None = guarded.meta.get("sizes")
        self._modules: dict[Phase, GraphModule] = {}
        self._compiled: dict[tuple[Slots, Layout], list[Compiled]] = {}
        self._executables: dict[tuple[Phase, Slots, Layout], Executable] = {}
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
        self, binding: Binding, reused: Slots, step: int, inputs: Sequence[Any]
    ) -> Executable:
        """What runs a step in the phase that reuses these slots, for inputs like these."""
        if self._backend == "oracle":
            return Executable(self._guarded, ())
        phase, readable = (reused, binding.stored[reused]), binding.steps[step].readable
        key = phase, readable, self.layout(inputs)
        known = self._executables.get(key)
        if known is None:
            compiled = self._find(phase, inputs) or self._compile([phase], inputs)[0]
            kept = tuple(slot for slot in phase[1] if slot in readable)
            known = self._executables[key] = Executable(compiled.link(kept), kept)
        return known

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Compiles every phase of the plan now, for inputs like these."""
        if self._backend == "oracle":
            return
        phases = [(phase.reused, binding.stored[phase.reused]) for phase in binding.plan.phases]
        missing = [phase for phase in phases if self._find(phase, inputs) is None]
        if missing:
            self._compile(list(dict.fromkeys(missing)), inputs)

    def _find(self, phase: Phase, inputs: Sequence[Any]) -> Compiled | None:
        reused, stored = phase
        for known in self._compiled.get((reused, self.layout(inputs)), ()):
            if known.stored == stored or set(known.stored) >= set(stored):
                return known
        return None

    def specialize(self, reused: Slots, stored: Slots) -> GraphModule:
        """The graph of steps that reuse some slots and give out the cuts of others."""
        if (reused, stored) not in self._modules:
            gm = passes.specialize_phase_pass(self._guarded, reused=reused, stored=stored)
            gm.graph.lint()
            passes.verify_phase(gm, reused=reused)
            self._modules[reused, stored] = gm
        return self._modules[reused, stored]

    def _compile(self, phases: Sequence[Phase], inputs: Sequence[Any]) -> list[Compiled]:
        start = perf_counter()
        with compiling():
            if self._runs_as_it_is:
                made = [self._as_it_is(*phase) for phase in phases]
            else:
                lowered: list[Lowered] = []
                known = len(self._code)
                blocks = self._lower_all(phases, inputs, lowered)
                self._code.compile(blocks, op_by_op=self._backend == "eager")
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
        asked = self._config.cudagraphs or self._config.kernels == "force"
        return self._backend == "eager" and not asked

    def _lower_all(
        self, phases: Sequence[Phase], inputs: Sequence[Any], lowered: list[Lowered]
    ) -> Iterator[GraphModule]:
        """The blocks of one phase after the other, each lowered when its blocks are asked for."""
        for phase in phases:
            lowered.append(self.lower(*phase, inputs))
            yield from lowered[-1].blocks

    def lower(self, reused: Slots, stored: Slots, inputs: Sequence[Any] | None = None) -> Lowered:
        """A phase for the sizes of these inputs; by default, of the call that was captured."""
        gm = self.specialize(reused, stored)
        flat = passes.lift_weights_pass(passes.inline_regions_pass(gm))
        if self._sizes is not None:
            binding = self._sizes.hints if inputs is None else self._sizes.bind(inputs)
            assert binding is not None
            flat = passes.fold_sizes(flat, binding)
        if self._backend == "inductor":
            flat = passes.use_onednn_pass(passes.rewrite_formulas_pass(flat))
        flat = passes.lower_pass(flat, kernels=self._config.kernels, gains=find_gain)
        self.lowered[reused] = flat.meta.get("lowered", ())
        num_cuts = sum(len(self._guarded.meta["regions"][slot].kept) for slot in reused)
        for node in user_inputs(flat.graph)[-num_cuts:] if num_cuts else ():
            node.meta["val"] = _as_held(value(node))
        apart = _cannot_be_recorded if self._config.cudagraphs else is_effect
        split = passes.split_blocks_pass(flat, apart=apart)
        split.graph.lint()
        chain, blocks = Chain.of(split)
        return Lowered(chain, blocks, split.meta["weights"], split.meta["outputs"])

    def add_code(self, phase: Phase, lowered: Lowered, code: Sequence[passes.Code]) -> None:
        """Takes code for the blocks of a phase that were compiled elsewhere."""
        reused, stored = phase
        compiled = self._linkable(stored, lowered, code)
        self._compiled.setdefault((reused, ()), []).append(compiled)

    @property
    def compiled(self) -> list[Phase]:
        """The phases that were compiled so far."""
        return [
            (reused, compiled.stored)
            for (reused, _), known in self._compiled.items()
            for compiled in known
        ]

    def _as_it_is(self, reused: Slots, stored: Slots) -> Compiled:
        """A phase whose graph is run op by op."""
        gm = self.specialize(reused, stored)

        def link(kept: Slots) -> Flat:
            places = self._places(stored, kept)

            def execute(*args: Any) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
                outputs, cuts = gm(*args)
                return outputs, [cuts[place] for place in places]

            return execute

        return Compiled(stored, link)

    def _linkable(self, stored: Slots, lowered: Lowered, code: Sequence[passes.Code]) -> Compiled:
        """Compiled code, given the weights as they are now; its results apart."""
        weights, outputs, chain = (
            self._weights.live(lowered.weights),
            lowered.outputs,
            lowered.chain,
        )
        num_tensors = sum(isinstance(place, passes.Place) for place in outputs)
        tensors, cuts = chain.outputs[:num_tensors], chain.outputs[num_tensors:]
        alone = {
            i for i, b in enumerate(lowered.blocks) if any(map(_cannot_be_recorded, b.graph.nodes))
        }

        def link(kept: Slots) -> Flat | Recordable:
            given_out = tuple(cuts[place] for place in self._places(stored, kept))
            shorter = replace(chain, outputs=tensors + given_out)
            if self._config.cudagraphs:
                rest = iter(given_out)
                return Recordable(
                    tuple(Part(p, p.chain.link(code)) for p in shorter.split(alone)),
                    weights,
                    outputs,
                    tensors,
                    {slot: tuple(islice(rest, self._widths[slot])) for slot in kept},
                )
            run = shorter.link(code)

            def execute(*args: Any) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
                results = run([*weights, *args])
                packed = [results[p.index] if isinstance(p, passes.Place) else p for p in outputs]
                return packed, results[num_tensors:]

            return execute

        return Compiled(stored, link)

    def _places(self, stored: Slots, kept: Slots) -> list[int]:
        """Where the cuts of some slots are among those of all that a phase stores."""
        order = [(slot, i) for slot in stored for i in range(self._widths[slot])]
        return [place for place, (slot, _) in enumerate(order) if slot in kept]


def _cannot_be_recorded(node: Node) -> bool:
    """Whether an op may wait for the device, or for other processes."""
    return is_outside(node) or is_collective(node)


def _as_held(val: torch.Tensor) -> torch.Tensor:
    """What a slot holds of a value laid out like this one."""
    computed = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return val.new_empty_strided(val.shape, without_spare_memory(computed).stride())
