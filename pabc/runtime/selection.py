"""Selects the program that serves a call; captures the model, or calls it as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pabc.base.forward import inner_forward
from pabc.base.structure import Structure
from pabc.internals.dynamo import compile_lock
from pabc.options import Options
from pabc.runtime.arguments import Arguments
from pabc.runtime.originals import OriginalPrograms
from pabc.runtime.programs import Programs
from pabc.runtime.serving import ServingProgram, ServingPrograms
from pabc.runtime.stats import Recorder
from pabc.runtime.timesteps import TimestepArguments
from pabc.runtime.whole_calls import advise, find_obstacle, names_only_calls
from pabc.schedule import Schedule

logger = logging.getLogger(__name__)


class Selection:
    """The programs of one model, and how its calls come to them.

    Not thread-safe, but for :meth:`flatten` and `arguments`.

    Attributes:
        programs: what serves the calls; replaced where the model turns out not to be captured.
        options: with which they are made.
        falls_back: whether a model that cannot be captured is called as it is, where the schedule
            reuses nothing but whole calls.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        own_call: Callable[[], Callable[..., Any]],
        programs: ServingPrograms | None = None,
        *,
        falls_back: bool = False,
    ) -> None:
        """`own_call` returns what a call of the model runs without pabc."""
        self.options, self.falls_back = options, falls_back
        self._expects_skips = False
        self._model, self._own_call = model, own_call
        self._forwards: tuple[Any, ...] = ()
        self._arguments = self.arguments
        if programs is not None:
            self.programs = programs
        elif options.backend == "original":
            self.programs = self._call_as_is(Recorder(), TimestepArguments())
        else:
            self.programs = Programs(model, options, Recorder())

    def expect_skips(self) -> None:
        """Makes a model that no graph can stand for, skipped as a whole, be called as it is."""
        self.falls_back = self._expects_skips = True

    def flatten(self, args: Any, kwargs: Any) -> tuple[list[Any], Structure]:
        """Flattens the arguments. Raises RuntimeError in training mode, or for requires_grad."""
        if self._model.training:
            raise RuntimeError(
                "pabc runs inference: expected a model in eval mode, found training mode; "
                "call .eval() on it first"
            )
        arguments = self.arguments
        leaves, structure = arguments.flatten(args, kwargs)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise RuntimeError(
                    "pabc runs inference: expected inputs without gradients, found one of shape "
                    f"{tuple(leaf.shape)} that requires grad; detach it"
                )
        return leaves, structure

    def select(
        self,
        args: Any,
        kwargs: Any,
        leaves: list[Any],
        structure: Structure,
        schedule: Schedule,
        *,
        at_start: bool,
    ) -> ServingProgram:
        """Returns the program that serves these arguments; captures the model if there is none."""
        program = self.programs.find(structure, leaves, at_start=at_start)
        if program is None:
            arguments = self.arguments
            bound = arguments.bind(args, kwargs)
            try:
                program = self.programs.capture(*bound, leaves, structure, schedule)
            except ValueError as error:
                arguments.check(args, kwargs)
                if not self._fall_back(schedule, f"it cannot be captured: {error}"):
                    advised = advise(error, schedule)
                    if advised is None:
                        raise
                    raise advised from error
            else:
                skips = self._expects_skips or schedule.reuses
                reason = find_obstacle(program.slots, program.left_out) if skips else None
                if reason is None or not self._fall_back(schedule, reason):
                    return program
            program = self.programs.find(structure, leaves, at_start=at_start)
            assert program is not None
        return program

    def _fall_back(self, schedule: Schedule, reason: str) -> bool:
        """Makes the model be called as it is from now on; returns False if that is not asked for,
        or the schedule needs what is within the model."""
        if not (self.falls_back and names_only_calls(schedule)):
            return False
        options = self.options.without_capture()
        if options is None:
            return False
        name = type(self._model).__name__
        logger.warning("%s is called as it is (backend='original'): %s", name, reason)
        self.options = options
        old = self.programs
        self.programs = self._call_as_is(old.recorder, old.timesteps, reason)
        return True

    def _call_as_is(
        self, recorder: Recorder, timesteps: TimestepArguments, reason: str = ""
    ) -> OriginalPrograms:
        """Returns what calls the model as it is; `reason`: why, if that was not asked for."""
        return OriginalPrograms(
            self._model, self.options, recorder, self._own_call, timesteps=timesteps, reason=reason
        )

    @property
    def arguments(self) -> Arguments:
        """The arguments of the model's forward, as it is now."""
        if self._find_forwards() != self._forwards:
            with compile_lock():  # in another thread, a capture may have one of its own there
                forwards = self._find_forwards()
                if forwards != self._forwards:
                    self._arguments = Arguments.of(inner_forward(self._model))
                    self._forwards = forwards
        return self._arguments

    def _find_forwards(self) -> tuple[Any, ...]:
        """Returns the forward of the model's class, and what may be in its place."""
        model: Any = self._model
        state = vars(model)
        return type(model).forward, state.get("forward"), state.get("_old_forward")
