"""Lifetimes: the steps whose values a step reads, and how long each value is kept.

Tables are [num_steps, num_slots].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pabc.forecasts import HOLD, NUM_POINTS, Forecast, extrapolate

Table = npt.NDArray[np.bool_]


class Reading(NamedTuple):
    """The values that one step reads of one slot: steps that computed them, newest first, and
    the weight of each."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]


Readings = Mapping[int, Reading]
"""Step -> what it reads of a slot."""

HELD = (1.0,)


def find_readings(
    reuse: Sequence[bool],
    computed: Sequence[bool],
    forecast: Forecast,
    positions: Sequence[float],
    name: str,
) -> dict[int, Reading]:
    """Returns what each step reads of a slot that is reused and computed at these steps.

    `positions`, one per step, are what polynomials go over. Raises `ValueError`, which says `name`,
    if a step needs more values than are computed before, or polynomials go over equal positions.
    """
    readings: dict[int, Reading] = {}
    stored: list[int] = []
    for step, (reads, computes) in enumerate(zip(reuse, computed, strict=True)):
        if computes:
            stored.insert(0, step)
        if reads:
            readings[step] = _read(step, stored, forecast, positions, name)
    return readings


def _read(
    step: int, stored: list[int], forecast: Forecast, positions: Sequence[float], name: str
) -> Reading:
    if isinstance(forecast, str):
        sources = tuple(stored[: NUM_POINTS.get(forecast, 1)])
        weights = weigh_rule(forecast, step, sources, positions)
        if weights is None:
            found = ", ".join(f"{positions[source]:g}" for source in sources)
            raise ValueError(
                f"forecast of {name!r}: expected different timesteps for {forecast!r} at step"
                f" {step}, found {found} at steps {', '.join(map(str, sources))}; units='step'"
                " goes over the steps instead"
            )
        return Reading(sources, weights)
    row = forecast[step]
    if not 1 <= len(row) <= len(stored):
        raise ValueError(
            f"forecast of {name!r}: expected at most {len(stored)} weights at step {step}, as many"
            f" values are stored by then, found {len(row)}"
            if row
            else f"forecast of {name!r}: expected 1 weight or more at step {step}, found none"
        )
    return Reading(tuple(stored[: len(row)]), row)


def weigh_rule(
    rule: str, step: int, sources: Sequence[int], positions: Sequence[float]
) -> tuple[float, ...] | None:
    """Returns the weights of values of these steps, newest first, at `step`; 0 for those beyond
    what the rule reads. None if its polynomial goes over equal positions."""
    num_read = min(NUM_POINTS.get(rule, 1), len(sources))
    known = [positions[source] for source in sources[:num_read]]
    weights = HELD if rule == HOLD else extrapolate(positions[step], known)
    return None if weights is None else weights + (0.0,) * (len(sources) - num_read)


def find_until(readings: Sequence[Readings], num_steps: int) -> npt.NDArray[np.int32]:
    """Returns the last step that may read a value computed at each step, -1 if none: int32.

    A value that any step from the oldest source on computes is among the newest when it is read.
    """
    until = np.full((num_steps, len(readings)), -1, dtype=np.int32)
    for slot, column in enumerate(readings):
        for step, reading in column.items():
            until[reading.sources[-1] : step, slot] = step
    return until


def count_live(computed: Table, until: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Returns how many values of each slot are kept at the fullest moment of each step: int64."""
    changes = np.zeros((len(computed) + 1, computed.shape[1]), dtype=np.int64)
    for step, slot in np.argwhere(computed & (until >= 0)):
        changes[step, slot] += 1
        changes[until[step, slot] + 1, slot] -= 1
    return np.cumsum(changes, axis=0)[:-1]


def find_frees(computed: Table, until: npt.NDArray[np.int32]) -> tuple[tuple[int, ...], ...]:
    """Returns per step the slots of which a value is dead after that step, ascending."""
    frees: list[set[int]] = [set() for _ in computed]
    for step, slot in np.argwhere(computed & (until >= 0)).tolist():
        frees[until[step, slot]].add(slot)
    return tuple(tuple(sorted(slots)) for slots in frees)
