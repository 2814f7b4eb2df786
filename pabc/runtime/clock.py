"""Tells from the timesteps that calls bring which step of the schedule each one is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from pabc.base.structure import Structure
from pabc.runtime.guards import MAKE_SCHEDULE, GuardError
from pabc.runtime.timesteps import (
    FORWARD,
    SPELLINGS,
    ArgPath,
    PendingReading,
    Reader,
    Reading,
    TimestepArgument,
    TimestepArguments,
    read,
)

_MAX_WAITS = 2
"""Calls of a model that wait for a timestep on a device: the first ones, which compile anyway."""


class CandidateStep(NamedTuple):
    """A step that a call may be.

    Attributes:
        is_new: whether the call begins a generation with it.
        at: the index of the step.
    """

    is_new: bool
    at: int


class Verdict(NamedTuple):
    """The step that a call is (None: unscheduled), and whether that is sure enough to reuse."""

    step: CandidateStep | None
    may_reuse: bool = True


class Expected(NamedTuple):
    """The facts known of a call before its timestep is read.

    Attributes:
        timesteps: those of the schedule.
        steps: the steps that it may be, the one by counting first.
        verdict: that it is the first of `steps`.
        may_be_unscheduled: whether it may be a call before, between or beside generations.
        is_stated: whether the caller stated which step it is.
    """

    timesteps: tuple[float, ...]
    steps: tuple[CandidateStep, ...]
    verdict: Verdict
    may_be_unscheduled: bool = False
    is_stated: bool = False


class _Quick(NamedTuple):
    """The argument that was the timestep in the call before, and its value at each step."""

    structure: Structure
    timesteps: tuple[float, ...]
    path: ArgPath
    position: int
    spelled: tuple[float, ...]


class Clock:
    """Tells which step each call is from the timesteps among its arguments.

    Which argument is the timestep is not known at first. An argument counts as the timestep if, in
    one of the usual spellings, it equals that of the expected step and changes with the schedule.
    From the second distinct timestep on, its path in the call is remembered for all generations of
    the model. Until then calls are counted, and if no argument is found, nothing is checked.
    A timestep on another device than the CPU is copied without waiting and read one call later.
    A schedule for `range(n)` names no timesteps.
    """

    def __init__(self, known: TimestepArguments, *, remembers: bool = True) -> None:
        self._known_arguments = known
        self._remembers = remembers
        self._reader = Reader(known)
        self._quick: _Quick | None = None
        self._named: tuple[tuple[float, ...], bool] = (), False
        self.restart()

    @property
    def is_waiting(self) -> bool:
        """True if the timestep of the last call has not arrived from its device yet."""
        return self._pending is not None

    def restart(self) -> None:
        """Forgets the calls so far, but not which arguments are timesteps."""
        self._followed: tuple[TimestepArgument, ...] = ()
        self._is_sure = False
        self._num_judged = 0
        self._earlier: dict[ArgPath, Reading] | None = None
        self._earlier_step: int | None = None
        self._timesteps: tuple[float, ...] = ()
        self._outside: frozenset[int] = frozenset()
        self._may_reuse = True
        self._pending: tuple[Expected, dict[ArgPath, Reading | PendingReading]] | None = None

    def follow(self, other: Clock) -> None:
        """Takes over which arguments another clock follows.

        `other`: the clock of the last call of this generation, whose step was stated.
        """
        other.settle(has_reused=False)
        if other._earlier is None or (self._followed and not other._followed):
            return
        self._timesteps, self._followed = other._timesteps, other._followed
        self._is_sure, self._outside = other._is_sure, frozenset()
        self._earlier, self._earlier_step = other._earlier, other._earlier_step

    def ask(
        self,
        expected: Expected,
        structure: Structure,
        leaves: Sequence[Any],
        where: Mapping[str, Any],
    ) -> Verdict:
        """Returns which step a call is; the expected one, while its timestep is not available.

        `where`: what the caller stated beside the call, by name. Raises GuardError for a timestep
        that contradicts the schedule.
        """
        timesteps, quick = expected.timesteps, self._quick
        if (
            quick is not None
            and quick.structure is structure
            and quick.timesteps is timesteps
            and not where
        ):
            reading = read(leaves[quick.position])
            if not isinstance(reading, Reading):
                self._pending = expected, {quick.path: reading}
                return Verdict(expected.steps[0], self._may_reuse)
            if reading.is_close(quick.spelled[expected.steps[0].at]):
                self._outside, self._may_reuse = frozenset(), True
                return expected.verdict
        if not self._names(timesteps):
            return expected.verdict
        arguments = self._timestep_arguments(timesteps)
        readings = self._reader.read_at(structure, leaves, where, arguments) if arguments else {}
        if not readings and self._looks():
            readings = self._reader.read(structure, leaves, where)
        values = self._available(readings)
        if values is not None:
            verdict = self._judge(expected, values)
            if arguments and verdict.step is not None:
                self._quick = self._find_quick(structure, timesteps)
            return verdict
        self._pending = expected, readings
        self._quick = self._find_quick(structure, timesteps)
        return Verdict(expected.steps[0], self._may_reuse)

    def settle(self, has_reused: bool) -> Verdict | None:
        """Returns which step the call before was, if its timestep was not available then.

        Raises GuardError if it was another step than expected and reused something.
        """
        if self._pending is None:
            return None
        (expected, readings), self._pending = self._pending, None
        values = {p: r if isinstance(r, Reading) else r() for p, r in readings.items()}
        verdict = self._judge(expected, values)
        if has_reused and verdict.step != expected.steps[0]:
            arguments = self._timestep_arguments(expected.timesteps) or self._followed
            self._fail(
                expected,
                next(a for a in arguments if a.path in values),
                values,
            )
        return verdict

    def _find_quick(self, structure: Structure, timesteps: tuple[float, ...]) -> _Quick | None:
        for path, spelling in self._timestep_arguments(timesteps):
            position = self._known_arguments.position(structure, path)
            if position is not None:
                spelled = tuple(map(SPELLINGS[spelling], timesteps))
                return _Quick(structure, timesteps, path, position, spelled)
        return None

    def _names(self, timesteps: tuple[float, ...]) -> bool:
        """Returns whether a schedule names its timesteps."""
        known, found = self._named
        if timesteps is not known:
            found = timesteps != tuple(range(len(timesteps)))
            self._named = timesteps, found
        return found

    def _looks(self) -> bool:
        """Returns whether an argument may still turn out to be the timestep; where steps are
        stated, at the first two calls alone."""
        if self._remembers:
            return True
        return not self._is_sure and (self._num_judged < 2 or bool(self._followed))

    def _timestep_arguments(self, timesteps: tuple[float, ...]) -> tuple[TimestepArgument, ...]:
        if self._remembers:
            return self._known_arguments.get(timesteps)
        return self._followed if self._is_sure else ()

    def _available(
        self, readings: Mapping[ArgPath, Reading | PendingReading]
    ) -> dict[ArgPath, Reading] | None:
        values = {path: r for path, r in readings.items() if isinstance(r, Reading)}
        if len(values) == len(readings):
            return values
        if not self._remembers or self._known_arguments.num_waits >= _MAX_WAITS:
            return None
        self._known_arguments.num_waits += 1
        return {path: r if isinstance(r, Reading) else r() for path, r in readings.items()}

    def _judge(self, expected: Expected, values: dict[ArgPath, Reading]) -> Verdict:
        self._num_judged += 1
        if expected.timesteps is not self._timesteps and expected.timesteps != self._timesteps:
            self._followed, self._earlier_step = (), None
            self._is_sure, self._outside = False, frozenset()
        self._timesteps = expected.timesteps
        if not values:
            return expected.verdict
        arguments = self._timestep_arguments(expected.timesteps)
        here = [argument for argument in arguments if argument.path in values]
        readable = [argument for argument in here if values[argument.path].number is not None]
        if not here:
            verdict = self._judge_unknown(expected, values)
        elif not readable:  # tokens or frames of several timesteps: counted
            verdict = expected.verdict
        else:
            verdict = self._judge_known(expected, readable, values)
        self._earlier_step = None if verdict.step is None else verdict.step.at
        self._may_reuse = verdict.may_reuse
        return verdict

    def _judge_known(
        self,
        expected: Expected,
        arguments: Sequence[TimestepArgument],
        values: Mapping[ArgPath, Reading],
    ) -> Verdict:
        timesteps = expected.timesteps
        for step in expected.steps:
            left = tuple(h for h in arguments if _is_at(h, timesteps[step.at], values))
            if left:
                self._outside = frozenset()
                if len(left) < len(arguments):
                    self._remember(timesteps, left)
                return Verdict(step)
        if not expected.may_be_unscheduled:
            self._fail(expected, arguments[0], values)
        if any(step.is_new for step in expected.steps):
            others = [
                TimestepArgument(argument.path, spelling)
                for argument in arguments
                for spelling in FORWARD
            ]
            spelled = (
                h for h in others if values[h.path].number and _is_at(h, timesteps[0], values)
            )
            self._followed = tuple(dict.fromkeys(spelled))
            if self._followed:  # spelled otherwise from here on
                self._known_arguments.set(timesteps, ())
                self._quick = None
                self._is_sure, self._earlier = False, dict(values)
                return Verdict(CandidateStep(True, 0))
        found = {i: h for h in arguments for i, t in enumerate(timesteps) if _is_at(h, t, values)}
        for i, argument in found.items():
            if i - 1 in self._outside and timesteps[i] != timesteps[i - 1]:
                self._fail(expected, argument, values)
        self._outside = frozenset(found)
        return Verdict(None)

    def _judge_unknown(self, expected: Expected, values: dict[ArgPath, Reading]) -> Verdict:
        """Returns the step of a call while it is not known which argument is the timestep."""
        earlier, self._earlier = self._earlier, values
        if earlier is None:
            self._followed = tuple(self._find(expected, expected.steps[0], values))
            return expected.verdict
        moved = {path for path, reading in values.items() if earlier.get(path) != reading}
        if self._followed:
            verdict = self._follow(expected, values, moved)
            if verdict is not None:
                if verdict.step is None:
                    self._earlier = earlier
                return verdict
            self._followed = ()
        verdict = self._find_start(expected, earlier, values, moved)
        if verdict is not None:
            return verdict
        for step in expected.steps:
            self._followed = tuple(self._find(expected, step, values, moved, zeros=True))
            if self._followed:
                return Verdict(step)
        step = expected.steps[0]
        is_of_another = any(True for _ in self._elsewhere(expected, values, moved))
        is_same_step = self._earlier_step == step.at
        may_reuse = is_same_step or (bool(moved) and not is_of_another)
        return Verdict(step, may_reuse or expected.is_stated)

    def _follow(
        self, expected: Expected, values: Mapping[ArgPath, Reading], moved: set[ArgPath]
    ) -> Verdict | None:
        """Returns the step, if an argument that was the timestep so far still is; else None."""
        timesteps, followed = expected.timesteps, self._followed
        for step in expected.steps:
            left = tuple(h for h in followed if _is_at(h, timesteps[step.at], values))
            if left:
                self._followed = left
                at = self._earlier_step
                if at is not None and timesteps[at] != timesteps[step.at]:
                    sure = tuple(argument for argument in left if argument.path in moved)
                    if sure:
                        self._remember(timesteps, sure)
                return Verdict(step)
        paths = {argument.path for argument in followed}
        is_constant = bool(moved) and not paths & moved and not self._is_sure
        if is_constant or not paths & values.keys():
            return None
        if not self._is_sure and not expected.is_stated:
            begun = self._find(expected, CandidateStep(True, 0), values, moved)
            if any(argument.spelling in FORWARD for argument in begun):
                return None  # what was like a timestep was none: the loop begins here
        if expected.may_be_unscheduled:
            return Verdict(None)
        self._fail(expected, next(h for h in followed if h.path in values), values)

    def _find_start(
        self,
        expected: Expected,
        earlier: Mapping[ArgPath, Reading],
        values: Mapping[ArgPath, Reading],
        moved: set[ArgPath],
    ) -> Verdict | None:
        """Returns the first step, if the calls so far came before the loop; else None.

        Raises GuardError if this call and the one before are neighbors elsewhere in the schedule.
        """
        timesteps, first = expected.timesteps, CandidateStep(True, 0)
        may_begin = not expected.is_stated and first not in expected.steps
        if may_begin:
            self._followed = tuple(self._find(expected, first, values, moved))
            if self._followed:
                return Verdict(first)
        expected_indices = {step.at for step in expected.steps}
        for i, argument in self._elsewhere(expected, values, moved):
            before = earlier.get(argument.path)
            if i == 0 or before is None or timesteps[i] == timesteps[i - 1]:
                continue
            if not _is_at(argument, timesteps[i - 1], earlier) or i in expected_indices:
                continue
            if before.number:
                self._fail(expected, argument, values)
            if i == 1 and not expected.is_stated:  # a schedule that begins at 0, which says nothing
                self._followed = (argument,)
                return Verdict(CandidateStep(True, 1))
        return None

    def _find(
        self,
        expected: Expected,
        step: CandidateStep,
        values: Mapping[ArgPath, Reading],
        moved: set[ArgPath] | None = None,
        *,
        zeros: bool = False,
    ) -> Iterator[TimestepArgument]:
        """Yields the arguments that equal the timestep of that step, with their spelling.

        `moved`: only these are looked at. `zeros`: whether zeros count; where a loop may begin,
        they say nothing.
        """
        timestep = expected.timesteps[step.at]
        for path, reading in values.items():
            if moved is not None and path not in moved:
                continue
            for spelling in range(len(SPELLINGS)):
                argument = TimestepArgument(path, spelling)
                if _is_at(argument, timestep, values) and (reading.number or zeros):
                    yield argument

    def _elsewhere(
        self, expected: Expected, values: Mapping[ArgPath, Reading], moved: set[ArgPath]
    ) -> Iterator[tuple[int, TimestepArgument]]:
        """Yields each step whose timestep a changed argument equals in a spelling of `FORWARD`."""
        for path in moved:
            for argument in (TimestepArgument(path, spelling) for spelling in FORWARD):
                for i, timestep in enumerate(expected.timesteps):
                    if values[path].number and _is_at(argument, timestep, values):
                        yield i, argument

    def _remember(
        self, timesteps: tuple[float, ...], arguments: tuple[TimestepArgument, ...]
    ) -> None:
        self._is_sure, self._followed = True, arguments
        if self._remembers:
            self._known_arguments.set(timesteps, arguments)

    def _fail(
        self, expected: Expected, argument: TimestepArgument, values: Mapping[ArgPath, Reading]
    ) -> NoReturn:
        spell, timesteps = SPELLINGS[argument.spelling], expected.timesteps
        step = expected.steps[0].at
        same = [i for i, t in enumerate(timesteps) if _is_at(argument, t, values)]
        if expected.is_stated and same:
            remedy = f"that of step {same[0]}: state the step that runs, or {MAKE_SCHEDULE}"
        elif step - 1 in same:
            remedy = (
                f"that of step {step - 1} again: where a step makes several calls (guidance), name "
                "them: `with fast.cache_context('cond'): ...`"
            )
        elif 0 in same:
            remedy = "that of step 0: fast.reset() ends a generation that is not complete"
        elif same:
            remedy = (
                f"that of step {same[0]}: {MAKE_SCHEDULE}, or say which step runs: "
                "`with fast.cache_context('cond', step_index=i): ...`"
            )
        else:
            remedy = f"no step's: {MAKE_SCHEDULE}"
        number = values[argument.path].number
        found = "several" if number is None else f"{number:g}"
        raise GuardError(
            f"expected timestep {spell(timesteps[step]):g} at step {step}, found {found}, {remedy}"
        )


def _is_at(argument: TimestepArgument, timestep: float, values: Mapping[ArgPath, Reading]) -> bool:
    reading = values.get(argument.path)
    return reading is not None and reading.is_close(SPELLINGS[argument.spelling](timestep))
