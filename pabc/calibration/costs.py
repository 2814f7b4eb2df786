"""Turns seconds of calls into a speedup, and a speedup into a number of computed steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """The seconds of one call of the model.

    Attributes:
        full: of a call that is computed.
        skipped: of a call that is forecast.
    """

    full: float = 1.0
    skipped: float = 0.0

    @classmethod
    def of(cls, full: list[float], skipped: list[float]) -> Costs:
        """Returns the lower quartiles of measured seconds; without any, calls cost 1 and 0.

        What other processes take of the machine is added to some calls, and to short ones by a
        larger share: the median of these may be several times what they take alone.
        """
        if not full:
            return cls()
        most, least = (float(np.quantile(x, 0.25)) for x in (full, skipped or [0.0]))
        return cls(most, min(least, most))

    def speedup(self, num_steps: int, computed: int) -> float:
        """Returns the seconds of all calls of a full generation over those of a plan."""
        seconds = computed * self.full + (num_steps - computed) * self.skipped
        return num_steps * self.full / seconds

    def most_computed(self, num_steps: int, speedup: float) -> int:
        """Returns the largest number of computed steps with this speedup; 0: there is none."""
        numbers = range(num_steps, 0, -1)
        return next((b for b in numbers if self.speedup(num_steps, b) >= speedup), 0)
