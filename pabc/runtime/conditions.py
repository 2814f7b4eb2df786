"""Which of several sequences of calls a call belongs to, told by the conditions it is given."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import copy

import torch

from pabc.runtime.guards import GuardError


class Conditions:
    """The tensors that each call of one sequence is given: the same objects, not equal values.

    The first call notes all its tensors, each later one drops those that it is not given again:
    from the second on, what is left are conditions (text, masks, positions), and a call without one
    of them is of another sequence. Where a caller builds all of them anew for each call, nothing is
    left, and nothing can be told.
    """

    def __init__(self) -> None:
        self._noted: dict[int, weakref.ref[torch.Tensor]] | None = None
        self._are_known = False

    def num_shared(self, tensors: Sequence[torch.Tensor]) -> int:
        """How many of these are among those noted."""
        return len(self._shared(tensors))

    @property
    def are_known(self) -> bool:
        """Whether a second call has told conditions from what changes."""
        return self._are_known

    def contradict(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a call with these tensors is of another sequence."""
        return self._are_known and self.num_shared(tensors) < len(self._noted or ())

    def note(self, tensors: Sequence[torch.Tensor]) -> None:
        """A call of this sequence was given these tensors."""
        if self._noted is None:
            self._noted = {id(tensor): weakref.ref(tensor) for tensor in tensors}
        else:
            self._noted, self._are_known = self._shared(tensors), True

    def _shared(self, tensors: Sequence[torch.Tensor]) -> dict[int, weakref.ref[torch.Tensor]]:
        noted = self._noted or {}
        here = [tensor for tensor in tensors if id(tensor) in noted]
        return {id(t): noted[id(t)] for t in here if noted[id(t)]() is t}


class Calls:
    """Tells the calls of one step apart, by their conditions where they can, else by order.

    One case is left to order wrongly: a step that makes more calls than the one before it, the new
    ones first, when that one was the first step of all, so that no condition is known yet.
    """

    def __init__(self) -> None:
        self._conditions: list[Conditions] = []
        self._taken: dict[int, tuple[Conditions, int]] = {}
        """The sequences continued in this step: as they were, and what the call shared."""

    def begin_step(self) -> None:
        """The calls that follow are those of another step."""
        self._taken.clear()

    def index_of(self, tensors: Sequence[torch.Tensor]) -> int:
        """Which sequence a call with these tensors continues; the next number for a new one.

        Raises GuardError where an earlier call of this step turns out to have taken its place.
        """
        fitting = [
            index
            for index, conditions in enumerate(self._conditions)
            if index not in self._taken and not conditions.contradict(tensors)
        ]
        shared = {index: self._conditions[index].num_shared(tensors) for index in fitting}
        index = max(fitting, key=lambda i: (shared[i], -i), default=len(self._conditions))
        if index == len(self._conditions):
            self._check_is_new(tensors)
            self._conditions.append(Conditions())
        conditions = self._conditions[index]
        self._taken[index] = copy(conditions), shared.get(index, 0)
        conditions.note(tensors)
        return index

    def _check_is_new(self, tensors: Sequence[torch.Tensor]) -> None:
        """After one call of a sequence, an unlike second one may have been taken for the next."""
        for before, num_shared in self._taken.values():
            if not before.are_known and before.num_shared(tensors) > num_shared:
                raise GuardError(
                    "expected the calls of a step in the order of the step before, found one that "
                    "continues what another call was taken to continue; name the calls: "
                    "`with fast.cache_context('cond'): ...`"
                )
