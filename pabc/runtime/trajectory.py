"""The state of generations: which step comes next, and what the slots hold.

A :class:`Trajectory` is one generation at a time; the calls that follow one another in it form a
:class:`Branch`. There is one branch, or, where guidance makes two calls a step, one for each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import TracebackType

import torch

from pabc.runtime.branch import Branch
from pabc.runtime.conditions import Calls
from pabc.runtime.guards import GuardError
from pabc.runtime.stats import Recorder
from pabc.schedule import Schedule

BranchKey = tuple[str | None, int]
"""The name of a branch, and which of that name's calls within one step it is."""


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


class Trajectory:
    """The state of one generation at a time, apart from that of every other one.

    `with trajectory: fast(...)` runs a step in it, in any thread; one step at a time. It may be
    left and entered again between steps, so that many can be under way. Leaving it by an exception
    abandons the generation: its slots are freed.
    """

    def __init__(
        self,
        owner: object,
        recorder: Recorder,
        *,
        schedule: Schedule | None = None,
        check_finite: bool = False,
    ) -> None:
        self.schedule = schedule
        self._owner = owner
        self._recorder = recorder
        self._check_finite = check_finite
        self._branches: dict[BranchKey, Branch] = {}
        self._stated_step: int | None = None
        self._calls: dict[str | None, Calls] = {}
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
        if kind is not None:
            self.reset()

    def at_step(self, step: int) -> None:
        """States that the calls that follow are this step of the plan, until told otherwise.

        Several calls under one name in one step are branches of their own, told apart by the
        tensors that a branch is given at every step, or, where there are none, by order.
        Raises ValueError for a step below 0.
        """
        if step < 0:
            raise ValueError(f"at_step: got {step}, allowed: 0 or more")
        with self._lock:
            self._stated_step = step
            if step == 0:
                self._calls.clear()
            for calls in self._calls.values():
                calls.begin_step()
            for branch in self._branches.values():
                branch.seek(step)

    def reset(self) -> None:
        """Starts a new generation: the next call is step 0 and finds nothing kept."""
        with self._lock:
            self._branches.clear()
            self._stated_step, self._calls = None, {}

    @property
    def step(self) -> int:
        """The step that the next call is; with several branches, of the one that is furthest."""
        if self._stated_step is not None:
            return self._stated_step
        return max((branch.step for branch in list(self._branches.values())), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots keep alive."""
        return sum(branch.nbytes for branch in list(self._branches.values()))

    def running(self, arguments: Sequence[object] = ()) -> _Running:
        """Within it, the branch of the call that is made now, with these arguments; it abandons the
        generation if it raises.

        Entering raises GuardError if a step is under way in another thread.
        """
        return _Running(self, arguments)

    def _branch(self, arguments: Sequence[object]) -> Branch:
        name = _innermost(_NAMES, self._owner)
        assert name is None or isinstance(name, str)
        order = 0
        if self._stated_step is not None:
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            order = self._calls.setdefault(name, Calls()).index_of(tensors)
        branch = self._branches.get((name, order))
        if branch is None:
            branch = Branch(self._recorder, self._check_finite)
            self._branches[name, order] = branch
        if self._stated_step is not None:
            branch.seek(self._stated_step)
        return branch


class _Running:
    """One call in a trajectory; see :meth:`Trajectory.running`."""

    __slots__ = ("_arguments", "_trajectory")

    def __init__(self, trajectory: Trajectory, arguments: Sequence[object]) -> None:
        self._trajectory, self._arguments = trajectory, arguments

    def __enter__(self) -> Branch:
        trajectory = self._trajectory
        if not trajectory._lock.acquire(blocking=False):
            raise GuardError(
                "expected one step of a trajectory at a time, found another one under way; "
                "`with fast.trajectory():` gives each thread its own"
            )
        try:
            return trajectory._branch(self._arguments)
        except BaseException:
            trajectory.reset()
            trajectory._lock.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        trajectory = self._trajectory
        try:
            if kind is not None:
                trajectory.reset()
        finally:
            trajectory._lock.release()


def current_trajectory(owner: object, default: Trajectory) -> Trajectory:
    """The innermost trajectory of `owner` that this thread, or task, has entered."""
    found = _innermost(_TRAJECTORIES, owner)
    return found if isinstance(found, Trajectory) else default


def named_branch(owner: object, name: str) -> AbstractContextManager[None]:
    """Within it, calls of `owner` belong to the branch of this name."""
    return _entered(_NAMES, owner, name)
