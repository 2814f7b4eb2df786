"""Steps: those that a range, a window, or a number of computed steps selects."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pabc.base.kinds import check_kind
from pabc.validate import as_pair, to_lists

Mask = tuple[bool, ...]
Window = tuple[float, float]

EDGE = 0.15
"""Share of the steps that are computed at each end, where only their number is given."""


def pyramid_mask(every: int, inside: Sequence[bool]) -> Mask:
    """Returns where a step reuses: inside, unless its index is a multiple of `every`."""
    return tuple(is_inside and step % every != 0 for step, is_inside in enumerate(inside))


def find_inside_per_kind(
    timesteps: tuple[float, ...],
    ranges: Mapping[str, int],
    window: Window | Mapping[str, Window] | None,
    fraction: Window | None,
) -> dict[str, list[bool]]:
    """Returns for each kind with a range which steps lie in its window."""
    if not isinstance(window, Mapping):
        return dict.fromkeys(ranges, find_inside(timesteps, window, fraction))
    for kind in window:
        check_kind(kind, "window")
        if kind not in ranges:
            raise ValueError(
                f"window: expected pairs for kinds with a range, found one for {kind!r}"
            )
    if fraction is not None:
        raise ValueError("window, fraction: expected one of them, found both")
    return {kind: find_inside(timesteps, window.get(kind), None) for kind in ranges}


def find_inside(
    timesteps: tuple[float, ...], window: Window | None, fraction: Window | None
) -> list[bool]:
    """Returns for each step whether it lies in the window or fraction; all do if both are None."""
    if window is not None and fraction is not None:
        raise ValueError("window, fraction: expected one of them, found both")
    if fraction is not None:
        low, high = as_pair(fraction, "fraction")
        if low < 0 or high > 1:
            raise ValueError(f"fraction: expected 0 <= low < high <= 1, found {fraction!r}")
        # The decimal that was written, not its binary neighbor: 0.7 of 10 steps ends before step 7.
        first, end = (Fraction(repr(bound)) * len(timesteps) for bound in (low, high))
        return [first <= step < end for step in range(len(timesteps))]
    if window is None:
        return [True] * len(timesteps)
    low, high = as_pair(window, "window")
    is_integral = low.is_integer() and high.is_integer()
    inside = [low < (int(t) if is_integral else t) < high for t in timesteps]
    if not any(inside):
        warnings.warn(
            f"window ({low:g}, {high:g}) holds none of the {len(timesteps)} timesteps, which run"
            f" from {timesteps[0]:g} to {timesteps[-1]:g}: nothing is reused there",
            stacklevel=4,
        )
    return inside


def as_computed(value: Any, num_steps: int) -> frozenset[int]:
    """Returns the steps that compute, from their indices, 0 among them, or from their number.

    Raises `ValueError` on anything else.
    """
    items = to_lists(value)
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        return spread(_as_count(items, num_steps), num_steps)
    allowed = f"computed: expected different indices of steps, 0 to {num_steps - 1}"
    steps: set[int] = set()
    for item in items:
        try:
            step = -1 if isinstance(item, bool | np.bool_) else operator.index(item)
        except (TypeError, RuntimeError):
            step = -1
        if not 0 <= step < num_steps:
            raise ValueError(f"{allowed}, found {item!r}")
        if step in steps:
            raise ValueError(f"{allowed}, found {step} twice")
        steps.add(step)
    if 0 not in steps:
        raise ValueError(f"{allowed}, with 0 among them, found {sorted(steps)}")
    return frozenset(steps)


def spread(count: int, num_steps: int) -> frozenset[int]:
    """Returns `count` of the steps: the first and the last 15 %, and evenly between.

    At each end these are `round(0.15 * num_steps)`, but no more than a third of `count`, and at
    least one (of a single step, the first).
    """
    head = max(1, min(round(EDGE * num_steps), count // 3))
    tail = min(head, count - 1)
    num_between, room = count - head - tail, num_steps - head - tail
    # Equal gaps between the ends, rounded half up: gaps of 1 and more stay so, and none coincide.
    between = {
        head - 1 + (2 * i * (room + 1) + num_between + 1) // (2 * (num_between + 1))
        for i in range(1, num_between + 1)
    }
    return frozenset({*range(head), *between, *range(num_steps - tail, num_steps)})


def _as_count(value: Any, num_steps: int) -> int:
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count <= num_steps:
        raise ValueError(
            f"computed: expected a number of steps, 1 to {num_steps}, or their indices, found"
            f" {value!r}"
        )
    return count
