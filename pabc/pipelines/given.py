"""Schedules that a pipeline's user gives: one, a preset's name, or what makes one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pabc import presets
from pabc.pipelines.scheduler import are_same
from pabc.runtime.guards import GuardError
from pabc.runtime.listening import HeardCall
from pabc.runtime.whole_calls import names_only_calls
from pabc.schedule import Schedule

USUAL_TIMESTEPS = tuple(float(timestep) for timestep in range(980, -1, -20))
"""Those of 50 steps."""
ScheduleSource = Schedule | str | Callable[[tuple[float, ...]], Schedule]
"""A schedule, a preset's name, or what makes a schedule from the timesteps that will run."""


class GivenPlans:
    """Makes each generation follow the schedule that is given for its timesteps."""

    def __init__(self, source: ScheduleSource) -> None:
        """Raises TypeError for what gives no schedules."""
        self._make = presets.get(source) if isinstance(source, str) else source
        if not isinstance(self._make, Schedule) and not callable(self._make):
            raise TypeError(
                "schedule: expected a pabc.Schedule, a preset or its name, pabc.auto(), or what "
                f"makes a schedule from timesteps, found {type(source).__name__}"
            )
        self._is_preset = isinstance(source, str)

    @cached_property
    def needs_capture(self) -> bool:
        """True if a schedule, for usual timesteps, needs what is within the model.

        False for a function that makes none of these timesteps: it is looked at when it is called.
        """
        if self._is_preset:
            return True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # windows without one of these timesteps
                schedule = self._schedule(USUAL_TIMESTEPS)
            return not (schedule.reuses and names_only_calls(schedule))
        except Exception:  # whatever the user's function raises
            return False

    def course(self) -> GivenCourse:
        """Returns what a generation follows."""
        return GivenCourse(self.bind)

    def bind(self, timesteps: tuple[float, ...]) -> Schedule:
        """Returns the schedule of a loop over these timesteps. Raises TypeError, GuardError."""
        schedule = self._schedule(timesteps)
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule: expected what gives a pabc.Schedule, found {type(schedule).__name__}"
            )
        if not are_same(timesteps, schedule.timesteps):
            raise GuardError(
                f"expected the schedule's timesteps, {_format(schedule.timesteps)}, found that the "
                f"scheduler runs {_format(timesteps)}; give what makes a schedule from them, such "
                "as `lambda ts: pabc.Schedule.pyramid(ts, ...)`"
            )
        return replace(schedule, timesteps=timesteps)

    def _schedule(self, timesteps: tuple[float, ...]) -> Schedule:
        return self._make if isinstance(self._make, Schedule) else self._make(timesteps)


@dataclass(frozen=True)
class GivenCourse:
    """Follows one schedule from the first step of a loop to its last.

    Attributes:
        make: returns the schedule for the timesteps of the loop.
    """

    make: Callable[[tuple[float, ...]], Schedule]

    def bind(self, timesteps: tuple[float, ...], call: HeardCall, sampler: str) -> Schedule:
        """Returns the schedule of a loop that begins."""
        return self.make(timesteps)

    def begin(self, call: HeardCall, step: int) -> None:
        """Goes on as before."""

    def end(self, call: HeardCall, result: Any) -> None:
        """Does nothing."""

    def finish(self, *, is_complete: bool) -> None:
        """Does nothing."""


def _format(timesteps: tuple[float, ...]) -> str:
    shown = [f"{t:g}" for t in timesteps]
    middle = shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-5:]]
    return f"{len(shown)} of them: {', '.join(middle)}"
