"""A plan that was really run, and how far its results were from the full ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np

from pabc.calibration.candidates import Candidate
from pabc.schedule import Schedule

Plan = tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]
"""The computed steps and the weights per step: what tells plans apart."""

FLATTERY = 3.0
"""Decibels that plans with fitted weights owe to the recorded noise, to which they were fitted."""


@dataclass(frozen=True)
class Measurement:
    """A candidate, and the PSNR of its generations to the full ones of the same seeds, in dB.

    Attributes:
        candidate: what was run.
        predicted: the PSNR that the search predicts for it, in dB; good for comparisons of plans
            that were found in the same way.
        decibels: seed -> measured PSNR.
    """

    candidate: Candidate
    predicted: float
    decibels: Mapping[int, float] = field(default_factory=dict)

    @property
    def num_computed(self) -> int:
        """The number of steps that call the model."""
        return len(self.candidate.computed)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return mean(self.decibels.values())

    @property
    def worst(self) -> float:
        """The lowest of all seeds."""
        return min(self.decibels.values())

    @property
    def merit(self) -> float:
        """Returns the mean, less what fitted weights owe to the recording, to compare plans by."""
        return self.mean if self.candidate.is_held else self.mean - FLATTERY

    @property
    def plan(self) -> Plan:
        """The computed steps and the weights, which tell it from other plans."""
        return self.candidate.computed, self.candidate.weights


def full_plan(num_steps: int) -> Candidate:
    """Returns the plan that computes all steps."""
    return Candidate("full", tuple(range(num_steps)), ((),) * num_steps, 0.0)


def schedule_of(candidate: Candidate, timesteps: tuple[float, ...]) -> Schedule:
    """Returns the schedule of a plan, labeled with its size and kind."""
    count, n = len(candidate.computed), len(timesteps)
    if count == n:
        return Schedule.none(timesteps)
    return candidate.schedule(timesteps, f"calibrated: {count} of {n} steps, {candidate.name}")


def to_arrays(measured: Sequence[Measurement], num_steps: int) -> dict[str, np.ndarray]:
    """Returns measurements as arrays by name."""
    seeds = sorted({seed for each in measured for seed in each.decibels})
    width = max([1, *(len(row) for each in measured for row in each.candidate.weights)])
    weights = np.full((len(measured), num_steps, width), math.nan)
    computed = np.zeros((len(measured), num_steps), dtype=bool)
    decibels = np.full((len(measured), len(seeds)), math.nan)
    for i, each in enumerate(measured):
        computed[i, list(each.candidate.computed)] = True
        decibels[i] = [each.decibels.get(seed, math.nan) for seed in seeds]
        for step, row in enumerate(each.candidate.weights):
            weights[i, step, : len(row)] = row
    return {
        "names": np.asarray([each.candidate.name for each in measured], dtype=str),
        "errors": np.asarray([each.candidate.error for each in measured], dtype=np.float64),
        "predicted": np.asarray([each.predicted for each in measured], dtype=np.float64),
        "seeds": np.asarray(seeds, dtype=np.int64),
        "computed": computed,
        "weights": weights,
        "decibels": decibels,
    }


def from_arrays(arrays: Mapping[str, Any]) -> tuple[Measurement, ...]:
    """Returns the measurements that `to_arrays` gave."""
    seeds = arrays["seeds"].tolist()
    return tuple(
        Measurement(
            Candidate(
                str(name),
                tuple(np.flatnonzero(computed).tolist()),
                tuple(tuple(row[np.isfinite(row)].tolist()) for row in weights),
                float(error),
            ),
            float(predicted),
            {s: d for s, d in zip(seeds, decibels.tolist(), strict=True) if not math.isnan(d)},
        )
        for name, computed, weights, error, predicted, decibels in zip(
            *(arrays[key] for key in _KEYS), strict=True
        )
    )


_KEYS = ("names", "computed", "weights", "errors", "predicted", "decibels")
