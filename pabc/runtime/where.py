"""Reads what callers state of their loop around its calls, as diffusers' pipelines do."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pabc.runtime.guards import MAKE_SCHEDULE, GuardError
from pabc.runtime.timesteps import FORWARD, SPELLINGS, Reading, may_be_timestep, read
from pabc.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Where:
    """The name of the calls within a context, and what is stated of the loop.

    Attributes:
        name: of the branch.
        step: the step of the loop; None: it is counted.
        num_steps: how many steps the loop has; None: not stated.
        said: the timestep or noise level, by the name of the argument.
        repeat: how many calls of this name came before in the step, which are given the same
            conditions; None: not stated.
    """

    name: str
    step: int | None = None
    num_steps: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    repeat: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        step_index: object = None,
        num_inference_steps: object = None,
        sigma: object = None,
        timestep: object = None,
        repeat: object = None,
        **others: object,
    ) -> Where:
        """Returns what the arguments of `cache_context` state; `others` are ignored.

        Raises TypeError or ValueError for a step that is no integer of 0 or more.
        """
        step = _as_integer("step_index", step_index)
        num_steps = _as_integer("num_inference_steps", num_inference_steps)
        values = {"sigma": sigma, "timestep": timestep}
        said = {key: value for key, value in values.items() if value is not None}
        return cls(name, step, num_steps, said, _as_integer("repeat", repeat))

    def check(self, schedule: Schedule) -> None:
        """Raises GuardError where what is stated contradicts the schedule."""
        timesteps = schedule.timesteps
        # Second-order schedulers list a timestep for each of the two calls that make a step.
        if self.num_steps not in (None, len(timesteps), len(set(timesteps))):
            raise GuardError(
                f"num_inference_steps: expected {len(timesteps)}, as many as the schedule has, "
                f"found {self.num_steps}; {MAKE_SCHEDULE}"
            )
        if timesteps == tuple(range(len(timesteps))) or self.step is None:
            return
        for name, value in self.said.items():
            reading = read(value) if _is_available(value) else None
            if isinstance(reading, Reading) and self.step < len(timesteps):
                self._check_time(name, reading, timesteps)

    def _check_time(self, name: str, reading: Reading, timesteps: tuple[float, ...]) -> None:
        assert self.step is not None
        found = [i for i, t in enumerate(timesteps) if _is_close(reading, t, len(SPELLINGS))]
        is_other = any(_is_close(reading, t, len(FORWARD)) for t in timesteps)
        if self.step not in found and reading.number and (is_other or name == "timestep"):
            of = f"that of step {found[0]}" if found else "no step's"
            raise GuardError(
                f"{name}: expected that of step {self.step}, whose timestep is "
                f"{timesteps[self.step]:g}, found {reading.number:g}, {of}; {MAKE_SCHEDULE}"
            )


def _is_close(reading: Reading, timestep: float, num_spellings: int) -> bool:
    return any(reading.is_close(spell(timestep)) for spell in SPELLINGS[:num_spellings])


def _is_available(value: Any) -> bool:
    return may_be_timestep(value) and (not isinstance(value, torch.Tensor) or value.is_cpu)


def _as_integer(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, found {value!r}") from None
    if number < 0:
        raise ValueError(f"{name}: expected 0 or more, found {number}")
    return number
