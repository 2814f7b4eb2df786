"""Finds the program that serves a call; captures the model where none does."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from pabc import passes
from pabc.base.structure import Structure
from pabc.options import Options
from pabc.runtime.chain import BlockCode
from pabc.runtime.lifted_scalars import (
    CallKey,
    LiftedScalars,
    call_key,
    changed_numbers,
    superseded,
    without_sizes,
)
from pabc.runtime.program import Program
from pabc.runtime.state import Watch
from pabc.runtime.stats import Recorder
from pabc.runtime.timesteps import TimestepArguments
from pabc.schedule import Schedule
from pabc.sharding import shares_computed

logger = logging.getLogger(__name__)
MAX_STATES = 8
"""Python states of the model (hooks, flags, values) for which programs of one key are kept."""


class Programs:
    """The programs of one model, by the key of the calls that each one serves."""

    runs_hooks = False

    def __init__(self, model: nn.Module, options: Options, recorder: Recorder) -> None:
        self._model = model
        self.options = options
        self.recorder = recorder
        self._programs: dict[Any, list[Program]] = {}
        self._dynamic: dict[Any, list[Program]] = {}
        self.scalars = LiftedScalars()
        self.timesteps = TimestepArguments()
        self.code = BlockCode()
        self._last: tuple[CallKey, Program] | None = None
        self._watch: Watch | None = None
        self._has_logged_compiled = False

    def __len__(self) -> int:
        """Returns how many keys are served."""
        return len(self._programs)

    def items(self) -> list[tuple[CallKey, Program]]:
        """Returns every program with the key of the calls that it serves."""
        return [(key, program) for key, known in self._programs.items() for program in known]

    def add(self, key: CallKey, program: Program) -> None:
        """Adds a program that was captured elsewhere."""
        self._last = None
        self._keep(key, program)

    def check(self, schedule: Schedule) -> None:
        """Accepts every schedule: what a model does not have is computed."""

    def find(self, structure: Structure, leaves: list[Any], *, at_start: bool) -> Program | None:
        """Returns the program that serves a call, or None.

        `at_start`: whether a generation starts, when all of the model's state is compared.
        """
        if not at_start and self._last is not None:
            key, program = self._last
            if (
                key == call_key(structure, leaves, program.inputs.lifted)
                and program.keeps_up(self._model, at_start=False)
                and program.difference(leaves) is None
            ):
                return program
        return self._find(structure, leaves, at_start)[0]

    def capture(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        structure: Structure,
        schedule: Schedule,
    ) -> Program:
        """Captures the model for a call that no program serves, given bound and flattened.

        `schedule`: of the generation, from which the sharding of the model follows.
        """
        self._last = None
        differences = self._find(structure, leaves, at_start=False)[1]
        self._log_what_changed(call_key(structure, leaves, self.scalars.of(structure)))
        options = self.options
        if options.sharding is not None:
            weigh = partial(shares_computed, schedule)
            options = replace(options, sharding=replace(options.sharding, weigh=weigh))
        program = self._capture(args, kwargs, structure, leaves, options)
        self.recorder.add(captures=1)
        self._log_what_was_compiled(program)
        _warn_of_reads(differences)
        return program

    def _find(
        self, structure: Structure, leaves: list[Any], at_start: bool
    ) -> tuple[Program | None, list[tuple[passes.Read, Any]]]:
        """Returns the program; where there is none, the values read from data in which the call
        differs from the calls that programs of its key were captured for."""
        differences = []
        self._watching().look(closely=at_start)
        for lifted in dict.fromkeys((self.scalars.of(structure), frozenset[int]())):
            key = call_key(structure, leaves, lifted)
            known = self._fitting(self._programs.get(key, []), at_start)
            others = self._dynamic and self._dynamic.get(without_sizes(key), [])
            others = [p for p in self._fitting(others or [], at_start) if p.inputs.serve(leaves)]
            for program in (*known, *others):
                difference = program.difference(leaves)
                if difference is None:
                    self._last = key, program
                    return program, []
                differences.append(difference)
        return None, differences

    def _fitting(self, programs: list[Program], at_start: bool) -> list[Program]:
        """Returns the programs for the Python state that the model is in, and drops those of them
        whose tensors no longer fit. Programs of other states stay: a hook or a flag may be set for
        one call, and reset after it."""
        fitting = [p for p in programs if p.state_difference(self._model) is None]
        stale = [p for p in fitting if not p.keeps_up(self._model, at_start)]
        programs[:] = [p for p in programs if p not in stale]
        return [p for p in fitting if p not in stale]

    def _log_what_was_compiled(self, program: Program) -> None:
        """Logs, once, which parts of the model were under torch.compile, whose code is not used."""
        parts = program.guarded.captured.compiled
        if not parts or self._has_logged_compiled:
            return
        self._has_logged_compiled = True
        others = f", and {len(parts) - 1} more" if len(parts) > 1 else ""
        logger.warning(
            "what torch.compile made of %s%s is not used: a graph runs in its place, which pabc "
            "compiles itself (backend='inductor')",
            parts[0],
            others,
        )

    def _log_what_changed(self, key: CallKey) -> None:
        """Logs in what the model's state differs from that of an earlier call of this key."""
        known = self._programs.get(key, [])
        reason = known[-1].state_difference(self._model) if known else None
        if reason is not None:
            hint = "; if forward does not read it, keep it outside of the model"
            logger.warning("recaptured: %s%s", reason, hint if len(known) > 1 else "")

    def _keep(self, key: CallKey, program: Program) -> None:
        """Adds a program. Of those for other states of the model, drops the oldest beyond
        `MAX_STATES`, and those whose tensors the model no longer has."""
        program.share(self._watching())
        known = self._programs.setdefault(key, [])
        parked = [p for p in known if p.state_difference(self._model) is not None]
        dropped = [p for p in parked if not p.has_its_tensors(self._model)]
        dropped += [p for p in parked if p not in dropped][: -MAX_STATES + 1]
        known[:] = [p for p in known if p not in dropped]
        known.append(program)

    def _watching(self) -> Watch:
        if self._watch is None:
            self._watch = Watch(self._model)
        return self._watch

    def _build(self, args: Any, kwargs: Any, lifted: Collection[int], options: Options) -> Program:
        """Returns a program; with dynamic shapes where they are asked for and can be had."""

        def build(options: Options) -> Program:
            return Program.capture(
                self._model,
                args,
                kwargs,
                options=options,
                lifted=lifted,
                recorder=self.recorder,
                code=self.code,
            )

        try:
            return build(options)
        except ValueError as error:
            if not options.dynamic:
                raise
            program = build(replace(options, dynamic=False))
            warnings.warn(
                f"pabc: dynamic=True: captured for the shapes of this call alone, since {error}",
                stacklevel=2,
            )
            return program

    def _capture(
        self,
        args: Any,
        kwargs: Any,
        structure: Structure,
        leaves: list[Any],
        options: Options,
    ) -> Program:
        def build(lifted: Collection[int]) -> Program:
            return self._build(args, kwargs, lifted, options)

        key = call_key(structure, leaves, ())
        changed = changed_numbers(self._programs, key, leaves)
        found = self.scalars.capture(build, self._model, structure, leaves, changed)
        program, lifted = found or (build(()), frozenset())
        key = call_key(structure, leaves, lifted)
        for old in superseded(self._programs, key, lifted):
            del self._programs[old]
        self._keep(key, program)
        if program.inputs.serve(leaves):
            self._dynamic.setdefault(without_sizes(key), []).append(program)
        if names := [program.signature.inputs[i] for i in changed if i not in lifted]:
            warnings.warn(
                f"pabc recaptured the model because the number passed as {names} changed; "
                "pass a tensor where a value changes from call to call",
                stacklevel=5,
            )
        return program


def _warn_of_reads(differences: Sequence[tuple[passes.Read, Any]]) -> None:
    """Warns, from the third capture of one key on, of the value that keeps changing."""
    if len(differences) > 1:
        read, value = differences[-1]
        warnings.warn(
            f"pabc recaptured the model because it reads a value from data that changed: {read} "
            f"when captured, {value} now; capture number {len(differences) + 1} of this signature",
            stacklevel=5,
        )
