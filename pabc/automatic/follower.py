"""Makes the generations of a model in a user's own loop follow their plans."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from pabc.automatic.check import SamplerCheck
from pabc.automatic.fingerprint import describe_form
from pabc.automatic.planner import Planner, spell
from pabc.automatic.plans import AutoPlan, Kind, PlannedCall
from pabc.base.structure import Structure
from pabc.calibration.hearing import Hearing
from pabc.calibration.steps import Numbers, ReadNumbers, Steps
from pabc.compiled import CompiledModel
from pabc.runtime.listening import HeardCall
from pabc.runtime.timesteps import PendingReading, Reading, TimestepArguments, read
from pabc.runtime.trajectory import Trajectory
from pabc.schedule import Schedule

UNPLANNED = Schedule.none(range(64))
"""What calls follow that are computed in full: it has no timesteps, and reuses nothing."""


class Follower:
    """Listens to the calls of one model, and states the step of each: of a recorded generation, or
    of a plan. Each trajectory has generations of its own."""

    def __init__(self, model: CompiledModel, planner: Planner) -> None:
        self._planner = planner
        self._known = model.timestep_arguments
        self._loops: dict[int, tuple[weakref.ref[Trajectory], _Loop]] = {}

    def begin(self, call: HeardCall) -> None:
        """States the step of a call."""
        loop = self._loop_of(call.trajectory)
        loop.begin(call)

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        self._loop_of(call.trajectory).end(call, result)

    def _loop_of(self, trajectory: Trajectory) -> _Loop:
        """Returns the loop of a trajectory; what those that are gone have recorded is planned."""
        known = self._loops.get(id(trajectory))
        if known is not None and known[0]() is trajectory:
            return known[1]
        for key, (owner, loop) in tuple(self._loops.items()):
            if owner() is None:
                del self._loops[key]
                loop.finish()
        loop = _Loop(self._planner, self._known, trajectory)
        self._loops[id(trajectory)] = weakref.ref(trajectory), loop
        return loop


class _Loop:
    """The generations of one trajectory, one after the other.

    One is recorded (`_hearing` is there), or follows a plan (`_plan` is there), or is computed in
    full without being recorded, since it has left its plan.
    """

    def __init__(self, planner: Planner, known: TimestepArguments, trajectory: Trajectory) -> None:
        self._planner, self._known = planner, known
        self._read = ReadNumbers(known)
        self._resets, self._failures = trajectory.num_resets, trajectory.num_failures
        self._forget()

    def _forget(self) -> None:
        """Begins a generation with the next call."""
        self._is_begun = False
        self._steps = Steps(self._read)
        self._hearing: Hearing | None = None
        self._plan: AutoPlan | None = None
        self._check: SamplerCheck | None = None
        self._calls: list[PlannedCall] = []
        self._first: Numbers = {}
        self._kind: Kind | None = None
        self._position = self._count = 0
        self._awaited: tuple[PendingReading, float] | None = None

    def begin(self, call: HeardCall) -> None:
        """States the step of a call."""
        trajectory = call.trajectory
        if trajectory.num_failures != self._failures:
            self._forget()
        elif trajectory.num_resets != self._resets:
            self.finish()
        self._resets, self._failures = trajectory.num_resets, trajectory.num_failures
        trajectory.checks_steps = False
        if not self._is_begun:
            self._start(call)
        elif self._plan is not None:
            self._follow(call, self._plan)
        elif self._hearing is not None:
            self._record(call)
        else:
            self._compute(call)

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        name = _name_of(call)
        if self._plan is not None:
            step, _, order = self._plan.calls[self._position]
            if self._check is not None:
                key = spell(name, order)
                self._check.end(step, key, call.leaves, call.structure, result)
            self._position += 1
            if self._position == len(self._plan.calls):
                self._forget()
        elif self._hearing is not None:
            step, _, order = self._calls[-1]
            self._steps.end(name, call.leaves, result)
            key = spell(name, order)
            self._hearing.hear(step, key, call.leaves, call.structure, result)

    def finish(self) -> None:
        """Ends the generation; plans what was recorded of it."""
        hearing, kind = self._hearing, self._kind
        if hearing is not None and kind is not None and hearing.num_steps:
            timesteps, path = self._steps.timesteps, self._steps.path
            whole = Kind(kind.family, kind.weights, kind.form, kind.sampler, timesteps)
            self._planner.learn(hearing, whole, self._calls, path)
        self._forget()

    def _start(self, call: HeardCall, *, is_known: bool = True) -> None:
        """Begins a generation; `is_known`: whether a plan may be found for it."""
        self._is_begun = True
        self._first = self._read(call.structure, call.leaves)
        form = describe_form(call.leaves)
        plan = self._find(form) if is_known else None
        if plan is not None:
            self._plan = plan
            self._check = SamplerCheck(plan) if self._planner.checks_samplers else None
            call.trajectory.schedule = plan.schedule
            self._follow(call, plan)
            return
        call.trajectory.schedule = UNPLANNED
        if self._planner.has_given_up:
            self._compute(call)
            return
        self._kind = self._planner.kind(form, "", ())
        self._hearing = Hearing()
        self._record(call)

    def _find(self, form: str) -> AutoPlan | None:
        """Returns the plan for a generation whose first call has the numbers read of it."""
        for number in (*dict.fromkeys(self._first.values()), 0.0):
            plan = self._planner.find(self._planner.kind(form, "", (number,)))
            if plan is not None and number == self._first.get(plan.path or "", 0.0):
                return plan
        return None

    def _record(self, call: HeardCall) -> None:
        name = _name_of(call)
        if self._steps.begins_again(name, call.leaves, call.structure):
            self.finish()
            self._start(call)
            return
        found = self._steps.begin(name, call.leaves, call.structure)
        if not self._calls or self._calls[-1].step != found.index:
            call.trajectory.at_step(found.index % UNPLANNED.num_steps)
        self._calls.append(PlannedCall(found.index, name, found.order))

    def _follow(self, call: HeardCall, plan: AutoPlan) -> None:
        expected = plan.calls[self._position]
        reason = self._find_fault(call, plan, expected)
        if reason is not None:
            self._leave(call, reason)
            return
        if expected.step == 0 and self._position == 0:
            call.trajectory.at_step(0)
        elif plan.calls[self._position - 1].step != expected.step:
            call.trajectory.at_step(expected.step)

    def _find_fault(self, call: HeardCall, plan: AutoPlan, expected: PlannedCall) -> str | None:
        """Returns in what a call is not the one that the plan expects; None: in nothing."""
        name = _name_of(call)
        if name != expected.name:
            at = f"step {expected.step}"
            return f"expected a call named {expected.name!r} at {at}, found {name!r}"
        timestep = plan.kind.timesteps[expected.step]
        late, self._awaited = self._awaited, None
        if late is not None and not late[0]().is_close(late[1]):
            return f"expected timestep {late[1]:g} at the call before, found {late[0]().number}"
        reading = self._reading(plan, call.structure, call.leaves)
        if isinstance(reading, Reading):
            if not reading.is_close(timestep):
                return f"expected timestep {timestep:g} at step {expected.step}, found " + (
                    "several" if reading.number is None else f"{reading.number:g}"
                )
        elif reading is not None:
            self._awaited = reading, timestep
        return None if self._check is None else self._check.begin(expected.step, call.leaves)

    def _reading(
        self, plan: AutoPlan, structure: Structure, leaves: Sequence[Any]
    ) -> Reading | PendingReading | None:
        position = None if plan.path is None else self._known.position(structure, plan.path)
        return None if position is None else read(leaves[position])

    def _leave(self, call: HeardCall, reason: str) -> None:
        """Goes on without the plan, or begins the generation that this call is the first of."""
        if self._position and self._read(call.structure, call.leaves) == self._first:
            self._forget()
            self._start(call)
            return
        if self._position == 0:
            self._forget()
            self._start(call, is_known=False)
            return
        assert self._plan is not None
        other = self._planner.find_other(self._plan, self._check)
        past = self._plan.calls[: self._position]
        if other is not None and other.calls[: self._position] == past:
            self._plan = other
            call.trajectory.switch(other.schedule)
            call.trajectory.at_step(other.calls[self._position].step)
            return
        self._planner.doubt(self._plan, reason)
        self._plan = self._check = None
        call.trajectory.schedule = UNPLANNED
        self._compute(call)

    def _compute(self, call: HeardCall) -> None:
        """Makes a call be computed that is no part of a plan or recording."""
        if self._count and self._read(call.structure, call.leaves) == self._first:
            self._forget()
            self._start(call)
            return
        call.trajectory.at_step(0)
        self._count += 1


def _name_of(call: HeardCall) -> str | None:
    return None if call.where is None else call.where.name
