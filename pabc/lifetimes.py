"""Lifetimes: the steps whose values a step reads, and how long each value is kept.

Tables are [num_steps, num_slots].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""Weights of a reuse that takes the last value as it is."""


def find_readings(
    kinds: Sequence[str],
    reuse: Table,
    computed: Table,
    forecasts: Sequence[Forecast],
    positions: Sequence[float],
) -> tuple[Readings, ...]:
    """Returns what each step reads of each slot; slots that act alike share it.

    `positions`, one per step, are what polynomials go over; `kinds` are for messages. Raises
    `ValueError` if a step needs more values than are computed before it, or a polynomial goes over
    equal positions.
    """
    shared: dict[object, Readings] = {}
    readings = []
    for j, (kind, forecast) in enumerate(zip(kinds, forecasts, strict=True)):
        key = reuse[:, j].tobytes(), computed[:, j].tobytes(), forecast
        if key not in shared:
            steps = zip(reuse[:, j].tolist(), computed[:, j].tolist(), strict=True)
            shared[key] = _read_all(steps, forecast, positions, kind)
        readings.append(shared[key])
    return tuple(readings)


def _read_all(
    steps: Iterable[tuple[bool, bool]], forecast: Forecast, positions: Sequence[float], name: str
) -> Readings:
    readings: dict[int, Reading] = {}
    stored: list[int] = []
    for step, (reads, computes) in enumerate(steps):
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


def find_depth(readings: Readings) -> int:
    """Returns the largest number of values that a step reads; 0 if all hold the last one."""
    if all(reading.weights == HELD for reading in readings.values()):
        return 0
    return max(len(reading.sources) for reading in readings.values())


def weigh_rule(
    rule: str, step: int, sources: Sequence[int], positions: Sequence[float]
) -> tuple[float, ...] | None:
    """Returns the weights of values of these steps, newest first, at `step`; 0 for those beyond
    what the rule reads. None if its polynomial goes over equal positions."""
    num_read = min(NUM_POINTS.get(rule, 1), len(sources))
    known = [positions[source] for source in sources[:num_read]]
    weights = HELD if rule == HOLD else extrapolate(positions[step], known)
    return None if weights is None else weights + (0.0,) * (len(sources) - num_read)


def find_sources(readings: Sequence[Readings], num_steps: int) -> npt.NDArray[np.int32]:
    """Returns the newest source of what each step reads, -1 if it reads nothing: int32."""

    def fill(column: Readings, sources: npt.NDArray[np.int32]) -> None:
        for step, reading in column.items():
            sources[step] = reading.sources[0]

    return _tabulate(readings, num_steps, fill)


def find_until(readings: Sequence[Readings], num_steps: int) -> npt.NDArray[np.int32]:
    """Returns the last step that may read a value computed at each step, -1 if none: int32.

    A value that any step from the oldest source on computes is among the newest when it is read.
    """

    def fill(column: Readings, until: npt.NDArray[np.int32]) -> None:
        for step, reading in column.items():
            until[reading.sources[-1] : step] = step

    return _tabulate(readings, num_steps, fill)


def _tabulate(
    readings: Sequence[Readings],
    num_steps: int,
    fill: Callable[[Readings, npt.NDArray[np.int32]], None],
) -> npt.NDArray[np.int32]:
    """Returns a table whose columns, -1 at first, are filled once for slots that act alike."""
    table = np.full((num_steps, len(readings)), -1, dtype=np.int32)
    first: dict[int, int] = {}
    for slot, column in enumerate(readings):
        if first.setdefault(id(column), slot) == slot:
            fill(column, table[:, slot])
        table[:, slot] = table[:, first[id(column)]]
    return table


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
