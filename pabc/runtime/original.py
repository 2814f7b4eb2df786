"""Serves calls by the model itself, as its user has set it up, or by a forecast of its outputs.

Nothing is captured. There is one slot, of kind `model`: it keeps the tensors that a call returns. A
step that reuses it runs nothing of the model.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule

from pabc.base.format import format_bytes
from pabc.explanation import Explanation
from pabc.options import Options
from pabc.passes import forecast
from pabc.plan import SlotSpec
from pabc.runtime.bindings import Binding
from pabc.runtime.branch import Branch, ServedCall
from pabc.runtime.configuration import Configurations
from pabc.runtime.executables import Executable, SlotIndices, StepValues
from pabc.runtime.leftovers import Leftovers
from pabc.runtime.original_source import CallForm, Numbers, OriginalSource
from pabc.runtime.result import Result
from pabc.runtime.serving import Contexts
from pabc.runtime.timesteps import TimestepArguments
from pabc.schedule import Schedule

SLOT = 0
"""The index of the only slot."""
KIND = "model"
"""The only kind that can be reused."""
_AS_IT_IS = nullcontext()


class OriginalCall(NamedTuple):
    """A call of the model.

    Attributes:
        function: the model, or its forward, where the model's hooks run around it already.
        args, kwargs: as the caller passed them.
        leaves: the same, flattened.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]


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
        reason: why the model is not captured, if it was tried.
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
        slots: the one slot; its bytes are known once a result was kept.
    """

    writes_to_arguments = False

    def __init__(self, original: Original, form: CallForm | None, leaves: Sequence[Any]) -> None:
        self._original = original
        self._form = form
        self._numbers = None if form is None else Numbers(form.structure, leaves)
        self._leftovers = Leftovers()
        self._source: OriginalSource | None = None
        self._bindings: dict[Schedule, Binding] = {}
        self._results: weakref.WeakKeyDictionary[Branch, Result] = weakref.WeakKeyDictionary()
        self.slots = (SlotSpec(KIND, KIND, 0),)

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
        binding = self._bindings.get(schedule)
        if binding is None:
            check_kinds(schedule, self._original.reason)
            plan = schedule.plan(self.slots)
            _check_budget(plan.peak_bytes, self._original.options.memory_budget)
            binding = self._bindings[schedule] = Binding.of(
                plan, (SLOT,) if plan.slots else (), 1, torch.device("cpu")
            )
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
            self._leftovers.num_trials,
        )
        if source != self._source:
            self._source = source
        assert self._source is not None
        return ServedCall(inputs, binding, self._source, None, self)

    def executable(
        self, binding: Binding, reused: SlotIndices, step: int, inputs: Sequence[Any]
    ) -> Executable:
        """Returns what runs a step that reuses these slots: none, or the one."""
        if reused:
            return SkippedCall(self)
        return ComputedCall(self, keeps=bool(binding.steps[step].readable))

    def write_to_arguments(self, bound: Any, leaves: list[Any], inputs: list[Any]) -> None:
        """Does nothing: the model itself writes to its arguments."""

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Returns the model's result."""
        return outputs[0]

    def compute(self, call: OriginalCall) -> Any:
        """Calls the model. Raises: ValueError if it keeps leaving something behind."""
        original, leftovers = self._original, self._leftovers
        with (
            nullcontext()
            if leftovers.are_known
            else leftovers.watching(original.model, call.args, call.kwargs)
        ):
            result = call.function(*call.args, **call.kwargs)
        original.configurations.end_call()
        return result

    def keep(self, step: StepValues, result: Any, unwritten: Mapping[int, int]) -> None:
        """Notes copies of a result's tensors for later steps.

        `unwritten`: the tensors among the arguments that the call did not write to.
        """
        options = self._original.options
        described = Result.of(result, unwritten, options.cache_dtype)
        branch = step.branch
        assert isinstance(branch, Branch)
        earlier = self._results.get(branch)
        if earlier is not None and not described.has_form_of(earlier):
            branch.slots.clear()
        self._results[branch] = described
        kept = described.keep(result, in_host_memory=options.offload == "cpu")
        step.write(SLOT, kept)
        self._measure(sum(tensor.nbytes for tensor in kept))

    def forecast(self, step: StepValues) -> Any:
        """Returns the result that a step reuses, in tensors of its own."""
        branch = step.branch
        assert isinstance(branch, Branch)
        described = self._results[branch]
        reused = step.read(SLOT)
        assert reused is not None
        with torch.no_grad():
            histories = zip(*map(described.decode, reused.history), strict=True)
            tensors = [_forecast(values, reused.weights) for values in histories]
        return described.build(tensors, step.inputs[0].leaves)

    def warn_of_writes(self, leaves: Sequence[int]) -> None:
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

    def _measure(self, nbytes: int) -> None:
        if not self.slots[SLOT].nbytes:
            self.slots = (SlotSpec(KIND, KIND, 0, nbytes),)
            self._bindings.clear()


@dataclass(frozen=True, slots=True)
class ComputedCall:
    """Runs a step by calling the model.

    Attributes:
        program: the program that serves the call.
        keeps: whether a later step may read the result.
    """

    program: OriginalProgram
    keeps: bool

    def run(self, step: StepValues) -> Sequence[Any]:
        """Calls the model, and returns its result as the only output."""
        call = step.inputs[0]
        before = list(map(_version, call.leaves))
        result = self.program.compute(call)
        after = list(map(_version, call.leaves))
        if before != after:
            self.program.warn_of_writes([i for i, v in enumerate(before) if v != after[i]])
        if self.keeps:
            unwritten = {
                id(x): i
                for i, x in enumerate(call.leaves)
                if after[i] >= 0 and before[i] == after[i]
            }
            self.program.keep(step, result, unwritten)
        return [result]


@dataclass(frozen=True, slots=True)
class SkippedCall:
    """Runs a step by what was kept of earlier ones: nothing of the model runs."""

    program: OriginalProgram

    def run(self, step: StepValues) -> Sequence[Any]:
        """Returns the forecast result as the only output."""
        return [self.program.forecast(step)]


def _forecast(values: Sequence[torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """Returns what follows from kept values, the newest first, as a tensor of its own."""
    result = forecast(values, weights)
    return result.clone() if result is values[0] else result


def _version(leaf: Any) -> int:
    """Returns a number that a write to a tensor changes; -1 if there is none."""
    is_tracked = isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    return leaf._version if is_tracked else -1


def names_only_calls(schedule: Schedule) -> bool:
    """Returns whether a schedule reuses nothing but whole calls."""
    return not _other_kinds(schedule)


def check_kinds(schedule: Schedule, reason: str = "") -> None:
    """Raises ValueError for a schedule that reuses anything but whole calls.

    `reason`: why the model was not captured, if it was tried.
    """
    others = _other_kinds(schedule)
    if others:
        why = f"the model cannot be captured ({reason})" if reason else "nothing is captured of it"
        raise ValueError(
            f"schedule: expected only kind {KIND!r} with backend='original', found "
            f"{', '.join(others)}: the model is called as it is, and {why}"
        )


def advise(error: ValueError, schedule: Schedule) -> ValueError | None:
    """Returns the error of a model that cannot be captured, with what helps; None if nothing does:
    the schedule needs what is within the model."""
    if not (schedule.reuses and names_only_calls(schedule)):
        return None
    return ValueError(
        f"{error}; or use backend='original', which captures nothing: the schedule only skips "
        "whole calls"
    )


def _other_kinds(schedule: Schedule) -> list[str]:
    slot = SlotSpec(KIND, KIND, 0)
    kinds = [f"kind {kind!r}" for kind in schedule.masks if kind != KIND]
    wanted = [o for o in schedule.overrides if any(o.mask)]
    return kinds + [str(o) for o in wanted if not o.matches(slot)]


def _check_budget(peak: int, budget: int | None) -> None:
    if budget is not None and peak > budget:
        raise ValueError(
            f"memory_budget: expected {peak} bytes ({format_bytes(peak)}) or more, for the "
            f"results of the model that the plan keeps, found {budget}"
        )
