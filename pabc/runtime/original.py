"""Serves calls by the model itself, as its user has set it up, or by a forecast of its outputs.

Nothing is captured. There is one slot, of kind `model`: it keeps the tensors that a call returns. A
step that reuses it runs nothing of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pabc.base.format import format_bytes
from pabc.explanation import Explanation
from pabc.options import Options
from pabc.plan import SlotSpec
from pabc.runtime.bindings import Binding
from pabc.runtime.configuration import Configurations
from pabc.runtime.executables import Executable, SlotIndices
from pabc.runtime.leftovers import Leftovers
from pabc.runtime.original_calls import SLOT, ComputedCall, KeptResults, OriginalCall, SkippedCall
from pabc.runtime.original_source import CallForm, Numbers, OriginalSource
from pabc.runtime.serving import Contexts
from pabc.runtime.step import ServedCall
from pabc.runtime.timesteps import TimestepArguments
from pabc.runtime.whole_calls import WHOLE_CALL, check_kinds
from pabc.schedule import Schedule

_AS_IT_IS = nullcontext()


@dataclass(frozen=True)
class Original:
    """A model that is called as it is.

    Attributes:
        model: the model.
        own_call: returns the function that a call of the model runs without pabc.
        forward: returns the function that runs within the model's hooks.
        options: how results are kept.
        timesteps: which arguments are known as timesteps.
        configurations: of the model.
        reason: why the model is called as it is, if that was not asked for.
        warned: the names of the inputs that it was seen to write to.
    """

    model: nn.Module
    own_call: Callable[[], Callable[..., Any]]
    forward: Callable[[], Callable[..., Any]]
    options: Options
    timesteps: TimestepArguments
    configurations: Configurations
    reason: str = ""
    warned: set[str] = field(default_factory=set)


class OriginalProgram:
    """Serves the calls of one form, whatever the schedule. See :class:`Program`.

    Attributes:
        writes_to_arguments: always False: the model itself writes to what it is passed.
        left_out: empty: nothing is missing.
    """

    writes_to_arguments = False
    left_out: tuple[str, ...] = ()

    def __init__(self, original: Original, form: CallForm | None, leaves: Sequence[Any]) -> None:
        self._original = original
        self._form = form
        self._numbers = None if form is None else Numbers(form.structure, leaves)
        self._leftovers = Leftovers()
        self._source: OriginalSource | None = None
        self._bindings: dict[Schedule, Binding] = {}
        self._bound: tuple[Schedule | None, Binding | None] = None, None
        self._results = KeptResults(original.options)
        self._measured = WHOLE_CALL

    @property
    def slots(self) -> tuple[SlotSpec, ...]:
        """The one slot; its bytes are known once a result was kept."""
        if self._measured.nbytes != self._results.nbytes:
            self._measured = replace(WHOLE_CALL, nbytes=self._results.nbytes)
            self._bindings.clear()
            self._bound = None, None
        return (self._measured,)

    @property
    def calls_modules(self) -> bool:
        """True while calls are compared with what they leave behind."""
        return not self._leftovers.are_known

    def pack(
        self, leaves: list[Any], args: Any, kwargs: Any, *, within_hooks: bool
    ) -> list[OriginalCall]:
        """Returns the call as the one input of a step.

        `within_hooks`: whether the model's own hooks run around the step already.
        """
        find = self._original.forward if within_hooks else self._original.own_call
        return [OriginalCall(find(), args, kwargs, leaves)]

    def contexts(self, inputs: Sequence[Any]) -> Contexts:
        """Returns contexts that change nothing: gradients, autocast and weights are as the caller
        has them."""
        return _AS_IT_IS, _AS_IT_IS, _AS_IT_IS

    def bind(self, schedule: Schedule, inputs: Sequence[Any] | None = None) -> Binding:
        """Returns the schedule bound to the slot.

        Raises: ValueError for a schedule of other kinds, and for a memory budget without room.
        """
        slots = self.slots
        last, binding = self._bound
        if schedule is last and binding is not None:  # its hash would take longer
            return binding
        binding = self._bindings.get(schedule)
        if binding is None:
            check_kinds(schedule, self._original.reason)
            plan = schedule.plan(slots)
            _check_budget(plan.peak_bytes, self._original.options.memory_budget)
            binding = self._bindings[schedule] = Binding.of(
                plan, (SLOT,) if plan.slots else (), 1, torch.device("cpu")
            )
        self._bound = schedule, binding
        return binding

    def serve(self, inputs: list[Any], binding: Binding) -> ServedCall:
        """Returns a call as a branch begins it."""
        original, leaves = self._original, inputs[0].leaves
        assert self._form is not None and self._numbers is not None
        source = OriginalSource.of(
            self._form,
            leaves,
            self._numbers.moving(leaves, binding.plan.timesteps, original.timesteps),
            original.configurations.last,
        )
        if source != self._source:
            self._source = source
        assert self._source is not None
        doubt = "state" if self._leftovers.are_doubted else ""
        return ServedCall(inputs, binding, self._source, None, self, doubt)

    def executable(
        self, binding: Binding, reused: SlotIndices, step: int, inputs: Sequence[Any]
    ) -> Executable:
        """Returns what runs a step that reuses these slots: none, or the one."""
        if reused:
            return SkippedCall(self._results)
        reuses = bool(binding.plan.slots) and not self._leftovers.are_known
        compute = self._compute_watched if reuses else self._compute
        keeps = bool(binding.steps[step].readable)
        return ComputedCall(compute, self._warn_of_writes, self._results if keeps else None)

    def write_to_arguments(self, bound: Any, leaves: list[Any], inputs: list[Any]) -> None:
        """Does nothing: the model itself writes to its arguments."""

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Returns the model's result."""
        return outputs[0]

    def _compute(self, call: OriginalCall) -> Any:
        """Calls the model."""
        result = call.function(*call.args, **call.kwargs)
        self._original.configurations.end_call()
        return result

    def _compute_watched(self, call: OriginalCall) -> Any:
        """Calls the model. Raises: ValueError if it keeps leaving something behind."""
        with self._leftovers.watching(self._original.model, call.args, call.kwargs):
            result = call.function(*call.args, **call.kwargs)
        self._original.configurations.end_call()
        return result

    def _warn_of_writes(self, leaves: Sequence[int]) -> None:
        """Warns, once for each, of arguments that a call writes to."""
        assert self._form is not None
        original = self._original
        paths = original.timesteps.paths(self._form.structure)
        for name in (paths[i] for i in leaves):
            if name not in original.warned:
                original.warned.add(name)
                warnings.warn(
                    f"pabc: {type(original.model).__name__} writes to its input {name}; steps that "
                    "skip the call do not write to it",
                    stacklevel=7,
                )

    def prepare(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Does nothing: nothing is compiled."""

    def specialize(self, binding: Binding) -> tuple[GraphModule, ...]:
        """Returns nothing: there are no graphs."""
        return ()

    def facts(self, inputs: Sequence[Any], *, with_values: bool) -> dict[str, str]:
        """Returns nothing: each process follows the plan by itself."""
        return {}

    def explain(self, binding: Binding, unmatched: tuple[str, ...]) -> Explanation:
        """Returns the plan, and that nothing was looked for in the model."""
        form = self._form
        paths = () if form is None else self._original.timesteps.paths(form.structure)
        return Explanation(
            attention={},
            regions=(),
            flops={},
            outside=(),
            inputs=paths,
            latents="",
            plan=binding.plan,
            unmatched=unmatched,
            uncaptured=self._original.reason or "backend='original' asks for that",
        )


def _check_budget(peak: int, budget: int | None) -> None:
    if budget is not None and peak > budget:
        raise ValueError(
            f"memory_budget: expected {peak} bytes ({format_bytes(peak)}) or more, for the "
            f"results of the model that the plan keeps, found {budget}"
        )
