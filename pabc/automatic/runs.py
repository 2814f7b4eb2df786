"""Runs plans on a recorded generation, with the compiled models themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from pabc.automatic.plans import PlannedCall
from pabc.calibration.candidates import Candidate
from pabc.calibration.costs import Costs
from pabc.calibration.hearing import HeardGeneration
from pabc.calibration.measurement import Measurement, schedule_of
from pabc.calibration.replay import MakeCall, Replay, Replayed
from pabc.calibration.updates import identify
from pabc.compiled import CompiledModel
from pabc.schedule import Schedule

SEED = 0
"""The seed that stands for the recorded generation."""


class ReplayedRuns:
    """Runs of a recorded generation by plans, each in trajectories of its own.

    Attributes:
        costs: the seconds of full and skipped calls, as far as they were measured.
        measured: what was run.
    """

    def __init__(
        self,
        heard: HeardGeneration,
        models: Sequence[CompiledModel],
        calls: Mapping[str, PlannedCall],
    ) -> None:
        """`calls`: what is called under each name in `heard`."""
        self._heard, self._models, self._calls = heard, models, calls
        self._replay = Replay(heard, identify(heard.recording))
        self._is_inference = any(
            isinstance(x, torch.Tensor) and x.is_inference()
            for call in heard.calls[0].values()
            for x in call.leaves
        )
        self._full: list[float] = []
        self._skipped: list[float] = []
        self.measured: list[Measurement] = []

    @property
    def can_run(self) -> bool:
        """True if the arguments are still those that were recorded."""
        return self._replay.can_run

    @property
    def residual(self) -> float:
        """The largest relative residual of the sampler's transitions, as they are replayed."""
        return float(self._replay.residual.max())

    @property
    def costs(self) -> Costs:
        """The seconds of full and skipped calls."""
        return Costs.of(self._full, self._skipped)

    @property
    def has_costs(self) -> bool:
        """True if a skipped call was measured."""
        return bool(self._skipped)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed that stands for the recorded generation, alone."""
        return (SEED,)

    def expect(self, runs: int) -> None:
        """Does nothing: no progress is shown."""

    def measure(self, candidate: Candidate, seed: int) -> Measurement:
        """Runs a plan, and returns how far its latents came from the recorded ones, in dB."""
        known = next((m for m in self.measured if m.plan == _plan(candidate)), None)
        if known is not None:
            return known
        recording = self._heard.recording
        schedule = schedule_of(candidate, recording.timesteps)
        replayed = self._run(schedule)
        skipped = np.ones(recording.num_steps, bool)
        skipped[list(candidate.computed)] = False
        self._full += replayed.seconds[~skipped][1:].tolist()  # the first computes more
        self._skipped += replayed.seconds[skipped].tolist()
        last = recording.num_steps - (not recording.has_result)
        error = max(float(replayed.errors[last]), 1e-12)
        found = 20 * float(np.log10(recording.peak / error))
        measured = Measurement(candidate, candidate.decibels(recording.peak), {SEED: found})
        self.measured.append(measured)
        return measured

    def find_change(self) -> str | None:
        """Returns in what the models are not what they were when they were recorded, as text; None:
        in nothing.

        Weights, flags, adapters and hooks matter by what they change: the calls of the first, a
        middle and the last step are made again, and give the recorded outputs, or do not.
        """
        timesteps = self._heard.recording.timesteps
        last = len(timesteps) - 1
        with self._following(Schedule.none(timesteps)) as call:
            for step in sorted({0, last // 2, last}):
                difference = self._replay.find_difference(step, call)
                if difference is not None:
                    return f"its outputs at step {step} differ by {difference:.1%} from those then"
        return None

    def _run(self, schedule: Schedule) -> Replayed:
        with self._following(schedule) as call:
            return self._replay.run(call)

    @contextmanager
    def _following(self, schedule: Schedule) -> Iterator[MakeCall]:
        """Gives what makes calls of the models that follow a schedule."""
        trajectories = [m.trajectory(schedule, private=True) for m in self._models]
        at = [-1] * len(trajectories)

        def call(step: int, name: str, index: int, args: Any, kwargs: Any) -> Any:
            model, trajectory = self._models[index], trajectories[index]
            if at[index] != step:
                trajectory.at_step(step)
                at[index] = step
            with trajectory, _named(model, self._calls[name]):
                return model(*args, **kwargs)

        with torch.inference_mode() if self._is_inference else nullcontext():
            try:
                yield call
            finally:
                for trajectory in trajectories:
                    trajectory.reset()


def _named(model: CompiledModel, call: PlannedCall) -> AbstractContextManager[Any]:
    """Returns the context in which a recorded call is the branch that it was."""
    if call.name is None:
        return nullcontext()
    return model.cache_context(call.name, **({"repeat": call.order} if call.order else {}))


def _plan(candidate: Candidate) -> tuple[Any, ...]:
    return candidate.computed, candidate.weights
