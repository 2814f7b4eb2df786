"""One captured call signature: its guarded graph, its plan, and one executable per phase."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pabc import passes
from pabc.base.arguments import pack
from pabc.passes import (
    Cuts,
    has_functions_of_its_own,
    user_inputs,
)
from pabc.pipeline import Config, Record, analyze
from pabc.plan import SlotSpec
from pabc.runtime.arguments import delete_arguments
from pabc.runtime.bindings import Bindings
from pabc.runtime.branch import Binding, Branch, Hoisted, Source
from pabc.runtime.chain import BlockCode
from pabc.runtime.cudagraphs import Recordable, Workspaces, find_device
from pabc.runtime.phases import Backend, Executable, Phases, check_fp8, compiling
from pabc.runtime.prologue import (
    ProloguePart,
    first_copies,
    part_of_prologue,
    whole_prologue,
)
from pabc.runtime.reads import ReadCheck
from pabc.runtime.samples import hash_values
from pabc.runtime.state import Watch
from pabc.runtime.stats import Recorder
from pabc.runtime.strides import Strides, without_overlaps
from pabc.runtime.weights import Weights
from pabc.schedule import Schedule


class Program:
    """Everything that follows from a model and the shapes of one call, whatever the schedule.

    Not to be used by two threads at once but for :meth:`run`, whose caller holds no lock.

    Attributes:
        guarded: the guarded, unspecialized graph; its first input is the state of a generation.
        regions: what may be reused; region i is slot i of a plan.
        promoted: positions among the flattened arguments of numbers that are inputs.
        records: what the pipeline did, stage by stage.
        bindings: the plans that schedules come to for these regions.
        phases: what runs the steps of a plan.
    """

    def __init__(
        self,
        guarded: GraphModule,
        *,
        backend: Backend,
        config: Config,
        promoted: Collection[int] = (),
        records: tuple[Record, ...] = (),
        recorder: Recorder | None = None,
        code: BlockCode | None = None,
    ) -> None:
        self.guarded, self.records = guarded, records
        self.promoted = frozenset(promoted)
        self._sizes: passes.Sizes | None = self.guarded.meta.get("sizes")
        self.regions: tuple[passes.Region, ...] = self.guarded.meta["regions"]
        self.bindings = Bindings(guarded, config.memory_budget)
        self.reads: passes.Reads = self.guarded.meta["reads"]
        self._read_check = ReadCheck(self.reads)
        self._read: Hoisted | None = None
        self.signature: passes.Signature = self.guarded.meta["signature"]
        self._writes: tuple[int, ...] = self.guarded.meta["writes"]
        self._deleted: tuple[tuple[Any, ...], ...] = self.guarded.meta["deleted"]
        self.backend = backend
        self._prologue: GraphModule = self.guarded.meta["prologue"]
        self._whole = whole_prologue(self._prologue)
        self._parts: dict[tuple[int, tuple[int, ...]], ProloguePart] = {}
        self._steady: tuple[int, ...] = self.guarded.meta["steady"]
        self._strides = Strides(
            guarded, len(self.signature.inputs), (*self._steady, *self.reads.used)
        )
        self._weights = Weights((self.guarded, self._prologue, self.reads.graph))
        self._weights_state = 0
        self._hoisted_weights = self._weights.live(
            str(n.target) for n in self._prologue.graph.nodes if n.op == "get_attr"
        )
        self._read_weights = self._weights.live(self.reads.weights)
        self._widths = [len(region.kept) for region in self.regions]
        self._source = Source(self, (), 0)
        recorder, code = recorder or Recorder(), BlockCode() if code is None else code
        self.phases = Phases(guarded, self._weights, backend, config, recorder, code)
        self._has_plain_weights = not any(map(has_functions_of_its_own, self._weights.all()))
        self._device = find_device(guarded) if config.cudagraphs else None
        self._workspaces = Workspaces(recorder)

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
        code: BlockCode | None = None,
    ) -> Program:
        """The program for a call with these arguments, wherever in memory their elements lie."""
        args, kwargs = without_overlaps(args, kwargs)
        prepared = _prepare_inductor(args, kwargs) if backend == "inductor" else None
        with compiling():
            guarded, records = analyze(model, args, kwargs, config, promoted)
        if prepared is not None:
            prepared()
        if backend == "inductor" and config.cache_dtype == "fp8":
            vals = [n.meta.get("val") for n in guarded.graph.nodes if n.op == "placeholder"]
            check_fp8({val.device for val in vals if isinstance(val, torch.Tensor)})
        return cls(
            guarded,
            backend=backend,
            config=config,
            promoted=promoted,
            records=records,
            recorder=recorder,
            code=code,
        )

    @property
    def slots(self) -> tuple[SlotSpec, ...]:
        """The regions, as a plan needs them."""
        return self.bindings.slots

    def bind(self, schedule: Schedule, inputs: Sequence[Any] | None = None) -> Binding:
        """The schedule bound to these slots, or to those of them that a memory budget allows.

        `inputs`: of the call whose sizes decide how many bytes a slot takes; by default, the one
        that was captured. Raises ValueError if a budget allows no slot.
        """
        layout = () if inputs is None else self.phases.layout(inputs)
        return self.bindings.get(schedule, layout, inputs)

    def specialize(self, binding: Binding) -> tuple[GraphModule, ...]:
        """One specialized module per phase, in the plan's order."""
        reused = [phase.reused for phase in binding.plan.phases]
        return tuple(self.phases.specialize(slots, binding.stored[slots]) for slots in reused)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """The graphs' inputs from the model's flattened arguments, laid out as when captured."""
        return self._strides.fit(pack(leaves, self.promoted))

    def serves(self, leaves: Sequence[Any]) -> bool:
        """Whether the graphs, captured for any sizes, hold for these arguments."""
        return self._sizes is not None and self._sizes.bind(pack(leaves, self.promoted)) is not None

    def source(self, inputs: Sequence[Any]) -> Source:
        """What values that are computed from these inputs follow from."""
        layout, state = self.phases.layout(inputs), self._weights_state
        if self._source.layout != layout or self._source.weights != state:
            self._source = Source(self, layout, state)
        return self._source

    def differs_in(self, inputs: Sequence[Any], source: Source) -> str:
        """What tells a call with these inputs from the one that `source` is of."""
        other = source.program
        assert isinstance(other, Program)
        if other is self:
            return "shape" if source.layout != self.phases.layout(inputs) else "weights"
        if not other._weights.are_of_this_state:
            return "model"
        theirs, own = other._described(), self._described()
        if theirs.keys() != own.keys():
            return "arguments"  # of another structure, or no tensors where there were
        pairs = [(own[name], theirs[name]) for name in own]
        for i, reason in enumerate(("dtype", "device", "shape")):
            if any(mine[i] != yours[i] for mine, yours in pairs):
                return reason
        return "arguments"

    def _described(self) -> dict[str, tuple[Any, ...]]:
        """Of the tensors among the inputs, by name: dtype, device, and shape as captured."""
        nodes = user_inputs(self.guarded.graph)[1 : 1 + len(self.signature.inputs)]
        pairs = zip(self.signature.inputs, [n.meta.get("val") for n in nodes], strict=True)
        return {
            name: (x.dtype, x.device, tuple(map(str, x.shape)))
            for name, x in pairs
            if isinstance(x, torch.Tensor)
        }

    def sample_values(self, inputs: Sequence[Any]) -> dict[str, str]:
        """A hash of some values of the weights, and of each tensor among the inputs."""
        pairs = zip(self.signature.inputs, inputs, strict=True)
        own = {f"values of {name}": hash_values([x], 1 << 14) for name, x in pairs
               if isinstance(x, torch.Tensor)}  # fmt: skip
        return {**own, "weights": hash_values(self._weights.all(), 1 << 6)}

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """The model's result for flattened arguments, with nothing reused or kept."""
        inputs = self.pack(leaves)
        with self.with_plain_weights():
            outputs = self.guarded(_NothingKept(), *inputs, *self._prologue(*inputs))
        return self.signature.out_spec.unflatten(outputs)

    def run(
        self,
        branch: Branch,
        reused: tuple[int, ...],
        executable: Executable,
        inputs: Sequence[Any],
    ) -> Any:
        """Runs a step that has begun: the model's result. The branch advances unless it raises."""
        run = executable.run
        if isinstance(run, Recordable):
            outputs, kept = self._replay(branch, reused, run, inputs)
            branch.keep(executable.stored, kept, self._widths)
        elif self.backend == "oracle":
            outputs = run(branch, *inputs, *self._prologue(*inputs))
        else:
            cuts = branch.reused_cuts(reused)
            outputs, kept = run(*inputs, *self._hoist(branch, inputs), *cuts)
            branch.keep(executable.stored, kept, self._widths)
        branch.advance()
        if self._writes:
            _write_back(inputs, self._writes, outputs[self.signature.out_spec.num_outputs :])
        return self.signature.out_spec.unflatten(outputs)

    @property
    def writes_to_arguments(self) -> bool:
        """Whether the model's forward writes to what it is passed."""
        return bool(self._writes or self._deleted)

    def write_to_arguments(
        self,
        bound: tuple[Sequence[Any], Mapping[str, Any]],
        leaves: Sequence[Any],
        inputs: Sequence[Any],
    ) -> None:
        """Does to the user's arguments, as they are bound and flattened, what the forward does."""
        for position in self._writes:
            if inputs[position] is not leaves[position]:  # it lay otherwise, and was copied
                leaves[position].copy_(inputs[position])
        delete_arguments(self._deleted, *bound)

    def _replay(
        self, branch: Branch, reused: tuple[int, ...], phase: Recordable, inputs: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
        """Runs a step on the memory of its branch, which holds what is hoisted and kept."""
        assert self._device is not None
        workspace = self._workspaces.of(branch, self.phases.layout(inputs), self._device)
        workspace.take_inputs(inputs)
        values = workspace.take_hoisted(self._hoist(branch, inputs))
        assert branch.hoisted is not None
        branch.hoisted = replace(branch.hoisted, values=values)
        return workspace.run(phase, reused)

    def _hoist(self, branch: Branch, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The prologue's results, computed anew only where something they follow from has changed;
        all of them, where that is a weight."""
        sources = [*[inputs[i] for i in self._steady], *self._hoisted_weights]
        held = branch.hoisted
        if held is None or not held.holds_for(sources):
            before = Hoisted.of(sources, ())
            part = self._whole if held is None else self._part(held.changed(sources))
            fresh = part.graph(*inputs)
            if self.backend == "inductor":
                fresh = first_copies(part.graph, fresh)
            values = list(fresh if held is None else held.values)
            for place, tensor in zip(part.places, fresh, strict=True):
                values[place] = tensor
            held = branch.hoisted = replace(before, values=tuple(values))
        return held.values

    def _part(self, changed: tuple[int, ...]) -> ProloguePart:
        """What to run where these of the sources changed: steady inputs come first."""
        if len(changed) == len(self._steady) or any(i >= len(self._steady) for i in changed):
            return self._whole
        key = (self._weights_state, changed)  # another thread may replace weights meanwhile
        part = self._parts.get(key)
        if part is None:
            positions = [self._steady[i] for i in changed]
            part = self._parts[key] = part_of_prologue(self._prologue, positions)
        return part

    def difference(self, leaves: Sequence[Any]) -> tuple[passes.Read, Any] | None:
        """The first value read from data that is not as captured, with what it is now.

        What the values follow from is looked at only where it has changed.
        """
        if not self.reads:
            return None
        inputs = self._strides.fit(pack(leaves, self.promoted), only=self.reads.used)
        sources = [*[inputs[i] for i in self.reads.used], *self._read_weights]
        if self._read is not None and self._read.holds_for(sources):
            return None
        with self.with_plain_weights():
            found = self._read_check.difference(inputs)
        if found is None:
            self._read = Hoisted.of(sources, ())
        return found

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Compiles every phase now, for inputs like these."""
        self.phases.prepare(binding, inputs)

    def with_plain_weights(self) -> AbstractContextManager[object]:
        """While active, weights are the tensors that the graphs were made for: their classes have
        PyTorch's functions do nothing else."""
        return _AS_THEY_ARE if self._has_plain_weights else torch._C.DisableTorchFunctionSubclass()

    @property
    def calls_modules(self) -> bool:
        """Whether the graphs call modules of the model."""
        return bool(self.guarded.meta["calls"])

    def share(self, watch: Watch) -> None:
        """Looks at the model's Python state through `watch`, as other programs of the model do."""
        self._weights.share(watch)

    def state_difference(self, model: nn.Module) -> str | None:
        """Returns what of the model's Python state, as last looked at, is not as it was captured,
        in words; None: nothing."""
        return self._weights.state_difference(model)

    def has_its_tensors(self, model: nn.Module) -> bool:
        """Whether the model still has the very tensors that the graphs read."""
        return self._weights.are_there(model)

    def keeps_up(self, model: nn.Module, at_start: bool) -> bool:
        """Picks up tensors that were replaced in the model; False if the graphs no longer fit.

        `at_start`: of a generation, when nothing that may have changed is left out.
        """
        if not at_start and self._weights.is_current(model):
            return True
        graphs = (self.guarded, self._prologue, self.reads.graph, *self.phases.modules)
        replaced = self._weights.follow(model, graphs)
        if replaced:
            self._weights_state += 1
            self._parts.clear()
        return replaced is not None

    @property
    def of_any_size(self) -> bool:
        """Whether the graphs leave sizes open."""
        return self._sizes is not None


def _write_back(inputs: Sequence[Any], positions: Sequence[int], values: Sequence[Any]) -> None:
    """Writes to inputs what the model writes to them; not again what is there: what was computed
    from an input that stays the same is kept for a generation."""
    for position, value in zip(positions, values, strict=True):
        if not torch.equal(inputs[position], value):
            inputs[position].copy_(value)


_AS_THEY_ARE = nullcontext()


class _NothingKept:
    """The state of a step that reuses nothing and keeps nothing."""

    def read(self, slot: int) -> None:
        """Nothing is kept."""

    def write(self, slot: int, cuts: Cuts) -> None:
        """Drops the cuts."""


def _prepare_inductor(*arguments: Any) -> Callable[[], None] | None:
    """Begins what Inductor needs for calls on a CPU; returns what waits for it."""
    leaves = pytree.tree_leaves(arguments)
    if all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, torch.Tensor)):
        return passes.prepare_inductor()
    return None
