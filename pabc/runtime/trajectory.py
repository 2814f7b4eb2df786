"""The state of generations: which step each call is, and which branch it belongs to.

A :class:`Trajectory` holds one generation at a time, and counts its steps. Its calls of one name
form a :class:`Branch`: there is one, or, where guidance makes two calls a step, one for each.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import torch

from pabc.base.structure import Structure
from pabc.runtime.branch import Branch, UnscheduledCalls
from pabc.runtime.clock import CandidateStep, Clock, Expected, Verdict
from pabc.runtime.conditions import CallOrder
from pabc.runtime.guards import MAKE_SCHEDULE, GuardError
from pabc.runtime.stats import Recorder
from pabc.runtime.timesteps import TimestepArguments
from pabc.runtime.where import Where
from pabc.schedule import Schedule

BranchKey = tuple[str | None, int]
"""The name of a branch, and the index of its calls among those of that name in one step."""
_Entered = tuple[tuple[object, object], ...]
_TRAJECTORIES: ContextVar[_Entered] = ContextVar("trajectories", default=())
_NAMES: ContextVar[_Entered] = ContextVar("names", default=())


@contextmanager
def _entered(stack: ContextVar[_Entered], owner: object, value: object) -> Iterator[None]:
    """Makes `value` the innermost one of `owner`, in this thread or task alone."""
    outer = stack.get()
    stack.set((*outer, (owner, value)))
    try:
        yield
    finally:
        stack.set(outer)


def _innermost(stack: ContextVar[_Entered], owner: object) -> object | None:
    for key, value in reversed(stack.get()):
        if key is owner:
            return value
    return None


class PlacedCall(NamedTuple):
    """A call with the step that it is.

    Attributes:
        branch: the branch that it belongs to, at its step.
        schedule: what its generation follows.
        is_sure: whether it is sure enough for reuse that it is this step.
    """

    branch: Branch
    schedule: Schedule
    is_sure: bool


class Trajectory:
    """The state of one generation at a time, separate from that of all others.

    `with trajectory: fast(...)` runs a step in it, in any thread, one step at a time. It may be
    left and entered again between steps, so that many generations can be under way. Leaving it by
    an exception abandons the generation, and frees its slots.

    Steps are counted by the trajectory, for all branches. A call under a name that was already
    called in this step begins the next step; one under another name belongs to this step, unless
    its timestep says otherwise. So a branch may begin late, pause or end early: it computes what it
    has not stored. A new generation begins for all branches at once.

    Attributes:
        schedule: what its generations follow; None: the model's schedule.
        is_private: whether those who listen to the model are not told of its calls.
        checks_steps: whether steps that are stated are compared with the timesteps of the calls.
        num_resets: how often it was reset, by a user or an exception.
        num_failures: how often an exception did.
    """

    def __init__(
        self,
        owner: object,
        recorder: Recorder,
        *,
        known: TimestepArguments,
        schedule: Schedule | None = None,
        check_finite: bool = False,
        on_error: Callable[[BaseException], None] | None = None,
        is_private: bool = False,
    ) -> None:
        self.schedule = schedule
        self.is_private = is_private
        self.checks_steps = not is_private
        self.num_resets = self.num_failures = 0
        self._owner = owner
        self._recorder = recorder
        self._known_arguments = known
        self._check_finite = check_finite
        self._on_error = on_error
        self._branches: dict[BranchKey, Branch] = {}
        self._unscheduled: UnscheduledCalls | None = None
        self._num_unscheduled = 0
        self._following: Schedule | None = None
        self._step = -1
        """The step of the last call; -1: the generation has not begun."""
        self._last: tuple[Branch, CandidateStep] | None = None
        """The branch of the last call, with the step assumed until its timestep arrives."""
        self._stated_step: int | None = None
        self._is_asserted = self._is_running = False
        """Whether the user stated that step; whether a call is under way."""
        self._stated_clock: Clock | None = None
        """The clock of the last call, if its step was stated."""
        self._calls: dict[str | None, CallOrder] = {}
        self._clock = Clock(known)
        self._lock = threading.RLock()

    def __enter__(self) -> Trajectory:
        _TRAJECTORIES.set((*_TRAJECTORIES.get(), (self._owner, self)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _TRAJECTORIES.set(_TRAJECTORIES.get()[:-1])
        if error is not None:
            self.num_failures += 1
            self.reset()
            if self._on_error is not None:
                self._on_error(error)

    def at_step(self, step: int) -> None:
        """States that the calls that follow are this step of the plan, until the next statement.

        Several calls under one name in one step are separate branches, told apart by the tensors
        that a branch is given at every step, or, if there are none, by order.
        :meth:`CompiledModel.cache_context` may state the same step, no other one (GuardError);
        where those who listen to the calls, such as a pipeline, state the step, it is ignored.
        Raises ValueError for a step below 0.
        """
        if step < 0:
            raise ValueError(f"at_step: expected a step of 0 or more, found {step}")
        with self._lock:
            self._stated_step, self._is_asserted = step, not self._is_running
            if step == 0:
                self._calls.clear()
                self._begin()
            for calls in self._calls.values():
                calls.begin_step()
            for branch in self._branches.values():
                branch.seek(step)

    def switch(self, schedule: Schedule) -> None:
        """Makes the generation under way follow another schedule, of as many steps, from the next
        call on; what is kept may be reused by that one."""
        with self._lock:
            self.schedule = schedule
            if self._following is not None:
                self._following = schedule

    def reset(self) -> None:
        """Starts a new generation: the next call is step 0 and finds nothing stored."""
        with self._lock:
            self.num_resets += 1
            for branch in self._branches.values():
                branch.release()  # even if an exception's traceback holds the branch
            self._branches.clear()
            self._unscheduled = self._following = self._last = None
            self._step = -1
            self._stated_step, self._stated_clock, self._calls = None, None, {}
            self._clock.restart()

    @property
    def step(self) -> int:
        """The step that comes next, for branches that took part in the last one."""
        if self._stated_step is not None:
            return self._stated_step
        following = self._following
        is_over = following is None or self._step + 1 == following.num_steps
        return 0 if is_over else self._step + 1

    @property
    def nbytes(self) -> int:
        """Bytes that the slots keep alive."""
        return sum(branch.slots.nbytes for branch in list(self._branches.values()))

    def running(self) -> _Running:
        """Returns the context of one call, which abandons the generation if the call raises.

        Entering it raises GuardError if a step is under way in another thread.
        """
        return _Running(self)

    def place(
        self,
        default: Schedule,
        arguments: Sequence[object],
        structure: Structure,
        leaves: Sequence[Any],
    ) -> PlacedCall:
        """Returns the branch of the call that is made now, at its step.

        Args:
            default: the schedule of a generation that begins, if the trajectory has none.
            arguments: as the caller passed them, without names.
            structure, leaves: the arguments, flattened.

        Raises: GuardError for a call that contradicts those before it.
        """
        if self._last is not None:
            self._settle()
        default = self.schedule or default
        where = current_where(self._owner)
        name = None if where is None else where.name
        said = _NOTHING if where is None else where.said
        if self._stated_step is not None:
            self._check_context(where)
            step = self._stated_step
            if where is not None and where.repeat is not None:
                branch = self._repeated_branch(where.name, where.repeat, step)
            else:
                tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
                order = self._calls.setdefault(name, CallOrder()).index_of(tensors)
                branch = self._branch(name, order)
            said = _NOTHING
        elif where is not None and where.step is not None:
            step = where.step
            if where.repeat is None:
                branch = self._branch(name)
            else:
                branch = self._repeated_branch(where.name, where.repeat, step)
            if step < self._step or step == branch.last == 0:  # it may be of another loop
                self._begin(branch)
            branch.may_repeat = True
        else:
            branch = self._branch(name)
            placed = self._place_counted(branch, default, structure, leaves, said)
            if where is not None:
                where.check(placed.schedule)
            return placed
        schedule = self._following = self._following or default
        if where is not None and (self._stated_step is None or self._is_asserted):
            replace(where, step=step).check(schedule)
        if step >= schedule.num_steps:
            raise GuardError(
                f"expected a step below {schedule.num_steps}, as many as the schedule has, found "
                f"{step}; {MAKE_SCHEDULE}"
            )
        self._last = None
        self._move(branch, step)
        if not self.checks_steps:
            return PlacedCall(branch, schedule, True)
        if branch.clock is None:
            branch.clock = Clock(self._known_arguments, remembers=False)
        here = CandidateStep(step == 0, step)
        expected = Expected(schedule.timesteps, (here,), Verdict(here), is_stated=True)
        self._stated_clock = branch.clock
        branch.clock.settle(has_reused=False)
        branch.clock.ask(expected, structure, leaves, said)
        return PlacedCall(branch, schedule, True)

    def _check_context(self, where: Where | None) -> None:
        """Raises GuardError where the context of a call states another step than `at_step` did."""
        stated = None if where is None or not self._is_asserted else where.step
        if stated is not None and stated != self._stated_step:
            raise GuardError(
                f"step_index: expected {self._stated_step}, the step that trajectory.at_step "
                f"stated, found {stated} in cache_context; state the step in one of the two ways"
            )

    def _place_counted(
        self,
        branch: Branch,
        default: Schedule,
        structure: Structure,
        leaves: Sequence[Any],
        said: Mapping[str, Any],
    ) -> PlacedCall:
        if self._stated_clock is not None:
            self._clock.follow(self._stated_clock)
            self._stated_clock = None
        at, following = self._step, self._following
        num_steps = 0 if following is None else len(following.timesteps)
        is_over = at + 1 == num_steps or at < 0
        steps, counted = _next_steps(at, num_steps, branch.last)
        schedule = default if following is None or steps[-1].is_new else following
        if following is not None and len(steps) > 1:
            schedule = following
        expected = Expected(schedule.timesteps, steps, counted, is_over or branch.last < 0)
        verdict = self._clock.ask(expected, structure, leaves, said)
        if verdict.step is None and is_over and schedule is not default:
            alone = Expected(default.timesteps, (_FIRST,), Verdict(_FIRST), True)
            verdict = self._clock.ask(alone, structure, leaves, said)
        if self._clock.is_waiting:
            self._last = branch, steps[0]
        if verdict.step is None:
            return self._place_unscheduled(schedule)
        self._num_unscheduled = 0
        if verdict.step.is_new:
            self._check_restart(verdict.step, steps)
            self._begin(branch)
            self._following = schedule = default
        self._move(branch, verdict.step.at)
        branch.may_repeat = False
        return PlacedCall(branch, schedule, verdict.may_reuse)

    def _settle(self) -> None:
        """Corrects which step the last call was, if its timestep had not yet arrived then."""
        assert self._last is not None
        (branch, taken), self._last = self._last, None
        verdict = self._clock.settle(branch.has_reused)
        if verdict is None or verdict.step == taken:
            return
        if verdict.step is None:
            if taken.is_new:
                self._begin()
            else:
                branch.relabel(-1)
            return
        if verdict.step.is_new:
            self._check_restart(verdict.step, (taken,))
            following = self._following
            self._begin(branch)
            self._following = following
        self._step = verdict.step.at
        branch.relabel(verdict.step.at)

    def _check_restart(self, found: CandidateStep, expected: Sequence[CandidateStep]) -> None:
        """Raises GuardError if calls that turn out to precede the loop have reused something."""
        if found not in expected and any(b.num_reused for b in self._branches.values()):
            raise GuardError(
                f"expected step {expected[0].at}, found the timestep of step {found.at}: the "
                "calls before were none of the loop's, and reused values as if they were; end each "
                "of them by fast.reset(), or make them in trajectories of their own: "
                "`with fast.trajectory(): ...`"
            )

    def _begin(self, branch: Branch | None = None) -> None:
        """Begins a generation for all branches of the last one, and for `branch`."""
        known = self._branches.items()
        self._branches = {key: b for key, b in known if b.last >= 0 or b is branch}
        for each in self._branches.values():
            each.reset()
        self._step, self._following = -1, None

    def _move(self, branch: Branch, step: int) -> None:
        """Moves the trajectory, and the branch of the call, to a step."""
        following = self._following
        assert following is not None
        if step != self._step and len(self._branches) > 1:
            is_last = step + 1 == following.num_steps
            for other in self._branches.values():
                if other is branch:
                    continue
                if is_last and other.last + 1 < step:  # it rested: not expected to come back
                    other.release()
                else:
                    other.slots.free_before(step)
        self._step = step
        branch.seek(step)

    def _place_unscheduled(self, schedule: Schedule) -> PlacedCall:
        if self._unscheduled is None:
            self._unscheduled = UnscheduledCalls(self._recorder, self._check_finite)
        self._num_unscheduled += 1
        if self._num_unscheduled == schedule.num_steps:
            warnings.warn(
                f"pabc: the last {schedule.num_steps} calls, as many as the schedule has steps, "
                "brought timesteps that are none of its steps, or not the first, so that nothing "
                f"could be reused; {MAKE_SCHEDULE}",
                stacklevel=7,
            )
        return PlacedCall(self._unscheduled, schedule, True)

    def find_key(self, branch: object) -> BranchKey | None:
        """Returns the name and order of a branch; None for calls that are no steps."""
        return next((key for key, each in self._branches.items() if each is branch), None)

    def _repeated_branch(self, name: str, order: int, step: int) -> Branch:
        """Returns the branch of calls that repeat others in each step, with other latents.

        A solver of second order makes one call in its first step, and two in those that follow:
        the branch of the second ones begins with what that of the first ones keeps.
        """
        earlier = self._branches.get((name, order - 1))
        branch = self._branch(name, order)
        if branch.last < 0 and earlier is not None:
            branch.begin_as(earlier, step)
        return branch

    def _branch(self, name: str | None, order: int = 0) -> Branch:
        branch = self._branches.get((name, order))
        if branch is None:
            branch = Branch(self._recorder, self._check_finite)
            self._branches[name, order] = branch
        return branch


_FIRST = CandidateStep(True, 0)
"""The first step of a new generation."""


@cache
def _next_steps(at: int, num_steps: int, last: int) -> tuple[tuple[CandidateStep, ...], Verdict]:
    """Returns the steps that a call may be, the one by counting first, and that one as a verdict.

    `at`: the step of the call before, of `num_steps`; `last`: that of the last call of this name.
    """
    if at < 0 or num_steps == 0:
        return (_FIRST,), Verdict(_FIRST)
    here = CandidateStep(False, at)
    after = CandidateStep(False, at + 1) if at + 1 < num_steps else _FIRST
    if last == at:
        return (after,), Verdict(after)
    if last < 0 and after.is_new:  # a loop of its own, after that of other names
        return (after, here), Verdict(after)
    return (here, after), Verdict(here)


_NOTHING: Mapping[str, Any] = {}


class _Running:
    """The context of one call; see :meth:`Trajectory.running`."""

    __slots__ = ("_trajectory",)

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory

    def __enter__(self) -> None:
        if not self._trajectory._lock.acquire(blocking=False):
            raise GuardError(
                "expected one step of a trajectory at a time, found another one under way; "
                "`with fast.trajectory():` gives each thread its own"
            )
        self._trajectory._is_running = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        trajectory = self._trajectory
        try:
            if kind is not None:
                trajectory.num_failures += 1
                trajectory.reset()
        finally:
            trajectory._is_running = False
            trajectory._lock.release()


def current_trajectory(owner: object, default: Trajectory) -> Trajectory:
    """Returns the innermost trajectory of `owner` that this thread, or task, has entered."""
    found = _innermost(_TRAJECTORIES, owner)
    return found if isinstance(found, Trajectory) else default


def current_where(owner: object) -> Where | None:
    """Returns the name of calls made here, and what is stated beside it; None: nothing."""
    found = _innermost(_NAMES, owner)
    return found if isinstance(found, Where) else None


def named_branch(owner: object, where: Where) -> AbstractContextManager[None]:
    """Returns a context in which calls of `owner` belong to the branch and step in `where`."""
    return _entered(_NAMES, owner, where)
