"""Candidates: plans of different kinds, of which real runs tell the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pabc.schedule import Schedule

Cost = Literal["flat", "direct", "propagated"]
Growth = Literal["none", "early", "decay"]
Rows = tuple[tuple[float, ...], ...]
"""Weights per step, those of the newest source first; () at computed steps."""

LEAST = 1e-12
"""The smallest error that is predicted: rounding leaves more."""


@dataclass(frozen=True)
class Kind:
    """A way to find plans.

    Attributes:
        name: for people.
        sources: how many of the last computed outputs a forecast is the weighted sum of, at most.
        is_fitted: False: the last output is held as it is.
        compensation: how much of the error that is left of the forecasts before it a forecast makes
            up for, 0 to 1. Above 0, computed steps are moved while this helps.
        cost: what an error of a forecast counts: `"flat"`, the same at all steps; `"direct"`, the
            coefficient of the output in the sampler's update; `"propagated"`, its coefficient in
            the final result, while later outputs stay as they are.
        is_guided: True: the error is that of the guided output; False: those of all branches alike.
        growth: what becomes of errors on their way to the result: `"none"`, nothing; `"early"`,
            those of the first steps grow (see `amplify_early`); `"decay"`, they decay with the
            noise (see `expect_growth`), and fewer of the early steps are computed.
        power: that a decay is raised to where steps are chosen.
    """

    name: str
    sources: int = 3
    is_fitted: bool = True
    compensation: float = 0.0
    cost: Cost = "direct"
    is_guided: bool = True
    growth: Growth = "early"
    power: float = 2.0


COMPENSATION = 0.5
"""Half: errors change on their way through the model. To make up for all of what they would have
been without it is no better at many computed steps, and worse at few."""

KINDS = (
    Kind("6 weights, compensated", sources=6, compensation=COMPENSATION),
    Kind("2 weights, decay, each branch", sources=2, growth="decay", is_guided=False),
    Kind("hold, decay, each branch", is_fitted=False, sources=1, growth="decay", is_guided=False),
    Kind("4 weights, compensated", sources=4, compensation=COMPENSATION),
    Kind("2 weights, decay", sources=2, growth="decay"),
    Kind("hold, decay", sources=1, is_fitted=False, growth="decay"),
)
"""The kinds that are searched, those that are most often best first.

Kinds of few weights are right where few steps are computed, and compensated ones where many are.
Plans that assume both compensation and decay are not among them: they are often the best on the
recorded noise, and 15 dB worse on other noise.
"""


@dataclass(frozen=True)
class Candidate:
    """A plan: which steps are computed, and how the outputs of the others are forecast.

    Attributes:
        name: how it was found.
        computed: the steps, in order.
        weights: per step, those of the last computed outputs, the newest first; empty at computed
            steps.
        error: the predicted root mean square of the error of the final result; above 0.
    """

    name: str
    computed: tuple[int, ...]
    weights: Rows
    error: float

    def schedule(self, timesteps: Sequence[float], label: str | None = None) -> Schedule:
        """Returns the schedule that runs this plan over these timesteps, one per step.

        Raises ValueError for another number of timesteps.
        """
        if len(timesteps) != len(self.weights):
            raise ValueError(
                f"timesteps: expected {len(self.weights)}, one per step, found {len(timesteps)}"
            )
        width = max(1, *map(len, self.weights))
        rows = np.zeros((len(self.weights), width))
        for row, weights in zip(rows, self.weights, strict=True):
            row[: len(weights)] = weights
        return Schedule.skip(timesteps, self.computed, forecast=rows, label=label or self.name)

    @property
    def is_held(self) -> bool:
        """True if all forecasts repeat the last output: no weight was fitted."""
        return all(weights in ((), (1.0,)) for weights in self.weights)

    def decibels(self, peak: float) -> float:
        """Returns the predicted PSNR of the final result, whose values have this range."""
        return 20 * math.log10(peak / self.error) if peak > 0 else math.inf
