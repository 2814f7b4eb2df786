"""One sequence of calls: which step comes next, what it reuses, and what is kept after it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from pabc.passes import Cuts
from pabc.runtime.bindings import Binding, PlannedStep
from pabc.runtime.clock import Clock
from pabc.runtime.guards import GuardError
from pabc.runtime.hoisted import Hoisted
from pabc.runtime.slots import FreshCuts, HeldSlots, is_finite
from pabc.runtime.source import Source
from pabc.runtime.stats import Recorder
from pabc.runtime.step import ActiveStep, ServedCall


class Branch:
    """The calls of one name within a trajectory. What to do with each slot is the plan's to say,
    and which step a call is, the trajectory's.

    Attributes:
        step: the step of the call under way, or of the one that comes next.
        last: the last step of this generation that was run, or begun; -1: none.
        clock: what checks the steps that are stated, where they are.
        slots: what is kept for later steps.
        hoisted: what the prologue computed.
        source: what both were computed from.
        num_reused: regions reused in this generation, one per slot and call.
        has_reused: whether the last call reused something.
        may_repeat: whether a step may be run again, and finds then what it found before.
        is_scheduled: whether the calls are steps of the schedule.
        origin: the branch that it has begun as a copy of; None: it has begun with nothing.
    """

    is_scheduled = True

    def __init__(self, recorder: Recorder, check_finite: bool = False) -> None:
        self.slots = HeldSlots(recorder)
        self.source: Source | None = None
        self._recorder = recorder
        self._check_finite = check_finite
        self._start()

    def _start(self) -> None:
        self.step, self.last = 0, -1
        self.clock: Clock | None = None
        self.origin: Branch | None = None
        self.hoisted: Hoisted | None = None
        self.num_reused = self._num_wanted = 0
        self.has_reused = self.may_repeat = self._is_counted = False

    def begin(self, call: ServedCall, *, is_sure: bool = True) -> ActiveStep:
        """Begins the step of a call. It reuses all slots that the plan says, or none.

        `is_sure`: whether it is sure enough for reuse which step the call is.
        """
        change = None if call.source is self.source else self._take_source(call)
        planned = call.binding.steps[self.step]
        reused = planned.reused
        weights = None
        is_late = self.last != self.step - 1  # what it has not stored was not to be expected
        self.last = self.step
        self.has_reused = False
        if reused:
            self._num_wanted += not is_late
            if not is_sure:
                self._recorder.fall_back("timestep", self.step)
            elif call.doubt:
                self._recorder.fall_back(call.doubt, self.step)
            elif not self.slots.hold(reused):
                self._recorder.fall_back(change or "missing", self.step)
            elif not planned.forecasts:
                self.has_reused = True
            else:
                weights = self._weigh(call.binding, planned)
                self.has_reused = weights is not None
                if weights is None:
                    self._recorder.fall_back("missing", self.step)
        return ActiveStep(self, call, self.step, reused if self.has_reused else (), weights)

    def _weigh(self, binding: Binding, planned: PlannedStep) -> torch.Tensor | None:
        """Returns the weights of a step's forecasts; None if they do not fit what is held.

        The planned weights are those of the planned steps. Where other steps were computed, since
        the branch began late or a call could not reuse, polynomials go through these; fitted
        weights do not fit them.
        """
        slots, step = self.slots, self.step
        if all(slots.sources(f.slot, len(f.sources)) == f.sources for f in planned.forecasts):
            return binding.weights(step)
        found = [
            binding.plan.weigh(step, f.column, slots.sources(f.slot, binding.depths[f.slot]))
            for f in planned.forecasts
        ]
        numbers = [row for row in found if row is not None]
        return binding.pack(step, numbers) if len(numbers) == len(found) else None

    def _take_source(self, call: ServedCall) -> str | None:
        """Drops what follows from another source than the call; returns what tells them apart."""
        source, earlier = call.source, self.source
        if source == earlier:
            return None
        change = None if earlier is None else source.difference(earlier)
        self.release()
        self.source = source
        return change

    def finish(self, step: ActiveStep, planned: PlannedStep, fresh: Sequence[FreshCuts]) -> None:
        """Keeps what a step computed, counts it, and frees what no later step reads."""
        plan = step.binding.plan
        if self._check_finite:
            for slot, cuts, _ in fresh:
                _check_finite(step, slot, cuts)
        num_stored = self.slots.put(fresh, step.index, step.binding.depths) if fresh else 0
        num_reused = len(step.reused)
        num_computed = planned.num_computed if num_reused else len(plan.slots)
        self.num_reused += num_reused
        self._recorder.add_call(num_reused, num_computed, num_stored)
        if step.index + 1 == plan.num_steps:
            self._end()
        elif planned.last_reads and not self.may_repeat:
            self.slots.free_last_reads(planned.last_reads, step.index)
        self.step = step.index + 1

    def _end(self) -> None:
        """Counts a generation, and frees all."""
        self.release()
        if self._is_counted:
            return
        self._is_counted = True
        self._recorder.add(generations=1)
        if self._num_wanted and not self.num_reused:
            warnings.warn(
                "pabc: nothing was reused in a whole generation, though the schedule asks for it; "
                "see stats.fallbacks and explain()",
                stacklevel=5,
            )

    def seek(self, step: int) -> None:
        """Makes the next call this step."""
        if step != self.step or self.may_repeat:
            self.step = step
            self.slots.free_before(step)

    def begin_as(self, other: Branch, step: int) -> None:
        """Begins at a step with what another branch keeps of the steps before it."""
        self.origin, self.source = other, other.source
        self.slots.copy(other.slots, before=step)

    def relabel(self, step: int) -> None:
        """Makes the last call this step, or, for -1, none of the generation; frees all slots."""
        self.release()
        self.last, self.step = step, step + 1

    def reset(self) -> None:
        """Starts a new generation: step 0, all slots empty, nothing hoisted."""
        self.slots.clear()
        self._start()

    def release(self) -> None:
        """Frees all slots, and what is hoisted."""
        self.hoisted = None
        self.slots.clear()


class UnscheduledCalls(Branch):
    """The calls of a trajectory that are no steps of the schedule, such as a prefill.

    Each runs as the last step of the plan would: nothing is reused, and nothing is kept.
    """

    is_scheduled = False

    def begin(self, call: ServedCall, *, is_sure: bool = True) -> ActiveStep:
        """Begins a call."""
        self.source = call.source
        self.step = call.binding.plan.num_steps - 1
        return ActiveStep(self, call, self.step, ())

    def finish(self, step: ActiveStep, planned: PlannedStep, fresh: Sequence[FreshCuts]) -> None:
        """Counts the call, and frees what it hoisted."""
        self._recorder.add(outside=1)
        self.release()


def _check_finite(step: ActiveStep, slot: int, cuts: Cuts) -> None:
    if not all(map(is_finite, cuts)):
        binding = step.binding
        spec = binding.plan.slots[binding.columns.index(slot)]
        raise GuardError(
            f"expected finite values to keep, found NaN or infinity in the {spec.kind} branch "
            f"{spec.name!r} at step {step.index}"
        )
