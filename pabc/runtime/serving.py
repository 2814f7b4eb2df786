"""The protocol between a compiled model and the programs that serve its calls."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch.fx import GraphModule

from pabc.base.structure import Structure
from pabc.explanation import Explanation
from pabc.plan import SlotSpec
from pabc.runtime.bindings import Binding
from pabc.runtime.stats import Recorder
from pabc.runtime.step import ServedCall
from pabc.runtime.timesteps import TimestepArguments
from pabc.schedule import Schedule

Contexts = tuple[
    AbstractContextManager[object], AbstractContextManager[object], AbstractContextManager[object]
]
"""The contexts that a step runs within: gradients, autocast, weights."""


class ServingProgram(Protocol):
    """Serves the calls of one form: :class:`Program`, or :class:`OriginalProgram`."""

    @property
    def slots(self) -> tuple[SlotSpec, ...]:
        """The slots that may be reused, as a plan needs them."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """A message for each coarser region that cannot be reused, with the reason."""

    @property
    def calls_modules(self) -> bool:
        """True if steps of different threads must not run at the same time."""

    @property
    def writes_to_arguments(self) -> bool:
        """True if what a step computes is written to the caller's arguments."""

    def pack(self, leaves: list[Any], args: Any, kwargs: Any, *, within_hooks: bool) -> list[Any]:
        """Returns the inputs of a step from the arguments, flattened and as they were passed.

        `within_hooks`: whether the model's own hooks run around the step already.
        """

    def write_to_arguments(self, bound: Any, leaves: list[Any], inputs: list[Any]) -> None:
        """Writes to the caller's arguments, given bound and flattened, what a step computed."""

    def contexts(self, inputs: list[Any]) -> Contexts:
        """Returns what a step with these inputs runs within."""

    def bind(self, schedule: Schedule, inputs: Sequence[Any] | None = None) -> Binding:
        """Returns the schedule bound to the slots."""

    def serve(self, inputs: list[Any], binding: Binding) -> ServedCall:
        """Returns a call with these inputs as a branch begins it."""

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Returns the model's result."""

    def facts(self, inputs: Sequence[Any], *, with_values: bool) -> dict[str, str]:
        """Returns what must be the same on all ranks that share the model."""

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Compiles every phase now, for inputs like these."""

    def specialize(self, binding: Binding) -> tuple[GraphModule, ...]:
        """Returns one specialized module per phase, in the plan's order."""

    def explain(self, binding: Binding, unmatched: tuple[str, ...]) -> Explanation:
        """Returns what was found in the model, and the plan."""


class ServingPrograms(Protocol):
    """The programs of one model: :class:`Programs`, or :class:`OriginalPrograms`.

    Attributes:
        recorder: what counts.
        timesteps: which arguments are known as timesteps.
        runs_hooks: whether the model's own hooks run within a step; else they run around it.
    """

    recorder: Recorder
    timesteps: TimestepArguments
    runs_hooks: bool

    def __len__(self) -> int:
        """Returns how many forms of calls are served."""

    def items(self) -> Sequence[tuple[Any, ServingProgram]]:
        """Returns every program with a key of the calls that it serves."""

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError for a schedule that no program can follow."""

    def find(
        self, structure: Structure, leaves: list[Any], *, at_start: bool
    ) -> ServingProgram | None:
        """Returns the program that serves a call, or None."""

    def capture(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        structure: Structure,
        schedule: Schedule,
    ) -> ServingProgram:
        """Captures the model for a call that no program serves, given bound and flattened."""
