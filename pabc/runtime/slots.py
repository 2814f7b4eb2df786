"""The slots of a branch, and the values that they hold between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from pabc.base.memory import without_spare_memory
from pabc.passes import Cuts
from pabc.runtime.stats import Recorder


class FreshCuts(NamedTuple):
    """Cuts that a step computed for a slot, and the last step that may read them."""

    slot: int
    cuts: Cuts
    until: int


class HeldCuts(NamedTuple):
    """A value of a slot: cuts, the step that computed them, the last that may read them."""

    cuts: Cuts
    step: int
    until: int
    nbytes: int


class HeldSlots:
    """The slots of one branch that hold something: each a history of values, the newest first.

    The bytes are counted as long as the object lives.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._held: dict[int, tuple[HeldCuts, ...]] = {}
        self._account = recorder.account(self)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots keep alive."""
        return self._account.nbytes

    def hold(self, slots: Iterable[int]) -> bool:
        """Returns whether all these slots hold something."""
        return all(map(self._held.__contains__, slots))

    def sources(self, slot: int, depth: int) -> tuple[int, ...]:
        """Returns the steps that computed what a slot holds, the newest first, `depth` at most."""
        return tuple(held.step for held in self._held.get(slot, ())[:depth])

    def read(self, slot: int, depth: int) -> tuple[Cuts, ...]:
        """Returns the newest values of a slot, `depth` of them, or one for 0.

        Where it holds fewer, the oldest stands in for those that are missing; its weight there is
        to be 0.
        """
        history = self._held[slot]
        num = max(depth, 1)
        cuts = [held.cuts for held in history[:num]]
        return (*cuts, *(cuts[-1:] * (num - len(cuts))))

    def read_flat(self, slots: Sequence[int], depths: Sequence[int]) -> list[torch.Tensor]:
        """Returns what these slots hold, one after the other, each the newest first."""
        pairs = zip(slots, depths, strict=True)
        return [cut for slot, depth in pairs for cuts in self.read(slot, depth) for cut in cuts]

    def put(self, fresh: Sequence[FreshCuts], step: int, depths: Sequence[int]) -> int:
        """Adds to slots what `step` computed, in the place of what it computed for them before.

        `depths`: for every slot, how many values it keeps, but 1 for 0.
        Returns how many of the slots held nothing of this step before.
        """
        change = num_stored = 0
        for slot, computed, until in fresh:
            cuts = tuple(map(without_spare_memory, computed))
            history = self._held.get(slot, ())
            older = history[1:] if history and history[0].step == step else history
            kept = (HeldCuts(cuts, step, until, _count_bytes(cuts)), *older)
            self._held[slot] = kept = kept[: max(depths[slot], 1)]
            num_stored += older is history
            change += _sum_bytes(kept) - _sum_bytes(history)
        if change:
            self._account.set(self._account.nbytes + change)
        return num_stored

    def copy(self, other: HeldSlots, before: int) -> None:
        """Holds what other slots hold of the steps before one, in the place of what these hold."""
        pairs = other._held.items()
        older = {slot: tuple(h for h in history if h.step < before) for slot, history in pairs}
        self._held = {slot: history for slot, history in older.items() if history}
        self._account.set(sum(map(_sum_bytes, self._held.values())))

    def free_last_reads(self, slots: Iterable[int], step: int) -> None:
        """Frees those values of `slots` that no step after `step` reads."""
        self._keep_those(slots, lambda held: held.until != step)

    def free_before(self, step: int) -> None:
        """Frees what no step from `step` on reads, or was computed at one of these."""
        self._keep_those(list(self._held), lambda held: held.step < step <= held.until)

    def clear(self) -> None:
        """Frees all slots."""
        self._held.clear()
        self._account.set(0)

    def _keep_those(self, slots: Iterable[int], is_kept: Callable[[HeldCuts], bool]) -> None:
        change = 0
        for slot in slots:
            history = self._held.get(slot, ())
            kept = tuple(filter(is_kept, history))
            if len(kept) == len(history):
                continue
            change += _sum_bytes(kept) - _sum_bytes(history)
            if kept:
                self._held[slot] = kept
            else:
                del self._held[slot]
        if change:
            self._account.set(self._account.nbytes + change)


def _sum_bytes(history: Iterable[HeldCuts]) -> int:
    return sum(held.nbytes for held in history)


def _count_bytes(cuts: Cuts) -> int:
    """Returns the bytes of the memory that the cuts lie in, counted once where they share it."""
    if len(cuts) == 1:
        return cuts[0].untyped_storage().nbytes()
    storages = [t.untyped_storage() for t in cuts]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no element is NaN or infinite. Waits for the tensor's device."""
    if not tensor.is_floating_point():
        return True
    if tensor.is_pinned():
        torch.cuda.synchronize()  # it may be on its way from the device
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # 8-bit formats lack some ops
    return bool(torch.isfinite(tensor).all())
