"""One run of a sampler: places its calls at the steps of a plan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pabc.comfyui.calls import CallNames, HostCall
from pabc.comfyui.sigmas import Sigmas
from pabc.compiled import CompiledModel
from pabc.planning import Course
from pabc.runtime.listening import HeardCall
from pabc.runtime.stats import GIVEN
from pabc.schedule import Schedule

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What a run did, for people.

    Attributes:
        sigmas: the level at which each step begins.
        schedule: what it followed; None: no call was made.
        source: where a plan comes from that made itself; empty: it did not.
        calls: the calls of each step.
        skipped: those of them that were forecast.
        left: why the run was computed from some step on; None: it followed its plan to the end.
    """

    sigmas: Sequence[float]
    schedule: Schedule | None = None
    source: str = ""
    calls: Counter[int] = field(default_factory=Counter)
    skipped: Counter[int] = field(default_factory=Counter)
    left: str | None = None


class Run:
    """One run of a sampler, which is followed from its first call to its last.

    Its values are kept in a trajectory of its own, which nothing else reads, and are freed at its
    end. A call that no step explains ends that early: it and all later ones are computed.

    Attributes:
        is_followed: whether calls are placed at steps; else they are computed.
        report: what it did.
    """

    def __init__(self, model: CompiledModel, course: Course, sigmas: Sigmas, sampler: str) -> None:
        """`sampler`: a text that is another one for another sampler, or other settings."""
        self.is_followed = True
        self.report = Report(sigmas.steps)
        self._model, self._course = model, course
        self._sigmas, self._sampler = sigmas, sampler
        self._trajectory = model.trajectory()
        self._trajectory.checks_steps = False  # the host's levels are not what the model is given
        self._names = CallNames()
        self._step = -1
        self._orders: Counter[str] = Counter()
        self._level: tuple[torch.Tensor | None, float] = None, 0.0
        model.listen(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def call(self, call: HostCall, *args: Any, **kwargs: Any) -> Any:
        """Makes a call of the diffusion model, or skips it."""
        step = self._find_step(call)
        if not self.is_followed:
            return call(*args, **kwargs)
        if step != self._step:
            self._step = step
            self._orders.clear()
        name = self._names.name(call.options)
        order = self._orders[name]
        self._orders[name] += 1
        with self._trajectory, self._model.cache_context(name, repeat=order):
            return self._model(call, *args, **kwargs)

    def begin(self, call: HeardCall) -> None:
        """States the step of a call."""
        if call.trajectory is not self._trajectory:
            return
        report, trajectory = self.report, self._trajectory
        if report.schedule is None:
            report.schedule = self._course.bind(self._sigmas.steps, call, self._sampler)
            trajectory.schedule = report.schedule
        other = self._course.begin(call, self._step)
        if other is not None:
            report.schedule = other
            trajectory.switch(other)
        if not report.calls[self._step]:
            trajectory.at_step(self._step)
        report.calls[self._step] += 1

    def end(self, call: HeardCall, result: Any) -> None:
        """Notes what a call came to."""
        if call.trajectory is self._trajectory:
            self.report.skipped[call.step] += call.was_reused
            self._course.end(call, result)

    def finish(self) -> None:
        """Ends the run after its sampler has returned; makes a plan of what was recorded."""
        if self.report.schedule is None:
            logger.warning(
                "pabc: a run skipped nothing, since another node calls the diffusion model itself; "
                "put Accelerate (pabc) after that node"
            )
        self._close(is_complete=self._step + 1 == len(self._sigmas.steps))

    def abandon(self) -> None:
        """Ends the run where it is, and frees what it keeps."""
        self._close(is_complete=False)

    def leave(self, reason: str) -> None:
        """Computes all calls from here on."""
        if self.is_followed:
            self.report.left = reason
            logger.warning("pabc: the rest of this run is computed: %s", reason)
            self.abandon()

    def _find_step(self, call: HostCall) -> int:
        """Returns the step of a call; leaves the plan if there is none."""
        sigma = call.options["sigmas"]
        known, level = self._level
        if sigma is not known:  # one tensor for all calls of one evaluation; this waits for it
            level = float(sigma.flatten()[0])
            self._level = sigma, level
        step = self._sigmas.step_of(level)
        if self._step < 0 < step:
            self.leave(f"expected a first call at sigma {self._sigmas.steps[0]:g}, found {level:g}")
        elif step < self._step:
            self.leave(f"expected sigmas in the order of the list, found {level:g} again")
        return step

    def _close(self, *, is_complete: bool) -> None:
        if not self.is_followed:
            return
        self.is_followed = False
        self._model.unlisten(self)
        self._trajectory.reset()
        if self.report.schedule is not None:
            self._course.finish(is_complete=is_complete)
        source = self._model.stats.plan_source
        self.report.source = "" if source == GIVEN else source
