"""Tells whether a recorded generation came to its end, or was left before.

A loop of a user's own does not say which call is its last. After the last one of a whole generation
the sampler removes what noise is left, so the level of noise of the last call, and those before it,
head for 0 at the very next step. A loop that was left by `break` would have needed more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pabc.calibration.updates import Updates

SMALL = 0.02
"""The share of the first level of noise that counts as none."""
LAST = 1.5
"""Levels head for 0 at the next step, or at the one after that: this is the limit between both."""
LINEAR = 1e-2
"""The relative residual up to which the coefficients of a sampler are known."""


def reaches_end(timesteps: Sequence[float], updates: Updates) -> bool:
    """Returns whether the sampler removes all noise at the step after the last call.

    This is told from the timesteps, where they fall towards 0, and else, for a rectified flow, from
    the coefficients of the sampler. False: it does not, or nothing tells it.
    """
    if heads_for_zero(timesteps):
        return True
    levels = find_levels(updates)
    return levels is not None and heads_for_zero(levels)


def heads_for_zero(levels: Sequence[float]) -> bool:
    """Returns whether the next of these falling numbers would be 0.

    The levels of a flow of n steps, s u / (1 + (s - 1) u) for a shift s and u = k / n, are such
    that 1 / level is linear in 1 / k. So three of them tell k, the number of steps that are left,
    whatever shift and n are: the second differences of 1 / k are as 1 / (k (k + 1)).
    """
    distinct = [levels[0], *(b for a, b in pairwise(levels) if a != b)][-3:]
    if min(levels) < 0 or any(a <= b for a, b in pairwise(distinct)):
        return False
    last, *before = reversed(distinct)
    if last <= SMALL * levels[0]:
        return True
    if len(before) < 2:
        return bool(before) and last <= LAST * (before[0] - last)
    new = 1 / last - 1 / before[0]
    old = 1 / before[0] - 1 / before[1]
    return new > old and 2 / (new / old - 1) <= LAST


def find_levels(updates: Updates) -> list[float] | None:
    """Returns the share of noise in the latents of each call of a rectified flow, 1 in the first.

    Its outputs are noise less data, or the reverse, so that latents have as much noise more as
    their coefficients say. None: the sampler does not keep the sum of noise and data, as that of a
    flow does, or is not known well enough.
    """
    known = updates.num_steps - 1
    inputs, outputs = updates.inputs[:known], updates.outputs[:known].sum(1)
    if not known or float(updates.residual[:known].max()) > LINEAR:
        return None
    if not np.allclose(inputs.sum(1), 1.0, rtol=0, atol=1e-3):
        return None
    sign = -np.sign(outputs[0].sum())
    levels = [1.0]
    for step in range(known):
        lags = range(min(inputs.shape[1], step + 1))
        level = sum(float(inputs[step, lag]) * levels[step - lag] for lag in lags)
        levels.append(level + float(sign * outputs[step].sum()))
    return levels
