"""Finds the program that serves a call of a model that is not captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pabc.base.forward import inner_forward
from pabc.base.structure import Structure
from pabc.options import Options
from pabc.runtime.configuration import Configurations
from pabc.runtime.original import Original, OriginalProgram
from pabc.runtime.original_source import CallForm
from pabc.runtime.stats import Recorder
from pabc.runtime.timesteps import TimestepArguments
from pabc.runtime.whole_calls import check_kinds
from pabc.schedule import Schedule


class OriginalPrograms:
    """The programs of one model that is called as it is, by the form of the calls."""

    runs_hooks = True

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        recorder: Recorder,
        own_call: Callable[[], Callable[..., Any]],
        *,
        timesteps: TimestepArguments | None = None,
        reason: str = "",
    ) -> None:
        """`own_call` returns what a call of the model runs without pabc; `reason`: why the model
        is called as it is, if that was not asked for."""
        self.recorder = recorder
        self.timesteps = TimestepArguments() if timesteps is None else timesteps
        self._original = Original(
            model,
            own_call,
            lambda: inner_forward(model),
            options,
            self.timesteps,
            Configurations(model),
            reason,
        )
        self._programs: dict[CallForm, OriginalProgram] = {}
        self._unseen = OriginalProgram(self._original, None, ())

    def __len__(self) -> int:
        """Returns how many forms of calls were seen."""
        return len(self._programs)

    def items(self) -> list[tuple[CallForm | None, OriginalProgram]]:
        """Returns every program with the form of the calls that it serves; before any call, one
        for the plan alone."""
        return [*self._programs.items()] or [(None, self._unseen)]

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError for a schedule that reuses anything but whole calls."""
        check_kinds(schedule, self._original.reason)

    def find(self, structure: Structure, leaves: list[Any], *, at_start: bool) -> OriginalProgram:
        """Returns the program that serves a call.

        `at_start`: whether a generation starts, when all of the model's state is compared.
        """
        self._original.configurations.look(closely=at_start)
        form = CallForm.of(structure, leaves)
        program = self._programs.get(form)
        if program is None:
            program = self._programs[form] = OriginalProgram(self._original, form, leaves)
        return program

    def capture(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        structure: Structure,
        schedule: Schedule,
    ) -> OriginalProgram:
        """Never called: a program is found for every call."""
        raise AssertionError("every call of a model that is not captured has a program")
