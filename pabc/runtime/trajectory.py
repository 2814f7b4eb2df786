"""The state of generations: which step comes next, and what the slots hold.

A :class:`Trajectory` is one generation at a time; the calls that follow one another in it form a
:class:`Branch`. There is one branch, or, where guidance makes two calls a step, one for each.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

import torch

from pabc.budget import Fit
from pabc.passes.cache import Cuts
from pabc.plan import Action, Plan
from pabc.runtime.conditions import Calls
from pabc.runtime.guards import Clock, GuardError
from pabc.runtime.stats import Recorder
from pabc.schedule import Schedule

Layout = tuple[tuple[int, ...], ...]
"""The inputs' shapes, where one program serves several; else empty."""
BranchKey = tuple[str | None, int]
"""The name of a branch, and which of that name's calls within one step it is."""


@dataclass(frozen=True)
class Hoisted:
    """A prologue's results, and the tensors (with their versions) that they were computed from."""

    sources: tuple[torch.Tensor, ...]
    versions: tuple[tuple[int, int] | None, ...]
    values: tuple[torch.Tensor, ...]

    def holds_for(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, unchanged; never so for inference tensors."""
        return all(
            new is old and version is not None and version == version_of(new)
            for new, old, version in zip(sources, self.sources, self.versions, strict=True)
        )


def version_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """What changes when a tensor's values do: its version and memory; None: cannot be told."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


@dataclass(frozen=True, slots=True)
class Binding:
    """A schedule bound to a program's slots: what each step does.

    Attributes:
        plan: actions, lifetimes, phases.
        stored: the slots that a phase reuses -> those whose cuts it gives out. The phase that
            reuses nothing stands in where a value is missing: it gives out all.
        fit: how the plan came to keep within a memory budget, where there is one.
    """

    plan: Plan
    stored: Mapping[tuple[int, ...], tuple[int, ...]]
    fit: Fit | None = None

    @classmethod
    def of(cls, plan: Plan, fit: Fit | None = None) -> Binding:
        """The binding that follows from a plan."""
        stored = {phase.reused: phase.stored for phase in plan.phases}
        stored[()] = tuple(sorted({slot for p in plan.phases for slot in p.stored}))
        return cls(plan, stored, fit)

    def reused_at(self, step: int) -> tuple[int, ...]:
        """The slots that a step reuses."""
        return self.plan.phases[self.plan.phase_of_step[step]].reused


@dataclass(frozen=True, slots=True)
class _Held:
    """What a slot holds: the cuts, the step that computed them, the last that may read them."""

    cuts: Cuts
    step: int
    until: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Source:
    """What the values of a branch follow from; under another one they are not valid.

    Attributes:
        program: what computed them: one captured signature.
        layout: the sizes that it leaves open.
        weights: which of its states the model's tensors had.
    """

    program: object
    layout: Layout
    weights: int


class Branch:
    """A step counter and one place per slot; what to do with a slot is the plan's to say.

    A slot holds the cuts of one region between the step that stored them and their last read.
    """

    def __init__(self, recorder: Recorder, check_finite: bool = False) -> None:
        self.step = 0
        self.hoisted: Hoisted | None = None
        self.source: Source | None = None
        self._schedule: Schedule | None = None
        self._binding: Binding | None = None
        self._clock: Clock | None = None
        self._reuses = False
        self._num_reused = 0
        self._held: dict[int, _Held] = {}
        self._recorder = recorder
        self._account = recorder.account(self)
        self._check_finite = check_finite

    @property
    def schedule(self) -> Schedule | None:
        """What the generation under way follows; None: it has not begun."""
        return self._schedule

    @property
    def nbytes(self) -> int:
        """Bytes that the slots keep alive."""
        return self._account.nbytes

    def bind(self, schedule: Schedule, binding: Binding) -> None:
        """States what the step that begins follows. Raises GuardError if there is no such step."""
        if self.step >= binding.plan.num_steps:
            raise GuardError(
                f"expected a step below {binding.plan.num_steps}, as many as the schedule has, "
                f"found {self.step}"
            )
        self._schedule, self._binding = schedule, binding

    def begin(self, source: Source, change: str | None) -> tuple[int, ...]:
        """Begins a step; returns the slots it reuses: all that the plan says, or none.

        `change`: what tells `source` from that of the step before, where they differ.
        """
        assert self._binding is not None
        if source != self.source:
            self._drop()
            self.source, self.hoisted = source, None
        reused = self._binding.reused_at(self.step)
        self._reuses = all(slot in self._held for slot in reused)
        if not self._reuses:
            self._recorder.fall_back(change or "missing", self.step)
            return ()
        return reused

    def reused_cuts(self, reused: Sequence[int]) -> list[torch.Tensor]:
        """The cuts of the slots that :meth:`begin` returned."""
        return [cut for slot in reused for cut in self._held[slot].cuts]

    def check_time(self, leaves: Sequence[object], positions: Sequence[int]) -> None:
        """Raises GuardError where the timestep is not that of the step that begins."""
        if self._clock is None:
            assert self._binding is not None
            self._clock = Clock(self._binding.plan.timesteps)
        self._clock.check(self.step, leaves, positions)

    def read(self, slot: int) -> Cuts | None:
        """The stored cuts where this step reuses the slot; None: compute."""
        assert self._binding is not None
        if not self._reuses or self._binding.plan.actions[self.step, slot] != Action.REUSE:
            return None
        return self._held[slot].cuts

    def write(self, slot: int, cuts: Cuts) -> None:
        """Keeps freshly computed cuts if a later step reads them."""
        assert self._binding is not None
        plan = self._binding.plan
        until = int(plan.until[self.step, slot])
        if until < 0:
            return
        if self._check_finite and not all(map(_is_finite, cuts)):
            spec = plan.slots[slot]
            raise GuardError(
                f"expected finite values to keep, found NaN or infinity in the {spec.kind} branch "
                f"{spec.name!r} at step {self.step}"
            )
        self._remove(slot)
        cuts = tuple(map(without_spare_memory, cuts))
        nbytes = sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cuts}.values()
        )
        self._held[slot] = _Held(cuts, self.step, until, nbytes)
        self._account.set(self._account.nbytes + nbytes)

    def advance(self) -> bool:
        """Frees what no later step reads. True: that was the last step, and a new generation is
        next."""
        assert self._binding is not None and self._schedule is not None
        plan = self._binding.plan
        num_reused = len(self._binding.reused_at(self.step)) if self._reuses else 0
        self._num_reused += num_reused
        num_stored = sum(held.step == self.step for held in self._held.values())
        self._recorder.add(
            calls=1,
            reused=num_reused,
            computed=len(plan.slots) - num_reused,
            stored=num_stored,
        )
        self.step += 1
        self._free()
        if self.step < plan.num_steps:
            return False
        if self._schedule.reuses and not self._num_reused:
            warnings.warn(
                "pabc: nothing was reused in a whole generation, though the schedule asks for it; "
                "see stats.fallbacks and explain()",
                stacklevel=4,
            )
        self._recorder.add(generations=1)
        self.reset()
        return True

    def seek(self, step: int) -> None:
        """The next call is this step; step 0 begins a new generation."""
        if step == self.step:
            return
        if step == 0:
            self.reset()
        self.step = step
        self._free()

    def reset(self) -> None:
        """Starts a new generation: step 0, all slots empty, nothing hoisted."""
        self.step = self._num_reused = 0
        self.hoisted = self._schedule = self._binding = self._clock = None
        self._reuses = False
        self._drop()

    def _free(self) -> None:
        """Frees what no step from this one on reads, or was computed at one that is to come."""
        held = list(self._held.items())
        for slot in [j for j, h in held if h.until < self.step or h.step >= self.step]:
            self._remove(slot)

    def _remove(self, slot: int) -> None:
        held = self._held.pop(slot, None)
        if held is not None:
            self._account.set(self._account.nbytes - held.nbytes)

    def _drop(self) -> None:
        self._held.clear()
        self._account.set(0)


def without_spare_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or, where it is a part of a larger buffer, a copy that does not keep that alive.

    Of a tensor without gaps, the copy has the same strides.
    """
    spare = tensor.untyped_storage().nbytes() - tensor.numel() * tensor.element_size()
    return tensor.clone() if spare > 0 else tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.is_pinned():
        torch.cuda.synchronize()  # it may be on its way from the device
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # of which 8-bit formats have not every op
    return bool(torch.isfinite(tensor).all())


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
    return next((value for key, value in reversed(stack.get()) if key is owner), None)


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

    @contextmanager
    def running(self, tensors: Sequence[torch.Tensor] = ()) -> Iterator[Branch]:
        """The branch of the call that is made now, with these tensors; abandons the generation if
        it raises.

        Raises GuardError if a step is under way in another thread.
        """
        if not self._lock.acquire(blocking=False):
            raise GuardError(
                "expected one step of a trajectory at a time, found another one under way; "
                "`with fast.trajectory():` gives each thread its own"
            )
        try:
            yield self._branch(tensors)
        except BaseException:
            self.reset()
            raise
        finally:
            self._lock.release()

    def _branch(self, tensors: Sequence[torch.Tensor]) -> Branch:
        name = _innermost(_NAMES, self._owner)
        assert name is None or isinstance(name, str)
        order = 0
        if self._stated_step is not None:
            order = self._calls.setdefault(name, Calls()).index_of(tensors)
        branch = self._branches.get((name, order))
        if branch is None:
            branch = Branch(self._recorder, self._check_finite)
            self._branches[name, order] = branch
        if self._stated_step is not None:
            branch.seek(self._stated_step)
        return branch


def current_trajectory(owner: object, default: Trajectory) -> Trajectory:
    """The innermost trajectory of `owner` that this thread, or task, has entered."""
    found = _innermost(_TRAJECTORIES, owner)
    return found if isinstance(found, Trajectory) else default


def named_branch(owner: object, name: str) -> AbstractContextManager[None]:
    """Within it, calls of `owner` belong to the branch of this name."""
    return _entered(_NAMES, owner, name)
