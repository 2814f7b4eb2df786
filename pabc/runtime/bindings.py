"""Binds schedules to the slots of a captured model, within a memory budget if there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pabc import passes
from pabc.budget import Fit, fit_plan
from pabc.passes import cache_read
from pabc.plan import Plan, SlotSpec
from pabc.schedule import Schedule

InputShapes = tuple[tuple[int, ...], ...]
"""The inputs' shapes, where one program serves several; else empty."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of a plan, as the runtime reads it.

    Attributes:
        reused: the slots that it reuses.
        until: per slot, the last step that may read what this one computes; -1: none.
        readable: the slots for which there is such a step.
        last_reads: the slots whose value no later step reads, whenever it was computed.
    """

    reused: tuple[int, ...]
    until: tuple[int, ...]
    readable: tuple[int, ...]
    last_reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """A schedule bound to a program's slots: what each step does.

    Attributes:
        plan: actions, lifetimes, phases.
        stored: the slots that a phase reuses -> those whose cuts it returns. The phase that reuses
            nothing stands in where a value is missing, so it returns the cuts of all.
        steps: the plan, step by step.
        fit: how the plan was made to fit a memory budget, where there is one.
    """

    plan: Plan
    stored: Mapping[tuple[int, ...], tuple[int, ...]]
    steps: tuple[PlannedStep, ...]
    fit: Fit | None = None

    @classmethod
    def of(cls, plan: Plan, fit: Fit | None = None) -> Binding:
        """Returns the binding that follows from a plan."""
        stored = {phase.reused: phase.stored for phase in plan.phases}
        stored[()] = tuple(sorted({slot for p in plan.phases for slot in p.stored}))
        return cls(plan, stored, _steps_of(plan), fit)


def _steps_of(plan: Plan) -> tuple[PlannedStep, ...]:
    ends: list[set[int]] = [set() for _ in range(plan.num_steps)]
    table: list[list[int]] = plan.until.tolist()
    for row in table:
        for slot, last in enumerate(row):
            if last >= 0:
                ends[last].add(slot)
    return tuple(
        PlannedStep(
            plan.phases[phase].reused,
            tuple(row),
            tuple(slot for slot, last in enumerate(row) if last >= 0),
            tuple(sorted(slots)),
        )
        for phase, row, slots in zip(plan.phase_of_step, table, ends, strict=True)
    )


def slot_specs(regions: Sequence[passes.Region]) -> tuple[SlotSpec, ...]:
    """Returns one slot per region, named by its module, and by the region if they share it."""
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


class Bindings:
    """The plans of one captured model: one per schedule and, for dynamic shapes, per input shapes.

    Attributes:
        slots: one per region, with the bytes that it takes for the shapes of the capture.
    """

    def __init__(self, guarded: passes.Guarded, memory_budget: int | None) -> None:
        self.slots = slot_specs(guarded.regions)
        self._guarded = guarded
        self._memory_budget = memory_budget
        self._sizes = guarded.captured.sizes
        self._bindings: dict[tuple[Schedule, InputShapes], Binding] = {}
        self._bound: tuple[Schedule | None, InputShapes, Binding | None] = None, (), None

    def get(self, schedule: Schedule, layout: InputShapes, inputs: Sequence[Any] | None) -> Binding:
        """Returns the schedule bound to these slots, or to those that a memory budget has room for.

        `inputs`, of this layout, decide how many bytes a slot takes; None: those of the capture.
        Raises: ValueError if the budget has room for no slot.
        """
        last, last_layout, binding = self._bound
        if schedule is not last or layout != last_layout or binding is None:
            binding = self._bindings.get((schedule, layout))
            if binding is None:
                binding = self._fit(schedule.plan(self._slots_for(inputs)))
            self._bindings[schedule, layout] = binding
            self._bound = schedule, layout, binding
        return binding

    def _slots_for(self, inputs: Sequence[Any] | None) -> tuple[SlotSpec, ...]:
        """Returns the slots with the bytes that they take for inputs of these shapes."""
        sizes = self._sizes.bind(inputs) if self._sizes is not None and inputs is not None else None
        if sizes is None:
            return self.slots
        reads = [n for n in self._guarded.graph.graph.nodes if n.target is cache_read]
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
        """Floating-point operations of one run of each region."""
        count = passes.FlopCounter(self._guarded.captured.sizes)
        graph = self._guarded.graph
        return [count(graph.get_submodule(region.name)) for region in self._guarded.regions]
