"""One captured call signature: its guarded graph, its plan, and one executable per phase."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pabc import passes
from pabc.explanation import Explanation, describe
from pabc.internals import pytree
from pabc.internals.dispatch import DisableTorchFunctionSubclass
from pabc.internals.dynamo import compile_lock
from pabc.options import Options
from pabc.passes import Cuts, has_functions_of_its_own
from pabc.pipeline import analyze
from pabc.plan import SlotSpec
from pabc.runtime.autocast import without_autocast, without_grad
from pabc.runtime.bindings import Binding, Bindings
from pabc.runtime.chain import BlockCode
from pabc.runtime.cudagraphs import Workspaces, find_device
from pabc.runtime.hoisted import Prologue
from pabc.runtime.inputs import ProgramInputs
from pabc.runtime.phases import Phases, check_fp8
from pabc.runtime.reads import ReadCheck
from pabc.runtime.samples import hash_values
from pabc.runtime.serving import Contexts
from pabc.runtime.source import ValueSource
from pabc.runtime.state import Watch
from pabc.runtime.stats import Recorder
from pabc.runtime.step import ServedCall
from pabc.runtime.strides import without_overlaps
from pabc.runtime.weights import Weights
from pabc.schedule import Schedule
from pabc.stages import StageRecord


class Program:
    """Everything that follows from a model and the shapes of one call, whatever the schedule.

    Not thread-safe; the steps that it serves may run at the same time.

    Attributes:
        guarded: the guarded, unspecialized graph; its first input is the state of a step.
        records: what the pipeline did, stage by stage.
        regions: what may be reused; region i is slot i of a plan.
        signature: the model's inputs and outputs.
        reads: the Python values that were read from tensors at capture.
        inputs: from arguments to the graphs' inputs, and back.
        prologue: what is computed once a generation.
        bindings: the plans that schedules come to for these regions.
        phases: what runs the steps of a plan.
    """

    def __init__(
        self,
        guarded: passes.Guarded,
        *,
        options: Options,
        lifted: Collection[int] = (),
        records: tuple[StageRecord, ...] = (),
        recorder: Recorder | None = None,
        code: BlockCode | None = None,
    ) -> None:
        self.guarded, self.records = guarded, records
        captured, prologue = guarded.captured, guarded.prologue
        self.regions = guarded.regions
        self.signature, self.reads = captured.signature, captured.reads
        conditions = (*prologue.steady, *self.reads.used)
        self.inputs = ProgramInputs(guarded, lifted=lifted, conditions=conditions)
        graphs = (guarded.graph, prologue.graph, self.reads.graph)
        self._weights = Weights(graphs, captured)
        is_compiled = options.backend == "inductor"
        self.prologue = Prologue(prologue, self._weights, narrows_copies=is_compiled)
        self.bindings = Bindings(guarded, options.memory_budget)
        recorder, code = recorder or Recorder(), BlockCode() if code is None else code
        workspaces = Workspaces(find_device(guarded), recorder) if options.cudagraphs else None
        self.phases = Phases(guarded, self._weights, options, recorder, code, workspaces)
        self._source = ValueSource(self._weights, self._weights.state, (), self.inputs.tensors)
        self._read_check = ReadCheck(self.reads, self._weights) if self.reads else None
        self._has_plain_weights = not any(map(has_functions_of_its_own, self._weights.all()))

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        options: Options,
        lifted: Collection[int] = (),
        recorder: Recorder | None = None,
        code: BlockCode | None = None,
    ) -> Program:
        """Captures the model for a call with these arguments, whatever their strides are."""
        args, kwargs = without_overlaps(args, kwargs)
        prepared = _prepare_inductor(args, kwargs) if options.backend == "inductor" else None
        with compile_lock():
            guarded, records = analyze(model, args, kwargs, options, lifted)
        if prepared is not None:
            prepared()
        if options.backend == "inductor" and options.cache_dtype == "fp8":
            vals = [n.meta.get("val") for n in passes.user_inputs(guarded.graph.graph)]
            check_fp8({val.device for val in vals if isinstance(val, torch.Tensor)})
        return cls(
            guarded,
            options=options,
            lifted=lifted,
            records=records,
            recorder=recorder,
            code=code,
        )

    @property
    def slots(self) -> tuple[SlotSpec, ...]:
        """The regions, as a plan needs them."""
        return self.bindings.slots

    @property
    def left_out(self) -> tuple[str, ...]:
        """A message for each coarser region that cannot be reused, with the reason."""
        return self.guarded.left_out

    def bind(self, schedule: Schedule, inputs: Sequence[Any] | None = None) -> Binding:
        """Returns the schedule bound to these slots, or to those that a memory budget has room for.

        `inputs` decide how many bytes a slot takes; None: those of the capture. Raises ValueError
        if the budget has room for no slot.
        """
        layout = () if inputs is None else self.phases.layout(inputs)
        return self.bindings.get(schedule, layout, inputs)

    def specialize(self, binding: Binding) -> tuple[GraphModule, ...]:
        """Returns one specialized module per phase, in the plan's order."""
        return tuple(map(self.phases.specialize, binding.phases))

    def pack(self, leaves: list[Any], args: Any, kwargs: Any, *, within_hooks: bool) -> list[Any]:
        """Returns the inputs of the graphs from the flattened arguments."""
        return self.inputs.pack(leaves)

    @property
    def writes_to_arguments(self) -> bool:
        """True if the graphs return values that are written to the caller's arguments."""
        return self.inputs.writes_to_arguments

    def write_to_arguments(self, bound: Any, leaves: list[Any], inputs: list[Any]) -> None:
        """Writes to the caller's arguments what the model writes to them."""
        self.inputs.write_to_arguments(bound, leaves, inputs)

    def contexts(self, inputs: list[Any]) -> Contexts:
        """Returns what the graphs run within: no gradients, no autocast, plain weights."""
        return without_grad(), without_autocast(inputs), self.with_plain_weights()

    def serve(self, inputs: list[Any], binding: Binding) -> ServedCall:
        """Returns a call with these inputs as a branch begins it."""
        layout, state = self.phases.layout(inputs), self._weights.state
        source = self._source
        if source.layout != layout or source.state != state:
            source = self._source = ValueSource(self._weights, state, layout, self.inputs.tensors)
        return ServedCall(inputs, binding, source, self.prologue, self.phases)

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Writes to the inputs what the model writes to them; returns the model's result."""
        if self.inputs.writes_to_arguments:
            self.inputs.write(inputs, outputs[self.signature.out_spec.num_outputs :])
        return self.signature.out_spec.unflatten(outputs)

    def facts(self, inputs: Sequence[Any], *, with_values: bool) -> dict[str, str]:
        """Returns what must be the same on all ranks that share the model."""
        digest = self.guarded.shards.digest[:12]
        return {"model": digest, **(self.sample_values(inputs) if with_values else {})}

    def explain(self, binding: Binding, unmatched: tuple[str, ...]) -> Explanation:
        """Returns what was found in the model, and the plan."""
        return describe(
            self.guarded,
            plan=binding.plan,
            fit=binding.fit,
            unmatched=unmatched,
            compile_seconds=self.phases.compile_seconds,
            lowered=passes.summarize(self.phases.lowered),
            stages=self.records,
        )

    def sample_values(self, inputs: Sequence[Any]) -> dict[str, str]:
        """Returns hashes of some values of the weights, and of each tensor among the inputs."""
        pairs = zip(self.signature.inputs, inputs, strict=True)
        own = {f"values of {name}": hash_values([x], 1 << 14) for name, x in pairs
               if isinstance(x, torch.Tensor)}  # fmt: skip
        return {**own, "weights": hash_values(self._weights.all(), 1 << 6)}

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """Returns the model's result for flattened arguments, with nothing reused or kept."""
        inputs = self.inputs.pack(leaves)
        with self.with_plain_weights():
            outputs = self.guarded.graph(_NothingKept(), *inputs, *self.prologue.graph(*inputs))
        return self.signature.out_spec.unflatten(outputs)

    def difference(self, leaves: Sequence[Any]) -> tuple[passes.Read, Any] | None:
        """Returns the first value read from data that is not as captured, with what it is now."""
        if self._read_check is None:
            return None
        inputs = self.inputs.pack(leaves, only=self.reads.used)
        with self.with_plain_weights():
            return self._read_check.difference(inputs)

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Compiles every phase now, for inputs like these."""
        self.phases.prepare(binding.phases, inputs)

    def with_plain_weights(self) -> AbstractContextManager[object]:
        """Returns a context in which weights of tensor subclasses act as plain tensors, as they did
        at capture."""
        return _AS_THEY_ARE if self._has_plain_weights else DisableTorchFunctionSubclass()

    @property
    def calls_modules(self) -> bool:
        """True if the graphs call opaque modules or hooks of the model."""
        return bool(self.guarded.captured.calls)

    def share(self, watch: Watch) -> None:
        """Compares the model's Python state through `watch`, which programs of the model share."""
        self._weights.share(watch)

    def state_difference(self, model: nn.Module) -> str | None:
        """Returns what of the model's Python state, as last looked at, is not as it was captured,
        in words; None: nothing."""
        return self._weights.state_difference(model)

    def has_its_tensors(self, model: nn.Module) -> bool:
        """Returns whether the model still has the very tensors that the graphs read."""
        return self._weights.are_there(model)

    def keeps_up(self, model: nn.Module, at_start: bool) -> bool:
        """Follows tensors that were replaced in the model; returns False if the graphs do not fit.

        `at_start`: whether a generation starts, when everything that may have changed is compared.
        """
        if not at_start and self._weights.is_current(model):
            return True
        graphs = (self.guarded.graph, self.prologue.graph, self.reads.graph, *self.phases.modules)
        replaced = self._weights.follow(model, graphs)
        if replaced:
            self.prologue.follow_weights()
        return replaced is not None


_AS_THEY_ARE = nullcontext()


class _NothingKept:
    """The state of a step that reuses nothing and keeps nothing."""

    def read(self, slot: int) -> None:
        """Returns None: compute."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Drops the cuts."""


def _prepare_inductor(*arguments: Any) -> Callable[[], None] | None:
    """Starts what Inductor needs for calls on a CPU; returns a function that waits for it."""
    leaves = pytree.tree_leaves(arguments)
    if all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, torch.Tensor)):
        return passes.prepare_inductor()
    import_module("pabc.internals.inductor")  # says what PyTorch lacks, before the capture
    return None
