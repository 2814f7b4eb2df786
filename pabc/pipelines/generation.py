"""Follows one run of a pipeline's denoising loop through its scheduler."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pabc.compiled import CompiledModel
from pabc.pipelines.scheduler import describe, index_of
from pabc.planning import Course
from pabc.runtime.guards import GuardError
from pabc.runtime.listening import HeardCall
from pabc.schedule import Schedule
from pabc.validate import as_timesteps

MAX_CALLS = 64
"""Calls of one model in one step, each a branch of its own, above which the loop must be one that
does not use the pipeline's scheduler."""


class Generation:
    """One run of a denoising loop: binds the schedule when it begins, and counts its steps.

    A step ends where the scheduler's `step` is called, so a second-order scheduler, whose
    `timesteps` lists one per model call, has a step per model call. Each model that takes part
    begins at the first step in which it is called, where it computes everything, and is done when
    a step passes without it: the experts of one pipeline hold what they keep one after the other.

    The models' state is that of the trajectories that are current where the calls are made.

    Attributes:
        schedule: what the loop under way follows; None: the model was not called yet.
        step: the step under way, of those that run.
    """

    schedule: Schedule | None
    step: int
    _start: int
    _followed: Any
    _timesteps: Any
    _first: Any
    _calls: Counter[CompiledModel]
    _copy_stepped: bool
    _latest: HeardCall | None

    def __init__(
        self,
        course: Course,
        scheduler: Callable[[], Any],
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        """`course`: what its loops follow; `announce` is called when a loop is about to begin."""
        self._course = course
        self._scheduler = scheduler
        self._announce = announce
        self._begun: dict[CompiledModel, int] = {}
        """The models that take part -> the first step of each."""
        self._clear()

    def timesteps_set(self) -> None:
        """Ends the loop before; a new one is about to begin."""
        self.end()
        self._announce()

    def input_scaled(self, timestep: Any) -> None:
        """Notes the timestep at which the loop begins, if the scheduler does not tell."""
        if self._first is None:
            self._first = timestep

    def stepped(self, timestep: Any) -> None:
        """Ends the step; the next one begins."""
        if self.schedule is None:
            return
        found = index_of(timestep, self._timesteps, self._start + self.step)
        if found is not None and self.step == 0 and found != self._start:
            self._begin_later(found)
        self.step = self.step + 1 if found is None else max(found + 1 - self._start, 0)
        self._num_steps += 1
        is_last = self.step >= self.schedule.num_steps
        done = [m for m in self._begun if is_last or (self._calls and not self._calls[m])]
        for model in done:
            self._check_part(model, self.step if self._calls[model] else self.step - 1)
        self._free(done.__contains__)
        self._calls.clear()

    def copy_stepped(self) -> None:
        """Notes that a copy of the scheduler made a step."""
        self._copy_stepped = True

    def begin_call(self, call: HeardCall) -> None:
        """Puts the trajectory of a call at the step that is under way."""
        model: CompiledModel = call.model
        self._latest = call
        if self.schedule is None or self._scheduler() is not self._followed:
            self._begin()
        other = self._course.begin(call, self.step)
        if other is not None:
            self._switch(other)
        if model not in self._begun:
            model.current.reset()
            model.current.schedule = computing_until(self._schedule_begun(), self.step)
            self._begun[model] = self.step
        if not self._calls[model]:
            model.current.at_step(self.step)
            self._copy_stepped = self._copy_stepped and bool(self._calls)
        self._calls[model] += 1
        self._num_calls += 1
        self._check_is_followed(model)

    def end_call(self, call: HeardCall, result: Any) -> None:
        """Passes on what a call came to."""
        self._course.end(call, result)

    def abandon(self) -> None:
        """Frees what is kept."""
        is_under_way = self.schedule is not None
        self._free()
        self._clear()
        if is_under_way:
            self._course.finish(is_complete=False)

    def end(self) -> None:
        """Frees what is kept; says so if the loop never used its scheduler."""
        calls, steps = self._num_calls, self._num_steps
        if self.schedule is not None:
            is_complete = self.step >= self.schedule.num_steps
            self._free()
            self._clear()
            self._course.finish(is_complete=is_complete)
        if calls > 1 and not steps:
            warnings.warn(
                f"pabc: the model was called {calls} times and its pipeline's scheduler made no "
                "step, so that nothing could be reused; compile the model with pabc.compile and "
                "give the steps with trajectory.at_step",
                stacklevel=2,
            )

    def _clear(self) -> None:
        self.schedule = None
        self.step = self._start = 0
        self._followed = self._timesteps = self._first = None
        self._calls = Counter()
        self._num_calls = self._num_steps = 0
        self._copy_stepped = False
        self._latest = None

    def _free(self, is_done: Callable[[CompiledModel], bool] = lambda _: True) -> None:
        """Ends the part of the models that are done."""
        for model in filter(is_done, tuple(self._begun)):
            del self._begun[model]
            model.current.reset()

    def _check_part(self, model: CompiledModel, end: int) -> None:
        """Warns where the schedule lets a model reuse nothing in its steps, which end before `end`,
        though it asks for reuse in others."""
        schedule, first = self.schedule, self._begun[model]
        if schedule is None or not schedule.reuses or end - first in (0, schedule.num_steps):
            return
        masks = [*schedule.masks.values(), *(override.mask for override in schedule.overrides)]
        if not any(any(mask[first + 1 : end]) for mask in masks):
            model.warn_once(
                schedule,
                f"pabc: the {type(model._orig_mod).__name__} that ran the steps from {first} to "
                f"{end - 1} of {schedule.num_steps} could reuse nothing: the schedule reuses "
                "nothing in these; give one whose windows reach each model's steps",
            )

    def _begin(self) -> None:
        """Binds the schedule to the timesteps that will run: those from the first one on."""
        scheduler = self._followed = self._scheduler()
        self._free()
        self._calls.clear()
        self.step = 0
        self._timesteps = getattr(scheduler, "timesteps", None)
        if self._timesteps is None or not len(self._timesteps):
            raise GuardError(
                f"expected a loop over the timesteps of the pipeline's {type(scheduler).__name__}, "
                "found none: set_timesteps was not called"
            )
        start = getattr(scheduler, "begin_index", None)
        if start is None and self._first is not None:
            start = index_of(self._first, self._timesteps, 0)
        self._start = start or 0
        self.schedule = self._bind(as_timesteps(self._timesteps)[self._start :])

    def _bind(self, timesteps: tuple[float, ...]) -> Schedule:
        assert self._latest is not None
        return self._course.bind(timesteps, self._latest, describe(self._followed))

    def _switch(self, schedule: Schedule) -> None:
        """Follows another schedule from here on."""
        self.schedule = schedule
        for model in self._begun:
            model.current.switch(schedule)

    def _begin_later(self, start: int) -> None:
        """Binds the schedule to the timesteps from `start` on, where the loop really began."""
        self._free()
        self._start = start
        self.schedule = self._bind(as_timesteps(self._timesteps)[start:])

    def _schedule_begun(self) -> Schedule:
        assert self.schedule is not None
        if self.step >= self.schedule.num_steps:
            raise GuardError(
                f"expected {self.schedule.num_steps} steps, as many as the scheduler has "
                f"timesteps to run, found a call after step {self.schedule.num_steps - 1}"
            )
        return self.schedule

    def _check_is_followed(self, model: CompiledModel) -> None:
        calls = self._calls[model]
        if calls > 1 and self._copy_stepped:
            found = "a step of a copy of it"
        elif calls > MAX_CALLS:
            found = f"{calls} calls of the model"
        else:
            return
        raise GuardError(
            f"expected steps of the pipeline's scheduler between calls, found {found} in one step; "
            "compile the model with pabc.compile and give the steps with trajectory.at_step"
        )


def computing_until(schedule: Schedule, step: int) -> Schedule:
    """Returns the schedule of a model whose first call is at `step`, which reuses nothing."""
    if step == 0:
        return schedule

    def cut(mask: tuple[bool, ...]) -> tuple[bool, ...]:
        return (False,) * (step + 1) + mask[step + 1 :]

    masks = {kind: cut(mask) for kind, mask in schedule.masks.items()}
    overrides = tuple(replace(o, mask=cut(o.mask)) for o in schedule.overrides)
    return replace(schedule, masks=masks, overrides=overrides)
