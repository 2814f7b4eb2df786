"""The slots of a branch, and the values that they hold between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """The value of a slot: cuts, the step that computed them, the last that may read them."""

    cuts: Cuts
    step: int
    until: int
    nbytes: int


class HeldSlots:
    """The slots of one branch that hold something; the bytes are counted as long as it lives."""

    def __init__(self, recorder: Recorder) -> None:
        self._held: dict[int, HeldCuts] = {}
        self._account = recorder.account(self)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots keep alive."""
        return self._account.nbytes

    def hold(self, slots: Iterable[int]) -> bool:
        """Returns whether all these slots hold something."""
        return all(map(self._held.__contains__, slots))

    def read(self, slot: int) -> Cuts:
        """Returns what a slot holds."""
        return self._held[slot].cuts

    def read_flat(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Returns what these slots hold, one after the other."""
        return [cut for slot in slots for cut in self._held[slot].cuts]

    def put(self, fresh: Sequence[FreshCuts], step: int) -> int:
        """Replaces what slots hold by what `step` computed.

        Returns how many of the slots held nothing of this step before.
        """
        added = num_stored = 0
        for slot, computed, until in fresh:
            cuts = tuple(map(without_spare_memory, computed))
            nbytes = _count_bytes(cuts)
            before = self._held.get(slot)
            self._held[slot] = HeldCuts(cuts, step, until, nbytes)
            num_stored += before is None or before.step != step
            added += nbytes - (0 if before is None else before.nbytes)
        if added:
            self._account.set(self._account.nbytes + added)
        return num_stored

    def free_last_reads(self, slots: Iterable[int], step: int) -> None:
        """Frees those of `slots` whose value no step after `step` reads."""
        held = self._held
        self._remove([j for j in slots if j in held and held[j].until == step])

    def free_before(self, step: int) -> None:
        """Frees what no step from `step` on reads, or was computed at one of these."""
        held = self._held.items()
        self._remove([j for j, h in held if h.until < step or h.step >= step])

    def clear(self) -> None:
        """Frees all slots."""
        self._held.clear()
        self._account.set(0)

    def _remove(self, slots: Sequence[int]) -> None:
        removed = sum([self._held.pop(slot).nbytes for slot in slots])
        if removed:
            self._account.set(self._account.nbytes - removed)


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
