"""Runs generations of a model, or of a pipeline, by a schedule: nothing is compiled for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pabc.api import compile
from pabc.calibration.hearing import Hearing, name_call
from pabc.calibration.recording import Recording
from pabc.calibration.results import as_tensors
from pabc.calibration.steps import ReadNumbers, Steps
from pabc.calibration.watch import Watch
from pabc.compiled import CompiledModel
from pabc.pipelines import CompiledPipeline, compile_pipeline
from pabc.runtime.listening import HeardCall
from pabc.schedule import Schedule

Sample = Callable[[Any, int], Any]
"""`sample(model, seed)` runs one full generation with the model, and returns its result."""

UNKNOWN = Schedule.none((0,))
"""The schedule of a model with unknown timesteps: each call is a generation of its own."""


@dataclass
class Run:
    """One generation that was run.

    Attributes:
        result: the numbers in what it returned.
        watch: what was seen of its calls.
        recording: the inner products, if it was recorded.
    """

    result: list[torch.Tensor]
    watch: Watch
    recording: Recording | None = None


@dataclass(frozen=True)
class FirstSteps:
    """The first steps of a generation.

    Attributes:
        timesteps: those that are known.
        is_whole: whether they are those of all steps.
        inputs: step -> numbers out of the inputs of its first call.
        precision: of the first call.
    """

    timesteps: tuple[float, ...]
    is_whole: bool
    inputs: Mapping[int, Sequence[torch.Tensor]]
    precision: str


class _Seen(BaseException):
    """Leaves a generation of which enough was seen."""


class Subject:
    """A model, or a pipeline, whose generations follow the schedule that each run is given.

    Used as a context, at whose end a pipeline is what it was before.

    Attributes:
        timesteps: of the steps of a generation; None: not known yet.
    """

    timesteps: tuple[float, ...] | None

    def __init__(
        self,
        model: Any,
        *,
        components: Iterable[str] | None = None,
        timesteps: tuple[float, ...] | None = None,
    ) -> None:
        """`components`: as in :func:`pabc.compile_pipeline`.

        Raises TypeError for what is neither a module nor a pipeline.
        """
        self.timesteps = timesteps
        self._schedule: Schedule | None = None
        self._is_pipeline = not isinstance(model, nn.Module)
        self._stack = ExitStack()
        self._given: Any
        self._models: Mapping[str, CompiledModel]
        if not self._is_pipeline:
            own = model._orig_mod if isinstance(model, CompiledModel) else model
            self._given = compile(own, UNKNOWN, backend="original")
            self._models = {"": self._given}
        elif hasattr(model, "scheduler") and not isinstance(model, CompiledPipeline):
            self._given = compile_pipeline(
                model, self._bind, backend="original", components=components
            )
            self._models = self._given.models
            self._stack.callback(self._given.undo)
        else:
            raise TypeError(
                "model: expected a torch.nn.Module, or a pipeline with a scheduler that is not "
                f"compiled, found {type(model).__name__}"
            )

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def record(self, sample: Sample, seed: int) -> Run:
        """Runs a full generation, and records it.

        Raises ValueError where no call of the model is heard, or none has latents to be found.
        """
        hearing = Hearing()
        ear = _Ear(self._models.values(), hearing)
        run = self._run(sample, seed, None, ear)
        if not hearing.num_steps:
            raise ValueError(
                "sample: expected it to call the model that it is given, found no call; "
                "`sample(model, seed)` is to use its first argument"
            )
        if not self._is_pipeline and self.timesteps is None:
            self.timesteps = ear.timesteps()
        run.recording = hearing.finish(self.timesteps).recording
        return run

    def open(self, sample: Sample, seed: int, last: int) -> FirstSteps:
        """Runs the first steps of a full generation, up to the first call of the step `last`."""
        self.timesteps = None
        ear = _Ear(self._models.values(), None, last)
        with suppress(_Seen):
            self._run(sample, seed, None, ear)
        told, self.timesteps = self.timesteps, None
        timesteps = ear.timesteps() if told is None else told
        return FirstSteps(timesteps, told is not None, ear.watch.opening, ear.watch.precision)

    def run(self, sample: Sample, seed: int, schedule: Schedule | None) -> Run:
        """Runs a generation by a schedule; None: in full."""
        return self._run(sample, seed, schedule, _Ear(self._models.values(), None))

    def fallbacks(self) -> dict[str, int]:
        """Returns why calls were computed that the schedules skip; see :class:`pabc.Stats`."""
        counts: Counter[str] = Counter()
        for model in self._models.values():
            counts.update(model.stats.fallbacks)
        return dict(counts)

    @torch.no_grad()
    def _run(self, sample: Sample, seed: int, schedule: Schedule | None, ear: _Ear) -> Run:
        self._schedule = schedule
        if not self._is_pipeline:
            self._given.reset()
            self._given.schedule = schedule or self._full()
            ear.counts_steps = self.timesteps is None
        with ear:
            result = sample(self._given, seed)
        if not self._is_pipeline:
            self._given.reset()
        return Run(as_tensors(result), ear.watch)

    def _full(self) -> Schedule:
        return UNKNOWN if self.timesteps is None else Schedule.none(self.timesteps)

    def _bind(self, timesteps: tuple[float, ...]) -> Schedule:
        """Returns the schedule for the timesteps that a pipeline is about to run."""
        self.timesteps = timesteps
        return self._schedule or Schedule.none(timesteps)


class _Ear:
    """Listens to models during one generation: times their calls, and may record them.

    Attributes:
        counts_steps: whether steps are told from the calls, not from the schedule.
    """

    def __init__(
        self, models: Iterable[CompiledModel], hearing: Hearing | None, last: int | None = None
    ) -> None:
        """`last`: the step at whose first call the generation is left; None: it is not."""
        self.watch = Watch()
        self.counts_steps = False
        self._models = list(models)
        self._hearing, self._last = hearing, last
        self._steps = Steps(ReadNumbers(self._models[0]._programs.timesteps))
        self._place: tuple[int, str] = -1, ""

    def __enter__(self) -> None:
        for model in self._models:
            model.listen(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for model in self._models:
            model.unlisten(self)

    def timesteps(self) -> tuple[float, ...]:
        """Returns the timesteps that were told from the calls."""
        return self._steps.timesteps

    def begin(self, call: HeardCall) -> None:
        """Starts the clock; places a call whose step is told from the calls."""
        if self.counts_steps:
            self._find_step(call)
        self.watch.start()

    def end(self, call: HeardCall, result: Any) -> None:
        """Stops the clock, and keeps the call if it is recorded."""
        seconds = self.watch.stop()
        if self.counts_steps:
            self._steps.end(_name_of(call), call.leaves, result)
        elif call.branch is None:
            return  # a call that is no step
        else:
            self._place = call.step, name_call(*call.branch)
        step, name = self._place
        self.watch.note(step, seconds, call.leaves, was_reused=call.was_reused)
        if self._hearing is not None:
            model = self._models.index(call.model)
            self._hearing.hear(step, name, call.leaves, call.structure, result, model=model)
        if self._last is not None and step >= self._last:
            raise _Seen

    def _find_step(self, call: HeardCall) -> None:
        name = _name_of(call)
        stated = None if call.where is None else call.where.step
        found = self._steps.begin(name, call.leaves, call.structure, stated)
        if found.is_new and self._place[0] > 0:
            raise ValueError(
                "sample: expected one generation, found that another begins after "
                f"{self._place[0] + 1} steps"
            )
        if found.order:
            raise ValueError(
                "model: expected a name for each of several calls in one step, found two "
                f"{'without' if name is None else f'named {name!r}'}: call it within "
                '`with model.cache_context("cond"):`'
            )
        self._place = found.index, name_call(name, 0)
        call.trajectory.at_step(0)


def _name_of(call: HeardCall) -> str | None:
    return None if call.where is None else call.where.name
