"""One captured call signature: its guarded graph, its plan, and one executable per phase."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from pabc import passes
from pabc.budget import fit_plan
from pabc.explanation import FlopCounter
from pabc.passes.cache import Cuts, cache_read
from pabc.passes.ir import output_node
from pabc.pipeline import Config, Record, analyze
from pabc.plan import Plan, SlotSpec
from pabc.runtime.guards import find_numbers
from pabc.runtime.stats import Recorder
from pabc.runtime.trajectory import (
    Binding,
    Branch,
    Hoisted,
    Layout,
    Source,
    version_of,
    without_spare_memory,
)
from pabc.runtime.weights import Weights
from pabc.schedule import Schedule

Backend = Literal["inductor", "eager", "oracle"]
FP8_CAPABILITY = (8, 9)
"""The least CUDA compute capability for which Triton converts to float8_e4m3fn."""
Flat = Callable[..., tuple[Sequence[Any], Sequence[torch.Tensor]]]
"""(inputs, hoisted values, the reused cuts) -> (outputs, the stored cuts), as flat sequences."""


@dataclass(frozen=True, slots=True)
class Executable:
    """What runs a phase, and the slots whose cuts it gives out."""

    run: Flat
    stored: tuple[int, ...]


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


def slot_specs(regions: Sequence[passes.Region]) -> tuple[SlotSpec, ...]:
    """One slot per region, named by the user's module (and the region, where several share one)."""
    paths = [region.path for region in regions]
    return tuple(
        SlotSpec(
            name=region.path if paths.count(region.path) == 1 else f"{region.path}:{region.name}",
            kind=region.kind,
            layer=region.layer,
            nbytes=region.nbytes,
        )
        for region in regions
    )


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


class Program:
    """Everything that follows from a model and the shapes of one call, whatever the schedule.

    Not to be used by two threads at once but for :meth:`run`, whose caller holds no lock.

    Attributes:
        guarded: the guarded, unspecialized graph; its first input is the state of a generation.
        regions: what may be reused; region i is slot i of a plan.
        slots: the same, as a plan needs them.
        promoted: positions among the flattened arguments of numbers that are inputs.
        records: what the pipeline did, stage by stage.
        compile_seconds: time spent on specializing and compiling phases so far.
    """

    def __init__(
        self,
        guarded: GraphModule,
        *,
        backend: Backend,
        promoted: Collection[int] = (),
        memory_budget: int | None = None,
        records: tuple[Record, ...] = (),
        recorder: Recorder | None = None,
    ) -> None:
        self.guarded, self.records = guarded, records
        self.promoted = frozenset(promoted)
        self._sizes: passes.Sizes | None = self.guarded.meta.get("sizes")
        self.regions: tuple[passes.Region, ...] = self.guarded.meta["regions"]
        self.slots = slot_specs(self.regions)
        self.reads: passes.Reads = self.guarded.meta["reads"]
        self._read: Hoisted | None = None
        self.signature: passes.Signature = self.guarded.meta["signature"]
        self.backend = backend
        self.compile_seconds = 0.0
        self._memory_budget = memory_budget
        self._recorder = recorder or Recorder()
        self._prologue: GraphModule = self.guarded.meta["prologue"]
        self._steady: tuple[int, ...] = self.guarded.meta["steady"]
        self._hoisted_weights = [
            str(n.target) for n in self._prologue.graph.nodes if n.op == "get_attr"
        ]
        self._weights = Weights((self.guarded, self._prologue, self.reads.graph))
        self._weights_state = 0
        self._bindings: dict[tuple[Schedule, Layout], Binding] = {}
        self._bound: tuple[Schedule | None, Layout, Binding | None] = None, (), None
        self._numbers: tuple[int, ...] | None = None
        self._modules: dict[tuple[tuple[int, ...], tuple[int, ...]], GraphModule] = {}
        self._executables: dict[tuple[tuple[int, ...], Layout], list[Executable]] = {}

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        backend: Backend,
        config: Config,
        promoted: Collection[int] = (),
        recorder: Recorder | None = None,
    ) -> Program:
        """The program for a call with these arguments."""
        with compiling():
            guarded, records = analyze(model, args, kwargs, config, promoted)
        if backend == "inductor" and config.cache_dtype == "fp8":
            vals = [n.meta.get("val") for n in guarded.graph.nodes if n.op == "placeholder"]
            check_fp8({val.device for val in vals if isinstance(val, torch.Tensor)})
        return cls(
            guarded,
            backend=backend,
            promoted=promoted,
            memory_budget=config.memory_budget,
            records=records,
            recorder=recorder,
        )

    def bind(self, schedule: Schedule, inputs: Sequence[Any] | None = None) -> Binding:
        """The schedule bound to these slots, or to those of them that a memory budget allows.

        `inputs`: of the call whose sizes decide how many bytes a slot takes; by default, the one
        that was captured. Raises ValueError if a budget allows no slot.
        """
        layout = () if inputs is None else self.layout(inputs)
        last, last_layout, binding = self._bound
        if schedule is not last or layout != last_layout or binding is None:
            binding = self._bindings.get((schedule, layout))
            if binding is None:
                binding = self._fit(schedule.plan(self._slots_for(inputs)))
            self._bindings[schedule, layout] = binding
            self._bound = schedule, layout, binding
        return binding

    def _slots_for(self, inputs: Sequence[Any] | None) -> tuple[SlotSpec, ...]:
        """The slots, with the bytes that they take for inputs of these sizes."""
        sizes = self._sizes.bind(inputs) if self._sizes is not None and inputs is not None else None
        if sizes is None:
            return self.slots
        reads = [n for n in self.guarded.graph.nodes if n.target is cache_read]
        held = {int(n.args[1]): passes.concrete(n.meta["val"], sizes) for n in reads}
        return tuple(
            replace(spec, nbytes=sum(t.numel() * t.element_size() for t in held[slot]))
            for slot, spec in enumerate(self.slots)
        )

    def _fit(self, plan: Plan) -> Binding:
        if self._memory_budget is None:
            return Binding.of(plan)
        fit = fit_plan(plan, self._flops, self._memory_budget)
        return Binding.of(fit.plan, fit)

    @cached_property
    def _flops(self) -> list[int]:
        """What one run of each region costs."""
        count = FlopCounter()
        return [count(self.guarded.get_submodule(region.name)) for region in self.regions]

    def phases(self, binding: Binding) -> tuple[GraphModule, ...]:
        """One specialized module per phase, in the plan's order."""
        reused = [phase.reused for phase in binding.plan.phases]
        return tuple(self._specialize(slots, binding.stored[slots]) for slots in reused)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """The graphs' inputs from the model's flattened arguments."""
        return passes.pack(leaves, self.promoted)

    def serves(self, leaves: Sequence[Any]) -> bool:
        """Whether the graphs, captured for any sizes, hold for these arguments."""
        return self._sizes is not None and self._sizes.bind(self.pack(leaves)) is not None

    def numbers(self, leaves: Sequence[Any]) -> tuple[int, ...]:
        """Which leaves may be timesteps."""
        if self._numbers is None:
            self._numbers = find_numbers(leaves)
        return self._numbers

    def layout(self, inputs: Sequence[Any]) -> Layout:
        """What the graphs leave open of the inputs' sizes: a value kept under one fits no other."""
        if self._sizes is None:
            return ()
        return tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))

    def source(self, inputs: Sequence[Any]) -> Source:
        """What values that are computed from these inputs follow from."""
        return Source(self, self.layout(inputs), self._weights_state)

    def differs_in(self, inputs: Sequence[Any], source: Source) -> str:
        """What tells a call with these inputs from the one that `source` is of."""
        other = source.program
        assert isinstance(other, Program)
        if other is self:
            return "shape" if source.layout != self.layout(inputs) else "weights"
        theirs, own = other._described(), self._described()
        for name, mine, yours in zip(("dtype", "device", "shape"), own, theirs, strict=True):
            if mine != yours:
                return name
        return "arguments"

    def _described(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Of the tensors among the inputs: dtypes, devices, and shapes as captured."""
        nodes = [n for n in self.guarded.graph.nodes if n.op == "placeholder"]
        values = [n.meta.get("val") for n in nodes[1 : 1 + len(self.signature.inputs)]]
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        return (
            [x.dtype for x in tensors],
            [x.device for x in tensors],
            [tuple(map(str, x.shape)) for x in tensors],
        )

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """The model's result for flattened arguments, with nothing reused or kept."""
        inputs = self.pack(leaves)
        outputs = self.guarded(_NothingKept(), *inputs, *self._prologue(*inputs))
        return self.signature.out_spec.unflatten(outputs)

    def executable(
        self, binding: Binding, reused: tuple[int, ...], inputs: Sequence[Any]
    ) -> Executable:
        """What runs the phase that reuses these slots, for inputs like these."""
        if self.backend == "oracle":
            return Executable(self.guarded, ())
        stored = binding.stored[reused]
        for known in self._executables.get((reused, self.layout(inputs)), ()):
            if known.stored == stored or set(known.stored) >= set(stored):
                return known
        return self._compile(reused, stored, inputs)

    def run(
        self,
        branch: Branch,
        reused: tuple[int, ...],
        executable: Executable,
        inputs: Sequence[Any],
    ) -> Any:
        """Runs a step that has begun: the model's result. The branch advances unless it raises."""
        if self.backend == "oracle":
            outputs: Any = executable.run(branch, *inputs, *self._prologue(*inputs))
        else:
            cuts = branch.reused_cuts(reused)
            outputs, kept = executable.run(*inputs, *self._hoist(branch, inputs), *cuts)
            start = 0
            for slot in executable.stored:
                stop = start + len(self.regions[slot].kept)
                branch.write(slot, tuple(kept[start:stop]))
                start = stop
        branch.advance()
        return self.signature.out_spec.unflatten(outputs)

    def _hoist(self, branch: Branch, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The prologue's results, computed anew only where something it reads has changed."""
        sources = (*(inputs[i] for i in self._steady), *self._weights.get(self._hoisted_weights))
        held = branch.hoisted
        if held is None or not held.holds_for(sources):
            versions = tuple(map(version_of, sources))
            held = branch.hoisted = Hoisted(sources, versions, self._prologue(*inputs))
        return held.values

    def difference(self, inputs: Sequence[Any]) -> tuple[passes.Read, Any] | None:
        """The first value read from data that is not as captured, with what it is now.

        What the values follow from is looked at only where it has changed.
        """
        if not self.reads:
            return None
        sources = (
            *(inputs[i] for i in self.reads.used),
            *self._weights.get(self.reads.weights),
        )
        if self._read is not None and self._read.holds_for(sources):
            return None
        found = self.reads.difference(inputs)
        if found is None:
            self._read = Hoisted(sources, tuple(map(version_of, sources)), ())
        return found

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Compiles every phase now, for inputs like these."""
        for phase in binding.plan.phases:
            self.executable(binding, phase.reused, inputs)

    @property
    def calls_modules(self) -> bool:
        """Whether the graphs call modules of the model."""
        return bool(self.guarded.meta["calls"])

    def keeps_up(self, model: nn.Module, at_start: bool) -> bool:
        """Picks up tensors that were replaced in the model; False if the graphs no longer fit.

        `at_start`: of a generation, when nothing that may have changed is left out.
        """
        if not at_start and self._weights.is_current(model):
            return True
        graphs = (self.guarded, self._prologue, self.reads.graph, *self._modules.values())
        replaced = self._weights.follow(model, graphs)
        self._weights_state += bool(replaced)
        return replaced is not None

    def _specialize(self, reused: tuple[int, ...], stored: tuple[int, ...]) -> GraphModule:
        if (reused, stored) not in self._modules:
            gm = passes.specialize_phase_pass(self.guarded, reused=reused, stored=stored)
            gm.graph.lint()
            passes.verify_phase(gm, reused=reused)
            self._modules[reused, stored] = gm
        return self._modules[reused, stored]

    def _compile(
        self, reused: tuple[int, ...], stored: tuple[int, ...], inputs: Sequence[Any]
    ) -> Executable:
        start = perf_counter()
        with compiling():
            gm = self._specialize(reused, stored)
            run: Flat = gm if self.backend == "eager" else self._compile_inductor(gm, inputs)
        executable = Executable(run, stored)
        self._executables.setdefault((reused, self.layout(inputs)), []).append(executable)
        self.compile_seconds += perf_counter() - start
        self._recorder.add(compiles=1)
        return executable

    def lower(self, reused: tuple[int, ...], stored: tuple[int, ...]) -> Lowered:
        """A phase for the inputs of the call that was captured."""
        nodes = [n for n in self.guarded.graph.nodes if n.op == "placeholder"]
        vals = [n.meta.get("val") for n in nodes[1 : 1 + len(self.signature.inputs)]]
        inputs = [_example(val).zero_() if isinstance(val, torch.Tensor) else None for val in vals]
        return self._lower(self._specialize(reused, stored), inputs)

    def add_code(
        self,
        reused: tuple[int, ...],
        stored: tuple[int, ...],
        compiled: Callable[..., Sequence[torch.Tensor]],
        weights: tuple[str, ...],
        outputs: tuple[Any, ...],
    ) -> None:
        """Takes code for a phase of :meth:`lower` that was compiled elsewhere."""
        executable = Executable(self._around(compiled, weights, outputs), stored)
        self._executables.setdefault((reused, ()), []).append(executable)

    @property
    def compiled(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What there is an executable for: the slots that it reuses, and those it gives out."""
        return [
            (reused, executable.stored)
            for (reused, _), executables in self._executables.items()
            for executable in executables
        ]

    @property
    def of_any_size(self) -> bool:
        """Whether the graphs leave sizes open."""
        return self._sizes is not None

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
        num_hoisted = len(output_node(self._prologue.graph).args[0])
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


class _NothingKept:
    """The state of a step that reuses nothing and keeps nothing."""

    def read(self, slot: int) -> None:
        """Nothing is kept."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Drops the cuts."""


def _example(fake: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as a cut or a hoisted value is when it is computed."""
    return torch.empty_strided(
        tuple(fake.shape), fake.stride(), dtype=fake.dtype, device=fake.device
    )
