"""One sequence of calls: which step comes next, and what its slots hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pabc.budget import Fit
from pabc.passes.cache import Cuts
from pabc.plan import Action, Plan
from pabc.runtime.guards import Clock, GuardError
from pabc.runtime.stats import Recorder
from pabc.schedule import Schedule

Layout = tuple[tuple[int, ...], ...]
"""The inputs' shapes, where one program serves several; else empty."""


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
