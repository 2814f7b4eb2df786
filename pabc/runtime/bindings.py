"""Binds schedules to the slots of a captured model, within a memory budget if there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule

from pabc import passes
from pabc.base.kinds import COARSE
from pabc.budget import Fit, fit_plan
from pabc.passes import cache_read
from pabc.plan import Plan, SlotSpec
from pabc.schedule import Schedule

InputShapes = tuple[tuple[int, ...], ...]
"""The inputs' shapes, where one program serves several; else empty."""


class PlannedForecast(NamedTuple):
    """The reuse of a slot that a step forecasts from several values.

    Attributes:
        slot: the slot, an index of a region.
        column: its index among the slots of the plan.
        sources: the steps whose values are added up, the newest first.
    """

    slot: int
    column: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of a plan, as the runtime reads it. Slots are indices of regions.

    Attributes:
        reused: the slots that it reuses.
        num_computed: how many slots of the plan it computes.
        forecasts: those of the reused slots that are not simply held.
        until: per slot, the last step that may read what this one computes; -1: none.
        readable: the slots for which there is such a step.
        last_reads: the slots with a value that no later step reads, whenever it was computed.
    """

    reused: tuple[int, ...]
    num_computed: int
    forecasts: tuple[PlannedForecast, ...]
    until: tuple[int, ...]
    readable: tuple[int, ...]
    last_reads: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """A schedule bound to a program's slots: what each step does. Slots are indices of regions.

    Attributes:
        plan: actions, lifetimes, phases; its slots are those in `columns`.
        columns: for each slot of the plan, the region that it belongs to, ascending.
        phases: the phases of the plan, in its order.
        whole: the phase that reuses nothing. It stands in where a value is missing, so it returns
            the cuts of all slots that some phase stores.
        depths: per slot, how many values a forecast of it takes; 0: it is held.
        steps: the plan, step by step.
        device: where forecasts are computed.
        fit: how the plan was made to fit a memory budget, where there is one.
    """

    plan: Plan
    columns: tuple[int, ...]
    phases: tuple[passes.PhaseSlots, ...]
    whole: passes.PhaseSlots
    depths: tuple[int, ...]
    steps: tuple[PlannedStep, ...]
    device: torch.device
    fit: Fit | None = None
    _weights: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plan: Plan,
        columns: Sequence[int],
        num_slots: int,
        device: torch.device,
        fit: Fit | None = None,
    ) -> Binding:
        """Returns the binding that follows from a plan for some of a program's slots."""
        columns = tuple(columns)
        depths = [0] * num_slots
        for slot, depth in zip(columns, plan.depths, strict=True):
            depths[slot] = depth
        stored = sorted({columns[index] for phase in plan.phases for index in phase.stored})
        whole = passes.PhaseSlots((), tuple(stored))
        phases = tuple(
            passes.PhaseSlots(
                _pick(columns, phase.reused),
                _pick(columns, phase.stored),
                _pick(plan.depths, phase.reused),
            )
            if phase.reused
            else whole
            for phase in plan.phases
        )
        steps = tuple(_steps_of(plan, columns, num_slots))
        return cls(plan, columns, phases, whole, tuple(depths), steps, device, fit)

    def phase(self, step: int, reused: tuple[int, ...]) -> passes.PhaseSlots:
        """Returns the phase of a step that reuses these slots: all that are planned, or none."""
        return self.phases[self.plan.phase_of_step[step]] if reused else self.whole

    def weights(self, step: int) -> torch.Tensor:
        """Returns the weights of the forecasts of a step, padded to the depths of their slots."""
        if step not in self._weights:
            numbers = [
                self.plan.weights(step, forecast.column) for forecast in self.steps[step].forecasts
            ]
            self._weights[step] = self.pack(step, numbers)
        return self._weights[step]

    def pack(self, step: int, numbers: Sequence[Sequence[float]]) -> torch.Tensor:
        """Returns the weights of a step's forecasts as one tensor, padded with zeros."""
        forecasts = self.steps[step].forecasts
        rows = zip(forecasts, numbers, strict=True)
        flat = [w for f, row in rows for w in (*row, *[0.0] * (self.depths[f.slot] - len(row)))]
        return torch.tensor(flat, dtype=torch.float32, device=self.device)


def _pick(columns: Sequence[int], indices: Sequence[int]) -> tuple[int, ...]:
    return tuple(columns[index] for index in indices)


def _steps_of(plan: Plan, columns: tuple[int, ...], num_slots: int) -> Iterator[PlannedStep]:
    ends: list[set[int]] = [set() for _ in range(plan.num_steps)]
    table = np.full((plan.num_steps, num_slots), -1, dtype=np.int32)
    table[:, columns] = np.where(_keeps_what_is_not_planned(plan) | plan.computed, plan.until, -1)
    for row in table.tolist():
        for slot, last in enumerate(row):
            if last >= 0:
                ends[last].add(slot)
    num_computed = plan.computed.sum(axis=1).tolist()
    for step, (phase, row, slots) in enumerate(
        zip(plan.phase_of_step, table.tolist(), ends, strict=True)
    ):
        reused = plan.phases[phase].reused
        yield PlannedStep(
            _pick(columns, reused),
            num_computed[step],
            tuple(
                PlannedForecast(columns[column], column, plan.history(step, column))
                for column in reused
                if plan.depths[column]
            ),
            tuple(row),
            tuple(slot for slot, last in enumerate(row) if last >= 0),
            tuple(sorted(slots)),
        )


def _keeps_what_is_not_planned(plan: Plan) -> npt.NDArray[np.bool_]:
    """Returns for each slot whether a value is kept that a step computed against the plan.

    Given weights are for the planned values alone, which such a value would push out.
    """
    return np.array([isinstance(forecast, str) for forecast in plan.forecasts], dtype=bool)


def slot_specs(regions: Sequence[passes.Region]) -> tuple[SlotSpec, ...]:
    """Returns one slot per region.

    A slot has the name of its region's module, and that of the region too if others share it. Those
    of the stack and of the whole model are named by their kind.
    """
    names = _slot_names(regions)
    return tuple(
        SlotSpec(
            name=name,
            kind=region.kind,
            layer=region.layer,
            nbytes=region.nbytes,
            outer=tuple(n for n, r in zip(names, regions, strict=True) if slot in r.covers),
        )
        for slot, (name, region) in enumerate(zip(names, regions, strict=True))
    )


def _slot_names(regions: Sequence[passes.Region]) -> list[str]:
    """Returns the names of slots; regions that contain others change none of the others' names."""
    fine = Counter(region.path for region in regions if region.kind not in COARSE)
    coarse = Counter(region.path for region in regions if region.kind == "block")
    names = []
    for region in regions:
        is_coarse = region.kind in COARSE
        count = fine[region.path] + coarse[region.path] * is_coarse
        if region.kind in ("stack", "model"):
            names.append(region.name if region.kind in fine else region.kind)
        elif is_coarse and not region.path:
            names.append(region.name)
        else:
            names.append(region.path if count == 1 else f"{region.path}:{region.name}")
    return names


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
        self._devices = [_device(guarded, region) for region in guarded.regions]
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
        index = {spec.name: slot for slot, spec in enumerate(self.slots)}
        columns = [index[spec.name] for spec in plan.slots]
        forecast = (self._devices[c] for c, k in zip(columns, plan.depths, strict=True) if k)
        device = next(forecast, torch.device("cpu"))
        if self._memory_budget is None:
            return Binding.of(plan, columns, len(self.slots), device)
        fit = fit_plan(plan, _pick(self._flops, columns), self._memory_budget)
        return Binding.of(fit.plan, columns, len(self.slots), device, fit)

    @cached_property
    def _flops(self) -> list[int]:
        """Floating-point operations that the reuse of each region saves."""
        count = passes.FlopCounter(self._guarded.captured.sizes)
        return count.of_regions(self._guarded)


def _device(guarded: passes.Guarded, region: passes.Region) -> torch.device:
    """Returns the device on which a region computes its first cut."""
    body = guarded.graph.get_submodule(region.name)
    assert isinstance(body, GraphModule)
    return passes.value(passes.output_node(body.graph).args[0][0]).device
