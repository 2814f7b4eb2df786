"""What those who listen to the calls of a compiled model are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pabc.base.structure import Structure
from pabc.runtime.where import Where
from pabc.schedule import Schedule

if TYPE_CHECKING:
    from pabc.runtime.trajectory import BranchKey, Trajectory


@dataclass(slots=True)
class HeardCall:
    """A call of a compiled model.

    Attributes:
        model: the compiled model.
        trajectory: the generation that the call belongs to.
        where: its name, and what is stated beside it; None: nothing.
        leaves, structure: its arguments, flattened.
        branch: the name and the order of the call in its step; None before the step is known, and
            for a call that is no step of the schedule.
        step: the step that it was; -1 before that is known.
        was_reused: whether the step reused anything.
    """

    model: Any
    trajectory: Trajectory
    where: Where | None
    leaves: Sequence[Any]
    structure: Structure
    branch: BranchKey | None = None
    step: int = -1
    was_reused: bool = False


class Listener(Protocol):
    """What is told of each call of a compiled model, but for those in private trajectories."""

    def begin(self, call: HeardCall) -> None:
        """Is told of a call before it is known which step it is: may state that."""

    def end(self, call: HeardCall, result: Any) -> None:
        """Is told of a call that ran to its end, and of its result."""


class Planning(Listener, Protocol):
    """A listener that states what generations follow."""

    def schedule(self) -> Schedule | None:
        """Returns what the last generation was planned to follow; None: nothing is planned yet."""

    def end_generation(self, trajectory: Trajectory) -> None:
        """Is told that a trajectory was reset by its user."""

    def detach(self) -> None:
        """Leaves generations to the model's schedule."""
