"""The error of calls that contradict the plan, or the state that they would use."""

from __future__ import annotations

MAKE_SCHEDULE = "make the schedule from the timesteps that run"
"""The advice for a call whose timestep is not one of the schedule's."""


class GuardError(RuntimeError):
    """A call contradicts the plan, or the state it would use: says what was expected and found."""
