"""The phases of a captured model: specialized, lowered, compiled, each when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from pabc import passes
from pabc.passes.ir import output_node
from pabc.runtime.branch import Binding, Layout, without_spare_memory
from pabc.runtime.stats import Recorder
from pabc.runtime.weights import Weights

Backend = Literal["inductor", "eager", "oracle"]
FP8_CAPABILITY = (8, 9)
"""The least CUDA compute capability for which Triton converts to float8_e4m3fn."""
Slots = tuple[int, ...]
"""Ascending indices of slots."""
Flat = Callable[..., tuple[Sequence[Any], Sequence[torch.Tensor]]]
"""(inputs, hoisted values, the reused cuts) -> (outputs, the stored cuts), as flat sequences."""


@dataclass(frozen=True, slots=True)
class Executable:
    """What runs a phase, and the slots whose cuts it gives out."""

    run: Flat
    stored: Slots


@dataclass(frozen=True, slots=True)
class Lowered:
    """A phase as a flat graph: weights, inputs, hoisted values and cuts in; tensors out.

    `weights` names its first inputs, `outputs` says where the model's outputs are among its
    results; `examples` are inputs to compile it for.
    """

    graph: GraphModule
    examples: tuple[Any, ...]
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
    """

    def __init__(
        self, guarded: GraphModule, weights: Weights, backend: Backend, recorder: Recorder
    ) -> None:
        self.compile_seconds = 0.0
        self._guarded = guarded
        self._weights = weights
        self._backend = backend
        self._recorder = recorder
        self._sizes: passes.Sizes | None = guarded.meta.get("sizes")
        self._modules: dict[tuple[Slots, Slots], GraphModule] = {}
        self._executables: dict[tuple[Slots, Layout], list[Executable]] = {}

    @property
    def modules(self) -> tuple[GraphModule, ...]:
        """Those that were specialized so far."""
        return tuple(self._modules.values())

    def layout(self, inputs: Sequence[Any]) -> Layout:
        """What the graphs leave open of the inputs' sizes: a value kept under one fits no other."""
        if self._sizes is None:
            return ()
        return tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))

    def executable(self, binding: Binding, reused: Slots, inputs: Sequence[Any]) -> Executable:
        """What runs the phase that reuses these slots, for inputs like these."""
        if self._backend == "oracle":
            return Executable(self._guarded, ())
        stored = binding.stored[reused]
        for known in self._executables.get((reused, self.layout(inputs)), ()):
            if known.stored == stored or set(known.stored) >= set(stored):
                return known
        return self._compile(reused, stored, inputs)

    def specialize(self, reused: Slots, stored: Slots) -> GraphModule:
        """The graph of steps that reuse some slots and give out the cuts of others."""
        if (reused, stored) not in self._modules:
            gm = passes.specialize_phase_pass(self._guarded, reused=reused, stored=stored)
            gm.graph.lint()
            passes.verify_phase(gm, reused=reused)
            self._modules[reused, stored] = gm
        return self._modules[reused, stored]

    def _compile(self, reused: Slots, stored: Slots, inputs: Sequence[Any]) -> Executable:
        start = perf_counter()
        with compiling():
            gm = self.specialize(reused, stored)
            run: Flat = gm if self._backend == "eager" else self._compile_inductor(gm, inputs)
        executable = Executable(run, stored)
        self._executables.setdefault((reused, self.layout(inputs)), []).append(executable)
        self.compile_seconds += perf_counter() - start
        self._recorder.add(compiles=1)
        return executable

    def lower(self, reused: Slots, stored: Slots) -> Lowered:
        """A phase for the inputs of the call that was captured."""
        nodes = [n for n in self._guarded.graph.nodes if n.op == "placeholder"]
        vals = [
            n.meta.get("val") for n in nodes[1 : 1 + len(self._guarded.meta["signature"].inputs)]
        ]
        inputs = [_example(val).zero_() if isinstance(val, torch.Tensor) else None for val in vals]
        return self._lower(self.specialize(reused, stored), inputs)

    def add_code(
        self,
        reused: Slots,
        stored: Slots,
        compiled: Callable[..., Sequence[torch.Tensor]],
        weights: tuple[str, ...],
        outputs: tuple[Any, ...],
    ) -> None:
        """Takes code for a phase of :meth:`lower` that was compiled elsewhere."""
        executable = Executable(self._around(compiled, weights, outputs), stored)
        self._executables.setdefault((reused, ()), []).append(executable)

    @property
    def compiled(self) -> list[tuple[Slots, Slots]]:
        """What there is an executable for: the slots that it reuses, and those it gives out."""
        return [
            (reused, executable.stored)
            for (reused, _), executables in self._executables.items()
            for executable in executables
        ]

    def _compile_inductor(self, gm: GraphModule, inputs: Sequence[Any]) -> Flat:
        lowered = self._lower(gm, inputs)
        compiled = passes.compile_flat(lowered.graph, lowered.examples)
        return self._around(compiled, lowered.weights, lowered.outputs)

    def _lower(self, gm: GraphModule, inputs: Sequence[Any]) -> Lowered:
        """A phase for the sizes of these inputs: what is computed from sizes is folded."""
        flat = passes.lift_weights_pass(passes.inline_regions_pass(gm))
        flat.graph.lint()
        names: tuple[str, ...] = flat.meta["weights"]
        others = [n for n in flat.graph.nodes if n.op == "placeholder"][len(names) + len(inputs) :]
        binding = (self._sizes and self._sizes.bind(inputs)) or {}
        given = [_example(passes.concrete(n.meta["val"], binding)) for n in others]
        num_hoisted = len(output_node(self._guarded.meta["prologue"].graph).args[0])
        kept = [*given[:num_hoisted], *map(without_spare_memory, given[num_hoisted:])]
        examples = (*self._weights.get(names), *inputs, *kept)
        return Lowered(flat, examples, names, flat.meta["outputs"])

    def _around(
        self,
        compiled: Callable[..., Sequence[torch.Tensor]],
        names: tuple[str, ...],
        outputs: tuple[Any, ...],
    ) -> Flat:
        """Compiled code, given the weights as they are now; its results apart."""
        num_tensors = sum(isinstance(place, passes.Place) for place in outputs)

        def execute(*args: Any) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
            results = compiled(*self._weights.get(names), *args)
            packed = [results[p.index] if isinstance(p, passes.Place) else p for p in outputs]
            return packed, results[num_tensors:]

        return execute


def _example(fake: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as a cut or a hoisted value is when it is computed."""
    return torch.empty_strided(
        tuple(fake.shape), fake.stride(), dtype=fake.dtype, device=fake.device
    )
