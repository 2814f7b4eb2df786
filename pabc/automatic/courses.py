"""Makes the generations of a pipeline follow their plans."""

from __future__ import annotations

from typing import Any

from pabc.automatic.check import SamplerCheck
from pabc.automatic.fingerprint import describe_form
from pabc.automatic.planner import Planner, spell
from pabc.automatic.plans import AutoPlan, Kind, PlannedCall
from pabc.calibration.hearing import Hearing
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
    """Records a loop, or makes it follow the plan of loops like it."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._forget()

    def _forget(self) -> None:
        self._hearing: Hearing | None = None
        self._plan: AutoPlan | None = None
        self._check: SamplerCheck | None = None
        self._calls: list[PlannedCall] = []
        self._kind: Kind | None = None
        self._timesteps: tuple[float, ...] = ()

    def bind(self, timesteps: tuple[float, ...], call: HeardCall, sampler: str) -> Schedule:
        """Returns the schedule of a loop that begins with this call; records what has no plan."""
        self._forget()
        self._timesteps = timesteps
        self._kind = self._planner.kind(describe_form(call.leaves), sampler, timesteps)
        self._plan = self._planner.find(self._kind)
        if self._plan is not None:
            self._check = SamplerCheck(self._plan) if self._planner.checks_samplers else None
            return self._plan.follow(timesteps)
        if not self._planner.has_given_up:
            self._hearing = Hearing()
        return Schedule.none(timesteps)

    def begin(self, call: HeardCall, step: int) -> Schedule | None:
        """Compares the loop with the recorded one; returns what to follow where they differ."""
        plan = self._plan
        if self._check is None or plan is None:
            return None
        reason = self._check.begin(step, call.leaves)
        if reason is None:
            return None
        self._plan = self._planner.find_other(plan, self._check)
        if self._plan is not None:
            self._check = None
            return self._plan.follow(self._timesteps)
        self._planner.doubt(plan, reason)
        self._check = None
        return Schedule.none(self._timesteps)

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        if call.branch is None:
            return
        name, order = call.branch
        key = spell(name, order)
        if self._check is not None:
            self._check.end(call.step, key, call.leaves, call.structure, result)
        if self._hearing is not None:
            self._calls.append(PlannedCall(call.step, name, order))
            model = self._planner.models.index(call.model)
            self._hearing.hear(call.step, key, call.leaves, call.structure, result, model=model)

    def finish(self, *, is_complete: bool) -> None:
        """Plans what was recorded of a loop that reached its last step."""
        hearing, kind, calls = self._hearing, self._kind, self._calls
        self._forget()
        if is_complete and hearing is not None and kind is not None:
            self._planner.learn(hearing, kind, calls)
