"""One sequence of calls: which step comes next, and what its slots hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import NamedTuple

import torch

from pabc.budget import Fit
from pabc.passes import (
    Cuts,
)
from pabc.plan import Action, Plan
from pabc.runtime.guards import Clock, GuardError
from pabc.runtime.stats import Recorder
from pabc.schedule import Schedule

Layout = tuple[tuple[int, ...], ...]
"""The inputs' shapes, where one program serves several; else empty."""


@dataclass(frozen=True)
class Hoisted:
    """A prologue's results, and the tensors (with their versions) that they were computed from.

    `versions` is what changes when the tensors' values do: their versions and memory; None: it
    cannot be told.
    """

    sources: Sequence[torch.Tensor]
    versions: tuple[list[int], list[int]] | None
    values: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, sources: Sequence[torch.Tensor], values: tuple[torch.Tensor, ...]) -> Hoisted:
        """The results of what was computed from these tensors as they are now."""
        is_known = not any(tensor.is_inference() for tensor in sources)
        return cls(sources, _versions_of(sources) if is_known else None, values)

    def holds_for(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, unchanged; never so for inference tensors."""
        return (
            self.versions is not None
            and all(map(is_, sources, self.sources))
            and self.versions == _versions_of(sources)
        )

    def changed(self, sources: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Which of these are other tensors, or changed; all, where that cannot be told."""
        if self.versions is None or any(tensor.is_inference() for tensor in sources):
            return tuple(range(len(sources)))
        known = zip(self.sources, *self.versions, strict=True)
        now = zip(sources, *_versions_of(sources), strict=True)
        pairs = enumerate(zip(known, now, strict=True))
        return tuple(i for i, (a, b) in pairs if a[0] is not b[0] or a[1:] != b[1:])


def _versions_of(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """The versions, and where the values lie, without Python code per tensor."""
    return list(map(_VERSION, tensors)), list(map(torch.Tensor.data_ptr, tensors))


_VERSION = attrgetter("_version")


@dataclass(frozen=True, slots=True)
class Step:
    """What a plan says of one step.

    Attributes:
        reused: the slots that it reuses.
        until: per slot, the last step that may read what this one computes; -1: none.
        readable: the slots for which there is such a step.
        ends: the slots whose value is read here for the last time, whenever it was computed.
    """

    reused: tuple[int, ...]
    until: tuple[int, ...]
    readable: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """A schedule bound to a program's slots: what each step does.

    Attributes:
        plan: actions, lifetimes, phases.
        stored: the slots that a phase reuses -> those whose cuts it gives out. The phase that
            reuses nothing stands in where a value is missing: it gives out all.
        steps: what the plan says of each step, at hand.
        fit: how the plan came to keep within a memory budget, where there is one.
    """

    plan: Plan
    stored: Mapping[tuple[int, ...], tuple[int, ...]]
    steps: tuple[Step, ...]
    fit: Fit | None = None

    @classmethod
    def of(cls, plan: Plan, fit: Fit | None = None) -> Binding:
        """The binding that follows from a plan."""
        stored = {phase.reused: phase.stored for phase in plan.phases}
        stored[()] = tuple(sorted({slot for p in plan.phases for slot in p.stored}))
        return cls(plan, stored, _steps_of(plan), fit)


def _steps_of(plan: Plan) -> tuple[Step, ...]:
    ends: list[set[int]] = [set() for _ in range(plan.num_steps)]
    table: list[list[int]] = plan.until.tolist()
    for row in table:
        for slot, last in enumerate(row):
            if last >= 0:
                ends[last].add(slot)
    return tuple(
        Step(
            plan.phases[phase].reused,
            tuple(row),
            tuple(slot for slot, last in enumerate(row) if last >= 0),
            tuple(sorted(slots)),
        )
        for phase, row, slots in zip(plan.phase_of_step, table, ends, strict=True)
    )


class _Held(NamedTuple):
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
    """The calls of one name within a trajectory: one place per slot; what to do with a slot is the
    plan's to say, and which step a call is, the trajectory's.

    A slot holds the cuts of one region between the step that stored them and their last read.

    Attributes:
        step: the step of the call that is made, or that comes next.
        last: the last step of this generation that was run, or begun; -1: none.
        schedule: what the generation follows.
        clock: what checks the steps that are stated, where they are.
        num_reused: what was reused in this generation: regions, one per slot and call.
        may_reuse: whether it is sure enough which step the call is.
        may_repeat: whether a step may be run again, and finds then what it found before.
    """

    def __init__(self, recorder: Recorder, check_finite: bool = False) -> None:
        self.step = 0
        self.last = -1
        self.schedule: Schedule | None = None
        self.hoisted: Hoisted | None = None
        self.source: Source | None = None
        self.clock: Clock | None = None
        self.may_reuse = True
        self.may_repeat = False
        self._binding: Binding | None = None
        self._reuses = False
        self._num_wanted = self.num_reused = self._num_stored = 0
        self._is_counted = False
        self._held: dict[int, _Held] = {}
        self._recorder = recorder
        self._account = recorder.account(self)
        self._check_finite = check_finite

    @property
    def has_reused(self) -> bool:
        """Whether the last call reused something."""
        return self._reuses

    @property
    def plan(self) -> Plan:
        """What the step that has begun follows."""
        assert self._binding is not None
        return self._binding.plan

    @property
    def nbytes(self) -> int:
        """Bytes that the slots keep alive."""
        return self._account.nbytes

    def bind(self, binding: Binding) -> None:
        """States what the step that begins follows."""
        self._binding = binding

    def begin(self, source: Source, change: str | None) -> tuple[int, ...]:
        """Begins a step; returns the slots it reuses: all that the plan says, or none.

        `change`: what tells `source` from that of the step before, where they differ.
        """
        assert self._binding is not None
        if source is not self.source and source != self.source:
            self._drop()
            self.source, self.hoisted = source, None
        reused = self._binding.steps[self.step].reused
        is_late = self.last != self.step - 1  # what it has not stored was not to be expected
        self.last = self.step
        self._reuses = False
        if not reused:
            return ()
        self._num_wanted += not is_late
        if not self.may_reuse:
            self._recorder.fall_back("timestep", self.step)
        elif not all(map(self._held.__contains__, reused)):
            self._recorder.fall_back(change or "missing", self.step)
        else:
            self._reuses = True
        return reused if self._reuses else ()

    def reused_cuts(self, reused: Sequence[int]) -> list[torch.Tensor]:
        """The cuts of the slots that :meth:`begin` returned."""
        return [cut for slot in reused for cut in self._held[slot].cuts]

    def read(self, slot: int) -> Cuts | None:
        """The stored cuts where this step reuses the slot; None: compute."""
        assert self._binding is not None
        if not self._reuses or self._binding.plan.actions[self.step, slot] != Action.REUSE:
            return None
        return self._held[slot].cuts

    def write(self, slot: int, cuts: Cuts) -> None:
        """Keeps freshly computed cuts if a later step reads them."""
        self.keep((slot,), cuts, {slot: len(cuts)})

    def keep(
        self,
        slots: Sequence[int],
        cuts: Sequence[torch.Tensor],
        widths: Mapping[int, int] | Sequence[int],
    ) -> None:
        """Keeps those freshly computed cuts that a later step reads.

        `cuts`: of all these slots, one after the other; `widths`: how many each slot has.
        """
        assert self._binding is not None
        until = self._binding.steps[self.step].until
        added = start = 0
        for slot in slots:
            stop = start + widths[slot]
            if until[slot] >= 0:
                added += self._put(slot, tuple(cuts[start:stop]), until[slot])
            start = stop
        if added:
            self._account.set(self._account.nbytes + added)

    def _put(self, slot: int, cuts: Cuts, until: int) -> int:
        """Keeps the cuts of a slot, in place of what it holds; returns by how many bytes more."""
        if self._check_finite and not all(map(_is_finite, cuts)):
            assert self._binding is not None
            spec = self._binding.plan.slots[slot]
            raise GuardError(
                f"expected finite values to keep, found NaN or infinity in the {spec.kind} branch "
                f"{spec.name!r} at step {self.step}"
            )
        cuts = tuple(map(without_spare_memory, cuts))
        if len(cuts) == 1:
            nbytes = cuts[0].untyped_storage().nbytes()
        else:
            storages = [t.untyped_storage() for t in cuts]
            nbytes = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        before = self._held.get(slot)
        self._held[slot] = _Held(cuts, self.step, until, nbytes)
        self._num_stored += before is None or before.step != self.step
        return nbytes - (0 if before is None else before.nbytes)

    def advance(self) -> None:
        """Counts the step that was run, and frees what no later step reads."""
        assert self._binding is not None and self.schedule is not None
        plan, at = self._binding.plan, self._binding.steps[self.step]
        num_reused = len(at.reused) if self._reuses else 0
        self.num_reused += num_reused
        self._recorder.add_call(num_reused, len(plan.slots) - num_reused, self._num_stored)
        self._num_stored = 0
        held = self._held
        if self.step + 1 == plan.num_steps:
            self._end()
        elif not self.may_repeat:
            self._remove([j for j in at.ends if j in held and held[j].until == self.step])
        self.step += 1

    def _end(self) -> None:
        """Counts a generation, and frees all."""
        self.release()
        if self._is_counted:
            return
        self._is_counted = True
        self._recorder.add(generations=1)
        if self._num_wanted and not self.num_reused:
            warnings.warn(
                "pabc: nothing was reused in a whole generation, though the schedule asks for it; "
                "see stats.fallbacks and explain()",
                stacklevel=5,
            )

    def seek(self, step: int) -> None:
        """The next call is this step."""
        if step != self.step or self.may_repeat:
            self.step = step
            self.free(step)

    def relabel(self, step: int) -> None:
        """The last call was this step, or, for -1, none of the generation: what it kept goes."""
        self.release()
        self.last, self.step = step, step + 1

    def reset(self) -> None:
        """Starts a new generation: step 0, all slots empty, nothing hoisted."""
        self.step, self.last = 0, -1
        self._num_wanted = self.num_reused = self._num_stored = 0
        self.may_reuse, self.may_repeat, self._is_counted, self._reuses = True, False, False, False
        self.schedule = self.clock = self._binding = None
        self.release()

    def release(self) -> None:
        """Frees all slots, and what is hoisted."""
        self.hoisted = None
        self._drop()

    def free(self, step: int) -> None:
        """Frees what no step from this one on reads, or was computed at one that is to come."""
        held = self._held.items()
        self._remove([j for j, h in held if h.until < step or h.step >= step])

    def _remove(self, slots: Sequence[int]) -> None:
        removed = sum([self._held.pop(slot).nbytes for slot in slots])
        if removed:
            self._account.set(self._account.nbytes - removed)

    def _drop(self) -> None:
        self._held.clear()
        self._account.set(0)


class Outside(Branch):
    """Calls that are no step of the schedule: they reuse nothing and keep nothing."""

    def bind(self, binding: Binding) -> None:
        """At the last step, for which nothing is stored."""
        self._binding = binding
        self.step = binding.plan.num_steps - 1

    def begin(self, source: Source, change: str | None) -> tuple[int, ...]:
        """Reuses nothing."""
        self.source = source
        return ()

    def keep(
        self,
        slots: Sequence[int],
        cuts: Sequence[torch.Tensor],
        widths: Mapping[int, int] | Sequence[int],
    ) -> None:
        """Drops the cuts."""

    def advance(self) -> None:
        """Counts the call."""
        self._recorder.add(outside=1)
        self.release()


def without_spare_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or, where it is a part of a larger buffer, a copy that does not keep that alive.

    Of a tensor without gaps, the copy has the same strides.
    """
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.is_pinned():
        torch.cuda.synchronize()  # it may be on its way from the device
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # of which 8-bit formats have not every op
    return bool(torch.isfinite(tensor).all())
