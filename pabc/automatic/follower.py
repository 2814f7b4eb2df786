"""Makes the generations of a model in a user's own loop follow their plans."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from pabc.automatic.check import describe_difference, explains, find_difference, opening
from pabc.automatic.planner import Planner
from pabc.automatic.plans import AutoPlan, Kind, PlannedCall
from pabc.calibration.hearing import Hearing, name_call
from pabc.calibration.steps import ReadNumbers, Steps
from pabc.compiled import CompiledModel
from pabc.runtime.listening import HeardCall
from pabc.runtime.timesteps import PendingReading, Reading, TimestepArguments, read
from pabc.runtime.trajectory import Trajectory
from pabc.schedule import Schedule

UNPLANNED = Schedule.none(range(64))
"""The schedule of calls that are computed in full: it has no timesteps, and reuses nothing."""
NO_TIMESTEP = 64
"""The steps within which an argument must have changed that may be a timestep."""
SUSPICIOUS = 3
"""The steps after which it is told that none has changed, as where each is a generation."""
MOST_STEPS = 1000
"""The most steps of a generation that is recorded."""


class Follower:
    """Listens to the calls of one model, and states the step of each: of a recorded generation, or
    of a plan. Each trajectory has generations of its own; one that was made with a schedule
    follows that."""

    def __init__(self, model: CompiledModel, planner: Planner) -> None:
        self._planner = planner
        self._known = model.timestep_arguments
        self._loops: dict[int, tuple[weakref.ref[Trajectory], _Loop | None]] = {}

    def begin(self, call: HeardCall) -> None:
        """States the step of a call."""
        loop = self._loop_of(call.trajectory)
        if loop is not None:
            loop.begin(call)

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        loop = self._loop_of(call.trajectory)
        if loop is not None:
            loop.end(call, result)

    def schedule(self) -> Schedule | None:
        """Returns the schedule of the plan that was made, or taken, last."""
        plan = self._planner.latest
        return None if plan is None else plan.schedule

    def end_generation(self, trajectory: Trajectory) -> None:
        """Plans what a trajectory that was reset has recorded."""
        known = self._loops.get(id(trajectory))
        if known is not None and known[0]() is trajectory and known[1] is not None:
            known[1].look(trajectory)

    def detach(self) -> None:
        """Gives the trajectories back: they follow the model's schedule."""
        for owner, loop in self._loops.values():
            trajectory = owner()
            if trajectory is not None and loop is not None:
                trajectory.schedule, trajectory.checks_steps = None, True
                trajectory.reset()
        self._loops.clear()

    def _loop_of(self, trajectory: Trajectory) -> _Loop | None:
        """Returns the loop of a trajectory; what those that are gone have recorded is planned."""
        known = self._loops.get(id(trajectory))
        if known is not None and known[0]() is trajectory:
            return known[1]
        for key, (owner, loop) in tuple(self._loops.items()):
            if owner() is None:
                self._loops.pop(key, None)
                if loop is not None:
                    loop.finish()
        is_given = trajectory.schedule is not None
        loop = None if is_given else _Loop(self._planner, self._known, trajectory)
        self._loops[id(trajectory)] = weakref.ref(trajectory), loop
        return loop


class _Loop:
    """The generations of one trajectory, one after the other.

    One follows a plan (`_plan` is there), or is recorded, or is computed in full without being
    recorded. The first steps of one that follows a plan are computed and heard (`_hearing` is there
    as well), so that, if it turns out to be another generation, it is recorded from its start.
    """

    def __init__(self, planner: Planner, known: TimestepArguments, trajectory: Trajectory) -> None:
        self._planner, self._known = planner, known
        self._read = ReadNumbers(known)
        self._resets, self._failures = trajectory.num_resets, trajectory.num_failures
        self._ended: AutoPlan | None = None
        self._forget()

    def _forget(self) -> None:
        """Begins a generation with the next call."""
        self._is_begun = False
        self._steps = Steps(self._read)
        self._hearing: Hearing | None = None
        self._plan: AutoPlan | None = None
        self._calls: list[PlannedCall] = []
        self._kind: Kind | None = None
        self._position = 0
        self._left = 0.0
        self._awaited: tuple[PendingReading, float] | None = None

    def begin(self, call: HeardCall) -> None:
        """States the step of a call."""
        trajectory = call.trajectory
        self.look(trajectory)
        trajectory.checks_steps = False
        if not self._is_begun:
            self._start(call)
        elif self._plan is not None:
            self._follow(call, self._plan)
        elif self._hearing is not None:
            self._record(call)
        else:
            self._compute(call)

    def look(self, trajectory: Trajectory) -> None:
        """Ends the generation if the trajectory was reset since: plans what was recorded of it,
        unless an exception ended it."""
        if trajectory.num_failures != self._failures:
            self._forget()
            self._ended = None
        elif trajectory.num_resets != self._resets:
            self.finish()
            self._ended = None
        self._resets, self._failures = trajectory.num_resets, trajectory.num_failures

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        if self._hearing is not None:
            step, name, order = self._calls[-1]
            self._steps.end(name, call.leaves, result)
            self._hearing.hear(step, name_call(name, order), call.leaves, call.structure, result)
        if self._plan is not None:
            self._position += 1
            if self._position == len(self._plan.calls):
                ended = self._plan
                self._forget()
                self._ended = ended

    def finish(self) -> None:
        """Ends the generation; plans what was recorded of it."""
        hearing, kind, left = self._hearing, self._kind, self._left
        if self._plan is None and hearing is not None and kind is not None and hearing.num_steps:
            timesteps, path = self._steps.timesteps, self._steps.path
            if path is not None and timesteps[:1] == timesteps[1:2]:
                self._planner.refuse(
                    "its first timestep came twice, with other latents: each of several "
                    "generations at a time needs a trajectory of its own, `with fast.trajectory():`"
                )
            else:
                whole = replace(kind, timesteps=timesteps)
                self._planner.learn(hearing, whole, self._calls, path, left=left, is_whole=False)
        self._forget()

    def _start(self, call: HeardCall) -> None:
        """Begins a generation, by a plan or as a recording."""
        ended, self._ended = self._ended, None
        if ended is not None and not self._is_first_of(ended, call):
            n = ended.schedule.num_steps
            self._planner.doubt(ended, f"expected a generation of {n} steps, found a longer one")
            self._begin_unplanned(call, ended)
            return
        self._is_begun = True
        self._kind = self._planner.kind(call.leaves, "", ())
        self._plan = self._find(call)
        if self._plan is not None:
            self._hearing = Hearing()
            call.trajectory.schedule = self._plan.schedule
            self._follow(call, self._plan)
        elif self._planner.has_given_up:
            self._begin_unplanned(call, None)
        else:
            self._kind = self._planner.begin_recording(self._kind)
            self._hearing = Hearing()
            call.trajectory.schedule = UNPLANNED
            self._record(call)

    def _find(self, call: HeardCall) -> AutoPlan | None:
        """Returns the plan for a generation whose first call this is."""
        numbers = self._read(call.structure, call.leaves)
        for number in (*dict.fromkeys(numbers.values()), 0.0):
            plan = self._planner.find(self._planner.kind(call.leaves, "", (number,)))
            if plan is not None and self._is_first_of(plan, call):
                return plan
        return None

    def _is_first_of(self, plan: AutoPlan, call: HeardCall) -> bool:
        """Returns whether a call may be the first one of generations like those of a plan."""
        return _name_of(call) == plan.calls[0].name and self._is_at(plan, 0, call)

    def _is_at(self, plan: AutoPlan, step: int, call: HeardCall) -> bool:
        reading = self._reading(plan, call)
        if reading is None:
            return plan.path is None
        known = reading if isinstance(reading, Reading) else reading()
        return known.is_close(plan.kind.timesteps[step])

    def _record(self, call: HeardCall) -> None:
        name = _name_of(call)
        if self._steps.begins_again(name, call.leaves, call.structure):
            self.finish()
            self._start(call)
            return
        stated = None if call.where is None else call.where.step
        found = self._steps.begin(name, call.leaves, call.structure, stated)
        if found.index == NO_TIMESTEP and self._steps.path is None:
            self._planner.refuse(
                f"no argument changes as a timestep does in {NO_TIMESTEP} steps; end each "
                "generation by fast.reset()"
            )
            self._begin_unplanned(call, None)
            return
        if found.index + 1 == SUSPICIOUS and self._steps.path is None:
            self._planner.explain(
                f"no argument has changed as a timestep does in {SUSPICIOUS} steps; end each "
                "generation by fast.reset()"
            )
        if found.index == MOST_STEPS:
            self._planner.refuse(f"a generation does not end within {MOST_STEPS} steps")
            self._begin_unplanned(call, None)
            return
        if not self._calls or self._calls[-1].step != found.index:
            call.trajectory.at_step(found.index % UNPLANNED.num_steps)
        self._calls.append(PlannedCall(found.index, name, found.order))

    def _follow(self, call: HeardCall, plan: AutoPlan) -> None:
        expected = plan.calls[self._position]
        reason = self._find_fault(call, plan, expected)
        if reason is not None:
            self._leave(call, plan, reason)
            return
        self._hear_opening(call, plan, expected)
        if self._position == 0 or plan.calls[self._position - 1].step != expected.step:
            call.trajectory.at_step(expected.step)

    def _hear_opening(self, call: HeardCall, plan: AutoPlan, expected: PlannedCall) -> None:
        """Notes a call of the first steps, as if the generation were recorded."""
        if self._hearing is None:
            return
        if expected.step >= opening(plan):
            self._hearing = None
            return
        stated = None if call.where is None else call.where.step
        self._steps.begin(expected.name, call.leaves, call.structure, stated)
        self._calls.append(expected)

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
        reading = self._reading(plan, call)
        if self._hearing is not None and reading is not None and not isinstance(reading, Reading):
            reading = reading()  # at the first steps, what follows from them is checked too
        if isinstance(reading, Reading):
            if not reading.is_close(timestep):
                return f"expected timestep {timestep:g} at step {expected.step}, found " + (
                    "several" if reading.number is None else f"{reading.number:g}"
                )
        elif reading is not None:
            self._awaited = reading, timestep
        return self._compare(call, plan, expected.step)

    def _compare(self, call: HeardCall, plan: AutoPlan, step: int) -> str | None:
        """Compares the latents of a step with what the sampler of the plan makes."""
        if self._hearing is None or self._hearing.num_steps != step:
            return None
        residual = find_difference(plan, self._hearing, step, call.leaves)
        if residual is None:
            return None
        self._left = residual
        return describe_difference(step, residual)

    def _reading(self, plan: AutoPlan, call: HeardCall) -> Reading | PendingReading | None:
        path = plan.path
        position = None if path is None else self._known.position(call.structure, path)
        return None if position is None else read(call.leaves[position])

    def _leave(self, call: HeardCall, plan: AutoPlan, reason: str) -> None:
        """Goes on by another plan, or records the generation, or begins another one."""
        if self._position and self._is_first_of(plan, call):
            self._forget()
            self._start(call)
            return
        hearing = self._hearing
        if hearing is None:
            self._planner.doubt(plan, reason)
            self._begin_unplanned(call, plan)
            return
        step = plan.calls[self._position].step
        for other in self._planner.others(plan):
            if self._may_follow(other, call, hearing):
                self._planner.take(other)
                self._plan, self._left = other, 0.0
                call.trajectory.switch(other.schedule)
                self._hear_opening(call, other, other.calls[self._position])
                call.trajectory.at_step(step)
                return
        assert self._kind is not None
        self._kind, self._plan = self._planner.record_rest(self._kind, reason), None
        call.trajectory.switch(UNPLANNED)
        self._record(call)

    def _may_follow(self, other: AutoPlan, call: HeardCall, hearing: Hearing) -> bool:
        """Returns whether the generation so far, and this call, are those of another plan."""
        past, position = tuple(self._calls), self._position
        if other.calls[:position] != past or position >= len(other.calls):
            return False
        expected = other.calls[position]
        is_next = expected.name == _name_of(call) and self._is_at(other, expected.step, call)
        is_early = opening(other) >= hearing.num_steps and other.path == self._known_path
        return is_next and is_early and explains(other, hearing, expected.step, call.leaves)

    @property
    def _known_path(self) -> str | None:
        return None if self._plan is None else self._plan.path

    def _begin_unplanned(self, call: HeardCall, plan: AutoPlan | None) -> None:
        """Computes the calls of a generation that neither follows a plan nor is recorded, until
        one is like the first one of `plan`; without it, for good."""
        self._forget()
        self._is_begun, self._ended = True, plan
        call.trajectory.schedule = UNPLANNED
        call.trajectory.at_step(0)

    def _compute(self, call: HeardCall) -> None:
        """Makes a call be computed that is no part of a plan or recording."""
        if self._ended is not None and self._is_first_of(self._ended, call):
            self._is_begun = False
            self._start(call)
            return
        call.trajectory.at_step(0)


def _name_of(call: HeardCall) -> str | None:
    return None if call.where is None else call.where.name
