"""Runs a step of a model that is not captured: calls it, or forecasts its result."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pabc.internals.tensors import version_of
from pabc.options import Options
from pabc.passes import forecast_cut
from pabc.runtime.branch import Branch
from pabc.runtime.executables import StepValues
from pabc.runtime.result import Result

SLOT = 0
"""The index of the only slot."""


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


class KeptResults:
    """The parts of results that are kept beside the tensors in the slots of branches.

    Attributes:
        nbytes: the bytes of the tensors that were first kept; 0 before.
    """

    def __init__(self, options: Options) -> None:
        self.nbytes = 0
        self._options = options
        self._results: weakref.WeakKeyDictionary[Branch, Result] = weakref.WeakKeyDictionary()

    def keep(self, step: StepValues, result: Any, unwritten: Mapping[int, int]) -> None:
        """Notes copies of a result's tensors for later steps.

        `unwritten`: the tensors among the arguments that the call did not write to.
        """
        branch = step.branch
        assert isinstance(branch, Branch)
        described = Result.of(result, unwritten, self._options.cache_dtype)
        earlier = self._results.get(branch)
        if earlier is not None and not described.has_form_of(earlier):
            branch.slots.clear()
        self._results[branch] = described
        kept = described.keep(result, in_host_memory=self._options.offload == "cpu")
        step.write(SLOT, kept)
        self.nbytes = self.nbytes or sum(tensor.nbytes for tensor in kept)

    def forecast(self, step: StepValues) -> Any:
        """Returns the result that a step reuses, in tensors of its own."""
        branch, reused = step.branch, step.read(SLOT)
        assert isinstance(branch, Branch)
        assert reused is not None
        described = self._results.get(branch) or self._described(branch.origin)
        with torch.no_grad():
            histories = zip(*map(described.decode, reused.history), strict=True)
            tensors = [_forecast(values, reused.weights) for values in histories]
        return described.build(tensors, step.inputs[0].leaves)

    def _described(self, branch: Branch | None) -> Result:
        """Returns the description of what a branch keeps that another has begun as a copy of."""
        assert branch is not None
        return self._results[branch]


@dataclass(frozen=True, slots=True)
class ComputedCall:
    """Runs a step by calling the model.

    Attributes:
        compute: calls the model.
        warn_of_writes: is told which arguments the call writes to.
        results: what keeps the result; None: no later step reads it.
    """

    compute: Callable[[OriginalCall], Any]
    warn_of_writes: Callable[[Sequence[int]], None]
    results: KeptResults | None

    def run(self, step: StepValues) -> Sequence[Any]:
        """Calls the model, and returns its result as the only output."""
        call: OriginalCall = step.inputs[0]
        before = list(map(_version, call.leaves))
        result = self.compute(call)
        after = list(map(_version, call.leaves))
        if before != after:
            self.warn_of_writes([i for i, v in enumerate(before) if v != after[i]])
        if self.results is not None:
            pairs = enumerate(zip(before, after, strict=True))
            unwritten = {id(call.leaves[i]): i for i, (a, b) in pairs if a == b >= 0}
            self.results.keep(step, result, unwritten)
        return [result]


@dataclass(frozen=True, slots=True)
class SkippedCall:
    """Runs a step by what was kept of earlier ones: nothing of the model runs."""

    results: KeptResults

    def run(self, step: StepValues) -> Sequence[Any]:
        """Returns the forecast result as the only output."""
        return [self.results.forecast(step)]


def _forecast(values: Sequence[torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """Returns what follows from kept values, the newest first, as a tensor of its own."""
    result = forecast_cut(values, weights)
    return result.clone() if result is values[0] else result


def _version(leaf: Any) -> int:
    """Returns a number that a write to a tensor changes; -1 if there is none."""
    is_tracked = isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    return version_of(leaf) if is_tracked else -1
