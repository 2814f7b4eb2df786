"""Refinement: computed steps are moved while this reduces the error that a plan leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pabc.calibration.compensation import Outputs, compensate

REACH = 3
"""How far a computed step is moved at once, at most."""
MANY = 150
"""Steps over which moves of 1 are tried; with half as many steps, moves of 2, and so on."""
MOST = 30
"""Rounds of moves, at most; few take more than ten."""
TOGETHER = 8
"""Moves that are made at once, at most."""
LEAST_GAIN = 1e-3
"""Relative decrease of the error that is worth another round."""


def refine(
    outputs: Outputs,
    computed: Sequence[int],
    effects: np.ndarray,
    *,
    sources: int,
    starts: tuple[int, ...] = (0,),
    compensation: float = 1.0,
    max_gap: int | None = None,
) -> tuple[int, ...]:
    """Returns computed steps of the same number that leave a smaller error, or the same steps.

    The first step, the last, and those at which another model takes over stay. The error is that of
    compensated forecasts (see `compensate`), in which errors of neighbors cancel: no path of
    separate costs tells it. What is minimized is the error of the result together with the mean
    over the steps of what is left at each, which the model is given.
    """
    how: dict[str, Any] = {
        "sources": sources,
        "starts": starts,
        "compensation": compensation,
    }
    n = outputs.num_steps
    fixed = {*starts, n - 1}
    best = np.zeros(n, dtype=bool)
    best[list(computed)] = True

    def measure(plans: np.ndarray) -> np.ndarray:
        _, norms = compensate(outputs, plans, effects, **how)
        return np.sqrt(norms[:, -1] ** 2 + np.square(norms).mean(1))

    error = measure(best[None])[0]
    for _ in range(MOST):
        moves = find_moves(best, fixed)
        if not moves:
            break
        single = make_moves(best, [[move] for move in moves])
        errors = measure(single)
        errors[find_longest_gaps(single) > (max_gap or n)] = np.inf
        order = [index for index in np.argsort(errors) if errors[index] < error]
        plans = make_moves(best, join_moves([moves[index] for index in order]))
        plans = plans[find_longest_gaps(plans) <= (max_gap or n)]
        if not len(plans):
            break
        errors = measure(plans)
        gain = 1 - errors.min() / error
        best, error = plans[errors.argmin()], errors.min()
        if gain < LEAST_GAIN:
            break
    return tuple(map(int, np.flatnonzero(best)))


def find_moves(computed: np.ndarray, fixed: set[int]) -> list[tuple[int, int]]:
    """Returns the moves of a computed step to one nearby that is not computed."""
    steps, n = np.flatnonzero(computed), len(computed)
    reach = min(REACH, max(1, MANY // n))
    return [
        (int(step), int(to))
        for step in steps
        if step not in fixed
        for to in range(max(0, step - reach), min(n, step + reach + 1))
        if not computed[to]
    ]


def join_moves(moves: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Returns the first move, the first two, and so on, without those that meet earlier ones."""
    groups: list[list[tuple[int, int]]] = []
    taken: set[int] = set()
    for move in moves:
        if not taken & set(move) and len(groups) < TOGETHER:
            taken |= set(move)
            groups.append([*(groups[-1] if groups else []), move])
    return groups


def make_moves(computed: np.ndarray, groups: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    """Returns one plan per group of moves, [groups, n]."""
    plans = np.repeat(computed[None], len(groups), 0)
    for plan, moves in zip(plans, groups, strict=True):
        for step, to in moves:
            plan[step], plan[to] = False, True
    return plans


def find_longest_gaps(computed: np.ndarray) -> np.ndarray:
    """Returns the longest gap between computed steps of each plan, [p]."""
    longest, since = np.zeros(len(computed), dtype=int), np.zeros(len(computed), dtype=int)
    for here in computed.T:
        since += 1
        longest = np.where(here, np.maximum(longest, since), longest)
        since[here] = 0
    return longest
