"""One captured call signature: its guarded graph, its plan, and one executable per phase."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from pabc import passes
from pabc.pipeline import Config, analyze
from pabc.plan import Plan, SlotSpec
from pabc.schedule import Schedule
from pabc.trajectory import Hoisted, Trajectory, version_of
from pabc.weights import Weights

Layout = tuple[tuple[int, ...], ...]
"""The inputs' shapes, where one program serves several; else empty."""
Backend = Literal["inductor", "eager", "oracle"]
Executable = Callable[..., tuple[Sequence[Any], Sequence[torch.Tensor]]]
"""(inputs, hoisted values, the reused cuts) -> (outputs, the stored cuts), as flat sequences."""


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


class Program:
    """Everything that follows from a model, a schedule, and the shapes of one call.

    Attributes:
        guarded: the guarded, unspecialized graph; its first input is the trajectory.
        regions: what may be reused; region i is slot i of the plan.
        plan: the schedule bound to these slots.
        records: what the pipeline did, stage by stage.
        compile_seconds: time spent on specializing and compiling phases so far.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        schedule: Schedule,
        backend: Backend,
        config: Config,
        promoted: Collection[int] = (),
    ) -> None:
        self.guarded, self.records = analyze(model, args, kwargs, config, promoted)
        self._promoted = frozenset(promoted)
        self._sizes: passes.Sizes | None = self.guarded.meta.get("sizes")
        self.regions: tuple[passes.Region, ...] = self.guarded.meta["regions"]
        self.reads: passes.Reads = self.guarded.meta["reads"]
        self._read: Hoisted | None = None
        self.signature: passes.Signature = self.guarded.meta["signature"]
        self.backend = backend
        self.plan: Plan = schedule.plan(slot_specs(self.regions))
        self.compile_seconds = 0.0
        self._prologue: GraphModule = self.guarded.meta["prologue"]
        self._steady: tuple[int, ...] = self.guarded.meta["steady"]
        self._hoisted_weights = [
            str(n.target) for n in self._prologue.graph.nodes if n.op == "get_attr"
        ]
        self._weights = Weights((self.guarded, self._prologue, self.reads.graph))
        self._stored = {phase.reused: phase.stored for phase in self.plan.phases}
        # The phase that reuses nothing also stands in where a value is missing: it stores all.
        self._stored[()] = tuple(sorted({s for p in self.plan.phases for s in p.stored}))
        self._modules: dict[tuple[int, ...], GraphModule] = {}
        self._executables: dict[tuple[tuple[int, ...], Layout], Executable] = {}

    @property
    def phases(self) -> tuple[GraphModule, ...]:
        """One specialized module per phase, in the plan's order."""
        return tuple(self._specialize(phase.reused) for phase in self.plan.phases)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """The graphs' inputs from the model's flattened arguments."""
        return passes.pack(leaves, self._promoted)

    def serves(self, leaves: Sequence[Any]) -> bool:
        """Whether the graphs, captured for any sizes, hold for these arguments."""
        return self._sizes is not None and self._sizes.bind(self.pack(leaves)) is not None

    def layout(self, inputs: Sequence[Any]) -> Layout:
        """What the graphs leave open of the inputs' sizes: a value kept under one fits no other."""
        if self._sizes is None:
            return ()
        return tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """The model's result for flattened arguments, with nothing reused or kept."""
        inputs = self.pack(leaves)
        outputs = self.guarded(Trajectory(self.plan), *inputs, *self._prologue(*inputs))
        return self.signature.out_spec.unflatten(outputs)

    def run(self, trajectory: Trajectory, inputs: Sequence[Any]) -> Sequence[Any]:
        """One step: the model's flat outputs. Advances the trajectory unless it raises."""
        if self.backend == "oracle":
            outputs: Sequence[Any] = self.guarded(trajectory, *inputs, *self._prologue(*inputs))
            trajectory.advance()
            return outputs
        reused = self.plan.phases[self.plan.phase_of_step[trajectory.step]].reused
        cuts: list[torch.Tensor] = []
        for slot in reused:
            held = trajectory.slots[slot]
            if held is None:
                reused, cuts = (), []
                break
            cuts.extend(held)
        key = (reused, self.layout(inputs))
        execute = self._executables.get(key) or self._compile(reused, inputs)
        outputs, kept = execute(*inputs, *self._hoist(trajectory, inputs), *cuts)
        start = 0
        for slot in self._stored[reused]:
            stop = start + len(self.regions[slot].cuts)
            trajectory.write(slot, tuple(kept[start:stop]))
            start = stop
        trajectory.advance()
        return outputs

    def _hoist(self, trajectory: Trajectory, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The prologue's results, computed anew only where something it reads has changed."""
        sources = (*(inputs[i] for i in self._steady), *self._weights.get(self._hoisted_weights))
        held = trajectory.hoisted
        if held is None or not held.holds_for(sources):
            versions = tuple(map(version_of, sources))
            held = trajectory.hoisted = Hoisted(sources, versions, self._prologue(*inputs))
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

    def prepare(self, inputs: Sequence[Any]) -> None:
        """Compiles every phase now, for inputs like these."""
        for phase in self.plan.phases if self.backend != "oracle" else ():
            if (phase.reused, self.layout(inputs)) not in self._executables:
                self._compile(phase.reused, inputs)

    def follow_weights(self, model: nn.Module) -> bool:
        """Picks up tensors that were replaced in the model; False if the graphs no longer fit."""
        graphs = (self.guarded, self._prologue, self.reads.graph, *self._modules.values())
        replaced = self._weights.follow(model, graphs)
        return replaced is not None

    def _specialize(self, reused: tuple[int, ...]) -> GraphModule:
        if reused not in self._modules:
            stored = self._stored[reused]
            gm = passes.specialize_phase_pass(self.guarded, reused=reused, stored=stored)
            gm.graph.lint()
            passes.verify_phase(gm, reused=reused)
            self._modules[reused] = gm
        return self._modules[reused]

    def _compile(self, reused: tuple[int, ...], inputs: Sequence[Any]) -> Executable:
        start = perf_counter()
        gm = self._specialize(reused)
        execute: Executable = gm if self.backend == "eager" else self._compile_inductor(gm, inputs)
        self._executables[reused, self.layout(inputs)] = execute
        self.compile_seconds += perf_counter() - start
        return execute

    def _compile_inductor(self, gm: GraphModule, inputs: Sequence[Any]) -> Executable:
        """Compiles for the sizes of these inputs: what is computed from sizes is folded."""
        flat = passes.lift_weights_pass(passes.inline_regions_pass(gm))
        flat.graph.lint()
        names: tuple[str, ...] = flat.meta["weights"]
        outputs: tuple[Any, ...] = flat.meta["outputs"]
        others = [n for n in flat.graph.nodes if n.op == "placeholder"][len(names) + len(inputs) :]
        binding = (self._sizes and self._sizes.bind(inputs)) or {}
        kept = [_example(passes.concrete(n.meta["val"], binding)) for n in others]
        examples = [*self._weights.get(names), *inputs, *kept]
        compiled = passes.compile_flat(flat, examples)
        num_tensors = sum(isinstance(place, passes.Place) for place in outputs)

        def execute(*args: Any) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
            results = compiled(*self._weights.get(names), *args)
            packed = [results[p.index] if isinstance(p, passes.Place) else p for p in outputs]
            return packed, results[num_tensors:]

        return execute


def _example(fake: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as the cut, or hoisted value, will be when it is passed in."""
    return torch.empty_strided(
        tuple(fake.shape), fake.stride(), dtype=fake.dtype, device=fake.device
    )
