"""Tells which of several sequences of calls a call continues, by the conditions it is given."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import copy

import torch

from pabc.runtime.guards import GuardError


class Conditions:
    """The tensors that every call of one sequence is given; the same objects, not equal values.

    The first call notes all its tensors, and each later one drops those that it is not given. From
    the second call on, what is left are conditions (text, masks, positions): a call without one of
    them belongs to another sequence. Nothing is left, and no call can be told from another, where a
    caller builds new tensors for each call.
    """

    def __init__(self) -> None:
        self._noted: dict[int, weakref.ref[torch.Tensor]] | None = None
        self._are_known = False

    def num_shared(self, tensors: Sequence[torch.Tensor]) -> int:
        """Returns how many of these are among those noted."""
        return len(self._shared(tensors))

    @property
    def are_known(self) -> bool:
        """Returns True once a second call has told conditions from what changes."""
        return self._are_known

    def contradict(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Returns whether a call with these tensors belongs to another sequence."""
        return self._are_known and self.num_shared(tensors) < len(self._noted or ())

    def note(self, tensors: Sequence[torch.Tensor]) -> None:
        """Notes the tensors of a call of this sequence."""
        if self._noted is None:
            self._noted = {id(tensor): weakref.ref(tensor) for tensor in tensors}
        else:
            self._noted, self._are_known = self._shared(tensors), True

    def _shared(self, tensors: Sequence[torch.Tensor]) -> dict[int, weakref.ref[torch.Tensor]]:
        noted = self._noted or {}
        here = [tensor for tensor in tensors if id(tensor) in noted]
        return {id(t): noted[id(t)] for t in here if noted[id(t)]() is t}


class CallOrder:
    """Tells the calls of one step apart: by their conditions, or, where these are alike, by order.

    One case is told wrongly: the second step of all makes more calls than the first one, the new
    ones first. No condition is known yet then.
    """

    def __init__(self) -> None:
        self._conditions: list[Conditions] = []
        self._taken: dict[int, tuple[Conditions, int]] = {}
        """The sequences continued in this step: as before the call, and what the call shared."""

    def begin_step(self) -> None:
        """Starts another step."""
        self._taken.clear()

    def index_of(self, tensors: Sequence[torch.Tensor]) -> int:
        """Returns which sequence a call with these tensors continues; the next index for a new one.

        Raises GuardError where an earlier call of this step turns out to be of that sequence.
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
        """Raises GuardError if an earlier call of this step was assigned the sequence that this one
        continues: after its first call, a sequence accepts any second one."""
        for before, num_shared in self._taken.values():
            if not before.are_known and before.num_shared(tensors) > num_shared:
                raise GuardError(
                    "expected the calls of a step in the order of the step before, found one that "
                    "continues what another call was taken to continue; name the calls: "
                    "`with fast.cache_context('cond'): ...`"
                )
