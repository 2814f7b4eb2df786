"""Tells from calls alone which step each one is, and where a generation ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pabc.base.structure import Structure
from pabc.calibration.hearing import find_outputs, is_like
from pabc.runtime.timesteps import ArgPath, Reader, Reading, TimestepArguments

Numbers = Mapping[ArgPath, float]
"""The numbers among the arguments of a call that may be its timestep, by their paths."""


@dataclass(frozen=True, slots=True)
class FoundStep:
    """The step that a call is.

    Attributes:
        is_new: whether the call begins another generation.
        index: the index of the step.
        order: the index of the call among those of its name in the step.
    """

    is_new: bool
    index: int
    order: int


@dataclass(slots=True)
class _Step:
    """One step: the name, the numbers and the stated step of its first call, the latents of each
    name's first call, and, of the first step, whether all outputs were 0."""

    name: str | None
    numbers: Numbers
    stated: int | None
    latents: dict[str | None, list[torch.Tensor]] = field(default_factory=dict)
    counts: dict[str | None, int] = field(default_factory=dict)
    is_zero: bool = True


class Steps:
    """Counts the steps of generations whose timesteps nobody has stated.

    A call is of the same step as the one before if it is given the same latents, as the calls of
    guidance are, or if its name is new in the step and its numbers are the same. The same latents
    tell nothing where another step is stated, or another timestep is given; which number that is,
    is known from the second step on, or if outputs of 0 have left the latents as they were. It
    begins a new generation if its numbers are those of the first step again, after others.
    """

    def __init__(self, read: Callable[[Structure, Sequence[Any]], Numbers]) -> None:
        """`read` returns the numbers of a call."""
        self._read = read
        self.restart()

    def restart(self) -> None:
        """Begins a generation with the next call."""
        self._steps: list[_Step] = []
        self._latents: tuple[int, ...] | None = None

    @property
    def num_steps(self) -> int:
        """The number of steps of this generation so far."""
        return len(self._steps)

    @property
    def path(self) -> ArgPath | None:
        """The path of the timestep: the first number that took the most values; None: none did."""
        paths = [p for p in self._steps[0].numbers if all(p in s.numbers for s in self._steps)]
        counts = {path: len({step.numbers[path] for step in self._steps}) for path in paths}
        best = max(counts, key=counts.__getitem__, default=None)
        return None if best is None or counts[best] < 2 else best

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps so far; the indices of the steps, where no number is a timestep."""
        path = self.path
        if path is None:
            return tuple(map(float, range(self.num_steps)))
        return tuple(step.numbers[path] for step in self._steps)

    def begin(
        self,
        name: str | None,
        leaves: Sequence[Any],
        structure: Structure,
        stated: int | None = None,
    ) -> FoundStep:
        """Returns the step of a call that is about to be made; `stated`: beside the call."""
        numbers = self._read(structure, leaves)
        is_new = not self._steps or self._is_first(numbers, name)
        if is_new:
            self.restart()
        if is_new or not self._is_same_step(numbers, name, leaves, stated):
            self._steps.append(_Step(name, numbers, stated))
        step = self._steps[-1]
        order = step.counts.get(name, 0)
        step.counts[name] = order + 1
        if self._latents is not None:
            self._keep(step, name, leaves)
        return FoundStep(is_new, self.num_steps - 1, order)

    def end(self, name: str | None, leaves: Sequence[Any], result: Any) -> None:
        """Notes what the call came to, which tells what its latents are."""
        outputs = find_outputs(result)
        step = self._steps[-1]
        if self.num_steps == 1 and step.is_zero:
            step.is_zero = not any(bool(output.any()) for output in outputs)
        if self._latents is None:
            alike = (i for i, x in enumerate(leaves) if any(is_like(x, o) for o in outputs))
            self._latents = tuple(alike)
            self._keep(step, name, leaves)

    def _keep(self, step: _Step, name: str | None, leaves: Sequence[Any]) -> None:
        """Keeps copies of latents, which a loop may update in place."""
        if name not in step.latents:
            step.latents[name] = [leaves[i].detach().clone() for i in self._latents or ()]
            for earlier in self._steps[:-1][-1:]:
                earlier.latents.clear()

    def begins_again(self, name: str | None, leaves: Sequence[Any], structure: Structure) -> bool:
        """Returns whether a call that is about to be made begins another generation."""
        return bool(self._steps) and self._is_first(self._read(structure, leaves), name)

    def _is_first(self, numbers: Numbers, name: str | None) -> bool:
        """Returns whether numbers that have moved since are those of the first step again."""
        first, last = self._steps[0], self._steps[-1]
        if name != first.name:
            return False
        moved = [p for p, x in first.numbers.items() if last.numbers.get(p, x) != x]
        return bool(moved) and all(numbers.get(p) == first.numbers[p] for p in moved)

    def _is_same_step(
        self, numbers: Numbers, name: str | None, leaves: Sequence[Any], stated: int | None
    ) -> bool:
        step = self._steps[-1]
        if None not in (stated, step.stated) and stated != step.stated:
            return False
        common = numbers.keys() & step.numbers.keys()
        moved = {p for p in common if numbers[p] != step.numbers[p]}
        now = [leaves[i] for i in self._latents or ()]
        if any(all(map(_are_equal, then, now)) for then in step.latents.values() if then):
            is_other = step.is_zero if self.num_steps == 1 else self.path in moved
            return not (moved and is_other)
        return name not in step.counts and not moved


def _are_equal(a: Any, b: Any) -> bool:
    are_tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return are_tensors and a.shape == b.shape and torch.equal(a, b)


class ReadNumbers:
    """Reads the numbers of calls; waits for those on a device."""

    def __init__(self, known: TimestepArguments) -> None:
        self._reader = Reader(known)

    def __call__(self, structure: Structure, leaves: Sequence[Any]) -> Numbers:
        """Returns the numbers of a call that may be its timestep."""
        found = self._reader.read(structure, leaves, {})
        readings = {p: r if isinstance(r, Reading) else r() for p, r in found.items()}
        return {p: r.number for p, r in readings.items() if r.number is not None}
