"""Ends of generations: told from timesteps, and from the coefficients of a flow's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from pabc.automatic.ends import find_levels, heads_for_zero, reaches_end
from pabc.calibration.updates import Updates

STEPS = (8, 20, 28, 50)


def flow(n: int, shift: float) -> list[float]:
    """The levels of noise at the calls of a flow."""
    u = np.linspace(1, 0, n + 1)[:-1]
    return (shift * u / (1 + (shift - 1) * u)).tolist()


SPACINGS = {
    "leading": lambda n: [float(t) for t in np.arange(n)[::-1] * (1000 // n)],
    "leading, offset 1": lambda n: [float(t) + 1 for t in np.arange(n)[::-1] * (1000 // n)],
    "trailing": lambda n: [float(round(t)) - 1 for t in np.arange(1000, 0, -1000 / n)],
    "linspace": lambda n: np.linspace(999, 0, n).round().tolist(),
    "twice a step, as Heun's method": lambda n: np.repeat(np.linspace(999, 0, n), 2)[1:].tolist(),
    "flow": lambda n: [1000 * s for s in flow(n, 1)],
    "flow, shift 3": lambda n: flow(n, 3),
    "flow, shift 7": lambda n: flow(n, 7),
    "flow, shift 17": lambda n: flow(n, 17),
}


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("n", STEPS)
def test_whole_generations_head_for_zero_and_others_do_not(name: str, n: int) -> None:
    timesteps = SPACINGS[name](n)
    assert heads_for_zero(timesteps)
    for left in (4, n // 3, n // 2, n - 3):
        assert not heads_for_zero(timesteps[: -max(left, 4)]), f"{left} steps before the end"


@pytest.mark.parametrize(
    "timesteps", [[0.0, 0.25, 0.5, 0.75], [1.1, 0.2, -0.7, -1.5], [5.0, 5.0, 5.0], [3.0]]
)
def test_other_numbers_do_not_tell_the_end(timesteps: Sequence[float]) -> None:
    assert not heads_for_zero(timesteps)


def flow_updates(levels: Sequence[float], *, sign: float = -1.0, order: int = 1) -> Updates:
    """The coefficients of Euler's or Adams-Bashforth's method; the last is not known."""
    n = len(levels)
    inputs, outputs, residual = np.zeros((n, 3)), np.zeros((n, 2, 3)), np.zeros(n)
    inputs[:, 0] = 1
    for i, (now, after) in enumerate(pairwise(levels)):
        rows = [[1.0], [1.5, -0.5]][order - 1 if i else 0]
        for lag, weight in enumerate(rows):
            outputs[i, :, lag] = sign * weight * (now - after) * np.array([-2.5, 3.5])
    return Updates(inputs, outputs, residual)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_levels_follow_from_the_sampler(sign: float, order: int) -> None:
    levels = flow(20, 3)
    updates = flow_updates(levels, sign=sign, order=order)
    assert find_levels(updates) == pytest.approx(levels)
    rising = [1 - level for level in levels]
    assert reaches_end(rising, updates)
    assert not reaches_end(rising[:12], flow_updates(levels[:12], sign=sign, order=order))


def test_levels_are_not_told_of_samplers_that_are_no_flow() -> None:
    updates = flow_updates(flow(20, 3))
    assert find_levels(replace(updates, inputs=1.02 * updates.inputs)) is None
    assert find_levels(replace(updates, residual=updates.residual + 0.1)) is None
