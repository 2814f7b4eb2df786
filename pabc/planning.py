"""Interfaces of what is given in the place of a schedule, and makes schedules itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from pabc.compiled import CompiledModel
from pabc.runtime.listening import HeardCall
from pabc.schedule import Schedule


class Course(Protocol):
    """Gives the schedules of one run of a pipeline's denoising loop, or of several in turn."""

    def bind(self, timesteps: tuple[float, ...], call: HeardCall, sampler: str) -> Schedule:
        """Returns the schedule of a loop that begins with this call.

        `sampler`: a text that is another one for a scheduler of another class or other settings.
        """

    def begin(self, call: HeardCall, step: int) -> Schedule | None:
        """Is told of a call at a step; returns what to follow from here on, None: as before."""

    def end(self, call: HeardCall, result: Any) -> None:
        """Is told of a call that ran to its end."""

    def finish(self, *, is_complete: bool) -> None:
        """Is told that the loop is over: at its last step, or before."""


class PipelinePlans(Protocol):
    """Makes the courses of a pipeline's generations."""

    @property
    def needs_capture(self) -> bool:
        """True if what the generations follow needs what is within the models."""

    def course(self) -> Course:
        """Returns what a generation follows that is about to begin."""


class SelfPlanning(ABC):
    """Takes the place of a schedule, and makes schedules from the calls that it hears."""

    @abstractmethod
    def attach(self, model: CompiledModel) -> None:
        """Plans the generations of a model from now on."""

    @abstractmethod
    def plans_for(self, models: Mapping[str, CompiledModel]) -> PipelinePlans:
        """Returns what plans the generations of a pipeline with these models."""
