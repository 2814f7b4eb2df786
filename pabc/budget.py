"""Chooses the slots that fit a memory budget and save the most work together.

Slots are first taken in the order of the work that they save per byte, while they fit; a branch and
bound search then tries others in their place. The budget limits the fullest step, so that slots
whose lifetimes do not overlap share memory. All arithmetic is on integers, so that all ranks choose
the same slots.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from pabc.base.format import format_bytes, format_numbers
from pabc.lifetimes import count_live
from pabc.plan import Plan

MAX_CHOICES = 2000
"""The most partial choices that are tried; if there are fewer, the result is optimal."""


@dataclass(frozen=True)
class Fit:
    """A plan that fits a budget, and the one that it was made from.

    Attributes:
        plan: the slots of `kept` do what they did; the others are computed at every step.
        full: the plan without a budget.
        budget: bytes.
        kept: ascending indices of the slots, among those that `full` reuses.
        saved: per slot, the floating-point operations that its reuse saves over a generation.
    """

    plan: Plan
    full: Plan
    budget: int
    kept: tuple[int, ...]
    saved: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """The slots that were to be reused, and are not: there is no room for them."""
        return tuple(j for j in _reused(self.full) if j not in self.kept)

    def __str__(self) -> str:
        """Returns the kept and the computed slots, with the figures that decided it."""
        reused = _reused(self.full)
        total = sum(self.saved[j] for j in reused) or 1
        share = sum(self.saved[j] for j in self.kept) / total
        return "\n".join(
            [
                f"  memory budget {format_bytes(self.budget)}: room for {len(self.kept)} of"
                f" {len(reused)} slots, {format_bytes(self.plan.peak_bytes)} of"
                f" {format_bytes(self.full.peak_bytes)}; they save {share:.1%} of the FLOPs that"
                " all would, the most per byte first:",
                *self._lines("kept", self.kept),
                *self._lines("computed", self.dropped),
            ]
        )

    def _lines(self, what: str, slots: Sequence[int]) -> list[str]:
        groups: dict[tuple[str, int, int], set[int]] = {}
        for j in slots:
            slot = self.full.slots[j]
            key = (slot.kind, slot.nbytes, self.saved[j])
            groups.setdefault(key, set()).add(slot.layer)
        rows = sorted(groups.items(), key=lambda row: -Fraction(row[0][2], row[0][1] or 1))
        return [
            f"    {what:<8}  {kind} {format_numbers(layers)}: {format_bytes(nbytes)} each, saves"
            f" {saved / 1e9:.3f} GFLOP a generation, {saved / (nbytes or 1):,.0f} a byte"
            for (kind, nbytes, saved), layers in rows
        ]


def fit_plan(plan: Plan, flops: Sequence[int], budget: int) -> Fit:
    """Returns the plan with those of its slots that a budget has room for.

    Args:
        plan: what is to be reused if there is room.
        flops: per slot, what one run of its region costs.
        budget: bytes of stored values at the fullest step; see `Plan.peak_bytes`.

    Raises: ValueError if there is not room for one slot; it names the smallest useful budget.
    """
    reuses = plan.reuse.sum(axis=0)
    saved = tuple(int(count) * cost for count, cost in zip(reuses, flops, strict=True))
    candidates = _reused(plan)
    if not candidates or plan.peak_bytes <= budget:
        return Fit(plan, plan, budget, candidates, saved)
    live = count_live(plan.computed, plan.until).max(axis=0).tolist()
    needed = {j: live[j] * plan.slots[j].nbytes for j in candidates}
    smallest = min(candidates, key=needed.__getitem__)
    least = needed[smallest]
    if least > budget:
        raise ValueError(
            f"memory_budget: expected {least} bytes ({format_bytes(least)}) or more, for"
            f" {plan.slots[smallest].name!r} alone, found {budget}; all slots take"
            f" {plan.peak_bytes} ({format_bytes(plan.peak_bytes)})"
        )
    kept: set[int] = set()
    for level in _levels(plan, candidates):
        # What is not decided yet computes, so that slots of one level do not depend on each other.
        part = plan.without(set(candidates) - kept - set(level))
        kept.update(choose_slots(part, saved, budget, kept))
    fitted = plan.without(set(candidates) - kept)
    return Fit(fitted, plan, budget, tuple(sorted(kept)), saved)


def _levels(plan: Plan, slots: Sequence[int]) -> list[list[int]]:
    """Returns the slots by how many others contain them, the coarsest first."""
    names = {plan.slots[j].name for j in slots}
    depths = {j: len(names.intersection(plan.slots[j].outer)) for j in slots}
    return [[j for j in slots if depths[j] == depth] for depth in sorted(set(depths.values()))]


def choose_slots(
    plan: Plan, saved: Sequence[int], budget: int, chosen: Collection[int] = ()
) -> tuple[int, ...]:
    """Returns the slots that save the most together within a budget, of those that are reused.

    `chosen`: slots that are kept in any case.
    """
    live = count_live(plan.computed, plan.until)
    sizes = np.array([slot.nbytes for slot in plan.slots], dtype=np.int64)
    load = live[:, list(chosen)] @ sizes[list(chosen)]
    search = _Search(plan, saved, budget, live, load, frozenset(chosen))
    search.descend((), search.load, 0)
    return tuple(
        sorted(
            j
            for group, count in zip(search.groups, search.best, strict=True)
            for j in group.slots[:count]
        )
    )


def _reused(plan: Plan) -> tuple[int, ...]:
    return tuple(np.nonzero(plan.reuse.any(axis=0))[0].tolist())


@dataclass(frozen=True)
class _Group:
    """Interchangeable slots: of one size, with as many values at each step, saving the same work.

    `live`: how many values each of them keeps at each step.
    """

    slots: tuple[int, ...]
    nbytes: int
    saved: int
    live: npt.NDArray[np.int64]


class _Search:
    """Branch and bound over how many slots of each group are kept, the densest group first."""

    def __init__(
        self,
        plan: Plan,
        saved: Sequence[int],
        budget: int,
        live: npt.NDArray[np.int64],
        load: npt.NDArray[np.int64],
        chosen: frozenset[int],
    ) -> None:
        table = np.unique(np.column_stack([load, live]), axis=0)
        self.load, live = table[:, 0], table[:, 1:]
        self.groups = _group(plan, saved, live, chosen)
        self.budget = budget
        self.best: tuple[int, ...] = ()
        self._best_saved = -1
        self._num_choices = 0

    def descend(self, counts: tuple[int, ...], load: npt.NDArray[np.int64], saved: int) -> None:
        """Tries all numbers of the next group's slots that fit, the most first."""
        if len(counts) == len(self.groups):
            if saved > self._best_saved:
                self.best, self._best_saved = counts, saved
            return
        self._num_choices += 1
        group = self.groups[len(counts)]
        cost = group.live * group.nbytes
        rooms = (self.budget - load)[cost > 0] // cost[cost > 0]
        most = min(len(group.slots), int(rooms.min(initial=len(group.slots))))
        for count in range(most, -1, -1):
            later = load + cost * count
            total = saved + count * group.saved
            is_first = self._best_saved < 0
            if is_first or (
                self._num_choices < MAX_CHOICES
                and total + self._bound(len(counts) + 1, later) > self._best_saved
            ):
                self.descend((*counts, count), later, total)

    def _bound(self, first: int, load: npt.NDArray[np.int64]) -> int:
        """Returns an upper bound of what the groups from `first` on can save.

        It is the least over the steps of what fractions of slots could save in the step's room.
        """
        return min(
            (self._bound_at(step, first, int(load[step])) for step in range(len(load))), default=0
        )

    def _bound_at(self, step: int, first: int, load: int) -> int:
        room, saved = self.budget - load, 0
        for group in self.groups[first:]:
            cost = int(group.live[step]) * group.nbytes
            if not cost:
                saved += len(group.slots) * group.saved
                continue
            taken = min(room, len(group.slots) * cost)
            saved += taken * group.saved // cost
            room -= taken
        return saved


def _group(
    plan: Plan, saved: Sequence[int], live: npt.NDArray[np.int64], chosen: frozenset[int]
) -> tuple[_Group, ...]:
    """Returns groups of the reused slots that are still to be chosen, the densest first."""
    members: dict[tuple[int, int, bytes], list[int]] = {}
    for j in _reused(plan):
        if j in chosen:
            continue
        # Among choices that save equally many operations, prefers the one with more slots.
        worth = saved[j] * (len(saved) + 1) + 1
        key = (plan.slots[j].nbytes, worth, live[:, j].tobytes())
        members.setdefault(key, []).append(j)
    groups = [
        _Group(tuple(slots), nbytes, worth, live[:, slots[0]])
        for (nbytes, worth, _), slots in members.items()
    ]
    return tuple(sorted(groups, key=_density, reverse=True))


def _density(group: _Group) -> tuple[bool, Fraction]:
    """Returns a key that orders groups by what they save per byte, at their fullest step."""
    nbytes = group.nbytes * int(group.live.max(initial=0))
    return not nbytes, Fraction(group.saved, nbytes or 1)
