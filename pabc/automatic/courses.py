"""Makes the generations of a pipeline follow their plans."""

from __future__ import annotations

from typing import Any

from pabc.automatic.check import describe_difference, explains, find_difference, opening
from pabc.automatic.planner import Planner
from pabc.automatic.plans import AutoPlan, Kind, PlannedCall
from pabc.calibration.hearing import Hearing, name_call
from pabc.runtime.listening import HeardCall
from pabc.schedule import Schedule


class PipelineCourses:
    """Makes what the generations of one pipeline follow."""

    needs_capture = False

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def course(self) -> AutoCourse:
        """Returns what a generation follows that is about to begin."""
        return AutoCourse(self._planner)


class AutoCourse:
    """Records a loop, or makes it follow the plan of loops like it.

    The first steps of one that follows a plan are computed and heard, so that, if its sampler turns
    out to be another one, it is recorded from its start.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._forget()

    def _forget(self) -> None:
        self._hearing: Hearing | None = None
        self._plan: AutoPlan | None = None
        self._calls: list[PlannedCall] = []
        self._kind: Kind | None = None
        self._left = 0.0
        self._step = 0

    def bind(self, timesteps: tuple[float, ...], call: HeardCall, sampler: str) -> Schedule:
        """Returns the schedule of a loop that begins with this call; records what has no plan."""
        self._forget()
        self._kind = self._planner.kind(call.leaves, sampler, timesteps)
        self._plan = self._planner.find(self._kind, len(timesteps))
        if self._plan is not None or not self._planner.has_given_up:
            self._hearing = Hearing()
            if self._plan is None:
                self._kind = self._planner.begin_recording(self._kind)
        return Schedule.none(timesteps) if self._plan is None else self._plan.follow(timesteps)

    def begin(self, call: HeardCall, step: int) -> Schedule | None:
        """Compares the loop with the recorded one; returns what to follow where they differ."""
        plan, hearing, kind = self._plan, self._hearing, self._kind
        if plan is None or hearing is None or kind is None or step <= self._step:
            return None
        self._step = step
        residual = find_difference(plan, hearing, step, call.leaves)
        if residual is None:
            if step >= opening(plan):
                self._hearing = None
            return None
        for other in self._planner.others(plan):
            is_early = other.suits(kind) and opening(other) >= step
            if is_early and explains(other, hearing, step, call.leaves):
                self._planner.take(other)
                self._plan = other
                if step >= opening(other):
                    self._hearing = None
                return other.follow(kind.timesteps)
        self._kind = self._planner.record_rest(kind, describe_difference(step, residual))
        self._plan, self._left = None, residual
        return Schedule.none(kind.timesteps)

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        if call.branch is None or self._hearing is None:
            return
        name, order = call.branch
        self._calls.append(PlannedCall(call.step, name, order))
        model = self._planner.models.index(call.model)
        key = name_call(name, order)
        self._hearing.hear(call.step, key, call.leaves, call.structure, result, model=model)

    def finish(self, *, is_complete: bool) -> None:
        """Plans what was recorded of a loop that reached its last step."""
        hearing, kind, calls, plan = self._hearing, self._kind, self._calls, self._plan
        left = self._left
        self._forget()
        if is_complete and plan is None and hearing is not None and kind is not None:
            self._planner.learn(hearing, kind, calls, left=left)
